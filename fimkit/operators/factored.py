r"""Per-example gradients of a linear map, kept as the factors of their outer products.

For a linear map the gradient of example i is :math:`G_i = \sum_t s_{it} a_{it}^\top` over its T
positions. Kept as the pair (a, s), n gradients of ``out * in`` numbers take ``n * T * (in + out)``,
and everything that is asked of them is one of four operations:

- ``gram``: :math:`\langle g_i, g_j \rangle`, of all pairs, within each example, or (``products``)
  with the rows of another matrix,
- ``squared_norms``: :math:`\|g_i\|^2`,
- ``project``: :math:`\langle g_i, V \rangle = \sum_t s_{it}^\top V a_{it}`,
- ``combine``: :math:`\sum_i c_i g_i = \sum_{it} c_i s_{it} a_{it}^\top`.

An example has ``c`` rows (one label, several sampled labels, or one per class), which share its
inputs ``a``. Sizes below: n examples, c rows each, k vectors, ``width`` parameters of the group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fimkit.operators.layout import MatrixLayout
from fimkit.operators.memory import chunks, reused
from fimkit.operators.rows import TILE, Rows, block, pad_to, tiles

__all__ = ["FactoredRows", "join_columns"]


class FactoredRows(Rows):
    """Rows that are sums over positions of outer products ``s aᵀ``, kept as their factors.

    Parameters
    ----------
    inputs : Tensor of shape (n, T, groups, columns)
        Inputs ``a`` of the linear map, with a last column of ones where ``layout`` has a bias
        (zeros at positions that do not meet the bias).
    signals : Tensor of shape (n, c, T, groups, out)
        Gradients ``s`` of every row's scalar with respect to the map's output.
    layout : MatrixLayout
        How the matrices lie in the flat vector.
    """

    def __init__(self, inputs: Tensor, signals: Tensor, layout: MatrixLayout) -> None:
        self.inputs = inputs
        self.signals = signals
        self.layout = layout
        self.n, self.c, self.positions = signals.shape[:3]
        self.width = layout.size
        self.dtype, self.device = signals.dtype, signals.device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The inputs and the signals."""
        return self.inputs, self.signals

    def with_tensors(self, *tensors: Tensor) -> FactoredRows:
        """Return rows of the same form that are stored in other tensors."""
        inputs, signals = tensors
        return FactoredRows(inputs, signals, self.layout)

    def magnitudes(self) -> FactoredRows:
        """Return the rows of magnitudes, a bound on what was added up in each entry."""
        return FactoredRows(self.inputs.abs(), self.signals.abs(), self.layout)

    def zeros(self, n: int, c: int) -> FactoredRows:
        """Return zero rows of n examples, c each, in the same form."""
        groups, out, columns = self.layout.groups, self.layout.out, self.layout.columns
        return FactoredRows(
            self.inputs.new_zeros((n, 1, groups, columns)),
            self.signals.new_zeros((n, c, 1, groups, out)),
            self.layout,
        )

    def compact(self) -> Rows:
        """Return these rows in the smaller of the two forms."""
        if self.positions * (self.layout.columns + self.layout.out) < (
            self.layout.columns * self.layout.out
        ):
            return self
        return self.densify()

    @classmethod
    def cat(cls, parts: Sequence[FactoredRows]) -> FactoredRows:
        """Join the examples of all parts, with zeros where one has fewer positions or rows."""
        c = max(part.c for part in parts)
        positions = max(part.positions for part in parts)
        return cls(
            torch.cat([pad_to(part.inputs, 1, positions) for part in parts]),
            torch.cat([pad_to(pad_to(part.signals, 2, positions), 1, c) for part in parts]),
            parts[0].layout,
        )

    def dense(self, part: slice, dtype: torch.dtype) -> Tensor:
        """Return the rows of the examples in ``part``, shape ``(m, c, width)``."""
        rows = self._ordered(part, dtype)
        return self._from_order(rows.flatten(0, 1)).view(rows.shape)

    def _ordered(self, part: slice, dtype: torch.dtype) -> Tensor:
        """Return dense rows as their matrices lie in memory, shape ``(m, c, width)``."""
        a = self.inputs[part].to(dtype)
        s = self.signals[part].to(dtype)
        m, (groups, out, columns) = len(s), self._shape
        # (m, groups, c * out, T) @ (m, groups, T, columns)
        s = s.permute(0, 3, 1, 4, 2).reshape(m, groups, self.c * out, self.positions)
        rows = (s @ a.transpose(1, 2)).view(m, groups, self.c, out * columns)
        return rows.transpose(1, 2).flatten(2)

    def _to_order(self, vectors: Tensor, dtype: torch.dtype) -> Tensor:
        return self.layout.matrices(vectors, dtype).flatten(1)

    def _from_order(self, vectors: Tensor) -> Tensor:
        return self.layout.flatten(vectors.view(len(vectors), *self._shape))

    @property
    def _shape(self) -> tuple[int, int, int]:
        return self.layout.groups, self.layout.out, self.layout.columns

    def project(self, vectors: Tensor, dtype: torch.dtype) -> Tensor:
        """Inner products in ``dtype`` of rows with ``(k, width)`` vectors, shape ``(k, n, c)``."""
        if self._dense_is_cheaper(vectors.shape[0]):
            return super().project(vectors, dtype)
        out = vectors.new_empty((vectors.shape[0], self.n, self.c), dtype=dtype)
        groups, position_size = self.layout.groups, self.positions * self.layout.out
        for part, some in self._example_and_vector_chunks(vectors.shape[0], dtype.itemsize):
            a = self.inputs[part].to(dtype)
            s = self.signals[part].to(dtype)
            m = s.shape[0]
            v = self.layout.matrices(vectors[some], dtype)
            k = v.shape[0]
            # (groups, m * T, columns) @ (groups, columns, k * out)
            va = a.permute(2, 0, 1, 3).reshape(groups, -1, self.layout.columns) @ (
                v.transpose(0, 1).reshape(groups, -1, self.layout.columns).transpose(1, 2)
            )
            va = va.view(groups, m, self.positions, k, self.layout.out).permute(1, 3, 2, 0, 4)
            va = va.reshape(m, k, groups * position_size)
            s = s.reshape(m, self.c, groups * position_size)
            products = va.mul_(s).sum(2, True) if self.c == 1 else va @ s.transpose(1, 2)
            out[some, part] = products.transpose(0, 1)
        return out

    def combine(self, coefficients: Tensor) -> Tensor:
        """Add up the rows weighted by ``(k, n, c)`` coefficients, shape ``(k, width)``."""
        if self._dense_is_cheaper(coefficients.shape[0]):
            return super().combine(coefficients)
        layout = self.layout
        out = coefficients.new_zeros((coefficients.shape[0], self.width))
        itemsize = coefficients.element_size()
        for part, some in self._example_and_vector_chunks(coefficients.shape[0], itemsize):
            a = self.inputs[part].to(coefficients.dtype)
            s = self.signals[part].to(coefficients.dtype)
            weights = coefficients[some, part]
            # (groups, k, out, m, T), then one product (groups, k * out, m * T) @ (m * T, columns)
            if self.c == 1:
                sums = s[:, 0].permute(2, 3, 0, 1)[:, None] * weights[:, None, :, :]
            else:
                sums = torch.einsum("kmc,mctgo->gkomt", weights, s)
            matrices = sums.reshape(layout.groups, -1, sums.shape[3] * self.positions) @ (
                a.permute(2, 0, 1, 3).reshape(layout.groups, -1, layout.columns)
            )
            matrices = matrices.view(layout.groups, -1, layout.out, layout.columns)
            out[some] += layout.flatten(matrices.transpose(0, 1))
        return out

    def squared_norms(self, dtype: torch.dtype) -> Tensor:
        """Squared Euclidean norm of every row, shape ``(n, c)``."""
        if not self._products_by_factors(self):
            return super().squared_norms(dtype)
        out = []
        each = self.layout.groups * self.positions**2 * (self.c + 1) * dtype.itemsize
        for part in chunks(self.n, each + self.positions * self.width):
            a = self.inputs[part].to(dtype).transpose(1, 2)
            s = self.signals[part].to(dtype).transpose(2, 3)
            aa = a @ a.transpose(-1, -2)
            ss = s @ s.transpose(-1, -2)
            out.append((aa[:, None] * ss).sum((2, 3, 4)))
        return torch.cat(out)

    def example_grams(self, dtype: torch.dtype) -> Tensor:
        """Inner products of each example's own rows, shape ``(n, c, c)``."""
        t, out, columns = self.positions, self.layout.out, self.layout.columns
        by_rows = self.c * out * columns * (t + self.c)
        if t * (t * (self.c * out + columns) + self.c**2 * out) >= by_rows:
            return super().example_grams(dtype)
        grams = torch.empty((self.n, self.c, self.c), dtype=dtype, device=self.device)
        each = self.layout.groups * t * (columns + t + 2 * self.c * out) * dtype.itemsize
        for part in chunks(self.n, each):
            a = self.inputs[part].to(dtype).transpose(1, 2)
            s = self.signals[part].to(dtype).permute(0, 3, 1, 2, 4)  # (m, groups, c, T, out)
            met = (a @ a.mT)[:, :, None] @ s
            grams[part] = (met.flatten(3) @ s.flatten(3).mT).sum(1)
        return grams

    def diagonal(self, weights: Tensor) -> Tensor:
        """Sum of the squared rows weighted by ``(n, c)`` weights, shape ``(width,)``."""
        if self.positions > 1:
            return super().diagonal(weights)
        dtype = weights.dtype
        squares = FactoredRows(
            self.inputs.to(dtype).square(), self.signals.to(dtype).square(), self.layout
        )
        return squares.combine(weights[None])[0]

    def _dense_is_cheaper(self, k: int) -> bool:
        """Whether forming the rows costs less than the k products by the factors.

        By the factors, every position meets every vector, and leaves ``k * out`` numbers to be
        read again per example, where a dense row has ``columns * out``.
        """
        return k > 1 and (self.positions > 1 or k > self.layout.columns)

    def _example_and_vector_chunks(self, k: int, itemsize: int) -> list[tuple[slice, slice]]:
        layout = self.layout
        per_example = self.positions * layout.groups * layout.out
        parts = list(chunks(self.n, (per_example * 2 + layout.groups * layout.columns) * itemsize))
        m = parts[0].stop if parts else 1
        each = (2 * layout.size + m * per_example * 2) * itemsize
        some = list(chunks(k, each, budget=reused()))
        return [(part, vectors) for vectors in some for part in parts]

    def add_gram(self, gram: Tensor) -> None:
        """Add the inner products of all pairs of rows to ``gram``, ``(n * c, n * c)``, in place.

        Only tiles on and above the diagonal are touched; the caller mirrors them once.
        """
        if not self._products_by_factors(self):
            super().add_gram(gram)
            return
        parts = tiles(self.n, self._tile(gram.element_size()))
        for i, rows in enumerate(parts):
            left = self._factors(rows, gram.dtype)
            for columns in parts[i:]:
                right = left if columns is rows else self._factors(columns, gram.dtype)
                _add_factored(left, right, block(gram, self, rows, self, columns))

    def add_products(self, other: Rows, out: Tensor) -> None:
        """Add the inner products with other rows to ``out``, ``(n * c, n' * c')``, in place."""
        if not isinstance(other, FactoredRows) or not self._products_by_factors(other):
            super().add_products(other, out)
            return
        for rows in tiles(self.n, self._tile(out.element_size())):
            left = self._factors(rows, out.dtype)
            for columns in tiles(other.n, other._tile(out.element_size())):
                right = other._factors(columns, out.dtype)
                _add_factored(left, right, block(out, self, rows, other, columns))

    def _products_by_factors(self, other: FactoredRows) -> bool:
        """Whether inner products of rows cost less by all pairs of positions than by the rows."""
        out, columns = self.layout.out, self.layout.columns
        pairs = self.positions * other.positions
        return self.layout == other.layout and (
            pairs == 1 or pairs * (out + columns) < out * columns
        )

    def _tile(self, itemsize: int) -> int:
        # A tile of m examples needs two (m T, m T) products per row pair.
        return min(TILE // self.c, int((2**26 / itemsize) ** 0.5 / (self.positions * self.c)))

    def _factors(self, part: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return some examples' inputs and signals with the groups first."""
        a = self.inputs[part].to(dtype).permute(2, 0, 1, 3)
        return a, self.signals[part].to(dtype).permute(3, 0, 1, 2, 4)


def join_columns(vectors: Sequence[Tensor]) -> Tensor:
    """Join columns of vectors, the last dimension; a single tensor stays itself."""
    return vectors[0] if len(vectors) == 1 else torch.cat(tuple(vectors), -1)


def _add_factored(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], out: Tensor) -> None:
    """Add inner products of rows given by factors, ``(groups, m, T, in)`` inputs first."""
    for (a, s), (b, z) in zip(zip(*left, strict=True), zip(*right, strict=True), strict=True):
        (m, c, t, _), (other, d, u, _) = s.shape, z.shape
        aa = (a.flatten(0, 1) @ b.flatten(0, 1).T).view(m, 1, t, other, 1, u)
        ss = (s.flatten(0, 2) @ z.flatten(0, 2).T).view(m, c, t, other, d, u)
        products = ss.mul_(aa)
        if t > 1 or u > 1:
            products = products.sum((2, 5))
        out += products.reshape(out.shape)
