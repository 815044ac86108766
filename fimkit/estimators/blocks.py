"""Which parameters take part in a fit, and how they divide into blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Integral
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fimkit.exceptions import IFVPUsageError
from fimkit.operators import Columns
from fimkit.vectors import ParameterSpace

__all__ = ["block_columns", "block_names", "name_patterns", "select_parameters"]


def name_patterns(value: Any, what: str) -> tuple[str, ...]:
    """Return the names or glob patterns that a user gave: one, or several.

    Raises
    ------
    IFVPUsageError
        If there is none, or one is no string; ``what`` tells where.
    """
    if isinstance(value, str):
        return (value,)
    expected = "names of parameters, as model.named_parameters() has them, or glob patterns"
    if not isinstance(value, Iterable):
        raise IFVPUsageError(f"{what} is {value!r}; expected {expected}.")
    patterns = tuple(value)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise IFVPUsageError(f"{what} holds a {type(pattern).__name__}; expected {expected}.")
    if not patterns:
        raise IFVPUsageError(f"{what} is empty; give at least one name or pattern.")
    return patterns


def select_parameters(model: nn.Module, patterns: Sequence[str] | None) -> ParameterSpace:
    """Return the parameters of a fit, in ``named_parameters()`` order.

    Parameters
    ----------
    model : Module
    patterns : sequence of str, or None
        Names or glob patterns; all that require grad when None.

    Raises
    ------
    IFVPUsageError
        If a pattern matches no trainable parameter, or there is none, or one holds no numbers.
    """
    named = dict(model.named_parameters())
    for name, parameter in named.items():
        if parameter.is_meta or is_lazy(parameter):
            raise IFVPUsageError(
                f"parameter {name!r} holds no numbers yet; load the model's weights, or run a lazy "
                "module once, before the fit."
            )
    trainable = [name for name, parameter in named.items() if parameter.requires_grad]
    if not trainable:
        raise IFVPUsageError(
            f"the model has no trainable parameters ({len(named)} in all, none with "
            "requires_grad); call requires_grad_() on those to include."
        )
    if patterns is not None:
        for pattern in patterns:
            if any(fnmatchcase(name, pattern) for name in trainable):
                continue
            raise IFVPUsageError(f"parameters: {pattern!r} {_why_unmatched(model, pattern)}.")
        trainable = [name for name in trainable if any(fnmatchcase(name, p) for p in patterns)]
    shapes = {name: tuple(named[name].shape) for name in trainable}
    for name in shapes:
        if named[name].is_inference():
            raise IFVPUsageError(
                f"parameter {name!r} was made under torch.inference_mode, where nothing can be "
                "differentiated; make or load the model outside it."
            )
    complex_names = [name for name in shapes if named[name].is_complex()]
    if complex_names:
        raise IFVPUsageError(
            f"parameter {complex_names[0]!r} is complex; only real parameters have a Fisher here, "
            "so leave it out with parameters=, or store its real and imaginary parts."
        )
    return ParameterSpace(shapes, sum(parameter.numel() for parameter in named.values()))


def _why_unmatched(model: nn.Module, pattern: str) -> str:
    """Return what is wrong with a pattern that matches no trainable parameter."""
    named = dict(model.named_parameters())
    aliases = dict(model.named_parameters(remove_duplicate=False))
    matched = [name for name in aliases if fnmatchcase(name, pattern)]
    if not matched:
        names = ", ".join(map(repr, list(named)[:8]))
        more = f", … ({len(named)} in all)" if len(named) > 8 else ""
        return f"matches none of {names}{more}"
    if matched[0] not in named:
        tied = next(name for name in named if named[name] is aliases[matched[0]])
        return f"is tied to {tied!r}; give that name"
    return f"matches only frozen parameters ({matched[0]!r}, …); call requires_grad_() on them"


def block_names(space: ParameterSpace, blocks: Any) -> dict[str, tuple[str, ...]]:
    """Divide parameters into named blocks.

    Parameters
    ----------
    space : ParameterSpace
    blocks : {"all", "layer", "parameter"}, mapping, or sequence of int
        One block; one per module that owns parameters; one per parameter; block names with
        the parameter names or glob patterns in each; or one number per parameter, in order, with
        parameters of the same number in one block.

    Returns
    -------
    dict of str to tuple of str
        The parameters in each block. The blocks are in the order of their first parameters, of
        the mapping, or of their numbers.

    Raises
    ------
    IFVPUsageError
        If a mapping's pattern matches nothing, or a parameter is in no block or in two, or a block
        has no parameter, or a name that is no string; or if
        there are not as many numbers as parameters.
    """
    if isinstance(blocks, Mapping):
        return _mapped_blocks(space, blocks)
    if not isinstance(blocks, str):
        return _numbered_blocks(space, blocks)
    divided: dict[str, list[str]] = {}
    for name in space.shapes:
        owner = {"all": "all", "layer": name.rpartition(".")[0] or "model", "parameter": name}
        divided.setdefault(owner[blocks], []).append(name)
    return {block: tuple(names) for block, names in divided.items()}


def block_columns(space: ParameterSpace, names: Sequence[str]) -> Columns:
    """Return where a block's parameters lie in the flat vector, neighbours joined."""
    parts: list[slice] = []
    for name in names:
        place = space.slices[name]
        if parts and parts[-1].stop == place.start:
            parts[-1] = slice(parts[-1].start, place.stop)
        else:
            parts.append(place)
    return Columns(tuple(parts))


