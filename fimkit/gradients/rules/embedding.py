"""``F.embedding``: rows of a table, looked up and never one-hot."""

from __future__ import annotations

from copy import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from fimkit.gradients.rules.base import Examples, ParameterIndex, Slot, Use
from fimkit.operators import LookupRows, MatrixLayout

__all__ = ["EmbeddingUse"]


class EmbeddingUse(Use):
    """A lookup of ``weight[indices]``; lookups of ``padding_idx`` carry no gradient."""

    functions = (F.embedding,)
    description = "captured (embedding)"

    def __init__(
        self, indices: Tensor, slot: Slot, shape: torch.Size, padding_idx: int | None
    ) -> None:
        self.names = (slot.name,)
        self.x = indices
        self.table = MatrixLayout(1, shape[0], shape[1])
        self._padding_idx = padding_idx

    @classmethod
    def match(
        cls,
        index: ParameterIndex,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> EmbeddingUse | None:
        """Return the use that a call with these arguments is, or None if it uses no parameter."""
        slot = index.slot(weight)
        if slot is None or not slot.whole or scale_grad_by_freq or max_norm is not None:
            return None
        if padding_idx is not None:
            padding_idx %= weight.shape[0]
        return cls(input, slot, weight.shape, padding_idx)

    def observe(self, output: Tensor) -> None:
        """Set `lead` from the call's output."""
        self.lead = tuple(output.shape[:-1])
        self.x = self.x.expand(self.lead).detach()

    def repeated(self, lead: tuple[int, ...]) -> EmbeddingUse:
        """Return the lookup by each example of what was looked up once for all of them.

        Parameters
        ----------
        lead : tuple of int
            Leading dimensions of the lookup's result as another call is given it.
        """
        use = copy(self)
        use.x = self.x.reshape(lead).detach()
        use.replaces = self
        return use

    def lookup_rows(self, signals: Tensor, examples: Examples) -> LookupRows:
        """Return the rows of the table's gradients by position, not by table entry."""
        s = examples.split_signals(signals, self.lead)
        indices = examples.split(self.x, self.lead)
        if self._padding_idx is not None:
            s = s * (indices != self._padding_idx)[:, None, :, None]
        return LookupRows(indices, s, self.table.out)

    def rows(self, name: str, signals: Tensor, examples: Examples) -> Tensor:
        """Return per-example gradients of the table, shape ``(m, c, *shape)``."""
        rows = self.lookup_rows(signals, examples).densify().rows
        return rows.view(*rows.shape[:2], self.table.out, self.table.in_)
