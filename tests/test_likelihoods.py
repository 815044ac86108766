"""Losses against formulas written out for one example, and what is taken for a loss at all."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fimkit import Explicit, IFVPUsageError, losses
from tests import dense, reference
from tests.cases import split

N = 9


class Outputs(nn.Module):
    """A layer whose outputs have a given shape for each example, and perhaps another finish."""

    def __init__(self, shape, finish=None):
        super().__init__()
        self.layer = nn.Linear(4, math.prod(shape))
        self.shape = shape
        self.finish = finish

    def forward(self, x):
        out = self.layer(x).view(-1, *self.shape)
        return out if self.finish is None else self.finish(out)


def outputs(*shape, finish=None):
    return lambda: Outputs(shape, finish).double()


def logarithms(out):
    return out.log_softmax(1)


def positive(out):
    return (1 + out.exp()).log()


def halves(out):
    """Return means and positive variances."""
    mean, raw = out.chunk(2, 1)
    return mean, positive(raw)


def one_variance(out):
    """Return two means and the one variance of both."""
    return out[:, :2], positive(out[:, 2:])


def numbers(*shape):
    return torch.randn(N, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def integers(high, *shape):
    return torch.randint(high, (N, *shape), generator=torch.Generator().manual_seed(1))


def ignoring(value):
    """Class targets of five positions, some of them ignored."""
    targets = integers(3, 5)
    targets[targets == value] = (value + 1) % 3
    targets[::2, 1:3] = value
    return targets


def check(loss, model, targets, formula):
    """Compare fits to a formula of one example's outputs and targets, for all batch sizes."""
    x = torch.randn(N, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def example_loss(model, example):
        out, target = model(example[0]), example[1][0]
        return (
            formula(*(part[0] for part in out), target)
            if isinstance(out, tuple)
            else formula(out[0], target)
        )

    rows = reference.gradients(model, example_loss, (x, targets), N)
    expected = reference.fisher(rows)
    for size in (1, 7, N):
        for solver in ("primal", "dual"):
            fitted = Explicit(1e-2, loss=loss, solver=solver)
            fitted.fit(model, split((x, targets), N, size))
            assert dense.distance(fitted.fisher_.to_dense(), expected) <= 1e-11
            solution = dense.solve(expected, rows, 1e-2)
            assert reference.error(fitted.transform(rows), solution) <= 1e-9


# -- formulas of one example -----------------------------------------------------------------------

WEIGHTS = torch.tensor([0.3, 2.0, 1.1], dtype=torch.float64)


def token_losses(logits, targets):
    """Minus the log-probabilities of targets, classes along dimension 0."""
    logs = logits.exp() / logits.exp().sum(0)
    return -logs.log().gather(0, targets[None])[0]


def mean_of_counted(ignored, weights=(1, 1, 1)):
    def formula(logits, targets):
        counted = targets != ignored
        each = torch.as_tensor(weights, dtype=logits.dtype)[targets * counted] * counted
        return (each * token_losses(logits, targets * counted)).sum() / each.sum()

    return formula


def sum_of_counted(ignored, weights=(1, 1, 1)):
    def formula(logits, targets):
        counted = targets != ignored
        each = torch.as_tensor(weights, dtype=logits.dtype)[targets * counted] * counted
        return (each * token_losses(logits, targets * counted)).sum()

    return formula


def smoothed(logits, target):
    logs = (logits.exp() / logits.exp().sum(0)).log()
    return -0.8 * logs[target] - 0.2 * logs.mean()


def bernoulli(logits, bits, weights=1.0, of_ones=1.0):
    p = 1 / (1 + (-logits).exp())
    return -weights * (of_ones * bits * p.log() + (1 - bits) * (1 - p).log())


def huber(error, delta):
    size = error.abs()
    return torch.where(size < delta, error.square() / 2, delta * (size - delta / 2))


def gaussian(mean, variance, target, least=0.0):
    variance = torch.where(variance < least, variance - variance.detach() + least, variance)
    return (variance.log() + (target - mean) ** 2 / variance) / 2


class Own(nn.Module):
    """A loss with a parameter, of which no gradient is wanted."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))

    def forward(self, outputs, targets):
        return (self.scale * (outputs - targets)).cosh().log().sum()


class Branching(nn.Module):
    """A loss that looks at its values."""

    def forward(self, outputs, targets):
        error = (outputs - targets).abs().sum()
        return error if error > 2 else error**2 / 2


MODULES = [
    # name, module, model, targets, formula
    ("MSE", nn.MSELoss(), outputs(4), numbers(4), lambda f, y: (f - y).square().sum() / 4),
    ("MSE of matrices", nn.MSELoss(), outputs(2, 3), numbers(2, 3),
     lambda f, y: (f - y).square().sum() / 6),
    ("MSE, sum", nn.MSELoss(reduction="sum"), outputs(4), numbers(4),
     lambda f, y: (f - y).square().sum()),
    ("MSE, none", nn.MSELoss(reduction="none"), outputs(4), numbers(4),
     lambda f, y: (f - y).square().sum()),
    ("L1", nn.L1Loss(), outputs(4), numbers(4), lambda f, y: (f - y).abs().sum() / 4),
    ("Huber", nn.HuberLoss(delta=0.5), outputs(4), numbers(4),
     lambda f, y: huber(f - y, 0.5).sum() / 4),
    ("Huber, none", nn.HuberLoss("none", delta=0.5), outputs(4), numbers(4),
     lambda f, y: huber(f - y, 0.5).sum()),
    ("smooth L1", nn.SmoothL1Loss(beta=0.4), outputs(4), numbers(4),
     lambda f, y: huber(f - y, 0.4).sum() / 0.4 / 4),
    ("cross-entropy", nn.CrossEntropyLoss(), outputs(3), integers(3), token_losses),
    ("cross-entropy, weighted mean", nn.CrossEntropyLoss(WEIGHTS), outputs(3), integers(3),
     token_losses),
    ("cross-entropy, weighted sum", nn.CrossEntropyLoss(WEIGHTS, reduction="sum"), outputs(3),
     integers(3), lambda f, y: WEIGHTS[y] * token_losses(f, y)),
    ("cross-entropy, smoothed", nn.CrossEntropyLoss(label_smoothing=0.2), outputs(3),
     integers(3), smoothed),
    ("cross-entropy, probabilities", nn.CrossEntropyLoss(), outputs(3), numbers(3).softmax(1),
     lambda f, y: -(y * (f.exp() / f.exp().sum()).log()).sum()),
    ("sequences, mean", nn.CrossEntropyLoss(), outputs(3, 5), ignoring(-100),
     mean_of_counted(-100)),
    ("sequences, sum", nn.CrossEntropyLoss(reduction="sum"), outputs(3, 5), ignoring(-100),
     sum_of_counted(-100)),
    ("sequences, none", nn.CrossEntropyLoss(reduction="none"), outputs(3, 5), ignoring(-100),
     sum_of_counted(-100)),
    ("sequences, another index", nn.CrossEntropyLoss(ignore_index=1, reduction="sum"),
     outputs(3, 5), ignoring(1), sum_of_counted(1)),
    ("sequences, weighted mean", nn.CrossEntropyLoss(WEIGHTS, ignore_index=2), outputs(3, 5),
     ignoring(2), mean_of_counted(2, WEIGHTS)),
    ("sequences, weighted sum", nn.CrossEntropyLoss(WEIGHTS, ignore_index=2, reduction="sum"),
     outputs(3, 5), ignoring(2), sum_of_counted(2, WEIGHTS)),
    ("sequences as long as there are classes", nn.CrossEntropyLoss(reduction="sum"),
     outputs(5, 5), ignoring(-100), sum_of_counted(-100, (1,) * 5)),
    ("NLL of logarithms", nn.NLLLoss(), outputs(3, finish=logarithms), integers(3), token_losses),
    ("KL", nn.KLDivLoss(reduction="batchmean"), outputs(3, finish=logarithms),
     numbers(3).softmax(1), lambda f, y: -(y * f).sum()),
    ("margins", nn.MultiMarginLoss(), outputs(3), integers(3),
     lambda f, y: ((1 - f[y] + f).clamp(min=0).sum() - 1) / 3),
    ("BCE with logits", nn.BCEWithLogitsLoss(), outputs(3), integers(2, 3).double(),
     lambda f, y: bernoulli(f, y).sum() / 3),
    ("BCE with logits, weighted", nn.BCEWithLogitsLoss(WEIGHTS, reduction="sum"), outputs(3),
     integers(2, 3).double(), lambda f, y: bernoulli(f, y, WEIGHTS).sum()),
    ("BCE with logits, ones weighted",
     nn.BCEWithLogitsLoss(pos_weight=WEIGHTS, reduction="sum"), outputs(3),
     integers(2, 3).double(), lambda f, y: bernoulli(f, y, 1, WEIGHTS).sum()),
    ("BCE of probabilities", nn.BCELoss(), outputs(3, finish=torch.sigmoid),
     integers(2, 3).double(), lambda f, y: -(y * f.log() + (1 - y) * (1 - f).log()).sum() / 3),
    ("Gaussian", nn.GaussianNLLLoss(), outputs(4, finish=halves), numbers(2),
     lambda m, v, y: gaussian(m, v, y).sum() / 2),
    ("Gaussian, full sum", nn.GaussianNLLLoss(full=True, reduction="sum"),
     outputs(4, finish=halves), numbers(2), lambda m, v, y: gaussian(m, v, y).sum()),
    ("Gaussian, small variances", nn.GaussianNLLLoss(eps=0.7, reduction="sum"),
     outputs(4, finish=halves), numbers(2), lambda m, v, y: gaussian(m, v, y, 0.7).sum()),
    ("Gaussian, one variance", nn.GaussianNLLLoss(reduction="sum"), outputs(3, finish=one_variance),
     numbers(2), lambda m, v, y: gaussian(m, v, y).sum()),
    ("Poisson", nn.PoissonNLLLoss(), outputs(3), integers(5, 3).double(),
     lambda f, y: (f.exp() - y * f).sum() / 3),
    ("Poisson, full sum", nn.PoissonNLLLoss(full=True, reduction="sum"), outputs(3),
     integers(5, 3).double(), lambda f, y: (f.exp() - y * f).sum()),
    ("Poisson of rates", nn.PoissonNLLLoss(log_input=False, eps=0.1, reduction="sum"),
     outputs(3, finish=positive), integers(5, 3).double(),
     lambda f, y: (f - y * (f + 0.1).log()).sum()),
    ("a module of one's own", Own(), outputs(3), numbers(3),
     lambda f, y: (3 * (f - y)).cosh().log().sum()),
    ("a module that looks at its values", Branching(), outputs(3), numbers(3),
     lambda f, y: error if (error := (f - y).abs().sum()) > 2 else error**2 / 2),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*class weights have no effect")
@pytest.mark.parametrize(
    ("module", "build", "targets", "formula"),
    [case[1:] for case in MODULES],
    ids=[case[0] for case in MODULES],
)
def test_modules_are_taken_literally(module, build, targets, formula):
    """A module's value on each example alone: means over the example's terms, weights and all."""
    check(module, build(), targets, formula)


NAMED = [
    ("mse", (4,), numbers(4), lambda f, y: (f - y).square().sum() / 2),
    ("mse", (2, 3), numbers(2, 3), lambda f, y: (f - y).square().sum() / 2),
    ("bce", (3,), integers(2, 3).double(), lambda f, y: bernoulli(f, y).sum()),
    ("bce", (2, 2), integers(2, 2, 2), lambda f, y: bernoulli(f, y).sum()),
    ("bce", (3,), numbers(3).sigmoid(), lambda f, y: bernoulli(f, y).sum()),
    ("cross_entropy", (3,), integers(3), token_losses),
    ("cross_entropy", (3, 5), ignoring(-100), sum_of_counted(-100)),
    ("cross_entropy", (5, 3), ignoring(-100), lambda f, y: sum_of_counted(-100)(f.T, y)),
    ("cross_entropy", (5, 2, 3), integers(3, 5, 2),
     lambda f, y: token_losses(f.movedim(2, 0), y).sum()),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "shape", "targets", "formula"), NAMED, ids=[f"{c[0]}, {c[1]}" for c in NAMED]
)
def test_named_losses_sum_over_an_example(name, shape, targets, formula):
    """Squared errors have ½; nothing is averaged."""
    check(name, Outputs(shape).double(), targets, formula)


# -- the protocol ----------------------------------------------------------------------------------


class Cauchy(losses.Loss):
    """A loss that gives losses only, and a mask with them."""

    name = "the Cauchy loss"

    def losses(self, outputs, targets):
        return (1 + (outputs - targets).square()).log().sum(1), torch.ones_like(targets)


def cauchy(model, batch):
    x, y = batch
    return (1 + (model(x) - y).square()).log().sum(1)


@pytest.mark.parametrize("loss", [Cauchy(), cauchy, lambda m, b: (cauchy(m, b), b[1] > 0)])
def test_losses_of_ones_own(loss):
    """A subclass, or a function of model and batch; with a mask of positions or without."""
    check(loss, Outputs((3,)).double(), numbers(3), lambda f, y: (1 + (f - y) ** 2).log().sum())


class Wired(losses.Loss):
    """A loss that decides by itself what is run, and on what."""

    name = "the wired loss"

    def outputs(self, model, batch):
        return model(batch["x"]) + model(-batch["x"]) ** 2

    def targets(self, batch):
        return batch["y"]

    def losses(self, outputs, targets):
        return (outputs - targets).pow(2).sum(1) / 2

    def sample(self, outputs, targets, uniforms):
        return outputs + torch.where(uniforms(outputs.shape) < 0.5, -1.0, 1.0)

    def exact(self, outputs, targets):
        return outputs, torch.ones_like(outputs)

    def mode(self, outputs, targets):
        return outputs + 1


@pytest.mark.parametrize("fisher", ["empirical", "mc", "exact", "predicted"])
@pytest.mark.parametrize("solver", ["primal", "dual"])
def test_a_loss_that_runs_the_model_itself(fisher, solver):
    model, loss = Outputs((3,)).double(), Wired()
    batch = {"y": numbers(3), "x": numbers(4)}
    draws = dense.keep_draws(loss)
    fitted = Explicit(loss=loss, fisher=fisher, solver=solver, random_state=0)
    fitted.fit(model, split(batch, N, 4))
    jacobians = jacobians_of(loss, model, batch)
    with torch.no_grad():
        outputs = loss.outputs(model, batch)
    if fisher == "exact":
        expected = torch.einsum("nkp,nkq->pq", jacobians, jacobians) / N
    else:
        targets = {
            "empirical": lambda: batch["y"],
            "mc": lambda: torch.cat(draws),
            "predicted": lambda: outputs + 1,
        }[fisher]()
        expected = reference.fisher(torch.einsum("nk,nkp->np", outputs - targets, jacobians))
    assert dense.distance(fitted.fisher_.to_dense(), expected) <= 1e-11
    assert (len(draws) == 3) == (fisher == "mc")


def jacobians_of(loss, model, batch):
    """Return the Jacobian ``(n, 3, p)`` of each example's outputs."""
    rows = []
    for i in range(N):
        for value in loss.outputs(model, reference.take(batch, [i]))[0]:
            found = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
            rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows).view(N, 3, -1)


