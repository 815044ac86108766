r"""Inverse-Fisher-vector products of a function, through its explicit Fisher information matrix.

For examples i = 1..n with losses :math:`l_i` and :math:`g_i = \nabla_\theta l_i`,

.. math:: F = \frac{1}{n} \sum_i g_i g_i^\top , \qquad
          \mathrm{IFVP}(v) = (F + \lambda I)^{-1} v .

F is kept as a p × p matrix when p ≤ n and through the n × n Gram matrix of the gradients
otherwise.
"""

from __future__ import annotations

import math
from functools import partial
from numbers import Real
from typing import Any, Callable, Tuple  # noqa: UP035

import torch
from torch import Tensor

from fimkit.exceptions import IFVPUsageError, SingularFisherError, warn
from fimkit.functional.checks import (
    check_arguments,
    check_callable,
    check_finite,
    check_floating,
)
from fimkit.functional.fisher import fisher
from fimkit.operators import Operator

__all__ = ["ifvp_at_x_explicit", "ifvp_explicit"]


def ifvp_explicit(func: Callable, argnums: int = 0, regularization: float = 0.0) -> Callable:  # type: ignore[type-arg]
    """Return a function of arguments and vectors that applies the inverse Fisher of ``func``.

    Parameters
    ----------
    func : callable
        Negative log-likelihood, of shape ``()`` or ``(1,)``. At the labels of the data it gives
        the empirical Fisher information matrix.

        When the tensors in all arguments but the parameters have the same leading size n > 1,
        examples are its n slices of size 1, and F is ``(1/n) Σ g gᵀ`` if the value of ``func``
        at the whole is the mean of its values at the slices, ``Σ g gᵀ`` if it is their sum.
        Otherwise F is ``g gᵀ`` of the whole call. Tensors without dimensions are constants. Wrap
        ``func`` in `per_example` or `single_example` to say which is meant.
    argnums : int or tuple of int, default=0
        The arguments that are parameters: tensors, or containers of tensors.
    regularization : float, default=0.0
        λ ≥ 0 in ``F + λ I``.

    Returns
    -------
    callable
        Takes ``x``, the tuple of all arguments of ``func``, and ``v``, of shape ``(p,)`` or
        ``(k, p)``, and returns ``(F + λ I)⁻¹ v`` in the shape and dtype and on the device of
        ``v``, detached. The p numbers are those of the selected arguments in the order of
        ``argnums``, within each in the order of its containers (dicts in that of insertion),
        every tensor flattened row by row. F is computed anew at each call.

    Raises
    ------
    IFVPUsageError
        If ``func``, ``argnums`` or ``regularization`` cannot be used; the function returned
        raises it for arguments, vectors, losses or gradients that cannot.
    SingularFisherError
        By the function returned, if ``F + λ I`` has no inverse in floating point: with fewer
        examples than parameters, λ must be positive.

    Warns
    -----
    UserWarning
        By the function returned, where F is ``g gᵀ`` of a call that may hold more than one
        example.

    See Also
    --------
    ifvp_at_x_explicit : For many vectors at the same arguments.

    References
    ----------
    S. Amari, "Natural gradient works efficiently in learning", Neural Computation 10 (1998),
    eq. 15-17.

    Examples
    --------
    >>> import torch
    >>> from fimkit.functional import ifvp_explicit
    >>> def loss(weight, x, y):
    ...     return 0.5 * ((x @ weight - y) ** 2).mean()
    >>> weight, x, y = torch.zeros(2), torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.ones(2)
    >>> ifvp_explicit(loss)((weight, x, y), torch.ones(2))  # F = diag(1, 4) / 2
    tensor([2.0000, 0.5000])
    """
    check = partial(_checked, func, argnums, regularization)
    check()

    def ifvp(x: Any, v: Tensor) -> Tensor:
        check_arguments(x)
        return _at(*check(), x)(v)

    return ifvp


