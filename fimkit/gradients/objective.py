"""From a loss and a kind of Fisher to the scalars whose gradients are its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fimkit.exceptions import IFVPUsageError
from fimkit.losses import Loss, Uniforms

__all__ = ["FisherKind", "Objective"]

# Rows that one example may contribute to the exact Fisher.
_MAX_ROWS = 4096

FisherKind = Literal["empirical", "mc", "exact", "predicted"]


@dataclass(frozen=True)
class Objective:
    """The scalars ``(B, c)`` of a batch whose gradients, weighted, make the Fisher.

    Parameters
    ----------
    loss : Loss
    fisher : {"empirical", "mc", "exact", "predicted"}
    n_samples : int
        Label sets drawn per example for ``"mc"``.
    """

    loss: Loss
    fisher: FisherKind = "empirical"
    n_samples: int = 1

    def labels(self, outputs: Any, batch: Any, uniforms: Uniforms | None) -> list[Any]:
        """Return the targets at which rows are taken: one set, or one per sample."""
        targets = self.loss.targets(batch)
        if self.fisher == "mc":
            assert uniforms is not None
            with torch.no_grad():
                return [self.loss.sample(outputs, targets, uniforms) for _ in range(self.n_samples)]
        if self.fisher == "predicted":
            with torch.no_grad():
                return [self.loss.mode(outputs, targets)]
        return [targets]

    def scalars(self, outputs: Any, labels: list[Any]) -> tuple[Tensor, Tensor | None]:
        """Return ``(B, c)`` scalars and their weights, None where all are one."""
        if self.fisher == "exact":
            rows, weights = self.loss.exact(outputs, labels[0])
            if rows.shape[1] > _MAX_ROWS:
                raise IFVPUsageError(
                    f"fisher='exact' takes {rows.shape[1]} rows and as many backward passes per "
                    f"example here (one per output, or per token and class), above the limit of "
                    f"{_MAX_ROWS}; use fisher='mc', whose mean it is."
                )
            return rows, weights.detach()
        losses = [self._losses(outputs, targets) for targets in labels]
        if len(losses) == 1:
            return losses[0][:, None], None
        scalars = torch.stack(losses, 1)
        return scalars, torch.full_like(scalars, 1 / len(losses), requires_grad=False)

    def of(self, model: nn.Module, batch: Any, labels: list[Any]) -> Tensor:
        """Run the model and return the ``(B, c)`` scalars at given labels."""
        return self.scalars(self.loss.outputs(model, batch), labels)[0]

    def _losses(self, outputs: Any, targets: Any) -> Tensor:
        losses = self.loss.losses(outputs, targets)
        if isinstance(losses, tuple):
            losses = losses[0]
        if not isinstance(losses, Tensor) or losses.ndim != 1:
            found = (
                f"a tensor of shape {tuple(losses.shape)}"
                if isinstance(losses, Tensor)
                else type(losses).__name__
            )
            raise IFVPUsageError(
                f"{self.loss.name} returned {found}; expected one loss per example, shape (B,), "
                "so give its reduction as 'none' and sum over everything but the examples."
            )
        return losses
