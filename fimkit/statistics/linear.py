"""Statistics of layers that act as one linear map at every position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fimkit.distributed import Ranks
from fimkit.gradients import GroupGradients
from fimkit.operators import EigenKroneckerOperator, MatrixLayout, join_columns
from fimkit.operators.memory import chunks, working_set
from fimkit.statistics.layer import LayerStatistics, WeightSharing
from fimkit.statistics.sides import Gathered, Side, rotate

__all__ = ["LinearStatistics"]

# Rows that make their rotation fast, which reads a basis, and the sum of their squares.
_ENOUGH = 512

# Rows of matrices that a product for many of them at once has, at least.
_ROWS = 64

# A side of more entries than this keeps the identity basis: vocabularies, never hidden widths.
_LARGEST_SIDE = 16384


class LinearStatistics(LayerStatistics):
    """A layer that acts as one linear map at every position.

    Parameters
    ----------
    layout, like
        As for `LayerStatistics`.
    weight_sharing : {"expand", "reduce"}
    """

    def __init__(self, layout: MatrixLayout, like: Tensor, weight_sharing: WeightSharing) -> None:
        super().__init__(layout, like, weight_sharing)
        self._few = Gathered(_ENOUGH)
        self.output, self.input = (
            Side(layout.groups, size, like, diagonal=size > _LARGEST_SIDE)
            for size in (layout.out, layout.columns)
        )

    def add_factors(
        self, group: GroupGradients, weights: Tensor | None, mask: Tensor | None
    ) -> None:
        """Add one batch to the two sides."""
        for call in group.calls:
            for part in group.parts([call]):
                sides = group.sides(part, [call])
                self.add_positions(*sides, _at(weights, part), _at(mask, part))

    def add_positions(
        self,
        inputs: Sequence[Tensor],
        signals: Tensor,
        weights: Tensor | None,
        mask: Tensor | None,
    ) -> None:
        """Add the positions of one call to the two sides.

        The input side counts them itself, for a mean over positions (over calls, if reduced). The
        output side's mean is over the examples that `set_eigenbases` is told of: an example that
        meets several calls is one.

        Parameters
        ----------
        inputs, signals
            As `GroupGradients.sides` returns them.
        weights : Tensor of shape (n, c), or None
        mask : Tensor of shape (n, T), or None
            As for `add_factors`, of the same examples.
        """
        a, s = inputs, signals
        n, positions = s.shape[0], s.shape[2]
        count: Tensor | int = n * positions
        lengths: Tensor | int = positions
        if mask is not None and mask.shape[1] == positions:
            self.mask_met = self.mask_met or positions > 1
            kept = mask.to(s)
            a = [columns * kept[:, :, None, None] for columns in a]
            s = s * kept[:, None, :, None, None]
            count = kept.sum()
            lengths = kept.sum(1).clamp(min=1)[:, None, None, None]
        if self._reduce:
            whole = torch.stack([columns.square().sum() for columns in a]).sum()
            self._note_squares(s.square().sum() / n, whole / (n * positions))
            a = [columns.sum(1, keepdim=True) / lengths for columns in a]
            s = s.sum(2, keepdim=True)
        self.input.add(*(columns.permute(2, 0, 1, 3) for columns in a))
        self.input.count(n if self._reduce else count)
        self.output.add(_weighted(s, weights).permute(3, 0, 1, 2, 4).flatten(1, 2))

    def add_eigenvalues(self, group: GroupGradients, weights: Tensor | None) -> None:
        """Add one batch's squared per-example gradients in the eigenbasis."""
        for part in group.parts():
            self.add_squares(*group.sides(part), _at(weights, part))

    def add_squares(
        self, inputs: Sequence[Tensor], signals: Tensor, weights: Tensor | None
    ) -> None:
        """Add the squares of rows in the eigenbasis, the positions of all calls joined.

        Parameters
        ----------
        inputs, signals
            As `GroupGradients.sides` returns them.
        weights : Tensor of shape (n, c), or None
            As for `add_eigenvalues`, of the same examples.
        """
        signals = _weighted(signals, weights)
        positions = signals.shape[2]
        if positions == 1:
            self._add_few(self._few.add(signals[:, :, 0], *(columns[:, 0] for columns in inputs)))
            return
        a = [columns.permute(2, 0, 1, 3) for columns in inputs]  # (groups, m, T, columns)
        s = signals.permute(3, 0, 1, 2, 4)  # (groups, m, c, T, out)
        out = 0 if self._output_basis is None else self.layout.out
        columns = 0 if self._input_basis is None else self.layout.columns
        if positions * (out**2 + columns**2) < (
            self.layout.out * self.layout.columns * (out + columns)
        ):
            rotated = rotate(self._output_basis, s.flatten(1, 2)).view(s.shape)
            self._add_rotated(rotate(self._input_basis, *a), rotated)
        else:
            self._add_unrotated(join_columns(a), s)

    def eigen_corrected(self, n: int) -> EigenKroneckerOperator:
        """Return the operator with the mean of squares over n examples as eigenvalues."""
        self._add_few(self._few.take())
        return super().eigen_corrected(n)

    def reduce_eigenvalues(self, ranks: Ranks) -> None:
        """Add what the other ranks accumulated in the eigenbasis."""
        self._add_few(self._few.take())
        super().reduce_eigenvalues(ranks)

    def state_dict(self) -> dict[str, Any]:
        """Return what has been accumulated, with what is held for a larger product."""
        return {**super().state_dict(), "few": self._few.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what was accumulated before."""
        super().load_state_dict(state)
        self._few.load_state_dict(state["few"])

    def _add_few(self, ready: list[tuple[Tensor, ...]]) -> None:
        """Add squares of ``s aᵀ``: signals ``(m, c, groups, out)``, then inputs."""
        for signals, *inputs in ready:
            m, c, *_ = signals.shape
            a = rotate(
                self._input_basis, *(columns.transpose(0, 1)[:, :, None] for columns in inputs)
            )
            a = a.square_()[:, :, 0]
            s = rotate(self._output_basis, signals.flatten(0, 1).transpose(0, 1)[:, :, None])
            s = s.square_().view(len(s), m, c, -1)
            s = s.sum(2) if c > 1 else s[:, :, 0]
            if len(a) == 1:
                self._eigenvalues[0].addmm_(s[0].T, a[0])
            else:
                self._eigenvalues.baddbmm_(s.mT, a)

    def _add_rotated(self, a: Tensor, s: Tensor) -> None:
        """Add squares of ``Σ_t s_t a_tᵀ``, a few columns of many examples at a time."""
        row = self.layout.groups * self.layout.columns * a.element_size()
        budget = working_set(a.device)
        for part in chunks(a.shape[1], min(_ROWS, self.layout.out) * row, budget=budget):
            inputs, signals = a[:, part], s[:, part]
            for rows in chunks(self.layout.out, inputs.shape[1] * row, budget=budget):
                for j in range(s.shape[2]):
                    gradients = signals[:, :, j, :, rows].mT @ inputs  # (groups, m, rows, columns)
                    self._eigenvalues[:, rows] += gradients.square_().sum(1)

    def _add_unrotated(self, a: Tensor, s: Tensor) -> None:
        """Add squares of ``Σ_t s_t a_tᵀ`` that are to be rotated, example by example."""
        each = self.layout.size * a.element_size()
        for j in range(s.shape[2]):
            for part in chunks(a.shape[1], each, budget=working_set(a.device)):
                gradients = s[:, part, j].mT @ a[:, part]  # (groups, m, out, columns)
                if self._output_basis is not None:
                    gradients = self._output_basis.mT[:, None] @ gradients
                self._eigenvalues += rotate(self._input_basis, gradients).square_().sum(1)


def _weighted(signals: Tensor, weights: Tensor | None) -> Tensor:
    """Return signals whose squares are weighted."""
    if weights is None:
        return signals
    return signals * weights.to(signals).sqrt()[:, :, None, None, None]


def _at(tensor: Tensor | None, part: slice) -> Tensor | None:
    return None if tensor is None else tensor[part]
