"""`DataInf`: the mean of the damped inverses of all examples, in closed form."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Real
from typing import Any

import torch
from sklearn.utils._param_validation import Options, StrOptions

from fimkit.estimators.base import FisherEstimator, compose
from fimkit.estimators.regularization import block_regularizations
from fimkit.estimators.run import Run
from fimkit.exceptions import IFVPUsageError
from fimkit.operators import DataInfOperator
from fimkit.statistics import RowAccumulator, RowFolder, StoredRowAccumulator

__all__ = ["DataInf"]


class DataInf(FisherEstimator):
    r"""The mean over examples of the damped inverse, in place of the inverse of the mean.

    For each block b with :math:`p_b` parameters and the gradients :math:`g_i` of n examples in it,

    .. math:: M_b = \frac{1}{n} \sum_i (\lambda_b I + g_i g_i^\top)^{-1}
                  = \frac{1}{\lambda_b} \Bigl(
                    I - \frac{1}{n} \sum_i \frac{g_i g_i^\top}{\lambda_b + \|g_i\|^2} \Bigr) ,
              \qquad \mathrm{IFVP}(v) = M v .

    `transform` multiplies by M, `inverse_transform` by its exact inverse. That stands for
    :math:`F + \lambda I` in all that is said of estimators here: `mahalanobis` is
    :math:`v^\top M v`, and `score` the Gaussian log-likelihood under the precision M. M is
    positive definite for every kind of Fisher: of sampled labels the mean is over all samples,
    and for ``fisher="exact"`` it is the mean of :math:`(\lambda_b I + F_i)^{-1}`, with
    :math:`F_i` over an example's rows. Gradients are kept as factors, and M times any number of
    vectors takes two matrix products per layer.

    Parameters
    ----------
    regularization : "auto", float, mapping or sequence, default="auto"
        λ > 0, absolute. ``"auto"`` is ``0.1 * trace(F_b) / p_b`` for each block b, and the whole
        model's for a block without gradient (LoRA's A while its B is zero). A mapping of block
        name to λ, or a sequence in block order, gives one per block. It is applied when solving:
        setting it on a fitted estimator takes effect at once.
    loss, fisher, n_mc_samples, parameters, device, random_state, verbose
        As for `Explicit`.
    dtype : {torch.float32, torch.float64, torch.bfloat16}, optional
        What gradients are kept in; the model's, float32 at least, by default. Arithmetic is
        float64, but for products of float32 that are as exact as that needs. bfloat16 halves
        what they take, at three digits each.
    blocks : {"layer", "parameter"}, mapping or sequence of int, default="layer"
        One block per module that owns parameters, or per parameter, in the order of the
        parameters; a mapping of block name to parameter names or patterns, in its order; or one
        number per parameter, in order, blocks being ordered by number. Numbers may leave gaps.
    storage : "memory", str or path, default="memory"
        Where gradients are kept: in memory, or in files of a folder, mapped into memory, so that
        they may take more than memory holds. Arithmetic is then on the CPU, and results are the
        same. Each fit has a subfolder of its own, which goes with the fitted estimator; what a
        crash leaves is removed by the next fit in the folder. An estimator so fitted cannot be
        pickled.

    Attributes
    ----------
    fisher_ : Operator
        ``solve(v, damping)`` multiplies ``(k, p)`` tensors by M with λ = ``damping``;
        ``matmul``, ``diagonal``, ``trace``, ``logdet`` and ``to_dense`` are those of its inverse,
        and take λ, too. In a process group rows stay on their ranks, and all ranks call it (and
        `transform`, the scores and `save`) together, with the same vectors.
    n_features_in_, n_samples_seen_, parameter_names_, parameter_shapes_, coverage_, device_, dtype_
        As for `Explicit`.
    regularization_ : float or dict
        λ in force.

    References
    ----------
    Y. Kwon, E. Wu, K. Wu and J. Zou, "DataInf: efficiently estimating data influence in LoRA-tuned
    LLMs and diffusion models", ICLR 2024, section 3: the swap of mean and inverse.

    Examples
    --------
    >>> import torch
    >>> from fimkit import DataInf
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    >>> x, y = torch.randn(20, 3), torch.arange(20) % 2
    >>> datainf = DataInf().fit(model, [(x, y)])
    >>> list(datainf.regularization_)
    ['0', '2']
    >>> v = torch.ones(26)
    >>> u = datainf.transform(v)
    >>> bool(torch.allclose(datainf.inverse_transform(u), v, atol=1e-5))
    True
    """

    _parameter_constraints: dict[str, list[Any]] = {  # noqa: RUF012
        **FisherEstimator._parameter_constraints,
        "regularization": [StrOptions({"auto"}), Real, "array-like", Mapping],
        "dtype": [Options(torch.dtype, {torch.float32, torch.float64, torch.bfloat16}), None],
        "blocks": [StrOptions({"layer", "parameter"}), Mapping, "array-like"],
        "storage": [str, os.PathLike],
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
        blocks: Any = "layer",
        storage: Any = "memory",
    ) -> None:
        super().__init__(
            regularization,
            loss=loss,
            fisher=fisher,
            n_mc_samples=n_mc_samples,
            parameters=parameters,
            device=device,
            dtype=dtype,
            random_state=random_state,
            verbose=verbose,
        )
        self.blocks = blocks
        self.storage = storage

    def _fit(self, run: Run) -> dict[str, Any]:
        columns = self._divide(run, self.blocks)
        if not isinstance(self.regularization, str):
            _refuse_zero(block_regularizations(self.regularization, list(columns)))
        with run.ranks.together():
            context = self._folder(run)
        with context as folder:
            accumulator = RowAccumulator() if folder is None else StoredRowAccumulator(folder)
            run.accumulate({"": accumulator}, lambda batch: accumulator.update(batch.rows()))
            rows = accumulator.result(run.ranks)
            joint = self.fisher == "exact"
            operators = {
                block: DataInfOperator(rows.block(part), run.n, run.device, joint=joint)
                for block, part in columns.items()
            }
        return {
            "fisher_": compose({block: (columns[block], op) for block, op in operators.items()}),
            "_blocks": columns,
            "_traces": [operator.fisher_trace for operator in operators.values()],
            "_row_folder": folder,
        }

    def _damping(self) -> float | list[float]:
        """Return λ as one number, or as one per block; none is zero."""
        damping = super()._damping()
        _refuse_zero(damping if isinstance(damping, list) else [damping])
        return damping

    def _folder(self, run: Run) -> AbstractContextManager[RowFolder | None]:
        """Return where rows are stored, having moved the run to the CPU; None for memory."""
        if self.storage == "memory":
            return nullcontext()
        if self.device is not None and run.device.type != "cpu":
            raise IFVPUsageError(
                f"device is {run.device}, but rows in a folder are mapped into the CPU's memory; "
                "leave device out, or use storage='memory'."
            )
        if run.checkpoint is not None:
            raise IFVPUsageError(
                "checkpoint= is given with storage= a folder, whose files go with an interrupted "
                "fit; use storage='memory' with checkpoint=, which keeps the rows in files too."
            )
        run.keep_on(torch.device("cpu"))
        return RowFolder(self.storage)


def _refuse_zero(regularizations: Sequence[float]) -> None:
    if 0 in regularizations:
        raise IFVPUsageError(
            f"regularization is {list(regularizations)}; expected numbers above 0, without which "
            "λI + F_i of an example has no inverse."
        )
