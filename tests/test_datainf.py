"""`DataInf` against its formula, written out example by example."""

import inspect
import pickle
from types import MappingProxyType

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, KFold
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fimkit import (
    DataInf,
    Explicit,
    IFVPUsageError,
    ModelData,
    SingularFisherError,
    influence,
    losses,
)
from tests import dense, reference, test_fisher_kinds
from tests.cases import BY_NAME, CASES, Apply, N, T, points, split
from tests.test_explicit import to_float32, to_float64

MLP = BY_NAME["mlp"]
NAMES = [f"{layer}.{kind}" for layer in "024" for kind in ("weight", "bias")]

# Blocks as given, with the names of the blocks and of the parameters in each.
LAYOUTS = {
    "layer": ("layer", {layer: [f"{layer}.weight", f"{layer}.bias"] for layer in "024"}),
    "parameter": ("parameter", {name: [name] for name in NAMES}),
    "mapping": (
        {"ends": ["0.*", "4.*"], "bias": "2.bias", "middle": ["2.weight"]},
        {"ends": [*NAMES[:2], *NAMES[4:]], "bias": ["2.bias"], "middle": ["2.weight"]},
    ),
    "one block": ({"all": "*"}, {"all": NAMES}),
    "numbers": ([0, 0, 1, 1, 2, 2], {"0": NAMES[:2], "1": NAMES[2:4], "2": NAMES[4:]}),
    "numbers with gaps, in another order": (
        np.array([7, 7, 3, 3, 0, 7]),
        {"0": NAMES[4:5], "3": NAMES[2:4], "7": [*NAMES[:2], NAMES[5]]},
    ),
    "a tensor of numbers": (
        torch.tensor([1, 0, 1, 0, 1, 0]),
        {"0": NAMES[1::2], "1": NAMES[::2]},
    ),
}
parametrize_layouts = pytest.mark.parametrize("layout", LAYOUTS)


def places(model, members):
    """Return the places of parameters in the flat vector."""
    found, start = {}, 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[name] = range(start, start + parameter.numel())
            start += parameter.numel()
    return torch.tensor([i for name in members for i in found[name]])


def layers(model):
    """Return the places of each module's own parameters."""
    members = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members.setdefault(name.rpartition(".")[0], []).append(name)
    return [places(model, names) for names in members.values()]


def inverse(rows, blocks, dampings, weights=None, *, together=False):
    """Return M of ``(n, p)`` or ``(n, c, p)`` rows, with one λ for each block."""
    rows = rows[:, None] if rows.ndim == 2 else rows
    weights = torch.ones(rows.shape[:2]) if weights is None else weights
    out = torch.zeros(rows.shape[2], rows.shape[2], dtype=torch.float64)
    for here, damping in zip(blocks, dampings, strict=True):
        block = rows[:, :, here]
        mean = dense.mean_of_inverses(block, weights, len(rows), damping, together=together)
        out[here[:, None], here] = mean
    return out


def automatic(rows, blocks):
    """Return λ of each block: a tenth of the mean diagonal, or the whole model's."""
    values = [reference.automatic(rows, here) for here in blocks]
    return [value or reference.automatic(rows) for value in values]


def vectors_of(rows, k=3):
    """Return training gradients that are not zero, and random vectors."""
    generator = torch.Generator().manual_seed(1)
    random = torch.randn(k, rows.shape[1], generator=generator, dtype=torch.float64)
    return torch.cat([rows[rows.any(1)][::3], random])


# -- every kind of model ---------------------------------------------------------------------------

parametrize_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@parametrize_cases
def test_equals_the_definition(case):
    rows, model = case.gradients, case.model()
    vectors, blocks = vectors_of(rows), layers(model)
    fitted = DataInf(loss=case.loss).fit(model, case.batches(5))
    assert fitted.n_samples_seen_ == N
    for dampings in (automatic(rows, blocks), [1e-3 * float(rows.square().mean())] * len(blocks)):
        matrix = inverse(rows, blocks, dampings)
        assert reference.error(fitted.transform(vectors), vectors @ matrix) <= 1e-9
        norms = torch.einsum("kp,pq,kq->k", vectors, matrix, vectors)
        assert reference.error(fitted.mahalanobis(vectors), norms) <= 1e-9
        products = fitted.inverse_transform(fitted.transform(vectors))
        assert reference.error(products, vectors) <= 1e-9
        fitted.set_params(regularization=1e-3 * float(rows.square().mean()))


