"""Per-example gradients: from a model and a batch to factored rows."""

from fimkit.gradients.engine import GradientEngine
from fimkit.gradients.groups import BatchGradients, GroupGradients
from fimkit.gradients.modes import AmbientAutocast, evaluating, unwrap
from fimkit.gradients.objective import FisherKind, Objective

__all__ = [
    "AmbientAutocast",
    "BatchGradients",
    "FisherKind",
    "GradientEngine",
    "GroupGradients",
    "Objective",
    "evaluating",
    "unwrap",
]
