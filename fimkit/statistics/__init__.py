"""Streaming accumulators over batches."""

from fimkit.statistics.fisher import FisherAccumulator, Solver
from fimkit.statistics.rows import RowAccumulator

__all__ = ["FisherAccumulator", "RowAccumulator", "Solver"]
