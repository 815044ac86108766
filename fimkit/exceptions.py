"""The errors that fimkit raises of its own, and how it warns."""

import sys
import warnings

__all__ = ["IFVPUsageError", "RankError", "SingularFisherError", "warn"]

# Modules that hand a user's call on.
_PASSED_ON = ("fimkit.", "joblib.", "sklearn.")


class IFVPUsageError(ValueError):
    """Vectors, functions, models or layouts were used in a way that has no right answer.

    The message says what was given, what was expected, and the remedy.
    """


class RankError(RuntimeError):
    """Another process of the group failed, or ended, so that this one cannot go on.

    The message names its rank and what it failed with.
    """


class SingularFisherError(ValueError):
    """The damped Fisher information matrix has no inverse in floating point.

    Raised instead of returning NaN or inf; the remedy is a larger ``regularization``.
    """


def warn(message: str) -> None:
    """Warn of what is likely not meant, at the user's line that led to it."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(_PASSED_ON):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)
