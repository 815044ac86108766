"""How the flat vector of a weight and its bias becomes the matrices that linear maps act by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["MatrixLayout"]


@dataclass(frozen=True)
class MatrixLayout:
    """A weight, with its bias when there is one, seen as ``groups`` matrices of ``(out, in)``.

    A bias is folded in as one more column, met by a last input of 1. The flat order is the
    weight's own memory order, then the bias.

    Parameters
    ----------
    groups : int
        Number of independent matrices (more than one for a grouped convolution).
    out, in_ : int
        Outputs and inputs of each matrix, the bias column not counted.
    bias : bool
        Whether a bias of ``groups * out`` numbers follows the weight.
    transposed : bool
        Whether the weight is stored ``(in, out)``; only with one group.
    """

    groups: int
    out: int
    in_: int
    bias: bool = False
    transposed: bool = False

    @property
    def columns(self) -> int:
        """Columns of each matrix, the bias column counted."""
        return self.in_ + self.bias

    @property
    def size(self) -> int:
        """Length of the flat vector."""
        return self.groups * self.out * self.columns

    def matrices(self, flat: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return ``(k, size)`` vectors as ``(k, groups, out, columns)`` matrices.

        Copies when a bias has to be folded in or ``dtype`` differs, else a view.
        """
        dtype = flat.dtype if dtype is None else dtype
        k = flat.shape[0]
        weight = flat[:, : self.groups * self.out * self.in_]
        if self.transposed:
            weight = weight.reshape(k, 1, self.in_, self.out).transpose(2, 3)
        else:
            weight = weight.reshape(k, self.groups, self.out, self.in_)
        if not self.bias:
            return weight.to(dtype)
        folded = flat.new_empty((k, self.groups, self.out, self.columns), dtype=dtype)
        folded[..., :-1] = weight
        folded[..., -1] = flat[:, -self.groups * self.out :].view(k, self.groups, self.out)
        return folded

    def flatten(self, matrices: Tensor) -> Tensor:
        """Return ``(k, groups, out, columns)`` matrices as ``(k, size)`` vectors."""
        k = matrices.shape[0]
        weight = matrices[..., : self.in_]
        if self.transposed:
            weight = weight.transpose(2, 3)
        if not self.bias:
            return weight.reshape(k, self.size)
        flat = matrices.new_empty((k, self.size))
        flat[:, : -self.groups * self.out].view(weight.shape).copy_(weight)
        flat[:, -self.groups * self.out :].view(k, self.groups, self.out).copy_(matrices[..., -1])
        return flat