def test_what_the_protocol_hands_over():
    """Targets for their shape, uniform numbers for any shape with the examples first."""
    seen = []

    class Asked(Wired):
        def sample(self, outputs, targets, uniforms):
            u, v = uniforms((len(outputs), 2, 5)), uniforms((len(outputs),))
            seen.append((targets.shape, u, v, torch.is_grad_enabled()))
            return super().sample(outputs, targets, uniforms)

    batch = {"y": numbers(3), "x": numbers(4)}
    settings = {"loss": Asked(), "fisher": "mc", "random_state": 0}
    Explicit(**settings).fit(Outputs((3,)).double(), [batch])
    ((shape, u, v, grad),) = seen
    assert shape == (N, 3)
    assert (u.shape, v.shape) == ((N, 2, 5), (N,))
    assert u.dtype == v.dtype == torch.float64
    assert u.min() >= 0
    assert u.max() < 1
    assert len({*u.flatten().tolist(), *v.tolist()}) == N * 11, "all different"
    assert not grad
    assert abs(float(u.mean()) - 0.5) <= 5 / (12 * N * 10) ** 0.5


# -- what is refused -------------------------------------------------------------------------------


REFUSED = [
    # loss, outputs, targets, message
    ("cross_entropy", (3,), numbers(), r"integer class targets; got a torch.float64.*\.long\(\)"),
    ("cross_entropy", (3,), numbers(3), "integer class targets"),
    ("cross_entropy", (5, 5), integers(5, 5), "cannot tell which dimension.*reduction='sum'"),
    ("cross_entropy", (3, 5), integers(3, 4), r"outputs of shape \(9, 3, 5\).*shape \(9, 4\)"),
    ("cross_entropy", (3,), integers(3, 1), r"expected outputs \(B, C, ...\)"),
    (nn.CrossEntropyLoss(), (3, 5), torch.full((N, 5), -100), "all are ignore_index=-100"),
    ("mse", (3,), numbers(2), r"outputs of shape \(9, 3\) and targets of shape \(9, 2\)"),
    ("mse", (3,), numbers(), "broadcasting would compare"),
    ("bce", (3,), integers(2).double(), "expected equal shapes"),
    (nn.MSELoss, (3,), numbers(3), r"is a class; give an instance, MSELoss\(\)"),
    (lambda model, batch: cauchy(model, batch).mean(), (3,), numbers(3), "one loss per example"),
    (lambda model, batch: cauchy(model, batch)[:, None], (3,), numbers(3), r"shape \(9, 1\)"),
    (lambda model, batch: (cauchy(model, batch), 1), (3,), numbers(3), "a mask int; expected"),
    (lambda model, batch: cauchy(model, batch).tolist(), (3,), numbers(3), "returned list"),
    (lambda model, batch: cauchy(model, batch).detach(), (3,), numbers(3), "detaches its result"),
    (nn.GaussianNLLLoss(), (3,), numbers(3), r"a model that returns \(mean, variance\)"),
]


@pytest.mark.parametrize(("loss", "shape", "targets", "message"), REFUSED)
def test_what_is_refused(loss, shape, targets, message):
    estimator = Explicit(loss=loss)
    with pytest.raises(IFVPUsageError, match=message):
        estimator.fit(Outputs(shape).double(), [(numbers(4), targets)])
    assert not hasattr(estimator, "fisher_")


def test_outputs_that_only_look_like_a_pair_are_refused():
    """Two examples are no mean and variance."""
    model = Outputs((2,)).double()
    batch = numbers(4)[:2], numbers(2)[:2]
    with pytest.raises(IFVPUsageError, match=r"a model that returns \(mean, variance\)"):
        Explicit(loss=nn.GaussianNLLLoss()).fit(model, [batch])


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'loss' parameter"):
        Explicit(loss="hinge").fit(Outputs((3,)), [(numbers(4), integers(3))])
    with pytest.raises(IFVPUsageError, match="loss='hinge' is not known; expected one of"):
        losses.resolve_loss("hinge")
