"""Estimators' parameters and what they fitted, as JSON and tensors, and back, without any code."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fimkit.estimators.settings import Settings
from fimkit.exceptions import IFVPUsageError
from fimkit.gradients import Objective
from fimkit.losses import LOSSES, Loss, resolve_loss
from fimkit.operators import (
    BlockDiagonalOperator,
    Columns,
    DataInfOperator,
    DenseOperator,
    DenseRows,
    EigenKroneckerOperator,
    FactoredRows,
    GramOperator,
    LookupRows,
    MatrixLayout,
    RowMatrix,
    ShardedRowMatrix,
    ZeroRows,
)
from fimkit.vectors import ParameterSpace

__all__ = ["DAMAGE", "Restorer", "describe"]

#: What restoring contents that nothing wrote may raise.
DAMAGE = (
    AttributeError,
    IndexError,
    KeyError,
    OverflowError,
    RuntimeError,
    StopIteration,
    TypeError,
    ValueError,
)

# What is described by attributes that are arguments of its constructor, too, with their types. The
# Gram matrix and the norms of rows are not among them: they are computed again.
_FIELDS: dict[type, dict[str, Any]] = {
    BlockDiagonalOperator: {"blocks": dict},
    Columns: {"parts": tuple},
    DataInfOperator: {"rows": RowMatrix, "n": int, "joint": bool},
    DenseOperator: {"matrix": Tensor},
    DenseRows: {"rows": Tensor},
    EigenKroneckerOperator: {
        "layout": MatrixLayout,
        "eigenvalues": Tensor,
        "output_basis": Tensor | None,
        "input_basis": Tensor | None,
    },
    FactoredRows: {"inputs": Tensor, "signals": Tensor, "layout": MatrixLayout},
    GramOperator: {"rows": RowMatrix, "n": int},
    LookupRows: {"indices": Tensor, "signals": Tensor, "vocabulary": int},
    MatrixLayout: {"groups": int, "out": int, "in_": int, "bias": bool, "transposed": bool},
    Objective: {"loss": object, "fisher": str, "n_samples": int},
    ParameterSpace: {"shapes": dict, "full_size": int},
    RowMatrix: {"groups": list, "size": int, "weights": Tensor | None},
    Settings: {
        "objective": Objective,
        "seed": int,
        "patterns": tuple | None,
        "dtype": torch.dtype | None,
        "verbose": bool,
    },
    ZeroRows: {"n": int, "c": int, "width": int, "dtype": torch.dtype},
}
_CLASSES = {cls.__name__: cls for cls in _FIELDS}


def describe(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return a value as JSON.

    Parameters
    ----------
    value
        What a parameter may be, or a fitted attribute is.
    name : str
        Of the value, and of the tensor if it is one; those inside it have longer names.
    tensors : dict of str to Tensor
        Gets the tensors, which JSON cannot hold.

    Raises
    ------
    IFVPUsageError
        If something has no place in a file.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [describe(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
    if isinstance(value, tuple):
        return {"is": "tuple", "items": describe(list(value), name, tensors)}
    if isinstance(value, set):
        return {"is": "set", "items": describe(sorted(value), name, tensors)}
    if isinstance(value, Mapping):
        items = [[key, describe(item, f"{name}.{key}", tensors)] for key, item in value.items()]
        return {"is": "dict", "items": items}
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"is": "tensor", "name": name}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufU":
        return {"is": "array", "values": value.tolist(), "dtype": value.dtype.str}
    if isinstance(value, slice):
        return {"is": "slice", "start": value.start, "stop": value.stop}
    if isinstance(value, torch.dtype):
        return {"is": "dtype", "name": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"is": "device", "name": str(value)}
    if isinstance(value, os.PathLike):
        return {"is": "path", "name": os.fspath(value)}
    if isinstance(value, np.random.RandomState):
        kind, keys, *rest = value.get_state()
        return {"is": "RandomState", "state": [kind, np.asarray(keys).tolist(), *rest]}
    if isinstance(value, ShardedRowMatrix):
        value = value.whole()
    fields = _FIELDS.get(type(value))
    if fields is not None:
        parts = {
            field: describe(getattr(value, field), f"{name}.{field}", tensors) for field in fields
        }
        return {"is": type(value).__name__, **parts}
    if isinstance(value, Loss | nn.Module) or callable(value):
        return _described_loss(value)
    raise IFVPUsageError(
        f"{name} holds a {type(value).__name__}, which has no place in a file; pickle the "
        "estimator instead."
    )


def _described_loss(loss: Any) -> dict[str, str]:
    for name, cls in LOSSES.items():
        if type(loss) is cls and vars(loss) == vars(cls()):
            return {"is": "named loss", "name": name}
    shown = loss.name if isinstance(loss, Loss) else getattr(loss, "__name__", type(loss).__name__)
    return {"is": "loss", "name": str(shown).removeprefix("loss=")}


@dataclass(frozen=True)
class Restorer:
    """Makes values of what `describe` returned.

    Parameters
    ----------
    tensors : mapping of str to Tensor
    device : torch.device
        Where tensors and what is made of them go.
    loss : object, optional
        In the place of a loss that is code.
    """

    tensors: Mapping[str, Tensor]
    device: torch.device
    loss: Any = None

    def restore(self, described: Any) -> Any:
        """Return the value.

        Raises
        ------
        IFVPUsageError
            If a loss is needed.
        ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError
            If the description is no such thing.
        """
        if isinstance(described, list):
            return [self.restore(item) for item in described]
        if not isinstance(described, dict):
            return described
        kind, parts = described["is"], {k: v for k, v in described.items() if k != "is"}
        if kind in _CLASSES:
            arguments = {
                name: self._field(f"{name} of a {kind}", parts[name], expected)
                for name, expected in _FIELDS[_CLASSES[kind]].items()
            }
            value = self._made(_CLASSES[kind], arguments)
            check = _CHECKS.get(type(value))
            if check is not None and not check(value):
                raise ValueError(f"the shapes of a {kind} do not fit together")
            return value
        return self._simple(kind, parts)

    def _field(self, name: str, described: Any, expected: Any) -> Any:
        value = self.restore(described)
        if not isinstance(value, expected):
            raise TypeError(f"{name} is of type {type(value).__name__}")
        return value

    def _simple(self, kind: str, parts: Mapping[str, Any]) -> Any:
        match kind:
            case "tuple":
                return tuple(self.restore(parts["items"]))
            case "set":
                return set(self.restore(parts["items"]))
            case "dict":
                return {key: self.restore(item) for key, item in parts["items"]}
            case "tensor":
                return self.tensors[parts["name"]].to(self.device)
            case "array":
                return np.array(parts["values"], dtype=np.dtype(parts["dtype"]))
            case "slice":
                return slice(parts["start"], parts["stop"])
            case "dtype":
                return _dtype(parts["name"])
            case "device":
                return torch.device(parts["name"])
            case "path":
                return Path(parts["name"])
            case "named loss":
                return LOSSES[parts["name"]]()
            case "loss":
                return self._given_loss(parts["name"])
            case "RandomState":
                return _random_state(parts["state"])
        raise ValueError(f"{kind!r} is nothing that is kept in files")

    def _made(self, cls: Any, arguments: dict[str, Any]) -> Any:
        if cls in (DataInfOperator, GramOperator, Settings):
            arguments["device"] = self.device
        elif cls is Objective:
            arguments["loss"] = resolve_loss(arguments["loss"])
        elif cls is ZeroRows:
            like = torch.empty(0, dtype=arguments["dtype"], device=self.device)
            return ZeroRows((arguments["n"], arguments["c"], arguments["width"]), like)
        return cls(**arguments)

    def _given_loss(self, name: str) -> Any:
        if self.loss is None:
            raise IFVPUsageError(
                f"the estimator was fitted with a loss of its own, {name}, and code is not kept in "
                "files; give it as load(path, loss=...)."
            )
        return self.loss


def _random_state(state: Sequence[Any]) -> np.random.RandomState:
    random_state = np.random.RandomState(0)
    kind, keys, *rest = state
    random_state.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    return random_state


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return dtype


# -- shapes ----------------------------------------------------------------------------------------


def _disjoint(columns: list[Columns], size: int) -> bool:
    """Whether columns are disjoint parts of ``size``."""
    parts = sorted((part.start, part.stop) for each in columns for part in each.parts)
    edges = [(0, 0), *parts, (size, size)]
    return all(start <= stop for start, stop in parts) and all(
        left[1] <= right[0] for left, right in pairwise(edges)
    )


def _kronecker_fits(operator: EigenKroneckerOperator) -> bool:
    layout = operator.layout
    groups, out, columns = layout.groups, layout.out, layout.columns
    return operator.eigenvalues.shape == (groups, out, columns) and all(
        basis is None or basis.shape == (groups, size, size)
        for basis, size in ((operator.output_basis, out), (operator.input_basis, columns))
    )


def _factors_fit(rows: FactoredRows) -> bool:
    n, c, positions, layout = rows.n, rows.c, rows.positions, rows.layout
    return rows.inputs.shape == (n, positions, layout.groups, layout.columns) and (
        rows.signals.shape == (n, c, positions, layout.groups, layout.out)
    )


def _lookups_fit(rows: LookupRows) -> bool:
    inside = (rows.indices >= 0) & (rows.indices < rows.vocabulary)
    return rows.indices.shape == (rows.n, rows.positions) and bool(inside.all())


def _rows_fit(matrix: RowMatrix) -> bool:
    shape = (matrix.n, matrix.c)
    return (
        _disjoint([columns for columns, _ in matrix.groups], matrix.size)
        and all(columns.size == rows.width for columns, rows in matrix.groups)
        and all((rows.n, rows.c) == shape for _, rows in matrix.groups)
        and (matrix.weights is None or matrix.weights.shape == shape)
    )


def _blocks_fit(operator: BlockDiagonalOperator) -> bool:
    blocks = list(operator.blocks.values())
    return _disjoint([columns for columns, _ in blocks], operator.size) and all(
        columns.size == block.size for columns, block in blocks
    )


_CHECKS: dict[type, Callable[[Any], bool]] = {
    BlockDiagonalOperator: _blocks_fit,
    DenseOperator: lambda operator: operator.matrix.shape == operator.shape,
    EigenKroneckerOperator: _kronecker_fits,
    FactoredRows: _factors_fit,
    LookupRows: _lookups_fit,
    RowMatrix: _rows_fit,
}
