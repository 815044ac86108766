"""`RegularizationCV`: the regularization chosen by held-out gradients, at one fit per fold."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata
from sklearn.base import BaseEstimator, MetaEstimatorMixin, TransformerMixin, clone
from sklearn.model_selection import check_cv
from sklearn.utils import metadata_routing
from sklearn.utils._param_validation import HasMethods
from sklearn.utils.validation import check_is_fitted

from fimkit.data import ModelData, check_model_data
from fimkit.distributed import Ranks
from fimkit.estimators.base import FisherEstimator
from fimkit.estimators.regularization import regularization_path
from fimkit.estimators.run import inside
from fimkit.exceptions import IFVPUsageError, SingularFisherError, warn
from fimkit.gradients import whole

__all__ = ["RegularizationCV"]

_GRID = tuple(np.logspace(-6, 0, 13).tolist())

# Relative differences between scores that are rounding, whatever their spread over folds is.
_ROUNDING = 1e-9


_SAME = "All ranks choose among the same regularizations, over as many folds; give each the same."


class RegularizationCV(  # type: ignore[call-arg]
    MetaEstimatorMixin,
    TransformerMixin,
    BaseEstimator,
    auto_wrap_output_keys=None,  # a wrapped transform takes its vectors by the name of X only
):
    """An estimator with the regularization that scores best on held-out gradients.

    What `sklearn.linear_model.RidgeCV` is to ridge regression: each fold is fitted once and scored
    at all λ by ``score_path``, so that a grid costs hardly more than one λ. The estimator is then
    fitted to all data with the best one, and everything else that is asked of this object
    (``mahalanobis``, ``score_path``, ``fisher_``, ...) is asked of it.

    Parameters
    ----------
    estimator : estimator of fimkit
        Its own ``regularization`` is not used.
    regularizations : sequence of float, default=numpy.logspace(-6, 0, 13)
        Each is taken for all blocks.
    cv : int, cross-validation generator or iterable, default=None
        As in scikit-learn: the number of folds, five when None, or a splitter such as
        ``KFold(5, shuffle=True, random_state=0)``. Folds of a number are not shuffled.

    Attributes
    ----------
    regularization_ : float
        The chosen λ.
    estimator_ : object
        The estimator fitted to all data with it.
    best_index_, best_score_ : int, float
        Its place among ``regularizations``, and its mean score over the folds.
    cv_results_ : dict of str to ndarray or list
        As that of `sklearn.model_selection.GridSearchCV`: ``"param_regularization"``,
        ``"params"``, ``"split0_test_score"`` and so on, ``"mean_test_score"``,
        ``"std_test_score"`` and ``"rank_test_score"``, one entry per λ.
    n_splits_ : int
        Number of folds.

    Notes
    -----
    The score is the Gaussian log-likelihood of held-out gradients: it selects a good inverse, not
    provably the best influence. Gradients of a softmax's last layer sum to zero over the classes;
    in such directions, where held-out gradients are zero as well, a smaller λ is always likelier,
    which draws the choice down where they are many.

    Examples
    --------
    >>> import torch
    >>> from fimkit import EKFAC, ModelData, RegularizationCV
    >>> _ = torch.manual_seed(0)
    >>> data = ModelData(torch.nn.Linear(3, 2), (torch.randn(60, 3), torch.randn(60, 2)))
    >>> search = RegularizationCV(EKFAC(loss="mse"), [1e-3, 1e-2, 1e-1, 1.0, 1e1], cv=3).fit(data)
    >>> search.regularization_
    0.1
    >>> search.transform(data[:4]).shape
    (4, 8)
    """

    # What goes in is no metadata, although it is not called X.
    __metadata_request__fit = {"data": metadata_routing.UNUSED}  # noqa: RUF012
    __metadata_request__transform = {"vectors": metadata_routing.UNUSED}  # noqa: RUF012
    __metadata_request__inverse_transform = __metadata_request__transform
    __metadata_request__score = __metadata_request__transform

    _parameter_constraints: dict[str, list[Any]] = {  # noqa: RUF012
        "estimator": [HasMethods(["fit", "score_path", "set_params"])],
        "regularizations": ["array-like"],
        "cv": ["cv_object"],
    }

    def __init__(
        self,
        estimator: Any,
        regularizations: Any = _GRID,
        *,
        cv: Any = None,
    ) -> None:
        self.estimator = estimator
        self.regularizations = regularizations
        self.cv = cv

    def fit(self, data: ModelData, y: Any = None, *, groups: Any = None) -> RegularizationCV:
        """Choose the regularization by cross-validation, and fit to all data with it.

        Parameters
        ----------
        data : ModelData
            In a process group the rank's own part; the score of a fold is then the mean over the
            held-out examples of all ranks, which choose one λ.
        y : array-like of shape (n,), optional
            Labels for splitters that stratify, such as ``data.targets``.
        groups : array-like of shape (n,), optional
            Groups for splitters that keep them together.

        Returns
        -------
        self : object

        Raises
        ------
        IFVPUsageError
            If the data are no `ModelData`, or a regularization is no number of at least 0; or if
            rows stay on the ranks of a process group, as `DataInf`'s do.
        SingularFisherError
            If a fold is singular at all of the regularizations.

        Warns
        -----
        UserWarning
            If the best regularization is the least or the largest, so that a better one may lie
            beyond; if all score alike, up to what differs between folds by chance; or if a fold is
            singular at some of them, as at 0 it usually is: their scores are NaN, and they are not
            chosen.
        """
        ranks = Ranks.current()
        with ranks.together():
            self._validate_params()
            check_model_data(data, "data")
            grid = regularization_path(self.regularizations)
            folds = list(check_cv(self.cv, y).split(data, y, groups))
            if not folds:
                raise IFVPUsageError(
                    f"cv={self.cv!r} has no folds; give a number of folds, a splitter, or a list "
                    "of (train, test) indices (a generator is empty when it was used before)."
                )
            if "regularization" not in self.estimator.get_params():
                raise IFVPUsageError(
                    f"estimator is a {type(self.estimator).__name__}, which has no regularization "
                    "to choose; give Explicit(), DataInf(), EKFAC(), KFAC() or Diagonal()."
                )
            estimator = clone(self.estimator).set_params(regularization=max(grid))
        ranks.check_same({"regularizations": grid, "the number of folds": len(folds)}, _SAME)
        with whole(inside(data)):
            scores = np.stack([_score(estimator, data, fold, grid, ranks) for fold in folds])
        results = _results(grid, scores)
        _warn_of_singular(grid, results["mean_test_score"])
        best = int(np.nanargmax(results["mean_test_score"]))
        _warn(grid, scores, best)
        fitted = estimator.set_params(regularization=grid[best]).fit(data)
        self.cv_results_ = results
        self.n_splits_ = len(folds)
        self.best_index_ = best
        self.best_score_ = float(results["mean_test_score"][best])
        self.regularization_ = grid[best]
        self.estimator_ = fitted
        return self

    def transform(self, vectors: Any) -> Any:
        """Multiply vectors by the chosen estimator's damped inverse Fisher.

        Parameters
        ----------
        vectors : as for the estimator

        Returns
        -------
        ifvp : as ``vectors``
        """
        return self._fitted().transform(vectors)

    def inverse_transform(self, vectors: Any) -> Any:
        """Multiply vectors by the chosen estimator's damped Fisher.

        Parameters
        ----------
        vectors : as for the estimator

        Returns
        -------
        products : as ``vectors``
        """
        return self._fitted().inverse_transform(vectors)

    def score(self, vectors: Any, y: Any = None) -> float:
        """Return the chosen estimator's mean log-likelihood of held-out gradients.

        Parameters
        ----------
        vectors : as for the estimator
        y : ignored

        Returns
        -------
        score : float
        """
        score: float = self._fitted().score(vectors)
        return score

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._fitted(), name)

    def _fitted(self) -> Any:
        check_is_fitted(self)  # the error is an AttributeError, too
        return self.__dict__["estimator_"]


def _score(
    estimator: Any, data: ModelData, fold: tuple[Any, Any], grid: list[float], ranks: Ranks
) -> npt.NDArray[np.float64]:
    """Return the mean score of all ranks' held-out examples at each λ, shape (L,)."""
    train, test = fold
    fitted = clone(estimator).fit(data[train])
    if isinstance(fitted, FisherEstimator) and fitted._is_sharded():
        raise IFVPUsageError(
            f"{type(fitted).__name__} leaves its rows on the ranks that computed them, which all "
            "must give the same held-out gradients, and each has its own; choose the "
            "regularization in one process, or by another estimator (EKFAC, or Explicit with "
            "solver='primal')."
        )
    with ranks.together():
        own = _path(fitted, data[test], grid)
    parts = ranks.gather((len(test), own))
    n = sum(size for size, _ in parts)
    mean: npt.NDArray[np.float64] = sum(size / n * each for size, each in parts)
    return mean


