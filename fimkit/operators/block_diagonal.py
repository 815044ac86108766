"""A curvature operator made of one operator per block of parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fimkit.exceptions import SingularFisherError
from fimkit.operators.base import Operator
from fimkit.operators.row_matrix import Columns, RowMatrix
from fimkit.operators.spectrum import Spectrum

__all__ = ["BlockDiagonalOperator"]


class BlockDiagonalOperator(Operator):
    """Independent operators on disjoint columns that together cover all parameters.

    ``damping`` may be one number, or one per block in order.

    Parameters
    ----------
    blocks : mapping of str to (Columns, Operator)
        Named blocks.
    """

    def __init__(self, blocks: dict[str, tuple[Columns, Operator]]) -> None:
        self.blocks = blocks
        self.size = sum(columns.size for columns, _ in blocks.values())
        self.device = next(iter(blocks.values()))[1].device

    def matmul(self, vectors: Tensor, damping: float | Sequence[float] = 0.0) -> Tensor:
        """Return ``(F + damping I) v`` for each of ``(k, p)`` vectors."""
        out = torch.empty_like(vectors)
        for _, (columns, operator), value in self._named(damping):
            columns.put(out, operator.matmul(columns.take(vectors), value))
        return out

    def solve(self, vectors: Tensor, damping: float | Sequence[float]) -> Tensor:
        """Return ``(F + damping I)⁻¹ v`` for each of ``(k, p)`` vectors."""
        out = torch.empty_like(vectors)
        for name, (columns, operator), value in self._named(damping):
            with _naming(name):
                columns.put(out, operator.solve(columns.take(vectors), value))
        return out

    def solve_rows(
        self, rows: RowMatrix, damping: float | Sequence[float], dtype: torch.dtype
    ) -> Tensor:
        """Return ``(F + damping I)⁻¹ v`` for each row, in ``dtype``, shape ``(n * c, p)``."""
        out = torch.empty(rows.shape, dtype=dtype, device=self.device)
        for name, (columns, operator), value in self._named(damping):
            with _naming(name):
                columns.put(out, operator.solve_rows(rows.block(columns), value, dtype))
        return out

    def inverse_quadratic(
        self, vectors: Tensor | RowMatrix, damping: float | Sequence[float]
    ) -> Tensor:
        """Return ``vᵀ (F + damping I)⁻¹ v`` for each vector, or each row, shape ``(k,)``."""
        parts = []
        for name, (columns, operator), value in self._named(damping):
            with _naming(name):
                parts.append(operator.inverse_quadratic(_within(columns, vectors), value))
        return torch.stack(parts).sum(0)

    def diagonal(self, damping: float | Sequence[float] = 0.0) -> Tensor:
        """Return the diagonal of ``F + damping I``, shape ``(p,)``."""
        parts = [
            (columns, block.diagonal(value)) for _, (columns, block), value in self._named(damping)
        ]
        out = parts[0][1].new_empty(self.size)
        for columns, values in parts:
            columns.put(out[None], values[None])
        return out

    def trace(self, damping: float | Sequence[float] = 0.0) -> float:
        """Return the trace of ``F + damping I``."""
        return sum(operator.trace(value) for _, (_, operator), value in self._named(damping))

    def logdet(self, damping: float | Sequence[float]) -> float:
        """Return ``log det(F + damping I)``."""
        total = 0.0
        for name, (_, operator), value in self._named(damping):
            with _naming(name):
                total += operator.logdet(value)
        return total

    def spectrum(self) -> Spectrum:
        """Return what gives inverse quadratic forms and log determinants at many dampings."""
        return _BlockSpectrum(
            {name: (columns, block.spectrum()) for name, (columns, block) in self.blocks.items()}
        )

    def to_dense(self, damping: float | Sequence[float] = 0.0) -> Tensor:
        """Return ``F + damping I`` as a ``(p, p)`` tensor."""
        parts = [
            (columns, block.to_dense(value)) for _, (columns, block), value in self._named(damping)
        ]
        out = parts[0][1].new_zeros((self.size, self.size))
        for columns, matrix in parts:
            indices = torch.cat(
                [torch.arange(part.start, part.stop, device=out.device) for part in columns.parts]
            )
            out[indices[:, None], indices] = matrix
        return out

    def _named(
        self, damping: float | Sequence[float]
    ) -> Iterator[tuple[str, tuple[Columns, Operator], float]]:
        """Return names, blocks and dampings."""
        values = [damping] * len(self.blocks) if isinstance(damping, int | float) else damping
        return zip(self.blocks, self.blocks.values(), values, strict=True)


class _BlockSpectrum(Spectrum):
    """The spectra of all blocks, each met by its own columns and by the same dampings."""

    def __init__(self, blocks: dict[str, tuple[Columns, Spectrum]]) -> None:
        self._blocks = blocks

    def quadratics(self, vectors: Tensor | RowMatrix, dampings: Sequence[float]) -> Tensor:
        """Return the sum of all blocks' quadratic forms, shape ``(L, k)``."""
        parts = []
        for name, (columns, spectrum) in self._blocks.items():
            with _naming(name):
                parts.append(spectrum.quadratics(_within(columns, vectors), dampings))
        return torch.stack(parts).sum(0)

    def logdets(self, dampings: Sequence[float]) -> list[float]:
        """Return the sum of all blocks' log determinants for each damping."""
        parts = []
        for name, (_, spectrum) in self._blocks.items():
            with _naming(name):
                parts.append(spectrum.logdets(dampings))
        return [sum(values) for values in zip(*parts, strict=True)]


@contextmanager
def _naming(block: str) -> Iterator[None]:
    """Name the block whose damped matrix turns out to be singular."""
    try:
        yield
    except SingularFisherError as error:
        raise SingularFisherError(f"block {block!r}: {error}") from error


def _within(columns: Columns, vectors: Tensor | RowMatrix) -> Tensor | RowMatrix:
    """Return some columns of vectors, or of rows."""
    return vectors.block(columns) if isinstance(vectors, RowMatrix) else columns.take(vectors)
