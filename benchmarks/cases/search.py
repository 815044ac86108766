"""Choosing lambda by cross-validated likelihood: 13 values, 5 folds, scikit-learn's digits.

"grid search" is scikit-learn's ``GridSearchCV`` of the same estimator, which fits 66 times where
``RegularizationCV`` fits six. What is compared are the mean scores of the values.
"""

import warnings

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV, KFold

from benchmarks import by_hand
from benchmarks.cases.base import Case, dtype_of
from benchmarks.contender import Contender
from benchmarks.problems import trained_mlp
from benchmarks.work import Work, eigenvalues, ekfac_fit, layers_of, products

FOLDS = KFold(5, shuffle=True, random_state=0)


def digits(n, k, hidden):
    """Scikit-learn's digits and a 64-hidden-10 network."""
    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x[: n + k] / 16, dtype=torch.float32), torch.tensor(y[: n + k])
    return trained_mlp(x, y, n, (64, hidden, 10), batch_size=256)


def grid(problem):
    return list(problem.damping * np.logspace(-3, 3, 13))


def searched(problem, make, scores):
    from fimkit import ModelData

    data = ModelData(problem.model, problem.data, batch_size=problem.batch_size)

    def search():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the best may lie at the grid's edge
            return make().fit(data)

    return Contender({"search": search}, lambda found: {"scores": torch.from_numpy(scores(found))})


def regularization_cv(problem):
    from fimkit import EKFAC, RegularizationCV

    return searched(
        problem,
        lambda: RegularizationCV(EKFAC(), grid(problem), cv=FOLDS),
        lambda found: found.cv_results_["mean_test_score"],
    )


def grid_search(problem):
    from fimkit import EKFAC

    return searched(
        problem,
        lambda: GridSearchCV(EKFAC(), {"regularization": grid(problem)}, cv=FOLDS),
        lambda found: found.cv_results_["mean_test_score"],
    )


def by_formula(problem):
    def search():
        folds = list(FOLDS.split(problem.x.numpy()))
        scores = [by_hand.ekfac_scores(problem, *fold, grid(problem)) for fold in folds]
        by_hand.fit_ekfac(problem)
        return torch.stack(scores).mean(0)

    return Contender({"search": search}, lambda scores: {"scores": scores})


def works(problem):
    """Five fits of four fifths, a last one of all, and every example scored once."""
    layers, dtype, n = layers_of(problem).values(), dtype_of(problem), len(problem.x)
    fits = Work()
    for size in [n * 4 // 5] * 5 + [n]:
        fits += ekfac_fit(layers, size, dtype)
    scored = sum(eigenvalues(layer, n) for layer in layers)
    passes = 5 * 4 / 5 + 1 + 1  # of the fits, and of the examples scored
    return {"search": Work(fits.flops, fits.eigh, passes) + products(scored, dtype)}


CASES = (
    Case(
        "search",
        "13 regularizations of EK-FAC by 5 folds of 1,700 digits",
        digits,
        {"n": 1700, "k": 16, "hidden": 32},
        {"n": 200, "k": 4, "hidden": 8},
        {"fimkit": regularization_cv, "fimkit, grid search": grid_search, "torch": by_formula},
        works,
        by_formula,
    ),
)
