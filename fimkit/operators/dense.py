"""The Fisher information matrix as a dense matrix (primal)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fimkit.operators.base import Operator
from fimkit.operators.cholesky import DampedCholesky, singular
from fimkit.operators.eigh import eigh
from fimkit.operators.row_matrix import RowMatrix
from fimkit.operators.spectrum import EigenSpectrum, Spectrum

__all__ = ["DenseOperator"]


class DenseOperator(Operator):
    """``F`` itself, solved by Cholesky.

    Parameters
    ----------
    matrix : Tensor of shape (p, p)
        Symmetric positive semi-definite, float64 where the device has it.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.size = matrix.shape[0]
        self.device = matrix.device
        self._cholesky = DampedCholesky(matrix)

    def matmul(self, vectors: Tensor, damping: float = 0.0) -> Tensor:
        """Return ``(F + damping I) v`` for each of ``(k, p)`` vectors."""
        wide = vectors.to(self.matrix.dtype)
        return torch.addmm(wide, wide, self.matrix, beta=damping).to(vectors.dtype)

    def solve(self, vectors: Tensor, damping: float, out: Tensor | None = None) -> Tensor:
        """Return ``(F + damping I)⁻¹ v`` for each of ``(k, p)`` vectors, in ``out`` if given."""
        self._check(damping)
        columns = vectors.to(self.matrix.dtype).T
        solved = self._cholesky.solve(columns, damping).T
        return solved.to(vectors.dtype) if out is None else out.copy_(solved)

    def inverse_quadratic(self, vectors: Tensor | RowMatrix, damping: float) -> Tensor:
        """Return ``vᵀ (F + damping I)⁻¹ v`` for each vector, or each row, shape ``(k,)``."""
        self._check(damping)
        parts = [
            self._cholesky.whiten(part.T, damping).square().sum(0) for part in self._parts(vectors)
        ]
        return torch.cat(parts)

    def diagonal(self, damping: float = 0.0) -> Tensor:
        """Return the diagonal of ``F + damping I``, shape ``(p,)``."""
        return self.matrix.diagonal() + damping

    def trace(self, damping: float = 0.0) -> float:
        """Return the trace of ``F + damping I``."""
        return self._cholesky.trace() + damping * self.size

    def logdet(self, damping: float) -> float:
        """Return ``log det(F + damping I)``."""
        self._check(damping)
        return self._cholesky.logdet(damping)

    def spectrum(self) -> Spectrum:
        """Return what gives inverse quadratic forms and log determinants at many dampings."""
        eigenvalues, basis = eigh(self.matrix)

        def coordinates(vectors: Tensor | RowMatrix) -> Iterator[tuple[Tensor, Tensor]]:
            for part in self._parts(vectors):
                squares = (part @ basis).square()
                yield squares, squares.new_zeros(len(squares))

        return EigenSpectrum(eigenvalues, 0, coordinates)

    def to_dense(self, damping: float = 0.0) -> Tensor:
        """Return ``F + damping I`` as a ``(p, p)`` tensor."""
        out = self.matrix.clone()
        out.diagonal().add_(damping)
        return out

    def _parts(self, vectors: Tensor | RowMatrix) -> Iterable[Tensor]:
        """Return vectors, or rows some at a time, in the matrix's dtype."""
        if isinstance(vectors, RowMatrix):
            return vectors.dense_parts(self.matrix.dtype)
        return [vectors.to(self.matrix.dtype)]

    def _check(self, damping: float) -> None:
        if self._cholesky.is_singular(damping):
            size = torch.finfo(self.matrix.dtype).eps * self.size
            raise singular(damping, f"its smallest eigenvalue is below {size:.1g} of the largest")
