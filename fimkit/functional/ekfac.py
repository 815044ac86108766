r"""Inverse-Fisher-vector products by EK-FAC, of the linear maps that a function records.

Per layer with inputs a and gradients s at its hidden vectors, over examples i and positions t,

.. math:: A = \mathbb{E}[a a^\top] = Q_A \cdot Q_A^\top, \quad
          S = \mathbb{E}[\textstyle\sum_t s_t s_t^\top] = Q_S \cdot Q_S^\top, \quad
          \Lambda = \mathbb{E}[(Q_S^\top \textstyle\sum_t s_t a_t^\top Q_A)^{\odot 2}] .

``func`` is called twice on every batch, for the factors A and S, then for Λ in their eigenbases. In
the first batch it is checked that the loss of every example is its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from numbers import Integral, Real
from typing import Any, Callable, List, Tuple, TypeVar  # noqa: UP035

import torch
from torch import Tensor

from fimkit.distributed import Ranks
from fimkit.exceptions import IFVPUsageError, SingularFisherError
from fimkit.functional.cache import MLPCache
from fimkit.functional.checks import check_callable, check_finite, check_floating
from fimkit.functional.independence import layer_name
from fimkit.functional.recording import Batches, RecordedBatch, Recorder
from fimkit.gradients import AmbientAutocast, differentiating
from fimkit.operators import EigenKroneckerOperator, FactoredRows
from fimkit.record import PassRecord
from fimkit.replay import RandomStates
from fimkit.statistics import LinearStatistics, begin_eigenvalues, set_eigenbases

__all__ = ["ifvp_at_x_ekfac"]

_T = TypeVar("_T")


def ifvp_at_x_ekfac(  # type: ignore[no-untyped-def]
    func: Callable,  # type: ignore[type-arg]
    *x,
    in_dims: Tuple | None = None,  # type: ignore[type-arg]  # noqa: UP006
    batch_size: int = 1,
    max_iter: int | None = None,
    mlp_cache: MLPCache | List[MLPCache],  # noqa: UP006
    damping: float = 0.0,
) -> Callable:  # type: ignore[type-arg]
    """Return a function of vectors that applies the inverse EK-FAC approximation at ``x``.

    Parameters
    ----------
    func : callable
        Called on batches of ``x``. Returns the losses of the batch's examples, of shape ``(B,)``,
        each depending on its own example only (which is checked in the first batch), or a tuple
        of losses and a mask. The mask, of shape ``(B, T)``, is 1 (or True) at positions that count
        and 0 at padding; it selects what enters A and S, in layers with T positions. Λ always takes
        an example's whole gradient, so padding belongs out of the losses too.

        Negative log-likelihoods at the labels of the data give the empirical Fisher information
        matrix, at labels drawn from the predictions the true one. Random numbers of torch, of
        Python's ``random`` and of ``numpy.random`` are drawn alike in both calls of ``func`` on a
        batch, and these random states are left as they were.
    *x
        All arguments of ``func``: tensors, containers of tensors, and constants.
    in_dims : tuple of (int or None), optional
        For each argument, the dimension that holds the examples in all its tensors, or None where
        every batch is given the whole argument, such as parameters. Dimension 0 of every argument
        when not given.
    batch_size : int, default=1
        Examples per call of ``func``; the last batch may be smaller. The result does not depend
        on it.
    max_iter : int, optional
        Number of batches, from the front, to use at most; all when not given.
    mlp_cache : MLPCache or list of MLPCache
        The caches that modules run by ``func`` record in, as `manual_cache_forward` shows. They
        are empty afterwards.
    damping : float, default=0.0
        λ ≥ 0, added to the eigenvalues Λ of every layer.

    Returns
    -------
    callable
        Takes ``v`` and returns its IFVP in the same nesting. ``v[cache][layer]`` is a tensor of
        shape ``(out, in)`` or ``(k, out, in)``, k vectors at once, where layers are counted in the
        order in which a forward appends their pairs, and ``in`` and ``out`` are the last sizes of
        input and hidden vectors: for a pair whose input has a last column of ones, the bias is
        the last column of ``v``; otherwise it has no part in it. With a single cache that was not
        given in a list, ``v[layer]`` will do. Results are detached, and have the shape, dtype and
        device of their vector.

    Raises
    ------
    IFVPUsageError
        If an argument, or what ``func`` returns or records, cannot be used, or is not finite. By
        the function returned, for vectors that do not fit.
    SingularFisherError
        By the function returned, if a layer's eigenvalues plus λ have no inverse in floating
        point: with few examples, λ must be positive.

    See Also
    --------
    fimkit.EKFAC : Of a whole model, biases included, without any recording by hand.

    References
    ----------
    T. George et al., "Fast approximate natural gradient descent in a Kronecker-factored
    eigenbasis", NeurIPS 2018, eq. 8 and Algorithm 1.

    Examples
    --------
    >>> import types
    >>> import torch
    >>> from fimkit.functional import EKFAC_CACHE_KEY, MLPCache, ifvp_at_x_ekfac
    >>> from fimkit.functional import manual_cache_forward
    >>> @manual_cache_forward
    ... def forward(self, x):
    ...     hidden = torch.nn.functional.linear(x, self.weight)
    ...     if hasattr(self, EKFAC_CACHE_KEY):
    ...         getattr(self, EKFAC_CACHE_KEY).input_hidden_pairs.append((x, hidden))
    ...     return hidden
    >>> layer, cache = torch.nn.Linear(2, 1, bias=False), MLPCache()
    >>> layer.forward = types.MethodType(forward, layer)
    >>> setattr(layer, EKFAC_CACHE_KEY, cache)
    >>> _ = torch.nn.init.zeros_(layer.weight)
    >>> def losses(parameters, x, y):
    ...     return 0.5 * (torch.func.functional_call(layer, parameters, x)[:, 0] - y) ** 2
    >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.ones(2)
    >>> parameters = dict(layer.named_parameters())
    >>> ifvp = ifvp_at_x_ekfac(losses, parameters, x, y, in_dims=(None, 0, 0), mlp_cache=cache)
    >>> ifvp([[torch.ones(1, 2)]])[0][0]  # F = diag(1, 4) / 2
    tensor([[2.0000, 0.5000]])
    """
    check_callable(func)
    caches = _caches(mlp_cache)
    size = _at_least_1(batch_size, "batch_size")
    most = None if max_iter is None else _at_least_1(max_iter, "max_iter")
    batches = Batches(x, in_dims, size, most)
    number = float(damping) if isinstance(damping, Real) else math.nan
    if not 0 <= number < math.inf:
        raise IFVPUsageError(
            f"damping is {damping!r}; expected a finite number of at least 0, which is added to "
            "the eigenvalues of every layer."
        )
    autocast = AmbientAutocast()
    # Under the caller's no_grad or inference_mode there would be no gradients.
    with differentiating():
        operators = _fit(Recorder(func, caches, autocast), batches)
    return partial(_solve, operators, number, isinstance(mlp_cache, MLPCache))


def _fit(recorder: Recorder, batches: Batches) -> list[list[EigenKroneckerOperator]]:
    """Return the operator of every layer of every cache, from two passes over the batches."""
    statistics: list[list[LinearStatistics]] = []
    record = PassRecord()
    selected = False
    n = sum(batches.sizes)
    with RandomStates() as states:
        for batch in recorder.batches(batches):
            if not len(record):
                statistics = [[_statistics(calls[0]) for calls in c] for c in batch.layers]
            for layer, calls in _each(statistics, batch):
                for rows in calls:
                    layer.add_positions((rows.inputs,), rows.signals, None, batch.mask)
            record.append(batch.losses, *_sides(batch))
            selected = selected or batch.mask is None or bool(batch.mask.any())
        if not selected:
            raise IFVPUsageError(
                "the mask that func returned is 0 everywhere; it must be 1 at the positions that "
                "count."
            )
        layers = {layer_name(i, j): layer for i, j, layer in _numbered(statistics)}
        begin_eigenvalues(layers, set_eigenbases(layers, n, Ranks()))
        states.restore()
        for index, batch in enumerate(recorder.batches(batches)):
            other = record.difference(index, batch.losses, *_sides(batch))
            if other is not None:
                raise IFVPUsageError(
                    f"func gave other {other} for batch {index} when it was called on it again; it "
                    "must depend on its arguments alone, and draw random numbers from torch's, "
                    "Python's or NumPy's global state alone."
                )
            for layer, calls in _each(statistics, batch):
                layer.add_squares(*_joined(calls), None)
    operators = [[layer.eigen_corrected(n) for layer in layers] for layers in statistics]
    for i, j, operator in _numbered(operators):
        if not bool(operator.eigenvalues.sum().isfinite()):
            raise IFVPUsageError(
                f"the eigenvalues of {layer_name(i, j)} are not finite: its squared gradients "
                f"overflow {operator.eigenvalues.dtype}; compute in torch.float64, or scale the "
                "losses."
            )
    return operators


def _numbered(layers: list[list[_T]]) -> Iterator[tuple[int, int, _T]]:
    """Yield the cache, the number there, and what is given of each layer."""
    for i, of_cache in enumerate(layers):
        for j, layer in enumerate(of_cache):
            yield i, j, layer


def _each(
    statistics: list[list[LinearStatistics]], batch: RecordedBatch
) -> Iterator[tuple[LinearStatistics, list[FactoredRows]]]:
    for layers, recorded in zip(statistics, batch.layers, strict=True):
        yield from zip(layers, recorded, strict=True)


def _sides(batch: RecordedBatch) -> tuple[list[Tensor], list[Tensor]]:
    """Return the inputs of all layers, and the gradients at their outputs."""
    rows = batch.rows()
    return [each.inputs for each in rows], [each.signals for each in rows]


def _statistics(rows: FactoredRows) -> LinearStatistics:
    return LinearStatistics(rows.layout, rows.signals.new_empty(0), "expand")


def _joined(calls: list[FactoredRows]) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return inputs and signals of one layer's calls, as further positions of one."""
    if len(calls) == 1:
        return (calls[0].inputs,), calls[0].signals
    inputs = torch.cat([rows.inputs for rows in calls], 1)
    return (inputs,), torch.cat([rows.signals for rows in calls], 2)


