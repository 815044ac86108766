"""Every loss module of torch, example by example, and what is refused of them."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from torch import nn

from fimkit import Explicit, IFVPUsageError
from fimkit.losses import resolve_loss

N = 6
WEIGHT = torch.tensor([0.3, 2.0, 1.1], dtype=torch.float64)
REDUCTIONS = ("mean", "sum", "none")


def real(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(N, *shape, generator=generator, dtype=torch.float64)


def label(classes, *shape):
    return torch.randint(classes, (N, *shape), generator=torch.Generator().manual_seed(1))


def signs():
    return label(2, 3) * 2.0 - 1


def some_ignored(classes, *shape):
    labels = label(classes, *shape)
    labels[:, 1] = -100
    return labels


SETS = torch.tensor([[0, -1, 1], [1, 2, -1], [-1, 0, 0], [2, 1, 0], [1, -1, -1], [2, -1, 0]])

# A module's class, further arguments, outputs and targets.
MODULES = [
    (nn.L1Loss, {}, real(3), real(3) + 1),
    (nn.MSELoss, {}, real(3), real(3) + 1),
    (nn.SmoothL1Loss, {"beta": 0.5}, real(3), real(3) + 0.3),
    (nn.HuberLoss, {"delta": 0.5}, real(3), real(3) + 0.7),
    (nn.HingeEmbeddingLoss, {"margin": 0.5}, real(3), signs()),
    (nn.SoftMarginLoss, {}, real(3), signs()),
    (nn.BCELoss, {"weight": WEIGHT}, real(3).sigmoid(), real(3).cos().abs()),
    (nn.BCEWithLogitsLoss, {"weight": WEIGHT, "pos_weight": WEIGHT}, real(3), real(3).cos().abs()),
    (nn.CrossEntropyLoss, {"weight": WEIGHT, "label_smoothing": 0.1}, real(3), label(3)),
    (nn.CrossEntropyLoss, {"weight": WEIGHT}, real(3, 4), some_ignored(3, 4)),
    (nn.CrossEntropyLoss, {"label_smoothing": 0.1}, real(3), real(3).softmax(1)),
    (nn.NLLLoss, {"weight": WEIGHT}, real(3).log_softmax(1), label(3)),
    (nn.NLLLoss, {}, real(3, 4).log_softmax(1), some_ignored(3, 4)),
    (nn.NLLLoss, {}, real(3, 4, 2).log_softmax(1), label(3, 4, 2)),
    (nn.PoissonNLLLoss, {"full": True}, real(3), label(5, 3).double()),
    (nn.PoissonNLLLoss, {"log_input": False}, real(3).exp(), label(5, 3).double()),
    (nn.MultiLabelMarginLoss, {}, real(3), SETS),
    (nn.MultiMarginLoss, {"p": 2, "weight": WEIGHT}, real(3), label(3)),
    (nn.MultiLabelSoftMarginLoss, {"weight": WEIGHT}, real(3), label(2, 3).double()),
    (nn.KLDivLoss, {}, real(3).log_softmax(1), real(3).sin().softmax(1)),
    (nn.KLDivLoss, {"log_target": True}, real(3).log_softmax(1), real(3).sin().log_softmax(1)),
]
CASES = [
    (*case[:1], {**case[1], "reduction": r}, *case[2:]) for case in MODULES for r in REDUCTIONS
]
CASES += [(c, {**o, "reduction": "batchmean"}, *d) for c, o, *d in MODULES if c is nn.KLDivLoss]

# Those that take other things than outputs and targets, or parts of a model.
OTHERS = {
    "AdaptiveLogSoftmaxWithLoss",
    "CTCLoss",
    "CosineEmbeddingLoss",
    "GaussianNLLLoss",
    "LinearCrossEntropyLoss",
    "MarginRankingLoss",
    "NLLLoss2d",
    "TripletMarginLoss",
    "TripletMarginWithDistanceLoss",
}


def test_no_module_is_left_out():
    of_torch = {name for name in dir(nn) if "Loss" in name}
    assert of_torch <= {kind.__name__ for kind, *_ in MODULES} | OTHERS


@pytest.mark.parametrize(
    ("kind", "options", "outputs", "targets"),
    CASES,
    ids=[
        f"{i}-{kind.__name__}-{options['reduction']}" for i, (kind, options, *_) in enumerate(CASES)
    ],
)
def test_values_and_gradients_of_single_examples(kind, options, outputs, targets):
    """Equal to the module called on one example after another, without a warning."""
    module = kind(**options)
    outputs = outputs.clone().requires_grad_()
    coefficients = real()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's advice about KLDivLoss's reduction
        expected = torch.stack(
            [module(outputs[i : i + 1], targets[i : i + 1]).sum() for i in range(N)]
        )
        (gradient,) = torch.autograd.grad((coefficients * expected).sum(), outputs)
        loss = resolve_loss(module)
        for _ in range(2):  # what is found out at the first call holds at the second
            losses = loss.losses(outputs, targets)
            (found,) = torch.autograd.grad((coefficients * losses).sum(), outputs)
            torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gaussian_values_and_gradients(reduction):
    """Outputs are a mean and a variance, here some below eps."""
    module = nn.GaussianNLLLoss(eps=0.1, full=True, reduction=reduction)
    mean, variance, targets = real(3).requires_grad_(), real(3).abs().requires_grad_(), real(3) + 1
    assert (variance < 0.1).any()
    expected = torch.stack(
        [module(*(part[i : i + 1] for part in (mean, targets, variance))).sum() for i in range(N)]
    )
    losses = resolve_loss(module).losses((mean, variance), targets)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    coefficients = real()
    gradients = [
        torch.autograd.grad((coefficients * values).sum(), (mean, variance))
        for values in (losses, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


# -- what is refused -------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A model with one parameter, which scales its inputs."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x):
        return x * self.scale


def fit(loss, outputs, targets, model=None, **settings):
    """Fit to a model that gives these outputs."""
    settings = {"random_state": 0, **settings}
    return Explicit(1.0, loss=loss, **settings).fit(model or Scaled(), [(outputs, targets)])


@pytest.mark.parametrize("name", sorted(OTHERS - {"GaussianNLLLoss", "NLLLoss2d"}))
def test_modules_of_other_arguments(name):
    if not hasattr(nn, name):
        pytest.skip("not in this torch")
    kind = getattr(nn, name)
    if len(inspect.signature(kind.forward).parameters) == 3:
        pytest.skip("takes outputs and targets")
    module = kind()
    with pytest.raises(IFVPUsageError, match=rf"loss={name}\(\) takes .* pass a callable"):
        fit(module, real(3), label(3))


@pytest.mark.parametrize("kind", ["mc", "exact", "predicted"])
def test_soft_labels_are_empirical_only(kind):
    targets = real(3).softmax(1)
    with pytest.raises(IFVPUsageError, match=r"CrossEntropyLoss\(\)"):
        fit(nn.CrossEntropyLoss(), real(3), targets, fisher=kind)
    with pytest.raises(IFVPUsageError, match=r"needs integer class targets.*class probabilities"):
        fit("cross_entropy", real(3), targets, fisher=kind)


def test_a_class_out_of_range():
    with pytest.raises(IFVPUsageError, match=r"targets from 0 to 3 .* 3 classes; expected 0 to 2"):
        fit("cross_entropy", real(3), torch.tensor([0, 1, 2, 3, 0, 1]))


@pytest.mark.parametrize("kind", ["mc", "predicted"])
def test_a_class_that_would_not_count(kind):
    """A label of the model's own may be the class that is ignored."""
    with pytest.raises(IFVPUsageError, match="ignore_index=0 leaves out"):
        fit(nn.CrossEntropyLoss(ignore_index=0), real(3), label(2) + 1, fisher=kind)


