"""All that `Explicit` answers besides products: blocks, both solvers, scores, singular matrices."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import sklearn.covariance
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fimkit import Explicit, IFVPUsageError, ModelData, SingularFisherError
from fimkit.operators import DenseOperator, GramOperator
from tests import dense, reference
from tests.cases import split

N = 9
SOLVERS = ["primal", "dual"]
FISHER = [{"fisher": "empirical"}, {"fisher": "exact"}]


class Net(nn.Module):
    """Two layers, the second's parameters registered around the first's."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.8, 1.2, -1.0]))
        self.first = nn.Linear(3, 2)
        self.last = nn.Linear(2, 3, bias=False)
        self.shift = nn.Parameter(torch.tensor([0.3, -0.1, 0.2]))

    def forward(self, x):
        return self.last(self.first(x * self.scale).tanh()) + self.shift


# Number of parameters, and where each lies in the flat vector.
P = 20
COLUMNS = {
    "scale": range(0, 3),
    "shift": range(3, 6),
    "first.weight": range(6, 12),
    "first.bias": range(12, 14),
    "last.weight": range(14, 20),
}


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net().double()
    assert [name for name, _ in net.named_parameters()] == list(COLUMNS)
    return net


@pytest.fixture
def model():
    return network()


def data(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (n,), generator=generator)


@cache
def weighted_rows(n, seed=0, kind="empirical"):
    """Return rows by the definition."""
    batch = data(n, seed)
    examples = dense.examples_of(network(), batch, torch.arange(3)[None], dense.CATEGORICAL)
    return examples.rows(kind, batch[1])


def held_out(n=5):
    return weighted_rows(n, seed=1).gradients


