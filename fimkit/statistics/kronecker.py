r"""Statistics of Kronecker-factored curvature: factors of a layer, then its eigenvalues.

With inputs a (a bias's 1 folded in) and output gradients s of a layer,

- expand: :math:`A` is the mean over positions of :math:`a a^\top`, :math:`S` the mean over examples
  of :math:`\sum_t s_t s_t^\top`;
- reduce: the means over examples of :math:`\bar a \bar a^\top` (the mean over positions) and of
  :math:`(\sum_t s_t)(\sum_t s_t)^\top`;

and with their eigenvectors :math:`Q_A, Q_S` and the per-example gradient
:math:`G_i = \sum_t s_{it} a_{it}^\top`, always whole,

.. math:: \Lambda = \frac{1}{n} \sum_i (Q_S^\top G_i Q_A)^{\odot 2} .

Eschenhagen et al., "Kronecker-factored approximate curvature for modern neural network
architectures", NeurIPS 2023 (expand and reduce); George et al., "Fast approximate natural gradient
descent in a Kronecker-factored eigenbasis", NeurIPS 2018, eq. 8 (Λ).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fimkit.distributed import Ranks
from fimkit.gradients import GroupGradients
from fimkit.operators import EigenKroneckerOperator, LookupRows, MatrixLayout, join_columns
from fimkit.operators.eigh import eigh_all
from fimkit.operators.memory import chunks, working_set
from fimkit.statistics.sides import Gathered, Side, rotate

__all__ = [
    "LayerStatistics",
    "LinearStatistics",
    "WeightSharing",
    "begin_eigenvalues",
    "layer_statistics",
    "set_eigenbases",
]

WeightSharing = Literal["expand", "reduce"]

# Power of two that squares' roots are scaled to.
_HEADROOM = 16

# Rows that make their rotation fast, which reads a basis, and the sum of their squares.
_ENOUGH = 512

# Rows of matrices that a product for many of them at once has, at least.
_ROWS = 64

# A side of more entries than this keeps the identity basis: vocabularies, never hidden widths.
_LARGEST_SIDE = 16384


class LayerStatistics(ABC):
    """Both passes over one layer: its two sides, then its eigenvalues in their eigenbases.

    Parameters
    ----------
    layout : MatrixLayout
        The layer's matrices.
    like : Tensor
        Dtype and device of the statistics.

    Attributes
    ----------
    mask_met : bool
        Whether a mask was read: it had as many positions as a call of the layer, of several.
    """

    #: Whether the layer's sides are of positions, among which a mask selects.
    has_positions: ClassVar[bool] = True

    output: Side
    input: Side

    def __init__(self, layout: MatrixLayout, like: Tensor) -> None:
        self.layout = layout
        self.mask_met = False
        self._like = like
        self._eigenvalues = like.new_empty(0)  # until they are begun
        self._output_basis: Tensor | None = None
        self._input_basis: Tensor | None = None
        self._bases_are_set = False
        self._scales = 1.0, 1.0

    @abstractmethod
    def add_factors(
        self, group: GroupGradients, weights: Tensor | None, mask: Tensor | None
    ) -> None:
        """Add one batch to the two sides.

        Parameters
        ----------
        group : GroupGradients
        weights : Tensor of shape (n, c), or None
            Weights of the rows; one where None.
        mask : Tensor of shape (n, T), or None
            Positions that are not padding; read by calls with T positions.
        """

    def set_bases(self, output: Tensor | None, input: Tensor | None) -> None:
        """Take the eigenvectors of the two sides; None for the identity."""
        self._output_basis, self._input_basis = output, input
        self._bases_are_set = True

    def begin_eigenvalues(self, output: float, input: float) -> None:
        """Begin the sums of squares, in bases that are scaled until `eigen_corrected`.

        Squares of small gradients would underflow, and products of such numbers are slow.

        Parameters
        ----------
        output, input : float
            Scales of the two bases: powers of two, so that scaling is exact.
        """
        self._eigenvalues = self._like.new_zeros(
            (self.layout.groups, self.layout.out, self.layout.columns)
        )
        self._scales = output, input
        for basis, scale in self._scaled():
            basis.mul_(scale)

    def _scaled(self) -> list[tuple[Tensor, float]]:
        """Return the bases that there are, with their scales."""
        bases = zip((self._output_basis, self._input_basis), self._scales, strict=True)
        return [(basis, scale) for basis, scale in bases if basis is not None]

    @abstractmethod
    def add_eigenvalues(self, group: GroupGradients, weights: Tensor | None) -> None:
        """Add one batch's squared per-example gradients in the eigenbasis."""

    def reduce_factors(self, ranks: Ranks) -> None:
        """Add what the other ranks accumulated in the two sides."""
        self.output.reduce(ranks)
        self.input.reduce(ranks)

    def reduce_eigenvalues(self, ranks: Ranks) -> None:
        """Add what the other ranks accumulated in the eigenbasis."""
        ranks.add_up(self._eigenvalues)

    def state_dict(self) -> dict[str, Any]:
        """Return what has been accumulated: of the sides, or, once they ended, in their bases."""
        if self._bases_are_set:
            bases = {"output": self._output_basis, "input": self._input_basis}
            return {"eigenvalues": self._eigenvalues, "bases": bases, "scales": self._scales}
        return {"output": self.output.state_dict(), "input": self.input.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what was accumulated before."""
        if "bases" in state:
            self._eigenvalues = state["eigenvalues"]
            self.set_bases(**state["bases"])
            self._scales = state["scales"]
        else:
            self.output.load_state_dict(state["output"])
            self.input.load_state_dict(state["input"])

    def eigen_corrected(self, n: int) -> EigenKroneckerOperator:
        """Return the operator with the mean of squares over n examples as eigenvalues."""
        means = self._eigenvalues / n
        for basis, scale in self._scaled():
            basis.mul_(1 / scale)
            means /= scale
            means /= scale
        return self._operator(means)

    def factored(self, output: Tensor, input: Tensor) -> EigenKroneckerOperator:
        """Return the operator with products of the sides' eigenvalues, ``(groups, m)`` each."""
        return self._operator(output[:, :, None] * input[:, None, :])

    def _operator(self, eigenvalues: Tensor) -> EigenKroneckerOperator:
        return EigenKroneckerOperator(
            self.layout, eigenvalues, self._output_basis, self._input_basis
        )


class LinearStatistics(LayerStatistics):
    """A layer that acts as one linear map at every position.

    Parameters
    ----------
    layout, like
        As for `LayerStatistics`.
    weight_sharing : {"expand", "reduce"}
    """

    def __init__(self, layout: MatrixLayout, like: Tensor, weight_sharing: WeightSharing) -> None:
        super().__init__(layout, like)
        self._reduce = weight_sharing == "reduce"
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


class LookupStatistics(LayerStatistics):
    """A table that is looked up: the vocabulary's side is diagonal, as one-hot inputs are.

    Parameters
    ----------
    layout, like, weight_sharing
        As for `LinearStatistics`.
    """

    def __init__(self, layout: MatrixLayout, like: Tensor, weight_sharing: WeightSharing) -> None:
        super().__init__(layout, like)
        self._reduce = weight_sharing == "reduce"
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


def layer_statistics(
    form: str, layout: MatrixLayout | None, like: Tensor, weight_sharing: WeightSharing
) -> LayerStatistics | None:
    """Return empty statistics for a layer whose calls act in a form, or None if it is none.

    Parameters
    ----------
    form : str
        As `GroupGradients.form`.
    layout : MatrixLayout or None
        Of the map or the table.
    like, weight_sharing
        As for `LinearStatistics`.
    """
    if layout is None:
        return None
    if form == "map":
        return LinearStatistics(layout, like, weight_sharing)
    if form == "tied table":
        return TiedStatistics(layout, like)
    return LookupStatistics(layout, like, weight_sharing)


def set_eigenbases(
    layers: Mapping[str, LayerStatistics], n: int, ranks: Ranks
) -> dict[str, tuple[Tensor, Tensor]]:
    """Give every layer the eigenvectors of its sides, which end with that.

    Parameters
    ----------
    layers : mapping of str to LayerStatistics
        By name, for errors.
    n : int
        Number of examples, those that met no layer counted.
    ranks : Ranks
        Which have the same sides, and share the work.

    Returns
    -------
    dict of str to (Tensor, Tensor)
        Eigenvalues of each layer's output and input side, ``(groups, m)``.

    Raises
    ------
    IFVPUsageError
        If a side is not finite, by the layer's name.
    """
    full = {
        (name, role): side.finish(n)
        for name, layer in layers.items()
        for role, side in (("output", layer.output), ("input", layer.input))
        if not side.diagonal
    }
    solved = eigh_all({f"{name} ({role} side)": m for (name, role), m in full.items()}, ranks)
    eigenvalues = {}
    for name, layer in layers.items():
        sides = []
        for role, side in (("output", layer.output), ("input", layer.input)):
            sides.append(
                (side.finish(n), None) if side.diagonal else solved[f"{name} ({role} side)"]
            )
        (output_values, output_basis), (input_values, input_basis) = sides
        layer.set_bases(output_basis, input_basis)
        eigenvalues[name] = (output_values, input_values)
    return eigenvalues


def begin_eigenvalues(
    layers: Mapping[str, LayerStatistics], eigenvalues: Mapping[str, tuple[Tensor, Tensor]]
) -> None:
    """Begin the sums of squares of all layers, scaled so that no tiny number is squared.

    Parameters
    ----------
    layers : mapping of str to LayerStatistics
    eigenvalues : mapping of str to (Tensor, Tensor)
        Of both sides of each, as `set_eigenbases` returns them.
    """
    largest = [values.max() for name in layers for values in eigenvalues[name]]
    if not largest:
        return
    scales = map(_inverse_root, torch.stack([v.to(largest[0].device) for v in largest]).tolist())
    for layer, output, input in zip(layers.values(), scales, scales, strict=True):
        layer.begin_eigenvalues(output, input)


def _inverse_root(square: float) -> float:
    """Return a power of two over the root that is nearest, within what float32 holds.

    Sums of two such squares' products over any number of examples are far from the largest number,
    and most that count for nothing beside them far from the smallest.
    """
    if not square > 0:
        return 1.0
    return 2.0 ** (_HEADROOM - min(max(round(math.log2(square) / 2), -60), 60))


def _weighted(signals: Tensor, weights: Tensor | None) -> Tensor:
    """Return signals whose squares are weighted."""
    if weights is None:
        return signals
    return signals * weights.to(signals).sqrt()[:, :, None, None, None]


def _at(tensor: Tensor | None, part: slice) -> Tensor | None:
    return None if tensor is None else tensor[part]
