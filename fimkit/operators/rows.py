"""Per-example gradients of one group of parameters: what is asked of them, and rows kept dense."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fimkit.operators.memory import chunks, reused

__all__ = [
    "TILE",
    "DenseRows",
    "Rows",
    "ZeroRows",
    "block",
    "join_rows",
    "pad_to",
    "tiles",
]

#: Tiles of the Gram matrix are no wider than this, so that its symmetry halves the work.
TILE = 512


class Rows(ABC):
    """``n * c`` gradients of ``width`` numbers, stored in one dtype and computed with in another.

    A subclass says how rows become dense; it overrides an operation where its own form is cheaper.
    """

    n: int
    c: int
    width: int
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def dense(self, part: slice, dtype: torch.dtype) -> Tensor:
        """Return the rows of the examples in ``part``, shape ``(m, c, width)``."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """What is stored: tensors with the examples along their first dimension."""

    @abstractmethod
    def with_tensors(self, *tensors: Tensor) -> Rows:
        """Return rows of the same form that are stored in other tensors."""

    def examples(self, part: slice) -> Rows:
        """Return the rows of some examples, in the same form."""
        return self.with_tensors(*(tensor[part] for tensor in self.tensors))

    @abstractmethod
    def magnitudes(self) -> Rows:
        """Return rows that bound the sizes of what was added up in each entry."""

    @abstractmethod
    def zeros(self, n: int, c: int) -> Rows:
        """Return zero rows of n examples, c each, in the same form."""

    @classmethod
    @abstractmethod
    def cat(cls, parts: Sequence[Any]) -> Rows:
        """Join the examples of all parts, with zeros where one has fewer rows or positions."""

    def densify(self) -> DenseRows:
        """Return the same rows stored as they are, in the dtype they are kept in."""
        parts = self._dense_chunks(self.dtype.itemsize) or [slice(0, 0)]
        return DenseRows(torch.cat([self.dense(part, self.dtype) for part in parts]))

    def _ordered(self, part: slice, dtype: torch.dtype) -> Tensor:
        """Return dense rows with their numbers in an order of their own, shape ``(m, c, width)``.

        It may take less to make than the flat one, and serves as well where numbers are summed
        over. A subclass with such an order overrides this, `_to_order` and `_from_order`.
        """
        return self.dense(part, dtype)

    def _to_order(self, vectors: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``(k, width)`` vectors in the order of `_ordered`."""
        return vectors.to(dtype)

    def _from_order(self, vectors: Tensor) -> Tensor:
        """Return ``(k, width)`` vectors in the flat order."""
        return vectors

    def _dense_chunks(self, itemsize: int) -> list[slice]:
        return list(chunks(self.n, self.c * self.width * itemsize, budget=reused()))

    def project(self, vectors: Tensor, dtype: torch.dtype) -> Tensor:
        """Inner products in ``dtype`` of rows with ``(k, width)`` vectors, shape ``(k, n, c)``."""
        out = vectors.new_empty((vectors.shape[0], self.n, self.c), dtype=dtype)
        for some in chunks(vectors.shape[0], self.width * dtype.itemsize):
            wide = self._to_order(vectors[some], dtype)
            for part in self._dense_chunks(dtype.itemsize):
                rows = self._ordered(part, dtype)
                out[some, part] = (wide @ rows.flatten(0, 1).T).view(-1, *rows.shape[:2])
        return out

    def combine(self, coefficients: Tensor) -> Tensor:
        """Add up the rows weighted by ``(k, n, c)`` coefficients, shape ``(k, width)``."""
        out = coefficients.new_zeros((coefficients.shape[0], self.width))
        for part in self._dense_chunks(coefficients.element_size()):
            rows = self._ordered(part, coefficients.dtype)
            out.addmm_(coefficients[:, part].flatten(1), rows.flatten(0, 1))
        return self._from_order(out)

    def squared_norms(self, dtype: torch.dtype) -> Tensor:
        """Squared Euclidean norm of every row, shape ``(n, c)``."""
        parts = self._dense_chunks(dtype.itemsize)
        return torch.cat([self._ordered(part, dtype).square().sum(2) for part in parts])

    def example_grams(self, dtype: torch.dtype) -> Tensor:
        """Inner products of each example's own rows, shape ``(n, c, c)``."""
        out = torch.empty((self.n, self.c, self.c), dtype=dtype, device=self.device)
        for part in self._dense_chunks(dtype.itemsize):
            rows = self._ordered(part, dtype)
            torch.bmm(rows, rows.mT, out=out[part])
        return out

    def diagonal(self, weights: Tensor) -> Tensor:
        """Sum of the squared rows weighted by ``(n, c)`` weights, shape ``(width,)``."""
        out = weights.new_zeros(self.width)
        for part in self._dense_chunks(weights.element_size()):
            rows = self._ordered(part, weights.dtype).flatten(0, 1)
            out += weights[part].flatten() @ rows.square()
        return self._from_order(out[None])[0]

    def add_gram(self, gram: Tensor) -> None:
        """Add the inner products of all pairs of rows to ``gram``, ``(n * c, n * c)``, in place.

        Only tiles on and above the diagonal are touched; the caller mirrors them once.
        """
        chunk = self._dense_chunks(gram.element_size())[:1]
        parts = tiles(self.n, min(TILE // self.c, chunk[0].stop if chunk else 1))
        for i, rows in enumerate(parts):
            left = self._ordered(rows, gram.dtype).flatten(0, 1)
            for columns in parts[i:]:
                right = (
                    left if columns is rows else self._ordered(columns, gram.dtype).flatten(0, 1)
                )
                block(gram, self, rows, self, columns).addmm_(left, right.T)

    def add_products(self, other: Rows, out: Tensor) -> None:
        """Add the inner products with other rows to ``out``, ``(n * c, n' * c')``, in place."""
        everything = slice(0, other.n)
        for part in self._dense_chunks(out.element_size()):
            products = other.project(self.dense(part, out.dtype).flatten(0, 1), out.dtype)
            block(out, self, part, other, everything).add_(products.flatten(1))


class ZeroRows(Rows):
    """Rows of a group that no example met; nothing is stored.

    Parameters
    ----------
    shape : (int, int, int)
        n, c and width.
    like : Tensor
        Dtype and device.
    """

    def __init__(self, shape: tuple[int, int, int], like: Tensor) -> None:
        self.n, self.c, self.width = shape
        self.dtype, self.device = like.dtype, like.device

    def dense(self, part: slice, dtype: torch.dtype) -> Tensor:
        """Return the rows of the examples in ``part``, shape ``(m, c, width)``."""
        m = part.stop - part.start
        return torch.zeros((), dtype=dtype, device=self.device).expand(m, self.c, self.width)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Nothing."""
        return ()

    def with_tensors(self, *tensors: Tensor) -> ZeroRows:
        """Return these rows."""
        return self

    def examples(self, part: slice) -> ZeroRows:
        """Return the rows of some examples, in the same form."""
        return self.zeros(len(range(self.n)[part]), self.c)

    def magnitudes(self) -> ZeroRows:
        """Return rows that bound the sizes of what was added up in each entry."""
        return self

    def zeros(self, n: int, c: int) -> ZeroRows:
        """Return zero rows of n examples, c each, in the same form."""
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        return ZeroRows((n, c, self.width), like)

    @classmethod
    def cat(cls, parts: Sequence[ZeroRows]) -> ZeroRows:
        """Join the examples of all parts."""
        return parts[0].zeros(sum(part.n for part in parts), max(part.c for part in parts))

    def project(self, vectors: Tensor, dtype: torch.dtype) -> Tensor:
        """Inner products in ``dtype`` of rows with ``(k, width)`` vectors, shape ``(k, n, c)``."""
        return vectors.new_zeros((vectors.shape[0], self.n, self.c), dtype=dtype)

    def combine(self, coefficients: Tensor) -> Tensor:
        """Add up the rows weighted by ``(k, n, c)`` coefficients, shape ``(k, width)``."""
        return coefficients.new_zeros((coefficients.shape[0], self.width))

    def squared_norms(self, dtype: torch.dtype) -> Tensor:
        """Squared Euclidean norm of every row, shape ``(n, c)``."""
        return torch.zeros((self.n, self.c), dtype=dtype, device=self.device)

    def example_grams(self, dtype: torch.dtype) -> Tensor:
        """Inner products of each example's own rows, shape ``(n, c, c)``."""
        return torch.zeros((self.n, self.c, self.c), dtype=dtype, device=self.device)

    def diagonal(self, weights: Tensor) -> Tensor:
        """Sum of the squared rows weighted by ``(n, c)`` weights, shape ``(width,)``."""
        return weights.new_zeros(self.width)

    def add_gram(self, gram: Tensor) -> None:
        """Add nothing."""


class DenseRows(Rows):
    """Rows that are stored as they are.

    Parameters
    ----------
    rows : Tensor of shape (n, c, width)
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.n, self.c, self.width = rows.shape
        self.dtype, self.device = rows.dtype, rows.device

    def dense(self, part: slice, dtype: torch.dtype) -> Tensor:
        """Return the rows of the examples in ``part``, shape ``(m, c, width)``."""
        return self.rows[part].to(dtype)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The rows."""
        return (self.rows,)

    def with_tensors(self, *tensors: Tensor) -> DenseRows:
        """Return rows of the same form that are stored in another tensor."""
        return DenseRows(*tensors)

    def magnitudes(self) -> DenseRows:
        """Return rows that bound the sizes of what was added up in each entry."""
        return DenseRows(self.rows.abs())

    def zeros(self, n: int, c: int) -> DenseRows:
        """Return zero rows of n examples, c each, in the same form."""
        return DenseRows(self.rows.new_zeros((n, c, self.width)))

    def densify(self) -> DenseRows:
        """Return these rows."""
        return self

    @classmethod
    def cat(cls, parts: Sequence[DenseRows]) -> DenseRows:
        """Join the examples of all parts, with zero rows where an example has fewer."""
        c = max(part.c for part in parts)
        return cls(torch.cat([pad_to(part.rows, 1, c) for part in parts]))


def tiles(n: int, step: int) -> list[slice]:
    """Cut ``range(n)`` into slices of a step, at least 1."""
    step = max(1, step)
    return [slice(i, min(i + step, n)) for i in range(0, n, step)]


def block(products: Tensor, own: Rows, rows: slice, other: Rows, columns: slice) -> Tensor:
    """Return where inner products of some examples of two sets of rows lie among all."""
    return products[
        rows.start * own.c : rows.stop * own.c, columns.start * other.c : columns.stop * other.c
    ]


def join_rows(parts: Sequence[Rows]) -> Rows:
    """Join the examples of all parts, in their common form if there is one, else dense."""
    if len(parts) == 1:
        return parts[0]
    stored = [part for part in parts if not isinstance(part, ZeroRows)]
    if stored:
        parts = [stored[0].zeros(p.n, p.c) if isinstance(p, ZeroRows) else p for p in parts]
    forms = {(type(part), getattr(part, "layout", None)) for part in parts}
    if len(forms) == 1:
        return type(parts[0]).cat(parts)
    return DenseRows.cat([part.densify() for part in parts])


def pad_to(tensor: Tensor, dim: int, size: int) -> Tensor:
    """Lengthen one dimension with zeros."""
    missing = size - tensor.shape[dim]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)
