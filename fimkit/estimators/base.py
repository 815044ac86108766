"""What all methods share: parameters, the fit's frame, vectors in and out."""

from __future__ import annotations

import copy
import math
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from numbers import Integral, Real
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils import metadata_routing
from sklearn.utils._param_validation import Interval, Options, StrOptions
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from fimkit import serialization
from fimkit.data import ModelData, check_model_data
from fimkit.distributed import Ranks
from fimkit.estimators.blocks import block_columns, block_names
from fimkit.estimators.checkpoint import Checkpoint
from fimkit.estimators.description import describe
from fimkit.estimators.identity import identity
from fimkit.estimators.regularization import (
    block_regularizations,
    given_regularizations,
    resolve_regularization,
)
from fimkit.estimators.run import Run, inside
from fimkit.estimators.scores import ScoresMixin
from fimkit.estimators.settings import Settings
from fimkit.exceptions import IFVPUsageError
from fimkit.gradients import (
    AmbientAutocast,
    BatchGradients,
    EvaluationTurns,
    FisherKind,
    Objective,
    differentiating,
    divided,
    evaluating,
    whole,
)
from fimkit.losses import LOSSES, Loss, measured
from fimkit.operators import BlockDiagonalOperator, Columns, Operator, RowMatrix, ShardedRowMatrix
from fimkit.vectors import all_finite

__all__ = ["FisherEstimator", "components", "compose"]

T = TypeVar("T")

# Bytes of per-example gradients that a ModelData may become as one array.
_DENSE_LIMIT = 4 * 2**30

_SAME = (
    "All ranks fit one estimator to one model: give each the same parameters, and load the same "
    "weights, or broadcast rank 0's (torch.distributed.broadcast), buffers such as BatchNorm's "
    "running statistics included."
)


