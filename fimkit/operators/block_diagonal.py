"""A curvature operator made of one operator per block of parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from fimkit.exceptions import IFVPUsageError, SingularFisherError
from fimkit.operators.base import Operator
from fimkit.operators.row_matrix import Columns, RowMatrix
from fimkit.operators.spectrum import Spectrum

__all__ = ["BlockDiagonalOperator"]

T = TypeVar("T")

Damping = float | Sequence[float] | Mapping[str, float]


class BlockDiagonalOperator(Operator):
    """Independent operators on disjoint columns that together cover all parameters.

    ``damping`` may be one number, one per block in order, or a mapping from their names.

    Parameters
    ----------
    blocks : mapping of str to (Columns, Operator)
        Named blocks.
    """

    def __init__(self, blocks: dict[str, tuple[Columns, Operator]]) -> None:
        self.blocks = blocks
        self.size = sum(columns.size for columns, _ in blocks.values())
        self.device = next(iter(blocks.values()))[1].device

    def matmul(self, vectors: Tensor, damping: Damping = 0.0) -> Tensor:
        """Return ``(F + damping I) v`` for each of ``(k, p)`` vectors."""
        out = torch.empty_like(vectors)
        products = self._each(damping, lambda c, block, value: block.matmul(c.take(vectors), value))
        for columns, values in products:
            columns.put(out, values)
        return out

    def solve(self, vectors: Tensor, damping: Damping, out: Tensor | None = None) -> Tensor:
        """Return ``(F + damping I)⁻¹ v`` for each of ``(k, p)`` vectors, in ``out`` if given."""
        found = torch.empty_like(vectors) if out is None else out
        solved = self._each(
            damping,
            lambda c, block, value: block.solve(
                c.take(vectors), value, c.take(found) if c.contiguous else None
            ),
        )
        for columns, values in solved:
            if not columns.contiguous:
                columns.put(found, values)
        return found

    def solve_rows(self, rows: RowMatrix, damping: Damping, out: Tensor) -> None:
        """Write ``(F + damping I)⁻¹ v`` for each row into ``out``, shape ``(n * c, p)``."""

        def solve(columns: Columns, block: Operator, value: float) -> Tensor:
            inner = rows.block(columns)
            found = columns.take(out) if columns.contiguous else out.new_empty(inner.shape)
            block.solve_rows(inner, value, found)
            return found

        for columns, values in self._each(damping, solve):
            if not columns.contiguous:
                columns.put(out, values)

    def inverse_quadratic(self, vectors: Tensor | RowMatrix, damping: Damping) -> Tensor:
        """Return ``vᵀ (F + damping I)⁻¹ v`` for each vector, or each row, shape ``(k,)``."""
        parts = self._each(
            damping, lambda c, block, value: block.inverse_quadratic(_within(c, vectors), value)
        )
        return torch.stack([values for _, values in parts]).sum(0)

    def diagonal(self, damping: Damping = 0.0) -> Tensor:
        """Return the diagonal of ``F + damping I``, shape ``(p,)``."""
        parts = list(self._each(damping, lambda _, block, value: block.diagonal(value)))
        out = parts[0][1].new_empty(self.size)
        for columns, values in parts:
            columns.put(out[None], values[None])
        return out

    def trace(self, damping: Damping = 0.0) -> float:
        """Return the trace of ``F + damping I``."""
        return sum(t for _, t in self._each(damping, lambda _, block, value: block.trace(value)))

    def logdet(self, damping: Damping) -> float:
        """Return ``log det(F + damping I)``."""
        return sum(t for _, t in self._each(damping, lambda _, block, value: block.logdet(value)))

    def spectrum(self) -> Spectrum:
        """Return what gives inverse quadratic forms and log determinants at many dampings."""
        return _BlockSpectrum(
            {name: (columns, block.spectrum()) for name, (columns, block) in self.blocks.items()}
        )

    def to_dense(self, damping: Damping = 0.0) -> Tensor:
        """Return ``F + damping I`` as a ``(p, p)`` tensor."""
        parts = list(self._each(damping, lambda _, block, value: block.to_dense(value)))
        out = parts[0][1].new_zeros((self.size, self.size))
        for columns, matrix in parts:
            indices = torch.cat(
                [torch.arange(part.start, part.stop, device=out.device) for part in columns.parts]
            )
            out[indices[:, None], indices] = matrix
        return out

    def _each(
        self, damping: Damping, function: Callable[[Columns, Operator, float], T]
    ) -> Iterator[tuple[Columns, T]]:
        """Yield every block's columns and what a function makes of them, its operator and its λ."""
        values = self._dampings(damping)
        for (name, (columns, operator)), value in zip(self.blocks.items(), values, strict=True):
            with _naming(name):
                found = function(columns, operator, value)
            yield columns, found

    def _dampings(self, damping: Damping) -> list[float]:
        """Return one λ per block, or raise what was given instead."""
        if isinstance(damping, int | float):
            return [damping] * len(self.blocks)
        if isinstance(damping, Mapping) and set(damping) == set(self.blocks):
            return [damping[name] for name in self.blocks]
        if isinstance(damping, Sequence) and len(damping) == len(self.blocks):
            return list(damping)
        raise IFVPUsageError(
            f"damping={damping!r}; expected one number, or one for each of the {len(self.blocks)} "
            f"blocks, in order or by name: {', '.join(self.blocks)}."
        )


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
