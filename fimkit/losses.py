r"""Losses per example, sampled labels, and the rows of the exact Fisher information matrix.

A loss here is a negative log-likelihood of one example. It is asked, in this order, for the
model's outputs on a batch, the batch's targets, and then for one of:

- ``losses``: :math:`l_i` at given targets (the empirical Fisher takes the batch's own);
- ``sample``: targets drawn from the predictive distribution (``mc``);
- ``mode``: its most probable targets (``predicted``);
- ``exact``: scalars whose gradients, weighted, give the type-2 Fisher (``exact``).

A custom loss is a callable ``loss(model, batch)`` for the empirical Fisher, or a subclass of
`Loss` with as many of these methods as it needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fimkit.exceptions import IFVPUsageError

__all__ = ["LOSSES", "CallableLoss", "Loss", "resolve_loss"]


class Loss:
    """A negative log-likelihood per example; subclass it for a loss of your own.

    Every tensor has the examples of the batch along its first dimension.
    """

    #: How messages name this loss.
    name = "loss"

    def outputs(self, model: nn.Module, batch: Any) -> Any:
        """Run the model on a batch and return what the other methods take as ``outputs``.

        A tuple or list is ``(*inputs, targets)``; of a mapping, ``labels`` are the targets and
        the rest keyword arguments. An output object's ``logits`` are taken when it has them.
        """
        if isinstance(batch, Mapping):
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            out = model(**inputs)
        else:
            out = model(*_sequence(batch)[:-1])
        logits = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", None)
        return out if logits is None else logits

    def targets(self, batch: Any) -> Any:
        """Return the targets of a batch: its ``labels``, or its last element."""
        if isinstance(batch, Mapping):
            if "labels" not in batch:
                raise IFVPUsageError(
                    f"the batch is a mapping with keys {sorted(map(str, batch))}, without "
                    "'labels'; rename its targets to 'labels', or pass a callable "
                    "loss(model, batch)."
                )
            return batch["labels"]
        return _sequence(batch)[-1]

    def losses(self, outputs: Any, targets: Any) -> Tensor | tuple[Tensor, Tensor]:
        """Return the loss of each example, shape ``(B,)``, or ``(losses, mask)``."""
        raise NotImplementedError

    def sample(self, outputs: Any, targets: Any, uniforms: Uniforms) -> Any:
        """Return targets drawn from the predictive distribution.

        Parameters
        ----------
        outputs, targets
            As returned by the methods of those names; ``targets`` for their shape and for
            positions that do not count.
        uniforms : callable
            ``uniforms(shape)``, with B first in ``shape``, returns a float64 tensor of numbers in
            [0, 1) that depend on the random state, the example and the sample, not on the batch.
        """
        raise self._refusal("'mc'", "sample")

    def mode(self, outputs: Any, targets: Any) -> Any:
        """Return the model's own most probable targets."""
        raise self._refusal("'predicted'", "mode")

    def exact(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Return scalars ``(B, c)`` and weights ``(B, c)`` of the exact Fisher's rows.

        The Fisher of an example is the sum over its c scalars of weight times the outer product
        of the scalar's gradient. Weights carry no gradient.
        """
        raise self._refusal("'exact'", "exact")

    def _refusal(self, fisher: str, method: str) -> IFVPUsageError:
        return IFVPUsageError(
            f"fisher={fisher} needs a likelihood, which {self.name} does not give; use "
            f"fisher='empirical', or a subclass of fimkit.losses.Loss with a {method}() method."
        )


Uniforms = Callable[[Sequence[int]], Tensor]


class CallableLoss(Loss):
    """A function ``loss(model, batch)`` returning ``(B,)`` losses, or ``(losses, mask)``."""

    def __init__(self, function: Callable[[nn.Module, Any], Any]) -> None:
        self.function = function
        self.name = f"loss={getattr(function, '__name__', type(function).__name__)}"

    def outputs(self, model: nn.Module, batch: Any) -> Any:
        """Return what the function returns."""
        return self.function(model, batch)

    def targets(self, batch: Any) -> None:
        """Return None: the function has met its targets."""
        return

    def losses(self, outputs: Any, targets: Any) -> Tensor | tuple[Tensor, Tensor]:
        """Return the function's result."""
        return outputs  # type: ignore[no-any-return]


class CrossEntropy(Loss):
    """Softmax cross-entropy, summed over the targets of an example that count.

    Classes are along dimension 1, as PyTorch has them, or along the last, as language models
    have them; targets equal to -100 do not count.
    """

    name = "loss='cross_entropy'"
    ignore_index = -100

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
        last = logits.ndim > 2 and tuple(logits.shape[:-1]) == shape
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
            if outputs.squeeze(-1).shape != targets.squeeze(-1).shape:
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
    """Half the squared error, ½‖f − y‖²: the negative log-likelihood of a unit Gaussian."""

    name = "loss='mse'"

    def _terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square() / 2

    def sample(self, outputs: Any, targets: Any, uniforms: Uniforms) -> Tensor:
        """Draw from a unit Gaussian around the outputs."""
        mean, _ = self._aligned(outputs, targets)
        return mean + _gaussian(uniforms, mean)

    def exact(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Return the outputs themselves, weighted 1."""
        mean, _ = self._aligned(outputs, targets)
        rows = mean.flatten(1)
        return rows, torch.ones_like(rows)


class BinaryCrossEntropy(_Elementwise):
    """Sigmoid cross-entropy on logits, summed over an example's outputs."""

    name = "loss='bce'"

    def _terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")

    def sample(self, outputs: Any, targets: Any, uniforms: Uniforms) -> Tensor:
        """Draw 0 or 1 for every output."""
        logits, _ = self._aligned(outputs, targets)
        u = uniforms(logits.shape).to(logits.device)
        return (u < logits.double().sigmoid()).to(logits.dtype)

    def mode(self, outputs: Any, targets: Any) -> Tensor:
        """Return 1 where an output's probability exceeds one half."""
        logits, _ = self._aligned(outputs, targets)
        return (logits > 0).to(logits.dtype)

    def exact(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Return the logits, weighted p (1 - p)."""
        logits, _ = self._aligned(outputs, targets)
        p = logits.detach().sigmoid().flatten(1)
        return logits.flatten(1), p * (1 - p)


LOSSES: dict[str, type[Loss]] = {
    "bce": BinaryCrossEntropy,
    "cross_entropy": CrossEntropy,
    "mse": SquaredError,
}


def resolve_loss(loss: Any) -> Loss:
    """Return the `Loss` that a ``loss`` parameter stands for.

    Parameters
    ----------
    loss : {"cross_entropy", "mse", "bce"}, Loss, torch.nn.Module or callable

    Raises
    ------
    IFVPUsageError
        If it is none of these.
    """
    if isinstance(loss, str) and loss in LOSSES:
        return LOSSES[loss]()
    if isinstance(loss, Loss):
        return loss
    if callable(loss) and not isinstance(loss, type):
        return CallableLoss(loss)
    raise IFVPUsageError(
        f"loss={loss!r} is not known; expected one of {sorted(LOSSES)}, a torch loss module, a "
        "fimkit.losses.Loss, or a callable loss(model, batch) returning (B,) losses."
    )


def _sequence(batch: Any) -> Sequence[Any]:
    if isinstance(batch, tuple | list) and len(batch) >= 2:
        return batch
    found = type(batch).__name__
    if isinstance(batch, tuple | list):
        found += f" of length {len(batch)}"
    raise IFVPUsageError(
        f"a batch must be a tuple or list (*inputs, targets), or a mapping with 'labels'; got "
        f"{found}. Pass a callable loss(model, batch) for other batches."
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