@parametrize_cases
def test_batches_and_order_do_not_matter(case):
    """One by one, in batches as long as the sequences, uneven, all at once, shuffled."""
    rows, model = case.gradients, case.model()
    blocks = layers(model)
    damping = 1e-2 * float(rows.square().mean())
    vectors = rows[:2]
    expected = vectors @ inverse(rows, blocks, [damping] * len(blocks))
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2)).tolist()
    shuffled = reference.take(case.batch(), order, case.dim)
    orders = [
        *(case.batches(size) for size in (1, T, 7, N)),
        case.batches(7, 1, 4),
        split(shuffled, N, 5, dim=case.dim),
    ]
    for batches in orders:
        fitted = DataInf(damping, loss=case.loss).fit(case.model(), batches)
        assert reference.error(fitted.transform(vectors), expected) <= 1e-9


@parametrize_cases
def test_float32(case):
    """Training gradients as vectors."""
    model = case.model().float()
    batches = [to_float32(batch) for batch in case.batches(5)]
    fitted = DataInf(loss=case.loss).fit(model, batches)
    assert fitted.dtype_ == torch.float32
    # The same weights and data, which float32 rounded, in float64.
    whole = to_float64(to_float32(case.batch()))
    rows = reference.gradients(model.double(), case.example_loss, whole, N, dim=case.dim)
    vectors, blocks = rows.float(), layers(model)
    found = fitted.transform(vectors)
    assert found.dtype == torch.float32
    expected = rows @ inverse(rows, blocks, automatic(rows, blocks))
    assert reference.error(found, expected) <= 1e-5


# -- every layout, container and number of vectors -------------------------------------------------


def fit(layout="layer", regularization="auto", sizes=(5,), **settings):
    blocks = LAYOUTS[layout][0]
    estimator = DataInf(regularization, blocks=blocks, **settings)
    return estimator.fit(MLP.model(), MLP.batches(*sizes))


def blocks_of(layout):
    return [places(MLP.model(), members) for members in LAYOUTS[layout][1].values()]


@parametrize_layouts
@pytest.mark.parametrize("sizes", [(1,), (7,), (N,)], ids=str)
def test_blocks(layout, sizes):
    blocks, rows = blocks_of(layout), MLP.gradients
    vectors = vectors_of(rows)
    fitted = fit(layout, sizes=sizes)
    dampings = automatic(rows, blocks)
    found = fitted.regularization_
    if layout == "one block":
        assert found == pytest.approx(dampings[0], rel=1e-12)
    else:
        assert list(found) == list(LAYOUTS[layout][1])
        assert list(found.values()) == pytest.approx(dampings, rel=1e-12)
    matrix = inverse(rows, blocks, dampings)
    assert reference.error(fitted.transform(vectors), vectors @ matrix) <= 1e-9
    damping = fitted._damping()
    inverted = torch.linalg.inv(matrix)
    assert reference.error(fitted.fisher_.to_dense(damping), inverted) <= 1e-9
    assert reference.error(fitted.fisher_.diagonal(damping), inverted.diagonal()) <= 1e-9
    assert fitted.fisher_.trace(damping) == pytest.approx(float(inverted.trace()), rel=1e-9)


@parametrize_layouts
@pytest.mark.parametrize("kind", ["number", "list", "array", "tensor", "mapping"])
def test_regularization(layout, kind):
    """One λ, or one for each block, in their order or by name; set before or after the fit."""
    blocks, rows = blocks_of(layout), MLP.gradients
    values = [1e-3 * (i + 1) for i in range(len(blocks))]
    if kind == "number":
        values = [2e-3] * len(blocks)
        given = 2e-3
    elif kind == "mapping":
        given = MappingProxyType(dict(zip(LAYOUTS[layout][1], values, strict=True)))
    else:
        make = {"list": list, "array": np.array, "tensor": torch.DoubleTensor}[kind]
        given = make(values)
    expected = rows @ inverse(rows, blocks, values)
    fitted = fit(layout).set_params(regularization=given)
    assert reference.error(fitted.transform(rows), expected) <= 1e-9
    assert torch.equal(fit(layout, given).transform(rows), fitted.transform(rows))


