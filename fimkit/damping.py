"""λ, the regularization: numbers as they are given, and those that are taken where none is."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor

from fimkit.exceptions import SingularFisherError

__all__ = ["as_number", "automatic", "is_listing"]

# The automatic λ is this fraction of the mean of the Fisher's diagonal: the heuristic of Kwon et
# al., "DataInf", ICLR 2024, section 5, and of influence functions by EK-FAC.
_FRACTION = 0.1


def automatic(sizes: Sequence[int], traces: Sequence[float]) -> list[float]:
    """Return λ for blocks of given sizes and traces of the Fisher.

    A block whose trace is zero gets the whole model's.

    Raises
    ------
    SingularFisherError
        If all traces are zero.
    """
    whole = _FRACTION * sum(traces) / sum(sizes)
    if not whole > 0:
        raise SingularFisherError(
            "the automatic regularization is a fraction of the Fisher's trace, which is zero: "
            "every gradient is zero. Give a number, or check that the loss depends on the "
            "parameters."
        )
    return [_FRACTION * t / p if t > 0 else whole for t, p in zip(traces, sizes, strict=True)]


def is_listing(value: Any) -> bool:
    """Whether a value is a sequence, array or tensor of items."""
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def as_number(value: Any) -> float | None:
    """Return a number, also from an array or tensor without dimensions, and None for all else."""
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else None
