"""What a case and a growth curve are."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from benchmarks.contender import Contender
from benchmarks.problems import Problem
from benchmarks.work import Work


class Curve(NamedTuple):
    """How one stage of fimkit's grows along one size.

    ``axis`` is the name of a size of the case, or "p", the number of parameters that the points
    have; ``points`` are the case's sizes that differ, and ``why`` explains the exponent.
    """

    axis: str
    stage: str
    points: tuple[dict[str, Any], ...]
    why: str


@dataclass(frozen=True)
class Case:
    """One task for all libraries: the problem, who solves it, its least work and its reference.

    Parameters
    ----------
    name, about : str
    problem : callable
        Makes the problem from the sizes.
    sizes, quick : dict
        Its arguments, and those that differ with ``--quick``.
    libraries : dict of str to callable
        Take the problem to a `Contender`. What stands before a comma is the package.
    works : callable
        Takes the problem to the least work of each stage.
    reference : callable, optional
        Takes the problem, in float64, to the contender whose results are the right ones.
    notes : dict of str to str, optional
        What to know of a library's row.
    left_out : dict of str to str, optional
        Libraries that cannot take part, and why.
    on_request : bool, default=False
        Whether the case runs only if it is named.
    compared : bool, default=True
        Whether libraries are compared; otherwise there are only the curves.
    curves : tuple of Curve, optional
    """

    name: str
    about: str
    problem: Callable[..., Problem]
    sizes: dict[str, Any]
    quick: dict[str, Any]
    libraries: dict[str, Callable[[Problem], Contender]]
    works: Callable[[Problem], dict[str, Work]]
    reference: Callable[[Problem], Contender] | None = None
    notes: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    on_request: bool = False
    compared: bool = True
    curves: tuple[Curve, ...] = ()

    def sizes_of(self, *, quick: bool) -> dict[str, Any]:
        """Return the arguments of the problem."""
        return {**self.sizes, **(self.quick if quick else {})}


def dtype_of(problem):
    """Return the name of the dtype that a problem is given in."""
    return str(problem.vectors.dtype).removeprefix("torch.")
