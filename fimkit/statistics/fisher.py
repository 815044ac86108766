"""The Fisher information matrix of one block: its rows while they are few, then the matrix."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fimkit.distributed import Ranks
from fimkit.exceptions import IFVPUsageError
from fimkit.operators import DenseOperator, GramOperator, Operator, RowMatrix
from fimkit.operators.memory import accumulation_dtype, chunks
from fimkit.operators.symmetric import add_products, mirror_
from fimkit.statistics.rows import RowAccumulator

__all__ = ["FisherAccumulator", "Solver"]

Solver = Literal["auto", "primal", "dual"]


class FisherAccumulator:
    """Accumulates ``F = (1/n) Σ w g gᵀ`` over batches, in the smaller of its two forms.

    The dual form keeps r rows and needs their r × r Gram matrix; the primal form adds each
    batch's rows to a p × p matrix in float64 and forgets them. ``"auto"`` starts dual and turns
    primal once there are at least p rows, on all ranks together.

    Parameters
    ----------
    size : int
        Number of parameters p of the block.
    device : torch.device
    solver : {"auto", "primal", "dual"}
    """

    def __init__(self, size: int, device: torch.device, solver: Solver = "auto") -> None:
        self.size = size
        self.device = device
        self._solver = solver
        self._n_rows = 0
        self._rows = RowAccumulator()
        self._ranks = Ranks()
        self._matrix: Tensor | None = None
        if solver == "primal":
            self._turn_primal()

    def update(self, rows: RowMatrix) -> None:
        """Add the rows of one batch."""
        self._n_rows += rows.shape[0]
        if self._matrix is not None:
            self._add(rows)
            return
        self._rows.update(rows)
        if self._solver == "auto" and self._n_rows >= self.size:
            self._turn_primal()

    def reduce(self, ranks: Ranks) -> None:
        """Add what the other ranks accumulated; rows stay where they are."""
        self._ranks = ranks
        self._n_rows = sum(ranks.gather(self._n_rows))
        if self._solver == "auto" and self._n_rows >= self.size and self._matrix is None:
            self._turn_primal()
        if self._matrix is not None:
            ranks.add_up(self._matrix)

    def state_dict(self) -> dict[str, Any]:
        """Return what has been accumulated."""
        return {"n_rows": self._n_rows, "matrix": self._matrix, "rows": self._rows.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what was accumulated before."""
        self._n_rows, self._matrix = state["n_rows"], state["matrix"]
        self._rows.load_state_dict(state["rows"])

    def result(self, n: int) -> Operator:
        """Return the operator of n examples, those without any row in this block counted.

        The accumulator ends with that: its matrix is the operator's.
        """
        matrix, self._matrix = self._matrix, None
        if matrix is not None:
            return DenseOperator(mirror_(matrix.div_(n)))
        return GramOperator(self._rows.result(self._ranks), n, self.device)

    def _turn_primal(self) -> None:
        dtype = accumulation_dtype(self.device)
        try:
            self._matrix = torch.zeros((self.size,) * 2, dtype=dtype, device=self.device)
        except RuntimeError as error:  # of which running out of memory is one
            raise IFVPUsageError(
                f"the primal form of {self.size} parameters is a matrix of "
                f"{self.size**2 * dtype.itemsize / 1e9:,.0f} GB, for which there is no memory; "
                "use solver='dual', whose size is that of the data, or smaller blocks=, or EKFAC."
            ) from error
        if self._n_rows:
            self._add(self._rows.result())
            self._rows = RowAccumulator()

    def _add(self, rows: RowMatrix) -> None:
        assert self._matrix is not None
        dtype = self._matrix.dtype
        for part in chunks(rows.n, rows.c * rows.size * dtype.itemsize):
            dense = rows.dense(part, dtype)
            weighted = dense
            if rows.weights is not None:
                weighted = dense * rows.weights[part].to(dense).reshape(-1, 1)
            add_products(self._matrix, dense[None], weighted[None])