def _numbered_blocks(space: ParameterSpace, blocks: Any) -> dict[str, tuple[str, ...]]:
    if isinstance(blocks, Tensor | np.ndarray):
        blocks = blocks.tolist()
    if not isinstance(blocks, Sequence):
        raise IFVPUsageError(
            f"blocks={blocks!r}; expected a name, a mapping, or a sequence of one number per "
            "parameter."
        )
    numbers = list(blocks)
    for number in numbers:
        if not isinstance(number, Integral) or isinstance(number, bool) or number < 0:
            raise IFVPUsageError(
                f"blocks has {number!r}, which is not the number of a block; expected one integer "
                "of at least 0 per parameter."
            )
    if len(numbers) != len(space.shapes):
        names = ", ".join(map(repr, space.shapes))
        raise IFVPUsageError(
            f"blocks has {len(numbers)} numbers; expected one per fitted parameter, in order: "
            f"{len(space.shapes)} ({names})."
        )
    divided: dict[int, list[str]] = {int(number): [] for number in sorted(numbers)}
    for name, number in zip(space.shapes, numbers, strict=True):
        divided[int(number)].append(name)
    return {str(number): tuple(names) for number, names in divided.items()}


def _mapped_blocks(
    space: ParameterSpace, blocks: Mapping[str, str | Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    owner: dict[str, Any] = {}
    for block, patterns in blocks.items():
        if not isinstance(block, str):
            raise IFVPUsageError(f"blocks has the key {block!r}; the name of a block is a string.")
        for pattern in name_patterns(patterns, f"blocks[{block!r}]"):
            matched = [name for name in space.shapes if fnmatchcase(name, pattern)]
            if not matched:
                raise IFVPUsageError(
                    f"blocks[{block!r}]: {pattern!r} matches none of the fitted parameters "
                    f"{', '.join(map(repr, space.shapes))}."
                )
            for name in matched:
                if owner.setdefault(name, block) != block:
                    raise IFVPUsageError(
                        f"blocks: {name!r} is in both {owner[name]!r} and {block!r}; a parameter "
                        "belongs to one block."
                    )
    missing = [name for name in space.shapes if name not in owner]
    if missing:
        raise IFVPUsageError(
            f"blocks: {', '.join(map(repr, missing))} belong to no block; name every fitted "
            "parameter, or leave them out of the fit with parameters=."
        )
    return {block: tuple(name for name in space.shapes if owner[name] == block) for block in blocks}
