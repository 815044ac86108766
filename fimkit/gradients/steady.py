"""Functions that leave the examples where they are, whatever the numbers in the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fimkit.gradients.rules import RULES

__all__ = ["is_steady"]

_METADATA = [
    getattr(Tensor, name).__get__
    for name in ("device", "dtype", "is_cuda", "is_nested", "layout", "ndim", "shape")
]
_OF_TENSORS = ["contiguous", "dim", "double", "flatten", "float", "long", "size", "to"]
_POINTWISE = """abs add div exp log mul neg pow relu sigmoid sqrt square sub tanh"""
_FUNCTIONAL = """
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool1d adaptive_max_pool2d alpha_dropout
    avg_pool1d avg_pool2d batch_norm binary_cross_entropy_with_logits celu cross_entropy dropout
    dropout1d dropout2d elu gelu glu group_norm hardsigmoid hardswish hardtanh layer_norm leaky_relu
    logsigmoid max_pool1d max_pool2d mish mse_loss relu relu6 selu sigmoid silu softplus softsign
    tanh
"""

#: Beside those that captured calls are read of, which depends on their arguments.
_STEADY: frozenset[Callable[..., Any]] = frozenset(
    [
        *_METADATA,
        *(getattr(Tensor, name) for name in _OF_TENSORS),
        *(getattr(owner, name) for owner in (Tensor, torch) for name in _POINTWISE.split()),
        *(getattr(Tensor, f"__{name}__") for name in ("add", "mul", "neg", "sub", "truediv")),
        *(getattr(Tensor, f"{name}_") for name in ("add", "mul", "relu", "sub")),
        *(getattr(F, name) for name in _FUNCTIONAL.split()),
        Tensor.sum,
        torch.relu_,
        torch.flatten,
        torch.stack,
    ]
)


def is_steady(function: Callable[..., Any], args: Iterable[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a call's shapes alone decide which example each number of its result belongs to.

    So it is for pointwise functions, pooling, norms and losses, and for maps by parameters.
    Indexing, sorting, products of two activations and all that is not known are not.
    """
    if function in _STEADY:
        return True
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    activations = sum(not isinstance(value, nn.Parameter) for value in given)
    return function in RULES and activations <= 1
