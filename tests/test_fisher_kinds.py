"""The four kinds of Fisher for every likelihood, against densities written out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fimkit import Explicit, IFVPUsageError, ModelData, losses
from fimkit.gradients.sampling import ExampleUniforms
from tests import dense, reference, state
from tests.cases import split

N = 9
KINDS = ("empirical", "mc", "exact", "predicted")


class Head(nn.Module):
    """A small network with outputs of a given shape; positions of a sequence see earlier ones."""

    def __init__(self, shape, finish=None):
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.last = nn.Linear(3, math.prod(shape))
        self.shape = shape
        self.finish = finish or (lambda out: out)

    def forward(self, x):
        h = self.first(x).tanh()
        return self.finish(self.last(h).view(-1, *self.shape))


class Tagger(nn.Module):
    """Three classes at every position, along the last dimension or the second."""

    def __init__(self, classes_last=True, wrap=None):
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.last = nn.Linear(3, 3)
        self.classes_last = classes_last
        self.wrap = wrap

    def forward(self, x, scale=None):
        h = self.first(x if scale is None else x * scale[:, None, None]).tanh()
        out = self.last(h + h.cumsum(1))
        out = out if self.classes_last else out.movedim(-1, 1)
        return out if self.wrap is None else self.wrap(out)


class Exponential(losses.Loss):
    """Waiting times of logarithmic rates: a loss with all that a likelihood is asked for."""

    name = "the exponential likelihood"

    def losses(self, outputs, targets):
        return (outputs.exp() * targets - outputs).sum(1)

    def sample(self, outputs, targets, uniforms):
        return -(-uniforms(outputs.shape)).log1p() / outputs.exp()

    def mode(self, outputs, targets):
        return torch.zeros_like(outputs)

    def exact(self, outputs, targets):
        return outputs, torch.ones_like(outputs)


def _waiting_times(f):
    """Gauss-Laguerre quadrature, exact for polynomials of degree 11."""
    x, w = (torch.as_tensor(part) for part in np.polynomial.laguerre.laggauss(6))
    return x / f.exp(), w.expand(len(f), -1)


@dataclass(frozen=True, eq=False)
class Case:
    """A loss with the distribution whose likelihood it is.

    Attributes
    ----------
    loss : callable
        Returns the loss as an estimator is given it.
    density : Density
        Of one label given some outputs.
    factors : Tensor
        Places of those outputs among all of an example's, for each of its labels.
    targets : callable
        ``targets(n, generator)``.
    modes : bool
        Whether there is a most probable label at which the gradient is not zero.
    """

    name: str
    loss: Callable[[], Any]
    density: dense.Density
    factors: Tensor
    build: Callable[[], nn.Module]
    targets: Callable[[int, torch.Generator], Tensor]
    modes: bool = False
    positions: tuple[int, ...] = ()
    pack: Callable[..., Any] = lambda x, y: (x, y)

    def model(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return self.build().double()

    def batch(self, n: int = N) -> Any:
        generator = torch.Generator().manual_seed(len(self.name))
        x = torch.randn(n, *self.positions, 4, generator=generator, dtype=torch.float64)
        return self.pack(x, self.targets(n, generator))

    @property
    def kinds(self) -> tuple[str, ...]:
        return KINDS if self.modes else KINDS[:3]


@cache
def examples_of(case, n=N):
    return dense.examples_of(case.model(), case.batch(n), case.factors, case.density)


def classes(*shape):
    return lambda n, generator: torch.randint(3, (n, *shape), generator=generator)


def tags(n, generator):
    """Labels of four positions, of which some do not count; of one example none does."""
    y = torch.randint(3, (n, 4), generator=generator)
    y[::2, :2] = dense.IGNORED
    y[1] = dense.IGNORED
    return y


def bits(*shape):
    return lambda n, generator: torch.randint(2, (n, *shape), generator=generator).double()


def reals(*shape):
    return lambda n, generator: torch.randn(n, *shape, generator=generator, dtype=torch.float64)


def counts(n, generator):
    return torch.randint(5, (n, 2), generator=generator).double()


def times(n, generator):
    return torch.rand(n, 2, generator=generator, dtype=torch.float64) * 3


def each(k):
    """Every output has its own label."""
    return torch.arange(k)[:, None]


def all_of(k):
    """One label depends on all outputs."""
    return torch.arange(k)[None]


ALONG_LAST = torch.arange(12).view(4, 3)
ALONG_SECOND = torch.arange(12).view(3, 4).T
ONE_VARIANCE = torch.tensor([[0, 2], [1, 2]])
MEANS_AND_VARIANCES = torch.stack([torch.arange(2), torch.arange(2, 4)], 1)


def mean_and_variance(out):
    mean, raw = out.chunk(2, 1)
    return mean, nn.functional.softplus(raw)


def mean_and_variance_of_numbers(out):
    return out[:, 0], nn.functional.softplus(out[:, 1])


def means_and_one_variance(out):
    return out[:, :2], nn.functional.softplus(out[:, 2:])


def means_and_one_variance_without_dimension(out):
    return out[:, :2], nn.functional.softplus(out[:, 2])


def as_dict(x, y):
    scale = torch.linspace(0.5, 1.5, len(x), dtype=x.dtype)
    return {"labels": y, "scale": scale, "x": x}


def head(*shape, finish=None):
    return lambda: Head(shape, finish)


CASES = [
    Case("cross-entropy", lambda: "cross_entropy", dense.CATEGORICAL, all_of(3), head(3),
         classes(), True),
    Case("cross-entropy of sequences", lambda: "cross_entropy", dense.CATEGORICAL, ALONG_LAST,
         Tagger, tags, True, (4,)),
    Case("cross-entropy of maps", lambda: "cross_entropy", dense.CATEGORICAL,
         torch.arange(15).view(3, 5).T, head(3, 5), classes(5), True),
    Case("cross-entropy of dicts", lambda: "cross_entropy", dense.CATEGORICAL, ALONG_LAST,
         lambda: Tagger(wrap=lambda out: SimpleNamespace(logits=out)), tags, True, (4,), as_dict),
    Case("CrossEntropyLoss()", nn.CrossEntropyLoss, dense.CATEGORICAL, all_of(3), head(3),
         classes(), True),
    Case("CrossEntropyLoss(sum)", lambda: nn.CrossEntropyLoss(reduction="sum"), dense.CATEGORICAL,
         ALONG_SECOND, lambda: Tagger(False), tags, True, (4,)),
    Case("CrossEntropyLoss(none)", lambda: nn.CrossEntropyLoss(reduction="none"),
         dense.CATEGORICAL, ALONG_SECOND, lambda: Tagger(False), classes(4), True, (4,)),
    Case("squared error", lambda: "mse", dense.gaussian(1), each(3), head(3), reals(3)),
    Case("squared error of one number", lambda: "mse", dense.gaussian(1), each(1), head(),
         reals()),
    Case("squared error of images", lambda: "mse", dense.gaussian(1), each(4), head(2, 2),
         reals(2, 2)),
    Case("MSELoss()", nn.MSELoss, dense.gaussian(2 / 3), each(3), head(3), reals(3)),
    Case("MSELoss() of images", nn.MSELoss, dense.gaussian(2 / 4), each(4), head(2, 2),
         reals(2, 2)),
    Case("MSELoss(sum)", lambda: nn.MSELoss(reduction="sum"), dense.gaussian(2), each(3), head(3),
         reals(3)),
    Case("MSELoss(none)", lambda: nn.MSELoss(reduction="none"), dense.gaussian(2), each(3),
         head(3), reals(3)),
    Case("binary cross-entropy", lambda: "bce", dense.BERNOULLI, each(3), head(3), bits(3), True),
    Case("binary cross-entropy of one bit", lambda: "bce", dense.BERNOULLI, each(1), head(1),
         bits(), True),
    Case("BCEWithLogitsLoss()", nn.BCEWithLogitsLoss, dense.BERNOULLI, each(1), head(1), bits(1),
         True),
    Case("BCEWithLogitsLoss(sum)", lambda: nn.BCEWithLogitsLoss(reduction="sum"), dense.BERNOULLI,
         each(4), head(2, 2), bits(2, 2), True),
    Case("GaussianNLLLoss(sum)", lambda: nn.GaussianNLLLoss(reduction="sum"),
         dense.gaussian_of_two(), MEANS_AND_VARIANCES, head(4, finish=mean_and_variance), reals(2)),
    Case("GaussianNLLLoss()", lambda: nn.GaussianNLLLoss(full=True), dense.gaussian_of_two(),
         torch.tensor([[0, 1]]), head(2, finish=mean_and_variance), reals(1)),
    Case("GaussianNLLLoss(sum) of small variances",
         lambda: nn.GaussianNLLLoss(reduction="sum", eps=0.7), dense.gaussian_of_two(0.7),
         MEANS_AND_VARIANCES, head(4, finish=mean_and_variance), reals(2)),
    Case("GaussianNLLLoss() of numbers", nn.GaussianNLLLoss, dense.gaussian_of_two(),
         torch.tensor([[0, 1]]), head(2, finish=mean_and_variance_of_numbers), reals()),
    Case("GaussianNLLLoss(sum) of one variance", lambda: nn.GaussianNLLLoss(reduction="sum"),
         dense.gaussian_of_two(), ONE_VARIANCE, head(3, finish=means_and_one_variance), reals(2)),
    Case("GaussianNLLLoss(sum) of one small variance",
         lambda: nn.GaussianNLLLoss(reduction="sum", eps=0.7), dense.gaussian_of_two(0.7),
         ONE_VARIANCE, head(3, finish=means_and_one_variance_without_dimension), reals(2)),
    Case("PoissonNLLLoss(sum)", lambda: nn.PoissonNLLLoss(reduction="sum"), dense.POISSON_LOG,
         each(2), head(2), counts),
    Case("PoissonNLLLoss(sum), full", lambda: nn.PoissonNLLLoss(reduction="sum", full=True),
         dense.POISSON_LOG, each(2), head(2), counts),
    Case("PoissonNLLLoss(sum) of rates",
         lambda: nn.PoissonNLLLoss(log_input=False, full=True, eps=0.1, reduction="sum"),
         dense.poisson(0.1), each(2), head(2, finish=nn.functional.softplus), counts),
    Case("PoissonNLLLoss() of one rate", lambda: nn.PoissonNLLLoss(log_input=False),
         dense.poisson(1e-8), each(1), head(finish=nn.functional.softplus),
         lambda n, generator: counts(n, generator)[:, 0]),
    Case("a loss of one's own", Exponential,
         dense.Density(lambda f, y: f[..., 0].exp() * y - f[..., 0], _waiting_times), each(2),
         head(2), times, True),
]  # fmt: skip
BY_NAME = {case.name: case for case in CASES}
parametrize_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
parametrize_kinds = pytest.mark.parametrize(
    ("case", "kind"),
    [(case, kind) for case in CASES for kind in case.kinds],
    ids=lambda value: getattr(value, "name", value),
)


def most_probable(case, targets):
    if isinstance(case.loss(), Exponential):
        return torch.zeros(targets.shape, dtype=torch.float64)
    return examples_of(case).most_probable(targets)


def fitted_and_rows(case, kind, sizes, *, samples=3, **settings):
    """Return a fit, and its rows by the definition at the labels that it drew."""
    loss = losses.resolve_loss(case.loss())
    draws = dense.keep_draws(loss)
    fitted = Explicit(loss=loss, fisher=kind, n_mc_samples=samples, random_state=0, **settings)
    fitted.fit(case.model(), split(case.batch(), N, *sizes))
    assert len(draws) == (samples * -(-N // sizes[0]) if kind == "mc" else 0)
    targets = reference.labels(case.batch())
    drawn = dense.sets_of_labels(draws, samples)
    if kind == "predicted":
        kind, drawn = "mc", [most_probable(case, targets)]
    return fitted, examples_of(case).rows(kind, targets, drawn)


@parametrize_kinds
@pytest.mark.parametrize("solver", ["primal", "dual"])
@pytest.mark.parametrize("size", [1, 7, N])
def test_equals_the_definition(case, kind, solver, size):
    fitted, weighted = fitted_and_rows(case, kind, (size,), solver=solver)
    expected = weighted.fisher()
    assert dense.distance(fitted.fisher_.to_dense(), expected) <= 1e-11
    assert fitted.fisher_.trace() == pytest.approx(float(expected.trace()), rel=1e-11)
    random = torch.randn(2, len(expected), dtype=torch.float64)
    vectors = torch.cat([weighted.gradients[-4:], random])
    regularization = dense.heuristic(expected)
    assert fitted.regularization_ == pytest.approx(regularization, rel=1e-11)
    solution = dense.solve(expected, vectors[-3:], regularization)
    assert reference.error(fitted.transform(vectors[-3:]), solution) <= 1e-9
    product = vectors @ dense.damped(expected, regularization)
    found = fitted.inverse_transform(vectors[-3:])
    assert reference.error(found, product[-3:]) <= 1e-11


@parametrize_kinds
def test_weights_stay_beside_the_rows(case, kind):
    """Rows are gradients; how much each counts is said apart."""
    loss = losses.resolve_loss(case.loss())
    draws = dense.keep_draws(loss)
    model, batch = case.model(), case.batch()
    data = ModelData(model, as_dataset(batch), batch_size=5)
    fitted = Explicit(1.0, loss=loss, fisher=kind, n_mc_samples=2, random_state=0).fit(data)
    draws.clear()
    parts = list(fitted.gradients(data, None))
    rows = torch.cat([part.dense(slice(0, part.n), torch.float64) for part in parts])
    weights = torch.cat([part.flat_weights(rows) for part in parts])
    expected = (rows.T * weights) @ rows / N
    assert dense.distance(fitted.fisher_.to_dense(), expected) <= 1e-12
    if kind != "exact":
        assert torch.equal(weights, torch.full_like(weights, 1 / (2 if kind == "mc" else 1)))
        targets = reference.labels(batch)
        drawn = dense.sets_of_labels(draws, 2)
        if kind == "predicted":
            drawn = [most_probable(case, targets)]
        true = examples_of(case).rows("mc", targets, drawn).gradients
        assert dense.distance(rows, true) <= 1e-11
    elif case.density is dense.CATEGORICAL:
        true = examples_of(case).over_labels(reference.labels(batch))
        rows, weights = by_label(case, rows, weights)
        assert dense.distance(weights, true.weights) <= 1e-12
        assert dense.distance(rows, true.rows * (true.weights > 0)[..., None]) <= 1e-11
    else:
        jacobians = examples_of(case).jacobians.flatten(0, 1)
        assert dense.distance(rows, jacobians) <= 1e-11


def by_label(case, rows, weights):
    """Return rows ``(n, K * L, p)`` and weights, classes fastest; ignored ones' rows are zero."""
    weights = weights.view(N, -1)
    rows = rows.view(N, weights.shape[1], -1) * (weights > 0)[..., None]
    return rows, weights


