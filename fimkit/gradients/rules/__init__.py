"""One rule per kind of layer; `RULES` finds a rule by the function that it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fimkit.gradients.rules.attention import ENTERED
from fimkit.gradients.rules.base import Examples, MatrixUse, ParameterIndex, Use
from fimkit.gradients.rules.broadcast import (
    AdditionUse,
    ExpansionUse,
    InPlaceMultiplicationUse,
    MultiplicationUse,
    RepetitionUse,
    SubtractionUse,
)
from fimkit.gradients.rules.convolution import ConvolutionUse
from fimkit.gradients.rules.embedding import EmbeddingUse
from fimkit.gradients.rules.linear import LinearUse
from fimkit.gradients.rules.matmul import AddmmUse, MatmulUse
from fimkit.gradients.rules.normalization import (
    BatchNormUse,
    GroupNormUse,
    LayerNormUse,
    RMSNormUse,
)

__all__ = [
    "ENTERED",
    "RULES",
    "EmbeddingUse",
    "Examples",
    "MatrixUse",
    "ParameterIndex",
    "Use",
]

_USES: tuple[type[Use], ...] = (
    AddmmUse,
    AdditionUse,
    BatchNormUse,
    ConvolutionUse,
    EmbeddingUse,
    ExpansionUse,
    GroupNormUse,
    InPlaceMultiplicationUse,
    LayerNormUse,
    LinearUse,
    MatmulUse,
    MultiplicationUse,
    RMSNormUse,
    RepetitionUse,
    SubtractionUse,
)

#: The rule of each function that calls are read of.
RULES: dict[Callable[..., Any], type[Use]] = {
    function: use for use in _USES for function in use.functions
}
