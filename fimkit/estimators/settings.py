"""What a fit is made with, taken from its estimator once."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from sklearn.utils import check_random_state

from fimkit.estimators.blocks import name_patterns
from fimkit.exceptions import IFVPUsageError
from fimkit.gradients import Objective
from fimkit.losses import resolve_loss

__all__ = ["Settings", "usable_device"]


@dataclass(frozen=True)
class Settings:
    """What a fit is made with, and what gradients of other data are taken with afterwards.

    A fitted estimator keeps those of its fit: parameters that are set later wait for the next.

    Parameters
    ----------
    objective : Objective
    seed : int
        For sampled labels.
    patterns : tuple of str, or None
        Names or glob patterns of the selected parameters; all that require grad when None.
    device : torch.device or None
        Where rows are kept; the model's when None.
    dtype : torch.dtype or None
        What rows are kept in; the model's, float32 at least, when None.
    verbose : bool
    """

    objective: Objective
    seed: int
    patterns: tuple[str, ...] | None
    device: torch.device | None
    dtype: torch.dtype | None
    verbose: bool

    @classmethod
    def of(cls, estimator: Any) -> Settings:
        """Return the settings that an estimator's parameters stand for.

        Raises
        ------
        IFVPUsageError
            If ``loss``, ``parameters`` or ``device`` is of no use, each by its name.
        """
        objective = Objective(
            resolve_loss(estimator.loss), estimator.fisher, estimator.n_mc_samples
        )
        parameters = estimator.parameters
        return cls(
            objective,
            _seed(estimator.random_state),
            None if parameters is None else name_patterns(parameters, "parameters"),
            None if estimator.device is None else usable_device(estimator.device),
            estimator.dtype,
            bool(estimator.verbose),
        )


def usable_device(device: str | torch.device) -> torch.device:
    """Return the device that tensors are on when they are made on this one.

    Raises
    ------
    IFVPUsageError
        If it is none of this machine, or has no numbers.
    """
    try:
        found: torch.device = torch.empty(0, device=device).device
    except (AssertionError, RuntimeError) as error:  # a torch without CUDA asserts
        why = str(error).partition("\n")[0]
        raise IFVPUsageError(
            f"device={str(device)!r} cannot be used here: {why}. Give a device of this machine, "
            "such as 'cpu'."
        ) from error
    if found.type == "meta":
        raise IFVPUsageError("device='meta' holds no numbers; give a device that does.")
    return found


def _seed(random_state: Any) -> int:
    """Return a seed by scikit-learn's rules; None draws fresh entropy, no global state."""
    if random_state is None:
        return secrets.randbits(63)
    if isinstance(random_state, Integral):
        return int(random_state)
    return int(check_random_state(random_state).randint(2**31 - 1))
