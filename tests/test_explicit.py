"""`Explicit` against dense float64 references, case by case."""

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fimkit import Explicit, ModelData
from fimkit.operators import DenseOperator, GramOperator
from tests import reference
from tests.cases import BY_NAME, CASES, N, T, points, split

parametrize_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def vectors_of(case):
    """Return training gradients, which lie in the span of the rows, and random vectors."""
    gradients = case.gradients
    generator = torch.Generator().manual_seed(1)
    random = torch.randn(3, gradients.shape[1], generator=generator, dtype=torch.float64)
    return torch.cat([gradients[::3], random])


@parametrize_cases
@pytest.mark.parametrize("solver", ["auto", "primal", "dual"])
def test_equals_the_definition(case, solver):
    rows, vectors = case.gradients, vectors_of(case)
    least = 1e-6 * reference.largest_eigenvalue(rows)
    fitted = Explicit(loss=case.loss, solver=solver).fit(case.model(), case.batches(5))
    assert fitted.n_samples_seen_ == N
    found, expected = fitted.fisher_.to_dense(), reference.fisher(rows)
    assert torch.linalg.matrix_norm(found - expected) <= 1e-12 * torch.linalg.matrix_norm(expected)
    for regularization in (least, 1e3 * least, reference.automatic(rows)):
        expected = reference.ifvp(rows, vectors, regularization)
        found = fitted.set_params(regularization=regularization).transform(vectors)
        assert reference.error(found, expected) <= 1e-9
        norms = torch.as_tensor(fitted.mahalanobis(vectors))
        assert torch.allclose(norms, (vectors * expected).sum(1), rtol=1e-9, atol=0)
    assert fitted.set_params(regularization="auto").regularization_ == pytest.approx(
        regularization, rel=1e-12
    )
    assert reference.error(fitted.transform(vectors), expected) <= 1e-9


@parametrize_cases
def test_batches_and_order_do_not_matter(case):
    """One by one, in batches as long as the sequences, uneven, all at once, shuffled."""
    rows = case.gradients
    vectors, least = rows[:2], 1e-3 * reference.largest_eigenvalue(rows)
    expected = reference.ifvp(rows, vectors, least)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2)).tolist()
    shuffled = reference.take(case.batch(), order, case.dim)
    orders = [
        *(case.batches(size) for size in (1, T, 7, N)),
        case.batches(7, 1, 4),
        split(shuffled, N, 5, dim=case.dim),
    ]
    for batches in orders:
        fitted = Explicit(least, loss=case.loss).fit(case.model(), batches)
        assert reference.error(fitted.transform(vectors), expected) <= 1e-9


@parametrize_cases
@pytest.mark.parametrize("solver", ["primal", "dual"])
def test_float32(case, solver):
    """Training gradients as vectors: where the dual would cancel if it were not for float64."""
    model = case.model().float()
    batches = [to_float32(batch) for batch in case.batches(5)]
    fitted = Explicit(loss=case.loss, solver=solver).fit(model, batches)
    assert fitted.dtype_ == torch.float32
    # The same weights and data, which float32 rounded, in float64.
    whole = to_float64(to_float32(case.batch()))
    rows = reference.gradients(model.double(), case.example_loss, whole, N, dim=case.dim)
    vectors = rows.float()
    found = fitted.transform(vectors)
    assert found.dtype == torch.float32
    expected = reference.ifvp(rows, vectors, reference.automatic(rows))
    assert reference.error(found, expected) <= 1e-4


def to_float32(batch):
    return map_floating(batch, torch.float32)


def to_float64(batch):
    return map_floating(batch, torch.float64)


def map_floating(batch, dtype):
    def convert(value):
        return value.to(dtype) if value.is_floating_point() else value

    if isinstance(batch, dict):
        return {key: convert(value) for key, value in batch.items()}
    return tuple(convert(value) for value in batch)


@pytest.mark.parametrize("name", ["mlp", "tied layers", "language model"])
def test_dual_keeps_its_digits_in_float32(name):
    """Rows are float32, arithmetic is not: far below 'auto' only the rows' rounding is left."""
    case = BY_NAME[name]
    fitted = Explicit(solver="dual").fit(case.model().float(), [to_float32(case.batch())])
    rows = case.gradients
    least = reference.automatic(rows) / 1000
    own = fitted.fisher_.to_dense()
    assert float((own - reference.fisher(rows)).norm() / own.norm()) <= 1e-5
    vectors = rows.float()
    damped = own + least * torch.eye(len(own), dtype=torch.float64)
    expected = torch.linalg.solve(damped, vectors.double().T).T
    found = fitted.set_params(regularization=least).transform(vectors)
    assert reference.error(found, expected) <= 1e-6
    single = torch.linalg.solve(
        vectors @ vectors.T + N * least * torch.eye(N), vectors @ vectors.T
    ).T  # fmt: skip
    naive = (vectors - single @ vectors) / least
    assert reference.error(naive, expected) >= 1e-2


