"""`RegularizationCV`: one fit per fold, and the whole path from it."""

import pickle
import warnings

import numpy as np
import pytest
import torch
from sklearn import config_context
from sklearn.base import BaseEstimator, clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, GroupKFold, KFold, LeaveOneOut, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer
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
    SingularFisherError,
    influence,
)
from tests import reference

N = 40
GRID = np.logspace(-6, 2, 9)
FOLDS = KFold(3, shuffle=True, random_state=0)
METHODS = [
    Explicit(loss="mse", solver="primal"),
    Explicit(loss="mse", solver="dual"),
    Explicit(loss="mse", blocks="layer"),
    DataInf(loss="mse"),
    EKFAC(loss="mse"),
    KFAC(loss="mse"),
    Diagonal(loss="mse"),
]
EXPLICIT, EK = METHODS[0], METHODS[4]
DIAGONAL = METHODS[-1]


@pytest.fixture
def data():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(2, N, 3, dtype=torch.float64)
    return ModelData(model, (x, y), batch_size=7)


def rows_of(data):
    """Return the gradients of all examples, one backward pass each."""
    rows = []
    for x, y in zip(*data.dataset.tensors, strict=True):
        loss = (data.model(x) - y).square().sum() / 2
        pieces = torch.autograd.grad(loss, list(data.model.parameters()))
        rows.append(torch.cat([piece.flatten() for piece in pieces]))
    return torch.stack(rows)


def test_equals_the_definition(data):
    """Held-out gradients under the Gaussian of the others', by dense matrices."""
    search = RegularizationCV(EXPLICIT, GRID, cv=FOLDS).fit(data)
    rows = rows_of(data)
    scores = np.empty((3, len(GRID)))
    for i, (train, test) in enumerate(FOLDS.split(rows)):
        for j, regularization in enumerate(GRID):
            covariance = reference.damped(rows[train], float(regularization))
            zero = torch.zeros(len(covariance), dtype=torch.float64)
            normal = torch.distributions.MultivariateNormal(zero, covariance)
            scores[i, j] = normal.log_prob(rows[test]).mean()
    for i in range(3):
        assert search.cv_results_[f"split{i}_test_score"] == pytest.approx(scores[i], rel=1e-9)
    mean = scores.mean(0)
    assert search.cv_results_["mean_test_score"] == pytest.approx(mean, rel=1e-9)
    assert search.cv_results_["std_test_score"] == pytest.approx(scores.std(0), rel=1e-6)
    assert search.best_index_ == mean.argmax()
    assert search.regularization_ == GRID[mean.argmax()]
    assert search.best_score_ == pytest.approx(mean.max(), rel=1e-9)
    assert search.n_splits_ == 3
    assert search.n_samples_seen_ == N
    expected = reference.ifvp(rows, rows, search.regularization_)
    assert reference.error(search.transform(rows), expected) <= 1e-9


@pytest.mark.parametrize("estimator", METHODS, ids=repr)
def test_equals_a_grid_search(data, estimator):
    search = RegularizationCV(estimator, GRID, cv=FOLDS).fit(data)
    grid = GridSearchCV(estimator, {"regularization": GRID}, cv=FOLDS, error_score="raise")
    grid.fit(data)
    shared = [key for key in search.cv_results_ if key.endswith("_test_score")]
    assert len(shared) == 6
    for key in shared:
        assert search.cv_results_[key] == pytest.approx(grid.cv_results_[key], rel=1e-6)
    assert search.cv_results_["params"] == grid.cv_results_["params"]
    assert search.regularization_ == grid.best_params_["regularization"]
    assert search.estimator_.get_params() == grid.best_estimator_.get_params()
    assert np.array_equal(search.transform(data), grid.transform(data))


def test_fits_each_fold_once(data):
    fits, paths = [], []

    class Counting(EKFAC):
        def fit(self, model, dataloader=None):
            fits.append(len(model))
            return super().fit(model, dataloader)

        def score_path(self, vectors, regularizations):
            paths.append((len(vectors), len(regularizations)))
            return super().score_path(vectors, regularizations)

    RegularizationCV(Counting(loss="mse"), GRID, cv=4).fit(data)
    assert fits == [30, 30, 30, 30, 40]
    assert paths == [(10, 9)] * 4


def test_splitters(data):
    """Labels and groups reach the splitter."""
    groups = np.arange(N) // 8
    by_class = RegularizationCV(DIAGONAL, GRID, cv=StratifiedKFold(4)).fit(data, np.arange(N) % 3)
    by_group = RegularizationCV(DIAGONAL, GRID, cv=GroupKFold(5)).fit(data, groups=groups)
    every = np.arange(N)
    listed = [(every[every % 4 != i], every[every % 4 == i]) for i in range(2)]
    as_list = RegularizationCV(DIAGONAL, GRID, cv=listed).fit(data)
    assert (by_class.n_splits_, by_group.n_splits_, as_list.n_splits_) == (4, 5, 2)
    fitted = Diagonal(GRID[0], loss="mse").fit(data[listed[0][0]])
    expected = fitted.score_path(data[listed[0][1]], GRID)
    assert np.array_equal(as_list.cv_results_["split0_test_score"], expected)
    assert RegularizationCV(DIAGONAL, GRID).fit(data).n_splits_ == 5


