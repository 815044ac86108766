"""What every library's adapter is: named steps to be timed, and what they found."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Contender(NamedTuple):
    """One library's way to solve one problem, after what needs no measuring (copies, wrappers).

    ``steps`` are functions by stage, in order; the first takes nothing, the others what the one
    before returned. ``results`` takes what all returned, in order, and gives what is compared:
    tensors by name, the same names as the reference's.
    """

    steps: dict[str, Callable[..., Any]]
    results: Callable[..., dict[str, Any]]

    def run(self):
        """Take all steps and return the results."""
        values = []
        for step in self.steps.values():
            values.append(step(*values[-1:]))
        return self.results(*values)
