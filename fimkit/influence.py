r"""Influence of training examples on a model's predictions.

The score of training example i on query j is

.. math:: s_{ji} = \nabla l_j^\top (F + \lambda I)^{-1} \nabla l_i ,

minus n times the first-order change of the query's loss when the training example is given more
weight. **Positive: the training example lowers the query's loss, or raises the measurement that is
asked for in its place** (it is helpful); negative: it does the opposite (harmful). Koh & Liang,
"Understanding black-box predictions via influence functions", ICML 2017, eq. 2, with the opposite
sign and the Fisher for the Hessian.

Of the query, ``measurement`` says what is explained; :math:`l_j` is then its negative:

- ``"loss"``: the loss that the estimator was fitted with;
- ``"logit"``: the logit of the query's target;
- ``"log_odds"``: the logarithm of its probability over that of all other classes;
- ``"margin"``: its logit less the highest of the other classes;
- a function ``measurement(model, batch)`` that returns one number per example, shape ``(B,)``.

Logits are summed over an example's targets that count, and of two classes (``"bce"``) all three
are the logit towards the target.

``normalization="relatif"`` divides each score by the root of the training example's self-influence
:math:`\nabla l_i^\top (F + \lambda I)^{-1} \nabla l_i`, so that examples of large gradients do not
explain every query: ℓ-RelatIF of Barshan, Brunet & Dziugaite, "RelatIF: identifying explanatory
training examples via relative influence", AISTATS 2020. An example without gradient keeps score 0.

Training gradients are taken batch by batch and kept as factors, so that nothing of size
training examples × parameters is formed. Of the queries, (F + λ I)⁻¹ ∇lⱼ are computed once; where
they take more than 2 GiB, the queries are scored in parts, and the training set is passed once for
each. Estimators that were fitted with ``verbose=1`` show the passes' progress.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from fimkit.data import ModelData, check_model_data
from fimkit.estimators.base import FisherEstimator
from fimkit.estimators.blocks import block_columns, block_names
from fimkit.exceptions import IFVPUsageError
from fimkit.gradients import BatchGradients, TokenGradients
from fimkit.operators import Columns, RowMatrix
from fimkit.operators.memory import chunks
from fimkit.vectors import ParameterSpace, all_finite

__all__ = [
    "TokenScores",
    "TopK",
    "layer_scores",
    "pairwise_scores",
    "self_influence",
    "token_scores",
    "top_k",
]

# Bytes that the queries' inverse-Fisher-vector products may take at a time.
_QUERY_BUDGET = 2 * 2**30

Scores = npt.NDArray[np.float64]
Normalization = Literal["relatif"] | None


class TopK(NamedTuple):
    """Each query's training examples of the highest, or lowest, scores; the first is the extreme.

    Attributes
    ----------
    indices : ndarray of shape (n_queries, k)
        Positions in ``train``.
    scores : ndarray of shape (n_queries, k)
    """

    indices: npt.NDArray[np.intp]
    scores: Scores

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """Return a table's columns, of a line for each pair, as ``pandas.DataFrame`` takes them.

        Returns
        -------
        columns : dict of str to ndarray of shape (n_queries * k,)
            ``query``, ``rank`` from 0, ``train`` and ``score``.
        """
        queries, ranks = np.indices(self.indices.shape).reshape(2, -1)
        return {
            "query": queries,
            "rank": ranks,
            "train": self.indices.ravel(),
            "score": self.scores.ravel(),
        }


class TokenScores(NamedTuple):
    """Scores of the training examples' tokens, and what no token has a part in.

    Attributes
    ----------
    scores : ndarray of shape (n_queries, n_train, T)
        T tokens of the longest example; zero behind the end of a shorter one.
    rest : ndarray of shape (n_queries, n_train)
        What parameters contribute whose gradients are not sums over tokens. With the sum of
        ``scores`` over tokens it makes `pairwise_scores`. In a batch of examples of one token, all
        that is captured is that token's.
    undivided : tuple of str
        These parameters: those that are not met token by token (a classifier's head behind a
        pooling, convolutions), and those of which ``coverage_`` says that they were not captured.
        Where it is empty, ``rest`` is zero.
    """

    scores: Scores
    rest: Scores
    undivided: tuple[str, ...]


def pairwise_scores(
    estimator: FisherEstimator,
    train: ModelData,
    queries: ModelData,
    *,
    measurement: Any = "loss",
    normalization: Normalization = None,
) -> Scores:
    """Score every training example on every query.

    Parameters
    ----------
    estimator : fitted estimator
        Gives the damped inverse of the Fisher information matrix.
    train : ModelData
        Training examples, with the model that was fitted.
    queries : ModelData
        Examples whose loss, or measurement, is explained.
    measurement : {"loss", "logit", "log_odds", "margin"} or callable, default="loss"
        What is explained of a query; see `fimkit.influence`.
    normalization : {"relatif"} or None, default=None
        Whether scores are divided by the root of the training example's self-influence.

    Returns
    -------
    scores : ndarray of shape (n_queries, n_train)
        Positive where the training example lowers the query's loss, or raises the measurement.
    """
    return layer_scores(
        estimator,
        train,
        queries,
        blocks="all",
        measurement=measurement,
        normalization=normalization,
    )["all"]


def layer_scores(
    estimator: FisherEstimator,
    train: ModelData,
    queries: ModelData,
    *,
    blocks: Any = "layer",
    measurement: Any = "loss",
    normalization: Normalization = None,
) -> dict[str, Scores]:
    """Divide the scores into what each layer contributes to them.

    A layer's part is the inner product of the training gradient with (F + λ I)⁻¹ times the
    query's gradient over the layer's parameters alone. The parts add up to `pairwise_scores`.

    Parameters
    ----------
    estimator, train, queries, measurement, normalization
        As for `pairwise_scores`; a normalization is that of the whole score.
    blocks : {"layer", "parameter", "all"}, mapping, or sequence of int, default="layer"
        One part for each module that owns parameters, or for each parameter; or a mapping or
        numbers, as `fimkit.Explicit` takes them. They need not be the blocks of the fit.

    Returns
    -------
    scores : dict of str to ndarray of shape (n_queries, n_train)
        By the name of the layer or block. All parameters of the fit are in one of them.
    """
    _check(estimator, train, queries, normalization)
    places = _places(estimator, blocks)
    scores = np.empty((len(places), len(queries), len(train)))
    for here, block in _score_blocks(
        estimator, train, queries, list(places.values()), measurement, normalization
    ):
        scores[:, *here] = block.cpu().numpy()
    return dict(zip(places, scores, strict=True))


def token_scores(
    estimator: FisherEstimator,
    train: ModelData,
    queries: ModelData,
    *,
    measurement: Any = "loss",
    normalization: Normalization = None,
) -> TokenScores:
    r"""Divide the scores into what each token of the training examples contributes to them.

    A layer that is applied to every token has the gradient :math:`\sum_t g_{it}` of example i, with
    :math:`g_{it} = s_{it} a_{it}^\top` for a linear map of input a and output gradient s. The
    score of token t is :math:`\nabla l_j^\top (F + \lambda I)^{-1} g_{it}`, summed over layers.
    It is about what layers meet at the token, not about the loss there alone, whose gradient
    attention carries to other tokens.

    Parameters
    ----------
    estimator, train, queries, measurement, normalization
        As for `pairwise_scores`; a normalization is that of the whole score.

    Returns
    -------
    scores : TokenScores
        ``scores`` of shape ``(n_queries, n_train, T)``, which with ``rest`` add up to
        `pairwise_scores`; ``rest`` is due to the parameters named in ``undivided``. Tokens are in
        the order of the batches, their padding included: of examples that are padded on the left,
        give all to one length.

    Raises
    ------
    IFVPUsageError
        If no layer meets several tokens of an example, or a layer meets as many rows as there are
        tokens in some batches only, so that they need not be the tokens.
    """
    _check(estimator, train, queries, normalization)
    relative = normalization == "relatif"

    def take(gradients: BatchGradients) -> tuple[TokenGradients, RowMatrix | None]:
        return gradients.by_token(), gradients.rows() if relative else None

    scores = np.zeros((len(queries), len(train), 1))
    rest = np.zeros((len(queries), len(train)))
    undivided: dict[str, None] = {}
    met: dict[str, set[bool]] = {}
    for some, ifvps in _query_parts(estimator, queries, measurement):
        start = 0
        for tokens, rows in estimator.batch_gradients(train, take):
            n = tokens.whole.n
            here = some, slice(start, start + n)
            found = torch.cat(
                [
                    tokens.split.project(ifvps, ifvps.dtype).view(len(ifvps), n, tokens.count),
                    tokens.whole.project(ifvps, ifvps.dtype)[:, :, None],
                ],
                2,
            )
            found = _finite(found, "train", here[1]).double()
            if rows is not None:
                found /= _own_scale(estimator, rows, here[1])[:, None]
            longer = tokens.count - scores.shape[2]
            if longer > 0:
                scores = np.pad(scores, ((0, 0), (0, 0), (0, longer)))
            scores[*here, : tokens.count] = found[..., :-1].cpu().numpy()
            rest[here] = found[..., -1].cpu().numpy()
            start += n
            for name, divided in tokens.divided.items():
                if not divided:
                    undivided[name] = None
                if divided is not None and tokens.count > 1:  # of one token, all fits by chance
                    met.setdefault(name, set()).add(divided)
    _check_tokens(scores.shape[2], met)
    return TokenScores(scores, rest, tuple(undivided))


def top_k(
    estimator: FisherEstimator,
    train: ModelData,
    queries: ModelData,
    k: int,
    *,
    largest: bool = True,
    measurement: Any = "loss",
    normalization: Normalization = None,
) -> TopK:
    """Find each query's most helpful, or most harmful, training examples.

    Parameters
    ----------
    estimator, train, queries, measurement, normalization
        As for `pairwise_scores`; the full matrix of scores is not formed.
    k : int
        How many per query, at most the number of training examples.
    largest : bool, default=True
        The most helpful (highest scores) first, or the most harmful (lowest) first.

    Returns
    -------
    best : TopK
        ``indices``, positions in ``train``, and ``scores``, both of shape ``(n_queries, k)``, best
        first; of equal scores, the earlier example's. ``best.columns()`` are a table's.
    """
    _check(estimator, train, queries, normalization)
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= len(train):
        raise IFVPUsageError(f"k must be an integer from 1 to len(train)={len(train)}; got {k!r}.")
    found = TopK(np.empty((len(queries), k), np.intp), np.empty((len(queries), k)))
    kept = TopK(np.empty((0, 0), np.intp), np.empty((0, 0)))
    whole = list(_places(estimator, "all").values())
    for (rows, columns), block in _score_blocks(
        estimator, train, queries, whole, measurement, normalization
    ):
        scores = block[0].cpu().numpy() if largest else -block[0].cpu().numpy()
        if columns.start == 0:
            kept = TopK(np.empty((len(scores), 0), np.intp), np.empty((len(scores), 0)))
        indices = np.broadcast_to(np.arange(columns.start, columns.stop), scores.shape)
        kept = _highest(np.hstack([kept.indices, indices]), np.hstack([kept.scores, scores]), k)
        if columns.stop == len(train):
            order = np.argsort(-kept.scores, axis=1, kind="stable")
            found.indices[rows] = np.take_along_axis(kept.indices, order, 1)
            found.scores[rows] = np.take_along_axis(kept.scores, order, 1)
    return found if largest else TopK(found.indices, -found.scores)


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
    scores = estimator.mahalanobis(data)
    _finite(torch.from_numpy(scores), "data", slice(0, len(scores)))
    return scores


def _check(estimator: Any, train: Any, queries: Any, normalization: Any) -> None:
    """Raise if an argument is of no use."""
    _check_estimator(estimator)
    check_model_data(train, "train")
    check_model_data(queries, "queries")
    for name, data in (("train", train), ("queries", queries)):
        if not len(data):
            raise IFVPUsageError(f"{name} has no examples; give at least one.")
    known = normalization is None or (isinstance(normalization, str) and normalization == "relatif")
    if not known:
        raise IFVPUsageError(f"normalization={normalization!r}; expected None or 'relatif'.")


def _check_tokens(longest: int, met: Mapping[str, set[bool]]) -> None:
    """Raise if there are no tokens, or what they are is in doubt."""
    if longest == 1:
        raise IFVPUsageError(
            "no layer meets several tokens of a training example, so its score cannot be divided; "
            "use pairwise_scores, or layer_scores."
        )
    for name, divided in met.items():
        if len(divided) > 1:
            raise IFVPUsageError(
                f"{name!r} meets as many rows as an example has tokens in some batches and not in "
                "others, so that its rows need not be the tokens; pad all examples to one length."
            )


def _check_estimator(estimator: Any) -> None:
    """Raise if an estimator is none of fimkit's, nor one that stands in for it."""
    if isinstance(estimator, type):
        raise IFVPUsageError(
            f"estimator must be a fitted estimator of fimkit; got the class {estimator.__name__}. "
            f"Make one and fit it: {estimator.__name__}().fit(train)."
        )
    if not hasattr(estimator, "gradients"):
        raise IFVPUsageError(
            f"estimator must be a fitted estimator of fimkit; got {type(estimator).__name__}. Of a "
            "search or a pipeline, give the fitted estimator inside, as search.best_estimator_."
        )


