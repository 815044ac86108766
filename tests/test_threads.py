"""Several threads, or processes, with one model: everyone's numbers are as if alone."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import joblib
import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV, KFold
from torch import nn
from torch.utils.data import Dataset

from fimkit import EKFAC, KFAC, DataInf, Diagonal, Explicit, ModelData, RegularizationCV
from tests import state

N = 12


class Scaled(nn.Module):
    """A network whose scale no rule covers, so that torch.func changes it in place."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.scale = nn.Parameter(torch.tensor([0.5, 1.0, -2.0, 3.0]))
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        hidden = self.norm(torch.atan2(self.first(x), self.scale))  # a function without a rule
        return self.last(self.dropout(hidden))


@pytest.fixture
def data():
    model = Scaled().double()
    model.train()
    model.norm.eval()
    x = torch.randn(N, 3, dtype=torch.float64)
    return ModelData(model, (x, torch.arange(N) % 3), batch_size=5)


@pytest.fixture
def _switching():
    """Switch threads as often as possible."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


METHODS = [Explicit(1e-2), DataInf(1e-2), EKFAC(1e-2), KFAC(1e-2), Diagonal(1e-2)]


@pytest.mark.usefixtures("_switching")
def test_40_concurrent_gradient_calls(data):
    fitted = Explicit(1e-2).fit(data)
    assert fitted.coverage_["scale"] == "torch.func"
    parts = [data[i % N :] for i in range(40)]
    expected = [fitted.transform(part) for part in parts]
    with state.unchanged(data.model), ThreadPoolExecutor(8) as pool:
        found = list(pool.map(fitted.transform, parts))
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one, other)


@pytest.mark.usefixtures("_switching")
@pytest.mark.parametrize("estimator", METHODS, ids=repr)
def test_concurrent_fits(data, estimator):
    parts = [data[i:] for i in range(8)]

    def answer(part):
        return clone(estimator).fit(part).transform(data)

    expected = [answer(part) for part in parts]
    with state.unchanged(data.model), ThreadPoolExecutor(4) as pool:
        found = list(pool.map(answer, parts))
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one, other)


@pytest.mark.usefixtures("_switching")
@pytest.mark.parametrize("estimator", METHODS, ids=repr)
def test_concurrent_dampings(data, estimator):
    """One operator asked with many λ, of which it keeps one factor."""
    operator = clone(estimator).fit(data).fisher_
    vectors = torch.randn(5, operator.size, dtype=torch.float64)
    dampings = [10.0 ** (-i % 5) for i in range(40)]
    expected = [operator.matmul(operator.solve(vectors, d), d) for d in dampings]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda d: operator.matmul(operator.solve(vectors, d), d), dampings))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", ["threading", "loky"])
def test_searches_in_parallel(data, backend):
    folds = KFold(3, shuffle=True, random_state=0)
    grid = {"regularization": ["auto", 1e-2, 1.0], "fisher": ["empirical", "exact"]}
    alone = GridSearchCV(EKFAC(), grid, cv=folds, error_score="raise").fit(data)
    with joblib.parallel_backend(backend), state.unchanged(data.model):
        together = GridSearchCV(EKFAC(), grid, cv=folds, error_score="raise", n_jobs=2).fit(data)
    scores = [key for key in alone.cv_results_ if key.endswith("_test_score")]
    assert len(scores) == 6
    for key in scores:
        assert np.array_equal(together.cv_results_[key], alone.cv_results_[key])
    assert together.best_params_ == alone.best_params_


@pytest.mark.parametrize("backend", ["threading", "loky"])
def test_searches_in_parallel_with_as_many_threads(backend):
    """Then sums of float32 are rounded alike."""
    threads = {"inner_max_num_threads": torch.get_num_threads()} if backend == "loky" else {}
    model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    x, y = load_digits(return_X_y=True)
    data = ModelData(model, (np.float32(x / 16), y))
    search = GridSearchCV(EKFAC(), {"regularization": [1e-4, 1.0]}, cv=2, error_score="raise")
    alone = search.fit(data).cv_results_["mean_test_score"]
    with joblib.parallel_config(backend, **threads):
        together = clone(search).set_params(n_jobs=2).fit(data).cv_results_["mean_test_score"]
    assert np.array_equal(together, alone)


def test_others_have_their_turn_between_batches(data):
    """Whoever reads gradients slowly, or stops reading, keeps nobody waiting."""
    fitted = Explicit(1e-2).fit(data)
    with state.unchanged(data.model):
        reading = fitted.gradients(data)
        first = next(reading)
        answers = []
        other = threading.Thread(target=lambda: answers.append(EKFAC().fit(data)))
        other.start()
        other.join(60)
        assert len(answers) == 1
        assert [first.n, *(rows.n for rows in reading)] == [5, 5, 2]


def test_between_batches_the_model_is_as_it_was(data):
    fitted = Explicit(1e-2).fit(data)
    before = state.of_model(data.model), torch.get_rng_state()
    for _ in fitted.gradients(data):
        assert state.differences(before[0], state.of_model(data.model)) == []
        assert torch.equal(torch.get_rng_state(), before[1])


class Noisy(Dataset):
    """Examples with noise of their own from torch's global state."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index] + torch.randn(3, dtype=torch.float64), self.y[index]


def test_random_numbers_go_on_between_batches(data):
    fitted = Explicit(1e-2).fit(data)
    noisy = Noisy(*data.dataset.tensors)
    whole = fitted.transform(ModelData(data.model, noisy, batch_size=N))
    assert np.abs(whole - fitted.transform(data)).max() > 1e-3
    in_parts = fitted.transform(ModelData(data.model, noisy, batch_size=5))
    assert np.allclose(in_parts, whole, rtol=1e-12)


class Uncopyable(Scaled):
    def __deepcopy__(self, memo):
        raise AssertionError("the model is copied")

    __copy__ = __reduce_ex__ = __deepcopy__


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_no_search_copies_the_model(data, n_jobs):
    shared = ModelData(Uncopyable().double(), data.dataset.tensors)
    grid = {"regularization": [1e-2, 1.0]}
    with joblib.parallel_backend("threading"):
        search = GridSearchCV(EKFAC(), grid, cv=3, n_jobs=n_jobs, error_score="raise").fit(shared)
    assert search.best_estimator_.n_samples_seen_ == N
    chosen = RegularizationCV(clone(search.best_estimator_), [1e-2], cv=3).fit(shared)
    assert clone(chosen).set_params(cv=2).fit(shared).n_samples_seen_ == N
