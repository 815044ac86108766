"""What the functions are given, refused where it is of another kind."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fimkit.exceptions import IFVPUsageError

__all__ = ["check_arguments", "check_callable", "check_finite", "check_floating"]


def check_callable(func: Any) -> None:
    """Refuse a ``func`` that cannot be called."""
    if not callable(func):
        raise IFVPUsageError(
            f"func is a {type(func).__name__}; expected a callable that returns one loss."
        )


def check_arguments(x: Any) -> None:
    """Refuse an ``x`` that is not a tuple, or list, of arguments."""
    if not isinstance(x, tuple | list):
        raise IFVPUsageError(
            f"x is a {type(x).__name__}; expected the tuple of all arguments of func, also "
            "when there is one: (x,)."
        )


def check_floating(v: Any, name: str) -> None:
    """Refuse a vector that is not a floating-point tensor."""
    if not isinstance(v, Tensor) or not v.is_floating_point():
        kind = v.dtype if isinstance(v, Tensor) else type(v).__name__
        raise IFVPUsageError(f"{name} is of {kind}; expected a floating-point torch tensor.")


def check_finite(v: Tensor, name: str) -> None:
    """Refuse a vector with NaN or infinity."""
    if not v.isfinite().all():
        raise IFVPUsageError(f"{name} contains NaN or infinity; remove those vectors first.")
