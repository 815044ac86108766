"""Whether the losses of examples depend on the rest of their batch, by running them alone."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fimkit.exceptions import IFVPUsageError
from fimkit.gradients.cuts import Cut
from fimkit.gradients.fallback import FallbackGradients
from fimkit.gradients.tree import tensors
from fimkit.gradients.verification import same_scalars

__all__ = ["DEPENDENT", "IndependenceCheck", "unchecked"]

#: What a loss is that mixes examples, as messages tell it.
DEPENDENT = (
    "the loss of one example depends on the others in its batch (batch statistics, a division by "
    "the batch's length, outputs (B, 1) broadcast against targets (B,)), or differs between calls "
    "(randomness in the model, which may be drawn in the dataset instead, or replaced by its mean)"
)


class IndependenceCheck:
    """Runs the first and the last examples of a batch alone, to compare them with the whole.

    Parameters
    ----------
    fallback : FallbackGradients
        Which runs the model on parts of the batch.
    batch, labels
        As the objective takes them.
    scalars : Tensor of shape (n, c)
        Of the whole batch.
    precision : torch.dtype
        The coarsest in which the model computes.
    """

    def __init__(
        self,
        fallback: FallbackGradients,
        batch: Any,
        labels: list[Any],
        scalars: Tensor,
        precision: torch.dtype,
    ) -> None:
        self._fallback = fallback
        self._batch, self._labels = batch, labels
        self._scalars, self._precision = scalars, precision
        self._cuts = fallback.cuts(batch, labels, len(scalars))

    def run(self) -> bool:
        """Refuse scalars of examples that are others without the rest of their batch.

        One is run alone; two, where the model does not run on one, or half of the batch.

        Returns
        -------
        checked : bool
            False where the model runs on no part of the batch.
        """
        n = len(self._scalars)
        for count in sorted({1, 2, n // 2} & set(range(1, n))):
            same = [self._is_same(part) for part in (slice(0, count), slice(n - count, n))]
            if False in same:
                raise IFVPUsageError(
                    f"an example alone has another loss than in its batch: {DEPENDENT}. Remove the "
                    "dependence."
                )
            if None not in same:
                return True
        return n == 1

    def _is_same(self, part: slice) -> bool | None:
        """Whether some examples have the same scalars alone; None if the model does not run."""
        ran = None
        for cut in self._cuts:
            alone = self._alone(part, cut)
            if alone is None:
                continue
            same = same_scalars(alone, self._scalars[part], self._precision)
            if same is None:
                same = self._is_same_in_double(part, cut)
            if same:
                leaves = tensors(self._batch)
                self._fallback.shared.assume(cut, leaves, len(self._scalars))
                return True
            ran = False
        return ran

    def _is_same_in_double(self, part: slice, cut: Cut) -> bool:
        """Whether that holds in float64, where the model's own precision does not tell.

        Taken for true of a model that cannot be run in it.
        """
        alone, together = self._alone(part, cut, double=True), self._together_in_double
        if alone is None or together is None:
            return True
        error, scale = (alone - together[part]).abs().max(), together[part].abs().max()
        return bool(error <= 1e-4 * scale + 1e-6)  # parts may be in float32 all the same

    @cached_property
    def _together_in_double(self) -> Tensor | None:
        whole = slice(0, len(self._scalars))
        return self._alone(whole, self._cuts[0], double=True)

    def _alone(self, part: slice, cut: Cut, *, double: bool = False) -> Tensor | None:
        n = len(self._scalars)
        return self._fallback.alone(part, cut, self._batch, self._labels, n, double=double)


def unchecked(batch: Any) -> str:
    """Return the warning that a batch could not be checked."""
    return (
        "it was not checked that no example's loss depends on the others: the model runs on no "
        f"part of the batch, a {type(batch).__name__}. If it does not depend on them, all is "
        "right; a batch that is a tuple, list, mapping or dataclass of tensors can be cut."
    )
