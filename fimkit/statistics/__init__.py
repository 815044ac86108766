"""Streaming accumulators over batches."""

from fimkit.statistics.fisher import FisherAccumulator
from fimkit.statistics.rows import RowAccumulator

__all__ = ["FisherAccumulator", "RowAccumulator"]
