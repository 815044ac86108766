"""What is explained of a query: its loss, or another number that the model gives it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fimkit.exceptions import IFVPUsageError
from fimkit.losses.base import CallableLoss, Loss, described

__all__ = ["measured"]

_OF_LOGITS = ("logit", "log_odds", "margin")


def measured(loss: Loss, measurement: Any) -> Loss:
    """Return the loss that training lowers where it raises the measurement.

    Parameters
    ----------
    loss : Loss
    measurement : {"loss", "logit", "log_odds", "margin"} or callable
        The loss itself, or a measurement whose negative stands for it: see `Loss.measure`, or a
        function ``measurement(model, batch)`` returning ``(B,)`` numbers.

    Raises
    ------
    IFVPUsageError
        If it is none of these.
    """
    if isinstance(measurement, str) and measurement == "loss":
        return loss
    if isinstance(measurement, str) and measurement in _OF_LOGITS:
        return _Measured(loss, measurement)
    if callable(measurement) and not isinstance(measurement, nn.Module | type):
        return _measured_by(measurement)
    raise IFVPUsageError(
        f"measurement={measurement!r} is not known; expected 'loss', "
        f"{', '.join(map(repr, _OF_LOGITS))}, or a callable measurement(model, batch) returning "
        "(B,) numbers."
    )


class _Measured(Loss):
    """The negative of a measurement of the logits that a loss is of."""

    def __init__(self, loss: Loss, measurement: str) -> None:
        self._loss = loss
        self._measurement = measurement
        self.name = f"measurement={measurement!r}"

    def outputs(self, model: nn.Module, batch: Any) -> Any:
        """Run the model as the loss does."""
        return self._loss.outputs(model, batch)

    def targets(self, batch: Any) -> Any:
        """Return the loss's targets."""
        return self._loss.targets(batch)

    def losses(self, outputs: Any, targets: Any) -> Tensor:
        """Return minus the measurement of each example, shape ``(B,)``."""
        return -self._loss.measure(self._measurement, outputs, targets)


def _measured_by(function: Callable[[nn.Module, Any], Any]) -> Loss:
    """Return the negative of what a function measures."""
    name = f"measurement={getattr(function, '__name__', type(function).__name__)}"

    def negative(model: nn.Module, batch: Any) -> Tensor:
        values = function(model, batch)
        # Of anything else, such as a pair with a mask, the sign would stay as it is.
        if not isinstance(values, Tensor) or values.ndim != 1 or not values.is_floating_point():
            raise IFVPUsageError(
                f"{name} returned {described(values)}; expected one number per example, a "
                "floating-point tensor of shape (B,)."
            )
        return -values

    loss = CallableLoss(negative)
    loss.name = name
    return loss
