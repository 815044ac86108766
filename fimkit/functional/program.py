"""A loss function as a function of flat lists of tensors, and its gradients per example."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from fimkit.exceptions import IFVPUsageError
from fimkit.gradients.tables import TablesLeftAlone
from fimkit.gradients.tree import map_tensors, tensors
from fimkit.operators import Columns, DenseRows, RowMatrix
from fimkit.operators.memory import chunks

__all__ = ["Examples", "Gradients", "Losses", "Program"]

Losses = Tensor
Gradients = list[Tensor]


class Program:
    """``func`` at its arguments, as a function of parameter tensors and data tensors.

    Made, and used, outside inference mode.

    Parameters
    ----------
    func : callable
        Returns one loss, of shape ``()`` or ``(1,)``.
    arguments : sequence
        Arguments of ``func``: tensors, containers of tensors, and constants.
    argnums : int or tuple of int
        The arguments whose tensors are the parameters.

    Attributes
    ----------
    selected : tuple of int
        Indices of the arguments that are parameters, in the order of ``argnums``.
    parameters : list of Tensor
        In the order of ``argnums``, then of each argument's containers.
    data : list of Tensor
        Tensors of all other arguments, in order.
    data_arguments : list of int
        The argument that each data tensor comes from.
    """

    def __init__(
        self, func: Callable[..., Any], arguments: Sequence[Any], argnums: int | tuple[int, ...]
    ) -> None:
        self._func = func
        self._arguments = tuple(arguments)
        self.selected = _positions(argnums, len(self._arguments))
        self.parameters: list[Tensor] = []
        for index in self.selected:
            found = tensors(self._arguments[index])
            _check_parameters(found, index, self._arguments[index])
            self.parameters += [_ordinary(tensor).detach() for tensor in found]
        self.data: list[Tensor] = []
        self.data_arguments: list[int] = []
        for index, argument in enumerate(self._arguments):
            if index not in self.selected:
                found = tensors(argument)
                if any(tensor.is_meta for tensor in found):
                    raise IFVPUsageError(
                        f"argument {index} of func is on the meta device, which has no numbers; "
                        "make it on a real one."
                    )
                self.data += [_ordinary(tensor) for tensor in found]
                self.data_arguments += [index] * len(found)
        self.size = sum(parameter.numel() for parameter in self.parameters)
        self.device = self.parameters[0].device

    def loss(self, parameters: Sequence[Tensor], data: Sequence[Tensor]) -> Tensor:
        """Return ``func`` at other tensors in the same containers, as a 0-d tensor."""
        own, others = iter(parameters), iter(data)
        rebuilt = {
            index: map_tensors(lambda _: next(own), self._arguments[index])
            for index in self.selected
        }
        for index, argument in enumerate(self._arguments):
            if index not in rebuilt:
                rebuilt[index] = map_tensors(lambda _: next(others), argument)
        with TablesLeftAlone():
            value = self._func(*(rebuilt[index] for index in range(len(rebuilt))))
        return _scalar(value)

    def whole(self) -> tuple[Losses, Gradients]:
        """Return the loss ``(1,)`` and gradient ``(1, *shape)`` of the whole call.

        Raises
        ------
        IFVPUsageError
            If the loss depends on no parameter, or it or its gradient is not finite.
        """
        loss, gradient = self.gradient(self.data)
        if gradient is None:
            raise self.unused()
        # Copies: a gradient may be one of func's own tensors.
        whole = torch.stack([loss]), [torch.stack([part]) for part in gradient]
        _check_finite(*whole)
        return whole

    def gradient(self, data: Sequence[Tensor]) -> tuple[Tensor, Gradients | None]:
        """Return the loss and its gradient at given data; None where it uses no parameter."""
        parameters = [parameter.detach().requires_grad_() for parameter in self.parameters]
        loss = self.loss(parameters, data)
        if not loss.requires_grad:
            return loss, None
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        if all(gradient is None for gradient in found):
            return loss.detach(), None
        zeros = (torch.zeros_like(parameter) for parameter in self.parameters)
        return loss.detach(), [
            zero if gradient is None else gradient
            for zero, gradient in zip(zeros, found, strict=True)
        ]

    def rows(self, gradients: Gradients) -> RowMatrix:
        """Return gradients of shapes ``(m, *shape)`` as the rows of m examples."""
        groups, start = [], 0
        for gradient in gradients:
            width = gradient.shape[1:].numel()
            rows = gradient.to(self.device).reshape(gradient.shape[0], 1, width)
            columns = Columns((slice(start, start + width),))
            groups.append((columns, DenseRows(rows)))
            start += width
        return RowMatrix(groups, self.size)

    def unused(self) -> IFVPUsageError:
        """Return the error for a loss that depends on no parameter."""
        return IFVPUsageError(
            f"func's value does not depend on {_named(self.selected)}, which argnums selects, so "
            "its gradient there is zero; compute the loss from that argument (for a module, with "
            "torch.func.functional_call), without detaching it."
        )


@dataclass(frozen=True)
class Examples:
    """The slices of a program's data tensors that are its examples.

    Parameters
    ----------
    program : Program
    dims : list of int or None
        Dimension of each data tensor that holds the examples; None where all share the tensor.
    n : int
        Number of examples.
    keep_dims : bool
        Whether a slice keeps its dimension, with size 1.
    """

    program: Program
    dims: list[int | None]
    n: int
    keep_dims: bool

    def gradients(self) -> Iterator[tuple[Losses, Gradients]]:
        """Yield the losses ``(m,)`` and gradients ``(m, *shape)`` of some examples at a time.

        Vectorized over the examples with `torch.func.vmap` until that refuses, which it may with
        many types of error; then by one backward pass per example, which is as exact.

        Raises
        ------
        IFVPUsageError
            If a loss or a gradient is not finite, naming its example.
        """
        vectorized = True
        parameters = self.program.parameters
        each = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        for part in chunks(self.n, each):
            found = None
            if vectorized:
                try:
                    found = self._vectorized(part)
                except IFVPUsageError:
                    raise
                except Exception:
                    vectorized = False
            losses, gradients = self._one_by_one(part) if found is None else found
            _check_finite(losses, gradients, part.start)
            yield losses, gradients

    def depend_on_parameters(self) -> bool:
        """Whether any example's loss uses a parameter; the first one usually does."""
        return any(self.program.gradient(self._example(i))[1] is not None for i in range(self.n))

    def _example(self, i: int) -> list[Tensor]:
        return [
            tensor
            if dim is None
            else tensor.narrow(dim, i, 1)
            if self.keep_dims
            else tensor.select(dim, i)
            for tensor, dim in zip(self.program.data, self.dims, strict=True)
        ]

    def _vectorized(self, part: slice) -> tuple[Losses, Gradients]:
        data = [
            tensor if dim is None else tensor.narrow(dim, part.start, part.stop - part.start)
            for tensor, dim in zip(self.program.data, self.dims, strict=True)
        ]

        def loss(parameters: list[Tensor], example: list[Tensor]) -> Tensor:
            if self.keep_dims:
                example = [
                    tensor if dim is None else tensor.unsqueeze(dim)
                    for tensor, dim in zip(example, self.dims, strict=True)
                ]
            return self.program.loss(parameters, example)

        each = vmap(grad_and_value(loss), in_dims=(None, self.dims), randomness="different")
        with torch.no_grad(), warnings.catch_warnings():
            # An operator without a batching rule runs example by example: slower, and as exact.
            warnings.filterwarnings("ignore", "There is a performance drop")
            gradients, losses = each(self.program.parameters, data)
        return losses, gradients

    def _one_by_one(self, part: slice) -> tuple[Losses, Gradients]:
        losses, rows = [], []
        for i in range(part.start, part.stop):
            loss, gradients = self.program.gradient(self._example(i))
            losses.append(loss)
            rows.append(gradients or [torch.zeros_like(p) for p in self.program.parameters])
        return torch.stack(losses), [torch.stack(row) for row in zip(*rows, strict=True)]


