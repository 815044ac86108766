"""One number for the values of a tensor, computed where it is."""

from __future__ import annotations

import torch
from torch import Tensor

from fimkit.operators.memory import chunks

__all__ = ["checksum"]

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Tensor) -> str:
    """Return a number, in hexadecimal, that is another for other values or another order of them.

    The bits are summed as integers, weighted by their places: exact, so that neither device nor
    threads change it. Values that differ by rounding differ.
    """
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    bits = tensor.contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    total = 0
    for part in chunks(len(bits), 16):
        places = torch.arange(part.start, part.stop, device=bits.device)
        total += int((bits[part].long() * (2 * places + 1)).sum())
    return f"{total % 2**64:016x}"
