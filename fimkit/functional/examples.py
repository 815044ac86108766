"""What of a function's arguments is one example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.func import vmap

from fimkit.exceptions import IFVPUsageError
from fimkit.functional.checks import check_callable
from fimkit.functional.program import Examples, Program

__all__ = ["PerExample", "SingleExample", "per_example", "single_example"]


@dataclass(frozen=True)
class PerExample:
    """The mean of a loss over slices of its arguments; made by `per_example`."""

    func: Callable[..., Any]
    in_dims: tuple[int | None, ...]

    def __call__(self, *arguments: Any) -> Tensor:
        """Return the mean loss."""
        losses: Tensor = vmap(self.func, in_dims=self.in_dims, randomness="different")(*arguments)
        return losses.mean()

    def examples(self, arguments: Any, argnums: int | tuple[int, ...]) -> Examples:
        """Return the slices of given arguments along ``in_dims``."""
        if len(self.in_dims) != len(arguments):
            raise IFVPUsageError(
                f"in_dims has {len(self.in_dims)} entries, {self.in_dims}, but func was given "
                f"{len(arguments)} argument(s); give one entry per argument, None where the "
                "argument is the same for every example."
            )
        program = Program(self.func, arguments, argnums)
        for index in program.selected:
            if self.in_dims[index] is not None:
                raise IFVPUsageError(
                    f"in_dims is {self.in_dims}, which slices argument {index}, but argnums "
                    "selects that argument as parameters, which all examples share; its entry "
                    "must be None."
                )
        dims = [self.in_dims[index] for index in program.data_arguments]
        sizes = [
            (index, _size(tensor, dim, index))
            for tensor, dim, index in zip(program.data, dims, program.data_arguments, strict=True)
            if dim is not None
        ]
        if len({size for _, size in sizes}) != 1:
            found = ", ".join(f"{size} in argument {index}" for index, size in sizes)
            raise IFVPUsageError(
                f"in_dims is {self.in_dims}, along which there are {found or 'no tensors'}; "
                "expected the same number of examples in every sliced tensor."
            )
        n = sizes[0][1]
        if not n:
            raise IFVPUsageError(f"there are no examples along in_dims={self.in_dims}.")
        return Examples(program, dims, n, keep_dims=False)


@dataclass(frozen=True)
class SingleExample:
    """A loss of one example, whatever the sizes of its arguments; made by `single_example`."""

    func: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        """Return the loss."""
        return self.func(*arguments)


def per_example(func: Callable[..., Any], in_dims: tuple[int | None, ...]) -> PerExample:
    """Say that ``func`` is the loss of one example, and where the examples lie.

    In the functions of `fimkit.functional`, F is then the mean over the examples of the outer
    products of their gradients, and nothing is inferred from values of ``func``.

    Parameters
    ----------
    func : callable
        Loss of one example, of shape ``()`` or ``(1,)``. It is called on one slice of each
        sliced argument at a time, with the sliced dimension removed, as under `torch.func.vmap`.
    in_dims : tuple of (int or None)
        For each argument of ``func``, the dimension that holds the examples in each of its
        tensors, or None where every example is given the whole argument: its parameters, for one.

    Returns
    -------
    PerExample
        To be given as ``func`` to `ifvp_explicit` or `ifvp_at_x_explicit`. Called on arguments,
        it returns the mean loss over the examples.

    Raises
    ------
    IFVPUsageError
        If ``in_dims`` is not a tuple of integers and None, or slices nothing. Where it does not
        fit the arguments, the error comes when these are known.

    Examples
    --------
    >>> import torch
    >>> from fimkit.functional import ifvp_at_x_explicit, per_example
    >>> def loss(weight, x, y):
    ...     return 0.5 * (x @ weight - y) ** 2
    >>> weight, x, y = torch.zeros(2), torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.ones(2)
    >>> ifvp = ifvp_at_x_explicit(per_example(loss, (None, 0, 0)), weight, x, y)
    >>> ifvp(torch.ones(2))  # F = diag(1, 4) / 2
    tensor([2.0000, 0.5000])
    """
    check_callable(func)
    entries = in_dims if isinstance(in_dims, tuple | list) else ()
    if not all(dim is None or isinstance(dim, int) for dim in entries) or all(
        dim is None for dim in entries
    ):
        raise IFVPUsageError(
            f"in_dims is {in_dims!r}; expected a tuple with the dimension of the examples, or "
            "None, for each argument of func, and a dimension for at least one: (None, 0, 0) for "
            "parameters, inputs and labels."
        )
    return PerExample(func, tuple(entries))


def single_example(func: Callable[..., Any]) -> SingleExample:
    """Say that all arguments of ``func`` together are one example.

    In the functions of `fimkit.functional`, F is then g gᵀ with g the gradient of ``func``,
    without a warning, whatever sizes the arguments have.

    Parameters
    ----------
    func : callable
        Loss of the example, of shape ``()`` or ``(1,)``.

    Returns
    -------
    SingleExample
        To be given as ``func`` to `ifvp_explicit` or `ifvp_at_x_explicit`. It can be called as
        ``func`` can.

    Examples
    --------
    >>> import torch
    >>> from fimkit.functional import ifvp_explicit, single_example
    >>> def loss(weight, signal):  # the samples of one signal, not examples
    ...     return (weight * signal).sum() ** 2 / 2
    >>> weight, signal = torch.ones(2), torch.tensor([0.5, 0.5])
    >>> ifvp = ifvp_explicit(single_example(loss), regularization=0.5)
    >>> ifvp((weight, signal), torch.ones(2))  # F is 1/4 everywhere
    tensor([1., 1.])
    """
    check_callable(func)
    return SingleExample(func)


def _size(tensor: Tensor, dim: int, index: int) -> int:
    if not -tensor.ndim <= dim < tensor.ndim:
        raise IFVPUsageError(
            f"in_dims slices argument {index} along dimension {dim}, but that holds a tensor of "
            f"shape {tuple(tensor.shape)}; give a dimension that all its tensors have, or None."
        )
    return tensor.shape[dim]
