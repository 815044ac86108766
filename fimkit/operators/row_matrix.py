"""The matrix of per-example gradients over all parameters, group by group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from torch import Tensor
from torch.nn.functional import pad

from fimkit.operators.memory import BUDGET, chunks
from fimkit.operators.rows import Rows, join_rows
from fimkit.operators.symmetric import mirror_

__all__ = ["Columns", "RowMatrix", "join_weights", "squared_norms"]

#: From coefficients to combinations of rows, piece by piece: see `RowMatrix.combine`.
Combination = Callable[[Tensor], Iterator[tuple[slice, slice, Tensor]]]


@dataclass(frozen=True)
class Columns:
    """Where a group's parameters lie in the flat vector: one slice per parameter, in order."""

    parts: tuple[slice, ...]

    @property
    def size(self) -> int:
        """Number of columns."""
        return sum(part.stop - part.start for part in self.parts)

    @property
    def contiguous(self) -> bool:
        """Whether the slices follow each other without a gap."""
        return all(a.stop == b.start for a, b in pairwise(self.parts))

    def take(self, vectors: Tensor) -> Tensor:
        """Return these columns of ``(k, p)`` vectors, as a view where they are contiguous."""
        if self.contiguous:
            return vectors[:, self.parts[0].start : self.parts[-1].stop]
        return torch.cat([vectors[:, part] for part in self.parts], 1)

    def put(self, vectors: Tensor, values: Tensor) -> None:
        """Write ``(k, size)`` values into these columns of ``(k, p)`` vectors."""
        for place, piece in self.pieces(values):
            vectors[:, place] = piece

    def locate(self, inner: Columns) -> Columns | None:
        """Return where the columns of ``inner`` are among these, or None if any is not."""
        found = []
        for part in inner.parts:
            offset = 0
            for outer in self.parts:
                if outer.start <= part.start and part.stop <= outer.stop:
                    start = offset + part.start - outer.start
                    found.append(slice(start, start + part.stop - part.start))
                    break
                offset += outer.stop - outer.start
        return Columns(tuple(found)) if len(found) == len(inner.parts) else None

    def meets(self, other: Columns) -> bool:
        """Whether any of the columns of ``other`` is among these."""
        pairs = product(self.parts, other.parts)
        return any(a.start < b.stop and b.start < a.stop for a, b in pairs)

    def pieces(self, values: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield each parameter's place in the flat vector with its part of ``(k, size)`` values."""
        start = 0
        for part in self.parts:
            stop = start + part.stop - part.start
            yield part, values[:, start:stop]
            start = stop


class RowMatrix:
    """Gradients of n examples, c rows each, over p parameters, with weights beside the rows.

    Parameters
    ----------
    groups : sequence of (Columns, Rows)
        The rows of each group of parameters and where its parameters lie. Columns that no group
        covers are zero.
    size : int
        Number of parameters p.
    weights : Tensor of shape (n, c), optional
        Weight of each row in the Fisher information matrix; one when not given.
    """

    def __init__(
        self, groups: Sequence[tuple[Columns, Rows]], size: int, weights: Tensor | None = None
    ) -> None:
        self.groups = list(groups)
        self.size = size
        self.weights = weights
        self.n, self.c = (self.groups[0][1].n, self.groups[0][1].c) if self.groups else (0, 0)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows, ``n * c``, and of parameters."""
        return self.n * self.c, self.size

    def flat_weights(self, like: Tensor) -> Tensor:
        """Return the ``n * c`` row weights in the dtype and on the device of ``like``."""
        if self.weights is None:
            return like.new_ones(self.n * self.c)
        return self.weights.flatten().to(like)

    def gram(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Inner products of all pairs of unweighted rows, shape ``(n * c, n * c)``."""
        gram = torch.zeros((self.n * self.c,) * 2, dtype=dtype, device=device)
        for _, rows in self.groups:
            rows.add_gram(gram)
        return mirror_(gram)

    def products(self, other: RowMatrix, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Inner products with the rows of another matrix, shape ``(n * c, n' * c')``."""
        out = torch.zeros((self.n * self.c, other.n * other.c), dtype=dtype, device=device)
        for columns, rows in self.groups:
            same = [theirs for place, theirs in other.groups if place == columns]
            if same:
                rows.add_products(same[0], out)
                continue
            for part in chunks(self.n, self.c * self.size * dtype.itemsize):
                alone = RowMatrix([(columns, rows)], self.size).dense(part, dtype)
                out[part.start * self.c : part.stop * self.c] += other.project(alone, dtype)
        return out

    def project(self, vectors: Tensor, dtype: torch.dtype) -> Tensor:
        """Inner products of ``(k, p)`` vectors with every row, shape ``(k, n * c)``.

        The arithmetic is in ``dtype``; vectors are converted chunk by chunk.
        """
        out = vectors.new_zeros((vectors.shape[0], self.n, self.c), dtype=dtype)
        for columns, rows in self.groups:
            out += rows.project(columns.take(vectors), dtype)
        return out.flatten(1)

    def combine(self, coefficients: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """Add up the rows weighted by ``(k, n * c)`` coefficients, piece by piece.

        Yields
        ------
        vectors, columns : slice
            Place of the piece in the ``(k, p)`` result; columns that no group covers are zero
            and never yielded.
        values : Tensor
            The piece, in the dtype of the coefficients.
        """
        coefficients = coefficients.view(coefficients.shape[0], self.n, self.c)
        itemsize = coefficients.element_size()
        for columns, rows in self.groups:
            for some in chunks(coefficients.shape[0], columns.size * itemsize):
                for part, values in columns.pieces(rows.combine(coefficients[some])):
                    yield some, part, values

    def squared_norms(self, dtype: torch.dtype) -> Tensor:
        """Squared Euclidean norm of every row, shape ``(n * c,)``."""
        norms = [rows.squared_norms(dtype) for _, rows in self.groups]
        return torch.stack(norms).sum(0).flatten()

    def example_grams(self, dtype: torch.dtype) -> Tensor:
        """Inner products of each example's own unweighted rows, shape ``(n, c, c)``."""
        return torch.stack([rows.example_grams(dtype) for _, rows in self.groups]).sum(0)

    def diagonal(self, weights: Tensor) -> Tensor:
        """Sum of the squared rows weighted by ``(n * c,)`` weights, shape ``(p,)``."""
        out = weights.new_zeros(self.size)
        for columns, rows in self.groups:
            columns.put(out[None], rows.diagonal(weights.view(self.n, self.c))[None])
        return out

    def dense(self, part: slice, dtype: torch.dtype) -> Tensor:
        """Rows of the examples in ``part``, shape ``(m * c, p)``."""
        out: Tensor | None = None
        for columns, rows in self.groups:
            values = rows.dense(part, dtype).flatten(0, 1)
            if out is None:
                out = values.new_zeros((values.shape[0], self.size))
            columns.put(out, values)
        assert out is not None
        return out

    def dense_parts(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield all rows, ``(m * c, p)`` at a time."""
        for part in chunks(self.n, self.c * self.size * dtype.itemsize):
            yield self.dense(part, dtype)

    @property
    def dtypes(self) -> set[torch.dtype]:
        """What rows are stored in."""
        return {rows.dtype for _, rows in self.groups}

    def outer(self, scale: Tensor, rotation: Tensor | None = None) -> Tensor:
        """Sum of the outer products of scaled rows, shape ``(p, p)``, in the dtype of the scale.

        Parameters
        ----------
        scale : Tensor of shape (n * c,)
        rotation : Tensor of shape (n, c, c), optional
            What each example's rows are combined by, in columns, before they are scaled.
        """
        dtype = scale.dtype
        scale = scale.view(self.n, self.c, 1)
        out = scale.new_zeros((self.size, self.size))
        for part in chunks(self.n, 2 * self.c * self.size * dtype.itemsize):
            dense = self.dense(part, dtype).view(-1, self.c, self.size)
            if rotation is not None:
                dense = rotation[part].mT @ dense
            dense = (dense * scale[part]).flatten(0, 1)
            out.addmm_(dense.T, dense)
        return out

    def examples(self, part: slice) -> RowMatrix:
        """Return the rows of some examples."""
        groups = [(columns, rows.examples(part)) for columns, rows in self.groups]
        weights = None if self.weights is None else self.weights[part]
        return RowMatrix(groups, self.size, weights)

    def less(self, combine: Combination, coefficients: Tensor, out: Tensor) -> None:
        """Write the rows less combinations of others, subtracted before they are rounded.

        Parameters
        ----------
        combine : callable
            From ``(k, r)`` coefficients to combinations, as `combine`.
        coefficients : Tensor of shape (n * c, r)
            In the precision of the subtraction.
        out : Tensor of shape (n * c, p)
        """
        each = self.c * self.size * coefficients.element_size()
        # Every part reads all that is combined, so parts are larger than those of other loops.
        for part in chunks(self.n, each, budget=8 * BUDGET):
            here = slice(part.start * self.c, part.stop * self.c)
            rows = self.dense(part, coefficients.dtype)
            for some, columns, values in combine(coefficients[here]):
                rows[some, columns] -= values
            out[here] = rows

    def block(self, columns: Columns) -> RowMatrix:
        """Return the rows of the groups that lie in ``columns``, numbered within them."""
        groups = []
        for own, rows in self.groups:
            places = columns.locate(own)
            if places is not None:
                groups.append((places, rows))
            elif columns.meets(own):
                raise ValueError(f"a group of parameters lies across the columns {columns.parts}")
        return RowMatrix(groups, columns.size, self.weights)

    @classmethod
    def cat(cls, parts: Sequence[RowMatrix]) -> RowMatrix:
        """Join the examples of all parts, which have the same groups."""
        weights = join_weights([part.weights for part in parts])
        groups = [
            (columns, join_rows([part.groups[i][1] for part in parts]))
            for i, (columns, _) in enumerate(parts[0].groups)
        ]
        return cls(groups, parts[0].size, weights)


def squared_norms(vectors: Tensor | RowMatrix, dtype: torch.dtype) -> Tensor:
    """Return ``‖v‖²`` of each of ``(k, p)`` vectors, or each row, in ``dtype``, shape ``(k,)``."""
    if isinstance(vectors, RowMatrix):
        return vectors.squared_norms(dtype)
    out = vectors.new_empty(vectors.shape[0], dtype=dtype)
    for some in chunks(vectors.shape[0], vectors.shape[1] * dtype.itemsize):
        out[some] = vectors[some].to(dtype).square().sum(1)
    return out


def join_weights(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Join ``(n, c)`` weights, with zeros where an example has fewer rows; None where none is."""
    given = [part for part in parts if part is not None]
    if not given:
        return None
    c = max(part.shape[1] for part in given)
    return torch.cat([pad(part, (0, c - part.shape[1])) for part in given])