def unflatten(flat, batched):
    """Return ``(k, p)`` vectors as one tensor per parameter."""
    out, start = {}, 0
    for name, parameter in MLP.model().named_parameters():
        piece = flat[:, start : start + parameter.numel()]
        out[name] = piece.reshape(*((len(flat),) if batched else ()), *parameter.shape)
        start += parameter.numel()
    return out


CONTAINERS = {
    "tensor": lambda flat, batched: flat if batched else flat[0],
    "array": lambda flat, batched: flat.numpy() if batched else flat[0].numpy(),
    "dict": unflatten,
    "dict of arrays": lambda *v: {name: piece.numpy() for name, piece in unflatten(*v).items()},
    "list": lambda *v: list(unflatten(*v).values()),
    "tuple": lambda *v: tuple(unflatten(*v).values()),
}


def flatten(vectors, batched):
    pieces = vectors.values() if isinstance(vectors, dict) else vectors
    pieces = [vectors] if isinstance(vectors, torch.Tensor | np.ndarray) else list(pieces)
    pieces = [torch.as_tensor(piece) for piece in pieces]
    return torch.cat([piece.flatten(1 if batched else 0) for piece in pieces], -1)


WIDTHS = sorted({size for p in MLP.model().parameters() for size in p.shape})


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("layout", ["layer", "parameter", "numbers with gaps, in another order"])
@pytest.mark.parametrize("k", [None, 1, 2, *WIDTHS])
def test_containers(container, layout, k):
    """One vector, or k of them; k equal to a layer's width is no special case."""
    rows = MLP.gradients
    flat = vectors_of(rows, 30)[: k or 1]
    given = CONTAINERS[container](flat, k is not None)
    found = fit(layout).transform(given)
    assert type(found) is type(given)
    blocks = blocks_of(layout)
    expected = flat @ inverse(rows, blocks, automatic(rows, blocks))
    found = flatten(found, k is not None)
    assert reference.error(found, expected if k is not None else expected[0]) <= 1e-9


# -- kinds of Fisher -------------------------------------------------------------------------------

KINDS = ["cross-entropy", "cross-entropy of sequences", "squared error", "binary cross-entropy",
         "GaussianNLLLoss(sum)"]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in KINDS for kind in test_fisher_kinds.BY_NAME[name].kinds],
)
@pytest.mark.parametrize("sizes", [(1,), (7,), (test_fisher_kinds.N,)], ids=str)
def test_kinds_of_fisher(name, kind, sizes):
    """Sampled labels are averaged over; the rows of the exact kind make one F_i per example."""
    case = test_fisher_kinds.BY_NAME[name]
    n, samples, model = test_fisher_kinds.N, 3, case.model()
    loss = losses.resolve_loss(case.loss())
    draws = dense.keep_draws(loss)
    estimator = DataInf(loss=loss, fisher=kind, n_mc_samples=samples, random_state=0)
    fitted = estimator.fit(model, split(case.batch(), n, *sizes))
    targets = reference.labels(case.batch())
    drawn = dense.sets_of_labels(draws, samples) if kind == "mc" else ()
    examples = test_fisher_kinds.examples_of(case)
    weighted = examples.rows(kind, targets, drawn)
    blocks = layers(model)
    fisher = weighted.fisher()
    dampings = [0.1 * float(fisher.diagonal()[here].mean()) for here in blocks]
    assert list(fitted.regularization_.values()) == pytest.approx(dampings, rel=1e-9)
    for scale in (1, 1e-3):
        values = [scale * damping for damping in dampings]
        matrix = inverse(weighted.rows, blocks, values, weighted.weights, together=kind == "exact")
        fitted.set_params(regularization=values)
        vectors = vectors_of(weighted.gradients)
        assert reference.error(fitted.transform(vectors), vectors @ matrix) <= 1e-9
        found = fitted.transform(torch.eye(len(matrix), dtype=torch.float64))
        assert torch.linalg.eigvalsh((found + found.T) / 2).min() > 0


# -- scores ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["layer", "parameter", "one block"])
def test_scores_are_log_densities_under_its_own_precision(layout):
    rows, blocks = MLP.gradients, blocks_of(layout)
    fitted = fit(layout)
    held_out = vectors_of(rows)
    for damping in ("auto", 1e-3):
        fitted.set_params(regularization=damping)
        values = automatic(rows, blocks) if damping == "auto" else [damping] * len(blocks)
        covariance = torch.linalg.inv(inverse(rows, blocks, values)).numpy()
        expected = multivariate_normal(cov=(covariance + covariance.T) / 2).logpdf(held_out)
        assert fitted.score_samples(held_out) == pytest.approx(expected, rel=1e-9)
        assert fitted.score(held_out) == pytest.approx(expected.mean(), rel=1e-9)
    path = fitted.score_path(held_out, [1e-3, 1e-1])
    each = [fitted.set_params(regularization=v).score(held_out) for v in (1e-3, 1e-1)]
    assert path == pytest.approx(each, rel=1e-12)


