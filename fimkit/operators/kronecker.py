r"""Eigenvalues in a Kronecker-factored eigenbasis.

For matrices V of shape (out, in),

.. math:: F V = Q_S \, [\Lambda \odot (Q_S^\top V Q_A)] \, Q_A^\top ,

with orthogonal :math:`Q_S` (out × out), :math:`Q_A` (in × in) and :math:`\Lambda` (out × in).
EK-FAC has the best Λ for its basis, K-FAC the product of the factors' eigenvalues, a diagonal
approximation both bases equal to the identity.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fimkit.operators.base import Operator
from fimkit.operators.cholesky import check_eigenvalues
from fimkit.operators.factored import FactoredRows
from fimkit.operators.layout import MatrixLayout
from fimkit.operators.memory import accumulation_dtype, chunks, working_set
from fimkit.operators.row_matrix import Columns, RowMatrix
from fimkit.operators.spectrum import EigenSpectrum, Spectrum

__all__ = ["EigenKroneckerOperator"]


class EigenKroneckerOperator(Operator):
    """An operator diagonal in the basis ``Q_S ⊗ Q_A``, one such pair per group.

    Parameters
    ----------
    layout : MatrixLayout
        How a flat vector becomes matrices ``(groups, out, columns)``.
    eigenvalues : Tensor of shape (groups, out, columns)
        None negative.
    output_basis : Tensor of shape (groups, out, out), or None
        Eigenvectors of the output side in columns; None for the identity.
    input_basis : Tensor of shape (groups, columns, columns), or None
        Those of the input side.
    """

    def __init__(
        self,
        layout: MatrixLayout,
        eigenvalues: Tensor,
        output_basis: Tensor | None = None,
        input_basis: Tensor | None = None,
    ) -> None:
        self.layout = layout
        self.eigenvalues = eigenvalues
        self.output_basis = output_basis
        self.input_basis = input_basis
        self.size = layout.size
        self.device = eigenvalues.device
        self._range: tuple[float, float] | None = None

    @classmethod
    def diagonal_of(cls, diagonal: Tensor) -> EigenKroneckerOperator:
        """Return the operator with this ``(p,)`` diagonal and nothing beside it."""
        return cls(MatrixLayout(1, len(diagonal), 1), diagonal[None, :, None])

    def matmul(self, vectors: Tensor, damping: float = 0.0) -> Tensor:
        """Return ``(F + damping I) v`` for each of ``(k, p)`` vectors."""
        return self._scaled(vectors, self.eigenvalues + damping)

    def solve(self, vectors: Tensor, damping: float, out: Tensor | None = None) -> Tensor:
        """Return ``(F + damping I)⁻¹ v`` for each of ``(k, p)`` vectors, in ``out`` if given."""
        self._check(damping)
        return self._scaled(vectors, 1 / (self.eigenvalues + damping), out)

    def solve_rows(self, rows: RowMatrix, damping: float, out: Tensor) -> None:
        """Write ``(F + damping I)⁻¹ v`` for each row into ``out``, shape ``(n * c, p)``."""
        self._check(damping)
        factors = self.rotated_factors(rows)
        if factors is None:
            super().solve_rows(rows, damping, out)
            return
        scale = 1 / (self.eigenvalues + damping)
        for part in self._some(rows.n, rows.c):
            rotated = factors.dense(part, scale.dtype).view(-1, *scale.shape).mul_(scale)
            out[part.start * rows.c : part.stop * rows.c] = self._back(rotated)

    def inverse_quadratic(self, vectors: Tensor | RowMatrix, damping: float) -> Tensor:
        """Return ``vᵀ (F + damping I)⁻¹ v`` for each vector, or each row, shape ``(k,)``."""
        self._check(damping)
        return self.spectrum().quadratics(vectors, [damping])[0]

    def diagonal(self, damping: float = 0.0) -> Tensor:
        """Return the diagonal of ``F + damping I``, shape ``(p,)``."""
        values = self.eigenvalues
        if self.output_basis is not None:
            values = self.output_basis.square() @ values
        if self.input_basis is not None:
            values = values @ self.input_basis.square().mT
        return self.layout.flatten(values[None])[0] + damping

    def trace(self, damping: float = 0.0) -> float:
        """Return the trace of ``F + damping I``."""
        return float(self.wide_eigenvalues().flatten().sum()) + damping * self.size

    def logdet(self, damping: float) -> float:
        """Return ``log det(F + damping I)``."""
        self._check(damping)
        return float((self.wide_eigenvalues().flatten() + damping).log().sum())

    def spectrum(self) -> Spectrum:
        """Return what gives inverse quadratic forms and log determinants at many dampings."""
        return _KroneckerSpectrum(self)

    def to_dense(self, damping: float = 0.0) -> Tensor:
        """Return ``F + damping I`` as a ``(p, p)`` tensor."""
        eye = torch.eye(self.size, dtype=self.eigenvalues.dtype, device=self.device)
        return self.matmul(eye, damping)

    def _scaled(self, vectors: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
        out = torch.empty_like(vectors) if out is None else out
        for some in self._some(vectors.shape[0]):
            out[some] = self._back(self._rotate(vectors[some]).mul_(scale))
        return out

    def _some(self, n: int, each: int = 1) -> Iterator[slice]:
        """Cut n items, of so many vectors each, into as many as are best rotated at a time."""
        vector = 4 * self.size * self.eigenvalues.element_size()
        return chunks(n, each * vector, budget=working_set(self.device))

    def coordinates(self, vectors: Tensor | RowMatrix) -> Iterator[Tensor]:
        """Yield the coordinates of vectors, or rows, in the eigenbasis, ``(m, p)`` at a time."""
        dtype = self.eigenvalues.dtype
        if not isinstance(vectors, RowMatrix):
            yield self._rotate(vectors).flatten(1)
            return
        factors = self.rotated_factors(vectors)
        if factors is None:
            for part in vectors.dense_parts(dtype):
                yield self._rotate(part).flatten(1)
        else:
            whole = Columns((slice(0, self.size),))
            yield from RowMatrix([(whole, factors)], self.size).dense_parts(dtype)

    def rotated_factors(self, rows: RowMatrix) -> FactoredRows | None:
        """Return rows in the eigenbasis, kept as factors; None if they are not of this layer's."""
        factors = rows.groups[0][1] if len(rows.groups) == 1 else None
        if not isinstance(factors, FactoredRows) or factors.layout != self.layout:
            return None
        a, s = (tensor.to(self.eigenvalues.dtype) for tensor in factors.tensors)
        if self.input_basis is not None:
            a = torch.einsum("mtgi,gij->mtgj", a, self.input_basis)
        if self.output_basis is not None:
            s = torch.einsum("mctgo,gop->mctgp", s, self.output_basis)
        layout = MatrixLayout(self.layout.groups, self.layout.out, self.layout.columns)
        return FactoredRows(a, s, layout)

    def _rotate(self, vectors: Tensor) -> Tensor:
        """Return the coordinates of vectors in the eigenbasis, ``(k, groups, out, columns)``."""
        matrices = self.layout.matrices(vectors, self.eigenvalues.dtype)
        if self.output_basis is not None:
            matrices = self.output_basis.mT @ matrices
        if self.input_basis is not None:
            matrices = matrices @ self.input_basis
        return matrices.clone() if matrices.data_ptr() == vectors.data_ptr() else matrices

    def _back(self, rotated: Tensor) -> Tensor:
        """Return the vectors of coordinates in the eigenbasis, ``(k, p)``."""
        if self.output_basis is not None:
            rotated = self.output_basis @ rotated
        if self.input_basis is not None:
            rotated = rotated @ self.input_basis.mT
        return self.layout.flatten(rotated)

    def wide_eigenvalues(self) -> Tensor:
        """Return the eigenvalues in the accumulation dtype."""
        return self.eigenvalues.to(accumulation_dtype(self.device))

    def _check(self, damping: float) -> None:
        if self._range is None:  # read once, so that solving never waits for it again
            least, largest = torch.stack(torch.aminmax(self.eigenvalues)).tolist()
            self._range = least, largest
        check_eigenvalues(*self._range, damping, self.size, self.eigenvalues.dtype)


