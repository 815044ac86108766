"""The errors that fimkit raises of its own."""

__all__ = ["IFVPUsageError", "RankError", "SingularFisherError"]


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
