"""Tensors inside the containers that batches come in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["common_length", "map_tensors", "tensors", "to_device"]


def map_tensors(function: Callable[[Tensor], Any], batch: Any) -> Any:
    """Return the batch with ``function`` applied to every tensor, its containers rebuilt.

    Arrays count as tensors. Mappings, tuples, named tuples, lists and dataclasses are entered;
    all else is handed on.
    """
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, np.ndarray) and batch.dtype.kind in "biuf":
        return function(torch.from_numpy(np.array(batch)))
    if isinstance(batch, Mapping):
        items = {key: map_tensors(function, value) for key, value in batch.items()}
        if type(batch) is dict or not isinstance(batch, MutableMapping):
            return items
        rebuilt = copy(batch)
        rebuilt.update(items)
        return rebuilt
    if isinstance(batch, tuple | list):
        values = [map_tensors(function, value) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if f.init}
        return dataclasses.replace(
            batch, **{name: map_tensors(function, value) for name, value in fields.items()}
        )
    return batch


def tensors(batch: Any) -> list[Tensor]:
    """Return every tensor of the batch, in order."""
    found: list[Tensor] = []
    map_tensors(found.append, batch)
    return found


def common_length(batch: Any) -> int | None:
    """Return the size of every tensor's first dimension.

    None where they differ, where there is no tensor, and where numbers stand beside only one: of
    a single example, such as its label.
    """
    found = tensors(batch)
    lengths = [len(tensor) for tensor in found if tensor.ndim]
    alone = len(lengths) == 1 < len(found)
    return lengths[0] if len(set(lengths)) == 1 and not alone else None


def to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch on ``device``, arrays as tensors, inference-mode tensors made ordinary."""

    def move(tensor: Tensor) -> Tensor:
        moved = tensor.to(device, non_blocking=True)
        return moved.clone() if moved.is_inference() else moved

    return map_tensors(move, batch)
