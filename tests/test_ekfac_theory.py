"""What holds of EK-FAC for every layer, kind of Fisher and situation."""

from functools import cache

import pytest
import torch
from torch import nn

from fimkit.estimators import parts
from fimkit.estimators.ekfac import EKFAC, KFAC, Diagonal
from tests import kronecker_reference as kronecker
from tests import reference
from tests.cases import BY_NAME, CASES, Apply, N, points, regression, sequences, split, tokens
from tests.kronecker_reference import Conv1D
from tests.test_ekfac import (
    KINDS,
    blocks_of,
    difference,
    examples_of,
    scalars_of,
    settings_of,
    situation,
)


def combinations():
    """Yield every case with every kind of Fisher that its loss has."""
    for case in CASES:
        for fisher in KINDS:
            likelihood = case.loss == "cross_entropy" or (
                case.loss in ("mse", "bce") and fisher == "exact"
            )
            if fisher == "empirical" or likelihood:
                yield pytest.param(case.name, fisher, id=f"{case.name}-{fisher}")


@cache
def exact_rows(name, fisher):
    """Return settings, batches and the rows of the Fisher, times the root of their weights."""
    case = BY_NAME[name]
    settings = settings_of(case, fisher)
    batches = case.batches(5)
    if fisher == "empirical":
        return settings, batches, case.gradients
    if fisher == "mc":  # draws the labels
        Diagonal(**settings).fit(case.model(), batches)
    classes = 1 if name == "class maps" else -1
    scalars = scalars_of(case, settings, len(batches), classes)
    model = case.model().eval()
    return settings, batches, kronecker.rows(model, scalars, examples_of(case, N))


def block(rows, columns):
    return rows[:, columns].T @ rows[:, columns] / N


@pytest.mark.parametrize(("name", "fisher"), list(combinations()))
def test_every_layer(name, fisher):
    """The trace is the Fisher's, and no basis of K-FAC's has better eigenvalues.

    Outside Kronecker layers there are exact blocks.
    """
    settings, batches, rows = exact_rows(name, fisher)
    rounding = 1e-20 * float(rows.square().sum())  # where gradients add up to zero
    model = BY_NAME[name].model()
    ekfac = EKFAC(**settings).fit(model, batches)
    reduced = blocks_of(EKFAC(weight_sharing="reduce", **settings).fit(model, batches))
    crude = blocks_of(KFAC(**settings).fit(model, batches))
    assert list(ekfac.coverage_) == [name for name, _ in model.named_parameters()]
    covered = torch.cat([columns for columns, _ in blocks_of(ekfac).values()])
    assert torch.equal(covered.sort().values, torch.arange(rows.shape[1]))
    for key, (columns, operator) in blocks_of(ekfac).items():
        F = block(rows, columns)
        trace = pytest.approx(float(F.trace()), rel=1e-10, abs=rounding)
        assert operator.trace() == trace
        assert reduced[key][1].trace() == trace
        error = float((operator.to_dense() - F).norm())
        if key in ekfac.eigenvalues_:
            coarse = float((crude[key][1].to_dense() - F).norm())
            assert error <= coarse + 1e-12 * float(F.norm()) + rounding
        else:
            assert error <= 1e-10 * float(F.trace()) + rounding


@pytest.mark.parametrize(("name", "fisher"), list(combinations()))
def test_diagonal(name, fisher):
    settings, batches, rows = exact_rows(name, fisher)
    fitted = Diagonal(**settings).fit(BY_NAME[name].model(), batches)
    expected = rows.square().sum(0) / N
    assert difference(fitted.fisher_.diagonal(), expected) <= 1e-12
    assert torch.equal(fitted.fisher_.to_dense(), torch.diag(fitted.fisher_.diagonal()))
    assert fitted.regularization_ == pytest.approx(0.1 * float(expected.mean()), rel=1e-12)


