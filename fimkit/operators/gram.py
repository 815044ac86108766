r"""The Fisher information matrix through the Gram matrix of its rows (dual), never formed.

With the weighted rows :math:`G` (r of them) and :math:`K = G G^\top / n`, the Woodbury identity
gives

.. math:: (F + \lambda I)^{-1} V
          = \bigl(V - (V G^\top)(n \lambda I + G G^\top)^{-1} G\bigr) / \lambda ,

which takes r × r numbers where F has p × p. The subtraction cancels nearly everything when V lies
in the span of the rows (training gradients do), so the Gram matrix, the products with V, the solve
and the subtraction are float64, in chunks, whatever the rows are stored in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fimkit.operators.base import Operator
from fimkit.operators.cholesky import DampedCholesky, singular
from fimkit.operators.eigh import eigh
from fimkit.operators.memory import accumulation_dtype
from fimkit.operators.row_matrix import RowMatrix, squared_norms
from fimkit.operators.spectrum import EigenSpectrum, Spectrum

__all__ = ["GramOperator"]


class GramOperator(Operator):
    """``F = (1/n) Σ w g gᵀ`` over the rows of a `RowMatrix`, solved in the space of rows.

    Parameters
    ----------
    rows : RowMatrix
        Gradients with their weights.
    n : int
        Number of examples; those without rows count, too.
    device : torch.device
        Where the rows are.
    """

    def __init__(self, rows: RowMatrix, n: int, device: torch.device) -> None:
        self.rows = rows
        self.n = n
        self.size = rows.size
        self.device = device
        dtype = accumulation_dtype(device)
        gram = rows.gram(dtype, device)
        self._scale = (rows.flat_weights(gram) / n).sqrt()
        gram.mul_(self._scale[:, None]).mul_(self._scale)
        self._cholesky = DampedCholesky(gram)

    @property
    def gram(self) -> Tensor:
        """Inner products of the weighted rows over n, shape ``(r, r)``: F's nonzero spectrum."""
        return self._cholesky.matrix

    def matmul(self, vectors: Tensor, damping: float = 0.0) -> Tensor:
        """Return ``(F + damping I) v`` for each of ``(k, p)`` vectors."""
        out = vectors * damping
        for some, columns, values in self.rows.combine(self._project(vectors) * self._scale):
            out[some, columns] = values.add_(vectors[some, columns], alpha=damping)
        return out

    def solve(self, vectors: Tensor, damping: float, out: Tensor | None = None) -> Tensor:
        """Return ``(F + damping I)⁻¹ v`` for each of ``(k, p)`` vectors, in ``out`` if given."""
        coefficients = self._coefficients(vectors, damping)
        out = torch.div(vectors, damping, out=out)
        for some, columns, values in self.rows.combine(coefficients):
            torch.sub(vectors[some, columns], values, out=values)
            out[some, columns] = values.div_(damping)
        return out

    def solve_rows(self, rows: RowMatrix, damping: float, out: Tensor) -> None:
        """Write ``(F + damping I)⁻¹ v`` for each row into ``out``, shape ``(n * c, p)``."""
        rows.less(self.rows.combine, self._coefficients(rows, damping), out)
        out.div_(damping)

    def inverse_quadratic(self, vectors: Tensor | RowMatrix, damping: float) -> Tensor:
        """Return ``vᵀ (F + damping I)⁻¹ v`` for each vector, or each row, shape ``(k,)``."""
        self._check(damping)
        white = self._cholesky.whiten(self._project(vectors).T, damping)
        return (squared_norms(vectors, self.gram.dtype) - white.square().sum(0)) / damping

    def diagonal(self, damping: float = 0.0) -> Tensor:
        """Return the diagonal of ``F + damping I``, shape ``(p,)``."""
        return self.rows.diagonal(self._scale.square()).add_(damping)

    def trace(self, damping: float = 0.0) -> float:
        """Return the trace of ``F + damping I``."""
        return self._cholesky.trace() + damping * self.size

    def logdet(self, damping: float) -> float:
        """Return ``log det(F + damping I)``."""
        self._check(damping)
        rest = self.size - self.gram.shape[0]
        return self._cholesky.logdet(damping) + rest * math.log(damping)

    def spectrum(self) -> Spectrum:
        """Return what gives inverse quadratic forms and log determinants at many dampings."""
        eigenvalues, basis = eigh(self.gram)
        kept = eigenvalues > torch.finfo(basis.dtype).eps * len(basis) * eigenvalues.max()
        eigenvalues, basis = eigenvalues[kept], basis[:, kept]

        def coordinates(vectors: Tensor | RowMatrix) -> Iterator[tuple[Tensor, Tensor]]:
            squares = (self._project(vectors) @ basis).square() / eigenvalues
            yield squares, (squared_norms(vectors, self.gram.dtype) - squares.sum(1)).clamp_(min=0)

        return EigenSpectrum(eigenvalues, self.size - len(eigenvalues), coordinates)

    def to_dense(self, damping: float = 0.0) -> Tensor:
        """Return ``F + damping I`` as a ``(p, p)`` tensor."""
        out = self.rows.outer(self._scale)
        out.diagonal().add_(damping)
        return out

    def _coefficients(self, vectors: Tensor | RowMatrix, damping: float) -> Tensor:
        """Return the combinations of rows that vectors lose when solving, shape ``(k, r)``."""
        self._check(damping)
        return self._cholesky.solve(self._project(vectors).T, damping).T * self._scale

    def _project(self, vectors: Tensor | RowMatrix) -> Tensor:
        if isinstance(vectors, RowMatrix):
            products = self.rows.products(vectors, self.gram.dtype, self.device).T
        else:
            products = self.rows.project(vectors, self.gram.dtype)
        return products * self._scale

    def _check(self, damping: float) -> None:
        if damping <= torch.finfo(self.gram.dtype).eps * self._largest(damping):
            raise singular(
                damping, f"its rank is at most {self.gram.shape[0]} of {self.size} parameters"
            )

    def _largest(self, damping: float) -> float:
        """Bound F's largest eigenvalue, closely only where ``damping`` is near its rounding."""
        trace = self.trace()
        if damping > torch.finfo(self.gram.dtype).eps * trace:
            return trace
        return float(torch.linalg.eigvalsh(self.gram)[-1])
