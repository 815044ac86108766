"""What can be told of outputs from the function that made them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["not_logits"]

# Nodes of the autograd graph that only arrange numbers, by the beginnings of their names.
_ARRANGING = (
    "AliasBackward",
    "CloneBackward",
    "ExpandBackward",
    "PermuteBackward",
    "SelectBackward",
    "SliceBackward",
    "SqueezeBackward",
    "TBackward",
    "ToCopyBackward",
    "TransposeBackward",
    "UnsqueezeBackward",
    "ViewBackward",
)


def not_logits(outputs: Any, activation: str, name: str) -> str | None:
    """Return the warning that a loss would apply an activation once more, None if it would not."""
    if not _ends_with(outputs, activation):
        return None
    return (
        f"{name} takes logits, of which it takes the {activation.lower()} itself, and the model "
        f"ends with a {activation.lower()}: let it return what that is given."
    )


def _ends_with(outputs: Any, activation: str) -> bool:
    """Whether outputs are those of an activation, perhaps rearranged.

    Parameters
    ----------
    outputs
        A tensor; of anything else nothing is told.
    activation : {"Softmax", "Sigmoid"}
    """
    node = outputs.grad_fn if isinstance(outputs, Tensor) else None
    while node is not None and node.name().startswith(_ARRANGING):
        node = node.next_functions[0][0] if node.next_functions else None
    return node is not None and node.name().startswith(f"{activation}Backward")