class TestSolver:
    """Which of the two forms is kept; both are exact, as the cases above show."""

    @pytest.mark.parametrize(
        ("n", "sizes", "kind"),
        [
            (7, (7,), GramOperator),
            (8, (8,), DenseOperator),
            (20, (3,), DenseOperator),
            (20, (7, 7, 6), DenseOperator),
            (20, (20,), DenseOperator),
        ],
    )
    def test_auto_takes_the_smaller(self, n, sizes, kind):
        model = torch.nn.Linear(3, 2).double()  # p = 8
        batch = points(3, 2)(n, torch.Generator().manual_seed(0))
        fitted = Explicit(1e-3).fit(model, split(batch, n, *sizes))
        assert isinstance(fitted.fisher_, kind)
        rows = reference.gradients(model, reference.negative_log_likelihood, batch, n)
        found = fitted.transform(rows)
        assert reference.error(found, reference.ifvp(rows, rows, 1e-3)) <= 1e-12

    def test_wide_layers_stay_factored(self):
        """No rows × p numbers are kept for a linear layer."""
        model = torch.nn.Linear(300, 200).double()
        batch = points(300, 200)(9, torch.Generator().manual_seed(0))
        fitted = Explicit().fit(model, split(batch, 9, 4))
        kept = sum(value.numel() for value in stored(fitted))
        assert kept < 20 * 9 * (300 + 200) < 9 * fitted.n_features_in_ / 5


def stored(thing, seen=None):
    """Yield every tensor that an object holds, by way of attributes and containers."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from stored(value, seen)
    elif isinstance(thing, list | tuple | set):
        for value in thing:
            yield from stored(value, seen)
    elif hasattr(thing, "__dict__"):
        yield from stored(vars(thing), seen)


def loaders(model, batch):
    x, y = batch
    dataset = TensorDataset(x, y)
    return {
        "list": split(batch, N, 5),
        "generator": (part for part in split(batch, N, 5)),
        "loader": DataLoader(dataset, batch_size=5),
        "shuffling loader": DataLoader(dataset, batch_size=5, shuffle=True),
        "workers": DataLoader(dataset, batch_size=5, num_workers=1),
        "examples in a sampler's order": DataLoader(dataset, 5, sampler=range(N - 1, -1, -1)),
        "stream": DataLoader(Stream(dataset), batch_size=5),
        "ModelData": None,
    }


class Stream(IterableDataset):
    """A dataset without a length."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        return (self.dataset[i] for i in range(len(self.dataset)))


@pytest.mark.parametrize("name", loaders(None, BY_NAME["mlp"].batch()))
def test_where_batches_come_from(name):
    case = BY_NAME["mlp"]
    model = case.model()
    data = loaders(model, case.batch())[name]
    if name == "ModelData":
        fitted = Explicit().fit(ModelData(model, case.batch(), batch_size=5))
        with_labels = Explicit().fit(ModelData(model, case.batch()), case.batch()[1].numpy())
        assert with_labels.n_samples_seen_ == N
    else:
        fitted = Explicit().fit(model, data)
    assert fitted.n_samples_seen_ == N
    rows = case.gradients
    expected = reference.ifvp(rows, rows, reference.automatic(rows))
    assert reference.error(fitted.transform(rows), expected) <= 1e-9


def test_fitted_attributes():
    model = BY_NAME["tied language model"].model()
    fitted = Explicit(0.1).fit(model, BY_NAME["tied language model"].batches(5))
    assert fitted.parameter_shapes_ == {
        name: tuple(parameter.shape) for name, parameter in model.named_parameters()
    }
    assert fitted.parameter_names_ == list(fitted.parameter_shapes_)
    assert fitted.n_features_in_ == sum(p.numel() for p in model.parameters())
    assert fitted.device_ == torch.device("cpu")
    assert fitted.dtype_ == torch.float64
    assert fitted.regularization_ == 0.1


def test_dtype_of_the_statistics():
    """Float32 rows of a float64 model are as exact as float32 is, and no less."""
    case = BY_NAME["mlp"]
    fitted = Explicit(dtype=torch.float32).fit(case.model(), case.batches(5))
    assert fitted.dtype_ == torch.float32
    rows = case.gradients
    expected = reference.ifvp(rows, rows, reference.automatic(rows))
    assert 1e-12 < reference.error(fitted.transform(rows), expected) <= 1e-4


def test_refit_forgets_the_first_fit():
    estimator = Explicit(1e-3)
    first = BY_NAME["mlp"]
    second = BY_NAME["mlp without biases"]
    estimator.fit(first.model(), first.batches(5)).fit(second.model(), second.batches(5))
    rows = second.gradients
    assert estimator.n_features_in_ == rows.shape[1]
    assert reference.error(estimator.transform(rows), reference.ifvp(rows, rows, 1e-3)) <= 1e-9
