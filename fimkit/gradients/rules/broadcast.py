"""Parameters that all examples share, where they meet what differs between examples.

``x + w``, ``w * x`` and ``w.expand(...)`` repeat w for every example: its gradient at an example is
summed over that example's part of the gradient at the result. So it is with what is looked up in a
table once for all examples: each might have looked it up for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from fimkit.gradients.rules.base import Examples, ParameterIndex, Use, View
from fimkit.gradients.rules.embedding import EmbeddingUse

__all__ = [
    "AdditionUse",
    "ExpansionUse",
    "InPlaceMultiplicationUse",
    "MultiplicationUse",
    "RepetitionUse",
    "SubtractionUse",
]

_Use = TypeVar("_Use", bound=Use)


class _BroadcastUse(Use):
    """A parameter, or a view of it, repeated along dimensions that it lacks or has of size 1."""

    def __init__(self, view: View) -> None:
        self.names = (view.name,)
        self.x = torch.empty(0)  # sums need none
        self._view = view

    def observe(self, output: Tensor) -> None:
        """Set `lead` from the call's output: all dimensions before the parameter's own."""
        self._shape = output.shape
        own = (1,) * (output.ndim - len(self._view.shape)) + tuple(self._view.shape)
        first = next((dim for dim, size in enumerate(own) if size != 1), len(own))
        self.lead = tuple(output.shape[:first])
        self._repeated = [dim - first for dim in range(first, len(own)) if own[dim] == 1]

    def rows(self, name: str, signals: Tensor, examples: Examples) -> Tensor:
        """Return per-example gradients of the parameter, shape ``(m, c, *shape)``."""
        s = self._scaled(examples.split_signals(signals, self.lead), examples)
        return self._view.place(s.sum([2, *(3 + dim for dim in self._repeated)]))

    def _scaled(self, s: Tensor, examples: Examples) -> Tensor:
        """Return the gradients at the repeated parameter, of those at the output."""
        return s


class AdditionUse(_BroadcastUse):
    """``w + x``, and sums into x."""

    functions = (torch.add, Tensor.add, Tensor.add_)
    description = "captured (addition)"
    #: What the second operand is multiplied by.
    sign: ClassVar[int] = 1

    def __init__(self, view: View, factor: float) -> None:
        super().__init__(view)
        self._factor = factor

    @classmethod
    def match(
        cls,
        index: ParameterIndex,
        input: Any,
        other: Any,
        *others: Any,
        alpha: float = 1,
        **keywords: Any,
    ) -> Use | None:
        """Return the use that a call with these arguments is, or None if it uses no parameter."""
        if others or keywords or not isinstance(input, Tensor) or not isinstance(other, Tensor):
            return None
        factors = 1, cls.sign * alpha
        views = index.view(input), index.view(other)
        if views != (None, None):
            return _only([cls(v, factor) for v, factor in zip(views, factors, strict=True) if v])
        lookups = [_lookup(index, input, other.shape), _lookup(index, other, input.shape)]
        return _only([u for u, factor in zip(lookups, factors, strict=True) if u and factor == 1])

    def _scaled(self, s: Tensor, examples: Examples) -> Tensor:
        """Return the gradients at the repeated parameter, of those at the output."""
        return s if self._factor == 1 else s * self._factor


class SubtractionUse(AdditionUse):
    """``w - x`` and ``x - w``."""

    functions = (torch.sub, Tensor.sub, Tensor.sub_)
    description = "captured (subtraction)"
    sign = -1


class MultiplicationUse(_BroadcastUse):
    """``w * x``."""

    functions: ClassVar[tuple[Callable[..., Any], ...]] = (torch.mul, Tensor.mul)
    description = "captured (multiplication)"

    def __init__(self, view: View, x: Tensor) -> None:
        super().__init__(view)
        self.x = x

    @classmethod
    def match(
        cls, index: ParameterIndex, input: Any, other: Any, *others: Any, **keywords: Any
    ) -> MultiplicationUse | None:
        """Return the use that a call with these arguments is, or None if it uses no parameter."""
        if others or keywords or not isinstance(input, Tensor) or not isinstance(other, Tensor):
            return None
        pairs = (index.view(input), other), (index.view(other), input)
        return _only([cls(view, x.detach()) for view, x in pairs if view])

    def _scaled(self, s: Tensor, examples: Examples) -> Tensor:
        """Return the gradients at the repeated parameter, of those at the output."""
        x = examples.split(self.x.expand(self._shape), self.lead)
        return s * x[:, None].to(s.dtype)


class InPlaceMultiplicationUse(MultiplicationUse):
    """``x *= w``, which leaves nothing of x."""

    functions = (Tensor.mul_,)

    def __init__(self, view: View, x: Tensor) -> None:
        super().__init__(view, x.clone())


class ExpansionUse(_BroadcastUse):
    """``w.expand(sizes)``."""

    functions: ClassVar[tuple[Callable[..., Any], ...]] = (
        Tensor.expand,
        Tensor.expand_as,
        Tensor.broadcast_to,
        torch.broadcast_to,
    )
    description = "captured (expansion)"

    @classmethod
    def match(
        cls, index: ParameterIndex, input: Tensor, *sizes: Any, **keywords: Any
    ) -> Use | None:
        """Return the use that a call with these arguments is, or None if it uses no parameter."""
        if keywords or not sizes:
            return None
        first = sizes[0]
        if not isinstance(first, int):
            sizes = tuple(first.shape if isinstance(first, Tensor) else first)
        return cls._of_sizes(index, input, sizes)

    @classmethod
    def _of_sizes(cls, index: ParameterIndex, input: Tensor, sizes: Sequence[int]) -> Use | None:
        view = index.view(input)
        return _lookup(index, input, sizes) if view is None else cls(view)


class RepetitionUse(ExpansionUse):
    """``w.repeat(times)``, where it does the same."""

    functions = (Tensor.repeat,)

    @classmethod
    def _of_sizes(cls, index: ParameterIndex, input: Tensor, sizes: Sequence[int]) -> Use | None:
        own = sizes[len(sizes) - input.ndim :]
        if any(size != 1 and times != 1 for size, times in zip(input.shape, own, strict=False)):
            return None
        return super()._of_sizes(index, input, sizes)


def _only(uses: Sequence[_Use]) -> _Use | None:
    """Return the one use there is; of two parameters neither meets what has the examples."""
    return uses[0] if len(uses) == 1 else None


def _lookup(index: ParameterIndex, operand: Tensor, sizes: Sequence[int]) -> EmbeddingUse | None:
    """Return a lookup whose result is repeated along its first dimension, or one before it."""
    use = index.lookup(operand)
    if not isinstance(use, EmbeddingUse) or len(sizes) < operand.ndim:
        return None
    first, last = sizes[0], sizes[-1]
    repeated = len(sizes) > operand.ndim or (operand.shape[0] == 1 and first not in (1, -1))
    if not repeated or (operand.shape[-1] == 1 and last not in (1, -1)):
        return None
    return use.repeated(operand.shape[:-1])