def _places(estimator: FisherEstimator, blocks: Any) -> dict[str, Columns]:
    """Return where the parameters of each block lie, by its name."""
    check_is_fitted(estimator)
    if isinstance(blocks, str) and blocks not in ("all", "layer", "parameter"):
        raise IFVPUsageError(
            f"blocks={blocks!r}; expected 'layer', 'parameter', 'all', a mapping, or one number "
            "per parameter."
        )
    space = ParameterSpace(estimator.parameter_shapes_)
    names = block_names(space, blocks)
    return {block: block_columns(space, members) for block, members in names.items()}


def _score_blocks(
    estimator: FisherEstimator,
    train: ModelData,
    queries: ModelData,
    places: Sequence[Columns],
    measurement: Any,
    normalization: Normalization,
) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
    """Yield the scores of some queries on one batch of training examples after another.

    Yields
    ------
    place : (slice, slice)
        Which queries and which training examples.
    scores : Tensor of shape (L, k, n)
        The parts of the L places, float64.
    """
    for some, ifvps in _query_parts(estimator, queries, measurement):
        start = 0
        for rows in estimator.gradients(train):
            here = slice(start, start + rows.n)
            scores = _finite(_part_scores(rows, ifvps, places), "train", here).double()
            if normalization == "relatif":
                scores /= _own_scale(estimator, rows, here)
            yield (some, here), scores
            start += rows.n


