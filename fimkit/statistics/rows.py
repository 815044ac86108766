"""Rows of every batch, kept."""

from __future__ import annotations

from typing import Any

from fimkit.distributed import Ranks
from fimkit.operators import RowMatrix, ShardedRowMatrix

__all__ = ["GrowingList", "RowAccumulator"]


class GrowingList(list[RowMatrix]):
    """Rows in a state that only become more, so that what has been written need not be again."""


class RowAccumulator:
    """Collects the rows of batches into one `RowMatrix`."""

    def __init__(self) -> None:
        self._parts = GrowingList()

    def update(self, rows: RowMatrix) -> None:
        """Add the rows of one batch."""
        self._parts.append(rows)

    def state_dict(self) -> dict[str, Any]:
        """Return what has been accumulated."""
        return {"parts": self._parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what was accumulated before."""
        self._parts = GrowingList(state["parts"])

    def result(self, ranks: Ranks | None = None) -> RowMatrix:
        """Return the rows of all batches, in order; those of all ranks stay where they are."""
        return divided(RowMatrix.cat(self._parts), ranks)


def divided(rows: RowMatrix, ranks: Ranks | None) -> RowMatrix:
    """Return this rank's rows as part of those of all ranks."""
    return rows if ranks is None or ranks.alone else ShardedRowMatrix(rows, ranks)
