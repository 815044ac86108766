"""The manners of scikit-learn."""

import copy
import gc
import inspect
import pickle
import weakref
from dataclasses import dataclass
from functools import partial

import joblib
import numpy as np
import pytest
import torch
from sklearn import config_context
from sklearn.base import clone, is_classifier
from sklearn.decomposition import PCA
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    HalvingGridSearchCV,
    KFold,
    RandomizedSearchCV,
    StratifiedKFold,
    cross_val_score,
    cross_validate,
    learning_curve,
    train_test_split,
    validation_curve,
)
from sklearn.pipeline import FeatureUnion, Pipeline, make_pipeline
from sklearn.preprocessing import Normalizer
from sklearn.utils import estimator_checks, resample
from torch import nn

from fimkit import (
    EKFAC,
    KFAC,
    DataInf,
    Diagonal,
    Explicit,
    IFVPUsageError,
    ModelData,
    RegularizationCV,
    influence,
)
from fimkit.losses import CallableLoss
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
        # Without params, scikit-learn 1.6 fails for any estimator.
        routed = {"cv": 3, "error_score": "raise", "params": {}}
        found.append(cross_val_score(estimator, data, data.targets, **routed))
        make_pipeline(estimator, Normalizer()).fit(data, data.targets).transform(data)
    assert np.array_equal(*found)


ROUTING = [f"set_{name}_request" for name in ("fit", "transform", "inverse_transform", "score")]


@pytest.mark.parametrize("estimator", [*ESTIMATORS, RegularizationCV(EKFAC(), [1e-2])], ids=repr)
def test_arguments_by_name(estimator):
    data = ModelData(CASE.model(), CASE.batch(), batch_size=5)
    fitted = clone(estimator).fit(data)
    for method in ("transform", "inverse_transform", "score", "score_samples", "mahalanobis"):
        call = getattr(fitted, method)
        assert np.array_equal(call(vectors=data), call(data))


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


def by_hand(estimator, data, folds):
    """Return the mean score of held-out folds, by a plain loop."""
    scores = []
    for train, test in folds:
        fitted = clone(estimator).fit(ModelData(data.model, data.dataset, indices=train))
        scores.append(fitted.score(ModelData(data.model, data.dataset, indices=test)))
    return np.mean(scores)


def test_one_search_over_method_and_regularization():
    """With the automatic regularization, and one per block, among the candidates."""
    data = ModelData(CASE.model(), CASE.batch(), batch_size=5)
    methods = [Explicit(blocks="layer"), DataInf(), EKFAC()]
    per_layer = {"0": 1e-2, "2": 1e-1, "4": 1.0}
    regularizations = ["auto", 1e-2, np.float64(1.0), per_layer]
    folds = KFold(3, shuffle=True, random_state=0)
    search = GridSearchCV(
        Pipeline([("fim", EKFAC())]),
        {"fim": methods, "fim__regularization": regularizations},
        cv=folds,
        error_score="raise",
    ).fit(data)
    expected = [
        by_hand(clone(method).set_params(regularization=value), data, folds.split(data))
        for method in methods
        for value in regularizations
    ]
    assert search.cv_results_["mean_test_score"] == pytest.approx(expected, rel=1e-6)
    best = search.cv_results_["params"][int(np.argmax(expected))]
    assert search.best_estimator_["fim"].regularization == best["fim__regularization"]
    assert type(search.best_estimator_["fim"]) is type(best["fim"])
    assert search.score(data) == search.best_estimator_["fim"].score(data)


GROUPS = np.arange(len(CASE.batch()[1])) // 3
REGULARIZATIONS = {"regularization": [1e-2, 1.0]}


@pytest.mark.parametrize(
    "search",
    [
        GridSearchCV(EKFAC(), REGULARIZATIONS, cv=StratifiedKFold(2)),
        GridSearchCV(EKFAC(), REGULARIZATIONS, cv=GroupKFold(2)),
        RandomizedSearchCV(EKFAC(), REGULARIZATIONS, n_iter=2, cv=2, random_state=0),
        HalvingGridSearchCV(
            EKFAC(), REGULARIZATIONS, cv=2, min_resources=4, random_state=0, refit=True
        ),
    ],
    ids=lambda search: f"{type(search).__name__} {search.cv}",
)
def test_searches(search):
    data = ModelData(CASE.model(), CASE.batch(), batch_size=5)
    groups = GROUPS if isinstance(search.cv, GroupKFold) else None
    labels = np.arange(len(data)) % 2
    search = clone(search).set_params(error_score="raise").fit(data, labels, groups=groups)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert search.best_estimator_.n_samples_seen_ == len(data)
    assert search.transform(data).shape == data.shape


