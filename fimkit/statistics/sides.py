"""Means of outer products, and products with bases, for tensors of per-example positions.

Tensors here are ``(groups, n, T, m)``: T positions of n examples. A convolution's lie in memory
with positions fastest, and stay so: a product per example takes them as they are, where one product
over all positions would have to transpose them first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fimkit.distributed import Ranks
from fimkit.operators.symmetric import add_products, mirror_

__all__ = ["Gathered", "Side", "rotate"]

# Rows that make a product fast: with fewer, reading and writing the sum takes as long.
_ENOUGH = 512


class Gathered:
    """Rows of small batches, held until they are enough for a fast product."""

    def __init__(self) -> None:
        self._held: list[tuple[Tensor, ...]] = []

    def add(self, *tensors: Tensor) -> tuple[Tensor, ...] | None:
        """Hold tensors with examples along their first dimension; return what is to be added up.

        That is all that is held, once it is enough, or where it cannot be joined with the tensors:
        rows per example may be others in every batch.
        """
        ready = None if self._held and _shapes(self._held[0]) == _shapes(tensors) else self.take()
        self._held.append(tensors)
        if ready is None and sum(len(first) for first, *_ in self._held) >= _ENOUGH:
            ready = self.take()
        return ready

    def state_dict(self) -> dict[str, Any]:
        """Return what is held."""
        return {"held": self._held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hold what was held before."""
        self._held = state["held"]

    def take(self) -> tuple[Tensor, ...] | None:
        """Return what is held, joined; None if nothing is."""
        held, self._held = self._held, []
        if len(held) > 1:
            return tuple(map(torch.cat, zip(*held, strict=True)))
        return held[0] if held else None


class Side:
    """The mean of outer products on one side of a layer, or only its diagonal.

    Parameters
    ----------
    groups, size : int
    like : Tensor
        Dtype and device.
    diagonal : bool
        Whether only the diagonal is kept, so that the eigenbasis is the identity.
    """

    def __init__(self, groups: int, size: int, like: Tensor, *, diagonal: bool) -> None:
        self.diagonal = diagonal
        self._counted = False
        self._few = Gathered()
        # Of a whole matrix only what is on and above the diagonal is kept up to date.
        self._sum = like.new_zeros((groups, size) if diagonal else (groups, size, size))
        self._count = like.new_zeros((), dtype=torch.float64 if like.device.type != "mps" else None)

    def count(self, number: Tensor | int) -> None:
        """Count positions: the mean is then over them, else over all examples."""
        self._counted = True
        self._count += number

    def add(self, vectors: Tensor) -> None:
        """Add the outer products of ``(groups, n, T, size)`` vectors."""
        if self.diagonal:
            self._sum += vectors.square().sum((1, 2))
        elif vectors.shape[2] > 1:
            self._add_products(vectors)
        else:
            self._add_few(self._few.add(vectors[:, :, 0].transpose(0, 1)))

    def _add_few(self, rows: tuple[Tensor, ...] | None) -> None:
        if rows is not None:
            self._add_products(rows[0].transpose(0, 1)[:, :, None])

    def _add_products(self, vectors: Tensor) -> None:
        if len(vectors) > 1:
            flat = vectors.flatten(1, 2)
            self._sum.baddbmm_(flat.mT, flat)
        else:
            per_example = _positions_fastest(vectors) and vectors.device.type == "cpu"
            flat = vectors[0] if per_example else vectors[0].flatten(0, 1)[None]
            add_products(self._sum[0], flat, flat)

    def add_units(self, indices: Tensor, weights: Tensor) -> None:
        """Add the outer products of weighted unit vectors, to a diagonal."""
        self._sum[0].index_add_(0, indices, weights)

    def reduce(self, ranks: Ranks) -> None:
        """Add what the other ranks accumulated."""
        self._add_few(self._few.take())
        self._counted = any(ranks.gather(self._counted))
        ranks.add_up(self._sum, self._count)

    def state_dict(self) -> dict[str, Any]:
        """Return what has been accumulated."""
        return {
            "counted": self._counted,
            "sum": self._sum,
            "count": self._count,
            "few": self._few.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what was accumulated before."""
        self._counted, self._sum, self._count = state["counted"], state["sum"], state["count"]
        self._few.load_state_dict(state["few"])

    def finish(self, n: int) -> Tensor:
        """Turn the sum into the mean over the positions counted, or over n examples.

        The side ends with that: the tensor returned is the caller's, to overwrite.
        """
        self._add_few(self._few.take())
        mean = self._sum.div_(self._count.clamp(min=1).to(self._sum.dtype) if self._counted else n)
        return mean if self.diagonal else mirror_(mean)


def _shapes(tensors: tuple[Tensor, ...]) -> list[torch.Size]:
    return [tensor.shape[1:] for tensor in tensors]


def rotate(vectors: Tensor, basis: Tensor | None) -> Tensor:
    """Multiply ``(groups, n, T, m)`` vectors by ``(groups, m, m)`` bases, into a new tensor."""
    if basis is None:
        return vectors.clone()
    if len(basis) > 1:
        return (vectors.flatten(1, 2) @ basis).view(vectors.shape)
    if _positions_fastest(vectors):
        bases = basis[0].T.expand(vectors.shape[1], -1, -1)
        return torch.bmm(bases, vectors[0].mT).mT[None]
    return (vectors[0].flatten(0, 1) @ basis[0]).view(vectors.shape)


def _positions_fastest(vectors: Tensor) -> bool:
    return vectors.shape[2] > 1 and vectors.stride(2) == 1 and vectors.stride(3) != 1
