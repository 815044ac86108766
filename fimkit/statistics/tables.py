"""Statistics of tables that are looked up, whose vocabulary is the diagonal side."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fimkit.gradients import GroupGradients
from fimkit.operators import EigenKroneckerOperator, LookupRows, MatrixLayout
from fimkit.operators.memory import chunks
from fimkit.statistics.layer import LayerStatistics, WeightSharing
from fimkit.statistics.sides import Side

__all__ = ["LookupStatistics", "TiedStatistics"]


class LookupStatistics(LayerStatistics):
    """A table that is looked up: the vocabulary's side is diagonal, as one-hot inputs are.

    Parameters
    ----------
    layout, like, weight_sharing
        As for `LinearStatistics`.
    """

    def __init__(self, layout: MatrixLayout, like: Tensor, weight_sharing: WeightSharing) -> None:
        super().__init__(layout, like, weight_sharing)
        self.output = Side(1, layout.out, like, diagonal=True)
        self.input = Side(1, layout.columns, like, diagonal=False)

    def add_factors(
        self, group: GroupGradients, weights: Tensor | None, mask: Tensor | None
    ) -> None:
        """Add one batch to the two sides."""
        for call in group.calls:
            rows = group.lookups([call])
            assert rows is not None
            s, indices = rows.signals, rows.indices
            kept = torch.ones_like(indices, dtype=s.dtype)
            if mask is not None and mask.shape == indices.shape:
                self.mask_met = self.mask_met or mask.shape[1] > 1
                kept = mask.to(s)
                s = s * kept[:, None, :, None]
            if weights is not None:
                s = s * weights.to(s).sqrt()[:, :, None, None]
            if self._reduce:
                self._note_squares(kept.square().mean(), s.square().sum() / len(s))
                s = s.sum(2, keepdim=True)
                self._add_mean_units(indices, kept)
                self.output.count(len(indices))
            else:
                self.output.add_units(indices.flatten(), kept.flatten())
                self.output.count(kept.sum())
            self.input.add(s.flatten(0, 1)[None])

    def _add_mean_units(self, indices: Tensor, kept: Tensor) -> None:
        """Add the squared shares of each example's positions that look up each table row."""
        for part in chunks(len(indices), indices.shape[1] ** 2 * 2 * kept.element_size()):
            same = indices[part, :, None] == indices[part, None, :]
            counts = (same * kept[part, None, :]).sum(2) * kept[part]
            shares = counts / kept[part].sum(1, keepdim=True).clamp(min=1) ** 2
            self.output.add_units(indices[part].flatten(), shares.flatten())

    def add_eigenvalues(self, group: GroupGradients, weights: Tensor | None) -> None:
        """Add one batch's squared per-example gradients in the eigenbasis."""
        rows = group.lookups()
        assert rows is not None
        assert self._input_basis is not None
        s = rows.signals @ self._input_basis[0]
        w = s.new_ones(s.shape[:2]) if weights is None else weights.to(s)
        squares = LookupRows(rows.indices, s, rows.vocabulary).diagonal(w)
        self._eigenvalues += squares.view_as(self._eigenvalues)


class TiedStatistics(LayerStatistics):
    """A table that is both looked up and multiplied by: its sides are those of the sum.

    The input side is the mean of ``G_iᵀ G_i`` over both uses together, the vocabulary's the
    diagonal of the mean of ``G_i G_iᵀ``.
    """

    has_positions = False

    def __init__(self, layout: MatrixLayout, like: Tensor) -> None:
        super().__init__(layout, like)
        self.output = Side(1, layout.out, like, diagonal=True)
        self.input = Side(1, layout.columns, like, diagonal=False)

    def add_factors(
        self, group: GroupGradients, weights: Tensor | None, mask: Tensor | None
    ) -> None:
        """Add one batch to the two sides."""
        for gradients in self._matrices(group, weights):
            self.input.add(gradients[None])
            self.output.add(gradients.mT[None])

    def add_eigenvalues(self, group: GroupGradients, weights: Tensor | None) -> None:
        """Add one batch's squared per-example gradients in the eigenbasis."""
        for gradients in self._matrices(group, weights):
            rotated = gradients if self._input_basis is None else gradients @ self._input_basis[0]
            self._eigenvalues += rotated.square_().sum(0)

    def factored(self, output: Tensor, input: Tensor) -> EigenKroneckerOperator:
        """Return the operator with products of the sides' eigenvalues, of the sides' own trace."""
        total = input.sum().clamp(min=torch.finfo(input.dtype).tiny)
        return super().factored(output, input / total)

    def _matrices(self, group: GroupGradients, weights: Tensor | None) -> Iterator[Tensor]:
        """Yield per-example gradients times the root of their weight, ``(rows, out, columns)``."""
        each = group.c * self.layout.size * self._like.element_size()
        for part in chunks(group.n, each):
            rows = group.dense(part)
            if weights is not None:
                rows = rows * weights[part].to(rows).sqrt()[:, :, None]
            yield rows.view(-1, self.layout.out, self.layout.columns)
