"""The exact inverse, in the space of parameters (primal) and of examples (dual).

fimkit computes in float64 whatever the model's dtype, which its floor is counted in; the others
compute in float32, as they do unless told otherwise. "torch" is the plain dense F for the primal,
and the Gram matrix of dense gradients for the dual.
"""

from functools import partial

from benchmarks import by_hand, peers
from benchmarks.cases.base import Case, Curve
from benchmarks.problems import mlp
from benchmarks.work import dual_fit, dual_solve, layers_of, primal_fit, primal_solve


def primal_works(problem):
    layers = layers_of(problem).values()
    return {
        "fit": primal_fit(layers, len(problem.x), "float64"),
        "solve": primal_solve(layers, len(problem.vectors), "float64"),
    }


def dual_works(problem):
    layers, n = layers_of(problem).values(), len(problem.x)
    return {
        "fit": dual_fit(layers, n, "float64"),
        "solve": dual_solve(layers, n, len(problem.vectors), "float64"),
    }


PRIMAL = partial(peers.fimkit_explicit, solver="primal")
DUAL = partial(peers.fimkit_explicit, solver="dual")

CASES = (
    Case(
        "explicit-primal",
        "the exact inverse for an MLP 64-32-10, more examples than parameters",
        mlp,
        {"n": 4000, "k": 100, "widths": (64, 32, 10), "batch_size": 500},
        {"n": 400, "k": 10, "widths": (16, 8, 10)},
        {
            "fimkit": PRIMAL,
            "nngeometry": peers.nngeometry_explicit,
            "torch": by_hand.dense,
        },
        primal_works,
        by_hand.dense,
        curves=(
            Curve(
                "p",
                "solve",
                tuple({"n": 500, "widths": (64, w, 10)} for w in (10, 20, 40, 64)),
                "a factorisation goes with the cube of p, k solutions with its square",
            ),
        ),
    ),
    Case(
        "explicit-dual",
        "the exact inverse for an MLP 64-64-10, fewer examples than parameters",
        mlp,
        {"n": 2000, "k": 100, "widths": (64, 64, 10), "batch_size": 500},
        {"n": 100, "k": 10, "widths": (16, 16, 10)},
        {
            "fimkit": DUAL,
            "nngeometry": peers.nngeometry_explicit,
            "torch": by_hand.gram,
            "torch, dense": by_hand.dense,
        },
        dual_works,
        by_hand.gram,
        curves=(
            Curve(
                "n",
                "solve",
                tuple({"n": n} for n in (500, 1000, 2000, 4000)),
                "a factorisation goes with the cube of n, k solutions with its square, products "
                "with the gradients are linear in it",
            ),
        ),
    ),
    Case(
        "explicit-dual-large",
        "the exact inverse for an MLP 784-1024-1024-10, 1.86 million parameters",
        mlp,
        {"n": 2000, "k": 100, "widths": (784, 1024, 1024, 10)},
        {"n": 200, "k": 10},
        {"fimkit": DUAL},
        dual_works,
        on_request=True,
        notes={"fimkit": "its residuals: python -m benchmarks.explicit_scale"},
    ),
)
