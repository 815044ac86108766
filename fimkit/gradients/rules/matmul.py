"""Products with a parameter stored ``(in, out)``: ``x @ W``, and ``torch.addmm`` as in GPT-2."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fimkit.gradients.rules.base import (
    Examples,
    MatrixUse,
    ParameterIndex,
    Slot,
    kept_input,
    slot_names,
)
from fimkit.operators import MatrixLayout

__all__ = ["AddmmUse", "MatmulUse"]


class _TransposedUse(MatrixUse):
    """``y = x W + b`` with W of shape ``(in, out)``: positions are all leading dimensions of x."""

    def __init__(self, x: Tensor, weight: Tensor, slots: tuple[Slot | None, Slot | None]) -> None:
        self.weight, self.bias = slots
        self.x = kept_input(x, self.weight)
        self.names = slot_names(*slots)
        self.weight_shape = weight.shape
        self.layout = MatrixLayout(1, weight.shape[1], weight.shape[0], transposed=True)

    def observe(self, output: Tensor) -> None:
        """Set `lead` from the call's output."""
        self.lead = tuple(output.shape[:-1])

    def inputs(self, examples: Examples, constant: float | None = None) -> Tensor:
        """Return the map's inputs, shape ``(m, T, 1, in)``."""
        x = examples.split(self.x, self.lead)[:, :, None]
        return x if constant is None else F.pad(x, (0, 1), value=constant)

    def signals(self, signals: Tensor, examples: Examples) -> Tensor:
        """Return the gradients at its outputs, shape ``(m, c, T, 1, out)``."""
        return examples.split_signals(signals, self.lead)[:, :, :, None]


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
