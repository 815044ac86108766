"""Why a model or a loss could not be run on a batch, told in terms of what the user gave."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn

from fimkit.exceptions import IFVPUsageError
from fimkit.losses.base import CallableLoss, Loss, arguments_of

__all__ = ["explained"]

# What torch says of tensors whose shapes do not fit together.
_OF_SHAPES = re.compile("shape|size|dimension|channels")


def explained(
    error: Exception, loss: Loss, model: nn.Module, batch: Any, *, called: bool
) -> IFVPUsageError | None:
    """Return the misuse that an error of the first batch comes from, None where none is seen.

    Parameters
    ----------
    error : Exception
        An `IFVPUsageError` is kept, with what the batch looks like added.
    loss : Loss
    model : Module
    batch
        As the loss takes it.
    called : bool
        Whether the model, or the function that is the loss, had returned.
    """
    if not type(loss).outputs.__module__.startswith("fimkit."):
        return None  # it has its own way with batches
    of_batch = _seen_in_batch(batch)
    if isinstance(error, IFVPUsageError):
        return None if of_batch is None else type(error)(f"{error} {of_batch}")
    if called:
        return None
    if isinstance(loss, CallableLoss):
        remedy = _of_function(error, loss, model, batch) or of_batch
        remedy = remedy or _of_tensors(error, model, batch)
        how = f"{loss.name} was called as loss(model, batch)"
    else:
        remedy = of_batch or _of_call(error, model, batch) or _of_tensors(error, model, batch)
        how = f"{type(model).__name__} was called with ({_told_arguments(model, batch)})"
    if remedy is None:
        return None
    return IFVPUsageError(
        f"{how}, for a batch {_brief(batch)}, and raised {type(error).__name__}: {error}. {remedy}"
    )


def _seen_in_batch(batch: Any) -> str | None:
    """Return what a batch that is no batch of tensors looks like, with the remedy."""
    is_mapping = isinstance(batch, Mapping)
    parts = list(batch.values() if is_mapping else batch) if _is_container(batch) else []
    if parts and not is_mapping and all(map(_is_container, parts)):
        return (
            f"The batch looks like a list of {len(parts)} examples that were not put together; use "
            "the DataLoader's own collate_fn, or one that returns tensors with the examples along "
            "the first dimension."
        )
    for part in parts:
        if isinstance(part, list) and part and all(isinstance(x, list | Tensor) for x in part):
            return (
                "The batch has a list where a tensor is expected, which the DataLoader's own "
                "collate_fn makes of examples that are lists of numbers, one entry for each "
                "position. Make tensors in the dataset, by torch.tensor or a Hugging Face "
                "dataset's set_format('torch'), or collate by "
                "transformers.default_data_collator, or by a DataCollator where lengths differ."
            )
    target = batch.get("labels") if is_mapping else (parts or [None])[-1]
    tokens = batch.get("input_ids") if is_mapping else None
    if _has_no_dimensions(target) or (isinstance(tokens, Tensor) and tokens.ndim == 1):
        return (
            "The batch looks like a single example, without a dimension of examples; put examples "
            "together by a DataLoader(dataset, batch_size=...), or give ModelData(model, dataset)."
        )
    return None


def _of_call(error: Exception, model: nn.Module, batch: Any) -> str | None:
    """Return what is wrong about how the inputs of a batch meet the model's arguments."""
    args, kwargs = arguments_of(batch)
    signature = inspect.signature(model.forward)
    names = ", ".join(signature.parameters)
    if isinstance(error, TypeError) and any(map(_is_container, _inputs(batch))):
        return (
            f"It takes ({names}), and was given tuples or mappings as they are in the batch. All "
            "elements of a batch but the last are inputs: give (x1, x2, targets) for ((x1, x2), "
            "targets), or a mapping of the arguments with 'labels' for ({...}, targets), or pass a "
            "callable loss(model, batch)."
        )
    if isinstance(error, TypeError) and not _binds(signature, args, kwargs):
        given = (
            "The items of a mapping but 'labels' are the model's keyword arguments: rename or "
            "leave out what it does not take, or give a tuple (*inputs, targets)."
            if isinstance(batch, Mapping)
            else "All elements of a tuple but the last, the targets, are inputs of the model: "
            "leave out what is neither (such as indices) by the dataset or collate_fn."
        )
        return f"It takes ({names}). {given} Or pass a callable loss(model, batch)."
    if len(args) > 1 and not isinstance(error, RuntimeError):
        return (
            f"It takes ({names}), in this order. Give a mapping with these names and 'labels', "
            "such as {'input_ids': ids, 'attention_mask': mask, 'labels': labels}, or the inputs "
            "in that order."
        )
    return None


