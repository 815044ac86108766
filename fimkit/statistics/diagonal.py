"""The diagonal of the Fisher information matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fimkit.distributed import Ranks
from fimkit.operators import EigenKroneckerOperator, RowMatrix
from fimkit.operators.memory import accumulation_dtype

__all__ = ["DiagonalAccumulator"]


class DiagonalAccumulator:
    """Accumulates the mean over examples of the squared rows.

    Parameters
    ----------
    size : int
        Number of parameters.
    like : Tensor
        Dtype and device of the diagonal; sums are float64.
    """

    def __init__(self, size: int, like: Tensor) -> None:
        self._like = like
        wide = accumulation_dtype(like.device)
        self._sum = torch.zeros(size, dtype=wide, device=like.device)

    def update(self, rows: RowMatrix) -> None:
        """Add the rows of one batch."""
        self._sum += rows.diagonal(rows.flat_weights(self._like)).to(self._sum)

    def reduce(self, ranks: Ranks) -> None:
        """Add what the other ranks accumulated."""
        ranks.add_up(self._sum)

    def state_dict(self) -> dict[str, Any]:
        """Return what has been accumulated."""
        return {"sum": self._sum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what was accumulated before."""
        self._sum = state["sum"]

    def result(self, n: int) -> EigenKroneckerOperator:
        """Return the operator of n examples."""
        return EigenKroneckerOperator.diagonal_of((self._sum / n).to(self._like))
