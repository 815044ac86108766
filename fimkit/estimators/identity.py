"""What a fit is of, in words and numbers that other processes and later ones can compare."""

from __future__ import annotations

from functools import partial
from inspect import isroutine
from typing import Any

from torch import Tensor, nn

from fimkit.checksum import checksum, digest, shown
from fimkit.estimators.description import describe
from fimkit.losses import Loss

__all__ = ["identity"]

# Parameters that change nothing in the result: where numbers are kept, and what is shown.
_ELSEWHERE = {"device", "storage", "verbose", "cache_budget"}


def identity(estimator: Any, model: nn.Module) -> dict[str, Any]:
    """Return what decides the result of a fit, besides its data, by the name of each thing.

    A function, as a loss, stands for itself by its name alone, and the arguments that
    `functools.partial` gave it. What modules do is told by their types, by what they show of
    themselves and by the names of functions that they hold; other attributes of a model's modules,
    which may be a process's own, are not compared, those of a loss are.

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
        for key, tensor in tensors.items():
            known[f"{name} ({key})"] = checksum(tensor)
        known.update(_options(value, name))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        values = [list(tensor.shape), str(tensor.dtype), tensor.requires_grad]
        known[f"the model's {name!r}"] = [*values, checksum(tensor)]
    for name, module in model.named_modules():
        known[f"the model's layer {name!r}" if name else "the model"] = _form(module)
    return known


def _form(module: nn.Module) -> str:
    """Return a module's type, and what it shows of itself besides its parts."""
    functions = [
        f"{name}={value.__qualname__}"
        for name, value in vars(module).items()
        if isroutine(value) and not name.startswith("_")
    ]
    return f"{type(module).__qualname__}({', '.join([shown(module.extra_repr()), *functions])})"


def _options(loss: Any, name: str) -> dict[str, Any]:
    """Return the attributes of a loss that is code, by their names; of modules inside it, too."""
    if isinstance(loss, partial):
        return {f"the arguments of {name}": digest(loss)}
    if isinstance(loss, nn.Module):
        apart = vars(nn.Module())
        tensors = {**dict(loss.named_parameters()), **dict(loss.named_buffers())}
        options: dict[str, Any] = {f"{name}.{key}": digest(value) for key, value in tensors.items()}
        for where, module in loss.named_modules(prefix=name):
            options |= {f"{where}.{k}": _told(v) for k, v in vars(module).items() if k not in apart}
            options[f"the type of {where}"] = _form(module)
        return options
    if isinstance(loss, Loss):
        return {f"{name}.{key}": _told(value) for key, value in vars(loss).items()}
    return {}


def _told(value: Any) -> Any:
    """Return a plain value itself, and a number that stands for another."""
    return value if value is None or isinstance(value, bool | int | float | str) else digest(value)
