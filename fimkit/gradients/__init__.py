"""Per-example gradients: from a model and a batch to factored rows."""

from fimkit.gradients.engine import GradientEngine
from fimkit.gradients.modes import evaluating, unwrap
from fimkit.gradients.objective import FisherKind, Objective

__all__ = ["FisherKind", "GradientEngine", "Objective", "evaluating", "unwrap"]
