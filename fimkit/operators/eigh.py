"""Symmetric eigendecompositions in float64, those of different matrices side by side.

On CPU they are made in as little memory as LAPACK takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from threading import Lock

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from fimkit.distributed import Ranks
from fimkit.exceptions import IFVPUsageError
from fimkit.operators.lapack import LARGEST, eigh_in_place
from fimkit.operators.memory import accumulation_dtype, return_free_memory

__all__ = ["eigh", "eigh_all"]

# Smaller matrices are decomposed by NumPy, many at a time; so are those that LAPACK's 32-bit
# integers cannot count.
_SMALLEST = 64

# Entries of eigenvectors up to this are made zero, far below their rounding: numbers so small are
# slow to multiply by, and so are their squares.
_NOTHING = 1e-18

_controller = cache(ThreadpoolController)
_one_at_a_time = Lock()  # the number of threads is the whole process's


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigendecompose positive semi-definite matrices, in float64 where the device has it.

    Parameters
    ----------
    matrix : Tensor of shape (..., m, m)
        Symmetric; only its upper triangle is read.

    Returns
    -------
    eigenvalues : Tensor of shape (..., m)
        Ascending, none negative.
    eigenvectors : Tensor of shape (..., m, m)
        In columns.
    """
    if matrix.device.type == "cpu":
        wide = matrix.detach().to(torch.float64, copy=True, memory_format=torch.contiguous_format)
        with _threads(torch.get_num_threads()):
            return _overwrite(wide), wide
    wide = matrix.to(accumulation_dtype(matrix.device))
    try:
        eigenvalues, vectors = torch.linalg.eigh(wide, UPLO="U")
    except RuntimeError:
        eigenvalues, vectors = (part.to(wide) for part in eigh(wide.cpu()))
    return eigenvalues.clamp_(min=0), vectors


def eigh_all(matrices: Mapping[str, Tensor], ranks: Ranks) -> dict[str, tuple[Tensor, Tensor]]:
    """Eigendecompose named matrices, each on one of the ranks.

    On CPU each is on a thread of its own, the largest first.

    Parameters
    ----------
    matrices : mapping of str to Tensor of shape (..., m, m)
        The same on all ranks. Overwritten by their eigenvectors, so that these take no memory of
        their own.
    ranks : Ranks

    Returns
    -------
    dict of str to (eigenvalues, eigenvectors)
        As `eigh` returns them, in the dtypes given; bit by bit the same on all ranks.

    Raises
    ------
    IFVPUsageError
        If a matrix is not finite, by its name.
    """
    given = {name: matrix for name, matrix in matrices.items() if matrix.numel()}
    device = next((matrix.device for matrix in given.values()), None)
    extremes = [torch.stack(matrix.aminmax()).to(device) for matrix in given.values()]  # or NaN
    finite = torch.stack(extremes).isfinite().all(1).tolist() if extremes else []
    for (name, matrix), is_finite in zip(given.items(), finite, strict=True):
        if not is_finite:
            raise IFVPUsageError(
                f"a Kronecker factor of {name!r} is not finite: its inputs or gradients overflow "
                f"{matrix.dtype}; fit with dtype=torch.float64, or scale the inputs."
            )
    owners = ranks.divide([m.numel() * m.shape[-1] for m in matrices.values()])
    with ranks.together():
        own = {
            name: matrix
            for (name, matrix), owner in zip(matrices.items(), owners, strict=True)
            if owner == ranks.rank
        }
        solved = _side_by_side(own)
    out = {}
    for (name, matrix), owner in zip(matrices.items(), owners, strict=True):
        eigenvalues, vectors = solved.get(name) or (matrix.new_empty(matrix.shape[:-1]), matrix)
        ranks.broadcast(eigenvalues, owner)
        ranks.broadcast(vectors, owner)
        out[name] = eigenvalues, vectors
    return out


def _side_by_side(matrices: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Eigendecompose matrices, on CPU each on one thread, and overwrite them."""
    solved: dict[str, tuple[Tensor, Tensor]] = {}

    def solve(name: str, overwrite: Callable[[Tensor], Tensor]) -> None:
        matrix = matrices[name]
        eigenvalues = overwrite(matrix)
        torch.hardshrink(matrix, _NOTHING, out=matrix)
        solved[name] = eigenvalues.to(matrix.dtype), matrix

    if any(matrix.device.type != "cpu" for matrix in matrices.values()):
        for name in matrices:
            solve(name, _replace)
        return solved
    waiting = iter(sorted(matrices, key=lambda name: -matrices[name].shape[-1]))

    def work() -> None:
        for name in waiting:
            solve(name, _overwrite)

    return_free_memory()
    # This thread works as well: what the allocator keeps of another one's memory, it cannot reuse.
    threads = torch.get_num_threads()
    others = min(threads, len(matrices)) - 1
    try:
        torch.set_num_threads(1)
        with (
            _threads(1),
            ThreadPoolExecutor(
                max(1, others), initializer=torch.set_num_threads, initargs=(1,)
            ) as executor,
        ):
            working = [executor.submit(work) for _ in range(others)]
            work()
            for worker in working:
                worker.result()
    finally:
        torch.set_num_threads(threads)
    return_free_memory()
    return solved


def _replace(matrix: Tensor) -> Tensor:
    """Overwrite matrices on any device, their eigenvectors made apart, and return eigenvalues."""
    eigenvalues, vectors = eigh(matrix)
    matrix.copy_(vectors)
    return eigenvalues


def _overwrite(matrix: Tensor) -> Tensor:
    """Overwrite matrices on CPU by their eigenvectors, in columns, and return eigenvalues."""
    m = matrix.shape[-1]
    if _SMALLEST <= m <= LARGEST:
        eigenvalues = matrix.new_empty(matrix.shape[:-1], dtype=torch.float64)
        for index in np.ndindex(matrix.shape[:-2]):
            eigenvalues[index] = torch.from_numpy(eigh_in_place(matrix[index].numpy()))
    else:
        eigenvalues, vectors = map(
            torch.from_numpy, np.linalg.eigh(matrix.double().numpy(), UPLO="U")
        )
        matrix.copy_(vectors)
    return eigenvalues.clamp_(min=0)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Let NumPy's and SciPy's linear algebra use this many threads."""
    with _one_at_a_time, _controller().limit(limits=number, user_api="blas"):
        yield
