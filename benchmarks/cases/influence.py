"""Scores of every training example on every query, by EK-FAC: its fit, then the scores.

Scores of an example are summed over layers. dattri's EK-FAC is compared as it is: its factors
differ, as `benchmarks.retraining` shows, so that its scores are others.
"""

from benchmarks import by_hand, peers
from benchmarks.cases.base import Case, Curve, dtype_of
from benchmarks.problems import mlp
from benchmarks.work import Work, ekfac_fit, ekfac_score, layers_of


def works(problem):
    layers, dtype = layers_of(problem).values(), dtype_of(problem)
    n, k = len(problem.x), len(problem.vectors)
    return {
        "fit": ekfac_fit(layers, n, dtype),
        "scores": ekfac_score(layers, n, k, dtype) + Work(passes=1 + k / n),
    }


CASES = (
    Case(
        "influence",
        "scores of an MLP 784-512-256-10, training examples on queries",
        mlp,
        {"n": 2000, "k": 100, "widths": (784, 512, 256, 10)},
        {"n": 200, "k": 10, "widths": (64, 32, 10)},
        {
            "fimkit": peers.fimkit_influence,
            "kronfluence": peers.kronfluence_influence,
            "dattri": peers.dattri_influence,
            "torch": by_hand.ekfac_influence,
        },
        works,
        by_hand.ekfac_influence,
        notes={"dattri": "another approximation, see above"},
        curves=(
            Curve(
                "n",
                "scores",
                tuple({"n": n, "k": 50} for n in (1000, 2000, 4000, 8000)),
                "training gradients meet the queries' products batch by batch, linear in n; the "
                "queries' own part does not depend on it",
            ),
            Curve(
                "k",
                "scores",
                tuple({"k": k, "n": 1000} for k in (25, 50, 100, 200)),
                "products are linear in k, the passes over the training examples do not depend on "
                "it",
            ),
        ),
    ),
)
