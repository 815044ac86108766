"""What a user holds: one estimator per method."""

from fimkit.estimators.explicit import Explicit

__all__ = ["Explicit"]
