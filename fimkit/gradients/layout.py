"""Which example each position of a captured tensor belongs to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["BatchLayout", "Places", "TokenLayout", "candidate_layouts"]


@dataclass(frozen=True)
class BatchLayout:
    """How the leading dimensions of a tensor divide into examples and positions.

    Parameters
    ----------
    axis : int or None
        The leading dimension that holds the examples; None when there is only one example.
    inner : bool
        Where that dimension also holds positions (merged windows, flattened tokens): whether
        the example index runs fastest.
    """

    axis: int | None
    inner: bool = False

    def fits(self, lead: tuple[int, ...], batch: int) -> bool:
        """Whether leading dimensions ``lead`` can hold ``batch`` examples this way."""
        if self.axis is None:
            return batch == 1
        return self.axis < len(lead) and lead[self.axis] > 0 and lead[self.axis] % batch == 0

    def split(self, tensor: Tensor, lead: tuple[int, ...], batch: int) -> Tensor:
        """Return a ``(*lead, *features)`` tensor as ``(batch, positions, *features)``."""
        features = tensor.shape[len(lead) :]
        positions = math.prod(lead) // batch
        if self.axis is not None:
            repeats = lead[self.axis] // batch
            pair = (repeats, batch) if self.inner else (batch, repeats)
            shape = (*lead[: self.axis], *pair, *lead[self.axis + 1 :], *features)
            tensor = tensor.reshape(shape).movedim(self.axis + self.inner, 0)
        return tensor.reshape(batch, positions, *features)

    def tokens(self, lead: tuple[int, ...], batch: int) -> int | None:
        """Return how many tokens each example has, None where its positions are no tokens.

        Tokens are along one dimension that holds nothing else, or all in one, example by example;
        heads and windows are not.
        """
        others = lead if self.axis is None else (*lead[: self.axis], *lead[self.axis + 1 :])
        merged = self.axis is not None and lead[self.axis] != batch
        if sum(size != 1 for size in others) + merged > 1:
            return None
        return math.prod(lead) // batch


@dataclass(frozen=True)
class TokenLayout(BatchLayout):
    """A layout by which every token counts as an example, with one position.

    Parameters
    ----------
    axis, inner
        Of the layout of the examples that the tokens are of.
    examples : int
        Their number.
    """

    examples: int = 1

    def split(self, tensor: Tensor, lead: tuple[int, ...], batch: int) -> Tensor:
        """Return a ``(*lead, *features)`` tensor as ``(batch, 1, *features)``, by example."""
        return super().split(tensor, lead, self.examples).flatten(0, 1)[:, None]


class Places(NamedTuple):
    """Where the examples of each call in a batch are, and what that was found for.

    Guessed where a call had no gradient to tell, proven where the batch had any at all.
    """

    key: Any
    layouts: list[BatchLayout | None]
    guessed: bool
    proven: bool


def candidate_layouts(lead: tuple[int, ...], batch: int) -> list[BatchLayout]:
    """Return the layouts by which ``lead`` may hold ``batch`` examples, the likeliest first."""
    if batch == 1:
        return [BatchLayout(None)]
    exact = [BatchLayout(axis) for axis, size in enumerate(lead) if size == batch]
    merged = [
        BatchLayout(axis, inner)
        for axis, size in enumerate(lead)
        if size > batch and size % batch == 0
        for inner in (False, True)
    ]
    return exact + merged
