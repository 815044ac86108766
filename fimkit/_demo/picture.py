"""The picture: test digits beside their most helpful and most harmful training digits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fimkit._demo.digits import SIDE, Digits
from fimkit._demo.explanation import Explanation, TrainingDigit

__all__ = ["draw"]

_HELPFUL = "#1b7837"
_HARMFUL = "#762a83"
_FLIPPED = "#d95f02"
_GREY = "#555555"

# Inches: a digit with its caption, a gap between groups of digits, and the room around.
_CELL_WIDTH, _CELL_HEIGHT = 1.15, 1.5
_GAP = 0.35
_TOP, _BOTTOM, _SIDE_MARGIN = 1.3, 0.95, 0.35


def draw(explanations: Sequence[Explanation], digits: Digits, method: str, path: Path) -> None:
    """Write the picture as a PNG file.

    Parameters
    ----------
    explanations : sequence of Explanation
        One row each.
    digits : Digits
    method : str
        Named in the title.
    path : Path

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    k = len(explanations[0].helpful)
    width = (1 + 2 * k) * _CELL_WIDTH + 2 * _GAP + 2 * _SIDE_MARGIN
    height = len(explanations) * _CELL_HEIGHT + _TOP + _BOTTOM
    figure = Figure((width, height), dpi=150, facecolor="white")
    grid = figure.add_gridspec(
        len(explanations),
        2 * k + 3,
        width_ratios=[1, _GAP, *[1] * k, _GAP, *[1] * k],
        left=_SIDE_MARGIN / width,
        right=1 - _SIDE_MARGIN / width,
        bottom=_BOTTOM / height,
        top=1 - _TOP / height,
        wspace=0.12,
        hspace=0.6,
    )
    helpful, harmful = range(2, k + 2), range(k + 3, 2 * k + 3)

    for row, explanation in enumerate(explanations):
        axes = figure.add_subplot(grid[row, 0])
        wrong = explanation.predicted != explanation.label
        _show(axes, digits.test_images[explanation.index], "black")
        axes.set_title(
            f"true {explanation.label}, predicted {explanation.predicted}",
            fontsize=9,
            fontweight="bold" if wrong else "normal",
        )
        axes.set_xlabel(f"test loss {explanation.loss:.2f}", fontsize=8, color=_GREY, labelpad=3)
        for columns, neighbours, colour in (
            (helpful, explanation.helpful, _HELPFUL),
            (harmful, explanation.harmful, _HARMFUL),
        ):
            for column, digit in zip(columns, neighbours, strict=True):
                axes = figure.add_subplot(grid[row, column])
                _show_training(axes, digit, digits.train_images[digit.index], colour)

    def heading(columns: range, text: str, colour: str) -> None:
        left = grid[0, columns[0]].get_position(figure).x0
        right = grid[0, columns[-1]].get_position(figure).x1
        y = 1 - (_TOP - 0.5) / height
        figure.text((left + right) / 2, y, text, ha="center", fontsize=11, color=colour)

    heading(range(1), "test digit", "black")
    heading(helpful, "most helpful training digits", _HELPFUL)
    heading(harmful, "most harmful training digits", _HARMFUL)
    figure.suptitle(
        f"Which training digits made these predictions?   (method: {method})",
        fontsize=13,
        y=1 - 0.2 / height,
        va="top",
    )
    figure.legend(
        handles=[
            Patch(color=_HELPFUL, label="positive score: training on it lowers the test loss"),
            Patch(color=_HARMFUL, label="negative score: training on it raises the test loss"),
            Patch(color=_FLIPPED, label="label flipped on purpose"),
        ],
        loc="lower center",
        ncols=3,
        fontsize=9,
        frameon=False,
        bbox_to_anchor=(0.5, 0.1 / height),
    )
    figure.savefig(path)


def _show_training(axes: Any, digit: TrainingDigit, image: Tensor, colour: str) -> None:
    _show(axes, image, _FLIPPED if digit.flipped else colour)
    if digit.flipped:
        title = f"{digit.true_label} flipped to {digit.label}"
        axes.set_title(title, fontsize=9, color=_FLIPPED, fontweight="bold")
    else:
        axes.set_title(f"labelled {digit.label}", fontsize=9)
    axes.set_xlabel(f"{digit.score:+,.1f}", fontsize=8, color=colour, labelpad=3)


def _show(axes: Any, image: Tensor, colour: str) -> None:
    """Show one digit, dark on light, in a coloured frame."""
    axes.imshow(image.view(SIDE, SIDE), cmap="gray_r", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=2)