def test_scoring_is_pluggable():
    def parallel(estimator, data, y=None):
        """How much more alike the IFVPs of held-out examples are to their gradients."""
        return float(estimator.mahalanobis(data).mean())

    data = ModelData(CASE.model(), CASE.batch(), batch_size=5)
    search = GridSearchCV(EKFAC(), REGULARIZATIONS, scoring=parallel, cv=2, error_score="raise")
    found = search.fit(data).cv_results_["mean_test_score"]
    assert found[0] > found[1] > 0


def test_validation_curves_and_unions():
    data = ModelData(CASE.model(), CASE.batch(), batch_size=5)
    grid = REGULARIZATIONS["regularization"]
    name = "regularization"
    curve = validation_curve(
        EKFAC(), data, None, param_name=name, param_range=grid, cv=2, error_score="raise"
    )
    results = cross_validate(EKFAC(grid[1]), data, cv=2, return_estimator=True)
    assert np.array_equal(curve[1][1], results["test_score"])
    assert [len(results["estimator"]), *map(type, results["estimator"])] == [2, EKFAC, EKFAC]
    union = FeatureUnion([("one", EKFAC(grid[0])), ("two", Diagonal(grid[1]))])
    found = union.fit_transform(data)
    expected = [EKFAC(grid[0]).fit_transform(data), Diagonal(grid[1]).fit_transform(data)]
    assert np.array_equal(found, np.hstack(expected))
    assert make_pipeline(EKFAC(), Normalizer(), PCA(2)).fit_transform(data).shape == (len(data), 2)


CHECKS = [
    "check_estimator_cloneable",
    "check_estimator_repr",
    "check_no_attributes_set_in_init",
    "check_parameters_default_constructible",
    "check_get_params_invariance",
    "check_set_params",
    "check_do_not_raise_errors_in_init_or_set_params",
    "check_estimator_tags_renamed",
    "check_valid_tag_types",
    "check_mixin_order",
    "check_estimators_unfitted",
    "check_transformers_unfitted",
    "check_param_validation",
]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    "estimator",
    [Explicit(), DataInf(), EKFAC(), KFAC(), Diagonal(), RegularizationCV(EKFAC())],
    ids=repr,
)
def test_checks_of_scikit_learn(estimator, check):
    """Those that feed no arrays; `test_manners_on_data` has the twins of the others."""
    getattr(estimator_checks, check)(type(estimator).__name__, clone(estimator))


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_manners_on_data(estimator):
    data = ModelData(CASE.model(), CASE.batch(), batch_size=5)
    fitted = clone(estimator)
    parameters = fitted.get_params()
    assert not hasattr(fitted, "n_features_in_")
    assert fitted.fit(data) is fitted
    assert fitted.n_features_in_ == data.shape[1]
    first = answers(fitted, data.model)
    assert_equal(answers(fitted.fit(data), data.model), first)
    assert_equal(answers(fitted.fit(data[:4]).fit(data), data.model), first)
    assert np.array_equal(clone(estimator).fit_transform(data), fitted.transform(data))
    assert np.array_equal(fitted.score(data, data.targets), fitted.score(data))
    assert fitted.get_params() == parameters
    public = {name for name in vars(fitted) if not name.startswith("_")}
    assert {name for name in public if not name.endswith("_")} == set(parameters)
    assert not hasattr(fitted, "set_output")


@pytest.mark.parametrize("estimator", [*ESTIMATORS, RegularizationCV(EKFAC(), [1e-2])], ids=repr)
def test_html(estimator):
    """It shows what was fitted, whatever the regularization was set to since, and computes none."""
    data = ModelData(CASE.model(), CASE.batch(), batch_size=5)
    fitted = clone(estimator).fit(data)
    name = type(fitted).__name__
    assert name in clone(estimator)._repr_html_()
    assert name in fitted._repr_html_()
    if isinstance(estimator, RegularizationCV):
        return
    computed = ("matmul", "solve", "to_dense", "spectrum", "logdet", "diagonal")
    with pytest.MonkeyPatch.context() as patch:
        for method in computed:
            patch.setattr(type(fitted.fisher_), method, None)
        assert name in fitted._repr_html_()
    for regularization in (-1, "none", object()):
        fitted.set_params(regularization=regularization)
        assert name in fitted._repr_html_()
        with pytest.raises(IFVPUsageError):
            _ = fitted.regularization_


class Own(nn.Module):
    """A model with its loss, which is no function of the ``model`` that it is called with."""

    def __init__(self):
        super().__init__()
        self.inner = mlp()

    def forward(self, x):
        return self.inner(x)

    def loss(self, model, batch):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y, reduction="none")

    def scaled(self, scale, model, batch):
        return scale * self.loss(model, batch)

    def __deepcopy__(self, memo):
        raise AssertionError("the model is copied")


