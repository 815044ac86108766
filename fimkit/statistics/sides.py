"""Means of outer products, and products with bases, for tensors of per-example positions.

Tensors here are ``(groups, n, T, m)``: T positions of n examples. A convolution's lie in memory
with positions fastest, and stay so.

Their last column may come apart, ``(groups, n, T, 1)``: a bias's ones, which are then not copied
beside the inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fimkit.distributed import Ranks
from fimkit.operators.symmetric import add_products

__all__ = ["Gathered", "Side", "rotate"]

# Rows that make a product fast: with fewer, reading and writing the sum takes as long.
_ENOUGH = 256


class Gathered:
    """Rows of small batches, copied together until they are enough for a fast product.

    What is to be added up are lists of tensors that belong together, with examples along their
    first dimension.

    Parameters
    ----------
    enough : int
        Of examples.
    """

    def __init__(self, enough: int) -> None:
        self._enough = enough
        self._buffers: tuple[Tensor, ...] = ()
        self._held = 0

    def add(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """Hold a copy of tensors, and return what is to be added up.

        That is all that is held, once it is enough, or where the tensors cannot be joined with it:
        rows per example may be others in every batch. Tensors that are enough are not copied.
        """
        n = len(tensors[0])
        if n >= self._enough:
            return [tensors]
        ready = []
        if [t.shape[1:] for t in tensors] != [buffer.shape[1:] for buffer in self._buffers]:
            ready = self.take()
            self._buffers = tuple(t.new_empty((2 * self._enough, *t.shape[1:])) for t in tensors)
        for buffer, tensor in zip(self._buffers, tensors, strict=True):
            buffer[self._held : self._held + n] = tensor
        self._held += n
        if self._held >= self._enough:
            ready += self.take()
        return ready

    def take(self) -> list[tuple[Tensor, ...]]:
        """Return what is held, which ends with that."""
        ready = [self._rows()] if self._held else []
        self._buffers, self._held = (), 0
        return ready

    def state_dict(self) -> dict[str, Any]:
        """Return what is held."""
        return {"held": self._rows()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hold what was held before."""
        self.take()
        if state["held"]:
            self.add(*state["held"])

    def _rows(self) -> tuple[Tensor, ...]:
        return tuple(buffer[: self._held] for buffer in self._buffers)


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
        self._few = Gathered(_ENOUGH)
        # Of a whole matrix only what is on and above the diagonal is kept up to date.
        self._sum = like.new_zeros((groups, size) if diagonal else (groups, size, size))
        self._count = like.new_zeros((), dtype=torch.float64 if like.device.type != "mps" else None)

    def count(self, number: Tensor | int) -> None:
        """Count positions: the mean is then over them, else over all examples."""
        self._counted = True
        self._count += number

    def add(self, *vectors: Tensor) -> None:
        """Add the outer products of ``(groups, n, T, size)`` vectors, also with the last apart."""
        if self.diagonal:
            self._sum += torch.cat([columns.square().sum((1, 2)) for columns in vectors], 1)
        elif vectors[0].shape[2] > 1:
            self._add_products(*vectors)
        else:
            self._add_few(self._few.add(*(columns[:, :, 0].transpose(0, 1) for columns in vectors)))

    def _add_few(self, ready: list[tuple[Tensor, ...]]) -> None:
        for rows in ready:
            self._add_products(*(columns.transpose(0, 1)[:, :, None] for columns in rows))

    def _add_products(self, vectors: Tensor, *last: Tensor) -> None:
        size, flat = vectors.shape[3], _flat(vectors)
        total = self._sum[:, :size, :size]
        if len(vectors) > 1:
            total.baddbmm_(flat.mT, flat)
        else:
            add_products(total[0], flat, flat)
        for column in last:
            # Several times faster than the transpose of this product.
            border = column.flatten(1, 2).mT @ flat
            self._sum[:, :size, size:] += border.mT
            self._sum[:, size:, size:] += column.square().sum((1, 2))[:, :, None]

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

        The side ends with that: the tensor returned is the caller's, to overwrite. Below the
        diagonal of a matrix it is not to be read.
        """
        self._add_few(self._few.take())
        return self._sum.div_(self._count.clamp(min=1).to(self._sum.dtype) if self._counted else n)


def rotate(basis: Tensor | None, vectors: Tensor, *last: Tensor) -> Tensor:
    """Multiply ``(groups, n, T, m)`` vectors by ``(groups, m, m)`` bases, into a new tensor.

    Parameters
    ----------
    basis : Tensor, or None
        None for the identity.
    vectors, last : Tensor
        The last column apart or not.
    """
    if basis is None:
        return torch.cat((vectors, *last), 3)
    rows, flat = basis[:, : vectors.shape[3]], _flat(vectors)
    if _positions_fastest(vectors):
        turned = (rows.mT @ flat.mT).view(len(rows), -1, *vectors.shape[1:3])
        rotated = turned.permute(0, 2, 3, 1)
    else:
        rotated = (flat @ rows).view(len(rows), *vectors.shape[1:3], -1)
    for column in last:
        rotated.addcmul_(column, basis[:, None, -1:])
    return rotated


def _flat(vectors: Tensor) -> Tensor:
    """Return ``(groups, n * T, m)`` vectors in the order of their memory, copied only if need be.

    A product of all examples' positions is faster than one of each example's by more than a copy.
    """
    if _positions_fastest(vectors):
        return vectors.permute(0, 3, 1, 2).flatten(2).mT
    return vectors.flatten(1, 2)


def _positions_fastest(vectors: Tensor) -> bool:
    return vectors.shape[2] > 1 and vectors.stride(2) == 1 and vectors.stride(3) != 1
