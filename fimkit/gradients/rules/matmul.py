"""Products with a parameter stored ``(in, out)``: ``x @ W``, and ``torch.addmm`` as in GPT-2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fimkit.gradients.rules.base import ParameterIndex, PositionsUse, Slot
from fimkit.operators import MatrixLayout

__all__ = ["AddmmUse", "MatmulUse"]


class _TransposedUse(PositionsUse):
    """``y = x W + b`` with W of shape ``(in, out)``: positions are all leading dimensions of x."""

    def __init__(self, x: Tensor, weight: Tensor, slots: tuple[Slot | None, Slot | None]) -> None:
        super().__init__(x, weight, slots)
        self.layout = MatrixLayout(1, weight.shape[1], weight.shape[0], transposed=True)


class MatmulUse(_TransposedUse):
    """``y = x W``."""

    functions = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
    description = "captured (matmul)"

    @classmethod
    def match(
        cls,
        index: ParameterIndex,
        input: Tensor | None = None,
        other: Tensor | None = None,
        *,
        mat2: Tensor | None = None,
        **_: Any,
    ) -> MatmulUse | None:
        """Return the use that a call with these arguments is, or None if it uses no parameter."""
        weight = other if mat2 is None else mat2  # what matmul and mm call it
        slot = index.slot(weight)
        if input is None or weight is None or slot is None:
            return None
        if not slot.whole or weight.ndim != 2 or input.ndim == 0:
            return None
        return cls(input, weight, (slot, None))


class AddmmUse(_TransposedUse):
    """``y = b + x W``."""

    functions = (torch.addmm,)
    description = "captured (addmm)"

    @classmethod
    def match(
        cls,
        index: ParameterIndex,
        input: Tensor,
        mat1: Tensor,
        mat2: Tensor,
        *,
        beta: float = 1,
        alpha: float = 1,
        **_: Any,
    ) -> AddmmUse | None:
        """Return the use that a call with these arguments is, or None if it uses no parameter."""
        slots = index.slot(mat2), index.slot(input) if input.ndim == 1 else None
        partial = slots[0] is not None and not slots[0].whole
        if slots == (None, None) or partial or (beta, alpha) != (1, 1):
            return None
        return cls(mat1, mat2, slots)
