"""``F.linear``, by `torch.nn.Linear` or on any module's weight."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fimkit.gradients.rules.base import ParameterIndex, PositionsUse, Slot
from fimkit.operators import MatrixLayout

__all__ = ["LinearUse"]


class LinearUse(PositionsUse):
    """``y = x Wᵀ + b`` with x of shape ``(*lead, in)``: positions are all leading dimensions."""

    functions = (F.linear,)
    description = "captured (linear)"

    def __init__(self, x: Tensor, weight: Tensor, slots: tuple[Slot | None, Slot | None]) -> None:
        super().__init__(x, weight, slots)
        self.layout = MatrixLayout(1, weight.shape[0], weight.shape[1])

    @classmethod
    def match(
        cls,
        index: ParameterIndex,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        **_: Any,
    ) -> LinearUse | None:
        """Return the use that a call with these arguments is, or None if it uses no parameter."""
        slots = index.slot(weight), index.slot(bias)
        return cls(input, weight, slots) if slots != (None, None) and weight.ndim == 2 else None
