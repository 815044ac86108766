r"""Per-example gradients of a table that was looked up, kept by position.

The gradient of example i has :math:`\sum_{t: x_{it} = v} s_{it}` in row v of the table. Positions
and their gradients take ``T * d`` numbers where the table has ``vocabulary * d``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fimkit.operators.memory import chunks
from fimkit.operators.rows import DenseRows, Rows, pad_to

__all__ = ["LookupRows"]


class LookupRows(Rows):
    """Rows of a ``(vocabulary, d)`` table's gradients.

    Parameters
    ----------
    indices : Tensor of shape (n, T)
        Table rows looked up at each position.
    signals : Tensor of shape (n, c, T, d)
        Gradients at each position; zero at positions that do not count.
    vocabulary : int
    """

    def __init__(self, indices: Tensor, signals: Tensor, vocabulary: int) -> None:
        self.indices = indices
        self.signals = signals
        self.vocabulary = vocabulary
        self.n, self.c, self.positions, self.features = signals.shape
        self.width = vocabulary * self.features
        self.dtype, self.device = signals.dtype, signals.device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The indices and the signals."""
        return self.indices, self.signals

    def with_tensors(self, *tensors: Tensor) -> LookupRows:
        """Return rows of the same form that are stored in other tensors."""
        indices, signals = tensors
        return LookupRows(indices, signals, self.vocabulary)

    def magnitudes(self) -> LookupRows:
        """Return the rows of magnitudes, a bound on what was added up in each entry."""
        return LookupRows(self.indices, self.signals.abs(), self.vocabulary)

    def zeros(self, n: int, c: int) -> LookupRows:
        """Return zero rows of n examples, c each, in the same form."""
        signals = self.signals.new_zeros((n, c, 1, self.features))
        return LookupRows(self.indices.new_zeros((n, 1)), signals, self.vocabulary)

    def compact(self) -> Rows:
        """Return these rows in the smaller of the two forms."""
        return self if self.positions < self.vocabulary else self.densify()

    @classmethod
    def cat(cls, parts: Sequence[LookupRows]) -> LookupRows:
        """Join the examples of all parts, with zeros where one has fewer positions or rows."""
        c = max(part.c for part in parts)
        positions = max(part.positions for part in parts)
        return cls(
            torch.cat([pad_to(part.indices, 1, positions) for part in parts]),
            torch.cat([pad_to(pad_to(part.signals, 2, positions), 1, c) for part in parts]),
            parts[0].vocabulary,
        )

    def dense(self, part: slice, dtype: torch.dtype) -> Tensor:
        """Return the rows of the examples in ``part``, shape ``(m, c, width)``."""
        s = self.signals[part].to(dtype)
        table = s.new_zeros((s.shape[0], self.c, self.vocabulary, self.features))
        places = self.indices[part][:, None, :, None].expand_as(s)
        return table.scatter_add_(2, places, s).flatten(2)

    def project(self, vectors: Tensor, dtype: torch.dtype) -> Tensor:
        """Inner products in ``dtype`` of rows with ``(k, width)`` vectors, shape ``(k, n, c)``."""
        k = vectors.shape[0]
        tables = vectors.reshape(k, self.vocabulary, self.features)
        out = vectors.new_empty((k, self.n, self.c), dtype=dtype)
        each = self.positions * self.features * dtype.itemsize
        for some in chunks(k, each):
            for part in chunks(self.n, each * (some.stop - some.start + self.c)):
                # (m, k, T * d) @ (m, T * d, c)
                looked_up = tables[some][:, self.indices[part]].to(dtype).transpose(0, 1).flatten(2)
                s = self.signals[part].to(dtype).flatten(2)
                out[some, part] = (looked_up @ s.transpose(1, 2)).transpose(0, 1)
        return out

    def combine(self, coefficients: Tensor) -> Tensor:
        """Add up the rows weighted by ``(k, n, c)`` coefficients, shape ``(k, width)``."""
        k = coefficients.shape[0]
        out = coefficients.new_zeros((k, self.vocabulary, self.features))
        each = self.positions * self.features * coefficients.element_size()
        for part in chunks(self.n, each * (k + self.c)):
            s = self.signals[part].to(coefficients.dtype).flatten(2)
            sums = coefficients[:, part].transpose(0, 1) @ s  # (m, k, T * d)
            sums = sums.transpose(0, 1).reshape(k, sums.shape[0] * self.positions, self.features)
            out.index_add_(1, self.indices[part].flatten(), sums)
        return out.flatten(1)

    def squared_norms(self, dtype: torch.dtype) -> Tensor:
        """Squared Euclidean norm of every row, shape ``(n, c)``."""
        out = []
        for same, s in self._coincidences(dtype):
            out.append(((s @ s.transpose(2, 3)) * same[:, None]).sum((2, 3)))
        return torch.cat(out)

    def example_grams(self, dtype: torch.dtype) -> Tensor:
        """Inner products of each example's own rows, shape ``(n, c, c)``."""
        out = [
            (same[:, None] @ s).flatten(2) @ s.flatten(2).mT
            for same, s in self._coincidences(dtype)
        ]
        return torch.cat(out)

    def diagonal(self, weights: Tensor) -> Tensor:
        """Sum of the squared rows weighted by ``(n, c)`` weights, shape ``(width,)``."""
        out = weights.new_zeros((self.vocabulary, self.features))
        start = 0
        for same, s in self._coincidences(weights.dtype):
            part = slice(start, start + s.shape[0])
            start = part.stop
            # Each position holds its table row's whole sum, so it counts for a share of it.
            shares = 1 / same.sum(2)
            squares = (same[:, None] @ s).square() * weights[part][:, :, None, None]
            values = squares.sum(1) * shares[:, :, None]
            out.index_add_(0, self.indices[part].flatten(), values.flatten(0, 1))
        return out.flatten()

    def add_gram(self, gram: Tensor) -> None:
        """Add the inner products of all pairs of rows to ``gram``, ``(n * c, n * c)``, in place."""
        used, places = torch.unique(self.indices, return_inverse=True)
        each = self.n * self.c * self.features * gram.element_size()
        for entries in chunks(len(used), each):
            inside = (places >= entries.start) & (places < entries.stop)
            local = LookupRows(
                torch.where(inside, places - entries.start, 0),
                self.signals * inside[:, None, :, None],
                entries.stop - entries.start,
            )
            DenseRows(local.dense(slice(0, self.n), gram.dtype)).add_gram(gram)

    def _coincidences(self, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield, per chunk, which positions look up the same, ``(m, T, T)``, and the signals."""
        each = (self.positions * (self.c + 1) + self.c * self.features) * self.positions
        for part in chunks(self.n, each * dtype.itemsize):
            indices = self.indices[part]
            same = indices[:, :, None] == indices[:, None, :]
            yield same.to(dtype), self.signals[part].to(dtype)
