"""Chunk sizes that keep temporaries within one memory budget, and the accumulation precision."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from contextlib import suppress

import torch

__all__ = [
    "BUDGET",
    "accumulation_dtype",
    "chunks",
    "float32_is_exact",
    "return_free_memory",
    "reused",
    "working_set",
]

#: Bytes that the temporaries of one chunk may take.
BUDGET = 64 * 2**20

#: Bytes that a CPU's caches hold, and its allocator hands out again without fetching new pages.
WORKING_SET = 8 * 2**20


def chunks(n: int, bytes_each: int, *, budget: int | None = None) -> Iterator[slice]:
    """Cut ``range(n)`` into slices whose items, at ``bytes_each`` bytes, fit the budget.

    Parameters
    ----------
    n : int
        Number of items.
    bytes_each : int
        Bytes of temporaries that one item needs.
    budget : int, optional
        Bytes that one slice may take; `BUDGET` when not given.

    Yields
    ------
    slice
        Consecutive slices of at least one item each, whose sizes differ by one at most.
    """
    most = max(1, (BUDGET if budget is None else budget) // max(1, bytes_each))
    number = math.ceil(n / most)
    for i in range(number):
        yield slice(i * n // number, (i + 1) * n // number)


def working_set(device: torch.device) -> int:
    """Return the bytes of temporaries that are best worked on at a time on a device."""
    return WORKING_SET if device.type == "cpu" else BUDGET


def reused() -> int:
    """Return the bytes of a tensor up to which allocators reuse memory instead of fetching pages.

    The C library's does for up to 32 MiB.
    """
    return BUDGET // 2


def return_free_memory() -> None:
    """Give the system back what the C library holds of freed memory.

    It keeps what lies between memory in use, which after a stage of other sizes is much, and which
    the next stage may not find use for.
    """
    with suppress(AttributeError, OSError, TypeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on a device that has no float64 (MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


def float32_is_exact(device: torch.device | None = None) -> bool:
    """Return whether products of float32 matrices have float32's precision.

    PyTorch may be told to take TF32 or bfloat16 for them, or, on a device, to cast automatically.
    """
    try:
        highest = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # each backend has been told something of its own
        return False
    return highest and not (device is not None and torch.is_autocast_enabled(device.type))