def test_groups_are_routed(data):
    groups = np.arange(N) // 8
    search = RegularizationCV(DIAGONAL, GRID, cv=GroupKFold(5))
    expected = clone(search).fit(data, groups=groups).cv_results_
    with config_context(enable_metadata_routing=True):
        requesting = clone(search.set_fit_request(groups=True))
        assert str(requesting.get_metadata_routing()) == "{'fit': {'groups': True}}"
        pipeline = make_pipeline(requesting, Normalizer()).fit(data, groups=groups)
    found = pipeline[0].cv_results_
    for key in ("split0_test_score", "split4_test_score", "mean_test_score"):
        assert np.array_equal(found[key], expected[key])


def test_behaves_as_the_chosen_estimator(data):
    search = RegularizationCV(EK, GRID, cv=FOLDS).fit(data)
    chosen = EKFAC(search.regularization_, loss="mse").fit(data)
    rows = rows_of(data)
    for found, expected in [
        (search.transform(rows), chosen.transform(rows)),
        (search.inverse_transform(rows), chosen.inverse_transform(rows)),
        (search.mahalanobis(data), chosen.mahalanobis(data)),
        (search.score_samples(data), chosen.score_samples(data)),
        (search.score_path(data, GRID), chosen.score_path(data, GRID)),
        (search.fisher_.to_dense(), chosen.fisher_.to_dense()),
        (influence.self_influence(search, data), influence.self_influence(chosen, data)),
    ]:
        assert np.array_equal(found, expected)
    assert search.score(data) == chosen.score(data)
    assert search.coverage_ == chosen.coverage_
    assert search.n_features_in_ == chosen.n_features_in_ == data.shape[1]
    with pytest.raises(AttributeError, match="'EKFAC' object has no attribute 'predict'"):
        search.predict(data)
    copied = pickle.loads(pickle.dumps(search))
    assert np.array_equal(copied.transform(data), search.transform(data))
    piped = make_pipeline(clone(search), Normalizer()).fit_transform(data)
    assert np.linalg.norm(piped, axis=1) == pytest.approx(np.ones(N))


def test_manners(data):
    inner = EKFAC(5.0, loss="mse")
    search = RegularizationCV(inner, GRID, cv=FOLDS)
    assert search.get_params(deep=False) == {
        "estimator": inner,
        "regularizations": GRID,
        "cv": FOLDS,
    }
    assert search.fit(data) is search
    assert search.estimator is inner
    assert not hasattr(inner, "fisher_")
    assert inner.regularization == 5.0
    assert not hasattr(clone(search), "estimator_")
    assert clone(search).set_params(estimator__fisher="exact").estimator.fisher == "exact"
    assert "RegularizationCV" in search._repr_html_()
    unfitted = RegularizationCV(EKFAC())
    assert not hasattr(unfitted, "regularization_")
    for call in (unfitted.transform, unfitted.inverse_transform, unfitted.score):
        with pytest.raises(NotFittedError):
            call(data)
    with pytest.raises(NotFittedError):
        unfitted.mahalanobis(data)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"regularizations": []}, IFVPUsageError, "at least one number"),
        ({"regularizations": ["auto", 1.0]}, IFVPUsageError, r"\[0\] is 'auto'; expected a number"),
        ({"regularizations": [1.0, -1.0]}, IFVPUsageError, r"\[1\] is -1.0"),
        ({"regularizations": 1.0}, ValueError, "'regularizations' parameter"),
        ({"regularizations": [0.0, 1e-300]}, SingularFisherError, r"singular at 2 of 2 .*larger"),
        ({"estimator": Normalizer()}, ValueError, "'estimator' parameter"),
        ({"cv": "five"}, ValueError, "'cv' parameter"),
        ({"cv": 99}, ValueError, "n_splits=99"),
    ],
)
def test_errors(data, settings, error, message):
    """A failed fit leaves the object as it was."""
    search = RegularizationCV(EXPLICIT, GRID, cv=FOLDS).fit(data)
    before = dict(vars(search))
    with pytest.raises(error, match=message):
        search.set_params(**settings).fit(data)
    assert {**vars(search), **{name: before[name] for name in settings}} == before