def as_dataset(batch):
    """Return a batch as a dataset that collates to it."""
    if isinstance(batch, dict):
        return [{key: value[i] for key, value in batch.items()} for i in range(N)]
    return TensorDataset(*batch)


# -- what is sampled -------------------------------------------------------------------------------


@parametrize_cases
def test_draws_follow_the_distribution(case):
    """Their scores have mean zero and the exact Fisher as second moments, in the outputs.

    That includes that labels of one example are independent of each other, and those that are
    ignored are never drawn.
    """
    samples = 1000
    loss = losses.resolve_loss(case.loss())
    examples, batch = examples_of(case), case.batch()
    targets = reference.labels(batch)
    uniforms = ExampleUniforms(7, np.arange(N))
    with torch.no_grad():
        outputs = loss.outputs(case.model(), batch)
        draws = torch.stack([loss.sample(outputs, targets, uniforms) for _ in range(samples)])
    labels = draws.view(samples, N, -1).permute(1, 2, 0)
    ignored = (targets == dense.IGNORED).view(N, -1)
    assert (labels[ignored] == dense.IGNORED).all()
    assert (labels[~ignored] != dense.IGNORED).all()

    scores = spread(examples, examples.scores(labels)).sum(1)
    products = scores[:, :, :, None] * scores[:, :, None, :]
    second, fourth = moments(examples, targets)
    assert within(scores.mean(1), 0, second.diagonal(dim1=1, dim2=2), samples)
    assert within(products.mean(1), second, fourth - second.square(), samples)


