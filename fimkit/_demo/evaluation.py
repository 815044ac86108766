"""What one method makes of a trained network: times, residual, influence, wrong labels found."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn.functional import cross_entropy

from fimkit import EKFAC, KFAC, DataInf, Diagonal, Explicit, ModelData, influence
from fimkit._demo.digits import Digits
from fimkit._demo.reference import Reference
from fimkit.estimators.base import FisherEstimator

__all__ = ["METHODS", "Detection", "MethodResult", "baselines", "correlations", "evaluate"]

Numbers = npt.NDArray[np.float64]

# Each method by its name, made from λ; the exact one first.
METHODS: dict[str, Callable[[float], FisherEstimator]] = {
    "explicit": Explicit,
    "datainf": DataInf,
    "ekfac": EKFAC,
    "kfac": KFAC,
    "diagonal": Diagonal,
}


@dataclass(frozen=True)
class Detection:
    """How well a score tells flipped labels from true ones.

    Attributes
    ----------
    auc : float
        Area under the ROC curve: the probability that a flipped label scores above a true one.
    precision : float
        Share of flipped labels among as many highest scores as there are flipped labels.
    """

    auc: float
    precision: float

    @classmethod
    def of(cls, scores: Numbers, flipped: npt.NDArray[np.bool_]) -> Detection:
        """Measure scores, high for suspicious labels."""
        top = np.argsort(-scores)[: flipped.sum()]
        return cls(float(roc_auc_score(flipped, scores)), float(flipped[top].mean()))


@dataclass(frozen=True)
class MethodResult:
    """One method's numbers.

    Attributes
    ----------
    method : str
    damping : float
        λ.
    fit_seconds, transform_seconds : float
        The second for the gradients of all test digits.
    residual : float
        Largest ``‖(F + λ I) u − v‖ / ‖v‖`` over the test digits' gradients v.
    scores : ndarray of shape (n_test, n_train)
        Influence of each training digit on each test digit.
    detections : dict of str to Detection
    """

    method: str
    damping: float
    fit_seconds: float
    transform_seconds: float
    residual: float
    scores: Numbers
    detections: dict[str, Detection]


def evaluate(method: str, model: nn.Module, digits: Digits) -> MethodResult:
    """Fit a method on the training digits and measure all that the job shows of it.

    Parameters
    ----------
    method : str
        A key of `METHODS`.
    model : torch.nn.Module
        The trained network.
    digits : Digits

    Returns
    -------
    result : MethodResult
        With λ as ``regularization="auto"`` has it for the whole of F, computed from the
        reference, so that every method solves the same problem.
    """
    train = ModelData(model, (digits.train_images, digits.train_labels))
    test = ModelData(model, (digits.test_images, digits.test_labels))
    reference = Reference(model, digits.train_images, digits.train_labels)
    test_reference = Reference(model, digits.test_images, digits.test_labels)
    vectors = torch.cat(list(test_reference.gradients())).float()
    damping = 0.1 * reference.norms().square().mean().item() / vectors.shape[1]

    start = time.perf_counter()
    estimator = METHODS[method](damping).fit(train)
    fitted = time.perf_counter()
    ifvps = estimator.transform(vectors)
    transformed = time.perf_counter()

    scores = influence.pairwise_scores(estimator, train, test)
    own = influence.self_influence(estimator, train)
    return MethodResult(
        method=method,
        damping=damping,
        fit_seconds=fitted - start,
        transform_seconds=transformed - fitted,
        residual=reference.residuals(ifvps, vectors, damping).max().item(),
        scores=scores,
        detections={
            "self-influence": Detection.of(own, digits.flipped),
            "harm to all test losses": Detection.of(-scores.sum(0), digits.flipped),
        },
    )


def correlations(scores: Numbers, others: Numbers) -> tuple[float, float]:
    """Return Pearson's and Spearman's correlation of two methods' scores.

    Parameters
    ----------
    scores, others : ndarray of shape (n_test, n_train)

    Returns
    -------
    pearson, spearman : float
        Over training digits, the mean over test digits.
    """

    def of(left: Numbers, right: Numbers) -> float:
        left = left - left.mean(1, keepdims=True)
        right = right - right.mean(1, keepdims=True)
        norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        return float(((left * right).sum(1) / norms).mean())

    return of(scores, others), of(rankdata(scores, axis=1), rankdata(others, axis=1))


def baselines(model: nn.Module, digits: Digits, seed: int) -> dict[str, Detection]:
    """Measure what finds flipped labels without a Fisher: gradient norm, loss and chance."""
    reference = Reference(model, digits.train_images, digits.train_labels)
    with torch.no_grad():
        losses = cross_entropy(model(digits.train_images), digits.train_labels, reduction="none")
    scores = {
        "gradient norm": reference.norms().numpy(),
        "loss": losses.double().numpy(),
        "random": np.random.default_rng(seed).random(len(losses)),
    }
    return {name: Detection.of(values, digits.flipped) for name, values in scores.items()}