def test_data_that_cannot_be_sliced(data):
    with pytest.raises(IFVPUsageError, match="data must be a ModelData"):
        RegularizationCV(EKFAC()).fit(data.model, data.batches())


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([1e2, 1e1, 1.0], "best regularization, 1, is the least of those tried; include smaller"),
        ([1e-9, 1e-8, 1e-7], "1e-07, is the largest of those tried; include larger"),
        ([1e-2, 1e-2 * (1 + 1e-12)], "score alike.*over 3 folds"),
    ],
)
def test_warnings(data, grid, message):
    with pytest.warns(UserWarning, match=message) as caught:
        RegularizationCV(EK, grid, cv=FOLDS).fit(data)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_no_warnings(data):
    """Neither within the grid, nor of a single regularization."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RegularizationCV(EK, GRID[::-1], cv=FOLDS).fit(data)
        RegularizationCV(EK, [0.5], cv=FOLDS).fit(data)


@pytest.mark.parametrize("estimator", [*METHODS[:2], METHODS[3]], ids=repr)
def test_singular_candidates_are_left_out(data, estimator):
    """As by a grid search, which takes what fails for not a number."""
    grid = [1e-300, 1e-2, 1.0, 0.0, 1e2]
    message = "singular at 2 of 5 regularizations, the largest 1e-300; these are not chosen"
    with pytest.warns(UserWarning, match=message) as caught:
        search = RegularizationCV(estimator, grid, cv=FOLDS).fit(data)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = GridSearchCV(estimator, {"regularization": grid}, cv=FOLDS).fit(data)
    for key in ("split0_test_score", "mean_test_score", "rank_test_score", "std_test_score"):
        found = search.cv_results_[key]
        assert found == pytest.approx(expected.cv_results_[key], rel=1e-6, nan_ok=True)
    assert np.isnan(search.cv_results_["mean_test_score"]).tolist() == [
        value < 1e-100 for value in grid
    ]
    assert search.regularization_ == expected.best_params_["regularization"]
    assert search.best_score_ == np.nanmax(search.cv_results_["mean_test_score"])


def test_the_default_grid_on_few_examples():
    torch.manual_seed(0)
    data = ModelData(nn.Linear(4, 3), (3 * torch.randn(12, 4), torch.arange(12) % 3))
    with pytest.warns(UserWarning, match="these are not chosen"):
        search = RegularizationCV(EKFAC(), cv=LeaveOneOut()).fit(data)
    assert np.isfinite(search.transform(data)).all()


class Scripted(BaseEstimator):
    """One whose scores are told, by the first example of a fold."""

    def __init__(self, scores=None, regularization=1.0):
        self.scores = scores
        self.regularization = regularization

    def fit(self, data):
        return self

    def score_path(self, data, regularizations):
        return np.array(self.scores[data.indices[0]])


@pytest.mark.parametrize(("gain", "alike"), [(0.55, True), (0.6, False)])
def test_scores_alike_up_to_their_standard_error(data, gain, alike):
    """That of the best's gain over each other: here 2 / sqrt(3) over sqrt(4) folds, 0.577."""
    every = np.arange(N)
    folds = [(every[every != i], [i]) for i in range(4)]
    gains = [gain + 1, gain - 1, gain + 1, gain - 1]
    scores = {i: [100 * i, 100 * i + gains[i], 100 * i] for i in range(4)}
    search = RegularizationCV(Scripted(scores), [0.1, 1.0, 10.0], cv=folds)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        search.fit(data)
    assert search.regularization_ == 1.0
    assert ["score alike" in str(warning.message) for warning in caught] == [True] * alike


@pytest.mark.parametrize(
    ("middle", "messages"),
    [
        (101.0, ["singular at 1 of 3"]),
        (100.0, ["singular at 1 of 3", "regularizations from 1 to 10 score alike"]),
        (99.0, ["singular at 1 of 3", "is the largest"]),
        (np.nan, ["singular at 2 of 3"]),
    ],
)
def test_warnings_beside_singular_candidates(data, middle, messages):
    """The least that is not singular has no smaller ones to include."""
    search = RegularizationCV(Scripted([[np.nan, middle, 100.0]] * N), [0.1, 1.0, 10.0], cv=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        search.fit(data)
    assert len(caught) == len(messages)
    for warning, message in zip(caught, messages, strict=True):
        assert message in str(warning.message)


@pytest.mark.filterwarnings("ignore")
def test_what_there_is_nothing_to_choose_from():
    data = ModelData(nn.Linear(3, 2), (torch.randn(8, 3), torch.arange(8) % 2))
    with pytest.raises(IFVPUsageError, match=r"cv=\[\] has no folds"):
        RegularizationCV(EKFAC(), [0.1, 1.0], cv=[]).fit(data)
    chosen = RegularizationCV(EKFAC(), [0.1, 1.0], cv=2).fit(data)
    with pytest.raises(IFVPUsageError, match="a RegularizationCV, which has no regularization"):
        RegularizationCV(chosen, [0.1, 1.0], cv=2).fit(data)
