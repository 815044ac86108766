"""Quadratic forms of a ModelData's gradients, kept in factors, are those of the same vectors."""

import numpy as np
import pytest
import torch

from fimkit import EKFAC, KFAC, DataInf, Diagonal, Explicit, ModelData, influence
from tests import reference
from tests.cases import CASES, N

ESTIMATORS = {
    "Explicit, primal": (Explicit, {"solver": "primal"}),
    "Explicit, dual": (Explicit, {"solver": "dual"}),
    "Explicit by layer": (Explicit, {"blocks": "layer"}),
    "Explicit by parameter": (Explicit, {"blocks": "parameter"}),
    "DataInf": (DataInf, {}),
    "DataInf by parameter": (DataInf, {"blocks": "parameter"}),
    "EKFAC": (EKFAC, {}),
    "KFAC": (KFAC, {}),
    "Diagonal": (Diagonal, {}),
}

parametrize_estimators = pytest.mark.parametrize("name", ESTIMATORS)


def data_of(case, model, size):
    """Return the case's examples as a ModelData, along whichever dimension they lie."""
    batch = case.batch()

    def collate(indices):
        return reference.take(batch, indices, case.dim)

    return ModelData(model, range(N), batch_size=size, collate_fn=collate)


def fitted_on(case, name, **settings):
    method, own = ESTIMATORS[name]
    data = data_of(case, case.model(), 5)
    return method(1e-2, loss=case.loss, **own, **settings).fit(data), data


@parametrize_estimators
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_self_influence(case, name):
    fitted, data = fitted_on(case, name)
    rows = case.gradients
    expected = (rows * fitted.transform(rows)).sum(1)
    for size in (1, 7, N):
        found = influence.self_influence(fitted, data_of(case, data.model, size))
        assert reference.error(found, expected) <= 1e-9
    assert reference.error(fitted.mahalanobis(data[[3, 1]]), expected[[3, 1]]) <= 1e-9


@parametrize_estimators
@pytest.mark.parametrize("kind", ["mc", "exact"])
def test_scores_of_several_rows(kind, name):
    """An example's quadratic form is the weighted sum of its rows', at one λ and at many."""
    case = next(case for case in CASES if case.name == "language model")
    fitted, data = fitted_on(case, name, fisher=kind, n_mc_samples=3, random_state=0)
    found = fitted.score_samples(data)
    quadratics = []
    for rows in fitted.gradients(data, None):
        dense = rows.dense(slice(0, rows.n), torch.float64)
        forms = (dense * fitted.transform(dense)).sum(1) * rows.flat_weights(dense)
        quadratics.append(forms.view(rows.n, -1).sum(1))
    constant = fitted.fisher_.logdet(1e-2) + fitted.n_features_in_ * np.log(2 * np.pi)
    expected = -(torch.cat(quadratics) + constant) / 2
    assert reference.error(found, expected) <= 1e-9
    path = fitted.score_path(data, [1e-2, 1.0])
    assert path[0] == pytest.approx(float(expected.mean()), rel=1e-9)
    assert path[1] == pytest.approx(fitted.set_params(regularization=1.0).score(data), rel=1e-9)


DENSE = {
    "Explicit, dual": "fimkit.operators.FactoredRows._ordered",
    "DataInf": "fimkit.operators.FactoredRows._ordered",
    "EKFAC": "fimkit.operators.EigenKroneckerOperator._rotate",
}


@pytest.mark.parametrize("name", DENSE)
def test_rows_stay_in_factors(name, monkeypatch):
    """A layer's rows are neither made dense nor, so, rotated."""
    case = next(case for case in CASES if case.name == "mlp")
    fitted, data = fitted_on(case, name)
    expected = fitted.mahalanobis(case.gradients)

    def refuse(*_):
        raise AssertionError("rows were made dense")

    monkeypatch.setattr(DENSE[name], refuse)
    assert reference.error(fitted.mahalanobis(data), torch.as_tensor(expected)) <= 1e-9
