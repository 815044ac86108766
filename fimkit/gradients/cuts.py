"""Where the examples are in the tensors of a batch, and which tensors all of them share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from fimkit.exceptions import IFVPUsageError
from fimkit.gradients.tree import map_tensors, tensors

__all__ = ["Cut", "SharedTensors", "cut_out", "cuts", "fits"]

#: For each tensor of a batch and its labels the dimension that holds the examples, None where all
#: examples share it.
Cut = tuple[int | None, ...]

# Tensors as long as the batch that may be shared all the same, at a time.
_MOST_SHARED = 2


class SharedTensors:
    """What tells a tensor that all examples share from one that holds them.

    By one batch alone it cannot be told where both are as long. A tensor taken for shared is to
    be the same in every batch, and to be met again; targets that are broadcast against all outputs
    are not.
    """

    def __init__(self) -> None:
        self._known: dict[int, Tensor] = {}
        self._assumed: dict[int, Tensor] = {}

    def meet(self, leaves: Sequence[Tensor], n: int) -> None:
        """Compare a batch of n examples with those before.

        Raises
        ------
        IFVPUsageError
            If a tensor that was taken for shared is another one now.
        """
        for i, leaf in enumerate(leaves):
            if i in self._assumed and not _is_same(leaf, self._assumed[i]):
                raise _mixing(f"of shape {tuple(leaf.shape)} is another one in every batch")
            met_again = i in self._assumed and bool((leaf != leaf[:1]).any())
            if met_again or (leaf.ndim and not _may_hold(leaf, n)):
                self._known.setdefault(i, leaf)
                self._assumed.pop(i, None)

    def known(self, leaves: Sequence[Tensor], n: int) -> set[int]:
        """Return which tensors as long as the batch are the same as in other batches."""
        return {
            i
            for i, shared in self._known.items()
            if i < len(leaves) and _may_hold(leaves[i], n) and _is_same(leaves[i], shared)
        }

    def assume(self, cut: Cut, leaves: Sequence[Tensor], n: int) -> None:
        """Take what a cut leaves whole, and might have cut, for shared."""
        known = self.known(leaves, n)
        for i, (dim, leaf) in enumerate(zip(cut, leaves, strict=False)):
            if dim is None and i not in known and _may_hold(leaf, n):
                self._assumed.setdefault(i, leaf.clone())

    def refuse_assumed(self) -> None:
        """Raise if what was taken for shared was met only once, or is one number over and over.

        Raises
        ------
        IFVPUsageError
            By the tensor's shape.
        """
        for tensor in self._assumed.values():
            raise _mixing(f"of shape {tuple(tensor.shape)} is as long as the batch")


def _mixing(what: str) -> IFVPUsageError:
    return IFVPUsageError(
        f"each example's loss depends on the whole of a tensor, which {what}, so that it seems to "
        "hold the examples: outputs (B, 1) broadcast against targets (B,), for instance. Remove "
        "the dependence, or, if it is truly shared by all examples, let the model hold it, or give "
        "another batch size."
    )


def cuts(batch: Sequence[Tensor], labels: Sequence[Tensor], n: int, shared: set[int]) -> list[Cut]:
    """Return the ways in which examples may lie in a batch's tensors, the likeliest first.

    Parameters
    ----------
    batch, labels : sequence of Tensor
        Labels always hold the examples.
    n : int
        Number of examples.
    shared : set of int
        Which of the batch's are known not to, being as long as the batch.
    """
    leaves = (*batch, *labels)
    options = [
        [] if i in shared else [dim for dim in (0, 1) if _holds(leaf, dim, n)]
        for i, leaf in enumerate(leaves)
    ]
    doubtful = [i for i in range(len(batch)) if options[i]]
    found = []
    for end in (0, -1):
        cut = [dims[end] if dims else None for dims in options]
        for count in range(_MOST_SHARED + 1):
            for whole in combinations(doubtful, count):
                found.append(tuple(None if i in whole else dim for i, dim in enumerate(cut)))
    return list(dict.fromkeys(found))


def cut_out(part: slice, cut: Cut, batch: Any, labels: list[Any], n: int) -> tuple[Any, list[Any]]:
    """Return what a batch of n and its labels hold of some examples, and all that examples share.

    Of lists of n things without tensors, such as texts, those of the examples.
    """
    dims = iter(cut)

    def of_tensor(tensor: Tensor) -> Tensor:
        dim = next(dims)
        return tensor if dim is None else tensor.narrow(dim, part.start, part.stop - part.start)

    return map_tensors(of_tensor, _cut_lists(part, batch, n)), map_tensors(of_tensor, labels)


def _cut_lists(part: slice, batch: Any, n: int) -> Any:
    if isinstance(batch, dict):
        return {key: _cut_lists(part, value, n) for key, value in batch.items()}
    if type(batch) not in (list, tuple):
        return batch
    if len(batch) == n and not tensors(batch):
        return batch[part]
    return type(batch)(_cut_lists(part, value, n) for value in batch)


def fits(cut: Cut, leaves: Sequence[Tensor], n: int) -> bool:
    """Whether a cut, perhaps of another batch, can take n examples out of these tensors."""
    return len(cut) == len(leaves) and all(
        dim is None or _holds(leaf, dim, n) for leaf, dim in zip(leaves, cut, strict=True)
    )


def _holds(tensor: Tensor, dim: int, n: int) -> bool:
    """Whether a dimension is as long as the batch, and can be cut."""
    return tensor.layout == torch.strided and tensor.ndim > dim and tensor.shape[dim] == n


def _may_hold(tensor: Tensor, n: int) -> bool:
    return _holds(tensor, 0, n) or _holds(tensor, 1, n)


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether tensors have the same numbers, up to rounding."""
    if one is other:
        return True
    if one.shape != other.shape or one.dtype != other.dtype or one.layout != other.layout:
        return False
    if one.layout != torch.strided:  # which never hold examples
        return True
    if one.is_floating_point():
        return torch.allclose(one, other, rtol=1e-4, equal_nan=True)
    return torch.equal(one, other)