@dataclass
class Holder:
    model: nn.Module

    def __call__(self, model, batch):
        return self.model.loss(model, batch)


class HoldingLoss(CallableLoss):
    """One that follows the documented protocol."""

    def __init__(self, model):
        super().__init__(model.loss)


HOLDING = {
    "bound method": lambda model: model.loss,
    "partial": lambda model: partial(model.scaled, 1.0),
    "callable object": Holder,
    "Loss": HoldingLoss,
}


@pytest.mark.parametrize("how", HOLDING)
@pytest.mark.parametrize("n_jobs", [1, 2])
def test_searches_with_a_loss_that_holds_the_model(how, n_jobs):
    """A copy of it is of another model: every score would be that of gradients of zero."""
    model = Own().double()
    data = ModelData(model, CASE.batch(), batch_size=5)
    loss = HOLDING[how](model)
    folds = KFold(2, shuffle=True, random_state=0)
    expected = GridSearchCV(EKFAC(), REGULARIZATIONS, cv=folds, error_score="raise").fit(data)
    search = clone(expected).set_params(estimator=EKFAC(loss=loss), n_jobs=n_jobs).fit(data)
    found, scores = (each.cv_results_["mean_test_score"] for each in (search, expected))
    assert found == pytest.approx(scores, rel=1e-9)
    assert search.best_estimator_.loss is loss
    trace = search.best_estimator_.fisher_.trace()
    assert trace == pytest.approx(expected.best_estimator_.fisher_.trace(), rel=1e-9)
    grid = {"fim": [EKFAC(1e-2, loss=loss), EKFAC(1.0, loss=loss)]}
    search = GridSearchCV(Pipeline([("fim", EKFAC())]), grid, cv=folds, error_score="raise")
    assert search.fit(data).cv_results_["mean_test_score"] == pytest.approx(scores, rel=1e-9)


@pytest.mark.parametrize("how", HOLDING)
def test_paths_with_a_loss_that_holds_the_model(how):
    model = Own().double()
    data = ModelData(model, CASE.batch(), batch_size=5)
    loss = HOLDING[how](model)
    search = clone(RegularizationCV(EKFAC(loss=loss), [1e-2], cv=2)).fit(data)
    expected = RegularizationCV(EKFAC(), [1e-2], cv=2).fit(data)
    assert search.estimator_.loss is loss
    assert search.best_score_ == pytest.approx(expected.best_score_, rel=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_clones_take_over_nothing_but_the_loss(estimator):
    loss, state = HoldingLoss(Own()), np.random.RandomState(0)
    original = clone(estimator).set_params(loss=loss, random_state=state, parameters=["*"])
    copied = clone(original)
    assert copied.loss is original.loss is loss
    assert copied.parameters == original.parameters
    assert copied.parameters is not original.parameters
    assert copied.random_state is not state
    assert copied.random_state.randint(1000) == state.randint(1000)
    parameters = {**copied.get_params(), "random_state": None}
    assert parameters == {**original.get_params(), "random_state": None}


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_losses_of_another_model_are_refused(estimator):
    """As a search makes them, which copies what is in its grid."""
    data, other = ModelData(CASE.model(), CASE.batch()), Own().double()
    with pytest.raises(IFVPUsageError, match=r"no parameter of the Sequential .*loss=loss holds"):
        clone(estimator).set_params(loss=other.loss).fit(data)
    fitted = clone(estimator).set_params(loss=other.loss).fit(ModelData(other, CASE.batch()))
    renamed = ModelData(nn.ModuleDict({"inner": CASE.model()}), CASE.batch())
    with pytest.raises(IFVPUsageError, match="no parameter of the ModuleDict"):
        fitted.transform(renamed)


class WithUnused(nn.Module):
    """A model with a layer that its loss meets not at all, and one without any effect."""

    def __init__(self):
        super().__init__()
        self.inner, self.idle, self.absent = mlp(), nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        self.idle(x[:, :3])
        return self.inner(x)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_a_selection_that_the_losses_do_not_reach_is_refused(estimator):
    data = ModelData(WithUnused().double(), CASE.batch(), batch_size=5)
    for names in ("idle.*", "absent.*", ["idle.*", "absent.*"]):
        selecting = clone(estimator).set_params(parameters=names)
        first = names[0] if isinstance(names, list) else names
        message = f"no loss depends on a selected parameter, '{first[:-1]}weight' and"
        with pytest.raises(IFVPUsageError, match=message):
            selecting.fit(data)
        assert not hasattr(selecting, "fisher_")
    fitted = clone(estimator).set_params(parameters=["inner.0.*", "idle.*", "absent.*"]).fit(data)
    for name in ("idle.weight", "absent.bias"):
        assert fitted.coverage_[name].endswith("no gradient seen")
