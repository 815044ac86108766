"""What a ``regularization`` parameter says for the blocks of a fit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fimkit.damping import as_number, automatic, is_listing
from fimkit.exceptions import IFVPUsageError

__all__ = [
    "block_regularizations",
    "given_regularizations",
    "regularization_path",
    "resolve_regularization",
]


def resolve_regularization(
    value: Any, blocks: Mapping[str, int], traces: Sequence[float]
) -> float | list[float]:
    """Return λ as one number, or as one per block.

    Parameters
    ----------
    value : "auto", float, mapping or sequence
        As given by the user.
    blocks : mapping of str to int
        Number of parameters of each block.
    traces : sequence of float
        Trace of the Fisher over each block.

    Raises
    ------
    IFVPUsageError
        If the value is of another kind, negative, or not one per block.
    SingularFisherError
        If it is ``"auto"`` and all traces are zero.
    """
    if isinstance(value, str) and value == "auto":
        values = automatic(list(blocks.values()), traces)
    else:
        values = block_regularizations(value, list(blocks))
    return values[0] if len(values) == 1 else values


def block_regularizations(value: Any, blocks: Sequence[str]) -> list[float]:
    """Return the numbers that a user gave: one, or one per block.

    Raises
    ------
    IFVPUsageError
        If they are negative, not numbers, or not one per block.
    """
    numbers = given_regularizations(value)
    if isinstance(numbers, float):
        return [numbers]
    if isinstance(numbers, dict):
        if set(numbers) != set(blocks):
            raise IFVPUsageError(
                f"regularization has keys {list(numbers)}; expected one per block: {list(blocks)}."
            )
        return [numbers[block] for block in blocks]
    if len(numbers) != len(blocks):
        raise IFVPUsageError(
            f"regularization has {len(numbers)} values; expected one number, or one per "
            f"block: {len(blocks)} ({', '.join(blocks)})."
        )
    return numbers


def given_regularizations(value: Any) -> float | list[float] | dict[Any, float]:
    """Return the numbers that a user gave, whatever the blocks are.

    Raises
    ------
    IFVPUsageError
        If they are negative, or not numbers.
    """
    if isinstance(value, Mapping):
        return {
            block: _checked(number, f"regularization of block {block!r}")
            for block, number in value.items()
        }
    if is_listing(value):
        return _checked_list(value, "regularization")
    number = as_number(value)
    if number is None:
        raise IFVPUsageError(
            f"regularization={value!r}; expected 'auto', a number, or one number per block."
        )
    return _checked(number, "regularization")


def regularization_path(values: Any) -> list[float]:
    """Return the numbers of a path, each of them for all blocks.

    Raises
    ------
    IFVPUsageError
        If there are none, or they are negative, or not numbers.
    """
    if not is_listing(values) or not len(values):
        raise IFVPUsageError(
            f"regularizations={values!r}; expected a sequence of at least one number."
        )
    return _checked_list(values, "regularizations")


def _checked_list(values: Any, what: str) -> list[float]:
    return [_checked(value, f"{what}[{i}]") for i, value in enumerate(values)]


def _checked(value: Any, what: str) -> float:
    """Return a number that is finite and not negative, or raise what it is."""
    number = as_number(value)
    if number is None:
        raise IFVPUsageError(f"{what} is {value!r}; expected a number.")
    if not math.isfinite(number) or number < 0:
        raise IFVPUsageError(f"{what} is {number}; expected a finite number, not negative.")
    return number
