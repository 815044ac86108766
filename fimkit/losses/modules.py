"""Torch's loss modules, taken literally."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from fimkit.exceptions import IFVPUsageError
from fimkit.losses.base import Loss, Uniforms
from fimkit.losses.likelihoods import (
    BinaryCrossEntropy,
    CrossEntropy,
    GaussianNLL,
    PoissonNLL,
    SquaredError,
)

__all__ = ["ModuleLoss"]


class ModuleLoss(Loss):
    """A module ``loss(outputs, targets)``, applied to each example alone.

    Its reduction, weights and smoothing are its own: `torch.nn.MSELoss` averages over an
    example's outputs and has no ½. Kinds of Fisher other than the empirical need a module that
    is a negative log-likelihood: one without weights or label smoothing, and, where it averages,
    with a single term per example (a mean of several log-likelihoods is none; `MSELoss` is, with
    another variance).

    Parameters
    ----------
    module : Module
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.name = f"loss={type(module).__name__}()"

    def losses(self, outputs: Any, targets: Any) -> Tensor:
        """Return the module's value on each example alone, shape ``(B,)``."""
        arguments: tuple[Any, ...] = (outputs, targets)
        if isinstance(self._module, nn.GaussianNLLLoss):
            mean, variance = outputs
            arguments = (mean, targets, variance)
        try:
            return vmap(self._of_example)(*arguments)
        except RuntimeError:  # an operator without a batching rule, or data-dependent control flow
            return torch.stack(
                [self._of_example(*example) for example in zip(*arguments, strict=True)]
            )

    def sample(self, outputs: Any, targets: Any, uniforms: Uniforms) -> Any:
        """Draw targets from the distribution whose likelihood the module is."""
        return self._likelihood("'mc'", targets).sample(outputs, targets, uniforms)

    def mode(self, outputs: Any, targets: Any) -> Any:
        """Return the distribution's most probable targets."""
        return self._likelihood("'predicted'", targets).mode(outputs, targets)

    def exact(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Return the rows and weights of the likelihood that the module is."""
        return self._likelihood("'exact'", targets).exact(outputs, targets)

    def _of_example(self, *arguments: Tensor) -> Tensor:
        value: Tensor = self._module(*(argument[None] for argument in arguments))
        return value.sum()

    def _likelihood(self, fisher: str, targets: Any) -> Loss:
        module = self._module
        make = _LIKELIHOODS.get(type(module))
        weighted = [
            name
            for name in ("weight", "pos_weight", "label_smoothing")
            if isinstance(value := getattr(module, name, None), Tensor) or value
        ]
        if make is None or weighted:
            what = f" with {weighted[0]}" if weighted else ""
            raise IFVPUsageError(
                f"fisher={fisher} needs a likelihood, which {self.name}{what} is not; use "
                "fisher='empirical', or a loss without weights or label smoothing."
            )
        terms = math.prod(targets.shape[1:])
        if getattr(module, "reduction", "") == "mean" and terms > 1 and make is not _squared:
            raise IFVPUsageError(
                f"fisher={fisher} needs a likelihood, which the mean of {terms} terms per example "
                f"that {self.name} takes is not; use reduction='sum'."
            )
        return make(module)


def _squared(module: Any) -> Loss:
    return SquaredError(None if module.reduction == "mean" else 2.0)


_LIKELIHOODS: dict[type[nn.Module], Callable[[Any], Loss]] = {
    nn.BCEWithLogitsLoss: lambda module: BinaryCrossEntropy(),
    nn.CrossEntropyLoss: lambda module: CrossEntropy(module.ignore_index, classes_last=False),
    nn.GaussianNLLLoss: lambda module: GaussianNLL(module.eps),
    nn.MSELoss: _squared,
    nn.PoissonNLLLoss: lambda module: PoissonNLL(module.log_input, module.eps),
}
