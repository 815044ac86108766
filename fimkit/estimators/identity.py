"""What a fit is of, in words and numbers that other processes and later ones can compare."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fimkit.checksum import checksum
from fimkit.estimators.description import describe

__all__ = ["identity"]

# Parameters that change nothing in the result: where numbers are kept, and what is shown.
_ELSEWHERE = {"device", "storage", "verbose", "cache_budget"}


def identity(estimator: Any, model: nn.Module) -> dict[str, Any]:
    """Return what decides the result of a fit, besides its data, by the name of each thing.

    A function, as a loss, stands for itself by its name alone.

    Parameters
    ----------
    estimator : estimator
    model : Module
    """
    known: dict[str, Any] = {"the estimator": type(estimator).__name__}
    for name, value in estimator.get_params(deep=False).items():
        if name in _ELSEWHERE or (name == "random_state" and not isinstance(value, int)):
            continue
        tensors: dict[str, Tensor] = {}
        known[name] = describe(value, name, tensors)
        if isinstance(value, nn.Module):
            tensors.update(value.state_dict())
        for key, tensor in tensors.items():
            known[f"{name} ({key})"] = checksum(tensor)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            values = [list(tensor.shape), str(tensor.dtype), tensor.requires_grad]
            known[f"the model's {name!r}"] = [*values, checksum(tensor)]
    return known
