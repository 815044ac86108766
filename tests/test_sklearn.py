"""The manners of scikit-learn."""

import copy
import gc
import inspect
import pickle
import weakref

import joblib
import numpy as np
import pytest
import torch
from sklearn import config_context
from sklearn.base import clone, is_classifier
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import (
    GridSearchCV,
    KFold,
    cross_val_score,
    learning_curve,
    train_test_split,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer
from sklearn.utils import resample
from torch import nn

from fimkit import EKFAC, KFAC, DataInf, Diagonal, Explicit, ModelData, influence
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


ESTIMATORS = [
    Explicit(1e-3, solver="primal"),
    Explicit(1e-3, solver="dual"),
    Explicit(1e-3, blocks="layer"),
    DataInf(1e-3),
    DataInf(1e-3, blocks="parameter"),
    EKFAC(1e-3),
    KFAC(1e-3),
    Diagonal(1e-3),
]


def through_pickle(fitted, folder):
    return pickle.loads(pickle.dumps(fitted))


def through_deepcopy(fitted, folder):
    return copy.deepcopy(fitted)


def through_joblib(fitted, folder):
    joblib.dump(fitted, folder / "fitted.joblib")
    return joblib.load(folder / "fitted.joblib")


def answers(fitted, model):
    """Return everything that a fitted estimator answers, on vectors and on a ModelData."""
    data = ModelData(model, CASE.batch(), batch_size=5)
    rows = CASE.gradients[:, : fitted.n_features_in_]
    return [
        *(
            np.asarray(answer)
            for vectors in (rows, data)
            for answer in (
                fitted.transform(vectors),
                fitted.inverse_transform(vectors),
                fitted.mahalanobis(vectors),
                fitted.score_samples(vectors),
                fitted.score_path(vectors, [1e-2, 1.0]),
                fitted.score(vectors),
            )
        ),
        influence.pairwise_scores(fitted, data, data[:2]),
        influence.self_influence(fitted, data),
    ]


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert np.array_equal(one, other)


@pytest.mark.parametrize("through", [through_pickle, through_deepcopy, through_joblib])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_copies_answer_alike(estimator, through, tmp_path):
    model = CASE.model()
    fitted = clone(estimator).set_params(fisher="mc", random_state=3)
    fitted.fit(model, CASE.batches(5))
    before = answers(fitted, model)
    copied = through(fitted, tmp_path)
    assert_equal(answers(copied, model), before)
    assert_equal(answers(fitted, model), before)
    copied.set_params(regularization="auto")
    again = copied.transform(CASE.gradients)
    assert torch.equal(fitted.set_params(regularization="auto").transform(CASE.gradients), again)
    assert copied.regularization_ == fitted.regularization_


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_the_model_is_not_held(estimator):
    """Nor its parameters' memory, the graph, or the batches."""
    model = CASE.model()
    batches = CASE.batches(5)
    fitted = clone(estimator).fit(model, batches)
    fitted.transform(ModelData(model, CASE.batch()))
    before = fitted.transform(CASE.gradients)
    tensors = [*model.parameters(), *(tensor for batch in batches for tensor in batch)]
    with torch.no_grad():
        for tensor in tensors:
            tensor.fill_(7)
    held = [weakref.ref(thing) for thing in (model, *tensors)]
    del model, batches, tensors, tensor
    gc.collect()
    assert [reference() for reference in held] == [None] * len(held)
    assert torch.equal(fitted.transform(CASE.gradients), before)


# Of every constructor parameter but the regularization: a value for the fit, and one set later.
LATER = {
    "loss": (nn.CrossEntropyLoss(), "mse"),
    "fisher": ("mc", "empirical"),
    "n_mc_samples": (2, 5),
    "parameters": (["0.*", "2.*"], "4.*"),
    "device": ("cpu", "meta"),
    "dtype": (torch.float64, torch.float32),
    "random_state": (0, 1),
    "verbose": (0, 1),
    "solver": ("dual", "primal"),
    "blocks": ("layer", "parameter"),
    "storage": ("memory", "folder"),
    "weight_sharing": ("expand", "reduce"),
    "fallback": ("auto", "raise"),
    "cache_budget": (10**6, 0),
}


PARAMETERS = {
    estimator: [name for name in inspect.signature(estimator).parameters if name in LATER]
    for estimator in (Explicit, DataInf, EKFAC, KFAC, Diagonal)
}


def test_every_parameter_is_among_them():
    for estimator, names in PARAMETERS.items():
        assert {*names, "regularization"} == set(inspect.signature(estimator).parameters)


@pytest.mark.parametrize(
    ("estimator", "name"),
    [(estimator, name) for estimator, names in PARAMETERS.items() for name in names],
)
def test_only_the_regularization_is_live(estimator, name, capsys):
    """Every other parameter waits for the next fit, whatever it is set to."""
    model = CASE.model()
    settings = {key: LATER[key][0] for key in PARAMETERS[estimator]}
    fitted = estimator(1e-2, **settings).fit(model, CASE.batches(5))
    before = answers(fitted, model)
    later = estimator(1e-2, **{**settings, name: LATER[name][1]})
    for value in (LATER[name][1], object(), None):
        fitted.set_params(**{name: value})
        assert_equal(answers(fitted, model), before)
    assert capsys.readouterr() == ("", "")
    if name in ("loss", "fisher", "n_mc_samples", "parameters", "dtype", "random_state"):
        x, y = CASE.batch()
        later.fit(model, [(x, model(x).detach() + 1 if name == "loss" else y)])
        traces = [each.fisher_.trace(1e-2) for each in (later, fitted)]
        assert traces[0] != traces[1], "the value is one that matters"


def test_a_list_of_parameters_may_change_after_the_fit():
    model = CASE.model()
    names = ["0.*"]
    fitted = Explicit(1e-2, parameters=names).fit(model, CASE.batches(5))
    before = answers(fitted, model)
    names.append("2.*")
    assert_equal(answers(fitted, model), before)


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


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_what_goes_in_is_no_metadata(estimator):
    """Nothing is routed, whether routing is on or off."""
    data = ModelData(CASE.model(), CASE.batch())
    assert not any(hasattr(estimator, name) for name in ROUTING)
    assert str(estimator.get_metadata_routing()) == "{}"
    found = [cross_val_score(estimator, data, data.targets, cv=3, error_score="raise")]
    with config_context(enable_metadata_routing=True):
        found.append(cross_val_score(estimator, data, data.targets, cv=3, error_score="raise"))
        make_pipeline(estimator, Normalizer()).fit(data, data.targets).transform(data)
    assert np.array_equal(*found)


ROUTING = [f"set_{name}_request" for name in ("fit", "transform", "inverse_transform", "score")]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_frozen(estimator):
    data = ModelData(CASE.model(), CASE.batch())
    fitted = clone(estimator).fit(data)
    frozen = FrozenEstimator(fitted)
    assert np.array_equal(frozen.transform(data), fitted.transform(data))
    pipeline = make_pipeline(clone(frozen), Normalizer()).fit(data[:3])
    assert np.array_equal(pipeline[0].transform(data), fitted.transform(data))


def test_resampling_and_splitting():
    data = ModelData(CASE.model(), CASE.batch())
    train, test, y, _ = train_test_split(data, data.targets, test_size=4, random_state=0)
    assert sorted([*train.indices, *test.indices]) == list(range(len(data)))
    assert y.tolist() == train.targets.tolist()
    drawn, y = resample(data, data.targets, n_samples=5, random_state=0)
    assert y.tolist() == drawn.targets.tolist()
    sizes = [0.5, 1.0]
    curve = learning_curve(
        Explicit(), data, data.targets, train_sizes=sizes, cv=2, error_score="raise"
    )
    assert np.isfinite(curve[2]).all()


def test_progress_is_shown_on_demand(capsys):
    Explicit().fit(CASE.model(), CASE.batches(5))
    assert capsys.readouterr() == ("", "")
    Explicit(verbose=1).fit(CASE.model(), CASE.batches(5))
    out, err = capsys.readouterr()
    assert out == ""
    assert "batch" in err