# -- which form is kept ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "rows_per_example"),
    [
        ({}, 1),
        ({"fisher": "predicted"}, 1),
        ({"fisher": "mc", "n_mc_samples": 4, "random_state": 0}, 4),
        ({"fisher": "exact"}, 3),
    ],
    ids=["empirical", "predicted", "mc", "exact"],
)
def test_primal_exactly_from_as_many_rows_as_parameters(model, settings, rows_per_example):
    """Rows, not examples, are compared with p, and those of all batches."""
    least = -(-P // rows_per_example)
    for n in (least - 1, least):
        for sizes in ((1,), (7,), (n,)):
            fitted = Explicit(1e-2, **settings).fit(model, split(data(n), n, *sizes))
            kind = DenseOperator if n * rows_per_example >= P else GramOperator
            assert type(fitted.fisher_) is kind
            both = [
                Explicit(1e-2, solver=solver, **settings).fit(model, [data(n)])
                for solver in ("primal", "dual")
            ]
            assert [type(other.fisher_) for other in both] == [DenseOperator, GramOperator]
            vectors = held_out()
            expected = fitted.transform(vectors)
            assert all(
                reference.error(other.transform(vectors), expected) <= 1e-9 for other in both
            )


def test_each_block_has_its_own_form(model):
    """A block turns primal when there are as many rows as it has parameters."""
    fitted = Explicit(blocks="parameter").fit(model, [data(5)])
    kinds = {name: type(operator) for name, (_, operator) in fitted.fisher_.blocks.items()}
    expected = {name: DenseOperator if len(c) <= 5 else GramOperator for name, c in COLUMNS.items()}
    assert kinds == expected


class Stream(IterableDataset):
    def __init__(self, tensors):
        self.examples = list(zip(*tensors, strict=True))

    def __iter__(self):
        return iter(self.examples)


@pytest.mark.parametrize("n", [P - 1, P, 3 * P])
def test_data_without_a_length(model, n):
    """Rows are kept until there are enough of them for the matrix."""
    expected = weighted_rows(n).fisher()
    for batches in (DataLoader(Stream(data(n)), 7), iter(split(data(n), n, 7))):
        fitted = Explicit(1e-2).fit(model, batches)
        assert fitted.n_samples_seen_ == n
        assert isinstance(fitted.fisher_, DenseOperator if n >= P else GramOperator)
        assert dense.distance(fitted.fisher_.to_dense(), expected) <= 1e-12


# -- blocks ----------------------------------------------------------------------------------------

MAPPING = {"ends": ["last.*", "scale"], "middle": "first.bias", "rest": ["first.weight", "shift"]}
BLOCKS = {
    "all": ("all", {"all": list(COLUMNS)}),
    "layer": (
        "layer",
        {
            "model": ["scale", "shift"],
            "first": ["first.weight", "first.bias"],
            "last": ["last.weight"],
        },
    ),
    "parameter": ("parameter", {name: [name] for name in COLUMNS}),
    "mapping": (
        MAPPING,
        {
            "ends": ["scale", "last.weight"],
            "middle": ["first.bias"],
            "rest": ["shift", "first.weight"],
        },
    ),
    "one block in a mapping": ({"everything": "*"}, {"everything": list(COLUMNS)}),
    "a split weight and bias": (
        {"weights": "*.weight", "others": ["*.bias", "s*"]},
        {"weights": ["first.weight", "last.weight"], "others": ["scale", "shift", "first.bias"]},
    ),
}
parametrize_blocks = pytest.mark.parametrize(
    ("blocks", "members"), BLOCKS.values(), ids=list(BLOCKS)
)


def of_blocks(members):
    return {
        block: torch.tensor([c for name in names for c in COLUMNS[name]])
        for block, names in members.items()
    }


def block_diagonal(matrix, columns):
    out = torch.zeros_like(matrix)
    for own in columns.values():
        out[own[:, None], own] = matrix[own[:, None], own]
    return out


@parametrize_blocks
@pytest.mark.parametrize("settings", FISHER, ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("size", [1, 7, N])
def test_blocks(model, blocks, members, settings, solver, size):
    """The matrix without what is between blocks, and λ by block, number by number."""
    columns = of_blocks(members)
    expected = block_diagonal(weighted_rows(N, kind=settings["fisher"]).fisher(), columns)
    fitted = Explicit(blocks=blocks, solver=solver, **settings).fit(model, split(data(N), N, size))
    operator = fitted.fisher_
    assert dense.distance(operator.to_dense(), expected) <= 1e-12
    assert dense.distance(operator.diagonal(), expected.diagonal()) <= 1e-12
    assert operator.trace() == pytest.approx(float(expected.trace()), rel=1e-12)

    automatic = {b: dense.heuristic(expected[own[:, None], own]) for b, own in columns.items()}
    given = {block: 0.1 * (i + 1) for i, block in enumerate(columns)}
    for regularization, values in [
        ("auto", automatic),
        (0.05, dict.fromkeys(columns, 0.05)),
        (dict(reversed(given.items())), given),
        (list(given.values()), given),
        (np.array(list(given.values())), given),
    ]:
        fitted.set_params(regularization=regularization)
        found = fitted.regularization_
        found = found if isinstance(found, dict) else dict.fromkeys(columns, found)
        assert found == pytest.approx(values, rel=1e-12)
        damping = torch.empty(P, dtype=torch.float64)
        for block, own in columns.items():
            damping[own] = values[block]
        vectors = held_out()
        solution = dense.solve(expected, vectors, damping)
        assert reference.error(fitted.transform(vectors), solution) <= 1e-9
        product = vectors @ dense.damped(expected, damping)
        assert reference.error(fitted.inverse_transform(vectors), product) <= 1e-12
        logs = dense.log_likelihoods(expected, vectors, damping)
        np.testing.assert_allclose(fitted.score_samples(vectors), logs, rtol=1e-9)
        np.testing.assert_allclose(
            fitted.mahalanobis(vectors), (vectors * solution).sum(1), rtol=1e-9
        )


@parametrize_blocks
def test_path_of_blocks(model, blocks, members):
    """Every λ of a path is for all blocks."""
    expected = block_diagonal(weighted_rows(N).fisher(), of_blocks(members))
    fitted = Explicit(blocks=blocks).fit(model, [data(N)])
    path = fitted.score_path(held_out(), [0.01, 0.3])
    logs = [dense.log_likelihoods(expected, held_out(), d).mean() for d in (0.01, 0.3)]
    np.testing.assert_allclose(path, logs, rtol=1e-9)


# -- λ ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("blocks", ["all", "layer"])
def test_regularization_set_after_the_fit(model, solver, blocks):
    """Has the numbers of a refit, in any order, and nothing is added for good."""
    vectors = held_out()
    settings = {"solver": solver, "blocks": blocks}
    fitted = Explicit(1e-3, **settings).fit(model, [data(N)])
    for regularization in (1.0, 1e-3, "auto", 10, 1e-4, "auto", 1e-3):
        fitted.set_params(regularization=regularization)
        refit = Explicit(regularization, **settings).fit(model, [data(N)])
        assert fitted.regularization_ == refit.regularization_
        for name in ("transform", "inverse_transform"):
            found, expected = getattr(fitted, name)(vectors), getattr(refit, name)(vectors)
            assert reference.error(found, expected) <= 1e-12
        for name in ("score", "score_samples", "mahalanobis"):
            found, expected = getattr(fitted, name)(vectors), getattr(refit, name)(vectors)
            np.testing.assert_allclose(found, expected, rtol=1e-12)


# -- products back and forth -----------------------------------------------------------------------

CONTAINERS = {
    "vector": lambda v: v[0],
    "matrix": lambda v: v,
    "array": lambda v: v.numpy(),
    "array of float32": lambda v: v.numpy().astype(np.float32),
    "mapping": lambda v: {name: v[:, c.start : c.stop] for name, c in CUT.items()},
    "sequence": lambda v: [v[0, c.start : c.stop] for c in CUT.values()],
}
# The parameters that have one dimension, in a model of only those.
CUT = {"0": range(0, 3), "1": range(3, 6)}


class Vectors(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_parameter("0", nn.Parameter(torch.tensor([0.8, 1.2, -1.0])))
        self.register_parameter("1", nn.Parameter(torch.tensor([0.1, -0.2, 0.4])))

    def forward(self, x):
        first, second = self.parameters()
        return x * first + (x * second).sum(1, True) * second.cos()


def parts(container):
    """Return the arrays in a container."""
    if isinstance(container, dict):
        return list(container.values())
    return container if isinstance(container, list) else [container]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("container", CONTAINERS)
def test_round_trip(container, solver):
    """`inverse_transform` undoes `transform`, and the other way, in the container given."""
    fitted = Explicit(1e-2, solver=solver).fit(Vectors().double(), [data(4)])
    given = CONTAINERS[container](torch.randn(3, 6, dtype=torch.float64))
    for there, back in [
        (fitted.transform, fitted.inverse_transform),
        (fitted.inverse_transform, fitted.transform),
    ]:
        found = back(there(given))
        assert type(found) is type(given)
        for a, b in zip(parts(found), parts(given), strict=True):
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            tolerance = 2e-4 if "32" in str(a.dtype) else 1e-10
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("settings", [*FISHER, {"fisher": "mc", "random_state": 0}], ids=str)
@pytest.mark.parametrize("size", [1, 4, N])
def test_fit_transform(model, settings, size):
    """The IFVPs of the examples' own gradients at their targets, whatever was fitted."""
    tensors = ModelData(model, data(N), batch_size=size)
    estimator = Explicit(1e-2, **settings)
    found = estimator.fit_transform(tensors)
    assert isinstance(found, np.ndarray)
    assert found.dtype == np.float64
    gradients = weighted_rows(N).gradients
    expected = dense.solve(estimator.fisher_.to_dense(), gradients, 1e-2)
    assert reference.error(found, expected) <= 1e-9
    np.testing.assert_array_equal(found, estimator.transform(tensors))
    np.testing.assert_array_equal(estimator.fit_transform(tensors, data(N)[1].numpy()), found)
    back = estimator.inverse_transform(found)
    assert reference.error(back, gradients) <= 1e-9
    products = gradients @ dense.damped(estimator.fisher_.to_dense(), 1e-2)
    assert reference.error(estimator.inverse_transform(tensors), products) <= 1e-11


# -- scores ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("regularization", [1e-3, 0.1, 10.0, "auto"])
@pytest.mark.parametrize("settings", FISHER, ids=str)
def test_scores_are_log_likelihoods(model, solver, regularization, settings):
    """Of a Gaussian of covariance F + λ I, as scipy and scikit-learn have it."""
    expected = weighted_rows(N, kind=settings["fisher"]).fisher()
    damping = dense.heuristic(expected) if regularization == "auto" else regularization
    fitted = Explicit(regularization, solver=solver, **settings).fit(model, split(data(N), N, 4))
    vectors = held_out()
    logs = dense.log_likelihoods(expected, vectors, damping)
    found = fitted.score_samples(vectors)
    assert isinstance(found, np.ndarray)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, logs, rtol=1e-10)
    np.testing.assert_allclose(fitted.score_samples(vectors[0]), logs[:1], rtol=1e-10)
    np.testing.assert_allclose(fitted.score_samples(vectors.numpy()), logs, rtol=1e-10)
    score = fitted.score(vectors, y=None)
    assert isinstance(score, float)
    assert score == pytest.approx(logs.mean(), rel=1e-10)
    precision = np.linalg.inv(dense.damped(expected, damping).numpy())
    second_moments = sklearn.covariance.empirical_covariance(vectors, assume_centered=True)
    theirs = sklearn.covariance.log_likelihood(second_moments, precision)
    assert score == pytest.approx(theirs, rel=1e-10)


@pytest.mark.parametrize("solver", SOLVERS)
def test_scores_of_scikit_learn(model, solver):
    """The Fisher is the covariance that scikit-learn's estimators fit to the gradients."""
    gradients = weighted_rows(60).gradients
    fitted = Explicit(1e-2, solver=solver).fit(model, split(data(60), 60, 25))
    theirs = sklearn.covariance.EmpiricalCovariance(assume_centered=True).fit(gradients)
    np.testing.assert_allclose(fitted.fisher_.to_dense(), theirs.covariance_, atol=1e-12)
    # Theirs shrinks towards a multiple of the identity: (1 - s) F + s μ I.
    shrinkage = 0.2
    shrunk = sklearn.covariance.ShrunkCovariance(shrinkage=shrinkage, assume_centered=True)
    shrunk.fit(gradients)
    scale = 1 - shrinkage
    damping = shrinkage * np.trace(theirs.covariance_) / P / scale
    vectors = held_out()
    fitted.set_params(regularization=damping)
    ours = fitted.score(vectors * scale**-0.5) - P / 2 * np.log(scale)
    assert ours == pytest.approx(shrunk.score(vectors), rel=1e-9)
    norms = fitted.mahalanobis(vectors) / scale
    np.testing.assert_allclose(norms, shrunk.mahalanobis(vectors), rtol=1e-9)


def test_score_orders_regularizations(model):
    """Held-out gradients tell too little and too much of λ from enough."""
    fitted = Explicit().fit(model, [data(15)])
    others = held_out(400)
    path = fitted.score_path(others, [1e-6, 0.02, 1e4])
    assert path[1] > path[0]
    assert path[1] > path[2]


@pytest.mark.parametrize("kind", ["empirical", "exact", "predicted"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("size", [1, 4, N])
def test_scores_of_examples(model, kind, solver, size):
    """Rows are of the fitted kind, each example's quadratic forms summed by weight."""
    fitted = Explicit(0.1, fisher=kind, solver=solver).fit(model, [data(N)])
    matrix = weighted_rows(N, kind=kind).fisher()
    others = weighted_rows(6, 1, kind)
    quadratics = (dense.solve(matrix, others.gradients, 0.1) * others.gradients).sum(1)
    quadratics = (quadratics.view(6, -1) * others.weights).sum(1)
    logdet = np.linalg.slogdet(dense.damped(matrix, 0.1).numpy())[1]
    expected = -(quadratics + logdet + P * np.log(2 * np.pi)) / 2
    tensors = ModelData(model, data(6, seed=1), batch_size=size)
    np.testing.assert_allclose(fitted.score_samples(tensors), expected, rtol=1e-10)
    assert fitted.score(tensors) == pytest.approx(float(expected.mean()), rel=1e-10)
    path = fitted.score_path(tensors, [0.1])
    assert path == pytest.approx([float(expected.mean())], rel=1e-10)
    subset = fitted.score_samples(tensors[[4, 1]])
    np.testing.assert_allclose(subset, expected[[4, 1]], rtol=1e-10)
    # Where quadratic forms are at targets, whatever was fitted:
    at_targets = weighted_rows(6, 1).gradients
    norms = (dense.solve(matrix, at_targets, 0.1) * at_targets).sum(1)
    np.testing.assert_allclose(fitted.mahalanobis(tensors), norms, rtol=1e-9)


PATH = [1e-5, 1e-3, 0.02, 0.5, 30.0, 1e5]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("blocks", ["all", "layer", "parameter", MAPPING], ids=str)
@pytest.mark.parametrize("settings", FISHER, ids=str)
@pytest.mark.parametrize("own", [True, False], ids=["training gradients", "held-out gradients"])
def test_path_equals_scores_one_by_one(model, solver, blocks, settings, own):
    estimator = Explicit(solver=solver, blocks=blocks, **settings).fit(model, [data(N)])
    vectors = weighted_rows(N).gradients if own else held_out()
    for given in (vectors, ModelData(model, data(4, seed=2))):
        path = estimator.score_path(given, PATH)
        assert isinstance(path, np.ndarray)
        assert path.dtype == np.float64
        one_by_one = [estimator.set_params(regularization=d).score(given) for d in PATH]
        np.testing.assert_allclose(path, one_by_one, rtol=1e-9)
        np.testing.assert_allclose(estimator.score_path(given, PATH[::-1]), path[::-1], rtol=1e-12)


def test_path_takes_one_decomposition(model, monkeypatch):
    """However many λ, and none for the fit or for products."""
    calls = []
    eigh = np.linalg.eigh
    monkeypatch.setattr(np.linalg, "eigh", lambda *a, **k: calls.append(1) or eigh(*a, **k))
    for solver in SOLVERS:
        fitted = Explicit(1e-2, solver=solver).fit(model, [data(N)])
        fitted.transform(held_out())
        fitted.score(held_out())
        assert not calls
        fitted.score_path(held_out(), np.logspace(-4, 0, 30))
        assert len(calls) == 1
        calls.clear()


def test_path_leaves_the_regularization_alone(model):
    fitted = Explicit(0.3).fit(model, [data(N)])
    before = fitted.transform(held_out())
    fitted.score_path(held_out(), [1.0, 2.0])
    assert fitted.regularization == fitted.regularization_ == 0.3
    assert torch.equal(fitted.transform(held_out()), before)


# -- precision -------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_sums_of_float32_rows_are_float64(solver):
    """Large means and small differences: what a float32 sum over batches would lose."""
    model = nn.Linear(2, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    n = 3000
    x = torch.full((n, 2), 300.0, dtype=torch.float64)
    x[:, 1] += torch.arange(n) % 2
    y = torch.full((n,), -1.0, dtype=torch.float64)  # residuals one: rows are inputs
    fitted = Explicit(1e-3, loss="mse", dtype=torch.float32, solver=solver)
    fitted.fit(model, split((x, y), n, 500))
    expected = dense.solve(x.T @ x / n, x[:2], 1e-3)
    assert reference.error(fitted.transform(x[:2]), expected) <= 1e-6


# -- singular matrices -----------------------------------------------------------------------------


def asked(fitted, vectors):
    """Return everything that needs the inverse."""
    return {
        "transform": lambda: fitted.transform(vectors),
        "score": lambda: fitted.score(vectors),
        "score_samples": lambda: fitted.score_samples(vectors),
        "score_path": lambda: fitted.score_path(vectors, [fitted.regularization]),
        "mahalanobis": lambda: fitted.mahalanobis(vectors),
    }


@pytest.mark.parametrize("settings", [{"blocks": "all"}, {"blocks": "layer"}], ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("regularization", [0, 0.0, 1e-300, 1e-25])
def test_singular_matrices_are_refused(model, solver, settings, regularization):
    """More parameters than rows: no inverse, and no number but an error that says what to do."""
    fitted = Explicit(regularization, solver=solver, **settings).fit(model, [data(3)])
    named = "^block '.*': " if settings["blocks"] == "layer" else "^The Fisher"
    for ask in asked(fitted, held_out()).values():
        with pytest.raises(SingularFisherError, match=f"{named}.*larger regularization"):
            ask()
    product = held_out() @ fitted.fisher_.to_dense()
    assert reference.error(fitted.inverse_transform(held_out()), product) <= 1e-9
    fitted.set_params(regularization=1e-3)
    assert all(np.isfinite(np.asarray(ask())).all() for ask in asked(fitted, held_out()).values())


def independent():
    """A model and data whose Fisher has full rank: as many parameters as directions."""
    model = nn.Linear(3, 2, bias=False).double()
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(40, k, generator=generator, dtype=torch.float64) for k in (3, 2))
    rows = reference.gradients(model, reference.half_squared_error, (x, y), 40)
    return model, (x, y), rows


def test_regular_matrices_need_no_damping():
    model, batch, rows = independent()
    fitted = Explicit(0, loss="mse").fit(model, [batch])
    assert isinstance(fitted.fisher_, DenseOperator)
    expected = dense.solve(reference.fisher(rows), rows[:3], 0.0)
    assert reference.error(fitted.transform(rows[:3]), expected) <= 1e-9
    logs = dense.log_likelihoods(reference.fisher(rows), rows[:3], 0.0)
    np.testing.assert_allclose(fitted.score_samples(rows[:3]), logs, rtol=1e-9)
    assert fitted.score_path(rows[:3], [0.0]) == pytest.approx([logs.mean()], rel=1e-9)
    assert reference.error(fitted.inverse_transform(fitted.transform(rows)), rows) <= 1e-9


def test_the_dual_needs_damping_whatever_its_rows():
    """Its formula divides by λ, even with more rows than parameters."""
    model, batch, rows = independent()
    fitted = Explicit(0, loss="mse", solver="dual").fit(model, [batch])
    with pytest.raises(SingularFisherError, match="larger regularization"):
        fitted.transform(rows)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_smallest_damping_that_is_accepted_is_enough(model, solver):
    """Down the decades: right numbers as far as float64 has them, then an error."""
    fitted = Explicit(solver=solver).fit(model, [data(3)])
    matrix = weighted_rows(3).fisher()
    vectors = held_out()
    refused = []
    for exponent in range(0, 24):
        damping = 10.0**-exponent
        fitted.set_params(regularization=damping)
        try:
            found = fitted.transform(vectors)
        except SingularFisherError:
            refused.append(exponent)
            continue
        assert not refused
        # Rounding grows with the condition number.
        condition = float(torch.linalg.matrix_norm(matrix, 2)) / damping
        expected = by_eigenvectors(matrix, vectors, damping)
        assert reference.error(found, expected) <= 1e-14 * (100 + 10 * condition)
    assert refused
    assert refused[0] >= 13


def by_eigenvectors(matrix, vectors, damping):
    """Solve by a matrix of rank 3 and damping, each exactly on its own."""
    values, basis = torch.linalg.eigh(matrix)
    values[:-3] = 0
    return (vectors @ basis / (values + damping)) @ basis.T


def test_a_block_without_gradient_takes_the_whole_models_value():
    """As LoRA's first factor does while the second is zero."""

    class LowRank(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 2, bias=False)
            self.b = nn.Linear(2, 3, bias=False)
            nn.init.zeros_(self.b.weight)

        def forward(self, x):
            return self.b(self.a(x))

    fitted = Explicit(blocks="layer").fit(LowRank().double(), [data(N)])
    whole = 0.1 * fitted.fisher_.trace() / 12
    assert fitted.regularization_ == pytest.approx({"a": whole, "b": 2 * whole})
    vectors = torch.randn(2, 12, dtype=torch.float64)
    assert reference.error(fitted.transform(vectors)[:, :6], vectors[:, :6] / whole) <= 1e-12


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_gradient_at_all(solver):
    """Where everything is fitted exactly there is no λ to take, but a number may be given."""
    model = nn.Linear(3, 1).double()
    x, _ = data(N)
    batch = x, model(x).detach()
    fitted = Explicit(loss="mse", solver=solver).fit(model, [batch])
    vectors = torch.ones(2, 4, dtype=torch.float64)
    with pytest.raises(SingularFisherError, match=r"every gradient is zero\. Give a number"):
        fitted.transform(vectors)
    for regularization in (0, 0.0):
        with pytest.raises(SingularFisherError):
            fitted.set_params(regularization=regularization).transform(vectors)
    found = fitted.set_params(regularization=0.5).transform(vectors)
    assert reference.error(found, 2 * vectors) <= 1e-14
    logs = dense.log_likelihoods(torch.zeros(4, 4, dtype=torch.float64), vectors, 0.5)
    np.testing.assert_allclose(fitted.score_samples(vectors), logs, rtol=1e-12)
    assert fitted.score_path(vectors, [0.5]) == pytest.approx([logs.mean()], rel=1e-12)


# -- misuse ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
def test_wrong_dampings_of_a_path(model, value):
    fitted = Explicit().fit(model, [data(N)])
    with pytest.raises(IFVPUsageError, match="finite number, not negative"):
        fitted.score_path(held_out(), [0.1, value])


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"a": "first.*"}, "'scale', 'shift', 'last.weight' belong to no block"),
        ({"a": "*", "b": "scale"}, "'scale' is in both 'a' and 'b'"),
        ({"a": "*", "b": "third.*"}, r"blocks\['b'\]: 'third.\*' matches none"),
    ],
    ids=["missing", "twice", "unknown"],
)
def test_wrong_blocks(model, blocks, message):
    with pytest.raises(IFVPUsageError, match=message):
        Explicit(blocks=blocks).fit(model, [data(N)])


@pytest.mark.parametrize(
    ("regularization", "message"),
    [
        ([0.1, 0.2], r"2 values; expected one number, or one per block: 3 \(model, first, last\)"),
        ({"first": 1.0, "last": 1.0}, "expected one per block"),
        ({"model": 1.0, "first": 1.0, "last": -1.0}, "regularization of block 'last' is -1.0"),
    ],
    ids=["number", "names", "negative"],
)
def test_wrong_regularizations_of_blocks(model, regularization, message):
    """Found by the fit, which leaves nothing behind, and again when set later."""
    estimator = Explicit(regularization, blocks="layer")
    with pytest.raises(IFVPUsageError, match=message):
        estimator.fit(model, [data(N)])
    assert not hasattr(estimator, "fisher_")
    fitted = Explicit(blocks="layer").fit(model, [data(N)])
    with pytest.raises(IFVPUsageError, match=message):
        fitted.set_params(regularization=regularization).transform(held_out())


def test_loaders_score_as_data(model):
    """A ModelData of a loader's dataset scores as the tensors do."""
    fitted = Explicit(0.1).fit(model, [data(N)])
    loader = DataLoader(TensorDataset(*data(6, seed=1)), batch_size=4)
    expected = fitted.score(ModelData(model, data(6, seed=1)))
    assert fitted.score(ModelData(model, loader)) == pytest.approx(expected, rel=1e-12)