def test_examples_without_a_target_that_counts():
    """They have no loss in a sum, and their mean would be NaN."""
    targets = label(3, 4)
    targets[2] = -100
    with pytest.raises(IFVPUsageError, match="example 2 of the batch has none"):
        fit(nn.CrossEntropyLoss(), real(3, 4), targets)
    for loss in ("cross_entropy", nn.CrossEntropyLoss(reduction="sum")):
        for kind in ("empirical", "mc", "exact", "predicted"):
            whole, kept = fit(loss, real(3, 4), targets, fisher=kind), targets[:, 0] != -100
            rest = fit(loss, real(3, 4)[kept], targets[kept], fisher=kind)
            assert whole.n_samples_seen_ == N
            assert whole.fisher_.trace() > 0
            if kind != "mc":  # where an example's draws go by its place
                expected = rest.fisher_.trace() * (N - 1) / N
                assert whole.fisher_.trace() == pytest.approx(expected, rel=1e-12)


def test_impossible_classes_have_no_row():
    """A logit of minus infinity is a probability of zero."""

    class Masked(Scaled):
        def forward(self, x):
            return torch.cat([x * self.scale, torch.full_like(x[:, :1], -torch.inf)], 1)

    masked = fit("cross_entropy", real(2), label(2), Masked(), fisher="exact")
    plain = fit("cross_entropy", real(2), label(2), fisher="exact")
    assert masked.fisher_.trace() == pytest.approx(plain.fisher_.trace(), rel=1e-12)