def ifvp_at_x_explicit(  # type: ignore[no-untyped-def]
    func: Callable,  # type: ignore[type-arg]
    *x,
    argnums: int | Tuple[int, ...] = 0,  # noqa: UP006
    regularization: float = 0.0,
) -> Callable:  # type: ignore[type-arg]
    """Return a function of vectors that applies the inverse Fisher of ``func`` at ``x``.

    Parameters
    ----------
    func : callable
        Negative log-likelihood, as for `ifvp_explicit`.
    *x
        All arguments of ``func``.
    argnums : int or tuple of int, default=0
        The arguments that are parameters: tensors, or containers of tensors.
    regularization : float, default=0.0
        λ ≥ 0 in ``F + λ I``.

    Returns
    -------
    callable
        Takes ``v``, of shape ``(p,)`` or ``(k, p)``, and returns ``(F + λ I)⁻¹ v`` as the
        function that `ifvp_explicit` returns does. F is computed once, here.

    Raises
    ------
    IFVPUsageError
        If an argument cannot be used, or a loss or gradient is not finite; the function returned
        raises it for vectors that do not fit.
    SingularFisherError
        By the function returned, if ``F + λ I`` has no inverse in floating point.

    Warns
    -----
    UserWarning
        Where F is ``g gᵀ`` of a call that may hold more than one example.

    Examples
    --------
    >>> import torch
    >>> from fimkit.functional import ifvp_at_x_explicit
    >>> def loss(weight, bias, x, y):
    ...     return 0.5 * ((x @ weight + bias - y) ** 2).sum()
    >>> weight, bias, x = torch.zeros(1), torch.zeros(()), torch.tensor([[1.0], [-1.0]])
    >>> ifvp = ifvp_at_x_explicit(loss, weight, bias, x, torch.ones(2), argnums=(0, 1))
    >>> ifvp(torch.tensor([[1.0, 0.0], [1.0, 4.0]]))  # F = 2 I
    tensor([[0.5000, 0.0000],
            [0.5000, 2.0000]])
    """
    return _at(*_checked(func, argnums, regularization), x)


_Settings = tuple[Callable[..., Any], int | tuple[int, ...], float]


def _checked(func: Any, argnums: Any, regularization: Any) -> _Settings:
    check_callable(func)
    given = argnums if isinstance(argnums, tuple) else (argnums,)
    if not given or not all(isinstance(index, int) for index in given):
        raise IFVPUsageError(
            f"argnums is {argnums!r}; expected the index of an argument of func, or a tuple of "
            "indices."
        )
    number = float(regularization) if isinstance(regularization, Real) else math.nan
    if not 0 <= number < math.inf:
        raise IFVPUsageError(
            f"regularization is {regularization!r}; expected a finite number of at least 0, which "
            "is added to the diagonal of the Fisher information matrix."
        )
    return func, argnums, number


def _at(
    func: Callable[..., Any], argnums: int | tuple[int, ...], damping: float, arguments: Any
) -> Callable[[Tensor], Tensor]:
    # Under the caller's no_grad or inference_mode there would be no gradients.
    with torch.inference_mode(False), torch.enable_grad():
        operator, doubt = fisher(func, arguments, argnums)
    if doubt is not None:
        warn(
            f"The Fisher information matrix is g gᵀ of the gradient of the whole call, of rank 1, "
            f"because {doubt}. To say what is meant, wrap func: "
            "fimkit.functional.per_example(func, in_dims) if slices of the arguments are the "
            "examples, fimkit.functional.single_example(func) if the call is one."
        )
    return partial(_solve, operator, damping)


def _solve(operator: Operator, damping: float, v: Tensor) -> Tensor:
    check_floating(v, "v")
    p = operator.size
    if v.ndim not in (1, 2) or v.shape[-1] != p:
        raise IFVPUsageError(
            f"v has shape {tuple(v.shape)}; expected ({p},) or (k, {p}), the numbers in the "
            "arguments that argnums selects, flattened and concatenated."
        )
    check_finite(v, "v")
    flat = v.detach().reshape(-1, p).to(operator.device)
    try:
        solved = operator.solve(flat, damping)
    except SingularFisherError as error:
        remedy = 1e-3 * operator.trace() / p or 1e-3
        raise SingularFisherError(
            f"The Fisher information matrix over the {p} parameters, with "
            f"regularization={damping:g}, is singular to working precision (with fewer examples "
            f"than parameters it always is at 0); give a larger one, such as "
            f"regularization={remedy:.1g}, a thousandth of the mean of the matrix's diagonal."
        ) from error
    return solved.reshape(v.shape).to(v.device)