class _KroneckerSpectrum(EigenSpectrum):
    """Quadratic forms of a layer's rows of one position without their outer products."""

    def __init__(self, operator: EigenKroneckerOperator) -> None:
        eigenvalues = operator.wide_eigenvalues()
        precision = operator.eigenvalues.dtype
        super().__init__(eigenvalues.flatten(), 0, self._squares, precision)
        self._operator = operator

    def quadratics(self, vectors: Tensor | RowMatrix, dampings: Sequence[float]) -> Tensor:
        """Return ``vᵀ (F + λ I)⁻¹ v`` for L dampings and k vectors or rows, shape ``(L, k)``."""
        rows = self._operator.rotated_factors(vectors) if isinstance(vectors, RowMatrix) else None
        if rows is None or rows.positions > 1:
            return super().quadratics(vectors, dampings)
        self.check(dampings)
        eigenvalues = self._operator.wide_eigenvalues()
        a = rows.inputs[:, 0].to(eigenvalues.dtype).square_().transpose(0, 1)  # (groups, n, in)
        s = rows.signals[:, :, 0].to(eigenvalues.dtype).square_()  # (n, c, groups, out)
        out = []
        for damping in dampings:
            weighted = a @ (1 / (eigenvalues + damping)).mT  # (groups, n, out)
            out.append((s * weighted.transpose(0, 1)[:, None]).sum((2, 3)).flatten())
        return torch.stack(out)

    def _squares(self, vectors: Tensor | RowMatrix) -> Iterator[tuple[Tensor, Tensor]]:
        for part in self._operator.coordinates(vectors):
            squares = part.to(accumulation_dtype(part.device)).square_()
            yield squares, squares.new_zeros(len(squares))
