"""Streaming accumulators over batches."""

from fimkit.statistics.diagonal import DiagonalAccumulator
from fimkit.statistics.fisher import FisherAccumulator, Solver
from fimkit.statistics.kronecker import (
    LayerStatistics,
    WeightSharing,
    begin_eigenvalues,
    layer_statistics,
    set_eigenbases,
)
from fimkit.statistics.rows import GrowingList, RowAccumulator
from fimkit.statistics.storage import RowFolder, StoredRowAccumulator

__all__ = [
    "DiagonalAccumulator",
    "FisherAccumulator",
    "GrowingList",
    "LayerStatistics",
    "RowAccumulator",
    "RowFolder",
    "Solver",
    "StoredRowAccumulator",
    "WeightSharing",
    "begin_eigenvalues",
    "layer_statistics",
    "set_eigenbases",
]
