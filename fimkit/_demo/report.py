"""The tables that the job prints, in ASCII for any terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from torch import nn

from fimkit._demo.digits import Digits, accuracy
from fimkit._demo.evaluation import Detection, MethodResult, correlations
from fimkit._demo.explanation import Explanation, TrainingDigit
from fimkit._demo.retraining import LeftOut

__all__ = ["comparison_lines", "explanation_lines", "method_lines", "network_lines"]


def network_lines(model: nn.Module, digits: Digits) -> list[str]:
    """Describe the data and the trained network."""
    n, flipped = len(digits.train_labels), int(digits.flipped.sum())
    as_given = accuracy(model, digits.train_images, digits.train_labels)
    truth = accuracy(model, digits.train_images, digits.true_labels)
    test = accuracy(model, digits.test_images, digits.test_labels)
    return [
        _heading("The network"),
        _fact("training digits n", f"{n:,}", f"{flipped} of their labels flipped on purpose"),
        _fact("test digits", f"{len(digits.test_labels):,}"),
        _fact("parameters p", f"{sum(p.numel() for p in model.parameters()):,}", "float32"),
        _fact("training accuracy", f"{as_given:.3f}", "against the labels it was given"),
        _fact("", f"{truth:.3f}", "against the true labels, which it has not seen"),
        _fact("test accuracy", f"{test:.3f}"),
    ]


def method_lines(result: MethodResult, baselines: Mapping[str, Detection]) -> list[str]:
    """Report one method's numbers, and how well it finds flipped labels beside the baselines."""
    queries = len(result.scores)
    lines = [
        _heading(f"The damped inverse Fisher: {result.method}"),
        _fact("lambda", f"{result.damping:.3g}", "0.1 trace(F) / p, as 'auto' has it"),
        _fact("fit", f"{result.fit_seconds:.2f} s"),
        _fact("transform", f"{result.transform_seconds:.2f} s", f"{queries} test gradients"),
        _fact("residual", f"{result.residual:.1e}", "||(F + lambda I) u - v|| / ||v||, the worst"),
        _fact("", "", f"of {queries}; the exact F times u by plain torch.func"),
        _fact("", "", "in float64: an approximation of F shows its error"),
        _fact("peak memory", _peak_memory(), "resident, the whole process from its start"),
        _heading("Flipped labels found again"),
        f"{'':26}{'ROC AUC':>9}{'precision in the top tenth':>30}",
    ]
    for name, detection in (*result.detections.items(), *baselines.items()):
        lines.append(f"  {name:24}{detection.auc:>9.3f}{detection.precision:>30.3f}")
    return lines


def comparison_lines(
    results: Sequence[MethodResult],
    baselines: Mapping[str, Detection],
    left_out: LeftOut,
    agreement: Mapping[str, float],
) -> list[str]:
    """Put several methods side by side, the first of which the others are compared with.

    Parameters
    ----------
    results : sequence of MethodResult
    baselines : mapping of str to Detection
    left_out : LeftOut
    agreement : mapping of str to float
        With what leaving digits out did, by method; those without a result get a line of their own.
    """
    exact = results[0]
    lines = [
        _heading("The methods side by side"),
        _fact("lambda", f"{exact.damping:.3g}", "0.1 trace(F) / p, as 'auto' has it, for all"),
        _fact("peak memory", _peak_memory(), "resident, the whole process from its start"),
        "",
        f"{'':21}{'seconds':>17}{'flipped labels, AUC':>25}{f'with {exact.method}':>21}"
        f"{'left out':>12}",
        f"{'':21}{'fit':>7}{'transform':>10}{'self-infl.':>17}{'harm':>8}"
        f"{'Pearson':>12}{'Spearman':>9}{'Pearson':>12}",
    ]
    for result in results:
        own, harm = result.detections.values()
        pearson, spearman = correlations(result.scores, exact.scores)
        lines.append(
            f"  {result.method:19}{result.fit_seconds:>7.2f}{result.transform_seconds:>10.2f}"
            f"{own.auc:>17.3f}{harm.auc:>8.3f}{pearson:>12.3f}{spearman:>9.3f}"
            f"{agreement[result.method]:>12.3f}"
        )
    for name, detection in baselines.items():
        lines.append(f"  {name:19}{detection.auc:>34.3f}")
    others = set(agreement) - {result.method for result in results}
    lines += [f"  {name:19}{agreement[name]:>75.3f}" for name in agreement if name in others]
    lines += [
        "",
        "  Correlations are of a test digit's influence scores over the training digits, the",
        f"  mean over {len(exact.scores)} test digits.",
        "",
        "  Left out: with the truth, on another model, which trains to its one minimum. Softmax",
        f"  regression on these digits was trained again without each of {len(left_out.indices)} "
        "training digits",
        "  drawn at random, and the true rises of a test digit's loss are correlated with the",
        "  method's scores for that model (lambda as above, by its own F). The network, whose",
        "  training is subject to chance, is not trained again.",
    ]
    return lines


def explanation_lines(explanations: Sequence[Explanation]) -> list[str]:
    """List each test digit's most helpful and most harmful training digits."""
    lines = [
        _heading("Training digits behind some test predictions"),
        "  Each line: a training digit's index, label and score. A positive score lowers",
        "  the test digit's loss (helpful), a negative one raises it (harmful).",
    ]
    for explanation in explanations:
        lines += [
            "",
            f"  test digit #{explanation.index}: true {explanation.label}, predicted "
            f"{explanation.predicted}, loss {explanation.loss:.2f}",
            f"    {'most helpful':38}most harmful",
        ]
        for helpful, harmful in zip(explanation.helpful, explanation.harmful, strict=True):
            lines.append(f"    {_training_digit(helpful):38}{_training_digit(harmful)}")
    return lines


def _heading(text: str) -> str:
    return f"\n{text}\n{'-' * len(text)}"


def _fact(name: str, value: str, note: str = "") -> str:
    return f"  {name:20}{value:>9}   {note}".rstrip()


def _training_digit(digit: TrainingDigit) -> str:
    label = f"{digit.label}, flipped from {digit.true_label}" if digit.flipped else digit.label
    return f"#{digit.index:<6}{label!s:18}{digit.score:>+9,.1f}"


def _peak_memory() -> str:
    if sys.platform == "win32":
        return "unknown"
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"{peak / 2**20:,.0f} MiB"
