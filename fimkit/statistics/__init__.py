"""Streaming accumulators over batches."""

from fimkit.statistics.diagonal import DiagonalAccumulator
from fimkit.statistics.fisher import FisherAccumulator, Solver
from fimkit.statistics.kronecker import begin_eigenvalues, layer_statistics, set_eigenbases
from fimkit.statistics.layer import LayerStatistics, WeightSharing
from fimkit.statistics.linear import LinearStatistics
from fimkit.statistics.rows import GrowingList, RowAccumulator
from fimkit.statistics.storage import RowFolder, StoredRowAccumulator

__all__ = [
    "DiagonalAccumulator",
    "FisherAccumulator",
    "GrowingList",
    "LayerStatistics",
    "LinearStatistics",
    "RowAccumulator",
    "RowFolder",
    "Solver",
    "StoredRowAccumulator",
    "WeightSharing",
    "begin_eigenvalues",
    "layer_statistics",
    "set_eigenbases",
]
