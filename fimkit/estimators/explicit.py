"""`Explicit`: the exact Fisher information matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sklearn.utils._param_validation import StrOptions

from fimkit.estimators.base import FisherEstimator, compose
from fimkit.estimators.run import Run
from fimkit.gradients import BatchGradients
from fimkit.statistics import FisherAccumulator, Solver

__all__ = ["Explicit"]


class Explicit(FisherEstimator):
    r"""The exact Fisher information matrix, or its exact diagonal blocks.

    For examples i = 1..n with negative log-likelihood :math:`l_i(\theta)` and
    :math:`g_i = \nabla_\theta l_i`,

    .. math:: F = \frac{1}{n} \sum_i g_i g_i^\top , \qquad
              \mathrm{IFVP}(v) = (F + \lambda I)^{-1} v .

    The mean is over examples, never over mini-batches: the result depends on neither batch size
    nor order. With p parameters and r rows (r = n for the empirical kind), F is kept as a
    p × p matrix when p ≤ r and through the r × r Gram matrix of its rows otherwise; then neither
    p × p nor, for linear layers, r × p numbers are ever formed, and p may be in the millions.

    Parameters
    ----------
    regularization : "auto", float, mapping or sequence, default="auto"
        λ ≥ 0, absolute. ``"auto"`` is ``0.1 * trace(F_b) / p_b`` for each block b; a mapping of
        block name to λ, or a sequence in block order, gives one per block. It is applied when
        solving: setting it on a fitted estimator takes effect at once. Every other parameter
        waits for the next fit.
    loss : {"cross_entropy", "causal_lm", "mse", "bce"} or callable, default="cross_entropy"
        Negative log-likelihood per example, summed over the example's targets. ``"causal_lm"`` is
        the cross-entropy of each next token, of labels that are the token ids. ``"mse"`` is
        ½‖f − y‖². A callable is ``loss(model, batch)`` returning ``(B,)`` losses, or
        ``(losses, mask)``; ``clone`` takes it over without a copy.
    fisher : {"empirical", "mc", "exact", "predicted"}, default="empirical"
        Where the gradients are taken: at the ground truth; at ``n_mc_samples`` labels sampled
        from the model; in closed form over the model's distribution (type-2 Fisher, generalised
        Gauss-Newton); or at the model's own most probable label, which some libraries call the
        true Fisher although it is not.
    n_mc_samples : int, default=1
        Labels sampled per example for ``fisher="mc"``.
    parameters : str or sequence of str, optional
        Names or glob patterns of the parameters to include; all that require grad by default.
    device : str or torch.device, optional
        Where rows and matrices live; the model's by default. The model is never moved.
    dtype : {torch.float32, torch.float64}, optional
        What rows are kept in; the model's, float32 at least, by default. Sums of products are
        float64 in any case.
    random_state : int, RandomState instance or None, default=None
        For sampled labels. An int makes them the same for each example on every fit.
    verbose : int, default=0
        Show progress when not 0.
    solver : {"auto", "primal", "dual"}, default="auto"
        The p × p matrix, the Gram matrix, or the smaller of the two.
    blocks : {"all", "layer", "parameter"}, mapping or sequence of int, default="all"
        Keep all of F, or its diagonal blocks by module, by parameter, by a mapping of block
        name to parameter names or patterns, or by one number per parameter, in order.

    Attributes
    ----------
    fisher_ : Operator
        The undamped F: ``matmul``, ``solve(v, damping)``, ``diagonal``, ``trace``,
        ``logdet(damping)``, ``to_dense`` on ``(k, p)`` tensors. In a process group the rows of the
        dual form stay on their ranks, and all ranks call it (and `transform`, the scores and
        `save`) together, with the same vectors.
    n_features_in_ : int
        Number of parameters p.
    n_samples_seen_ : int
        Number of examples n.
    parameter_names_, parameter_shapes_ : list of str, dict of str to tuple
        The selected parameters, in order.
    coverage_ : dict of str to str
        How each parameter's gradients were obtained.
    device_, dtype_ : torch.device, torch.dtype
        Where and in what the rows are kept.
    regularization_ : float or dict
        λ in force.

    References
    ----------
    S. Amari, "Natural gradient works efficiently in learning", Neural Computation 10 (1998),
    eq. 15-17. J. Martens, "New insights and perspectives on the natural gradient method",
    JMLR 21 (2020), for the kinds of Fisher.

    Examples
    --------
    >>> import torch
    >>> from fimkit import Explicit
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(3, 2)
    >>> x, y = torch.randn(20, 3), torch.arange(20) % 2
    >>> explicit = Explicit(regularization=0.1).fit(model, [(x, y)])
    >>> v = torch.ones(8)
    >>> u = explicit.transform(v)
    >>> bool(torch.allclose(explicit.fisher_.matmul(u[None])[0] + 0.1 * u, v, atol=1e-5))
    True
    """

    _parameter_constraints: dict[str, list[Any]] = {  # noqa: RUF012
        **FisherEstimator._parameter_constraints,
        "solver": [StrOptions({"auto", "primal", "dual"})],
        "blocks": [StrOptions({"all", "layer", "parameter"}), Mapping, "array-like"],
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
        solver: Solver = "auto",
        blocks: Any = "all",
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
        self.solver = solver
        self.blocks = blocks

    def _fit(self, run: Run) -> dict[str, Any]:
        columns = self._divide(run, self.blocks)
        accumulators = {
            block: FisherAccumulator(part.size, run.device, self.solver)
            for block, part in columns.items()
        }

        def update(gradients: BatchGradients) -> None:
            rows = gradients.rows()
            for block, accumulator in accumulators.items():
                accumulator.update(rows.block(columns[block]))

        run.accumulate(accumulators, update)
        for accumulator in accumulators.values():
            accumulator.reduce(run.ranks)
        operators = {
            block: (columns[block], accumulator.result(run.n))
            for block, accumulator in accumulators.items()
        }
        return {
            "fisher_": compose(operators),
            "_blocks": columns,
            "_traces": [operator.trace() for _, operator in operators.values()],
        }