@pytest.mark.parametrize("method", [EKFAC, KFAC])
@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_diagonals_outside_layers(name, method, monkeypatch):
    """As for large parameters; the approximation's diagonal is that of its dense form."""
    monkeypatch.setattr(parts, "_DENSE_BLOCK", 0)
    settings, batches, rows = exact_rows(name, "empirical")
    fitted = method(**settings).fit(BY_NAME[name].model(), batches)
    for key, (columns, operator) in blocks_of(fitted).items():
        if key not in fitted.eigenvalues_:
            expected = torch.diag(block(rows, columns).diagonal())
            error = float((operator.to_dense() - expected).norm())
            assert error <= 1e-12 * float(expected.norm()) + 1e-20 * float(rows.square().sum())
    dense = fitted.fisher_.to_dense()
    assert difference(fitted.fisher_.diagonal(), dense.diagonal()) <= 1e-12
    assert torch.equal(dense == 0, dense.T == 0)


def test_better_than_kfac():
    """Not only no worse: by more than a tenth somewhere, so that the two are not confused."""
    settings, batches, rows = exact_rows("mlp", "empirical")
    model = BY_NAME["mlp"].model()
    ekfac, kfac = (method(**settings).fit(model, batches) for method in (EKFAC, KFAC))
    errors = [
        [float((operator.to_dense() - block(rows, c)).norm()) for c, operator in blocks.values()]
        for blocks in (blocks_of(ekfac), blocks_of(kfac))
    ]
    assert any(fine < 0.9 * coarse for fine, coarse in zip(*errors, strict=True))
    traces = [operator.trace() for _, operator in blocks_of(kfac).values()]
    exact = [float(block(rows, columns).trace()) for columns, _ in blocks_of(kfac).values()]
    assert traces != pytest.approx(exact, rel=1e-3)


# -- where EK-FAC is exact -------------------------------------------------------------------------


def one_position_each():
    """Layers of each kind that meet an example once."""

    def forward(self, ids):
        h = self.table(ids[:, 0]).tanh()
        h = self.linear(self.transposed(h)).tanh()
        h = self.bare(h).tanh()
        h = self.flat(h.view(-1, 2, 4)).tanh()
        h = self.grouped(h.view(-1, 2, 2, 2)).tanh()
        h = self.solid(h.view(-1, 1, 2, 2, 1)).flatten(1)
        return self.head(h)

    return Apply(
        forward,
        table=nn.Embedding(7, 4),
        transposed=Conv1D(4, 5),
        linear=nn.Linear(5, 6),
        bare=nn.Linear(6, 8, bias=False),
        flat=nn.Conv1d(2, 8, 4),
        grouped=nn.Conv2d(2, 4, 2, groups=2),
        solid=nn.Conv3d(1, 4, (2, 2, 1)),
        head=nn.Linear(4, 3),
    )


LAYERS = ("table", "transposed", "linear", "bare", "flat", "grouped", "solid", "head")


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", KINDS)
def test_one_example_with_one_position(fisher, sharing):
    """The gradient of each label is an outer product, so the block is one Kronecker product."""

    def data(n, generator):
        ids, labels = tokens()(n, generator)
        return ids, labels[:, -1] % 3

    case = situation("one position", one_position_each, data)
    settings = settings_of(case, fisher, n_mc_samples=3)
    model = case.model()
    ekfac = EKFAC(weight_sharing=sharing, **settings).fit(model, [case.batch(1)])
    assert set(ekfac.eigenvalues_) == set(LAYERS)
    rows = kronecker.rows(model, scalars_of(case, settings, 1), examples_of(case, 1))
    for key, (columns, operator) in blocks_of(ekfac).items():
        F = rows[:, columns].T @ rows[:, columns]
        if key == "grouped":  # its groups are blocks of their own
            weight, bias = torch.arange(16).view(2, 8), 16 + torch.arange(4).view(2, 2)
            inside = torch.zeros_like(F, dtype=torch.bool)
            for own in torch.cat([weight, bias], 1):
                inside[own[:, None], own] = True
            F = torch.where(inside, F, 0)
        assert float(F.norm()) > 0
        assert difference(operator.to_dense(), F) <= 1e-9


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", [EKFAC, KFAC])
@pytest.mark.parametrize("loss", ["mse", nn.MSELoss(), nn.MSELoss(reduction="sum")])
def test_deep_linear_networks(method, bias, loss):
    """With the squared error, output gradients do not depend on the example."""
    case = situation(
        f"deep linear, bias {bias}",
        lambda: nn.Sequential(nn.Linear(5, 6, bias), nn.Linear(6, 4, bias), nn.Linear(4, 3, bias)),
        regression(3),
    )
    model = case.model()
    fitted = method(loss=loss, fisher="exact").fit(model, case.batches(5))
    rows = kronecker.rows(model, kronecker.exact_outputs, examples_of(case, N))
    if not isinstance(loss, str):  # of variance one half, or three halves: the mean of 3 squares
        rows = rows * (2.0 if loss.reduction == "sum" else 2 / 3) ** 0.5
    for columns, operator in blocks_of(fitted).values():
        assert difference(operator.to_dense(), block(rows, columns)) <= 1e-9


