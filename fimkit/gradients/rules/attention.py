"""``F.multi_head_attention_forward``, whose projections are calls of their own inside it.

A function of ``torch.nn.functional`` hands itself to whoever watches, once, and runs unwatched.
`ENTERED` holds copies that skip the handing over, so that the calls inside are seen.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch.nn.functional as F

__all__ = ["ENTERED"]


def _watched_inside(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a copy of the function whose check for watchers finds none."""
    assert isinstance(function, FunctionType)
    unwatched = {**function.__globals__, "has_torch_function": lambda _: False}
    copy = FunctionType(
        function.__code__,
        unwatched,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


#: Functions to run by their copies, with the calls inside them watched.
ENTERED: dict[Callable[..., Any], Callable[..., Any]] = {
    F.multi_head_attention_forward: _watched_inside(F.multi_head_attention_forward)
}
