"""The Fisher information matrix of a function at its arguments, and what its examples are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fimkit.exceptions import IFVPUsageError
from fimkit.functional.examples import PerExample, SingleExample
from fimkit.functional.program import Examples, Gradients, Losses, Program
from fimkit.operators import Operator
from fimkit.operators.memory import accumulation_dtype
from fimkit.statistics import FisherAccumulator

__all__ = ["fisher"]


def fisher(
    func: Callable[..., Any], arguments: Any, argnums: int | tuple[int, ...]
) -> tuple[Operator, str | None]:
    """Return the Fisher information matrix of ``func``, and what is in doubt about its examples.

    The examples are those that `per_example` names. Without it they are the slices of size 1
    along the leading dimension that all data tensors share, if the function's value at the whole
    is the mean or the sum of its values at the slices, which tells whether F is a mean or a sum.
    Failing that, F is of rank 1, from the gradient of the whole call.

    Parameters
    ----------
    func : callable
    arguments : sequence
    argnums : int or tuple of int

    Returns
    -------
    operator : Operator
    doubt : str or None
        Why the whole call was taken as one example although it may hold more.

    Raises
    ------
    IFVPUsageError
        If the arguments do not fit, the loss depends on no parameter, or is not finite.
    """
    if isinstance(func, PerExample):
        examples = func.examples(arguments, argnums)
        if not examples.depend_on_parameters():
            raise examples.program.unused()
        return _products(examples.program, examples.gradients())[0].result(examples.n), None
    program = Program(func, arguments, argnums)
    loss, gradient = program.whole()
    single = _products(program, [(loss, gradient)])[0].result(1)
    if isinstance(func, SingleExample):
        return single, None
    slices = _leading_slices(program)
    if not isinstance(slices, Examples):
        return single, slices
    try:
        products, losses = _products(program, _guarded(slices))
    except _NotSliceableError as error:
        return single, str(error)
    tolerance = _tolerance([*program.parameters, loss])
    wide = losses.cpu().double()
    divisors = _divisors(loss.cpu(), wide.sum(), wide.abs().sum(), slices.n, tolerance)
    if len(divisors) > 1:  # the losses cancel
        divisors = _divisors(
            _flat(program, gradient)[0], *_gradient_sums(slices), slices.n, tolerance
        )
    if len(divisors) == 1:
        return products.result(divisors[0]), None
    relation = "both the mean and the sum" if divisors else "neither the mean nor the sum"
    return single, (
        f"func's value is {relation} of its values at the {slices.n} slices of size 1 along the "
        "leading dimension of the data"
    )


def _products(
    program: Program, parts: Iterable[tuple[Losses, Gradients]]
) -> tuple[FisherAccumulator, Losses]:
    """Return the summed outer products of the gradients, and all losses."""
    products = FisherAccumulator(program.size, program.device)
    losses = []
    for some, gradients in parts:
        losses.append(some)
        products.update(program.rows(gradients))
    return products, torch.cat(losses)


def _leading_slices(program: Program) -> Examples | str | None:
    """Return the n > 1 slices of size 1; None for one example; or why there are no slices.

    A tensor without dimensions is a constant, as a number is.
    """
    sizes = [
        (index, tensor.shape[0])
        for index, tensor in zip(program.data_arguments, program.data, strict=True)
        if tensor.ndim
    ]
    distinct = {size for _, size in sizes}
    if distinct == {0}:
        raise IFVPUsageError("the data tensors have a leading size of 0: there are no examples.")
    if max(distinct, default=1) <= 1:
        return None
    if len(distinct) > 1:
        listed = ", ".join(f"{size} in argument {index}" for index, size in sizes)
        return f"the data tensors do not share a leading size ({listed})"
    dims = [0 if tensor.ndim else None for tensor in program.data]
    return Examples(program, dims, distinct.pop(), keep_dims=True)


class _NotSliceableError(Exception):
    """A function raised on a slice; the message says how."""


def _guarded(slices: Examples) -> Iterator[tuple[Losses, Gradients]]:
    """Yield the gradients of slices that the function may not be meant for."""
    try:
        yield from slices.gradients()
    except Exception as error:  # whatever func raises
        raise _NotSliceableError(
            f"func cannot be evaluated at each of the {slices.n} slices of size 1 along the "
            f"leading dimension of the data ({type(error).__name__}: {error})"
        ) from error


def _divisors(whole: Tensor, total: Tensor, scale: Tensor, n: int, tolerance: float) -> list[int]:
    """Return n if the whole is the total over n, the mean; 1 if it is the total; or both.

    ``scale`` is the total of magnitudes, to which rounding errors are relative.
    """
    return [
        divisor
        for divisor in (n, 1)
        if (whole - total / divisor).norm() <= tolerance * (scale / divisor).norm()
    ]


def _gradient_sums(slices: Examples) -> tuple[Tensor, Tensor]:
    """Return the summed gradients of all slices, and the sum of their magnitudes."""
    program = slices.program
    dtype = accumulation_dtype(program.device)
    total = torch.zeros(program.size, dtype=dtype, device=program.device)
    scale = torch.zeros_like(total)
    for _, gradients in slices.gradients():
        rows = _flat(program, gradients)
        total += rows.sum(0)
        scale += rows.abs().sum(0)
    return total, scale


def _flat(program: Program, gradients: Gradients) -> Tensor:
    """Return gradients ``(m, *shape)`` as one ``(m, p)`` tensor in the accumulation dtype."""
    rows = program.rows(gradients)
    return rows.dense(slice(0, rows.n), accumulation_dtype(program.device))


def _tolerance(tensors: Iterable[Tensor]) -> float:
    """Return the relative error that a loss computed with these may have."""
    return math.sqrt(max(torch.finfo(tensor.dtype).eps for tensor in tensors))
