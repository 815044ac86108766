"""From a loss and a kind of Fisher to the scalars whose gradients are its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fimkit.exceptions import IFVPUsageError
from fimkit.gradients.tree import common_length, tensors
from fimkit.losses import Loss, Uniforms

__all__ = ["FisherKind", "Objective"]

# Rows that one example may contribute to the exact Fisher.
_MAX_ROWS = 4096

# What to do about a loss that is not one number per example.
_PER_EXAMPLE = (
    "give its reduction as 'none' and sum over all but the examples; in place of the loss that a "
    "Hugging Face model returns, a mean over the batch, use loss='cross_entropy', or 'causal_lm' "
    "for next tokens"
)

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

    def columns(
        self, outputs: Any, labels: list[Any]
    ) -> tuple[Sequence[Tensor], Tensor | None, Tensor | None]:
        """Return the scalars as c columns ``(B,)``, their weights, and the loss's mask.

        Weights ``(B, c)`` are None where all are one. A mask is ``(B, T)``, True where a position
        counts, None where the loss tells none. Columns that are computed apart stay apart, so
        that the backward pass of one does not go through the others.
        """
        if self.fisher == "exact":
            rows, weights = self.loss.exact(outputs, labels[0])
            if rows.shape[1] > _MAX_ROWS:
                raise IFVPUsageError(
                    f"fisher='exact' takes {rows.shape[1]} rows and as many backward passes per "
                    f"example here (one per output, or per token and class), above the limit of "
                    f"{_MAX_ROWS}; use fisher='mc', whose mean it is."
                )
            return rows.unbind(1), weights.detach(), self._mask(outputs, labels[0])
        results = [self._losses(outputs, targets) for targets in labels]
        losses = [values for values, _ in results]
        mask = results[0][1]
        if len(losses) == 1:
            return losses, None, mask
        weights = losses[0].new_full((len(losses[0]), len(losses)), 1 / len(losses))
        return losses, weights, mask

    def of(self, model: nn.Module, batch: Any, labels: list[Any]) -> Tensor:
        """Run the model and return the ``(B, c)`` scalars at given labels."""
        columns, _, _ = self.columns(self.loss.outputs(model, batch), labels)
        return torch.stack(tuple(columns), 1)

    def _mask(self, outputs: Any, targets: Any) -> Tensor | None:
        """Return the mask that the loss tells beside its values, where it has any."""
        if type(self.loss).losses is Loss.losses:
            return None
        with torch.no_grad():
            return self._losses(outputs, targets)[1]

    def _losses(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor | None]:
        losses = self.loss.losses(outputs, targets)
        mask = None
        if isinstance(losses, tuple | list) and len(losses) == 2:
            losses, mask = losses
            if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
                raise IFVPUsageError(
                    f"{self.loss.name} returned a mask {_shown(mask)}; expected shape (B, T), 1 "
                    "where a position counts and 0 where it is padding."
                )
        if not isinstance(losses, Tensor) or losses.ndim != 1:
            raise IFVPUsageError(
                f"{self.loss.name} returned {_shown(losses)}; expected one loss per example, "
                f"shape (B,), so {_PER_EXAMPLE}."
            )
        return losses, mask

    def check_number(self, n: int, batch: Any) -> None:
        """Raise if one loss was returned for a batch of more examples.

        Raises
        ------
        IFVPUsageError
            If n is 1, and all tensors of the batch have the same larger size along their first
            dimension, where the examples are.
        """
        size = common_length(batch) if n == 1 else None
        if size is not None and size > 1 and not _is_one_with_positions_first(batch):
            raise IFVPUsageError(
                f"{self.loss.name} returned one loss for {size} examples, as many as every tensor "
                f"of the batch has along its first dimension; expected shape ({size},), so "
                f"{_PER_EXAMPLE}. If the batch is a single example, give each of its tensors a "
                "first dimension of 1."
            )

    def checked_mask(self, mask: Tensor, n: int) -> Tensor:
        """Return the mask that the loss told as booleans, one row per example.

        Raises
        ------
        IFVPUsageError
            If it has other values than 0 and 1, or not a row for each of n examples.
        """
        if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
            raise IFVPUsageError(
                f"{self.loss.name} returned a mask with other values than 0 and 1; it is 1 where a "
                "position counts and 0 where it is padding (not an additive mask)."
            )
        if mask.shape[0] != n:
            raise IFVPUsageError(
                f"{self.loss.name} returned a mask of shape {tuple(mask.shape)} for {n} examples; "
                f"expected ({n}, T), a row for each (expand one that all share)."
            )
        return mask.bool()


def _is_one_with_positions_first(batch: Any) -> bool:
    """Whether a batch may be one example along dimension 1, as layers take it by default."""
    ranks = {tensor.ndim for tensor in tensors(batch) if tensor.ndim}
    alone = all(tensor.shape[1:2] == (1,) for tensor in tensors(batch) if tensor.ndim)
    return alone and max(ranks) == 3


def _shown(value: Any) -> str:
    """Return how a message tells what a value is."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return type(value).__name__
