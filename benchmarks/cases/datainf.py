"""DataInf: fit, and k vectors times the mean over examples of the damped inverse, layer by layer.

One lambda for all layers, as dattri takes one. Products are float32 in all, fimkit's but for
vectors that little is left of.
"""

from benchmarks import by_hand, peers
from benchmarks.cases.base import Case, Curve, dtype_of
from benchmarks.problems import mlp
from benchmarks.work import Work, datainf_transform, layers_of


def works(problem):
    layers = layers_of(problem).values()
    n, k = len(problem.x), len(problem.vectors)
    return {
        "fit": Work(passes=1.0),
        "transform": datainf_transform(layers, n, k, dtype_of(problem)),
    }


CASES = (
    Case(
        "datainf",
        "DataInf of an MLP 784-256-10",
        mlp,
        {"n": 1000, "k": 50, "widths": (784, 256, 10), "batch_size": 250},
        {"n": 100, "k": 5, "widths": (64, 32, 10)},
        {
            "fimkit": peers.fimkit_datainf,
            "dattri": peers.dattri_datainf,
            "torch": by_hand.datainf,
            "vmap": by_hand.datainf_vmap,
            "loop": by_hand.datainf_loop,
        },
        works,
        by_hand.datainf,
        notes={
            "vmap": "as dattri 0.1.0 had it: one vector at a time, a vmap over examples",
            "loop": "the paper's reference code: a Python loop over vectors, layers and examples",
        },
        curves=(
            Curve(
                "n",
                "transform",
                tuple({"n": n} for n in (500, 1000, 2000, 4000, 8000)),
                "two products per layer, each linear in n",
            ),
            Curve(
                "k",
                "transform",
                tuple({"k": k, "n": 2000} for k in (12, 25, 50, 100, 200)),
                "two products per layer, each linear in k",
            ),
            Curve(
                "p",
                "transform",
                tuple({"widths": (784, w, 10), "n": 2000} for w in (64, 128, 256, 512, 1024)),
                "two products per layer, each linear in its parameters",
            ),
        ),
    ),
)