def _query_parts(
    estimator: FisherEstimator, queries: ModelData, measurement: Any
) -> Iterator[tuple[slice, Tensor]]:
    """Yield some queries' places and their `_ifvps`, as many at a time as the budget allows."""
    size = estimator.n_features_in_ * _precision(estimator).itemsize
    for some in chunks(len(queries), size, budget=_QUERY_BUDGET):
        yield some, _finite(_ifvps(estimator, queries[some], measurement), "queries", some)


def _precision(estimator: FisherEstimator) -> torch.dtype:
    """Return what scores are computed in."""
    return torch.promote_types(estimator.dtype_, torch.float32)


def _ifvps(estimator: FisherEstimator, queries: ModelData, measurement: Any) -> Tensor:
    """Return the queries' gradients, times the damped inverse, shape ``(k, p)``."""
    out = torch.empty(
        (len(queries), estimator.n_features_in_),
        dtype=_precision(estimator),
        device=estimator.device_,
    )
    damping, start = estimator.regularization_, 0
    for rows in estimator.gradients(queries, measurement=measurement):
        estimator.fisher_.solve_rows(rows, damping, out[start : start + rows.n])
        start += rows.n
    return out


def _part_scores(rows: RowMatrix, ifvps: Tensor, places: Sequence[Columns]) -> Tensor:
    """Return the inner products over each of L sets of columns, shape ``(L, k, n)``."""
    out = ifvps.new_zeros((len(places), len(ifvps), rows.n))
    for columns, group in rows.groups:
        vectors = columns.take(ifvps)
        for place, scores in zip(places, out, strict=True):
            if place.locate(columns) is not None:
                scores += group.project(vectors, ifvps.dtype)[..., 0]
            elif place.meets(columns):  # the group's gradients are kept as one
                inside = ifvps.new_zeros((1, rows.size))
                for part in place.parts:
                    inside[:, part] = 1
                scores += group.project(vectors * columns.take(inside), ifvps.dtype)[..., 0]
    return out


