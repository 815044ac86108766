"""Per-example gradients: from a model and a batch to factored rows."""

from fimkit.gradients.divided import divided, whole
from fimkit.gradients.engine import UNSEEN, GradientEngine
from fimkit.gradients.groups import BatchGradients, GroupGradients, TokenGradients
from fimkit.gradients.layout import Places
from fimkit.gradients.modes import (
    AmbientAutocast,
    EvaluationTurns,
    differentiating,
    evaluating,
    unwrap,
)
from fimkit.gradients.objective import FisherKind, Objective

__all__ = [
    "UNSEEN",
    "AmbientAutocast",
    "BatchGradients",
    "EvaluationTurns",
    "FisherKind",
    "GradientEngine",
    "GroupGradients",
    "Objective",
    "Places",
    "TokenGradients",
    "differentiating",
    "divided",
    "evaluating",
    "unwrap",
    "whole",
]
