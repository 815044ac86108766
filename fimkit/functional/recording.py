"""What a function records of its layers in batches of its arguments, with the gradients there."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fimkit.exceptions import IFVPUsageError
from fimkit.functional.cache import EKFAC_CACHE_KEY, MLPCache, RecordedPair
from fimkit.functional.independence import (
    check_alone,
    check_independence,
    gradients_at,
    layer_name,
)
from fimkit.gradients import AmbientAutocast
from fimkit.gradients.ownership import owned
from fimkit.gradients.tables import TablesLeftAlone
from fimkit.gradients.tree import map_tensors, tensors
from fimkit.operators import FactoredRows, MatrixLayout
from fimkit.replay import RandomStates

__all__ = ["Batches", "RecordedBatch", "Recorder"]

_REMEDY = "give in_dims=(None, 0, ...), with None for every argument that all examples share"


class Batches:
    """The arguments of a function by batches of examples; can be iterated over again.

    Parameters
    ----------
    arguments : tuple
        Tensors, containers of tensors, and constants.
    in_dims : tuple of (int or None), or None
        The dimension that holds the examples in all tensors of each argument; None in the tuple
        for an argument that stays whole, None for dimension 0 of every argument.
    batch_size : int
        Examples per batch, except in the last.
    max_iter : int or None
        Number of batches at most.

    Attributes
    ----------
    sizes : list of int
        Examples in each batch.
    """

    def __init__(
        self, arguments: tuple[Any, ...], in_dims: Any, batch_size: int, max_iter: int | None
    ) -> None:
        self._arguments = arguments
        self._dims = _dims(arguments, in_dims)
        n = _examples(arguments, self._dims)
        starts = range(0, n, batch_size)[:max_iter]
        self.sizes = [min(batch_size, n - start) for start in starts]

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        """Yield the arguments of every batch."""
        start = 0
        for size in self.sizes:
            yield self.examples(start, size)
            start += size

    def examples(self, start: int, size: int) -> tuple[Any, ...]:
        """Return the arguments of ``size`` examples from ``start`` on."""
        return tuple(
            argument
            if dim is None
            else map_tensors(partial(_cut, dim=dim, start=start, size=size), argument)
            for argument, dim in zip(self._arguments, self._dims, strict=True)
        )


@dataclass(frozen=True)
class RecordedBatch:
    """The layers of one batch of n examples.

    Attributes
    ----------
    losses : Tensor of shape (n,)
        Detached.
    mask : Tensor of shape (n, T), or None
        Boolean.
    layers : list of list of list of FactoredRows
        ``layers[cache][layer][call]``, inputs and the gradients of the summed losses.
    dtypes : set of torch.dtype
        What losses and hidden vectors were computed in.
    """

    losses: Tensor
    mask: Tensor | None
    layers: list[list[list[FactoredRows]]]
    dtypes: set[torch.dtype]

    def layouts(self) -> list[list[MatrixLayout]]:
        """Return the shape of every layer."""
        return [[calls[0].layout for calls in cache] for cache in self.layers]

    def rows(self) -> list[FactoredRows]:
        """Return the calls of all layers."""
        return [rows for cache in self.layers for calls in cache for rows in calls]

    def own_inputs(self) -> None:
        """Copy inputs that others may write to."""
        calls = self.rows()
        for rows, inputs in zip(calls, owned([rows.inputs for rows in calls]), strict=True):
            rows.inputs = inputs


class Recorder:
    """Calls a function on batches, and gathers what it records in its caches.

    Parameters
    ----------
    func : callable
        Returns losses ``(B,)``, or losses and a mask ``(B, T)``.
    caches : list of MLPCache
    autocast : AmbientAutocast
        What is in force while ``func`` runs, and only then.
    """

    def __init__(
        self, func: Callable[..., Any], caches: list[MLPCache], autocast: AmbientAutocast
    ) -> None:
        self._func = func
        self._caches = caches
        self._autocast = autocast
        self._layouts: list[list[MatrixLayout]] | None = None
        self._checked: set[Any] = set()

    def batches(self, batches: Batches) -> Iterator[RecordedBatch]:
        """Yield what every batch records, after one forward and one backward pass each.

        Raises
        ------
        IFVPUsageError
            If what ``func`` returns or records cannot be used.
        """
        for index, (size, arguments) in enumerate(zip(batches.sizes, batches, strict=True)):
            states = RandomStates() if self._layouts is None and size > 1 else None
            batch = self._record(arguments, size, index)
            batch.own_inputs()  # before func runs again
            _check_mask(batch)
            # With random numbers of its own a lone example has another loss.
            if states is not None and not states.passed():
                self._check_alone(batches, batch)
            if self._layouts is None:
                self._layouts = batch.layouts()
            elif batch.layouts() != self._layouts:
                raise IFVPUsageError(
                    f"func recorded layers of other shapes in batch {index} than before; every "
                    "call must record the same layers in the same order."
                )
            yield batch

    def _record(self, arguments: tuple[Any, ...], size: int, index: int) -> RecordedBatch:
        try:
            for cache in self._caches:
                cache.start()
            with self._autocast.restored(), TablesLeftAlone():
                losses, mask = _outputs(self._func(*arguments), size)
            pairs = [_pairs(cache, size, i) for i, cache in enumerate(self._caches)]
            hidden = {
                (i, j, k): pair[1]
                for i, layers in enumerate(pairs)
                for j, calls in enumerate(layers)
                for k, pair in enumerate(calls)
            }
            pattern = frozenset((place, tensor.shape[1:]) for place, tensor in hidden.items())
            check = size > 1 and pattern not in self._checked
            signals = gradients_at(hidden, losses.sum(), retain_graph=check)
            layers = [
                [
                    [_factored(pair, signals[i, j, k]) for k, pair in enumerate(calls)]
                    for j, calls in enumerate(layers)
                ]
                for i, layers in enumerate(pairs)
            ]
            dtypes = {losses.dtype, *(tensor.dtype for tensor in hidden.values())}
            batch = RecordedBatch(losses.detach(), mask, layers, dtypes)
            _check_finite(batch, index)
            if check:
                check_independence(losses, hidden, signals)
                self._checked.add(pattern)
        finally:  # a checkpoint records again in the backward pass
            for cache in self._caches:
                cache.stop()
        return batch

    def _check_alone(self, batches: Batches, batch: RecordedBatch) -> None:
        """Refuse a loss of the first batch that is another one without the rest of the batch.

        The largest is looked at: rounding errors may change one that is nearly 0.
        """
        largest = int(batch.losses.abs().argmax())
        alone = None
        # func need not be able to run on one example by itself, nor without a warning.
        silent = warnings.catch_warnings(action="ignore")
        with RandomStates(), suppress(Exception), silent, self._autocast.restored():
            alone, _ = _outputs(self._func(*batches.examples(largest, 1)), 1)
        for cache in self._caches:
            cache.clear()
        if alone is not None:
            together = batch.losses[largest : largest + 1]
            check_alone(alone.detach(), together, len(batch.losses), batch.dtypes)


def _pairs(cache: MLPCache, size: int, index: int) -> list[list[RecordedPair]]:
    """Return the pairs of a cache by layer and call."""
    layers = cache.layers()
    if not layers:
        raise IFVPUsageError(
            f"func recorded nothing in cache {index}; give the cache to a module, "
            f"setattr(module, EKFAC_CACHE_KEY, cache) with EKFAC_CACHE_KEY = {EKFAC_CACHE_KEY!r}, "
            "whose forward, decorated with manual_cache_forward, appends to "
            "cache.input_hidden_pairs."
        )
    for j, calls in enumerate(layers):
        for pair in calls:
            _check_pair(pair, size, layer_name(index, j))
    return layers


def _check_pair(pair: RecordedPair, size: int, name: str) -> None:
    """Refuse a pair that cannot be input and output of a linear map."""
    a, hidden = pair
    if a.ndim < 2 or a.shape[:-1] != hidden.shape[:-1] or a.shape[0] != size:
        raise IFVPUsageError(
            f"{name} has inputs of shape {tuple(a.shape)} and hidden vectors of shape "
            f"{tuple(hidden.shape)} in a batch of {size}; expected (B, ..., in) and "
            f"(B, ..., out), with the batch of {size} examples first and features last."
        )
    if pair.modified():
        raise IFVPUsageError(
            f"the input or the hidden vectors of {name} were modified in place after they were "
            "recorded, so that they are no longer input and output of the layer; use functions "
            "that are not in place, such as relu instead of relu_, or record a clone of the input."
        )
    if not hidden.requires_grad:
        raise IFVPUsageError(
            f"the hidden vectors of {name} do not require grad; hand func parameters that require "
            "grad, and run no forward that records under torch.no_grad()."
        )


def _factored(pair: RecordedPair, signals: Tensor) -> FactoredRows:
    a, dtype = pair[0], torch.promote_types(signals.dtype, torch.float32)
    a = a.to(signals.device, dtype).reshape(a.shape[0], -1, 1, a.shape[-1]).detach()
    s = signals.to(dtype).reshape(signals.shape[0], 1, -1, 1, signals.shape[-1])
    return FactoredRows(a, s, MatrixLayout(1, s.shape[-1], a.shape[-1]))


def _outputs(output: Any, size: int) -> tuple[Tensor, Tensor | None]:
    """Return the losses ``(B,)`` and the mask ``(B, T)``, if any, that func returned."""
    losses, mask = output, None
    if isinstance(output, tuple | list):
        if len(output) != 2:
            raise IFVPUsageError(
                f"func returned {len(output)} values; expected the losses, or losses and mask."
            )
        losses, mask = output
    if not isinstance(losses, Tensor) or not losses.is_floating_point():
        kind = losses.dtype if isinstance(losses, Tensor) else type(losses).__name__
        raise IFVPUsageError(f"func returned losses of {kind}; expected floating-point numbers.")
    if tuple(losses.shape) != (size,):
        given = f"of shape {tuple(losses.shape)}" if losses.ndim else "that are a single number"
        raise IFVPUsageError(
            f"func returned losses {given} for a batch of {size}; expected ({size},), one loss per "
            "example and no sum or mean over the batch (reduction='none'). If parameters were cut "
            f"into batches, {_REMEDY}."
        )
    if not losses.requires_grad:
        raise IFVPUsageError(
            "the losses that func returned do not require grad; hand it parameters that do, and "
            "detach nothing."
        )
    return losses, None if mask is None else _checked_mask(mask, size)


def _checked_mask(mask: Any, size: int) -> Tensor:
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[0] != size:
        kind = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise IFVPUsageError(
            f"func returned a mask of {kind} for a batch of {size}; expected a tensor of shape "
            f"({size}, T), with T = 1 for data that is not sequential."
        )
    kept = mask.detach() != 0
    if not bool((mask.detach() == kept).all()):
        raise IFVPUsageError("the mask that func returned has values other than 0 and 1.")
    return kept


def _check_mask(batch: RecordedBatch) -> None:
    """Refuse a mask that masks something, but fits no layer."""
    if batch.mask is None or batch.mask.all():
        return
    positions = {rows.positions for rows in batch.rows()}
    if batch.mask.shape[1] not in positions:
        raise IFVPUsageError(
            f"func returned a mask of shape {tuple(batch.mask.shape)}, but the recorded layers "
            f"have {' or '.join(map(str, sorted(positions)))} position(s) per example; expected a "
            "mask with as many columns, and inputs recorded as (B, T, in)."
        )


def _check_finite(batch: RecordedBatch, index: int) -> None:
    found = [("a loss", [batch.losses])]
    for i, cache in enumerate(batch.layers):
        for j, calls in enumerate(cache):
            both = [values for rows in calls for values in (rows.inputs, rows.signals)]
            found.append((f"an input or a gradient of {layer_name(i, j)}", both))
    # One NaN or infinity makes its sum NaN or infinite: one wait for the device, not one each.
    sums = [values.sum().isfinite() for _, group in found for values in group]
    if bool(torch.stack([finite.to(batch.losses.device) for finite in sums]).all()):
        return
    for what, group in found:
        if not all(bool(values.isfinite().all()) for values in group):
            raise IFVPUsageError(
                f"{what} is NaN or infinite in batch {index}; look for NaN inputs, log(0) in the "
                "loss, overflow, or a diverged model."
            )


def _cut(tensor: Tensor, dim: int, start: int, size: int) -> Tensor:
    # A copy, so that what func does to it in place is done to nothing else.
    return tensor.narrow(dim, start, size).clone(memory_format=torch.contiguous_format)


def _dims(x: tuple[Any, ...], in_dims: Any) -> tuple[int | None, ...]:
    """Return the dimension of the examples in each argument."""
    if in_dims is None:
        for index, argument in enumerate(x):
            if any(tensor.requires_grad for tensor in tensors(argument)):
                raise IFVPUsageError(
                    f"argument {index} of func requires grad, as parameters do, and without "
                    f"in_dims dimension 0 of every argument holds the examples; {_REMEDY}, or "
                    f"in_dims={(0,) * len(x)} if this one does hold examples."
                )
        in_dims = (0,) * len(x)
    entries = in_dims if isinstance(in_dims, tuple | list) else ()
    if (
        len(entries) != len(x)
        or not all(dim is None or isinstance(dim, int) for dim in entries)
        or all(dim is None for dim in entries)
    ):
        raise IFVPUsageError(
            f"in_dims is {in_dims!r} and func has {len(x)} argument(s); expected a tuple with the "
            "dimension of the examples, or None, for each, and a dimension for at least one."
        )
    return tuple(entries)


def _examples(arguments: tuple[Any, ...], dims: tuple[int | None, ...]) -> int:
    """Return the number of examples, which is the same in all arguments that hold them."""
    sizes = {}
    for index, (argument, dim) in enumerate(zip(arguments, dims, strict=True)):
        for tensor in tensors(argument) if dim is not None else ():
            if dim is None or not -tensor.ndim <= dim < tensor.ndim:
                raise IFVPUsageError(
                    f"argument {index} holds a tensor of shape {tuple(tensor.shape)}, without the "
                    f"dimension {dim} that is to hold the examples; {_REMEDY}."
                )
            sizes[f"{tensor.shape[dim]} in argument {index}"] = tensor.shape[dim]
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise IFVPUsageError(
            f"there are as many examples as {', '.join(sizes) or 'no argument tells'}; expected "
            "the same number, at least 1, in every tensor of every argument. For parameters and "
            f"the like, {_REMEDY}."
        )
    return next(iter(sizes.values()))
