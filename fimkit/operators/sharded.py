"""The matrix of per-example gradients whose rows stay on the ranks that computed them.

What is as long as there are rows (inner products, norms, weights) every rank gets whole; what has
the width of the rows is summed over ranks. The Gram matrix is computed block by block: each rank in
turn shows its rows to the others, one chunk at a time, so that no rank holds more of them than its
own and a chunk, and each pair of ranks' block is computed by one of the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NoReturn

import torch
from torch import Tensor

from fimkit.distributed import Ranks
from fimkit.exceptions import IFVPUsageError
from fimkit.operators.memory import chunks
from fimkit.operators.row_matrix import Columns, RowMatrix
from fimkit.operators.rows import Rows, ZeroRows

__all__ = ["ShardedRowMatrix"]

# Relative difference up to which ranks' vectors count as the same: that of devices' rounding. It is
# small, since the inverse may magnify it.
_TOLERANCE = 1e-9
_COARSE_TOLERANCE = 1e-5


class ShardedRowMatrix(RowMatrix):
    """The rows of all ranks, in their order. Every operation is called by all ranks together.

    Vectors and coefficients that are given must be the same on all ranks; results are.

    Parameters
    ----------
    own : RowMatrix
        The rows of this rank.
    ranks : Ranks
    """

    def __init__(self, own: RowMatrix, ranks: Ranks) -> None:
        shapes = ranks.gather((own.n, own.c, own.weights is not None))
        self._ranks = ranks
        self._counts = [n for n, _, _ in shapes]
        self.n, self.c = sum(self._counts), max(c for _, c, _ in shapes)
        self.size = own.size
        self._own = _with_rows(own, self.c)
        first = sum(self._counts[: ranks.rank])
        self._examples = slice(first, first + own.n)
        self._part = slice(first * self.c, (first + own.n) * self.c)
        self.weights: Tensor | None = None
        if any(weighted for _, _, weighted in shapes):
            assert self._own.weights is not None
            self.weights = self._whole(self._own.weights.double(), self._examples, 0, self.n)

    def __reduce__(self) -> NoReturn:
        raise IFVPUsageError(
            f"the rows of this fit are divided over {self._ranks.size} processes, so it can be "
            "neither pickled nor copied; call save(path) on all ranks, and load the file."
        )

    @property
    def dtypes(self) -> set[torch.dtype]:
        """What rows are stored in, on this rank as on the others."""
        return self._own.dtypes

    def gram(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Inner products of all pairs of unweighted rows, shape ``(n * c, n * c)``."""
        gram = torch.zeros((self.n * self.c,) * 2, dtype=dtype, device=device)
        gram[self._part, self._part] = self._own.gram(dtype, device)
        rank, size = self._ranks.rank, self._ranks.size
        for source in range(size):
            distance = (source - rank) % size
            # Of two ranks just across from each other, the lower one computes their block.
            mine = 0 < distance < size / 2 or (distance * 2 == size and rank < source)
            for part, shown in self._shown(source):
                if mine:
                    place = slice(part.start * self.c, part.stop * self.c)
                    block = self._own.products(shown, dtype, device)
                    gram[self._part, place] = block
                    gram[place, self._part] = block.T
        self._ranks.add_up(gram)
        return gram

    def products(self, other: RowMatrix, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Inner products with rows that all ranks have, shape ``(n * c, n' * c')``."""
        shadows = other.project(_probe(slice(0, other.size), device)[None], torch.float64)[0]
        coarse = any(stored != torch.float64 for stored in other.dtypes)
        self._check_same(shadows, other.squared_norms(dtype).sqrt(), coarse)
        products = self._own.products(other, dtype, device)
        return self._whole(products, self._part, 0, self.n * self.c)

    def project(self, vectors: Tensor, dtype: torch.dtype) -> Tensor:
        """Inner products of ``(k, p)`` vectors with every row, shape ``(k, n * c)``."""
        coarse = vectors.dtype != torch.float64
        self._check_same(_shadows(vectors), torch.linalg.vector_norm(vectors, dim=1), coarse)
        return self._whole(self._own.project(vectors, dtype), self._part, 1, self.n * self.c)

    def combine(self, coefficients: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """Add up the rows weighted by ``(k, n * c)`` coefficients, some vectors at a time."""
        own = coefficients[:, self._part]
        for some in chunks(len(own), self.size * own.element_size()):
            out = own.new_zeros((some.stop - some.start, self.size))
            for part, columns, values in self._own.combine(own[some].contiguous()):
                out[part, columns] = values
            self._ranks.add_up(out)
            yield some, slice(0, self.size), out

    def squared_norms(self, dtype: torch.dtype) -> Tensor:
        """Squared Euclidean norm of every row, shape ``(n * c,)``."""
        return self._whole(self._own.squared_norms(dtype), self._part, 0, self.n * self.c)

    def example_grams(self, dtype: torch.dtype) -> Tensor:
        """Inner products of each example's own unweighted rows, shape ``(n, c, c)``."""
        return self._whole(self._own.example_grams(dtype), self._examples, 0, self.n)

    def diagonal(self, weights: Tensor) -> Tensor:
        """Sum of the squared rows weighted by ``(n * c,)`` weights, shape ``(p,)``."""
        out = self._own.diagonal(weights[self._part])
        self._ranks.add_up(out)
        return out

    def outer(self, scale: Tensor, rotation: Tensor | None = None) -> Tensor:
        """Sum of the outer products of scaled rows, shape ``(p, p)``, in the dtype of the scale."""
        own = None if rotation is None else rotation[self._examples]
        out = self._own.outer(scale[self._part], own)
        self._ranks.add_up(out)
        return out

    def block(self, columns: Columns) -> RowMatrix:
        """Return the rows of the groups that lie in ``columns``, numbered within them."""
        return ShardedRowMatrix(self._own.block(columns), self._ranks)

    def whole(self) -> RowMatrix:
        """Return all rows on rank 0, and only their own on the others."""
        parts = []
        for source in range(self._ranks.size):
            for _, shown in self._shown(source):
                if self._ranks.rank == 0:
                    parts.append(shown)
        return RowMatrix.cat(parts) if parts else self._own

    def _whole(self, own: Tensor, place: slice, dim: int, length: int) -> Tensor:
        """Return what all ranks have, one after the other, along a dimension of that length."""
        shape = list(own.shape)
        shape[dim] = length
        out = own.new_zeros(shape)  # sums with zeros are exact
        out.narrow(dim, place.start, place.stop - place.start).copy_(own)
        self._ranks.add_up(out)
        return out

    def _shown(self, source: int) -> Iterator[tuple[slice, RowMatrix]]:
        """Yield one rank's rows, some examples at a time, with their place among all."""
        itself = source == self._ranks.rank
        form = _emptied(self._own) if itself else None
        form = self._ranks.gather(form)[source]
        device = self._own.groups[0][1].device
        stored = [tensor for _, rows in form.groups for tensor in rows.tensors]
        each = sum(tensor.shape[1:].numel() * tensor.element_size() for tensor in stored)
        first = sum(self._counts[:source])
        for part in chunks(self._counts[source], each):
            n = part.stop - part.start
            shown = self._own.examples(part) if itself else _of_length(form, n, device)
            for _, rows in shown.groups:
                for tensor in rows.tensors:
                    self._ranks.broadcast(tensor, source)
            if shown.weights is not None:
                self._ranks.broadcast(shown.weights, source)
            yield slice(first + part.start, first + part.stop), shown

    def _check_same(self, shadows: Tensor, norms: Tensor, coarse: bool) -> None:
        """Raise on all ranks if vectors of these inner products with `_probe` differ.

        Parameters
        ----------
        shadows, norms : Tensor of shape (k,)
            Inner products and norms of this rank's vectors.
        coarse : bool
            Whether the vectors were computed in a dtype below float64.
        """
        told = torch.stack([shadows.double(), norms.double()]).cpu()
        everyone = self._ranks.gather((told, coarse))
        tolerance = _COARSE_TOLERANCE if any(each for _, each in everyone) else _TOLERANCE
        first, _ = everyone[0]
        for rank, (theirs, _) in enumerate(everyone):
            count = theirs.shape[1]
            if count == first.shape[1]:
                differences = (theirs - first).abs().amax(0)
                different = (differences > tolerance * first[1]).nonzero()
                if not len(different):
                    continue
                place = int(different[0])
                what = f"rank {rank} gave another vector {place} of {count} than rank 0"
            else:
                what = f"rank {rank} gave {count} vectors, rank 0 {first.shape[1]}"
            raise IFVPUsageError(
                f"{what}; the rows of this fit are divided over ranks, so all of them must give "
                "the same vectors (torch.distributed.broadcast rank 0's, where they were computed "
                "on each). For what is a rank's own, call save(path) on all ranks, and then "
                "fimkit.load(path) on each, which answers alone."
            )


def _shadows(vectors: Tensor) -> Tensor:
    """Return inner products of ``(k, p)`` vectors with `_probe`, shape ``(k,)``, float64."""
    out = torch.zeros(len(vectors), dtype=torch.float64, device=vectors.device)
    for part in chunks(vectors.shape[1], 8 * (len(vectors) + 1)):
        out += vectors[:, part].double() @ _probe(part, vectors.device)
    return out


def _probe(part: slice, device: torch.device) -> Tensor:
    """Return part of a vector without any pattern, in [-1, 1) and the same on every device."""
    places = torch.arange(part.start, part.stop, device=device)
    for factor in (0x9E3779B1, 0x85EBCA77):  # odd, and below 2 ** 32: products of 63 bits
        places = (places * factor) & 0x7FFFFFFF
        places ^= places >> 15
    return places.double() / 2**30 - 1


def _with_rows(rows: RowMatrix, c: int) -> RowMatrix:
    """Return the rows with zero rows of weight zero, so that each example has c."""
    if rows.c == c:
        return rows
    none = RowMatrix(
        [(columns, group.zeros(0, c)) for columns, group in rows.groups],
        rows.size,
        None if rows.weights is None else rows.weights.new_zeros((0, c)),
    )
    return RowMatrix.cat([rows, none])


def _emptied(rows: RowMatrix) -> RowMatrix:
    """Return no example of rows, without a view of any, on the CPU."""
    return _of_length(rows.examples(slice(0, 0)), 0, torch.device("cpu"))


def _of_length(form: RowMatrix, n: int, device: torch.device) -> RowMatrix:
    """Return n examples' rows in the form of others, whose numbers are still to come."""

    def made(tensor: Tensor) -> Tensor:
        return torch.empty((n, *tensor.shape[1:]), dtype=tensor.dtype, device=device)

    groups: list[tuple[Columns, Rows]] = []
    for columns, rows in form.groups:
        if isinstance(rows, ZeroRows):
            like = torch.empty(0, dtype=rows.dtype, device=device)
            groups.append((columns, ZeroRows((n, rows.c, rows.width), like)))
        else:
            groups.append((columns, rows.with_tensors(*map(made, rows.tensors))))
    return RowMatrix(groups, form.size, None if form.weights is None else made(form.weights))
