"""One rule per kind of layer; `RULES` finds a rule by the function that it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fimkit.gradients.rules.base import Examples, MatrixUse, ParameterIndex, Use
from fimkit.gradients.rules.linear import LinearUse

__all__ = ["RULES", "Examples", "MatrixUse", "ParameterIndex", "Use"]

#: The rule of each function that calls are read of.
RULES: dict[Callable[..., Any], type[Use]] = {
    function: rule for rule in (LinearUse,) for function in rule.functions
}
