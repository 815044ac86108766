"""Cholesky factors of damped matrices, with the last one kept and singular ones refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fimkit.exceptions import SingularFisherError

__all__ = ["DampedCholesky", "check_eigenvalues", "singular"]


def singular(damping: float, why: str) -> SingularFisherError:
    """Return the error for an inverse that does not exist in floating point."""
    return SingularFisherError(
        f"The Fisher information matrix damped with regularization={damping:g} is singular to "
        f"working precision: {why}. Use a larger regularization, such as a tenth of the mean of "
        "the Fisher's diagonal."
    )


def check_eigenvalues(
    least: float, largest: float, damping: float, size: int, dtype: torch.dtype
) -> None:
    """Raise if eigenvalues from ``least`` to ``largest``, known in ``dtype``, are singular.

    Undamped, the least must exceed the rounding of ``size`` eigenvalues' largest; a damping is
    exact, and only has to exceed the rounding of one. Its inverse must be a number of ``dtype``.
    """
    eps = torch.finfo(dtype).eps * (1 if damping else size)
    if least + damping < torch.finfo(dtype).tiny:
        raise singular(damping, "the inverse of its smallest eigenvalue is not finite")
    if not least + damping > eps * largest:
        raise singular(damping, f"its smallest eigenvalue is below {eps:.1g} of the largest")


class DampedCholesky:
    """Lower Cholesky factors of ``matrix + damping I``; only the last one is kept.

    A kept factor is never pickled.

    Parameters
    ----------
    matrix : Tensor of shape (m, m)
        Symmetric positive semi-definite.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self._kept: tuple[float, Tensor] | None = None
        self._trace: float | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def factor(self, damping: float) -> Tensor:
        """Return the lower factor ``L`` with ``L Lᵀ = matrix + damping I``."""
        kept = self._kept
        if kept is not None and kept[0] == damping:
            return kept[1]
        factor = self.matrix.detach().clone(memory_format=torch.contiguous_format).T  # by columns
        factor.diagonal().add_(damping)
        info = torch.empty((), dtype=torch.int32, device=factor.device)
        torch.linalg.cholesky_ex(factor, out=(factor, info))
        if int(info) != 0:
            raise singular(damping, "it is not positive definite")
        self._kept = (damping, factor)
        return factor

    def solve(self, columns: Tensor, damping: float) -> Tensor:
        """Return ``(matrix + damping I)⁻¹ columns`` for an ``(m, k)`` tensor."""
        factor = self.factor(damping)  # which cholesky_solve would copy
        white = torch.linalg.solve_triangular(factor, columns, upper=False)
        solution: Tensor = torch.linalg.solve_triangular(factor.mT, white, upper=True)
        return solution

    def whiten(self, columns: Tensor, damping: float) -> Tensor:
        """Return ``L⁻¹ columns``, whose squares sum to the inverse quadratic form."""
        white: Tensor = torch.linalg.solve_triangular(self.factor(damping), columns, upper=False)
        return white

    def logdet(self, damping: float) -> float:
        """Return ``log det(matrix + damping I)``."""
        return 2 * float(self.factor(damping).diagonal().log().sum())

    def trace(self) -> float:
        """Return the trace of the matrix."""
        if self._trace is None:
            self._trace = float(self.matrix.diagonal().sum())
        return self._trace

    def is_singular(self, damping: float) -> bool:
        """Whether ``damping`` is too small for an inverse: λ_min + damping < m · eps · λ_max."""
        eps = torch.finfo(self.matrix.dtype).eps * self.matrix.shape[0]
        if damping > eps * self.trace():  # which bounds λ_max
            return False
        eigenvalues = torch.linalg.eigvalsh(self.matrix)
        return (
            bool(eigenvalues[0] + damping < eps * eigenvalues[-1])
            or float(eigenvalues[-1]) + damping <= 0
        )