def test_grid_search():
    data = ModelData(MLP.model(), MLP.batch(), batch_size=5)
    grid = [1e-3, 1e-1]
    folds = KFold(3, shuffle=True, random_state=0)
    search = GridSearchCV(DataInf(), {"regularization": grid}, cv=folds, error_score="raise")
    search.fit(data)
    rows, blocks = MLP.gradients, blocks_of("layer")
    for i, damping in enumerate(grid):
        scores = []
        for train, test in folds.split(np.arange(N)):
            precision = inverse(rows[train], blocks, [damping] * 3)
            zero = torch.zeros(len(precision), dtype=torch.float64)
            normal = torch.distributions.MultivariateNormal(zero, precision_matrix=precision)
            scores.append(float(normal.log_prob(rows[test]).mean()))
        assert search.cv_results_["mean_test_score"][i] == pytest.approx(np.mean(scores), rel=1e-6)


# -- the model that the method is made for ---------------------------------------------------------


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable update of low rank, as peft adds it."""

    def __init__(self, base, rank=2, scaling=2.0):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)
        self.scaling = scaling

    def forward(self, x):
        return self.base_layer(x) + self.scaling * self.lora_B(self.lora_A(x))


def adapted(trained):
    """Return a model whose only trainable parameters are the updates, before or after training."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Apply(
            lambda self, x: self.head(self.body(x).tanh().sum(1)),
            body=LoRALinear(nn.Linear(5, 6)),
            head=LoRALinear(nn.Linear(6, 3)),
        ).double()
        if trained:
            for layer in (model.body, model.head):
                nn.init.normal_(layer.lora_B.weight)
    return model


def sequences(n=N, length=T):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, length, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (n,), generator=generator)


@pytest.mark.parametrize("blocks", ["layer", {"body": "body.*", "head": "head.*"}, [0, 0, 1, 1]])
@pytest.mark.parametrize("trained", [False, True])
def test_lora(trained, blocks):
    """B is zero before training, and so is the gradient of A."""
    model, batch = adapted(trained), sequences()
    names = [f"{layer}.lora_{side}.weight" for layer in ("body", "head") for side in "AB"]
    rows = reference.gradients(model, reference.negative_log_likelihood, batch, N)
    fitted = DataInf(blocks=blocks).fit(model, split(batch, N, 5))
    assert fitted.parameter_names_ == names
    assert fitted.n_features_in_ == rows.shape[1] == 2 * (5 + 6 + 6 + 3)
    members = [[name] for name in names] if blocks == "layer" else [names[:2], names[2:]]
    here = [places(model, some) for some in members]
    dampings = automatic(rows, here)
    if blocks == "layer" and not trained:
        assert not rows[:, here[0]].any()
        assert dampings[0] == reference.automatic(rows)
    assert list(fitted.regularization_.values()) == pytest.approx(dampings, rel=1e-12)
    vectors = vectors_of(rows)
    expected = vectors @ inverse(rows, here, dampings)
    assert reference.error(fitted.transform(vectors), expected) <= 1e-9
    only = DataInf(parameters="*lora_B*").fit(model, [batch])
    assert only.parameter_names_ == names[1::2]


# -- the manners of scikit-learn -------------------------------------------------------------------

SETTINGS = {
    "regularization": [1e-3, 1e-2],
    "loss": nn.CrossEntropyLoss(),
    "fisher": "mc",
    "n_mc_samples": 3,
    "parameters": ["0.*", "2.*"],
    "device": "cpu",
    "dtype": torch.float64,
    "random_state": 7,
    "verbose": 0,
    "blocks": [4, 4, 2, 2],
    "storage": "memory",
}