def _positions(argnums: int | tuple[int, ...], n: int) -> tuple[int, ...]:
    """Return the selected arguments counted from the front, each once."""
    given = argnums if isinstance(argnums, tuple) else (argnums,)
    outside = [index for index in given if not -n <= index < n]
    if outside:
        raise IFVPUsageError(
            f"argnums is {argnums!r}, but func was given {n} argument(s); expected indices from 0 "
            f"to {n - 1}. x is the tuple of all arguments of func, also when there is one: (x,)."
        )
    positions = tuple(index % n for index in given)
    if len(set(positions)) != len(positions):
        raise IFVPUsageError(f"argnums is {argnums!r}, which selects an argument twice.")
    return positions


def _check_parameters(found: list[Tensor], index: int, argument: Any) -> None:
    if not sum(tensor.numel() for tensor in found):
        raise IFVPUsageError(
            f"argument {index} of func, which argnums selects, is a {type(argument).__name__} "
            "without any number in a tensor; expected a tensor, or a dict, tuple or list of "
            "tensors (for a module, dict(module.named_parameters()))."
        )
    for tensor in found:
        if not tensor.is_floating_point():
            raise IFVPUsageError(
                f"argument {index} of func, which argnums selects, holds a tensor of dtype "
                f"{tensor.dtype}; gradients need real floating-point tensors, so convert it, or "
                "hand what is no parameter to func as another argument."
            )


def _scalar(value: Any) -> Tensor:
    """Return a loss as a 0-d tensor."""
    expected = "expected one loss, a floating-point tensor of shape () or (1,)"
    if not isinstance(value, Tensor):
        raise IFVPUsageError(f"func returned a {type(value).__name__}; {expected}.")
    if tuple(value.shape) not in ((), (1,)):
        raise IFVPUsageError(
            f"func returned a tensor of shape {tuple(value.shape)}; {expected}. Reduce them with "
            ".mean() or .sum(), or write func for one example and say with in_dims, of "
            "fimkit.functional.per_example or ifvp_datainf, where the examples are."
        )
    if not value.is_floating_point():
        raise IFVPUsageError(f"func returned a tensor of dtype {value.dtype}; {expected}.")
    return value.reshape(())


def _check_finite(losses: Tensor, gradients: Gradients, start: int | None = None) -> None:
    """Refuse what is not finite; without ``start``, in the one row that is the whole call."""
    named = [("loss", losses), *(("gradient", gradient) for gradient in gradients)]
    for what, values in named:
        finite = values.isfinite()
        finite = finite.flatten(1).all(1) if finite.ndim > 1 else finite
        if not finite.all():
            where = "" if start is None else f" at example {start + int(finite.int().argmin())}"
            raise IFVPUsageError(
                f"func's {what}{where} is NaN or infinite; look for NaN inputs, log(0) in the "
                "loss, or a diverged model."
            )


def _ordinary(tensor: Tensor) -> Tensor:
    """Return a tensor that autograd accepts, a copy if it was made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor


def _named(positions: tuple[int, ...]) -> str:
    words = "argument" if len(positions) == 1 else "any of arguments"
    return f"{words} {', '.join(map(str, positions))}"
