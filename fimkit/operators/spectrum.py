"""Inverse quadratic forms and determinants at many dampings from one eigendecomposition."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fimkit.operators.cholesky import check_eigenvalues
from fimkit.operators.row_matrix import RowMatrix

__all__ = ["EigenSpectrum", "Spectrum"]


class Spectrum(ABC):
    """What scoring an operator at many dampings takes."""

    @abstractmethod
    def quadratics(self, vectors: Tensor | RowMatrix, dampings: Sequence[float]) -> Tensor:
        """Return ``vᵀ (F + λ I)⁻¹ v`` for L dampings and k vectors or rows, shape ``(L, k)``."""

    @abstractmethod
    def logdets(self, dampings: Sequence[float]) -> list[float]:
        """Return ``log det(F + λ I)`` for each damping."""


class EigenSpectrum(Spectrum):
    """Eigenvalues of an operator, and the squared coordinates of vectors along its eigenvectors.

    Parameters
    ----------
    eigenvalues : Tensor of shape (m,)
        Those kept, float64.
    rest : int
        Number of further eigenvalues, all zero.
    coordinates : callable
        Takes vectors or rows to their ``(m_i, m)`` squared coordinates and the ``(m_i,)`` squared
        norms of what they leave out, some at a time.
    precision : torch.dtype, optional
        What the eigenvalues were computed in, where that is coarser than their dtype.
    """

    def __init__(
        self,
        eigenvalues: Tensor,
        rest: int,
        coordinates: Callable[[Tensor | RowMatrix], Iterable[tuple[Tensor, Tensor]]],
        precision: torch.dtype | None = None,
    ) -> None:
        self._eigenvalues = eigenvalues
        self._rest = rest
        self._coordinates = coordinates
        self._precision = precision or eigenvalues.dtype

    def quadratics(self, vectors: Tensor | RowMatrix, dampings: Sequence[float]) -> Tensor:
        """Return ``vᵀ (F + λ I)⁻¹ v`` for L dampings and k vectors or rows, shape ``(L, k)``."""
        self.check(dampings)
        parts = [self._quadratics(*part, dampings) for part in self._coordinates(vectors)]
        return torch.cat(parts, 1)

    def _quadratics(self, squares: Tensor, left: Tensor, dampings: Sequence[float]) -> Tensor:
        out = []
        for damping in dampings:
            values = squares @ (1 / (self._eigenvalues + damping))
            out.append(values + left / damping if self._rest else values)
        return torch.stack(out)

    def logdets(self, dampings: Sequence[float]) -> list[float]:
        """Return ``log det(F + λ I)`` for each damping."""
        self.check(dampings)
        out = []
        for damping in dampings:
            rest = self._rest * math.log(damping) if self._rest else 0.0
            out.append(float((self._eigenvalues + damping).log().sum()) + rest)
        return out

    def check(self, dampings: Sequence[float]) -> None:
        """Raise if the operator is singular at any of these dampings."""
        values = self._eigenvalues
        least = 0.0 if self._rest or not len(values) else float(values.min())
        largest = float(values.max()) if len(values) else 0.0
        for damping in dampings:
            check_eigenvalues(least, largest, damping, len(values) + self._rest, self._precision)
