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

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fimkit.distributed import Ranks
from fimkit.gradients import GroupGradients
from fimkit.operators import EigenKroneckerOperator, MatrixLayout
from fimkit.statistics.sides import Side

__all__ = ["LayerStatistics", "WeightSharing"]

WeightSharing = Literal["expand", "reduce"]


class LayerStatistics(ABC):
    """Both passes over one layer: its two sides, then its eigenvalues in their eigenbases.

    Parameters
    ----------
    layout : MatrixLayout
        The layer's matrices.
    like : Tensor
        Dtype and device of the statistics.
    weight_sharing : {"expand", "reduce"}, default="expand"

    Attributes
    ----------
    mask_met : bool
        Whether a mask was read: it had as many positions as a call of the layer, of several.
    """

    #: Whether the layer's sides are of positions, among which a mask selects.
    has_positions: ClassVar[bool] = True

    output: Side
    input: Side

    def __init__(
        self, layout: MatrixLayout, like: Tensor, weight_sharing: WeightSharing = "expand"
    ) -> None:
        self.layout = layout
        self._reduce = weight_sharing == "reduce"
        # If so, of vectors that are then added up over positions, where they may cancel: the
        # largest mean of their squares in a batch, of the output side and the input side.
        self._squares = like.new_zeros(2)
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

    def _note_squares(self, output: Tensor, input: Tensor) -> None:
        """Take note of mean squares of a batch's vectors, before they are added up."""
        self._squares = torch.maximum(self._squares, torch.stack([output, input]))

    def squares(self, output: Tensor, input: Tensor) -> tuple[Tensor, Tensor]:
        """Return about how large the squares of vectors on both sides are.

        Parameters
        ----------
        output, input : Tensor of shape (groups, m)
            Eigenvalues of the sides.
        """
        if self._reduce:
            return self._squares[0], self._squares[1]
        return output.max(), input.max()

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
        if self._reduce:
            ranks.add_up(self._squares)
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
        sides = {"output": self.output.state_dict(), "input": self.input.state_dict()}
        return {**sides, "squares": self._squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what was accumulated before."""
        if "bases" in state:
            self._eigenvalues = state["eigenvalues"]
            self.set_bases(**state["bases"])
            self._scales = state["scales"]
        else:
            self.output.load_state_dict(state["output"])
            self.input.load_state_dict(state["input"])
            self._squares = state["squares"]

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