def _of_tensors(error: Exception, model: nn.Module, batch: Any) -> str | None:
    """Return how the dtypes or the shapes of inputs do not suit the model."""
    if type(error) is not RuntimeError:
        return None
    given = {value.dtype for value in _inputs(batch) if isinstance(value, Tensor)}
    taken = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if given and taken and given.isdisjoint(taken) and "type" in str(error):
        names = [" and ".join(sorted(map(_dtype, dtypes))) for dtypes in (given, taken)]
        return (
            f"The inputs are {names[0]} and the model's parameters {names[1]}: convert the inputs, "
            f"such as by .to(torch.{_dtype(min(taken, key=str))}) in the dataset or collate_fn."
        )
    if _OF_SHAPES.search(str(error)):
        return "Compare the inputs' shapes with what the model's layers take."
    return None


def _inputs(batch: Any) -> list[Any]:
    """Return what a batch has besides its targets; nothing where those are at no usual place."""
    try:
        args, kwargs = arguments_of(batch)
    except IFVPUsageError:
        return []
    return [*args, *kwargs.values()]


def _of_function(error: Exception, loss: CallableLoss, model: nn.Module, batch: Any) -> str | None:
    """Return how a function that is no ``loss(model, batch)`` becomes one."""
    function = loss.function
    try:
        takes = _binds(inspect.signature(function), (model, batch), {})
    except ValueError:  # a builtin, of which nothing is known
        takes = True
    takes_outputs = getattr(function, "__module__", None) == torch.nn.functional.__name__
    if isinstance(error, TypeError):
        takes_outputs = takes_outputs or type(model).__name__ in str(error)
    if isinstance(error, AttributeError) and error.obj is model:
        takes_outputs = takes_outputs or hasattr(Tensor, str(error.name))
    if takes and not takes_outputs:
        return None
    return (
        "A function is given the model and the batch, not outputs and targets: write "
        "lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1], "
        "reduction='none'), returning (B,) losses, or pass loss='cross_entropy', another name, or "
        "a module such as torch.nn.MSELoss(), which are given outputs and targets."
    )


def _told_arguments(model: nn.Module, batch: Any) -> str:
    """Return the arguments by the names that the model has for them, as far as it has any."""
    args, kwargs = arguments_of(batch)
    names = inspect.signature(model.forward).parameters
    told = [f"{name}={_brief(value)}" for name, value in zip(names, args, strict=False)]
    told += [_brief(value) for value in args[len(told) :]]
    return _joined(told + [f"{key}={_brief(value)}" for key, value in kwargs.items()])


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _brief(value: Any) -> str:
    """Return dtypes and shapes of the tensors in a value, and types of the rest."""
    if isinstance(value, Tensor):
        return f"{_dtype(value.dtype)} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + _joined([f"{key}: {_brief(item)}" for key, item in value.items()]) + "}"
    if isinstance(value, list):
        return f"[{_joined(list(map(_brief, value)))}]"
    if isinstance(value, tuple):
        return f"({_joined(list(map(_brief, value)))})"
    return type(value).__name__


def _joined(told: list[str]) -> str:
    more = [f"{len(told) - 4} more"] if len(told) > 5 else []
    return ", ".join([*told[: 4 if more else 5], *more])


def _binds(signature: inspect.Signature, args: Any, kwargs: dict[str, Any]) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _is_container(value: Any) -> bool:
    return isinstance(value, Mapping | tuple | list)


def _has_no_dimensions(value: Any) -> bool:
    return isinstance(value, Number) or (isinstance(value, Tensor) and not value.ndim)