def within(found, mean, variance, samples):
    """Whether means of samples are within five standard deviations of the true mean."""
    return ((found - mean).abs() <= 5 * (variance.clamp(min=0) / samples).sqrt() + 1e-12).all()


def spread(examples, scores):
    """Return scores ``(n, K, L, m)`` of labels at the places of their outputs, zero elsewhere."""
    out = scores.new_zeros(*scores.shape[:3], examples.outputs.shape[1])
    return out.scatter_(3, examples.factors[None, :, None].expand(scores.shape), scores)


def moments(examples, targets):
    """Return E[s sᵀ] and E[s² (s²)ᵀ] of each example's scores s, by all labels that could be.

    An example's s is a sum over its labels, whose scores are independent and of mean zero.
    """
    labels, probabilities = zip(
        *(examples.density.labels(f[examples.factors]) for f in examples.outputs), strict=True
    )
    scores = spread(examples, examples.scores(torch.stack(labels)))
    scores = scores * (targets != dense.IGNORED).view(N, -1, 1, 1)
    probabilities = torch.stack(probabilities)

    def expected(values):
        return torch.einsum("nkla,nkl,nklb->nkab", values, probabilities, values)

    second, fourth = expected(scores), expected(scores.square())
    squares = second.diagonal(dim1=2, dim2=3)

    def of_different_labels(a, b):
        return a.sum(1) * b.sum(1) - (a * b).sum(1)

    return second.sum(1), (
        fourth.sum(1)
        + of_different_labels(squares[:, :, :, None], squares[:, :, None, :])
        + 2 * of_different_labels(second, second)
    )


