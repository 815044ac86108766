"""What can be told of labels from the tokens that they stand beside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["counts_padding", "is_mask", "unshifted"]

# Labels that a model of masked tokens has may equal a few of its inputs, which were left as they
# were; not so many.
_NOT_BY_CHANCE = 8


def unshifted(batch: Any, name: str, ignore_index: int) -> str | None:
    """Return the warning that labels are the tokens at their own positions, None if they are not.

    Parameters
    ----------
    batch
        A mapping with ``input_ids`` and ``labels``, or a sequence with the tokens first and the
        labels last; of others nothing is told.
    name : str
        Of the loss, which compares outputs and labels of the same position.
    ignore_index : int
        Labels of this value do not count.
    """
    found = _tokens_and_labels(batch)
    if found is None:
        return None
    tokens, labels = found
    counted = labels != ignore_index
    if counted.sum() < _NOT_BY_CHANCE or not ((tokens == labels) | ~counted).all():
        return None
    return (
        f"{name} compares a model's outputs with the labels of the same position, and the labels "
        "are the batch's own tokens. If the model is causal, whose outputs are of the next token, "
        "use loss='causal_lm', which shifts them."
    )


def counts_padding(batch: Any) -> bool:
    """Whether labels of padding count as tokens, by the batch's attention mask.

    Of causal language models, which predict no first token.
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    found = _tokens_and_labels(batch)
    if found is None or not isinstance(mask, Tensor) or mask.shape != found[0].shape:
        return False
    tokens, labels, mask = (tensor[:, 1:] for tensor in (*found, mask))
    padded = (mask == 0) & (labels != -100)
    return bool(padded.any() and ((tokens == labels) | ~padded).all())


def is_mask(batch: Any) -> bool:
    """Whether what stands in the place of labels is a mask of 0 and 1, which tokens are not."""
    found = None if isinstance(batch, Mapping) else _tokens_and_labels(batch)
    if found is None:
        return False
    tokens, labels = found
    return bool(((labels == 0) | (labels == 1)).all() and (tokens > 1).any())


def _tokens_and_labels(batch: Any) -> tuple[Tensor, Tensor] | None:
    """Return the integers ``(B, T)`` that may be tokens and labels, None where there are none."""
    if isinstance(batch, Mapping):
        tokens, labels = batch.get("input_ids"), batch.get("labels")
    elif isinstance(batch, tuple | list) and len(batch) >= 2:
        tokens, labels = batch[0], batch[-1]
    else:
        return None
    if not isinstance(tokens, Tensor) or not isinstance(labels, Tensor):
        return None
    if tokens.is_floating_point() or labels.is_floating_point():
        return None
    return (tokens, labels) if tokens.ndim == 2 and tokens.shape == labels.shape else None