def test_unequal_numbers_of_examples():
    with pytest.raises(IFVPUsageError, match="different numbers of examples"):
        fit(nn.MSELoss(), real(3), real(3)[:-1])


def test_an_error_of_a_module_names_it():
    class Product(nn.Module):
        def forward(self, outputs, targets):
            return (outputs @ targets.T).sum()

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        fit(Product(), real(3), real(2))
    assert any("Product" in note for note in caught.value.__notes__)


# Whose outputs and targets are of one shape, with targets that all of them take.
ELEMENTWISE = {
    kind: options
    for kind, options, outputs, targets in MODULES
    if outputs.shape == targets.shape and kind is not nn.CrossEntropyLoss
}


@pytest.mark.parametrize("other", [(), (1,), (2,), (3, 1, 1), (1, 3)], ids=str)
@pytest.mark.parametrize("kind", ELEMENTWISE, ids=lambda kind: kind.__name__)
def test_targets_that_would_broadcast(kind, other):
    """Torch's warning, or nothing, would be all that is heard of it."""
    message = rf"loss={kind.__name__}\(\) got outputs of shape \(6, 3\).*expected equal shapes"
    with pytest.raises(IFVPUsageError, match=message):
        fit(kind(), real(3), torch.zeros(N, *other))


@pytest.mark.parametrize(("outputs", "targets"), [((1,), ()), ((), (1,)), ((3, 1), (3,))], ids=str)
@pytest.mark.parametrize(
    "kind", [k for k in ELEMENTWISE if k is not nn.MultiLabelMarginLoss], ids=lambda k: k.__name__
)
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
def test_targets_without_a_last_dimension_of_one(kind, outputs, targets):
    """Taken for what they are, without a warning of torch's."""
    module = kind(**{k: v for k, v in ELEMENTWISE[kind].items() if "weight" not in k})
    made, values = real(*outputs).sigmoid(), real(*targets).cos().abs()
    pairs = zip(made, values.reshape(made.shape), strict=True)
    expected = [module(one[None], target[None]) for one, target in pairs]
    found = resolve_loss(module).losses(made, values)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_gaussian_targets_that_would_broadcast():
    outputs = real(3), real(3).abs()
    loss = resolve_loss(nn.GaussianNLLLoss())
    with pytest.raises(IFVPUsageError, match=r"shape \(6, 3\) and targets of shape \(6,\)"):
        loss.losses(outputs, real())
    found = loss.losses(tuple(part[:, :1] for part in outputs), real())
    expected = loss.losses(tuple(part[:, :1] for part in outputs), real()[:, None])
    assert torch.equal(found, expected)


BINARY = ["bce", nn.BCEWithLogitsLoss(), nn.BCELoss(), nn.MultiLabelSoftMarginLoss()]
BEYOND = {"signs": signs(), "classes": label(3, 3), "above": label(2, 3) + 1e-3}


@pytest.mark.parametrize("loss", BINARY, ids=str)
@pytest.mark.parametrize("targets", BEYOND.values(), ids=BEYOND)
def test_binary_targets_that_are_no_probabilities(loss, targets):
    with pytest.raises(IFVPUsageError, match=r"needs targets from 0 to 1; got .*\(y \+ 1\) / 2"):
        fit(loss, real(3).sigmoid(), targets)


@pytest.mark.parametrize("kind", ["empirical", "mc", "exact", "predicted"])
def test_binary_targets_in_a_column(kind):
    """Outputs (B,) and targets (B, 1) are the same numbers, whole or fractions."""
    targets = real(1).sigmoid()
    found = fit("bce", real(), targets, fisher=kind).fisher_
    expected = fit("bce", real(), targets[:, 0], fisher=kind).fisher_
    assert found.trace() == expected.trace() > 0
