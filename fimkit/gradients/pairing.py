"""Which parameters are kept together: a weight with the bias that is folded into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fimkit.gradients.rules import EmbeddingUse, MatrixUse, Use

__all__ = ["Group", "pair_parameters"]


@dataclass(frozen=True)
class Group:
    """A parameter on its own, or a weight with the bias that is folded into it."""

    weight: str
    bias: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters, in the order of the group's flat vector."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


def pair_parameters(
    shapes: Mapping[str, tuple[int, ...]],
    uses: Sequence[Use],
    alone: set[str],
    blocks: Mapping[str, int] | None,
) -> list[Group]:
    """Group a bias with its weight wherever every use of the bias is with that weight.

    Of a layer that no example has met yet, the two are paired by their names.

    Parameters
    ----------
    shapes : mapping of str to tuple of int
        All parameters, in order.
    uses : sequence of Use
        Captured calls.
    alone : set of str
        Parameters that stay on their own.
    blocks : mapping of str to int, optional
        Block of each parameter; pairs lie within one block.
    """
    partners: dict[str, set[str | None]] = {name: set() for name in shapes}
    tables = {name for use in uses if isinstance(use, EmbeddingUse) for name in use.names}
    for use in uses:
        weight = use.weight if isinstance(use, MatrixUse) else None
        bias = use.bias if isinstance(use, MatrixUse) else None
        for name in use.names:
            is_bias = bias is not None and bias.name == name
            partners[name].add(weight.name if is_bias and weight is not None else None)
    bias_of: dict[str, str] = {}
    for name in shapes:
        weights = partners[name]
        weight_name = next(iter(weights)) if len(weights) == 1 else None
        if not weights and name.endswith("bias"):
            sibling = name.removesuffix("bias") + "weight"
            unmet = sibling in shapes and len(shapes[sibling]) > 1 and not partners[sibling]
            weight_name = sibling if unmet else None
        if weight_name is None or weight_name in bias_of:
            continue
        if {name, weight_name} & alone or weight_name in tables:
            continue
        if blocks is None or blocks[name] == blocks[weight_name]:
            bias_of[weight_name] = name
    biases = set(bias_of.values())
    return [Group(name, bias_of.get(name)) for name in shapes if name not in biases]
