"""What a rule for one kind of layer supplies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fimkit.gradients.layout import BatchLayout
from fimkit.operators import FactoredRows, MatrixLayout

__all__ = [
    "Examples",
    "MatrixUse",
    "ParameterIndex",
    "PositionsUse",
    "Slot",
    "Use",
    "View",
    "kept_input",
    "slot_names",
]


@dataclass(frozen=True)
class Slot:
    """A parameter, or the rows ``start:stop`` of one, as the argument of a call."""

    name: str
    start: int
    stop: int
    rows: int

    @property
    def whole(self) -> bool:
        """Whether the argument is the entire parameter."""
        return self.stop - self.start == self.rows

    def pad(self, values: Tensor, dim: int) -> Tensor:
        """Set a dimension of ``values``, which runs over this slot's rows, among zeros."""
        if self.whole:
            return values
        shape = list(values.shape)
        shape[dim] = self.rows
        out = values.new_zeros(shape)
        out.narrow(dim, self.start, self.stop - self.start).copy_(values)
        return out


@dataclass(frozen=True)
class View:
    """A parameter, or a view of it, as the operand of a call.

    Attributes
    ----------
    name : str
    shape : torch.Size
        The operand's.
    whole : torch.Size
        The parameter's.
    strides : tuple of int, or None
        Where the operand's numbers lie among the parameter's; None if it has all, in their order.
    start : int
        Where the first is.
    """

    name: str
    shape: torch.Size
    whole: torch.Size
    strides: tuple[int, ...] | None
    start: int

    def place(self, values: Tensor) -> Tensor:
        """Return gradients of the operand, ``(m, c, ...)``, among zeros as the parameter's."""
        m, c = values.shape[:2]
        if self.strides is None:
            return values.reshape(m, c, *self.whole)
        size = self.whole.numel()
        out = values.new_zeros(m, c, size)
        own = out.as_strided((m, c, *self.shape), (c * size, size, *self.strides), self.start)
        own.copy_(values.reshape(own.shape))
        return out.view(m, c, *self.whole)


class ParameterIndex:
    """Finds tracked parameters, parts of them and what was looked up among a call's arguments."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._by_id = {id(parameter): (name, parameter) for name, parameter in parameters.items()}
        self._lookups: dict[int, tuple[Tensor, int, Use]] = {}

    def slot(self, argument: Any) -> Slot | None:
        """Return the slot that an argument is, or None."""
        if not isinstance(argument, Tensor) or argument.ndim == 0:
            return None
        if id(argument) in self._by_id:
            rows = argument.shape[0]
            return Slot(self._by_id[id(argument)][0], 0, rows, rows)
        base = argument._base
        if base is None or id(base) not in self._by_id or base.ndim == 0 or base.stride(0) == 0:
            return None
        if argument.shape[1:] != base.shape[1:] or argument.stride() != base.stride():
            return None
        offset = int(argument.storage_offset()) - int(base.storage_offset())
        start, rest = divmod(offset, base.stride(0))
        if rest:
            return None
        return Slot(self._by_id[id(base)][0], start, start + argument.shape[0], base.shape[0])

    def view(self, argument: Any) -> View | None:
        """Return the view of a parameter, of any shape, that an argument is, or None."""
        if not isinstance(argument, Tensor):
            return None
        if id(argument) in self._by_id:
            name, whole = self._by_id[id(argument)][0], argument.shape
            return View(name, whole, whole, None, 0)
        base = argument._base
        if base is None or id(base) not in self._by_id or not argument.requires_grad:
            return None
        if not base.is_contiguous() or _overlaps(argument) or argument.dtype != base.dtype:
            return None
        all_of_it = argument.is_contiguous() and argument.numel() == base.numel()
        strides = None if all_of_it else argument.stride()
        start = int(argument.storage_offset()) - int(base.storage_offset())
        return View(self._by_id[id(base)][0], argument.shape, base.shape, strides, start)

    def remember_lookup(self, output: Tensor, use: Use) -> None:
        """Let what was looked up in a table be found again."""
        self._lookups[id(output)] = output, output._version, use

    def lookup(self, argument: Tensor) -> Use | None:
        """Return the lookup whose output an argument is, whole and in its order, or None."""
        whole = argument if argument._base is None else argument._base
        output, version, use = self._lookups.get(id(whole), (None, 0, None))
        if output is None or whole._version != version:
            return None
        same = argument.numel() == whole.numel() and argument.shape[-1:] == whole.shape[-1:]
        return use if argument is whole or (same and argument.is_contiguous()) else None


def _overlaps(tensor: Tensor) -> bool:
    """Whether several of a tensor's indices may be of the same number in memory."""
    span = 1
    dims = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted(dim for dim in dims if dim[1] != 1):
        if stride < span:
            return True
        span = stride * size
    return False


@dataclass(frozen=True)
class Examples:
    """Some of a batch's examples: ``part`` of ``batch``, found by ``layout``."""

    layout: BatchLayout
    batch: int
    part: slice

    def split(self, tensor: Tensor, lead: tuple[int, ...]) -> Tensor:
        """Return a ``(*lead, *features)`` tensor as ``(m, positions, *features)``."""
        return self.layout.split(tensor, lead, self.batch)[self.part]

    def split_signals(self, signals: Tensor, lead: tuple[int, ...]) -> Tensor:
        """Return ``(c, *lead, *features)`` signals as ``(m, c, positions, *features)``."""
        if signals.shape[0] == 1:
            return self.split(signals[0], lead)[:, None]
        return torch.stack([self.split(signal, lead) for signal in signals], 1)


