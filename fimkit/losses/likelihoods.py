"""Losses that are negative log-likelihoods of known distributions."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import poisson
from torch import Tensor, nn

from fimkit.exceptions import IFVPUsageError
from fimkit.losses.activations import not_logits
from fimkit.losses.base import SQUEEZED, Loss, Uniforms, described, logits_of, run
from fimkit.losses.tokens import unshifted

__all__ = [
    "BinaryCrossEntropy",
    "CrossEntropy",
    "GaussianNLL",
    "PoissonNLL",
    "SquaredError",
    "check_probabilities",
    "mean_and_variance",
    "shaped_as",
]


class CrossEntropy(Loss):
    """Softmax cross-entropy, summed over the targets of an example that count.

    Logits are ``(B, C, ...)`` and targets ``(B, ...)``, as PyTorch has them. Where a model gives
    classes last, `outputs` moves them.

    Parameters
    ----------
    ignore_index : int, default=-100
        Targets of this value do not count.
    """

    name = "loss='cross_entropy'"

    def __init__(self, ignore_index: int = -100) -> None:
        self.ignore_index = ignore_index

    def outputs(self, model: nn.Module, batch: Any) -> Any:
        """Run the model and return its logits, classes along dimension 1.

        An output object's ``logits`` of three dimensions have them along the last, as those of
        Hugging Face's models; else the shape of the targets tells.
        """
        out = run(model, batch)
        logits, targets = logits_of(out), self.targets(batch)
        named = logits is not None
        logits = logits if named else out
        if not isinstance(logits, Tensor) or not isinstance(targets, Tensor) or logits.ndim < 3:
            return logits
        last = logits.shape[:-1] == targets.shape
        if named and logits.ndim == 3:
            if not last:
                raise IFVPUsageError(
                    f"{self.name} got .logits of shape {tuple(logits.shape)}, which have the "
                    f"classes last, and targets of shape {tuple(targets.shape)}; expected "
                    f"{tuple(logits.shape[:-1])}, a target for each position. Let a model that has "
                    "its classes along dimension 1 return the tensor itself."
                )
        elif last and _has_classes_second(logits, targets):
            raise IFVPUsageError(
                f"{self.name} cannot tell which dimension of outputs of shape "
                f"{tuple(logits.shape)} holds the classes for targets of shape "
                f"{tuple(targets.shape)}. If it is dimension 1, pass "
                "loss=torch.nn.CrossEntropyLoss(reduction='sum'). If it is the last, let the model "
                "return out.movedim(-1, 1) and pass that loss, or return an object with .logits "
                "(B, T, C)."
            )
        return logits.movedim(-1, 1) if last else logits

    def doubt(self, batch: Any) -> str | None:
        """Return that labels are the tokens themselves, which are compared unshifted."""
        return unshifted(batch, self.name, self.ignore_index)

    def doubt_outputs(self, outputs: Any) -> str | None:
        """Return that outputs are probabilities already."""
        return not_logits(outputs, "Softmax", self.name)

    def losses(self, outputs: Any, targets: Any) -> Tensor:
        """Return the sum of each example's token losses, shape ``(B,)``."""
        logits, targets = self._aligned(outputs, targets)
        try:
            losses = F.cross_entropy(
                logits, targets, reduction="none", ignore_index=self.ignore_index
            )
        except IndexError as error:
            raise IFVPUsageError(
                f"{self.name} got targets from {targets.min()} to {targets.max()} for outputs of "
                f"{logits.shape[1]} classes; expected 0 to {logits.shape[1] - 1}, or "
                f"{self.ignore_index} where a target does not count."
                + (" For one logit of two classes use loss='bce'." if logits.shape[1] == 1 else "")
            ) from error
        return losses.flatten(1).sum(1) if losses.ndim > 1 else losses

    def sample(self, outputs: Any, targets: Any, uniforms: Uniforms) -> Tensor:
        """Draw a class for every target that counts, by inversion of the softmax's sums."""
        logits, targets = self._aligned(outputs, targets)
        self._refuse_ignored_class("'mc'", logits)
        probabilities = logits.movedim(1, -1).double().softmax(-1)
        u = uniforms(targets.shape).to(probabilities.device)
        sums = probabilities.cumsum(-1)
        drawn = (u[..., None] * sums[..., -1:] >= sums).sum(-1).clamp_(max=sums.shape[-1] - 1)
        return torch.where(targets == self.ignore_index, targets, drawn)

    def mode(self, outputs: Any, targets: Any) -> Tensor:
        """Return the most probable class for every target that counts."""
        logits, targets = self._aligned(outputs, targets)
        self._refuse_ignored_class("'predicted'", logits)
        return torch.where(targets == self.ignore_index, targets, logits.argmax(1))

    def exact(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Return -log p of every class of every token, weighted by p (0 where ignored)."""
        logits, targets = self._aligned(outputs, targets)
        logits = logits.movedim(1, -1)
        logs = logits.log_softmax(-1)
        # A class whose logit is -inf has probability zero, hence no row.
        rows = torch.where(logs == -math.inf, 0, -logs)
        counts = (targets != self.ignore_index)[..., None]
        weights = torch.where(counts, logits.detach().double().softmax(-1), 0)
        return rows.flatten(1), weights.flatten(1)

    def measure(self, measurement: str, outputs: Any, targets: Any) -> Tensor:
        """Return the targets' logits, log-odds or margins, summed over each example, ``(B,)``."""
        logits, targets = self._aligned(outputs, targets)
        counts = targets != self.ignore_index
        classes = torch.where(counts, targets, 0)[:, None]
        values = logits.gather(1, classes)[:, 0]
        if measurement != "logit":
            others = logits.scatter(1, classes, -math.inf)
            values = values - (others.amax(1) if measurement == "margin" else others.logsumexp(1))
        values = torch.where(counts, values, 0)
        return values.flatten(1).sum(1) if values.ndim > 1 else values

    def _refuse_ignored_class(self, fisher: str, logits: Tensor) -> None:
        """Refuse labels of the model's own where one of them would not count as a target."""
        if 0 <= self.ignore_index < logits.shape[1]:
            raise IFVPUsageError(
                f"fisher={fisher} of {self.name} may take class {self.ignore_index} for a label, "
                f"which ignore_index={self.ignore_index} leaves out; mark the targets that do not "
                "count by a number that is no class, such as -100, or use fisher='exact'."
            )

    def _aligned(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Return logits with classes along dimension 1, and targets checked against them."""
        logits = _floating_output(outputs, self.name)
        if not isinstance(targets, Tensor) or targets.dtype.is_floating_point:
            raise IFVPUsageError(
                f"{self.name} needs integer class targets; got {described(targets)}. "
                + _as_classes(targets)
            )
        if not _has_classes_second(logits, targets):
            raise IFVPUsageError(
                f"{self.name} got outputs of shape {tuple(logits.shape)} and targets of shape "
                f"{tuple(targets.shape)}; expected outputs (B, C, ...) or (B, ..., C) for targets "
                f"(B, ...).{_reshaping(logits, targets)}"
                + (SQUEEZED if logits.ndim == 1 and targets.shape == (1,) else "")
            )
        return logits, targets.long()


def _as_classes(targets: Any) -> str:
    """Return how targets that are no integer tensor become class targets."""
    if isinstance(targets, Tensor):
        return (
            "Convert them with .long(), pass loss=torch.nn.CrossEntropyLoss() and "
            "fisher='empirical' for class probabilities, or use loss='mse' or loss='bce' for "
            "real-valued targets."
        )
    if isinstance(targets, tuple | list) and targets and isinstance(targets[0], str):
        return "Encode names as integers, for instance by sklearn.preprocessing.LabelEncoder."
    return "Make them a tensor in the dataset or its collate_fn, such as torch.tensor(targets)."


class _Elementwise(Loss):
    """A loss summed over independent outputs of the targets' shape."""

    def losses(self, outputs: Any, targets: Any) -> Tensor:
        """Return the sum over each example's outputs, shape ``(B,)``."""
        outputs, targets = self._aligned(outputs, targets)
        return self._terms(outputs, targets).flatten(1).sum(1)

    def _terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        raise NotImplementedError

    def _aligned(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        return _matched(outputs, targets, self.name)


class SquaredError(_Elementwise):
    """Half the squared error times a precision: a Gaussian's negative log-likelihood.

    Parameters
    ----------
    precision : float or None, default=1.0
        Inverse variance β of ``β/2 ‖f − y‖²``; None for two over the number of an example's
        outputs, which makes it the mean of squares.
    """

    name = "loss='mse'"

    def __init__(self, precision: float | None = 1.0) -> None:
        self._precision = precision

    def _terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._beta(outputs) / 2 * (outputs - targets).square()

    def sample(self, outputs: Any, targets: Any, uniforms: Uniforms) -> Tensor:
        """Draw from a Gaussian around the outputs."""
        mean, _ = self._aligned(outputs, targets)
        noise = _gaussian(uniforms, mean) / math.sqrt(self._beta(mean))
        return (mean + noise).view(outputs.shape)

    def mode(self, outputs: Any, targets: Any) -> Tensor:
        """Refuse: at its own mean a Gaussian's gradient is zero."""
        raise _zero_at_mode(self.name)

    def exact(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Return the outputs themselves, weighted by the precision."""
        mean, _ = self._aligned(outputs, targets)
        rows = mean.flatten(1)
        return rows, torch.full_like(rows, self._beta(mean), requires_grad=False)

    def _beta(self, outputs: Tensor) -> float:
        return 2 / math.prod(outputs.shape[1:]) if self._precision is None else self._precision


class BinaryCrossEntropy(_Elementwise):
    """Sigmoid cross-entropy on logits, summed over an example's outputs."""

    name = "loss='bce'"

    def targets(self, batch: Any) -> Any:
        """Return the targets of a batch; refuse what is no probability."""
        targets = super().targets(batch)
        check_probabilities(targets, self.name)
        return targets

    def doubt_outputs(self, outputs: Any) -> str | None:
        """Return that outputs are probabilities already."""
        return not_logits(outputs, "Sigmoid", self.name)

    def _terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")

    def sample(self, outputs: Any, targets: Any, uniforms: Uniforms) -> Tensor:
        """Draw 0 or 1 for every output."""
        logits, _ = self._aligned(outputs, targets)
        u = uniforms(logits.shape).to(logits.device)
        return (u < logits.double().sigmoid()).to(logits.dtype).view(outputs.shape)

    def mode(self, outputs: Any, targets: Any) -> Tensor:
        """Return 1 where an output's probability exceeds one half."""
        logits, _ = self._aligned(outputs, targets)
        return (logits > 0).to(logits.dtype).view(outputs.shape)

    def measure(self, measurement: str, outputs: Any, targets: Any) -> Tensor:
        """Return the logits towards the targets: all three measurements of two classes are it."""
        logits, targets = self._aligned(outputs, targets)
        towards: Tensor = (2 * targets - 1) * logits
        return towards.flatten(1).sum(1)

    def exact(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Return the logits, weighted p (1 - p)."""
        logits, _ = self._aligned(outputs, targets)
        rows = logits.flatten(1)
        wide = rows.detach().double()
        return rows, wide.sigmoid() * (-wide).sigmoid()  # 1 - p cancels where p is nearly one


class GaussianNLL(Loss):
    """Gaussian negative log-likelihood of outputs ``(mean, variance)``.

    Means are ``(B, ...)``. Variances have their shape, 1 along a dimension whose means share
    them, or no last dimension when those along it do.

    Parameters
    ----------
    eps : float, default=1e-6
        Least variance. As in `torch.nn.GaussianNLLLoss`, it replaces the value of a lesser one
        and leaves its gradient.
    """

    name = "the Gaussian likelihood"

    def __init__(self, eps: float = 1e-6) -> None:
        self._eps = eps

    def sample(self, outputs: Any, targets: Any, uniforms: Uniforms) -> Tensor:
        """Draw from the Gaussians."""
        mean, variance = self._moments(outputs, targets)
        noise = variance.clamp(min=self._eps).sqrt() * _gaussian(uniforms, mean)
        return (mean + noise).view(outputs[0].shape)

    def mode(self, outputs: Any, targets: Any) -> Tensor:
        """Refuse, as for every regression."""
        raise _zero_at_mode(self.name)

    def exact(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Return means, weighted 1/v, and variances, weighted k/(2 v²) where k means share one."""
        mean, variance = self._moments(outputs, targets)
        v = variance.detach().double().clamp(min=self._eps)
        shared = math.prod(mean.shape[1:]) / math.prod(variance.shape[1:])
        weights = (1 / v).expand_as(mean), shared / (2 * v**2)
        return (
            torch.cat([mean.flatten(1), variance.flatten(1)], 1),
            torch.cat([each.flatten(1) for each in weights], 1),
        )

    def _moments(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Return means with at least 2 dims, and variances that broadcast to them."""
        mean, variance = mean_and_variance(outputs, self.name)
        if mean.ndim == 1 or mean.shape[:-1] == variance.shape:
            variance = variance[..., None]
        mean, _ = _matched(mean, targets, self.name)
        sizes = zip(mean.shape, variance.shape, strict=False)
        if mean.ndim != variance.ndim or any(v not in (m, 1) for m, v in sizes):
            raise IFVPUsageError(
                f"{self.name} got means of shape {tuple(outputs[0].shape)} and variances of shape "
                f"{tuple(outputs[1].shape)}; expected one variance per mean, or 1 along the "
                "dimension whose means share it."
            )
        return mean, variance


class PoissonNLL(Loss):
    """Poisson negative log-likelihood of the logarithm of the rate, or of the rate.

    Parameters
    ----------
    log_input : bool, default=True
        Whether outputs are logarithms of rates.
    eps : float, default=1e-8
        Added to outputs that are no logarithms, as in `torch.nn.PoissonNLLLoss`: the sum is the
        rate.
    """

    name = "the Poisson likelihood"

    def __init__(self, log_input: bool = True, eps: float = 1e-8) -> None:
        self._log_input = log_input
        self._eps = eps

    def sample(self, outputs: Any, targets: Any, uniforms: Uniforms) -> Tensor:
        """Draw counts by inversion of the distribution function."""
        values, _ = _matched(outputs, targets, self.name)
        u = uniforms(values.shape)
        counts = poisson.ppf(u.numpy(), self._rates(values).cpu().numpy())
        return torch.as_tensor(counts).clamp_(min=0).to(values).view(outputs.shape)

    def mode(self, outputs: Any, targets: Any) -> Tensor:
        """Refuse, as for every regression."""
        raise _zero_at_mode(self.name)

    def exact(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Return outputs, weighted by the rate when they are its logarithm, else by 1/rate."""
        values, _ = _matched(outputs, targets, self.name)
        rows = values.flatten(1)
        rates = self._rates(rows)
        if self._log_input:
            return rows, rates
        # As the loss, rows are NaN at negative rates, which makes them seen.
        return torch.where(rates > 0, rows, math.nan), 1 / rates

    def _rates(self, outputs: Tensor) -> Tensor:
        wide = outputs.detach().double()
        return wide.exp() if self._log_input else wide + self._eps


def mean_and_variance(outputs: Any, name: str) -> tuple[Tensor, Tensor]:
    """Return the two tensors ``(B, ...)`` of a model with Gaussian outputs.

    Raises
    ------
    IFVPUsageError
        If the outputs are anything else, naming the loss ``name``.
    """
    if isinstance(outputs, tuple | list) and len(outputs) == 2:
        mean, variance = outputs
        if all(isinstance(part, Tensor) and part.ndim for part in outputs):
            return mean, variance
    raise IFVPUsageError(
        f"{name} needs a model that returns (mean, variance), two tensors with the examples along "
        f"the first dimension; got {described(outputs)}."
    )


def _matched(outputs: Any, targets: Any, name: str) -> tuple[Tensor, Tensor]:
    """Return outputs and floating targets of one shape, ``(B, ...)`` with at least 2 dims."""
    outputs = _floating_output(outputs, name)
    if not isinstance(targets, Tensor):
        raise IFVPUsageError(f"{name} needs tensor targets; got {type(targets).__name__}.")
    targets = shaped_as(outputs, targets, name)
    if outputs.ndim == 1:
        outputs, targets = outputs[:, None], targets[:, None]
    return outputs, targets.to(outputs.dtype)


def shaped_as(outputs: Tensor, targets: Tensor, name: str) -> Tensor:
    """Return targets in the shape of the outputs, from which a last 1 may be missing or more.

    Raises
    ------
    IFVPUsageError
        If the shapes differ otherwise, naming the loss ``name``.
    """
    if _without_last_one(outputs.shape) != _without_last_one(targets.shape):
        raise IFVPUsageError(
            f"{name} got outputs of shape {tuple(outputs.shape)} and targets of shape "
            f"{tuple(targets.shape)}; expected equal shapes (broadcasting would compare every "
            "output with every target)."
            + (" Give targets.unsqueeze(1)." if _lacks_channel(outputs, targets) else "")
        )
    return targets if targets.shape == outputs.shape else targets.reshape(outputs.shape)


def _lacks_channel(outputs: Tensor, targets: Tensor) -> bool:
    """Whether targets are as outputs of one channel, without its dimension."""
    return outputs.ndim > 2 and outputs.shape[1] == 1 and outputs[:, 0].shape == targets.shape


def check_probabilities(targets: Any, name: str) -> None:
    """Raise if targets of a binary cross-entropy are not from 0 to 1, naming the loss ``name``."""
    if not isinstance(targets, Tensor):
        return
    rounding = 4 * torch.finfo(targets.dtype).eps if targets.is_floating_point() else 0
    if bool(((targets < -rounding) | (targets > 1 + rounding)).any()):
        raise IFVPUsageError(
            f"{name} needs targets from 0 to 1; got {targets.min()} to {targets.max()}. Turn "
            "classes of -1 and 1 into (y + 1) / 2, and give more than two classes to "
            "loss='cross_entropy'."
        )


def _without_last_one(shape: torch.Size) -> torch.Size:
    """Return a shape without a last dimension of size 1 beyond the examples'."""
    return shape[:-1] if len(shape) > 1 and shape[-1] == 1 else shape


def _zero_at_mode(name: str) -> IFVPUsageError:
    return IFVPUsageError(
        f"fisher='predicted' is zero for {name}: a regression's gradient vanishes at its own "
        "prediction. Use fisher='mc' or fisher='exact'."
    )


def _reshaping(logits: Tensor, targets: Tensor) -> str:
    """Return how targets that are classes in another form become classes, where that is seen."""
    if targets.ndim > 1 and targets.shape[1] == 1 and _has_classes_second(logits, targets[:, 0]):
        return " Make the targets (B, ...) by .squeeze(1)."
    if targets.shape == logits.shape and targets.ndim > 1:
        return " Make classes of one-hot targets by .argmax(1)."
    return ""


def _has_classes_second(logits: Tensor, targets: Tensor) -> bool:
    return logits.ndim >= 2 and (logits.shape[0], *logits.shape[2:]) == tuple(targets.shape)


def _floating_output(outputs: Any, name: str) -> Tensor:
    if isinstance(outputs, Tensor) and outputs.dtype.is_floating_point and outputs.ndim:
        return outputs
    raise IFVPUsageError(
        f"{name} needs a model whose output is a floating tensor (B, ...) or has .logits; got "
        f"{described(outputs)}. Pass a callable loss(model, batch) that knows the output."
    )


def _gaussian(uniforms: Uniforms, like: Tensor) -> Tensor:
    u = uniforms(like.shape).to(like.device)
    # The open interval keeps the quantile finite.
    noise = math.sqrt(2) * torch.erfinv(2 * u.clamp(2**-53, 1 - 2**-53) - 1)
    return noise.to(like.dtype)
