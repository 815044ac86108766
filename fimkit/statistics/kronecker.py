"""Kronecker-factored statistics of all layers together: their kinds, eigenbases and scales."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fimkit.distributed import Ranks
from fimkit.operators import MatrixLayout
from fimkit.operators.eigh import eigh_all
from fimkit.statistics.layer import LayerStatistics, WeightSharing
from fimkit.statistics.linear import LinearStatistics
from fimkit.statistics.tables import LookupStatistics, TiedStatistics

__all__ = ["begin_eigenvalues", "layer_statistics", "set_eigenbases"]

# Power of two that squares' roots are scaled to.
_HEADROOM = 16


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
    largest = [square for name in layers for square in layers[name].squares(*eigenvalues[name])]
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
    if not 0 < square < math.inf:
        return 1.0
    return 2.0 ** (_HEADROOM - min(max(round(math.log2(square) / 2), -60), 60))
