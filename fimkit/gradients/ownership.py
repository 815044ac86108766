"""What is kept of a forward pass while others go on writing to memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["owned", "version"]

# How many tensors, and objects that stand for it in Python, have a storage. CPU builds of older
# releases do not tell.
_holders: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)


def owned(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors that nobody else can write to: those given, or copies of them.

    Copied is what another tensor has the memory of: a model's that works in memory of its own, a
    batch's, or one that a loader fills again. So is memory that is not torch's own, such as an
    array's, and what would keep much more memory than its own numbers take. Where torch does not
    tell who has memory, all is copied.

    Parameters
    ----------
    tensors : sequence of Tensor
        No views, as of those the viewed tensor remains. Asked of when the graph is gone, in which
        tensors were saved.
    """
    storages = [tensor.untyped_storage() for tensor in tensors]
    ours = Counter(storage._cdata for storage in storages)
    out = []
    for tensor, storage in zip(tensors, storages, strict=True):
        others = _holders is None or _holders(storage._cdata) > ours[storage._cdata] + 1
        held = others or not storage.resizable()
        out.append(tensor.clone() if held or storage.nbytes() > 2 * tensor.nbytes else tensor)
    return out


def version(tensor: Tensor) -> int:
    """Return how often a tensor was written to, as far as torch sees it."""
    return 0 if tensor.is_inference() else tensor._version