def test_parameters():
    """Stored as given; only the regularization goes by position."""
    signature = inspect.signature(DataInf).parameters
    assert set(signature) == set(SETTINGS)
    by_position = [p.name for p in signature.values() if p.kind is not p.KEYWORD_ONLY]
    assert by_position == ["regularization"]
    estimator = DataInf(**SETTINGS).fit(MLP.model(), MLP.batches(5))
    assert all(getattr(estimator, name) is SETTINGS[name] for name in SETTINGS)
    assert estimator.regularization_ == {"2": 1e-3, "4": 1e-2}
    assert repr(DataInf(1e-3, blocks="parameter")) == (
        "DataInf(blocks='parameter', regularization=0.001)"
    )


def test_precisions_of_backends(monkeypatch):
    """PyTorch then has no precision of float32 products to tell, and raises."""

    def refuse():
        raise RuntimeError("you have used mix of the legacy and new APIs")

    plain = fit(dtype=torch.float32)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", refuse)
    vectors = torch.ones(2, plain.n_features_in_)
    torch.testing.assert_close(
        fit(dtype=torch.float32).transform(vectors), plain.transform(vectors)
    )


@parametrize_layouts
def test_pickle(layout):
    """Without what can be computed again."""
    fitted = fit(layout)
    fresh = len(pickle.dumps(fitted))
    vectors = MLP.gradients
    expected = fitted.transform(vectors), fitted.inverse_transform(vectors), fitted.score(vectors)
    data = pickle.dumps(fitted)
    assert len(data) == fresh
    found = pickle.loads(data)
    assert torch.equal(found.transform(vectors), expected[0])
    assert torch.equal(found.inverse_transform(vectors), expected[1])
    assert found.score(vectors) == expected[2]
    assert found.regularization_ == fitted.regularization_


def test_influence():
    """Positive where training on an example lowers the loss of another."""
    data = ModelData(MLP.model(), MLP.batch(), batch_size=5)
    fitted = fit()
    rows, blocks = MLP.gradients, blocks_of("layer")
    expected = rows @ inverse(rows, blocks, automatic(rows, blocks)) @ rows.T
    scores = influence.pairwise_scores(fitted, data, data)
    assert reference.error(scores, expected) <= 1e-9
    own = influence.self_influence(fitted, data)
    assert reference.error(own, expected.diagonal()) <= 1e-9


# -- what it does not do ---------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Counts operations, and keeps the size of the largest tensor made."""

    def __init__(self):
        super().__init__()
        self.calls, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


def test_neither_loops_over_examples_nor_n_k_p_tensors():
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 3)).double()
    p, k = sum(parameter.numel() for parameter in model.parameters()), 50
    vectors = torch.randn(k, p, dtype=torch.float64)
    calls = []
    for n in (100, 400):
        batch = points(40, 3)(n, torch.Generator().manual_seed(0))
        fitted = DataInf().fit(model, [batch])
        fitted.transform(vectors)
        with Watch() as watch:
            fitted.transform(vectors)
        calls.append(watch.calls)
        # The vectors themselves, and their products with the layers' factors.
        assert watch.largest <= 8 * max(k * p, 2 * n * k * 30)
    assert calls[0] == calls[1]


def test_wide_layers_stay_factored():
    """Rows of a linear layer are kept as its inputs and output gradients."""
    model = nn.Linear(300, 200).double()
    batch = points(300, 200)(9, torch.Generator().manual_seed(0))
    fitted = DataInf().fit(model, split(batch, 9, 4))
    ((_, rows),) = fitted.fisher_.rows.groups
    assert rows.inputs.numel() + rows.signals.numel() == 9 * (301 + 200)


# -- errors ----------------------------------------------------------------------------------------