class Use(ABC):
    """One call of a function on tracked parameters, seen during a forward pass.

    Attributes
    ----------
    edge : GradientEdge
        Where the gradient of the call's output passes in the autograd graph.
    lead : tuple of int
        Leading dimensions of the output, among which the examples are.
    names : tuple of str
        Tracked parameters that the call uses.
    replaces : Use or None
        An earlier call that this one stands for as well.
    """

    #: Functions whose calls this rule reads.
    functions: ClassVar[tuple[Callable[..., Any], ...]]
    #: How coverage names this rule.
    description: ClassVar[str]

    edge: GradientEdge
    lead: tuple[int, ...]
    names: tuple[str, ...]
    replaces: Use | None = None

    @classmethod
    @abstractmethod
    def match(cls, index: ParameterIndex, *args: Any, **kwargs: Any) -> Use | None:
        """Return the use that a call with these arguments is, or None if it uses no parameter."""

    @abstractmethod
    def observe(self, output: Tensor) -> None:
        """Set `lead` from the call's output."""

    @abstractmethod
    def rows(self, name: str, signals: Tensor, examples: Examples) -> Tensor:
        """Return per-example gradients of one parameter, shape ``(m, c, *shape)``.

        Parameters
        ----------
        name : str
            One of `names`.
        signals : Tensor of shape (c, *output shape)
            Gradients of c scalars per example with respect to the output.
        examples : Examples
            Which examples, and where they are.
        """

    #: The call's input, detached; without any number where no gradient needs it.
    x: Tensor
    #: The input's version at the call.
    version: int

    @property
    def nbytes(self) -> int:
        """Bytes that the use keeps."""
        return self.x.nbytes

    def repeats(self, n: int) -> tuple[float, ...]:
        """Return the leading dimensions by which n examples might lie, in multiples of n."""
        return tuple(size / n if size % n == 0 else 0.0 for size in self.lead)

    @property
    def key(self) -> tuple[Any, ...]:
        """What has to stay the same for a layout found once to hold again."""
        return type(self).__name__, self.names, len(self.lead)


class MatrixUse(Use):
    """A use whose weight gradient is a sum over positions of ``s aᵀ``, group by group.

    Attributes
    ----------
    weight, bias : Slot or None
        Where the two parameters of the map lie; None if untracked or absent.
    layout : MatrixLayout
        The map's matrices, without the bias.
    weight_shape : torch.Size
        Shape of the weight argument.
    """

    weight: Slot | None
    bias: Slot | None
    layout: MatrixLayout
    weight_shape: torch.Size

    def __init__(self, x: Tensor, weight: Tensor, slots: tuple[Slot | None, Slot | None]) -> None:
        self.weight, self.bias = slots
        self.x = kept_input(x, self.weight)
        self.names = slot_names(*slots)
        self.weight_shape = weight.shape

    @abstractmethod
    def inputs(self, examples: Examples, constant: float | None = None) -> tuple[Tensor, ...]:
        """Return the map's inputs, shape ``(m, T, groups, in)``.

        Parameters
        ----------
        examples : Examples
            Which examples, and where they are.
        constant : float, optional
            What a further last column holds, a tensor of its own where inputs would be copied to
            join it; there is none when not given.
        """

    @abstractmethod
    def signals(self, signals: Tensor, examples: Examples) -> Tensor:
        """Return the gradients at its outputs, shape ``(m, c, T, groups, out)``."""

    def rows(self, name: str, signals: Tensor, examples: Examples) -> Tensor:
        """Return per-example gradients of one parameter, shape ``(m, c, *shape)``."""
        s = self.signals(signals, examples)
        m, c = s.shape[:2]
        out: Tensor | None = None
        if self.weight is not None and self.weight.name == name:
            (inputs,) = self.inputs(examples)
            factored = FactoredRows(inputs.to(s.dtype), s, self.layout)
            values = factored.densify().rows.view(m, c, *self.weight_shape)
            out = self.weight.pad(values, 2)
        if self.bias is not None and self.bias.name == name:
            values = self.bias.pad(s.sum(2).flatten(2), 2)
            out = values if out is None else out + values
        assert out is not None
        return out


class PositionsUse(MatrixUse):
    """A map of inputs ``(*lead, in)``: positions are all leading dimensions."""

    def observe(self, output: Tensor) -> None:
        """Set `lead` from the call's output."""
        self.lead = tuple(output.shape[:-1])

    def inputs(self, examples: Examples, constant: float | None = None) -> tuple[Tensor, ...]:
        """Return the map's inputs, shape ``(m, T, 1, in)``, and the constant apart."""
        x = examples.split(self.x, self.lead)[:, :, None]
        if constant is None:
            return (x,)
        return x, x.new_full((), constant).expand(*x.shape[:-1], 1)

    def signals(self, signals: Tensor, examples: Examples) -> Tensor:
        """Return the gradients at its outputs, shape ``(m, c, T, 1, out)``."""
        return examples.split_signals(signals, self.lead)[:, :, :, None]


def kept_input(x: Tensor, weight: Slot | None) -> Tensor:
    """Return what is kept of an input that the gradient of a weight needs, and no other."""
    return x.new_empty(0) if weight is None else x.detach()


def slot_names(*slots: Slot | None) -> tuple[str, ...]:
    """Return the names of the slots there are."""
    return tuple(slot.name for slot in slots if slot is not None)