@parametrize_cases
@pytest.mark.parametrize(("n", "samples"), [(200, 1), (N, 100)])
def test_trace_tends_to_the_exact(case, n, samples):
    """By no more than four standard deviations, which are a few per cent.

    The trace is a mean of squared norms of gradients at labels drawn independently: its variance
    is the mean of theirs over their number, and theirs is taken from the definition.
    """
    batch, examples = case.batch(n), examples_of(case, n)
    targets = reference.labels(batch)
    truth = float(examples.over_labels(targets).fisher().trace())
    settings = {"loss": case.loss(), "fisher": "mc", "n_mc_samples": samples, "random_state": 1}
    fitted = Explicit(**settings).fit(case.model(), [batch])
    deviation = (norms_variance(case, n) / (n * samples)) ** 0.5
    assert abs(fitted.fisher_.trace() - truth) <= 4 * deviation
    assert deviation <= 0.15 * truth


def norms_variance(case, n):
    """Return the variance of ‖g‖² over labels, the mean over examples."""
    loss = losses.resolve_loss(case.loss())
    batch, examples = case.batch(n), examples_of(case, n)
    uniforms = ExampleUniforms(11, np.arange(n))
    with torch.no_grad():
        outputs = loss.outputs(case.model(), batch)
        draws = [
            loss.sample(outputs, reference.labels(batch), uniforms) for _ in range(3 + 400 // n)
        ]
    norms = torch.stack([examples.at(labels).square().sum(1) for labels in draws])
    return float(norms.var(0).mean())


def fits_in_many_orders(case, settings):
    """Yield fits to the same examples in other batches and orders, by name."""
    model, batch = case.model(), case.batch()
    dataset = as_dataset(batch)

    def fit(*data):
        return Explicit(loss=case.loss(), fisher="mc", **settings).fit(*data)

    for size in (1, 7, N):
        yield f"list, {size}", fit(model, split(batch, N, size))
        yield f"loader, {size}", fit(model, DataLoader(dataset, size))
        for seed in (0, 1):
            generator = torch.Generator().manual_seed(seed)
            loader = DataLoader(dataset, size, shuffle=True, generator=generator)
            yield f"shuffling loader, {size}, {seed}", fit(model, loader)
        data = ModelData(model, dataset, batch_size=size)
        yield f"ModelData, {size}", fit(data)
        yield f"ModelData in another order, {size}", fit(data[[5, 1, 8, 0, 2, 7, 3, 6, 4]])
    backwards = DataLoader(dataset, batch_sampler=[[8, 7, 6], [5], [4, 3, 2, 1, 0]])
    yield "batch sampler", fit(model, backwards)


@parametrize_cases
def test_draws_depend_on_neither_batches_nor_order(case):
    fits = dict(fits_in_many_orders(case, {"n_mc_samples": 3, "random_state": 5}))
    whole = fits["loader, 9"].fisher_.to_dense()
    for name, fitted in fits.items():
        assert dense.distance(fitted.fisher_.to_dense(), whole) <= 1e-11, name


@pytest.mark.parametrize(
    "name", ["cross-entropy of sequences", "squared error", "PoissonNLLLoss(sum)"]
)
def test_slices_of_data_have_the_draws_of_the_whole(name):
    """An example's labels go by its place in the dataset."""
    case = BY_NAME[name]

    def drawn(data, **settings):
        loss = losses.resolve_loss(case.loss())
        draws = dense.keep_draws(loss)
        Explicit(loss=loss, fisher="mc", n_mc_samples=2, **settings).fit(data)
        return torch.stack(dense.sets_of_labels(draws, 2), 1)

    data = ModelData(case.model(), as_dataset(case.batch()), batch_size=4)
    whole = drawn(data, random_state=2)
    for selected in ([4], [7, 2], list(range(1, N, 2)), list(range(N))[::-1]):
        for order in (selected, selected[::-1]):
            # Drawn around outputs that round with the size of the batch.
            own = drawn(data[order], random_state=2)
            torch.testing.assert_close(own, whole[order], rtol=1e-12, atol=1e-14)
    assert not torch.equal(whole[:, 0], whole[:, 1]), "samples differ"
    assert not torch.equal(drawn(data, random_state=3), whole), "so do random states"


def test_random_states():
    """An int, or a generator to draw one from; none is new on every fit, and no global state."""
    case = BY_NAME["squared error"]

    def trace(random_state):
        fitted = Explicit(loss="mse", fisher="mc", random_state=random_state)
        with state.unchanged():
            fitted.fit(case.model(), [case.batch()])
        return fitted.fisher_.trace()

    assert trace(4) == trace(4) != trace(5)
    assert trace(np.random.RandomState(4)) == trace(np.random.RandomState(4))
    generator = np.random.RandomState(4)
    assert trace(generator) != trace(generator)
    assert trace(None) != trace(None)


def test_held_out_draws_are_those_of_the_fit():
    """Scores of a fit's own examples are taken at the labels that it drew."""
    case = BY_NAME["cross-entropy"]
    loss = losses.resolve_loss(case.loss())
    draws = dense.keep_draws(loss)
    data = ModelData(case.model(), as_dataset(case.batch()), batch_size=4)
    fitted = Explicit(loss=loss, fisher="mc", n_mc_samples=2, random_state=None).fit(data)
    own = list(draws)
    draws.clear()
    fitted.score(data)
    assert all(torch.equal(a, b) for a, b in zip(own, draws, strict=True))


class Tap(torch.autograd.Function):
    """Hands its input on, and counts the gradients that come back."""

    gradients = 0

    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        Tap.gradients += 1
        return gradient


class Tapped(Exponential):
    def losses(self, outputs, targets):
        return super().losses(Tap.apply(outputs), targets)


def test_work_grows_with_the_samples_and_no_faster(monkeypatch):
    """A sample's backward pass does not go through the others' losses."""
    case = BY_NAME["a loss of one's own"]
    monkeypatch.setattr(Tap, "gradients", 0)
    fitted = Explicit(loss=Tapped(), fisher="mc", n_mc_samples=12, random_state=0)
    fitted.fit(case.model(), [case.batch()])
    assert 12 <= Tap.gradients <= 3 * 12


# -- what is refused -------------------------------------------------------------------------------


class OwnSquares(nn.MSELoss):
    """A subclass may be any loss."""


class Nameless(losses.Loss):
    def losses(self, outputs, targets):
        return (outputs - targets).abs().sum(1)


def absolute(model, batch):
    x, y = batch
    return (model(x) - y).abs().sum(1)


LABELS = classes()(N, torch.Generator().manual_seed(0))
TAGS = classes(4)(N, torch.Generator().manual_seed(0))
BITS = bits(3)(N, torch.Generator().manual_seed(0))
NUMBERS = reals(3)(N, torch.Generator().manual_seed(0))
PAIR = head(4, finish=mean_and_variance)
SECOND = head(3, 4)
WEIGHTS = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
SEVERAL = r"likelihood, which the mean of (3|4) terms .*use reduction='sum'"

REFUSED = [
    (nn.CrossEntropyLoss(weight=WEIGHTS, reduction="sum"), LABELS, head(3), KINDS[1:],
     "with weight is not; use"),
    (nn.CrossEntropyLoss(label_smoothing=0.1), LABELS, head(3), KINDS[1:],
     "with label_smoothing is not; use fisher='empirical'"),
    (nn.BCEWithLogitsLoss(pos_weight=WEIGHTS, reduction="sum"), BITS, head(3), KINDS[1:],
     "with pos_weight is not; use"),
    (nn.BCEWithLogitsLoss(WEIGHTS, reduction="sum"), BITS, head(3), KINDS[1:],
     "with weight is not; use"),
    (nn.CrossEntropyLoss(), TAGS, SECOND, KINDS[1:], SEVERAL),
    (nn.BCEWithLogitsLoss(), BITS, head(3), KINDS[1:], SEVERAL),
    (nn.PoissonNLLLoss(), BITS, head(3), KINDS[1:3], SEVERAL),
    (nn.GaussianNLLLoss(), NUMBERS, head(6, finish=mean_and_variance), KINDS[1:3], SEVERAL),
    (nn.HuberLoss(), NUMBERS, head(3), KINDS[1:], r"HuberLoss\(\) is not; use"),
    (OwnSquares(), NUMBERS, head(3), KINDS[1:], r"OwnSquares\(\) is not; use"),
    (absolute, NUMBERS, head(3), ["mc"], r"absolute does not give.*with a sample\(\) method"),
    (absolute, NUMBERS, head(3), ["exact"], r"absolute does not give.*with a exact\(\) method"),
    (absolute, NUMBERS, head(3), ["predicted"], r"absolute does not give.*with a mode\(\) method"),
    (Nameless(), NUMBERS, head(3), KINDS[1:], "likelihood, which loss does not give; use"),
    ("mse", NUMBERS, head(3), ["predicted"], "zero for loss='mse'.*Use fisher='mc' or fisher='ex"),
    (nn.MSELoss(), NUMBERS, head(3), ["predicted"], "'predicted' is zero"),
    (nn.PoissonNLLLoss(reduction="sum"), BITS, head(3), ["predicted"], "'predicted' is zero"),
    (nn.GaussianNLLLoss(reduction="sum"), NUMBERS[:, :2], PAIR, ["predicted"], "is zero for"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("loss", "targets", "build", "kind", "message"),
    [
        (loss, targets, build, kind, message)
        for loss, targets, build, kinds, message in REFUSED
        for kind in kinds
    ],
    ids=lambda value: str(value) if isinstance(value, nn.Module | str) else "",
)
def test_what_is_no_likelihood_is_refused(loss, targets, build, kind, message):
    """With what to do instead; the empirical kind takes each of them."""
    model, x = build().double(), torch.randn(N, 4, dtype=torch.float64)
    estimator = Explicit(loss=loss, fisher=kind)
    with pytest.raises(IFVPUsageError, match=message):
        estimator.fit(model, [(x, targets)])
    assert not hasattr(estimator, "fisher_")
    assert estimator.set_params(fisher="empirical").fit(model, [(x, targets)]).fisher_.trace() > 0


def test_exact_rows_have_a_budget():
    """A row per token and class, counted before any of them is computed."""
    case = BY_NAME["cross-entropy of sequences"]
    x = torch.randn(2, 1366, 4, dtype=torch.float64)
    y = torch.zeros(2, 1366, dtype=torch.int64)
    with pytest.raises(IFVPUsageError, match=r"takes 4098 rows.*limit of 4096.*fisher='mc'"):
        Explicit(fisher="exact").fit(case.model(), [(x, y)])


def test_exact_rows_within_the_budget(monkeypatch):
    case = BY_NAME["cross-entropy of sequences"]
    monkeypatch.setattr("fimkit.gradients.objective._MAX_ROWS", 12)
    fitted = Explicit(fisher="exact").fit(case.model(), [case.batch()])
    expected = examples_of(case).over_labels(case.batch()[1]).fisher()
    assert dense.distance(fitted.fisher_.to_dense(), expected) <= 1e-12
    monkeypatch.setattr("fimkit.gradients.objective._MAX_ROWS", 11)
    with pytest.raises(IFVPUsageError, match="takes 12 rows"):
        Explicit(fisher="exact").fit(case.model(), [case.batch()])