class FisherEstimator(  # type: ignore[call-arg]
    ScoresMixin,
    TransformerMixin,
    BaseEstimator,
    auto_wrap_output_keys=None,  # a wrapped transform takes its vectors by the name of X only
):
    """Base of the estimators; see `fimkit.Explicit` for the shared parameters."""

    # What goes in is no metadata, although it is not called X.
    __metadata_request__fit = dict.fromkeys(
        ("model", "dataloader", "checkpoint", "checkpoint_every"), metadata_routing.UNUSED
    )
    __metadata_request__transform = {"vectors": metadata_routing.UNUSED}  # noqa: RUF012
    __metadata_request__inverse_transform = __metadata_request__transform
    __metadata_request__score = __metadata_request__transform

    _parameter_constraints: dict[str, list[Any]] = {  # noqa: RUF012
        "regularization": [
            StrOptions({"auto"}),
            Interval(Real, 0, None, closed="left"),
            "array-like",
            Mapping,
        ],
        "loss": [StrOptions(set(LOSSES)), Loss, callable],
        "fisher": [StrOptions({"empirical", "mc", "exact", "predicted"})],
        "n_mc_samples": [Interval(Integral, 1, None, closed="left")],
        "parameters": [str, "array-like", None],
        "device": [str, torch.device, None],
        "dtype": [Options(torch.dtype, {torch.float32, torch.float64}), None],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
        regularization: Any = "auto",
        *,
        loss: Any = "cross_entropy",
        fisher: str = "empirical",
        n_mc_samples: int = 1,
        parameters: Any = None,
        device: Any = None,
        dtype: Any = None,
        random_state: Any = None,
        verbose: int = 0,
    ) -> None:
        self.regularization = regularization
        self.loss = loss
        self.fisher = fisher
        self.n_mc_samples = n_mc_samples
        self.parameters = parameters
        self.device = device
        self.dtype = dtype
        self.random_state = random_state
        self.verbose = verbose

    def fit(
        self,
        model: Any,
        dataloader: Any = None,
        *others: Any,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 100,
    ) -> Any:
        """Build the Fisher information matrix of a model on data.

        Parameters
        ----------
        model : torch.nn.Module or ModelData
            The trained model, which is run in evaluation mode and left as it was; or a
            `ModelData`, which brings its own data.
        dataloader : iterable of batches, optional
            A ``DataLoader`` or any iterable of batches, each a tuple or list
            ``(*inputs, targets)``, a mapping with ``labels``, or what a callable ``loss`` takes.
            Ignored when ``model`` is a `ModelData`, so that scikit-learn may pass labels. In a
            process group each rank passes its own shard, and all ranks fit the same estimator.
        checkpoint : str or path, optional
            A folder, made if absent, into which the state of the fit is written, and nowhere else.
            The same call goes on from there after an interruption, with the same result. The files
            are removed when the fit is complete. (It belongs to one fit, so it is no parameter of
            the estimator, which searches copy.)
        checkpoint_every : int, default=100
            Batches from one writing to the next.

        Returns
        -------
        self : object
            The fitted estimator. It does not keep the model.

        Raises
        ------
        IFVPUsageError
            If the model, the data or the parameters do not fit together; the message names the
            parameter, layer or batch and the remedy. The estimator is then as it was before.
        RankError
            If another rank of the process group failed, naming it and its error.
        """
        if others:  # there are none; x and y given apart deserve a better answer than Python's
            raise IFVPUsageError(
                f"fit(model, dataloader) got {len(others)} more, such as targets beside inputs; "
                "give them together: DataLoader(TensorDataset(x, y), batch_size=256) as "
                "dataloader, or fit(ModelData(model, (x, y)))."
            )
        ranks = Ranks.current()
        with ranks.together():
            self._validate_params()
            if not isinstance(self.regularization, str):
                given_regularizations(self.regularization)
            settings = Settings.of(self)
            _check_interval(checkpoint_every)
        ranks.check_same({"what fully_shard divides": divided(inside(model))}, _SAME)
        with ExitStack() as stack:
            with ranks.together():
                stack.enter_context(whole(inside(model)))
                run = Run(settings, model, dataloader, ranks=ranks)
                needed = checkpoint is not None or not ranks.alone
                known = identity(self, run.model) if needed else {}
            ranks.check_same(known, _SAME)
            run.agree()
            with ranks.together():
                if checkpoint is not None:
                    run.checkpoint = Checkpoint(
                        checkpoint, checkpoint_every, ranks, known, run.device
                    )
            with run.passing(), evaluating(run.model):
                fitted = self._fit(run)
        _refuse_overflow(fitted)
        if not isinstance(self.regularization, str):
            block_regularizations(self.regularization, list(fitted["_blocks"]))
        fitted.update(
            n_features_in_=run.space.size,
            n_samples_seen_=run.n,
            parameter_names_=list(run.space.shapes),
            parameter_shapes_=dict(run.space.shapes),
            device_=run.device,
            dtype_=run.dtype,
            coverage_=fitted.pop("coverage_", run.engine.coverage),
            _space=run.space,
            _settings=run.settings,
        )
        with ranks.together():  # as long as one may need them, all keep their files
            self.__dict__.update(fitted)
        if run.checkpoint is not None:
            run.checkpoint.remove()
        return self

    @abstractmethod
    def _fit(self, run: Run) -> dict[str, Any]:
        """Return ``fisher_``, and each block's place (``_blocks``) and trace (``_traces``)."""

    def transform(self, vectors: Any) -> Any:
        """Multiply vectors by the damped inverse Fisher: ``(F + λ I)⁻¹ v``.

        Parameters
        ----------
        vectors : ndarray or Tensor of shape (p,) or (k, p), dict, sequence, or ModelData
            The selected parameters in ``named_parameters()`` order, a tied one once; a dict of
            parameter name to ``(*shape)`` or ``(k, *shape)``; a sequence with one such tensor
            per parameter; or a `ModelData`, for the gradients of its examples at their targets.

        Returns
        -------
        ifvp : as ``vectors``
            In the same container, shape, dtype and device; an ndarray ``(n, p)`` for a
            `ModelData`. Detached from any graph.

        Raises
        ------
        IFVPUsageError
            If the vectors do not fit the fitted parameters, or are not finite.
        SingularFisherError
            If ``F + λ I`` is singular to working precision.
        """
        check_is_fitted(self)
        damping = self._damping()
        return self._map(vectors, lambda flat: self.fisher_.solve(flat, damping))

    def fit_transform(self, data: Any, y: Any = None) -> Any:
        """Fit to a `ModelData` and return the IFVPs of its own gradients.

        Parameters
        ----------
        data : ModelData
        y : ignored

        Returns
        -------
        ifvp : ndarray of shape (n, p)
        """
        self._validate_params()
        check_model_data(data, "data")
        return self.fit(data, y).transform(data)

    def inverse_transform(self, vectors: Any) -> Any:
        """Multiply vectors by the damped Fisher, whose inverse `transform` applies.

        Parameters
        ----------
        vectors : as for `transform`

        Returns
        -------
        products : as ``vectors``
            ``(F + λ I) v``.
        """
        check_is_fitted(self)
        damping = self._damping()
        return self._map(vectors, lambda flat: self.fisher_.matmul(flat, damping))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted estimator into a file, from which `fimkit.load` takes it.

        The file is in the safetensors format: tensors, and parameters as JSON, without code. So a
        ``loss`` that is a function or a module is not in it, and is given to `load` again. Neither
        is the model. Where rows are divided over the ranks of a process group (by `DataInf`, and
        by `Explicit` in its dual form), all ranks call this; rank 0 gathers the rows and writes.

        Parameters
        ----------
        path : str or path
            A file of that name is replaced, once the new one is complete.

        Raises
        ------
        IFVPUsageError
            If the estimator is of a class of its own, or a parameter was set to something that a
            file cannot hold.
        """
        check_is_fitted(self)
        if not type(self).__module__.startswith("fimkit."):
            raise IFVPUsageError(
                f"{type(self).__name__} is no class of fimkit's, and code is not kept in files; "
                "pickle the estimator instead."
            )
        tensors: dict[str, Tensor] = {}
        parameters = self.get_params(deep=False)
        apart = {*parameters, "device_", "_row_folder"}  # where it is loaded decides the last two
        fitted = {name: value for name, value in vars(self).items() if name not in apart}
        header = {
            "class": type(self).__name__,
            "parameters": describe(parameters, "parameters", tensors),
            "fitted": describe(fitted, "fitted", tensors),
        }
        ranks = Ranks.current() if self._is_sharded() else Ranks()
        with ranks.together():
            if ranks.rank == 0:
                serialization.write(path, header, tensors)

    def _is_sharded(self) -> bool:
        """Whether rows of the fit are divided over ranks, which then answer together."""
        return any(
            isinstance(getattr(operator, "rows", None), ShardedRowMatrix)
            for operator in components(self.fisher_)
        )

    @property
    def regularization_(self) -> Any:
        """Regularization in force: a float, or one per block by name.

        Follows ``regularization``, which may be set after the fit.
        """
        check_is_fitted(self)
        try:
            damping = self._damping()
        except IFVPUsageError as error:
            raise _NoRegularizationError(str(error)) from error
        if isinstance(damping, float):
            return damping
        return dict(zip(self._blocks, damping, strict=True))

    def __sklearn_clone__(self) -> Any:
        # A loss is never changed, and may hold the model, so it is taken over instead of copied.
        other = copy.copy(self)
        other.loss = "cross_entropy"
        cloned = super(FisherEstimator, other).__sklearn_clone__()
        cloned.loss = self.loss
        return cloned

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "fisher_")

    def _damping(self) -> float | list[float]:
        """Return λ as one number, or as one per block."""
        sizes = {block: columns.size for block, columns in self._blocks.items()}
        return resolve_regularization(self.regularization, sizes, self._traces)

    def _divide(self, run: Run, blocks: Any) -> dict[str, Columns]:
        """Return where each block's parameters lie, having told the run, before any pass."""
        names = block_names(run.space, blocks)
        if not isinstance(self.regularization, str):
            block_regularizations(self.regularization, list(names))
        run.blocks = {name: i for i, members in enumerate(names.values()) for name in members}
        return {block: block_columns(run.space, members) for block, members in names.items()}

    # -- vectors -------------------------------------------------------------------------------

    def _flatten(self, vectors: Any) -> tuple[Tensor, Any]:
        """Return vectors as a ``(k, p)`` tensor on the fit's device, and the way back."""
        flat, restore = self._space.flatten(vectors)
        if not all_finite(flat):
            raise IFVPUsageError("vectors contain NaN or infinity; remove those vectors first.")
        return flat.to(self.device_), restore

    def _map(self, vectors: Any, function: Any) -> Any:
        if not isinstance(vectors, ModelData):
            flat, restore = self._flatten(vectors)
            with AmbientAutocast().disabled():
                return restore(function(flat))
        size = len(vectors) * self.n_features_in_ * self.dtype_.itemsize
        if size > _DENSE_LIMIT:
            raise IFVPUsageError(
                f"the gradients of {len(vectors)} examples over {self.n_features_in_} parameters "
                f"take {size / 2**30:.1f} GiB as one array, above the limit of "
                f"{_DENSE_LIMIT // 2**30} GiB; transform slices of the ModelData in turn, or use "
                "fimkit.influence, which never forms them."
            )
        return np.concatenate(
            [
                function(part).cpu().numpy()
                for rows in self.gradients(vectors)
                for part in rows.dense_parts(torch.promote_types(self.dtype_, torch.float32))
            ]
        )

    def _reduce(
        self,
        vectors: Any,
        function: Callable[[Tensor | RowMatrix], Tensor],
        fisher: FisherKind | None = None,
    ) -> npt.NDArray[np.float64]:
        """Apply a function from k vectors, or rows, to ``(L, k)`` numbers, float64.

        A ModelData stands for its gradients, of the fitted kind unless told; an example's numbers
        are then weighted sums over its rows.
        """
        if not isinstance(vectors, ModelData):
            flat, _ = self._flatten(vectors)
            with AmbientAutocast().disabled():
                return _numpy64(function(flat))
        parts = []
        for rows in self.gradients(vectors, fisher):
            values = function(rows).double()
            weighted = values * rows.flat_weights(values)
            parts.append(_numpy64(weighted.view(len(values), rows.n, rows.c).sum(2)))
        return np.concatenate(parts, 1)

    def gradients(
        self,
        data: ModelData,
        fisher: FisherKind | None = "empirical",
        *,
        measurement: Any = "loss",
    ) -> Iterator[RowMatrix]:
        """Yield the per-example gradients of data batch by batch, as rows kept in factors.

        Parameters
        ----------
        data : ModelData
            Examples, with a model of the fitted parameters.
        fisher : str or None, default="empirical"
            Kind of rows; the fitted kind when None.
        measurement : {"loss", "logit", "log_odds", "margin"} or callable, default="loss"
            What gradients are of: the loss, or the negative of a measurement, as
            `fimkit.influence` takes it.

        Yields
        ------
        rows : RowMatrix
            What `fimkit.influence` is built on.
        """
        return self.batch_gradients(data, BatchGradients.rows, fisher, measurement=measurement)

    def batch_gradients(
        self,
        data: ModelData,
        take: Callable[[BatchGradients], T],
        fisher: FisherKind | None = "empirical",
        *,
        measurement: Any = "loss",
    ) -> Iterator[T]:
        """Yield what is taken of the per-example gradients of data, batch by batch.

        Parameters
        ----------
        data, fisher, measurement
            As for `gradients`.
        take : callable
            From the gradients of a batch, with the calls that they come from, to what is yielded;
            it is called in the model's turn, where nothing that it refers to changes.
        """
        check_is_fitted(self)
        check_model_data(data, "data")
        settings = self._settings
        objective = settings.objective
        if fisher is not None:
            objective = Objective(objective.loss, fisher)
        objective = replace(objective, loss=measured(objective.loss, measurement))
        settings = replace(settings, objective=objective)
        with whole(inside(data)):
            run = Run(settings, data, space=self._space)
            run.blocks = {
                name: i
                for i, columns in enumerate(self._blocks.values())
                for name, place in self._space.slices.items()
                if columns.locate(Columns((place,))) is not None
            }
            turns, batches = EvaluationTurns(run.model), run.gradients()
            with differentiating():
                while True:  # between batches, which may be for long, other threads have a turn
                    with turns.turn():
                        gradients = next(batches, None)
                        if gradients is None:
                            return
                        taken = take(gradients)
                    yield taken