def _path(fitted: Any, data: ModelData, grid: list[float]) -> npt.NDArray[np.float64]:
    """Return the scores of a path, NaN where the fit is singular."""
    try:
        scores: npt.NDArray[np.float64] = fitted.score_path(data, grid)
    except SingularFisherError:
        if len(grid) == 1:
            return np.array([np.nan])
        half = len(grid) // 2  # those that are singular are mostly neighbours
        return np.concatenate([_path(fitted, data, part) for part in (grid[:half], grid[half:])])
    return scores


def _results(grid: list[float], scores: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Return scores of shape (folds, L) in the form of a grid search's."""
    mean = scores.mean(0)
    return {
        "param_regularization": np.asarray(grid),
        "params": [{"regularization": value} for value in grid],
        **{f"split{i}_test_score": values for i, values in enumerate(scores)},
        "mean_test_score": mean,
        "std_test_score": scores.std(0),
        "rank_test_score": rankdata(np.where(np.isnan(mean), np.inf, -mean), "min").astype(
            np.int32
        ),
    }


def _warn_of_singular(grid: list[float], mean: npt.NDArray[np.float64]) -> None:
    """Warn of regularizations without a score, or raise if that is all of them."""
    singular = [value for value, score in zip(grid, mean, strict=True) if np.isnan(score)]
    if not singular:
        return
    found = (
        f"the Fisher of a fold is singular at {len(singular)} of {len(grid)} regularizations, "
        f"the largest {max(singular):g}"
    )
    if len(singular) == len(grid):
        raise SingularFisherError(f"{found}; give larger ones.")
    warn(f"{found}; these are not chosen.")


def _warn(grid: list[float], scores: npt.NDArray[np.float64], best: int) -> None:
    usable = ~np.isnan(scores).any(0)
    tried = set(np.asarray(grid)[usable])
    if len(tried) == 1:
        return
    # Folds differ more from each other than λ does within one, so differences are taken within.
    gains = scores[:, [best]] - scores
    error = gains.std(0, ddof=1) / len(gains) ** 0.5 if len(gains) > 1 else np.zeros(len(grid))
    rounding = _ROUNDING * abs(scores[:, best].mean())
    if (gains.mean(0) <= np.maximum(error, rounding))[usable].all():
        warn(
            f"all regularizations from {min(tried):g} to {max(tried):g} score alike, up to the "
            f"standard error over {len(gains)} folds, so the choice of {grid[best]:g} is chance; "
            "spread them further, or give more data."
        )
    elif grid[best] in (min(grid), max(grid)):
        side, beyond = ("largest", "larger") if grid[best] == max(grid) else ("least", "smaller")
        warn(
            f"the best regularization, {grid[best]:g}, is the {side} of those tried; include "
            f"{beyond} ones, since a better one may lie there."
        )