def _solve(
    operators: list[list[EigenKroneckerOperator]], damping: float, single: bool, v: Any
) -> Any:
    """Return the IFVP of nested vectors."""
    flat = single and isinstance(v, tuple | list) and any(isinstance(item, Tensor) for item in v)
    nested = [v] if flat else v
    expected = f"v[cache][layer] with {[len(layers) for layers in operators]} layers"
    _check_nesting(nested, len(operators), expected)
    for layers, vectors in zip(operators, nested, strict=True):
        _check_nesting(vectors, len(layers), expected)
    with AmbientAutocast().disabled():
        found = [
            _like(
                vectors,
                [
                    _solve_layer(operator, damping, vector, layer_name(i, j))
                    for j, (operator, vector) in enumerate(zip(layers, vectors, strict=True))
                ],
            )
            for i, (layers, vectors) in enumerate(zip(operators, nested, strict=True))
        ]
    return found[0] if flat else _like(v, found)


def _like(given: Sequence[Any], found: list[Any]) -> Any:
    return tuple(found) if isinstance(given, tuple) else found


def _check_nesting(v: Any, n: int, expected: str) -> None:
    if not isinstance(v, tuple | list) or len(v) != n:
        given = f" of {len(v)}" if isinstance(v, tuple | list) else ""
        raise IFVPUsageError(
            f"v, or one of its members, is a {type(v).__name__}{given}; expected {expected}."
        )