@pytest.mark.parametrize("method", [EKFAC, KFAC])
@pytest.mark.parametrize(("sharing", "pooled"), [("expand", False), ("reduce", True)])
def test_deep_linear_networks_of_sequences(method, sharing, pooled):
    """Exact as expanded where each position has its own squared error, else as reduced.

    This is where the scale of the two factors shows.
    """

    def forward(self, x):
        out = self.body(x)
        return out.mean(1) if pooled else out

    def data(n, generator):
        x = sequences()(n, generator)[0]
        return x, torch.zeros(n, 3, dtype=x.dtype) if pooled else x[..., :3]

    case = situation(
        f"deep linear, {sharing}",
        lambda: Apply(forward, body=nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3))),
        data,
    )
    model = case.model()
    fitted = method(loss="mse", fisher="exact", weight_sharing=sharing)
    fitted.fit(model, case.batches(5))
    rows = kronecker.rows(model, kronecker.exact_outputs, examples_of(case, N))
    for columns, operator in blocks_of(fitted).values():
        assert difference(operator.to_dense(), block(rows, columns)) <= 1e-9


def test_inverse_where_exact():
    """Then IFVPs of training gradients are those of the exact Fisher of each layer."""
    case = situation(
        "deep linear, inverse",
        lambda: nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)),
        regression(3),
    )
    model = case.model()
    fitted = EKFAC(1e-4, loss="mse", fisher="exact").fit(model, case.batches(5))
    rows = kronecker.rows(model, kronecker.exact_outputs, examples_of(case, N))
    expected = rows.clone()
    for columns, _ in blocks_of(fitted).values():
        damped = block(rows, columns) + 1e-4 * torch.eye(len(columns), dtype=torch.float64)
        expected[:, columns] = torch.linalg.solve(damped, rows[:, columns].T).T
    assert reference.error(fitted.transform(rows), expected) <= 1e-8


def test_random_networks():
    """‖EKFAC - F‖ ≤ ‖KFAC - F‖, of nets of other shapes, with large and small examples."""
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        widths = torch.randint(2, 7, (3,), generator=generator).tolist()
        case = situation(
            f"random {seed}",
            lambda widths=widths: nn.Sequential(
                nn.Linear(5, widths[0]),
                nn.Tanh(),
                nn.Linear(widths[0], widths[1], bias=widths[2] > 3),
                nn.ReLU(),
                nn.Linear(widths[1], 3),
            ),
            points(),
        )
        model, (x, y) = case.model(), case.batch(N)
        batch = (x * torch.logspace(-1, 1, N, dtype=x.dtype)[:, None], y)
        loss = reference.negative_log_likelihood
        rows = reference.gradients(model, loss, batch, N)
        ekfac, kfac = (method().fit(model, split(batch, N, 5)) for method in (EKFAC, KFAC))
        coarse = blocks_of(kfac)
        for key, (columns, operator) in blocks_of(ekfac).items():
            F = block(rows, columns)
            errors = [float((op.to_dense() - F).norm()) for op in (operator, coarse[key][1])]
            assert errors[0] <= errors[1] + 1e-12 * float(F.norm())
            assert operator.trace() == pytest.approx(float(F.trace()), rel=1e-10)
