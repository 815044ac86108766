"""Scales and shifts of normalised inputs: layer, RMS, group and (in evaluation) batch norm."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fimkit.gradients.rules.base import (
    Examples,
    ParameterIndex,
    Slot,
    Use,
    kept_input,
    slot_names,
)

__all__ = ["BatchNormUse", "GroupNormUse", "LayerNormUse", "RMSNormUse"]


class _NormUse(Use):
    """``y = w ⊙ x̂ + b``: the gradient of w sums ``s ⊙ x̂`` over positions, that of b sums s."""

    def __init__(self, x: Tensor, slots: tuple[Slot | None, Slot | None]) -> None:
        self._weight, self._bias = slots
        self.x = kept_input(x, self._weight)
        self.names = slot_names(*slots)

    @abstractmethod
    def normalized(self) -> Tensor:
        """Return the normalised input x̂, of the output's shape."""

    @abstractmethod
    def sum_positions(self, values: Tensor) -> Tensor:
        """Sum ``(m, c, T, *features)`` values to ``(m, c, *parameter shape)``."""

    def rows(self, name: str, signals: Tensor, examples: Examples) -> Tensor:
        """Return per-example gradients of one parameter, shape ``(m, c, *shape)``."""
        s = examples.split_signals(signals, self.lead)
        if self._weight is not None and self._weight.name == name:
            s = s * examples.split(self.normalized(), self.lead)[:, None].to(s.dtype)
        return self.sum_positions(s)


def _whole(index: ParameterIndex, *arguments: Any) -> tuple[Slot | None, Slot | None] | None:
    """Return the slots of a weight and a bias, or None if there is none or it is in part."""
    weight, bias = (index.slot(argument) for argument in arguments)
    if weight is None and bias is None:
        return None
    return None if any(slot and not slot.whole for slot in (weight, bias)) else (weight, bias)


class _TrailingNormUse(_NormUse):
    """A norm over trailing dimensions, along which its parameters run."""

    def __init__(
        self,
        x: Tensor,
        normalized_shape: Sequence[int],
        slots: tuple[Slot | None, Slot | None],
        eps: float | None,
    ) -> None:
        super().__init__(x, slots)
        self._shape = tuple(normalized_shape)
        self._eps = eps

    def observe(self, output: Tensor) -> None:
        """Set `lead` from the call's output."""
        self.lead = tuple(output.shape[: output.ndim - len(self._shape)])

    def sum_positions(self, values: Tensor) -> Tensor:
        """Sum ``(m, c, T, *features)`` values to ``(m, c, *parameter shape)``."""
        return values.sum(2)


class LayerNormUse(_TrailingNormUse):
    """Layer norm."""

    functions = (F.layer_norm,)
    description = "captured (layer norm)"

    @classmethod
    def match(
        cls,
        index: ParameterIndex,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> LayerNormUse | None:
        """Return the use that a call with these arguments is, or None if it uses no parameter."""
        slots = _whole(index, weight, bias)
        return None if slots is None else cls(input, normalized_shape, slots, eps)

    def normalized(self) -> Tensor:
        """Return the normalised input x̂, of the output's shape."""
        assert self._eps is not None
        return F.layer_norm(self.x, self._shape, eps=self._eps)


class RMSNormUse(_TrailingNormUse):
    """RMS norm."""

    functions = (F.rms_norm,)
    description = "captured (RMS norm)"

    @classmethod
    def match(
        cls,
        index: ParameterIndex,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        eps: float | None = None,
    ) -> RMSNormUse | None:
        """Return the use that a call with these arguments is, or None if it uses no parameter."""
        slots = _whole(index, weight, None)
        return None if slots is None else cls(input, normalized_shape, slots, eps)

    def normalized(self) -> Tensor:
        """Return the normalised input x̂, of the output's shape."""
        return F.rms_norm(self.x, self._shape, eps=self._eps)


class _ChannelNormUse(_NormUse):
    """A norm whose parameters run along dimension 1 of ``(N, C, *)``."""

    def observe(self, output: Tensor) -> None:
        """Set `lead` from the call's output."""
        self.lead = tuple(output.shape[:1])

    def sum_positions(self, values: Tensor) -> Tensor:
        """Sum ``(m, c, T, *features)`` values to ``(m, c, *parameter shape)``."""
        return values.flatten(4).sum((2, 4)) if values.ndim > 4 else values.sum(2)


class GroupNormUse(_ChannelNormUse):
    """Group norm."""

    functions = (F.group_norm,)
    description = "captured (group norm)"

    def __init__(
        self, x: Tensor, groups: int, slots: tuple[Slot | None, Slot | None], eps: float
    ) -> None:
        super().__init__(x, slots)
        self._groups = groups
        self._eps = eps

    @classmethod
    def match(
        cls,
        index: ParameterIndex,
        input: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> GroupNormUse | None:
        """Return the use that a call with these arguments is, or None if it uses no parameter."""
        slots = _whole(index, weight, bias)
        return None if slots is None else cls(input, num_groups, slots, eps)

    def normalized(self) -> Tensor:
        """Return the normalised input x̂, of the output's shape."""
        return F.group_norm(self.x, self._groups, eps=self._eps)


class BatchNormUse(_ChannelNormUse):
    """Batch norm by running statistics; with batch statistics examples are not independent."""

    functions = (F.batch_norm,)
    description = "captured (batch norm)"

    def __init__(
        self,
        x: Tensor,
        statistics: tuple[Tensor, Tensor],
        slots: tuple[Slot | None, Slot | None],
        eps: float,
    ) -> None:
        super().__init__(x, slots)
        self._mean, self._variance = statistics
        self._eps = eps

    @classmethod
    def match(
        cls,
        index: ParameterIndex,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> BatchNormUse | None:
        """Return the use that a call with these arguments is, or None if it uses no parameter."""
        slots = _whole(index, weight, bias)
        if slots is None or training or running_mean is None or running_var is None:
            return None
        return cls(input, (running_mean, running_var), slots, eps)

    def normalized(self) -> Tensor:
        """Return the normalised input x̂, of the output's shape."""
        return torch.batch_norm(
            self.x, None, None, self._mean, self._variance, False, 0.0, self._eps, False
        )