def _solve_layer(operator: EigenKroneckerOperator, damping: float, v: Any, name: str) -> Tensor:
    out, columns = operator.layout.out, operator.layout.columns
    check_floating(v, f"v of {name}")
    if v.ndim not in (2, 3) or tuple(v.shape[-2:]) != (out, columns):
        raise IFVPUsageError(
            f"v of {name} has shape {tuple(v.shape)}; expected {(out, columns)} or "
            f"(k, {out}, {columns}), the sizes of the recorded hidden vectors and inputs (to fold "
            "in a bias, record inputs with a last column of ones)."
        )
    check_finite(v, f"v of {name}")
    flat = v.detach().reshape(-1, operator.size).to(operator.device)
    try:
        solved = operator.solve(flat, damping)
    except SingularFisherError as error:
        remedy = 1e-3 * operator.trace() / operator.size or 1e-3
        raise SingularFisherError(
            f"The eigenvalues of {name}, with damping={damping:g}, are singular to working "
            "precision (with few examples, or outputs whose gradients sum to zero, they always are "
            f"at 0); give a larger one, such as damping={remedy:.1g}, a thousandth of the mean of "
            "the layer's eigenvalues."
        ) from error
    if not solved.isfinite().all():
        raise SingularFisherError(
            f"The IFVP of {name} with damping={damping:g} overflows {v.dtype}; give a larger "
            "damping, or vectors of a wider dtype."
        )
    return solved.reshape(v.shape).to(v.device)


def _caches(mlp_cache: Any) -> list[MLPCache]:
    caches = [mlp_cache] if isinstance(mlp_cache, MLPCache) else mlp_cache
    if (
        not isinstance(caches, list | tuple)
        or not caches
        or not all(isinstance(cache, MLPCache) for cache in caches)
    ):
        raise IFVPUsageError(
            f"mlp_cache is {mlp_cache!r}; expected an MLPCache or a non-empty list of them."
        )
    if len({id(cache) for cache in caches}) != len(caches):
        raise IFVPUsageError("mlp_cache has the same MLPCache twice; give each module its own.")
    return list(caches)


def _at_least_1(value: Any, name: str) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise IFVPUsageError(f"{name} is {value!r}; expected an integer of at least 1.")
    return int(value)
