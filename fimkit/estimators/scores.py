"""Scores of gradients under the Gaussian whose covariance is the damped Fisher."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.utils.validation import check_is_fitted

from fimkit.estimators.regularization import regularization_path
from fimkit.exceptions import IFVPUsageError

__all__ = ["ScoresMixin"]


class ScoresMixin:
    """Log-likelihoods and Mahalanobis norms, for an estimator with ``fisher_``."""

    fisher_: Any
    n_features_in_: int
    _damping: Callable[[], Any]
    _reduce: Callable[..., npt.NDArray[np.float64]]

    def score(self, vectors: Any, y: Any = None) -> float:
        """Return the mean Gaussian log-likelihood of held-out gradients; higher is better.

        Parameters
        ----------
        vectors : as for `transform`
            Gradients that were not fitted; of a `ModelData`, those of the fitted kind. In-sample
            the score always favours λ → 0.
        y : ignored

        Returns
        -------
        score : float
            As `sklearn.covariance.EmpiricalCovariance.score` under covariance ``F + λ I``: it
            selects a good inverse, not provably the best influence.
        """
        return float(_mean(self.score_samples(vectors)))

    def score_samples(self, vectors: Any) -> npt.NDArray[np.float64]:
        """Return the Gaussian log-likelihood of each gradient under covariance ``F + λ I``.

        Parameters
        ----------
        vectors : as for `score`

        Returns
        -------
        scores : ndarray of shape (k,)
            ``-(gᵀ (F + λ I)⁻¹ g + log det(F + λ I) + p log 2π) / 2``. An example with several
            weighted rows has the weighted sum of their quadratic forms.
        """
        check_is_fitted(self)
        damping = self._damping()
        quadratics = self._reduce(
            vectors, lambda flat: self.fisher_.inverse_quadratic(flat, damping)[None]
        )
        return self._log_likelihood(quadratics[0], self.fisher_.logdet(damping))

    def score_path(self, vectors: Any, regularizations: Sequence[float]) -> npt.NDArray[np.float64]:
        """Return `score` at many λ, from one eigendecomposition.

        Parameters
        ----------
        vectors : as for `score`
        regularizations : sequence of float
            Each is taken for all blocks.

        Returns
        -------
        scores : ndarray of shape (len(regularizations),)
        """
        check_is_fitted(self)
        dampings = regularization_path(regularizations)
        spectrum = self.fisher_.spectrum()
        quadratics = self._reduce(vectors, lambda flat: spectrum.quadratics(flat, dampings))
        logdets = np.asarray(spectrum.logdets(dampings))
        scores: npt.NDArray[np.float64] = _mean(self._log_likelihood(quadratics, logdets[:, None]))
        return scores

    def mahalanobis(self, vectors: Any) -> npt.NDArray[np.float64]:
        """Squared Mahalanobis norms ``vᵀ (F + λ I)⁻¹ v``.

        Parameters
        ----------
        vectors : as for `transform`
            Of a `ModelData`, the gradients of its examples at their targets.

        Returns
        -------
        norms : ndarray of shape (k,)
            In float64, as `sklearn.covariance.EmpiricalCovariance.mahalanobis`.
        """
        check_is_fitted(self)
        damping = self._damping()
        norms: npt.NDArray[np.float64] = self._reduce(
            vectors, lambda flat: self.fisher_.inverse_quadratic(flat, damping)[None], "empirical"
        )[0]
        return norms

    def _log_likelihood(self, quadratics: Any, logdet: Any) -> npt.NDArray[np.float64]:
        """Return ``-(q + log det + p log 2π) / 2``."""
        constant = self.n_features_in_ * math.log(2 * math.pi)
        out: npt.NDArray[np.float64] = -(quadratics + logdet + constant) / 2
        return out


def _mean(scores: npt.NDArray[np.float64]) -> Any:
    """Return the mean over the last dimension, the vectors'."""
    if not scores.shape[-1]:
        raise IFVPUsageError("a score is a mean over vectors, and there are none; give at least 1.")
    return scores.mean(-1)
