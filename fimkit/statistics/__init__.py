"""Streaming accumulators over batches."""

from fimkit.statistics.diagonal import DiagonalAccumulator
from fimkit.statistics.fisher import FisherAccumulator, Solver
from fimkit.statistics.kronecker import (
    LayerStatistics,
    WeightSharing,
    layer_statistics,
    set_eigenbases,
)
from fimkit.statistics.rows import RowAccumulator

__all__ = [
    "DiagonalAccumulator",
    "FisherAccumulator",
    "LayerStatistics",
    "RowAccumulator",
    "Solver",
    "WeightSharing",
    "layer_statistics",
    "set_eigenbases",
]
