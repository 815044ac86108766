"""A test digit with the training digits that helped and harmed its prediction most."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fimkit._demo.digits import Digits

__all__ = ["Explanation", "TrainingDigit", "explain"]

# Test digits shown: those of the largest loss, and ordinary ones, whose loss is the median.
_WORST = 3
_ORDINARY = 2

# Training digits shown on either side of a test digit.
_NEIGHBOURS = 4


@dataclass(frozen=True)
class TrainingDigit:
    """A training digit and its influence on one test digit.

    Attributes
    ----------
    index : int
        Position in the training set.
    label, true_label : int
        The label trained on, and what the image shows; a flipped label where they differ.
    score : float
        Positive: lowers the test digit's loss.
    """

    index: int
    label: int
    true_label: int
    score: float

    @property
    def flipped(self) -> bool:
        """Whether the label was flipped."""
        return self.label != self.true_label


@dataclass(frozen=True)
class Explanation:
    """A test digit, what the network makes of it, and the training digits behind that.

    Attributes
    ----------
    index : int
        Position in the test set.
    label, predicted : int
    loss : float
    helpful, harmful : list of TrainingDigit
        Highest scores first, and lowest scores first.
    """

    index: int
    label: int
    predicted: int
    loss: float
    helpful: list[TrainingDigit]
    harmful: list[TrainingDigit]


def explain(model: nn.Module, digits: Digits, scores: npt.NDArray[np.float64]) -> list[Explanation]:
    """Explain a few test digits: the worst predicted, then ordinary ones.

    Parameters
    ----------
    model : torch.nn.Module
    digits : Digits
    scores : ndarray of shape (n_test, n_train)
        Influence of each training digit on each test digit.

    Returns
    -------
    explanations : list of Explanation
    """
    with torch.no_grad():
        logits = model(digits.test_images)
        losses = cross_entropy(logits, digits.test_labels, reduction="none")
    worst_first = losses.argsort(descending=True).tolist()
    middle = len(worst_first) // 2
    shown = worst_first[:_WORST] + worst_first[middle : middle + _ORDINARY]

    def training_digit(query: int, index: int) -> TrainingDigit:
        return TrainingDigit(
            index=index,
            label=int(digits.train_labels[index]),
            true_label=int(digits.true_labels[index]),
            score=float(scores[query, index]),
        )

    explanations = []
    for query in shown:
        order = np.argsort(scores[query], kind="stable").tolist()
        explanations.append(
            Explanation(
                index=query,
                label=int(digits.test_labels[query]),
                predicted=int(logits[query].argmax()),
                loss=float(losses[query]),
                helpful=[training_digit(query, i) for i in order[: -_NEIGHBOURS - 1 : -1]],
                harmful=[training_digit(query, i) for i in order[:_NEIGHBOURS]],
            )
        )
    return explanations
