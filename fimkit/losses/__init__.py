r"""Losses per example, sampled labels, and the rows of the exact Fisher information matrix.

A loss here is a negative log-likelihood of one example. It is asked, in this order, for the
model's outputs on a batch, the batch's targets, and then for one of:

- ``losses``: :math:`l_i` at given targets (the empirical Fisher takes the batch's own);
- ``sample``: targets drawn from the predictive distribution (``mc``);
- ``mode``: its most probable targets (``predicted``);
- ``exact``: scalars whose gradients, weighted, give the type-2 Fisher (``exact``);
- ``measure``: what else of a prediction influence may explain (its margin, for instance).

A custom loss is a callable ``loss(model, batch)`` for the empirical Fisher, or a subclass of
`Loss` with as many of these methods as it needs.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fimkit.exceptions import IFVPUsageError
from fimkit.losses.base import CallableLoss, Loss, Uniforms
from fimkit.losses.language import CausalLanguageModel
from fimkit.losses.likelihoods import BinaryCrossEntropy, CrossEntropy, SquaredError
from fimkit.losses.measurements import measured
from fimkit.losses.modules import ModuleLoss

__all__ = [
    "LOSSES",
    "CallableLoss",
    "Loss",
    "ModuleLoss",
    "Uniforms",
    "measured",
    "resolve_loss",
]

LOSSES: dict[str, type[Loss]] = {
    "bce": BinaryCrossEntropy,
    "causal_lm": CausalLanguageModel,
    "cross_entropy": CrossEntropy,
    "mse": SquaredError,
}


def resolve_loss(loss: Any) -> Loss:
    """Return the `Loss` that a ``loss`` parameter stands for.

    Parameters
    ----------
    loss : {"cross_entropy", "causal_lm", "mse", "bce"}, Loss, torch.nn.Module or callable

    Raises
    ------
    IFVPUsageError
        If it is none of these.
    """
    if isinstance(loss, str) and loss in LOSSES:
        return LOSSES[loss]()
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, nn.Module):
        return ModuleLoss(loss)
    if callable(loss) and not isinstance(loss, type):
        return CallableLoss(loss)
    if isinstance(loss, type) and issubclass(loss, nn.Module | Loss):
        raise IFVPUsageError(
            f"loss={loss.__name__} is a class; give an instance, {loss.__name__}()."
        )
    raise IFVPUsageError(
        f"loss={loss!r} is not known; expected one of {sorted(LOSSES)}, a torch loss module, a "
        "fimkit.losses.Loss, or a callable loss(model, batch) returning (B,) losses."
    )
