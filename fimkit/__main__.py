"""``python -m fimkit``: influence of training digits on test digits, and wrong labels found."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fimkit._demo.digits import flipped_digits, train_network
from fimkit._demo.evaluation import METHODS, baselines, evaluate
from fimkit._demo.explanation import explain
from fimkit._demo.picture import draw
from fimkit._demo.report import (
    comparison_lines,
    explanation_lines,
    method_lines,
    network_lines,
)
from fimkit._demo.retraining import foretold, leave_out

__all__ = ["main"]

# scikit-learn and NumPy take seeds below this.
_SEEDS = 2**32


def main(argv: Sequence[str] | None = None) -> int:
    """Run the main job.

    Parameters
    ----------
    argv : sequence of str, optional
        Command-line arguments; those of the process by default.

    Returns
    -------
    status : int
        Exit status, 0.

    Raises
    ------
    SystemExit
        With status 2 for arguments that cannot be used, 0 after ``--help``.
    """
    arguments = _parse(argv)
    _stage("flipping a tenth of the training labels of scikit-learn's digits")
    digits = flipped_digits(arguments.seed)
    _stage("training a network on them")
    model = train_network(digits, arguments.seed)
    results = []
    for method in METHODS if arguments.method == "all" else [arguments.method]:
        _stage(f"fitting {method}, solving, checking, scoring")
        results.append(evaluate(method, model, digits))
    result = results[0]
    others = baselines(model, digits, arguments.seed)
    explanations = explain(model, digits, result.scores)
    if len(results) > 1:
        _stage("training a convex model again without each of some training digits")
        left_out = leave_out(digits, arguments.seed)
        agreement = foretold(left_out, digits, [result.method for result in results])
        tables = comparison_lines(results, others, left_out, agreement)
    else:
        tables = method_lines(result, others)
    lines = [*network_lines(model, digits), *tables, *explanation_lines(explanations)]
    print("\n".join(lines), flush=True)
    path = arguments.output / f"digits-{result.method}.png"
    try:
        draw(explanations, digits, result.method, path)
    except ImportError as error:
        print(f'\nNo picture: {error}. To have one: pip install "fimkit[plots]"')
    else:
        print(f"\nPicture: {path}")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fimkit",
        description="Train a small network on scikit-learn's digits with some labels flipped, fit "
        "the damped inverse Fisher, find the flipped labels by influence, and show which training "
        "digits helped and harmed a few test predictions.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--method",
        choices=[*METHODS, "all"],
        default="explicit",
        help="the estimator, or all of them side by side",
    )
    parser.add_argument(
        "--seed", type=_seed, default=0, help="of the split, the flipped labels and the training"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("fimkit-output"),
        metavar="FOLDER",
        help="where the picture goes; made if absent",
    )
    arguments = parser.parse_args(argv)
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=arguments.output):
            pass
    except OSError as error:
        parser.error(f"cannot write to the output folder {arguments.output}: {error.strerror}")
    return arguments


def _seed(text: str) -> int:
    """Return a seed, for argparse."""
    if not text.isdecimal() or int(text) >= _SEEDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 0 to {_SEEDS - 1}")
    return int(text)


def _stage(text: str) -> None:
    """Say on stderr what happens now."""
    print(f"fimkit: {text} ...", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
