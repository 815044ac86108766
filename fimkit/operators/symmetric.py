"""Sums of outer products, of which only what is on and above the diagonal is computed."""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["add_products", "mirror_"]

# Greatest width of the panels by which a product is computed on and above its diagonal, and what
# their widths are multiples of.
_PANEL = 256
_ALIGNED = 16


def add_products(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``Σ leftᵀ right``, which is symmetric, on and above the diagonal of a sum.

    Parameters
    ----------
    total : Tensor of shape (m, m)
        Below the diagonal it is not to be read until `mirror_`.
    left, right : Tensor of shape (b, r, m)
        Summed over b and r.
    """
    m = total.shape[0]
    width = _ALIGNED * math.ceil(m / (_ALIGNED * math.ceil(m / _PANEL)))  # about the same of all
    for start in range(0, m, width):
        panel = total[start : start + width, start:]
        panel.addbmm_(left[:, :, start : start + width].mT, right[:, :, start:])


def mirror_(total: Tensor) -> Tensor:
    """Make ``(..., m, m)`` sums symmetric by what is on and above their diagonals, in place."""
    for start in range(0, total.shape[-1], _PANEL):
        stop = start + _PANEL
        total[..., stop:, start:stop] = total[..., start:stop, stop:].mT
        block = total[..., start:stop, start:stop]
        block.copy_(block.triu() + block.triu(1).mT)
    return total
