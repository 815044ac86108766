"""Functions that leave the examples where they are, whatever the numbers in the batch."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fimkit.gradients.rules import RULES
from fimkit.gradients.tree import tensors

__all__ = ["are_steady", "is_steady"]

_Function = Callable[..., Any]

_METADATA = [
    getattr(Tensor, name).__get__
    for name in ("device", "dtype", "is_cuda", "is_nested", "layout", "ndim", "shape")
]
_OF_TENSORS = ["contiguous", "dim", "double", "flatten", "float", "long", "size", "sum", "to"]
_POINTWISE = """abs add div exp log mul neg pow relu sigmoid sqrt square sub tanh"""
_FUNCTIONAL = """
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool1d adaptive_max_pool2d alpha_dropout
    avg_pool1d avg_pool2d celu dropout dropout1d dropout2d elu gelu hardsigmoid hardswish hardtanh
    leaky_relu logsigmoid max_pool1d max_pool2d mish relu relu6 selu sigmoid silu softplus softsign
    tanh
"""

#: Beside those that captured calls are read of, which depends on their arguments.
_STEADY: frozenset[_Function] = frozenset(
    [
        *_METADATA,
        *(getattr(Tensor, name) for name in _OF_TENSORS),
        *(getattr(owner, name) for owner in (Tensor, torch) for name in _POINTWISE.split()),
        *(getattr(Tensor, f"__{name}__") for name in ("add", "mul", "neg", "sub", "truediv")),
        *(getattr(Tensor, f"{name}_") for name in ("add", "mul", "relu", "sub")),
        *(getattr(F, name) for name in _FUNCTIONAL.split()),
        torch.relu_,
        torch.flatten,
    ]
)

#: Losses, which are of single examples where nothing is reduced.
_LOSSES = {
    function: inspect.signature(function)
    for function in (F.binary_cross_entropy_with_logits, F.cross_entropy, F.mse_loss)
}

# Nodes of the graph that these functions, and maps by parameters, leave there.
_NODE_NAMES = """
    Abs AdaptiveAvgPool2D AdaptiveMaxPool2D Add Addmm AvgPool2D BinaryCrossEntropyWithLogits Celu
    Clone Convolution CudnnBatchNorm Div Elu Embedding Exp Gelu Hardsigmoid Hardswish Hardtanh
    LeakyRelu Log LogSigmoid LogSoftmax MaxPool2DWithIndices Mean Mish MkldnnConvolution Mm MseLoss
    Mul NativeBatchNorm NativeDropout NativeGroupNorm NativeLayerNorm Neg NllLoss NllLoss2D Pow Relu
    ReshapeAlias Sigmoid Silu Softplus Sqrt Squeeze Stack Sub Sum T Tanh ToCopy UnsafeView Unsqueeze
    View
"""
_NODES = frozenset(_NODE_NAMES.split())


def is_steady(function: _Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call's shapes alone decide which example each number of its result belongs to.

    So it is for pointwise functions, sums, pooling, losses, and maps by parameters. Indexing,
    sorting, products of two activations and all that is not known are not; nor are pointwise
    functions that repeat an activation along the first dimension, as what is of all examples would.
    """
    if function in _LOSSES:
        call = _LOSSES[function].bind(*args, **kwargs)
        call.apply_defaults()
        legacy = call.arguments["size_average"], call.arguments["reduce"]
        return call.arguments["reduction"] == "none" and legacy == (None, None)
    if function is F.batch_norm:
        training = args[5] if len(args) > 5 else kwargs.get("training", False)
        return not training
    given = tensors((args, kwargs))
    activations = [tensor for tensor in given if not isinstance(tensor, nn.Parameter)]
    if function in _STEADY:
        return len({(t.ndim, *t.shape[:1]) for t in activations if t.ndim or t.requires_grad}) <= 1
    return function in RULES and len(activations) <= 1 and len(activations) < len(given)


def are_steady(nodes: Iterable[Any]) -> bool:
    """Whether a graph's nodes are of such functions only.

    Others come of calls that are not watched, as in scripted functions and in a user's own.

    Parameters
    ----------
    nodes : iterable
        Their names, among others that are no strings.
    """
    names = (re.fullmatch(r"(\w+)Backward\d", node) for node in nodes if isinstance(node, str))
    return all(name is not None and name[1] in _NODES for name in names)
