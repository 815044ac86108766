"""EK-FAC: its fit and first product with a vector, for three kinds of network, and many products.

Float32 and the empirical Fisher. "fimkit, lean" keeps nothing between the passes
(``cache_budget=0``), so that the model runs twice, as in curvlinops and kronfluence. curvlinops and
nngeometry decompose in float32, all others in float64.
"""

from functools import partial

from benchmarks import by_hand, peers
from benchmarks.cases.base import Case, Curve, dtype_of
from benchmarks.problems import cnn, mlp, transformer
from benchmarks.work import ekfac_apply, ekfac_fit, layers_of


def works(problem):
    layers, dtype = layers_of(problem).values(), dtype_of(problem)
    return {
        "fit": ekfac_fit(layers, len(problem.x), dtype),
        "apply": ekfac_apply(layers, len(problem.vectors), dtype),
    }


def square_mlp(n, k, width, depth=3, **options):
    """``depth`` layers of one width, and a classifier of ten classes."""
    return mlp(n, k, (*[width] * (depth + 1), 10), **options)


SEQUENCES = {"nngeometry": "its Linear takes one position per example only"}
ekfac_case = partial(
    Case, libraries={**peers.EKFAC, "torch": by_hand.ekfac}, works=works, reference=by_hand.ekfac
)
WIDTHS = (784, 1024, 1024, 10)

CASES = (
    ekfac_case(
        "ekfac-mlp",
        "EK-FAC of an MLP 784-1024-1024-10",
        mlp,
        {"n": 4096, "k": 1, "widths": WIDTHS},
        {"n": 512, "k": 1, "widths": (196, 256, 256, 10)},
    ),
    ekfac_case(
        "ekfac-mlp-256",
        "the same with few enough examples for every library, and many vectors",
        mlp,
        {"n": 256, "k": 32, "widths": WIDTHS},
        {"n": 64, "k": 4, "widths": (196, 128, 10)},
    ),
    ekfac_case(
        "ekfac-transformer",
        "EK-FAC of a transformer encoder of 4 blocks",
        transformer,
        {"n": 256, "k": 1, "width": 256, "positions": 64},
        {"n": 32, "k": 1, "width": 64, "positions": 16},
        left_out=SEQUENCES,
    ),
    ekfac_case(
        "ekfac-cnn",
        "EK-FAC of three convolutions on 3x32x32 images",
        cnn,
        {"n": 1024, "k": 1},
        {"n": 64, "k": 1, "channels": (8, 16, 16)},
    ),
    Case(
        "ekfac-growth",
        "EK-FAC of MLPs and encoders of growing sizes, fimkit alone",
        square_mlp,
        {"n": 1024, "k": 16, "width": 256, "depth": 3},
        {"n": 256, "k": 4, "width": 64},
        {"fimkit": peers.fimkit_ekfac},
        works,
        compared=False,
        curves=(
            Curve(
                "n",
                "fit",
                tuple({"n": n, "width": 384} for n in (512, 1024, 2048, 4096, 8192)),
                "products and passes are linear in n, the eigendecompositions do not depend on it",
            ),
            Curve(
                "width",
                "fit",
                tuple({"n": 1024, "width": w} for w in (128, 256, 512, 1024)),
                "products go with the width squared at a fixed n, eigendecompositions with its "
                "cube; small ones are slower per operation than large ones",
            ),
            Curve(
                "p",
                "fit",
                tuple({"n": 1024, "width": 256, "depth": d} for d in (2, 4, 8, 16)),
                "more layers of the same width: everything is linear in their number",
            ),
            Curve(
                "k",
                "apply",
                tuple({"k": k, "width": 512, "n": 256} for k in (16, 32, 64, 128, 256)),
                "four products per vector and layer",
            ),
        ),
    ),
    Case(
        "ekfac-growth-sequences",
        "EK-FAC of encoders on longer sequences, fimkit alone",
        transformer,
        {"n": 64, "k": 4, "width": 128, "positions": 64, "blocks": 2},
        {"n": 16, "width": 32, "positions": 8},
        {"fimkit": peers.fimkit_ekfac},
        works,
        compared=False,
        curves=(
            Curve(
                "positions",
                "fit",
                tuple({"positions": t} for t in (32, 64, 128, 256, 512)),
                "statistics and layers are linear in positions, attention is quadratic; rotating "
                "the per-example product, and eigendecompositions, do not depend on them",
            ),
        ),
    ),
)
