"""Losses that are negative log-likelihoods of known distributions."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import poisson
from torch import Tensor

from fimkit.exceptions import IFVPUsageError
from fimkit.losses.base import Loss, Uniforms

__all__ = ["BinaryCrossEntropy", "CrossEntropy", "GaussianNLL", "PoissonNLL", "SquaredError"]


class CrossEntropy(Loss):
    """Softmax cross-entropy, summed over the targets of an example that count.

    Classes are along dimension 1, as PyTorch has them, or along the last, as language models
    have them.

    Parameters
    ----------
    ignore_index : int, default=-100
        Targets of this value do not count.
    classes_last : bool, default=True
        Whether classes may also be along the last dimension.
    """

    name = "loss='cross_entropy'"

    def __init__(self, ignore_index: int = -100, *, classes_last: bool = True) -> None:
        self.ignore_index = ignore_index
        self._classes_last = classes_last

    def losses(self, outputs: Any, targets: Any) -> Tensor:
        """Return the sum of each example's token losses, shape ``(B,)``."""
        logits, targets = self._aligned(outputs, targets)
        losses = F.cross_entropy(logits, targets, reduction="none", ignore_index=self.ignore_index)
        return losses.flatten(1).sum(1) if losses.ndim > 1 else losses

    def sample(self, outputs: Any, targets: Any, uniforms: Uniforms) -> Tensor:
        """Draw a class for every target that counts, by inversion of the softmax's sums."""
        logits, targets = self._aligned(outputs, targets)
        probabilities = logits.movedim(1, -1).double().softmax(-1)
        u = uniforms(targets.shape).to(probabilities.device)
        sums = probabilities.cumsum(-1)
        drawn = (u[..., None] * sums[..., -1:] >= sums).sum(-1).clamp_(max=sums.shape[-1] - 1)
        return torch.where(targets == self.ignore_index, targets, drawn)

    def mode(self, outputs: Any, targets: Any) -> Tensor:
        """Return the most probable class for every target that counts."""
        logits, targets = self._aligned(outputs, targets)
        return torch.where(targets == self.ignore_index, targets, logits.argmax(1))

    def exact(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Return -log p of every class of every token, weighted by p (0 where ignored)."""
        logits, targets = self._aligned(outputs, targets)
        logs = logits.movedim(1, -1).log_softmax(-1)
        counts = (targets != self.ignore_index)[..., None]
        weights = torch.where(counts, logs.detach().exp(), 0)
        return -logs.flatten(1), weights.flatten(1)

    def _aligned(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Return logits with classes along dimension 1, and targets checked against them."""
        logits = _floating_output(outputs, self.name)
        if not isinstance(targets, Tensor) or targets.dtype.is_floating_point:
            found = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
            raise IFVPUsageError(
                f"{self.name} needs integer class targets; got {found}. Convert them with "
                ".long(), or use loss='mse' or loss='bce' for real-valued targets."
            )
        shape = tuple(targets.shape)
        second = logits.ndim >= 2 and (logits.shape[0], *logits.shape[2:]) == shape
        last = self._classes_last and logits.ndim > 2 and tuple(logits.shape[:-1]) == shape
        if second and last:
            raise IFVPUsageError(
                f"{self.name} cannot tell which dimension of outputs of shape "
                f"{tuple(logits.shape)} holds the classes for targets of shape {shape}; pass "
                "loss=torch.nn.CrossEntropyLoss(reduction='sum') for dimension 1, or a callable "
                "loss(model, batch)."
            )
        if not second and not last:
            raise IFVPUsageError(
                f"{self.name} got outputs of shape {tuple(logits.shape)} and targets of shape "
                f"{shape}; expected outputs (B, C, ...) or (B, ..., C) for targets (B, ...)."
            )
        return (logits.movedim(-1, 1) if last else logits), targets.long()


class _Elementwise(Loss):
    """A loss summed over independent outputs of the targets' shape."""

    def losses(self, outputs: Any, targets: Any) -> Tensor:
        """Return the sum over each example's outputs, shape ``(B,)``."""
        outputs, targets = self._aligned(outputs, targets)
        return self._terms(outputs, targets).flatten(1).sum(1)

    def _terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        raise NotImplementedError

    def _aligned(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Return outputs and floating targets of one shape, ``(B, ...)`` with at least 2 dims."""
        outputs = _floating_output(outputs, self.name)
        if not isinstance(targets, Tensor):
            raise IFVPUsageError(f"{self.name} needs tensor targets; got {type(targets).__name__}.")
        if outputs.shape != targets.shape:
            if _without_last_one(outputs.shape) != _without_last_one(targets.shape):
                raise IFVPUsageError(
                    f"{self.name} got outputs of shape {tuple(outputs.shape)} and targets of shape "
                    f"{tuple(targets.shape)}; expected equal shapes (broadcasting would compare "
                    "every output with every target)."
                )
            targets = targets.reshape(outputs.shape)
        if outputs.ndim == 1:
            outputs, targets = outputs[:, None], targets[:, None]
        return outputs, targets.to(outputs.dtype)


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
        return 2 / outputs[0].numel() if self._precision is None else self._precision


class BinaryCrossEntropy(_Elementwise):
    """Sigmoid cross-entropy on logits, summed over an example's outputs."""

    name = "loss='bce'"

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

    def exact(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Return the logits, weighted p (1 - p)."""
        logits, _ = self._aligned(outputs, targets)
        p = logits.detach().sigmoid().flatten(1)
        return logits.flatten(1), p * (1 - p)


class GaussianNLL(Loss):
    """Gaussian negative log-likelihood of outputs ``(mean, variance)``, each ``(B, ...)``.

    Parameters
    ----------
    eps : float, default=1e-6
        Least variance, as in `torch.nn.GaussianNLLLoss`.
    """

    name = "the Gaussian likelihood"

    def __init__(self, eps: float = 1e-6) -> None:
        self._eps = eps

    def sample(self, outputs: Any, targets: Any, uniforms: Uniforms) -> Tensor:
        """Draw from the Gaussians."""
        mean, variance = self._moments(outputs)
        return mean + variance.sqrt() * _gaussian(uniforms, mean)

    def mode(self, outputs: Any, targets: Any) -> Tensor:
        """Refuse, as for every regression."""
        raise _zero_at_mode(self.name)

    def exact(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Return means, weighted 1/v, and variances, weighted 1/(2 v²)."""
        mean, variance = (moment.flatten(1) for moment in self._moments(outputs))
        v = variance.detach()
        return torch.cat([mean, variance], 1), torch.cat([1 / v, 1 / (2 * v**2)], 1)

    def _moments(self, outputs: Any) -> tuple[Tensor, Tensor]:
        if not isinstance(outputs, tuple | list) or len(outputs) != 2:
            raise IFVPUsageError(
                f"{self.name} needs a model that returns (mean, variance); got "
                f"{type(outputs).__name__}."
            )
        mean, variance = outputs
        if mean.shape != variance.shape:
            raise IFVPUsageError(
                f"{self.name} got a mean of shape {tuple(mean.shape)} and a variance of shape "
                f"{tuple(variance.shape)}; fisher='mc' and 'exact' need one variance per output."
            )
        return mean, variance.clamp(min=self._eps)


class PoissonNLL(Loss):
    """Poisson negative log-likelihood of the logarithm of the rate, or of the rate.

    Parameters
    ----------
    log_input : bool, default=True
        Whether outputs are logarithms of rates.
    eps : float, default=1e-8
        Added to a rate before its logarithm, as in `torch.nn.PoissonNLLLoss`.
    """

    name = "the Poisson likelihood"

    def __init__(self, log_input: bool = True, eps: float = 1e-8) -> None:
        self._log_input = log_input
        self._eps = eps

    def sample(self, outputs: Any, targets: Any, uniforms: Uniforms) -> Tensor:
        """Draw counts by inversion of the distribution function."""
        rates = self._rates(outputs)
        u = uniforms(outputs.shape)
        counts = poisson.ppf(u.numpy(), rates.detach().cpu().double().numpy())
        return torch.as_tensor(counts).clamp_(min=0).to(outputs)

    def mode(self, outputs: Any, targets: Any) -> Tensor:
        """Refuse, as for every regression."""
        raise _zero_at_mode(self.name)

    def exact(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Return outputs, weighted by the rate when they are its logarithm, else by 1/rate."""
        rows = outputs.flatten(1)
        rates = self._rates(outputs).detach().flatten(1)
        return rows, rates if self._log_input else 1 / (rates + self._eps)

    def _rates(self, outputs: Tensor) -> Tensor:
        return outputs.exp() if self._log_input else outputs


def _without_last_one(shape: torch.Size) -> torch.Size:
    """Return a shape without a last dimension of size 1 beyond the examples'."""
    return shape[:-1] if len(shape) > 1 and shape[-1] == 1 else shape


def _zero_at_mode(name: str) -> IFVPUsageError:
    return IFVPUsageError(
        f"fisher='predicted' is zero for {name}: a regression's gradient vanishes at its own "
        "prediction. Use fisher='mc' or fisher='exact'."
    )


def _floating_output(outputs: Any, name: str) -> Tensor:
    if isinstance(outputs, Tensor) and outputs.dtype.is_floating_point and outputs.ndim:
        return outputs
    found = (
        f"a {outputs.dtype} tensor of shape {tuple(outputs.shape)}"
        if isinstance(outputs, Tensor)
        else type(outputs).__name__
    )
    raise IFVPUsageError(
        f"{name} needs a model whose output is a floating tensor (B, ...) or has .logits; got "
        f"{found}. Pass a callable loss(model, batch) that knows the output."
    )


def _gaussian(uniforms: Uniforms, like: Tensor) -> Tensor:
    u = uniforms(like.shape).to(like.device)
    # The open interval keeps the quantile finite.
    noise = math.sqrt(2) * torch.erfinv(2 * u.clamp(2**-53, 1 - 2**-53) - 1)
    return noise.to(like.dtype)
