"""Pure linear algebra on tensors: curvature operators that know neither models nor scikit-learn."""

from fimkit.operators.base import Operator
from fimkit.operators.block_diagonal import BlockDiagonalOperator
from fimkit.operators.datainf import DataInfOperator
from fimkit.operators.dense import DenseOperator
from fimkit.operators.factored import FactoredRows, join_columns
from fimkit.operators.gram import GramOperator
from fimkit.operators.kronecker import EigenKroneckerOperator
from fimkit.operators.layout import MatrixLayout
from fimkit.operators.lookup import LookupRows
from fimkit.operators.row_matrix import Columns, RowMatrix, join_weights
from fimkit.operators.rows import DenseRows, Rows, ZeroRows, join_rows
from fimkit.operators.sharded import ShardedRowMatrix

__all__ = [
    "BlockDiagonalOperator",
    "Columns",
    "DataInfOperator",
    "DenseOperator",
    "DenseRows",
    "EigenKroneckerOperator",
    "FactoredRows",
    "GramOperator",
    "LookupRows",
    "MatrixLayout",
    "Operator",
    "RowMatrix",
    "Rows",
    "ShardedRowMatrix",
    "ZeroRows",
    "join_columns",
    "join_rows",
    "join_weights",
]
