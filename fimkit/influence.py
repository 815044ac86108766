r"""Influence of training examples on a model's predictions.

The score of training example i on query j is

.. math:: s_{ji} = \nabla l_j^\top (F + \lambda I)^{-1} \nabla l_i ,

minus n times the first-order change of the query's loss when the training example is given more
weight. **Positive: the training example lowers the query's loss** (it is helpful); negative: it
raises it (harmful). Koh & Liang, "Understanding black-box predictions via influence functions",
ICML 2017, eq. 2, with the opposite sign and the Fisher for the Hessian.

Training gradients are taken batch by batch and kept as factors, so that nothing of size
training examples × parameters is formed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fimkit.data import ModelData, check_model_data
from fimkit.estimators.base import FisherEstimator
from fimkit.exceptions import IFVPUsageError

__all__ = ["pairwise_scores", "self_influence", "top_k"]

Scores = npt.NDArray[np.float64]


def pairwise_scores(estimator: FisherEstimator, train: ModelData, queries: ModelData) -> Scores:
    """Score every training example on every query.

    Parameters
    ----------
    estimator : fitted estimator
        Gives the damped inverse of the Fisher information matrix.
    train : ModelData
        Training examples, with the model that was fitted.
    queries : ModelData
        Examples whose loss is explained.

    Returns
    -------
    scores : ndarray of shape (n_queries, n_train)
        Positive where the training example lowers the query's loss.
    """
    blocks = list(_score_blocks(estimator, train, queries))
    return np.concatenate(blocks, 1)


def top_k(
    estimator: FisherEstimator,
    train: ModelData,
    queries: ModelData,
    k: int,
    *,
    largest: bool = True,
) -> tuple[npt.NDArray[np.intp], Scores]:
    """Find each query's most helpful, or most harmful, training examples.

    Parameters
    ----------
    estimator, train, queries
        As for `pairwise_scores`; the full matrix of scores is not formed.
    k : int
        How many per query, at most the number of training examples.
    largest : bool, default=True
        The most helpful (highest scores) first, or the most harmful (lowest) first.

    Returns
    -------
    indices : ndarray of shape (n_queries, k)
        Positions in ``train``, best first.
    scores : ndarray of shape (n_queries, k)
        Their scores.
    """
    check_model_data(train, "train")
    check_model_data(queries, "queries")
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= len(train):
        raise IFVPUsageError(f"k must be an integer from 1 to len(train)={len(train)}; got {k!r}.")
    sign = -1 if largest else 1
    indices = np.empty((len(queries), 0), np.intp)
    scores = np.empty((len(queries), 0))
    start = 0
    for block in _score_blocks(estimator, train, queries):
        here = np.broadcast_to(np.arange(start, start + block.shape[1]), block.shape)
        start += block.shape[1]
        indices = np.concatenate([indices, here], 1)
        scores = np.concatenate([scores, block], 1)
        best = np.argsort(sign * scores, axis=1, kind="stable")[:, :k]
        indices = np.take_along_axis(indices, best, 1)
        scores = np.take_along_axis(scores, best, 1)
    return indices, scores


def self_influence(estimator: FisherEstimator, data: ModelData) -> Scores:
    """Score every example on itself: ``gᵀ (F + λ I)⁻¹ g``, never negative.

    High values mark examples that only their own presence explains, such as wrong labels.

    Parameters
    ----------
    estimator : fitted estimator
    data : ModelData

    Returns
    -------
    scores : ndarray of shape (n,)
    """
    _check_estimator(estimator)
    check_model_data(data, "data")
    return estimator.mahalanobis(data)


def _check_estimator(estimator: Any) -> None:
    """Raise if an estimator is none of fimkit's, nor one that stands in for it."""
    if not hasattr(estimator, "gradients"):
        raise IFVPUsageError(
            f"estimator must be a fitted estimator of fimkit; got {type(estimator).__name__}. Of a "
            "search or a pipeline, give the fitted estimator inside, as search.best_estimator_."
        )


def _score_blocks(
    estimator: FisherEstimator, train: ModelData, queries: ModelData
) -> Iterator[Scores]:
    """Yield the scores of one batch of training examples after another."""
    _check_estimator(estimator)
    check_model_data(train, "train")
    check_model_data(queries, "queries")
    ifvps: Any = torch.from_numpy(estimator.transform(queries)).to(estimator.device_)
    for rows in estimator.gradients(train):
        yield rows.project(ifvps, ifvps.dtype).double().cpu().numpy()