def _check_interval(every: Any) -> None:
    if isinstance(every, bool) or not isinstance(every, Integral) or every < 1:
        raise IFVPUsageError(
            f"checkpoint_every is {every!r}; expected a number of batches, at least 1."
        )


def _refuse_overflow(fitted: Mapping[str, Any]) -> None:
    for block, trace in zip(fitted["_blocks"], fitted["_traces"], strict=True):
        if not math.isfinite(trace):
            raise IFVPUsageError(
                f"the Fisher of block {block!r} is not finite: its squared gradients overflow; "
                "fit with dtype=torch.float64, or scale the loss."
            )


class _NoRegularizationError(IFVPUsageError, AttributeError):
    """What lists attributes, as the HTML representation does, passes over an AttributeError."""


def _numpy64(values: Tensor) -> npt.NDArray[np.float64]:
    return values.cpu().double().numpy()


def compose(blocks: Mapping[str, tuple[Columns, Operator]]) -> Operator:
    """Return one operator for all blocks: the only one itself, or their block diagonal."""
    columns, operator = next(iter(blocks.values()))
    if len(blocks) == 1 and columns.contiguous:
        return operator
    return BlockDiagonalOperator(dict(blocks))


def components(operator: Operator) -> list[Operator]:
    """Return the operators of all blocks that `compose` made one."""
    if isinstance(operator, BlockDiagonalOperator):
        return [component for _, component in operator.blocks.values()]
    return [operator]
