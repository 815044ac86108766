"""Rows of every batch, kept."""

from __future__ import annotations

from fimkit.operators import RowMatrix

__all__ = ["RowAccumulator"]


class RowAccumulator:
    """Collects the rows of batches into one `RowMatrix`."""

    def __init__(self) -> None:
        self._parts: list[RowMatrix] = []

    def update(self, rows: RowMatrix) -> None:
        """Add the rows of one batch."""
        self._parts.append(rows)

    def result(self) -> RowMatrix:
        """Return the rows of all batches, in order."""
        return RowMatrix.cat(self._parts)