class Untouched(list):
    """Batches that nobody may look at."""

    def __iter__(self):
        raise AssertionError("the data was read")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"regularization": 0}, r"regularization is \[0.0\]; expected numbers above 0"),
        ({"regularization": -1.0}, "-1.0; expected a finite number"),
        ({"regularization": float("nan")}, "nan; expected a finite number"),
        ({"regularization": float("inf")}, "inf; expected a finite number"),
        ({"regularization": [1, 0, 1]}, r"is \[1.0, 0.0, 1.0\]; expected numbers above 0"),
        ({"regularization": [1, -1, 1]}, "is -1.0; expected a finite number"),
        ({"regularization": [1.0, 1.0]}, r"2 values; expected one number, or one per block: 3 \("),
        ({"regularization": [1.0] * 6}, "6 values; expected one number, or one per block: 3"),
        ({"regularization": {"0": 1.0, "9": 1.0}}, r"keys \['0', '9'\]; expected one per block"),
        ({"blocks": [0, 0, 1]}, r"blocks has 3 numbers; expected one per .*: 6 \('0.weight', "),
        ({"blocks": [0] * 7}, "blocks has 7 numbers; expected one per fitted parameter"),
        ({"blocks": [0, 0, 1, 1, 2, -1]}, "blocks has -1, which is not the number of a block"),
        ({"blocks": [0, 0, 1, 1, 2, 2.0]}, "blocks has 2.0, which is not the number of a block"),
        ({"blocks": [False] * 6}, "blocks has False, which is not the number of a block"),
        ({"blocks": NAMES}, "blocks has '0.weight', which is not the number of a block"),
        ({"blocks": [[0] * 6]}, r"blocks has \[0, 0.*, which is not the number of a block"),
        ({"blocks": np.array(0)}, "blocks=0; expected a name, a mapping, or a sequence of one num"),
        ({"blocks": {0, 1, 2, 3, 4, 5}}, "expected a name, a mapping, or a sequence of one number"),
        ({"blocks": {"a": "0.*", "b": "9.*"}}, r"blocks\['b'\]: '9\.\*' matches none"),
        ({"blocks": {"a": "0.*"}}, "belong to no block"),
        ({"parameters": "9.*"}, "parameters: '9.*' matches none"),
    ],
)
def test_refused_before_any_work(settings, message):
    estimator = DataInf(**settings)
    with pytest.raises(IFVPUsageError, match=message):
        estimator.fit(MLP.model(), Untouched())
    assert not hasattr(estimator, "fisher_")
    assert {name for name in vars(estimator) if name.endswith("_")} == set()


@pytest.mark.parametrize("value", [0, 0.0, -1, [1, 1, 0], "automatic", None, [1.0]])
def test_regularization_is_checked_when_it_is_used(value):
    fitted = fit().set_params(regularization=value)
    methods = (fitted.transform, fitted.inverse_transform, fitted.mahalanobis, fitted.score)
    for method in methods:
        with pytest.raises(IFVPUsageError, match="regularization"):
            method(MLP.gradients)
    with pytest.raises(SingularFisherError, match="larger regularization"):
        fitted.score_path(MLP.gradients, [1.0, 0.0])
    with pytest.raises(ValueError, match="regularization"):
        clone(fitted).fit(MLP.model(), Untouched())


def test_vectors_are_checked():
    fitted = fit()
    p = fitted.n_features_in_
    for vectors, message in (
        (torch.ones(p + 1), rf"shape \({p + 1},\); expected \({p},\) or \(k, {p}\)"),
        ([torch.ones(2)] * 3, "3 arrays, but there are 6 parameters"),
        ({"0.weight": torch.ones(2)}, "lacks"),
        (torch.full((p,), torch.nan), "NaN"),
    ):
        with pytest.raises(IFVPUsageError, match=message):
            fitted.transform(vectors)


def test_no_number_where_there_is_none():
    fitted = fit()
    for call in (fitted.fisher_.trace, fitted.fisher_.diagonal, fitted.fisher_.to_dense):
        with pytest.raises(SingularFisherError, match="larger regularization"):
            call()
    with pytest.raises(SingularFisherError, match="larger regularization"):
        fitted.set_params(regularization=1e-30).transform(MLP.gradients)


def test_auto_of_no_gradient_at_all_is_refused():
    model = Apply(lambda self, x: 0 * self.layer(x), layer=nn.Linear(5, 3)).double()
    x, _ = points()(N, torch.Generator().manual_seed(0))
    fitted = DataInf(loss="mse").fit(model, [(x, torch.zeros(N, 3).double())])
    with pytest.raises(SingularFisherError, match=r"trace, which is zero.*Give a number"):
        fitted.transform(torch.ones(18))
    found = fitted.set_params(regularization=0.5).transform(torch.ones(18))
    assert torch.equal(found, torch.full((18,), 2.0))


def test_explicit_takes_numbers_of_blocks():
    """As `DataInf` does."""
    blocks = [7, 7, 3, 3, 0, 7]
    fitted = Explicit([1e-3, 1e-2, 1e-1], blocks=blocks).fit(MLP.model(), MLP.batches(5))
    here = blocks_of("numbers with gaps, in another order")
    expected = reference.ifvp(MLP.gradients, MLP.gradients, [1e-3, 1e-2, 1e-1], here)
    assert reference.error(fitted.transform(MLP.gradients), expected) <= 1e-9
