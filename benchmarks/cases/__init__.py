"""The cases, one module for each method."""

from benchmarks.cases import datainf, ekfac, explicit, influence, search
from benchmarks.cases.base import Case, Curve

__all__ = ["CASES", "Case", "Curve"]

MODULES = (ekfac, datainf, explicit, search, influence)

#: All cases by name, in the order they run.
CASES = {case.name: case for module in MODULES for case in module.CASES}
