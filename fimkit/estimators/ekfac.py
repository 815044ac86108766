"""`EKFAC`, and the cruder `KFAC` and `Diagonal` for comparison."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from fimkit.estimators.base import FisherEstimator, components, compose
from fimkit.estimators.parts import LayerParts, first_pass
from fimkit.estimators.replay import ReplayedPasses
from fimkit.estimators.run import Run
from fimkit.operators import (
    Columns,
    EigenKroneckerOperator,
    Operator,
)
from fimkit.statistics import (
    DiagonalAccumulator,
    WeightSharing,
    begin_eigenvalues,
    set_eigenbases,
)

__all__ = ["EKFAC", "KFAC", "Diagonal"]


class _KroneckerEstimator(FisherEstimator):
    """What `EKFAC` and `KFAC` share: a Kronecker-factored basis per layer."""

    _parameter_constraints: dict[str, list[Any]] = {  # noqa: RUF012
        **FisherEstimator._parameter_constraints,
        "weight_sharing": [StrOptions({"expand", "reduce"})],
        "fallback": [StrOptions({"auto", "raise"})],
    }

    weight_sharing: WeightSharing
    fallback: str

    @property
    def eigenvalues_(self) -> dict[str, Tensor]:
        """Eigenvalues Λ of each Kronecker layer, shape ``(groups, out, in)``."""
        return {name: op.eigenvalues for name, op in self._kronecker_operators().items()}

    @property
    def eigenvectors_(self) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        """Eigenvectors of each Kronecker layer's output and input side, in columns.

        Shapes ``(groups, out, out)`` and ``(groups, in, in)``; None for the identity.
        """
        operators = self._kronecker_operators()
        return {name: (op.output_basis, op.input_basis) for name, op in operators.items()}

    def _kronecker_operators(self) -> dict[str, EigenKroneckerOperator]:
        check_is_fitted(self)
        operators = zip(self._blocks, components(self.fisher_), strict=True)
        return {
            name: operator
            for name, operator in operators
            if name in self._layer_names and isinstance(operator, EigenKroneckerOperator)
        }

    def _finish(
        self, run: Run, parts: LayerParts, layers: dict[str, EigenKroneckerOperator]
    ) -> dict[str, Any]:
        """Return the fitted attributes, given the operators of the Kronecker layers."""
        parts.warn_of_unused_mask()
        blocks: dict[str, tuple[Columns, Operator]] = {}
        coverage = dict(run.engine.coverage)
        for key, (columns, members) in parts.groups.items():
            if key in layers:
                how = "Kronecker layer"
                blocks[key.removesuffix(".weight")] = (columns, layers[key])
            else:
                operator, how = parts.rest(key, run.n)
                blocks[key] = (columns, operator)
            for member in members:
                coverage[member] = f"{how}: {coverage[member]}"
        return {
            "fisher_": compose(blocks),
            "coverage_": coverage,
            "_blocks": {name: columns for name, (columns, _) in blocks.items()},
            "_traces": [operator.trace() for _, operator in blocks.values()],
            "_layer_names": {key.removesuffix(".weight") for key in layers},
        }


class EKFAC(_KroneckerEstimator):
    r"""Eigenvalue-corrected Kronecker-factored approximate curvature.

    Per layer with inputs a (a bias's 1 folded in) and output gradients s,

    .. math:: A = \mathbb{E}[a a^\top] = Q_A \cdot Q_A^\top, \quad
              S = \mathbb{E}[\textstyle\sum_t s_t s_t^\top] = Q_S \cdot Q_S^\top, \quad
              \Lambda = \mathbb{E}[(Q_S^\top G Q_A)^{\odot 2}] ,

    with the exact per-example gradient :math:`G = \sum_t s_t a_t^\top`, and

    .. math:: \mathrm{IFVP}(V) = Q_S \bigl[(Q_S^\top V Q_A) / (\Lambda + \lambda)\bigr] Q_A^\top .

    So the trace of every layer is that of its exact Fisher. Linear layers, convolutions (one
    factor pair per group), embeddings and transposed products are Kronecker layers; every other
    parameter gets its exact block when it is small and the diagonal otherwise, as ``coverage_``
    tells. Two passes are made over the data.

    Parameters
    ----------
    regularization, loss, fisher, n_mc_samples, parameters, device, dtype, random_state, verbose
        As for `Explicit`. Blocks, for ``"auto"`` and for one λ per block, are the layers.
    weight_sharing : {"expand", "reduce"}, default="expand"
        Whether the factors of a layer with several positions per example treat positions as
        examples, or average inputs and sum gradients over them first. Λ is exact in both, for the
        basis at hand; where a reduced factor is singular (fewer examples than the side is wide,
        or gradients that sum to zero over positions, as at attention's keys), its null space has
        no basis of its own, and the result depends there on rounding.
    fallback : {"auto", "raise"}, default="auto"
        What parameters outside Kronecker layers get: a block or diagonal, or an error by name.
    cache_budget : int, default=2**30
        Bytes of inputs and gradients kept between the passes. Batches beyond it are run through
        the model again, with the random numbers of the first pass (of torch, of the loader's
        generators, of Python's ``random`` and of ``numpy.random``); data that give other losses,
        or layers other inputs or gradients, then are refused.

    Attributes
    ----------
    fisher_ : Operator
        The undamped approximation: ``matmul``, ``solve(v, damping)``, ``diagonal``, ``trace``,
        ``logdet(damping)``, ``to_dense`` on ``(k, p)`` tensors.
    eigenvalues_ : dict of str to Tensor
        Λ of each Kronecker layer, ``(groups, out, in)``.
    eigenvectors_ : dict of str to (Tensor, Tensor)
        :math:`Q_S` and :math:`Q_A` of each, eigenvectors in columns; None for the identity, which
        sides the size of a vocabulary have.
    coverage_, n_features_in_, n_samples_seen_, parameter_names_, parameter_shapes_, device_, dtype_
        As for `Explicit`.

    References
    ----------
    T. George et al., "Fast approximate natural gradient descent in a Kronecker-factored
    eigenbasis", NeurIPS 2018, eq. 8 and Algorithm 1. R. Eschenhagen et al., "Kronecker-factored
    approximate curvature for modern neural network architectures", NeurIPS 2023.

    Examples
    --------
    >>> import torch
    >>> from fimkit import EKFAC
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    >>> x, y = torch.randn(20, 3), torch.arange(20) % 2
    >>> ekfac = EKFAC(regularization=0.1).fit(model, [(x, y)])
    >>> sorted(ekfac.eigenvalues_), ekfac.eigenvalues_["0"].shape
    (['0', '2'], torch.Size([1, 4, 4]))
    >>> ekfac.transform(torch.ones(26)).shape
    torch.Size([26])
    """

    _parameter_constraints: dict[str, list[Any]] = {  # noqa: RUF012
        **_KroneckerEstimator._parameter_constraints,
        "cache_budget": [Interval(Integral, 0, None, closed="left")],
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
        weight_sharing: WeightSharing = "expand",
        fallback: str = "auto",
        cache_budget: int = 2**30,
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
        self.weight_sharing = weight_sharing
        self.fallback = fallback
        self.cache_budget = cache_budget

    def _fit(self, run: Run) -> dict[str, Any]:
        passes = ReplayedPasses(run, self.cache_budget)
        parts, passed = first_pass(
            run, self.weight_sharing, self.fallback, {"passes": passes}, passes.first
        )
        if passed:
            parts.reduce(run.ranks)
            sides = set_eigenbases(parts.layers, run.n, run.ranks)
            begin_eigenvalues(parts.layers, sides)
        statistics = {"parts": parts, "passes": passes}
        run.accumulate(statistics, parts.add_eigenvalues, passes.second)
        for layer in parts.layers.values():
            layer.reduce_eigenvalues(run.ranks)
        layers = {name: layer.eigen_corrected(run.n) for name, layer in parts.layers.items()}
        return self._finish(run, parts, layers)


class KFAC(_KroneckerEstimator):
    r"""Kronecker-factored approximate curvature, for comparison with `EKFAC`.

    The eigenvalues are products of the factors' own: :math:`F \approx S \otimes A`. One pass.

    Parameters
    ----------
    regularization, loss, fisher, n_mc_samples, parameters, device, dtype, random_state, verbose
        As for `Explicit`.
    weight_sharing, fallback
        As for `EKFAC`.

    References
    ----------
    J. Martens and R. Grosse, "Optimizing neural networks with Kronecker-factored approximate
    curvature", ICML 2015, eq. 1 (without the factored damping).

    Examples
    --------
    >>> import torch
    >>> from fimkit import KFAC
    >>> x, y = torch.randn(20, 3), torch.arange(20) % 2
    >>> KFAC(regularization=0.1).fit(torch.nn.Linear(3, 2), [(x, y)]).transform(torch.ones(8)).shape
    torch.Size([8])
    """

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
        weight_sharing: WeightSharing = "expand",
        fallback: str = "auto",
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
        self.weight_sharing = weight_sharing
        self.fallback = fallback

    def _fit(self, run: Run) -> dict[str, Any]:
        parts, _ = first_pass(run, self.weight_sharing, self.fallback)
        parts.reduce(run.ranks)
        sides = set_eigenbases(parts.layers, run.n, run.ranks)
        layers = {name: layer.factored(*sides[name]) for name, layer in parts.layers.items()}
        return self._finish(run, parts, layers)


class Diagonal(FisherEstimator):
    """The exact diagonal of the Fisher information matrix, for comparison.

    Parameters
    ----------
    regularization, loss, fisher, n_mc_samples, parameters, device, dtype, random_state, verbose
        As for `Explicit`.

    Examples
    --------
    >>> import torch
    >>> from fimkit import Diagonal
    >>> x, y = torch.randn(20, 3), torch.arange(20) % 2
    >>> diagonal = Diagonal(regularization=0.1).fit(torch.nn.Linear(3, 2), [(x, y)])
    >>> diagonal.transform(torch.ones(8)).shape
    torch.Size([8])
    """

    def _fit(self, run: Run) -> dict[str, Any]:
        like = torch.empty(0, dtype=run.dtype, device=run.device)
        accumulator = DiagonalAccumulator(run.space.size, like)
        run.accumulate({"": accumulator}, lambda batch: accumulator.update(batch.rows()))
        accumulator.reduce(run.ranks)
        operator = accumulator.result(run.n)
        return {
            "fisher_": operator,
            "_blocks": {"all": Columns((slice(0, run.space.size),))},
            "_traces": [operator.trace()],
        }