def _own_scale(estimator: FisherEstimator, rows: RowMatrix, here: slice) -> Tensor:
    """Return the roots of the rows' self-influence, infinite where it is zero, shape ``(n,)``."""
    own = estimator.fisher_.inverse_quadratic(rows, estimator.regularization_).double()
    return torch.where(_finite(own, "train", here) > 0, own.sqrt(), torch.inf)


def _finite(values: Tensor, data: str, here: slice) -> Tensor:
    """Return what was computed from gradients, which are finite; raise if it is not."""
    if not all_finite(values):
        raise IFVPUsageError(
            f"scores are not finite: products with gradients of {data}[{here.start}:{here.stop}] "
            "overflow; fit the estimator with dtype=torch.float64, or scale the inputs or the loss."
        )
    return values


def _highest(indices: npt.NDArray[np.intp], scores: Scores, k: int) -> TopK:
    """Return the k highest of each row in the order they are in; of equal ones, the first."""
    if scores.shape[1] <= k:
        return TopK(indices, scores)
    last = np.partition(scores, -k, axis=1)[:, -k, None]
    above, level = scores > last, scores == last
    kept = above | (level & (level.cumsum(1) <= k - above.sum(1, keepdims=True)))
    return TopK(indices[kept].reshape(-1, k), scores[kept].reshape(-1, k))
