"""Checks that the loss of every example is its own, so that no wrong number passes silently."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from fimkit.exceptions import IFVPUsageError

__all__ = ["Hidden", "check_alone", "check_independence", "gradients_at", "layer_name"]

# Hidden vectors, or the gradients there, by cache, layer and call.
Hidden = dict[tuple[int, int, int], Tensor]


def layer_name(cache: int, layer: int) -> str:
    """Return what errors call a layer."""
    return f"layer {layer} of cache {cache}"


def gradients_at(hidden: Hidden, total: Tensor, *, retain_graph: bool) -> Hidden:
    """Return the gradients of a sum of losses at hidden vectors.

    Raises
    ------
    IFVPUsageError
        If the sum does not depend on the hidden vectors of a layer, by its name.
    """
    found = torch.autograd.grad(
        total, list(hidden.values()), retain_graph=retain_graph, allow_unused=True
    )
    for (cache, layer, _), gradient in zip(hidden, found, strict=True):
        if gradient is None:
            raise IFVPUsageError(
                f"the losses do not depend on the hidden vectors of {layer_name(cache, layer)}; "
                "append the very tensor that the forward goes on with, not a copy or a view of it."
            )
    return dict(zip(hidden, found, strict=True))


def check_independence(losses: Tensor, hidden: Hidden, signals: Hidden) -> None:
    """Refuse losses that depend on hidden vectors of other examples, by one backward pass.

    Where example i's loss alone depends on its hidden vectors, the gradient there of a random sum
    ``Σ_i c_i l_i`` is ``c_i`` times that of ``Σ_i l_i``. Powers of two as coefficients multiply the
    rounding errors alike, whatever dtypes the model computes in.

    Parameters
    ----------
    losses : Tensor of shape (B,)
    hidden : mapping to Tensor of shape (B, ..., out)
    signals : mapping to Tensor of shape (B, ..., out)
        Gradients of the summed losses.

    Raises
    ------
    IFVPUsageError
        If a loss depends on other examples, or a tensor's first dimension does not hold them, by
        the layer's name.
    """
    order = torch.randperm(len(losses), generator=torch.Generator().manual_seed(0))
    coefficients = torch.tensor([1.0, -0.5, -1.0, 0.5])[order % 4].to(losses)
    found = gradients_at(hidden, (coefficients * losses).sum(), retain_graph=False)
    for (cache, layer, call), gradient in found.items():
        wide = signals[cache, layer, call].to(torch.promote_types(gradient.dtype, torch.float32))
        expected = wide * coefficients.to(wide).view(-1, *[1] * (wide.ndim - 1))
        limits = torch.finfo(gradient.dtype)
        # Kernels that add up in any order differ by rounding errors after all, and so do numbers
        # near the least.
        tolerance = math.sqrt(limits.eps) / 4 * expected.norm()
        tolerance += 8 * limits.smallest_normal * limits.eps * math.sqrt(expected.numel())
        if not (gradient - expected).norm() <= tolerance:
            raise IFVPUsageError(
                f"the gradients at the hidden vectors of {layer_name(cache, layer)}, of shape "
                f"{tuple(gradient.shape)}, do not follow the losses of the {len(losses)} examples "
                "along their first dimension. Either a loss depends on other examples (batch "
                "statistics, as of BatchNorm in training mode, or a mean over the batch): put "
                "modules into evaluation mode and return each example's own loss, or give "
                "batch_size=1. Or the examples lie along another dimension (time first): let the "
                "module run on, and record, tensors with the examples first."
            )


def check_alone(alone: Tensor, together: Tensor, size: int, dtypes: Iterable[torch.dtype]) -> None:
    """Refuse a loss that is another one without the rest of its batch.

    Parameters
    ----------
    alone, together : Tensor of shape (1,)
        Loss of one example by itself, and in a batch.
    size : int
        Examples in the batch.
    dtypes : iterable of torch.dtype
        What losses and hidden vectors are computed in.

    Raises
    ------
    IFVPUsageError
        If they differ by more than the rounding errors that batches of other sizes have.
    """
    tolerance = 3 * math.sqrt(max(torch.finfo(dtype).eps for dtype in dtypes))
    scale = together.abs().clamp(min=1)
    if not bool(((alone - together).abs() <= tolerance * scale).all()):
        raise IFVPUsageError(
            f"an example has loss {float(alone):.6g} by itself, and {float(together):.6g} in a "
            f"batch of {size}: its loss depends on the others (a division by the size of the batch "
            "or its number of tokens, batch statistics), or differs between calls. Return each "
            "example's own loss, or give batch_size=1."
        )
