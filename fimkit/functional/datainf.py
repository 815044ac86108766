r"""The mean over examples of damped inverses, of plain functions, applied to vectors.

.. math:: \mathrm{IFVP}(v_b) = \frac{1}{n} \sum_i (\lambda_b I + g_i g_i^\top)^{-1} v_b

in each layer b, with the gradients :math:`g_i` there of n examples.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, List, Tuple  # noqa: UP035

import torch
from torch import Tensor

from fimkit.damping import as_number, automatic, is_listing
from fimkit.exceptions import IFVPUsageError
from fimkit.functional.checks import check_arguments
from fimkit.functional.examples import PerExample, per_example
from fimkit.functional.layers import Layers, LayerVectors
from fimkit.functional.program import Examples, Program
from fimkit.gradients.tree import tensors
from fimkit.operators import DataInfOperator, RowMatrix

__all__ = ["ifvp_at_x_datainf", "ifvp_datainf"]


def ifvp_datainf(
    func: Callable,  # type: ignore[type-arg]
    argnums: int,
    in_dims: Tuple[None | int, ...],  # noqa: RUF036, UP006
    regularization: float | List[float] | None = None,  # noqa: UP006
    param_layer_map: List[int] | None = None,  # noqa: UP006
) -> Callable:  # type: ignore[type-arg]
    r"""Return a function of arguments and vectors that applies DataInf's inverse of ``func``.

    In each layer b, with :math:`p_b` parameters and the gradients :math:`g_i` there of n examples,

    .. math:: \mathrm{IFVP}(v) = M_b v , \qquad
              M_b = \frac{1}{n} \sum_i (\lambda_b I + g_i g_i^\top)^{-1}
                  = \frac{1}{\lambda_b} \Bigl(
                    I - \frac{1}{n} \sum_i \frac{g_i g_i^\top}{\lambda_b + \|g_i\|^2} \Bigr) .

    Parameters
    ----------
    func : callable
        Negative log-likelihood of one example, of shape ``()`` or ``(1,)``, at the example's
        label. As under `torch.func.vmap`, it is called on one slice of each sliced argument, with
        the sliced dimension removed.
    argnums : int
        The argument that holds the parameters: a tensor, or a tuple, list or dict of tensors. A
        tuple of indices takes the parameters of several arguments, in its order.
    in_dims : tuple of (int or None)
        For each argument of ``func``, the dimension that holds the examples in each of its
        tensors, or None where every example is given the whole argument: its parameters, for one.
    regularization : float or list of float, optional
        λ > 0: one number, or a list, tuple or tensor of one per layer, or of one per parameter
        that is the same for all parameters of a layer. Without it, ``0.1 * trace(F_b) / p_b`` for
        each layer, ``F_b = (1/n) Σ g_i g_iᵀ``, and the whole model's for a layer without gradient.
    param_layer_map : list of int, optional
        The number of each parameter's layer, in the order of the parameters: ``[0, 0, 1, 1]`` for
        two layers with a weight and a bias each. Numbers may leave gaps; layers are ordered by
        number. Without it, every parameter is a layer of its own.

    Returns
    -------
    callable
        Takes ``x``, the tuple of all arguments of ``func``, and ``v``, and returns the IFVP in
        the containers, shapes and dtypes and on the devices of ``v``, detached. The gradients are
        computed anew at each call.

        ``v`` is a tuple or list of one tensor per layer, if it is as long as there are layers, or
        else of one per parameter; a dict by the keys of a dict of parameters; or a tensor by
        itself where there is one layer or one parameter. The tensor of a layer has the shape
        ``(p_b,)`` or ``(k, p_b)``, its parameters flattened row by row and concatenated. The
        tensor of a parameter (also of a layer with one) has its shape ``(*shape)`` or is flat,
        or has k in front of either. No k is ambiguous, the parameter's width included: whichever
        of these shapes a tensor has, its numbers are the same vectors.

    Raises
    ------
    IFVPUsageError
        If an argument cannot be used: a λ that is not above 0, or numbers that are not as many as
        there are layers or parameters, for some; where that depends on the parameters, the
        function returned raises it, as for vectors, losses or gradients that cannot be used.
    SingularFisherError
        By the function returned, if λ is zero against squared gradients in floating point, if
        every gradient is zero and no λ is given, or if an IFVP overflows its dtype.

    See Also
    --------
    ifvp_at_x_datainf : For many vectors at the same arguments.

    References
    ----------
    Y. Kwon, E. Wu, K. Wu and J. Zou, "DataInf: efficiently estimating data influence in LoRA-tuned
    LLMs and diffusion models", ICLR 2024, section 3: the swap of mean and inverse.

    Examples
    --------
    >>> import torch
    >>> from fimkit.functional import ifvp_datainf
    >>> def loss(parameters, x, y):
    ...     weight, bias = parameters
    ...     return 0.5 * (x @ weight + bias - y) ** 2
    >>> parameters = torch.zeros(2), torch.zeros(())
    >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.ones(2)
    >>> ifvp = ifvp_datainf(loss, 0, (None, 0, 0), 1.0)
    >>> ifvp((parameters, x, y), (torch.ones(2), torch.tensor(1.0)))
    (tensor([0.7500, 0.5500]), tensor(0.5000))
    """
    settings = _checked(func, argnums, in_dims, regularization, param_layer_map)

    def ifvp(x: Any, v: Any) -> Any:
        check_arguments(x)
        return _at(settings, x)(v)

    return ifvp


def ifvp_at_x_datainf(  # type: ignore[no-untyped-def]
    func: Callable,  # type: ignore[type-arg]
    argnums: int,
    in_dims: Tuple[None | int, ...],  # noqa: RUF036, UP006
    regularization: List[float] | None = None,  # noqa: UP006
    *x,
    param_layer_map: List[int] | None = None,  # noqa: UP006
) -> Callable:  # type: ignore[type-arg]
    """Return a function of vectors that applies DataInf's inverse of ``func`` at ``x``.

    Parameters
    ----------
    func, argnums, in_dims, param_layer_map
        As for `ifvp_datainf`.
    regularization : list of float, or float, optional
        As for `ifvp_datainf`. Arguments of ``func`` come after it, so that None has to be written
        out.
    *x
        All arguments of ``func``.

    Returns
    -------
    callable
        Takes ``v`` and returns the IFVP as the function that `ifvp_datainf` returns does. The
        gradients are computed once, here, and kept.

    Raises
    ------
    IFVPUsageError
        If an argument cannot be used, or a loss or gradient is not finite; the function returned
        raises it for vectors that do not fit.
    SingularFisherError
        If every gradient is zero and no λ is given; by the function returned, if λ is zero
        against squared gradients in floating point, or an IFVP overflows its dtype.

    Examples
    --------
    >>> import torch
    >>> from fimkit.functional import ifvp_at_x_datainf
    >>> def loss(parameters, x, y):
    ...     weight, bias = parameters
    ...     return 0.5 * (x @ weight + bias - y) ** 2
    >>> parameters = torch.zeros(2), torch.zeros(())
    >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.ones(2)
    >>> ifvp = ifvp_at_x_datainf(
    ...     loss, 0, (None, 0, 0), [0.5], parameters, x, y, param_layer_map=[0, 0]
    ... )
    >>> ifvp((torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]),))
    (tensor([[ 1.6000,  0.0000, -0.4000],
            [-0.4000, -0.2857,  1.5048]]),)
    """
    return _at(_checked(func, argnums, in_dims, regularization, param_layer_map), x)


@dataclass(frozen=True)
class _Settings:
    """What the functions are given, checked as far as it can be without arguments of ``func``."""

    func: PerExample
    argnums: int | tuple[int, ...]
    regularization: float | list[float] | None
    layers: Layers | None


def _checked(
    func: Any, argnums: Any, in_dims: Any, regularization: Any, param_layer_map: Any
) -> _Settings:
    if isinstance(func, PerExample):
        raise IFVPUsageError(
            "func was wrapped by per_example; give the loss of one example itself, as in_dims "
            "says where the examples are."
        )
    examples = per_example(func, in_dims)
    indices = argnums if isinstance(argnums, tuple) else (argnums,)
    if not indices or not all(isinstance(index, int) and index >= 0 for index in indices):
        raise IFVPUsageError(
            f"argnums is {argnums!r}; expected the index, of at least 0, of the argument of func "
            "that holds the parameters."
        )
    numbers = _numbers(regularization)
    layers = None if param_layer_map is None else Layers.mapped(param_layer_map)
    if layers is not None and isinstance(numbers, list):
        numbers = layers.regularizations(numbers)
    return _Settings(examples, argnums, numbers, layers)


def _numbers(regularization: Any) -> float | list[float] | None:
    if regularization is None:
        return None
    several = is_listing(regularization)
    numbers = []
    for i, value in enumerate(regularization if several else [regularization]):
        number = as_number(value)
        if number is None or not 0 < number < math.inf:
            name = f"regularization[{i}]" if several else "regularization"
            raise IFVPUsageError(
                f"{name} is {reprlib.repr(value)}; expected a finite number above 0, without which "
                "λI + g gᵀ of an example has no inverse, or one such number per layer, or None for "
                "a tenth of the mean of each layer's diagonal. In ifvp_at_x_datainf it comes "
                "before the arguments of func, also where it is None."
            )
        numbers.append(number)
    return numbers if several else numbers[0]


def _at(settings: _Settings, arguments: Any) -> Callable[[Any], Any]:
    # Under the caller's no_grad or inference_mode there would be no gradients.
    with torch.inference_mode(False), torch.enable_grad():
        examples = settings.func.examples(arguments, settings.argnums)
        program = examples.program
        layers, numbers = _resolved(settings, len(program.parameters))
        _check_devices(program)
        if not examples.depend_on_parameters():
            raise program.unused()
        space = LayerVectors(
            layers,
            [tuple(parameter.shape) for parameter in program.parameters],
            _keys(program, arguments),
            program.device,
        )
        rows = _rows(examples)
        operators = [
            DataInfOperator(rows.block(columns), examples.n, program.device)
            for columns in space.columns()
        ]
        if numbers is None:
            traces = [operator.fisher_trace for operator in operators]
            numbers = automatic([operator.size for operator in operators], traces)
    return partial(_solve, operators, numbers, space)


def _resolved(settings: _Settings, n_parameters: int) -> tuple[Layers, list[float] | None]:
    """Return the layers of so many parameters, and λ for each."""
    layers = Layers.each(n_parameters) if settings.layers is None else settings.layers
    if layers.n_parameters != n_parameters:
        raise IFVPUsageError(
            f"param_layer_map has {layers.n_parameters} numbers; expected one for each of the "
            f"{n_parameters} tensors in the argument of func that argnums selects."
        )
    if isinstance(settings.regularization, float):
        return layers, [settings.regularization] * len(layers.members)
    if settings.regularization is None:
        return layers, None
    return layers, layers.regularizations(settings.regularization)


def _check_devices(program: Program) -> None:
    for i, parameter in enumerate(program.parameters):
        if parameter.device != program.device:
            raise IFVPUsageError(
                f"parameter {i} of those that argnums selects is on {parameter.device}, but "
                f"parameter 0 is on {program.device}; move all of them to one device with "
                ".to(device)."
            )


def _keys(program: Program, arguments: Any) -> list[Any] | None:
    """Return the keys of parameters that are the items of one mapping."""
    argument = arguments[program.selected[0]]
    if len(program.selected) > 1 or not isinstance(argument, Mapping):
        return None
    if any(len(tensors(item)) != 1 for item in argument.values()):
        return None
    return list(argument)


def _rows(examples: Examples) -> RowMatrix:
    """Return the gradients of all examples, in memory of their own."""
    parameters = examples.program.parameters
    kept = [parameter.new_empty((examples.n, *parameter.shape)) for parameter in parameters]
    start = 0
    for losses, gradients in examples.gradients():
        stop = start + len(losses)
        for rows, some in zip(kept, gradients, strict=True):
            rows[start:stop] = some
        start = stop
    return examples.program.rows(kept)


def _solve(
    operators: list[DataInfOperator], regularizations: list[float], space: LayerVectors, v: Any
) -> Any:
    flat, restore = space.flatten(v)
    solved: list[Tensor] = [
        operator.solve(vectors, regularization)
        for operator, vectors, regularization in zip(operators, flat, regularizations, strict=True)
    ]
    return restore(solved)
