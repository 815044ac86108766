"""The manners of scikit-learn."""

import inspect
import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone, is_classifier
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer
from torch import nn

from fimkit import Explicit, ModelData
from tests import reference
from tests.cases import BY_NAME, mlp

CASE = BY_NAME["mlp"]

SETTINGS = {
    "regularization": [1e-3, 1e-2],
    "loss": nn.CrossEntropyLoss(),
    "fisher": "mc",
    "n_mc_samples": 3,
    "parameters": ["0.*", "2.*"],
    "device": "cpu",
    "dtype": torch.float64,
    "random_state": 7,
    "verbose": 0,
    "solver": "dual",
    "blocks": "layer",
}


def test_signature():
    """Only the regularization goes by position; its name is the one that searches use."""
    parameters = inspect.signature(Explicit).parameters
    assert set(parameters) == set(SETTINGS)
    by_position = [p.name for p in parameters.values() if p.kind is not p.KEYWORD_ONLY]
    assert by_position == ["regularization"]
    assert parameters["regularization"].default == "auto"


def test_parameters_are_stored_as_given():
    estimator = Explicit(**SETTINGS)
    found = estimator.get_params()
    assert set(found) == set(SETTINGS)
    assert all(found[name] is SETTINGS[name] for name in SETTINGS)
    estimator.fit(CASE.model(), CASE.batches(5))
    assert all(getattr(estimator, name) is SETTINGS[name] for name in SETTINGS)


def test_nothing_is_validated_before_fit():
    estimator = Explicit(-1, solver="none", loss=3)
    assert estimator.set_params(solver="other").solver == "other"
    with pytest.raises(ValueError, match="Invalid parameter 'damping'"):
        estimator.set_params(damping=1)


def test_clone():
    fitted = Explicit(1e-3, solver="primal", blocks={"a": ["*"]})
    fitted.fit(CASE.model(), CASE.batches(5))
    copied = clone(fitted)
    assert copied.get_params() == fitted.get_params()
    assert not hasattr(copied, "fisher_")
    assert {name for name in vars(copied) if name.endswith("_")} == set()


def test_repr_shows_what_was_changed():
    assert repr(Explicit()) == "Explicit()"
    assert repr(Explicit(1e-3, solver="dual")) == "Explicit(regularization=0.001, solver='dual')"
    assert "Explicit" in Explicit()._repr_html_()


def test_fit_returns_self():
    estimator = Explicit()
    assert estimator.fit(CASE.model(), CASE.batches(5)) is estimator
    assert not is_classifier(estimator)


class Unpicklable(nn.Module):
    """A model that cannot be pickled, so that a pickle cannot hold it."""

    def __init__(self):
        super().__init__()
        self.inner = mlp()
        self.function = lambda x: x

    def forward(self, x):
        return self.function(self.inner(x))


@pytest.mark.parametrize("solver", ["primal", "dual"])
@pytest.mark.parametrize("blocks", ["all", "layer"])
def test_pickle(solver, blocks):
    """A fitted estimator goes without its model, and without what can be computed again."""
    model = Unpicklable().double()
    fitted = Explicit(1e-3, solver=solver, blocks=blocks).fit(model, CASE.batches(5))
    fresh = len(pickle.dumps(fitted))
    vectors = CASE.gradients
    expected = fitted.transform(vectors)
    data = pickle.dumps(fitted)
    assert len(data) == fresh, "the factor of the last λ is not pickled"
    assert b"Unpicklable" not in data
    found = pickle.loads(data)
    assert torch.equal(found.transform(vectors), expected)
    assert found.coverage_ == fitted.coverage_
    assert found.n_samples_seen_ == fitted.n_samples_seen_
    found.set_params(regularization=1e-2)
    fitted.set_params(regularization=1e-2)
    assert torch.equal(found.transform(vectors), fitted.transform(vectors))
    gradients = [
        estimator.mahalanobis(ModelData(model, CASE.batch())) for estimator in (found, fitted)
    ]
    assert np.array_equal(*gradients)


def test_pipeline():
    data = ModelData(CASE.model(), CASE.batch(), batch_size=5)
    found = make_pipeline(Explicit(1e-2), Normalizer()).fit_transform(data)
    expected = reference.ifvp(CASE.gradients, CASE.gradients, 1e-2)
    expected = expected / expected.norm(dim=1, keepdim=True)
    assert reference.error(found, expected) <= 1e-9


def test_pipeline_with_labels():
    """Labels that scikit-learn hands on are ignored: a ModelData brings its own."""
    data = ModelData(CASE.model(), CASE.batch())
    pipeline = make_pipeline(Explicit(1e-2), Normalizer())
    with_labels = pipeline.fit(data, data.targets).transform(data)
    assert np.array_equal(with_labels, pipeline.fit(data).transform(data))


def test_grid_search():
    """Held-out gradients choose λ, by the Gaussian likelihood; each fold by its own fit."""
    data = ModelData(CASE.model(), CASE.batch(), batch_size=5)
    grid = [1e-4, 1e-2, 1.0]
    folds = KFold(3, shuffle=True, random_state=0)
    search = GridSearchCV(Explicit(), {"regularization": grid}, cv=folds, error_score="raise")
    search.fit(data)
    rows = CASE.gradients
    for i, regularization in enumerate(grid):
        scores = []
        for train, test in folds.split(np.arange(len(rows))):
            covariance = reference.damped(rows[train], regularization)
            zero = torch.zeros(len(covariance), dtype=torch.float64)
            normal = torch.distributions.MultivariateNormal(zero, covariance)
            scores.append(float(normal.log_prob(rows[test]).mean()))
        assert search.cv_results_["mean_test_score"][i] == pytest.approx(np.mean(scores), rel=1e-6)
    assert search.best_estimator_.n_samples_seen_ == len(rows)


def test_progress_is_shown_on_demand(capsys):
    Explicit().fit(CASE.model(), CASE.batches(5))
    assert capsys.readouterr() == ("", "")
    Explicit(verbose=1).fit(CASE.model(), CASE.batches(5))
    out, err = capsys.readouterr()
    assert out == ""
    assert "batch" in err
