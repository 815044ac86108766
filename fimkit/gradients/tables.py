"""Tables that bound their rows' norms: looking up in them scales rows down in place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fimkit.exceptions import IFVPUsageError

__all__ = ["TablesLeftAlone", "bounded_tables", "refuse_bounding", "tables_restored"]


def bounded_tables(model: nn.Module) -> list[Tensor]:
    """Return the tables of a model's modules with ``max_norm``."""
    return [
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None
    ]


@contextmanager
def tables_restored(model: nn.Module) -> Iterator[None]:
    """Undo what looking up does to `bounded_tables`."""
    tables = [(table, table.detach().clone(), table._version) for table in bounded_tables(model)]
    try:
        yield
    finally:
        with torch.no_grad():
            for table, values, version in tables:
                if table._version != version:
                    table.copy_(values)


def refuse_bounding(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    restored: Collection[int] = (),
) -> None:
    """Refuse a call, as PyTorch hands it to modes, that would scale down rows of a table.

    Parameters
    ----------
    function, args, kwargs
    restored : collection of int
        The ``id`` of tables in which it may, as they are restored.
    """
    if function not in (F.embedding, F.embedding_bag) or kwargs.get("max_norm") is None:
        return
    table = args[1]
    if id(table) not in restored:
        raise IFVPUsageError(
            f"F.{function.__name__} is called with max_norm={kwargs['max_norm']:g}, which scales "
            f"rows of its table of shape {tuple(table.shape)} down in place, and would change it "
            "for good. Scale them beforehand, as torch.renorm does, and leave max_norm out; in a "
            "model, torch.nn.Embedding and EmbeddingBag may have it."
        )


class TablesLeftAlone(TorchFunctionMode):
    """Refuses, while active, to look up with ``max_norm``."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        refuse_bounding(func, args, kwargs)
        return func(*args, **kwargs)
