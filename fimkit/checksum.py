"""One number for the values of a tensor, computed where it is, and for whatever holds tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Set
from functools import partial
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fimkit.operators.memory import chunks

__all__ = ["checksum", "digest", "shown"]

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Tensor) -> str:
    """Return a number, in hexadecimal, that is another for other values or another order of them.

    The bits are summed as integers, weighted by their places: exact, so that neither device nor
    threads change it. Values that differ by rounding differ. Of a sparse tensor the indices count,
    too.
    """
    tensor = tensor.detach()
    if tensor.layout != torch.strided:
        sparse = tensor.to_sparse().coalesce()
        return checksum(sparse.indices()) + checksum(sparse.values())
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    bits = tensor.contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    total = 0
    for part in chunks(len(bits), 16):
        places = torch.arange(part.start, part.stop, device=bits.device)
        total += int((bits[part].long() * (2 * places + 1)).sum())
    return f"{total % 2**64:016x}"


def digest(value: Any) -> str:
    """Return a number, in hexadecimal, for all that a value holds, in this process as in others.

    Tensors and arrays by their values, numbers and texts as they are, containers and objects by
    what is in them, functions by their names, and what shows nothing of itself by its type.
    """
    whole = blake2b(digest_size=8)
    for part in _parts(value, set()):
        whole.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return whole.hexdigest()


def shown(value: Any) -> str:
    """Return what a value shows of itself, without the addresses that differ between processes."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(value))


def _parts(value: Any, inside: set[int]) -> Iterator[str]:
    """Yield texts that together are other ones for another value."""
    if id(value) in inside:
        yield "itself"
        return
    inside = inside | {id(value)}
    yield type(value).__qualname__
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)} {checksum(value)}"
    elif isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        yield f"{value.dtype.str} {value.shape} {blake2b(value.tobytes()).hexdigest()}"
    elif isinstance(value, np.ndarray):
        yield from _parts(value.tolist(), inside)
    elif isinstance(value, Mapping):
        yield from _parts(list(value.items()), inside)
    elif isinstance(value, list | tuple):
        yield str(len(value))
        for item in value:
            yield from _parts(item, inside)
    elif isinstance(value, Set):
        yield from sorted(digest(item) for item in value)
    elif isinstance(value, partial):
        yield from _parts([value.func, value.args, value.keywords], inside)
    elif hasattr(value, "__array_interface__"):  # as images have
        yield from _parts(np.asarray(value), inside)
    elif hasattr(value, "__qualname__"):
        yield value.__qualname__
    else:
        state = _state(value)
        yield from _parts(state, inside) if state else [shown(repr(value))]


def _state(value: Any) -> dict[str, Any]:
    """Return an object's attributes, those in slots included."""
    slots = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())]
    found = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return found | getattr(value, "__dict__", {})
