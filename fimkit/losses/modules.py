"""Torch's loss modules, taken literally."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from fimkit.exceptions import IFVPUsageError
from fimkit.losses.activations import not_logits
from fimkit.losses.base import Loss, Uniforms, described, logits_of, run
from fimkit.losses.likelihoods import (
    BinaryCrossEntropy,
    CrossEntropy,
    GaussianNLL,
    PoissonNLL,
    SquaredError,
    check_probabilities,
    mean_and_variance,
    shaped_as,
)
from fimkit.losses.tokens import unshifted

__all__ = ["ModuleLoss"]


class ModuleLoss(Loss):
    """A module ``loss(outputs, targets)``, applied to each example alone.

    Its reduction, weights and smoothing are its own: `torch.nn.MSELoss` averages over an
    example's outputs and has no ½. Kinds of Fisher other than the empirical need a module that
    is a negative log-likelihood: one without weights or label smoothing, and, where it averages,
    with a single term per example (a mean of several log-likelihoods is none; ``MSELoss`` is, with
    another variance).

    Parameters
    ----------
    module : Module

    Raises
    ------
    IFVPUsageError
        If the module cannot be called with outputs and targets.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module: Any = module
        self.name = f"loss={type(module).__name__}()"
        self._is_gaussian = isinstance(module, nn.GaussianNLLLoss)
        #: Whether vmap takes the module; None until it was tried.
        self._vectorizes: bool | None = None
        signature = inspect.signature(module.forward)
        try:
            signature.bind(*range(3 if self._is_gaussian else 2))
        except TypeError:
            raise IFVPUsageError(
                f"{self.name} takes {signature}, not a model's outputs and targets; pass a "
                "callable loss(model, batch) that calls it and returns (B,) losses."
            ) from None

    def outputs(self, model: nn.Module, batch: Any) -> Any:
        """Run the model; refuse classes that are where the module does not look for them."""
        out = run(model, batch)
        logits = logits_of(out)
        if type(self._module) in _IGNORING and isinstance(logits, Tensor) and logits.ndim == 3:
            raise IFVPUsageError(
                f"{self.name} takes classes along dimension 1, and .logits of shape "
                f"{tuple(logits.shape)} have them last, as those of Hugging Face's models; use "
                "loss='causal_lm' for the next token of each, loss='cross_entropy' for a label of "
                "each token, or a callable loss(model, batch). Let a model that has its classes "
                "along dimension 1 return the tensor itself."
            )
        return out if logits is None else logits

    def targets(self, batch: Any) -> Any:
        """Return the targets of a batch; refuse what has no loss, or no likelihood.

        That is an example whose mean would be of nothing, and a binary target beyond 0 and 1.
        """
        targets = super().targets(batch)
        if type(self._module) in _BINARY:
            check_probabilities(targets, self.name)
        module = self._module
        averages = type(module) in _IGNORING and module.reduction == "mean"
        if averages and isinstance(targets, Tensor) and not targets.dtype.is_floating_point:
            ignored = module.ignore_index
            shape = len(targets), math.prod(targets.shape[1:])
            empty = (targets == ignored).reshape(shape).all(1)
            if empty.any():
                raise IFVPUsageError(
                    f"{self.name} takes the mean over the targets of an example that count, of "
                    f"which example {int(empty.nonzero()[0])} of the batch has none: all are "
                    f"ignore_index={ignored}, and their mean is NaN. Use reduction='sum' or "
                    "loss='cross_entropy', for which such an example has no loss and no gradient, "
                    "or leave it out of the data."
                )
        return targets

    def doubt(self, batch: Any) -> str | None:
        """Return that labels are tokens, compared unshifted, or that class weights cancel."""
        module = self._module
        if type(module) not in _IGNORING:
            return None
        weighted = module.weight is not None and not getattr(module, "label_smoothing", 0)
        if module.reduction == "mean" and weighted and _is_one_label(super().targets(batch)):
            return (
                f"{self.name} divides by the weights of the targets that it averages over, and of "
                "an example alone that is its own: class weights have no effect. Use "
                "reduction='sum' (or 'none'), which multiplies every example's loss by its weight."
            )
        return unshifted(batch, self.name, module.ignore_index)

    def doubt_outputs(self, outputs: Any) -> str | None:
        """Return that outputs are probabilities, where logits or their logarithms are taken."""
        kind = type(self._module)
        if kind in _ACTIVATED:
            return not_logits(outputs, _ACTIVATED[kind], self.name)
        if kind is not nn.NLLLoss or not isinstance(outputs, Tensor) or outputs.ndim < 2:
            return None
        totals = outputs.detach().double().logsumexp(1)
        if bool((totals.abs() < (1e-2 if outputs.dtype.itemsize > 2 else 0.3)).all()):
            return None
        return (
            f"{self.name} takes logarithms of probabilities, which the model's outputs are not "
            "(exp(outputs) does not add up to one over the classes): let the model end with a "
            "log_softmax, or use torch.nn.CrossEntropyLoss() for logits."
        )

    def losses(self, outputs: Any, targets: Any) -> Tensor:
        """Return the module's value on each example alone, shape ``(B,)``."""
        arguments = self._arguments(outputs, targets)
        if self._vectorizes is not False:
            try:
                losses = self._vectorized(*arguments)
            except Exception:  # vmap refuses with many types of error; the other way is exact
                pass
            else:
                self._vectorizes = True
                return losses
        losses = self._one_by_one(*arguments)
        self._vectorizes = False
        return losses

    def sample(self, outputs: Any, targets: Any, uniforms: Uniforms) -> Any:
        """Draw targets from the distribution whose likelihood the module is."""
        return self._likelihood("'mc'", outputs, targets).sample(outputs, targets, uniforms)

    def mode(self, outputs: Any, targets: Any) -> Any:
        """Return the distribution's most probable targets."""
        return self._likelihood("'predicted'", outputs, targets).mode(outputs, targets)

    def exact(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Return the rows and weights of the likelihood that the module is."""
        return self._likelihood("'exact'", outputs, targets).exact(outputs, targets)

    def measure(self, measurement: str, outputs: Any, targets: Any) -> Tensor:
        """Return what the logits say for the targets, whatever the module weighs them by."""
        make = _LIKELIHOODS.get(type(self._module))
        if make is None:
            return super().measure(measurement, outputs, targets)
        self._arguments(outputs, targets)  # refuses what the module does not take
        likelihood = make(self._module)
        likelihood.name = self.name
        return likelihood.measure(measurement, outputs, targets)

    def _arguments(self, outputs: Any, targets: Any) -> tuple[Tensor, ...]:
        """Return what the module is called with, tensors of equally many examples."""
        if self._is_gaussian:
            mean, variance = mean_and_variance(outputs, self.name)
            arguments: tuple[Any, ...] = (mean, targets, variance)
        else:
            arguments = (outputs, targets)
        if not all(isinstance(argument, Tensor) and argument.ndim for argument in arguments):
            raise IFVPUsageError(
                f"{self.name} needs outputs that are a tensor (B, ...), or have one as .logits, "
                f"and targets that are a tensor (B, ...); got {_told(*arguments)}. Pass a "
                "callable loss(model, batch) that knows them."
            )
        if len({len(argument) for argument in arguments}) > 1:
            raise IFVPUsageError(
                f"{self.name} got outputs and targets of different numbers of examples: "
                f"{_told(*arguments)}."
            )
        if type(self._module) in _ELEMENTWISE:
            arguments = (arguments[0], shaped_as(arguments[0], targets, self.name), *arguments[2:])
        if isinstance(self._module, _CLASSIFIERS) and not targets.dtype.is_floating_point:
            arguments = (outputs, arguments[1].long())  # the modules take no other integers
        return arguments

    def _vectorized(self, *arguments: Tensor) -> Tensor:
        """Return the losses by one call of the module for all examples."""
        call = vmap(self._of_example)
        if self._vectorizes:
            return call(*arguments)
        with warnings.catch_warnings():
            # What vmap itself takes example by example, it warns about.
            warnings.filterwarnings("error", "There is a performance drop")
            return call(*arguments)

    def _one_by_one(self, *arguments: Tensor) -> Tensor:
        if not len(arguments[0]):
            return arguments[0].flatten()
        losses = []
        for example in zip(*arguments, strict=True):
            try:
                losses.append(self._of_example(*example))
            except Exception as error:
                error.add_note(
                    f"{self.name} raised this for one example, called with "
                    f"{_told(*(argument[None] for argument in example))}."
                )
                raise
        return torch.stack(losses)

    def _of_example(self, *arguments: Tensor) -> Tensor:
        value = self._module(*(argument[None] for argument in arguments))
        if not isinstance(value, Tensor):
            raise IFVPUsageError(
                f"{self.name} returned {type(value).__name__}; expected a tensor, whose sum is "
                "the loss. Pass a callable loss(model, batch) that returns (B,) losses."
            )
        return value.sum()

    def _likelihood(self, fisher: str, outputs: Any, targets: Any) -> Loss:
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
        self._arguments(outputs, targets)  # refuses what the module does not take
        if isinstance(module, nn.CrossEntropyLoss) and targets.dtype.is_floating_point:
            raise IFVPUsageError(
                f"fisher={fisher} of {self.name} is taken at integer labels; got targets that are "
                "class probabilities. Give integer class targets, or use fisher='empirical'."
            )
        terms = math.prod(targets.shape[1:])
        if getattr(module, "reduction", "") == "mean" and terms > 1 and make is not _squared:
            raise IFVPUsageError(
                f"fisher={fisher} needs a likelihood, which the mean of {terms} terms per example "
                f"that {self.name} takes is not; use reduction='sum'."
            )
        likelihood = make(module)
        likelihood.name = self.name
        return likelihood


def _squared(module: Any) -> Loss:
    return SquaredError(None if module.reduction == "mean" else 2.0)


def _is_one_label(targets: Any) -> bool:
    if not isinstance(targets, Tensor) or targets.is_floating_point():
        return False
    return targets.ndim > 0 and targets.numel() == len(targets)


def _told(outputs: Any, targets: Any, *variances: Any) -> str:
    """Return how a message tells what a module is called with."""
    told = f"outputs {described(outputs)}, targets {described(targets)}"
    return told + "".join(f", variances {described(each)}" for each in variances)


_IGNORING = (nn.CrossEntropyLoss, nn.NLLLoss)
_BINARY = (nn.BCELoss, nn.BCEWithLogitsLoss, nn.MultiLabelSoftMarginLoss)
_ELEMENTWISE = (
    *_BINARY,
    nn.GaussianNLLLoss,
    nn.HingeEmbeddingLoss,
    nn.HuberLoss,
    nn.KLDivLoss,
    nn.L1Loss,
    nn.MSELoss,
    nn.MultiLabelMarginLoss,
    nn.PoissonNLLLoss,
    nn.SmoothL1Loss,
    nn.SoftMarginLoss,
)
_ACTIVATED = {nn.BCEWithLogitsLoss: "Sigmoid", nn.CrossEntropyLoss: "Softmax"}
_CLASSIFIERS = (*_IGNORING, nn.MultiLabelMarginLoss, nn.MultiMarginLoss)

_LIKELIHOODS: dict[type[nn.Module], Callable[[Any], Loss]] = {
    nn.BCEWithLogitsLoss: lambda module: BinaryCrossEntropy(),
    nn.CrossEntropyLoss: lambda module: CrossEntropy(module.ignore_index),
    nn.GaussianNLLLoss: lambda module: GaussianNLL(module.eps),
    nn.MSELoss: _squared,
    nn.PoissonNLLLoss: lambda module: PoissonNLL(module.log_input, module.eps),
}
