"""What every curvature operator answers."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from fimkit.operators.row_matrix import RowMatrix
from fimkit.operators.spectrum import Spectrum

__all__ = ["Operator"]


class Operator(ABC):
    """A symmetric positive semi-definite ``(p, p)`` matrix ``F`` that is applied, not indexed.

    ``F`` itself is undamped; ``damping`` is an argument of everything that is asked of it. An
    operator that approximates the damped inverse itself has no ``F``: its ``F + damping I`` is the
    inverse of what `solve` multiplies by, and there is none without damping.

    Vectors are ``(k, p)`` tensors of any floating dtype on the operator's device; results have the
    vectors' dtype, whatever precision the arithmetic needs. Scalars are float64. Of quadratic forms
    the vectors may be the k rows of a `RowMatrix`, which are then kept as they are wherever that
    is cheaper.
    """

    #: Number of parameters p.
    size: int
    #: Where the operator's tensors live and its vectors are expected.
    device: torch.device

    @property
    def shape(self) -> tuple[int, int]:
        """``(p, p)``."""
        return self.size, self.size

    @abstractmethod
    def matmul(self, vectors: Tensor, damping: float = 0.0) -> Tensor:
        """Return ``(F + damping I) v`` for each of ``(k, p)`` vectors."""

    @abstractmethod
    def solve(self, vectors: Tensor, damping: float, out: Tensor | None = None) -> Tensor:
        """Return ``(F + damping I)⁻¹ v`` for each of ``(k, p)`` vectors, in ``out`` if given."""

    def solve_rows(self, rows: RowMatrix, damping: float, out: Tensor) -> None:
        """Write ``(F + damping I)⁻¹ v`` for each row into ``out``, shape ``(n * c, p)``."""
        start = 0
        for part in rows.dense_parts(out.dtype):
            self.solve(part, damping, out[start : start + len(part)])
            start += len(part)

    @abstractmethod
    def inverse_quadratic(self, vectors: Tensor | RowMatrix, damping: float) -> Tensor:
        """Return ``vᵀ (F + damping I)⁻¹ v`` for each vector, or each row, shape ``(k,)``."""

    @abstractmethod
    def diagonal(self, damping: float = 0.0) -> Tensor:
        """Return the diagonal of ``F + damping I``, shape ``(p,)``."""

    @abstractmethod
    def trace(self, damping: float = 0.0) -> float:
        """Return the trace of ``F + damping I``."""

    @abstractmethod
    def logdet(self, damping: float) -> float:
        """Return ``log det(F + damping I)``."""

    @abstractmethod
    def spectrum(self) -> Spectrum:
        """Return what gives inverse quadratic forms and log determinants at many dampings."""

    @abstractmethod
    def to_dense(self, damping: float = 0.0) -> Tensor:
        """Return ``F + damping I`` as a ``(p, p)`` tensor."""
