"""``F.linear``, by `torch.nn.Linear` or on any module's weight."""

from __future__ import annotations

from typing import Any

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

__all__ = ["LinearUse"]


class LinearUse(MatrixUse):
    """``y = x Wᵀ + b`` with x of shape ``(*lead, in)``: positions are all leading dimensions."""

    functions = (F.linear,)
    description = "captured (linear)"

    def __init__(self, x: Tensor, weight: Tensor, slots: tuple[Slot | None, Slot | None]) -> None:
        self.weight, self.bias = slots
        self.x = kept_input(x, self.weight)
        self.names = slot_names(*slots)
        self.weight_shape = weight.shape
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
