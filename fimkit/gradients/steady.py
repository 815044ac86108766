"""Calls that leave the examples where they are, whatever the numbers in the batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fimkit.gradients.layout import repeats
from fimkit.gradients.rules import RULES
from fimkit.gradients.tree import tensors

__all__ = ["Crossing", "Movements"]

_Function = Callable[..., Any]

_METADATA = """
    device dtype is_cuda is_nested layout ndim requires_grad shape
"""
_OF_TENSORS = """
    __len__ clone contiguous detach dim double float long masked_fill size to type_as
"""
_POINTWISE = """
    abs add clamp cos div eq erf exp ge gt le log lt maximum minimum mul ne neg pow relu rsqrt
    sigmoid sin sqrt square sub tanh tril triu where
"""
_OPERATORS = """
    add and eq ge gt iadd imul invert le lt mul ne neg or pow radd rmul rsub rtruediv sub truediv
"""
_FUNCTIONAL = """
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool1d adaptive_max_pool2d alpha_dropout
    avg_pool1d avg_pool2d batch_norm binary_cross_entropy_with_logits celu cross_entropy dropout
    dropout1d dropout2d elu gelu glu group_norm hardsigmoid hardswish hardtanh layer_norm leaky_relu
    logsigmoid max_pool1d max_pool2d mish mse_loss relu relu6 rms_norm selu sigmoid silu softplus
    softsign tanh
"""

#: Of these the results' places are given by shapes alone. (Maps by parameters are as steady.)
_STEADY: frozenset[_Function] = frozenset(
    [
        *(getattr(Tensor, name).__get__ for name in _METADATA.split()),
        *(getattr(Tensor, name) for name in _OF_TENSORS.split()),
        *(getattr(owner, name) for owner in (Tensor, torch) for name in _POINTWISE.split()),
        *(getattr(Tensor, f"__{name}__") for name in _OPERATORS.split()),
        *(getattr(Tensor, f"{name}_") for name in ("add", "mul", "relu", "sub")),
        *(getattr(F, name) for name in _FUNCTIONAL.split()),
        torch.relu_,
    ]
)

#: Of these by arguments besides, which may be other ones in another batch ...
_TURNING: frozenset[_Function] = frozenset(
    [
        Tensor.T.__get__,  # type: ignore[attr-defined]
        Tensor.mT.__get__,  # type: ignore[attr-defined]
        Tensor.expand,
        Tensor.expand_as,
        torch.stack,
        *(
            getattr(owner, name)
            for owner in (Tensor, torch)
            for name in ("movedim", "permute", "squeeze", "swapaxes", "t", "transpose", "unsqueeze")
        ),
    ]
)

#: ... and of these, dimensions that come of others may hold the examples no more.
_SHAPING: frozenset[_Function] = frozenset(
    [
        Tensor.view,
        Tensor.view_as,
        *(
            getattr(owner, name)
            for owner in (Tensor, torch)
            for name in ("flatten", "reshape", "unflatten")
        ),
    ]
)

#: The argument that is the dimension along which these take apart, join, weigh or add up, and what
#: it is where it is not given; None for all.
_ALONG: dict[_Function, tuple[int, int | None]] = {
    torch.cat: (1, 0),
    F.log_softmax: (1, None),
    F.softmax: (1, None),
    **{
        getattr(owner, name): place
        for owner in (Tensor, torch)
        for name, place in {
            "chunk": (2, 0),
            "log_softmax": (1, None),
            "mean": (1, None),
            "narrow": (1, None),
            "select": (1, None),
            "softmax": (1, None),
            "split": (2, 0),
            "sum": (1, None),
            "unbind": (1, 0),
        }.items()
    },
}

_PRODUCTS: frozenset[_Function] = frozenset(
    [
        F.scaled_dot_product_attention,
        *(getattr(Tensor, name) for name in ("__matmul__", "bmm", "matmul")),
        *(getattr(torch, name) for name in ("bmm", "matmul")),
    ]
)


class Crossing(NamedTuple):
    """A tensor whose examples are to lie along one dimension, and along none of some."""

    edge: GradientEdge
    shape: torch.Size
    dims: frozenset[int]

    @classmethod
    def of(cls, tensor: Tensor, dims: Iterable[int] = ()) -> Crossing:
        """Return that of a tensor in the graph."""
        return cls(
            get_gradient_edge(tensor), tensor.shape, frozenset(dim % tensor.ndim for dim in dims)
        )


class Movements:
    """What the calls of a forward pass may do to the places of examples, besides what shapes say.

    Attributes
    ----------
    known : bool
        Whether no number in the batch can move them, if they are where the crossings say.
    crossings : list of Crossing
    """

    def __init__(self) -> None:
        self.known = True
        self.crossings: list[Crossing] = []
        self._keys: list[str] = []

    def follow(
        self, function: _Function, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Add a call.

        Pointwise functions, pooling, norms and losses, and maps by parameters do nothing to the
        places of examples, nor do constants: tensors without gradients, until they index others.
        Sorting, and all that is not known, may do anything.
        """
        if not self.known or function in _STEADY:
            return
        given = [t for t in tensors((args, kwargs)) if not isinstance(t, nn.Parameter)]
        if not given or (function in RULES and len(given) == 1):
            return
        moving = [tensor for tensor in given if tensor.requires_grad]
        if not moving and not any(tensor.requires_grad for tensor in tensors(output)):
            return
        crossed = _crossed(function, args, kwargs, moving, output)
        if crossed is None or any(tensor.grad_fn is None for tensor, _ in crossed):
            self.known = False
            self.crossings.clear()
            return
        others = [value for value in (*args, *kwargs.items()) if not tensors(value)]
        self._keys.append(f"{getattr(function, '__name__', function)}{others}")
        self.crossings += [Crossing.of(tensor, dims) for tensor, dims in crossed]

    def key(self, n: int) -> Any:
        """Return what other batches, in which n examples are moved alike, share; None if none."""
        crossed = tuple((repeats(shape, n), dims) for _, shape, dims in self.crossings)
        return (tuple(self._keys), crossed) if self.known else None


def _crossed(
    function: _Function,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    given: list[Tensor],
    output: Any,
) -> list[tuple[Tensor, Collection[int]]] | None:
    """Return tensors whose examples may be along one dimension only, none of those beside them.

    None where the call may do anything.
    """
    if function in _TURNING:
        return []
    if function in _SHAPING:
        return [(output, ())]
    if function in _PRODUCTS:
        return [(factor, range(-min(factor.ndim, 2), 0)) for factor in given]
    if function in _ALONG:
        place, default = _ALONG[function]
        dims = args[place] if len(args) > place else kwargs.get("dim", default)
        dims = (dims,) if isinstance(dims, int) else dims
        return [(tensor, range(tensor.ndim) if dims is None else dims) for tensor in given]
    if function is Tensor.__getitem__:
        selected = _selected(args[0].ndim, args[1])
        return None if selected is None else [(args[0], selected)]
    return None


def _selected(ndim: int, index: Any) -> set[int] | None:
    """Return the dimensions of which an index selects; None where it is not only of numbers."""
    parts = index if isinstance(index, tuple) else (index,)
    if any(not (part is None or part is ... or type(part) in (int, slice)) for part in parts):
        return None
    of_dims = [part for part in parts if part is not None]
    if ... in of_dims:
        at = of_dims.index(...)
        of_dims[at : at + 1] = [slice(None)] * (ndim - len(of_dims) + 1)
    return {dim for dim, part in enumerate(of_dims) if part != slice(None)}
