"""Scores of training examples against their definition and their meaning."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from torch.utils.data import DataLoader, default_collate

from fimkit import EKFAC, DataInf, Explicit, IFVPUsageError, ModelData, influence
from fimkit.influence import pairwise_scores, self_influence, top_k
from tests import reference
from tests.cases import BY_NAME, N, mlp, points

REGULARIZATION = 1e-2


@pytest.fixture(params=["mlp", "language model", "LSTM, batch first"])
def case(request):
    return BY_NAME[request.param]


@pytest.fixture
def queries(case):
    """Other examples than those of training, three of them."""
    return case.data(3, torch.Generator().manual_seed(99))


@pytest.fixture
def scored(case, queries):
    model = case.model()
    train = ModelData(model, case.batch(), batch_size=5)
    fitted = Explicit(REGULARIZATION).fit(train)
    return fitted, train, ModelData(model, queries, batch_size=2)


@pytest.fixture
def expected(case, queries):
    """qᵀ (F + λ I)⁻¹ g of every query and training example."""
    model, train = case.model(), case.gradients
    of_queries = reference.gradients(model, case.example_loss, queries, 3)
    return of_queries @ reference.ifvp(train, train, REGULARIZATION).T


def test_pairwise_scores(scored, expected):
    found = pairwise_scores(*scored)
    assert found.shape == (3, N)
    assert found.dtype == np.float64
    assert reference.error(found, expected) <= 1e-9


def test_scores_of_slices(scored, expected):
    fitted, train, queries = scored
    found = pairwise_scores(fitted, train[[7, 2]], queries[1])
    assert reference.error(found, expected[1:2, [7, 2]]) <= 1e-9


@pytest.mark.parametrize("k", [1, 4, N])
@pytest.mark.parametrize("largest", [True, False])
def test_top_k(scored, expected, k, largest):
    indices, scores = top_k(*scored, k, largest=largest)
    assert indices.shape == scores.shape == (3, k)
    order = expected.argsort(1, descending=largest)[:, :k]
    assert indices.tolist() == order.tolist()
    assert reference.error(scores, expected.gather(1, order)) <= 1e-9


@pytest.mark.parametrize("size", [1, 3, N])
@pytest.mark.parametrize("largest", [True, False])
def test_top_k_of_equal_scores(scored, monkeypatch, size, largest):
    """Of equal scores the earliest examples' come first, whatever the batches are."""
    every = torch.randint(3, (3, N), generator=torch.Generator().manual_seed(0)).double()

    def blocks(*arguments):
        for start in range(0, N, size):
            here = slice(start, start + size)
            yield (slice(0, 3), here), every[None, :, here]

    monkeypatch.setattr(influence, "_score_blocks", blocks)
    order = every.sort(dim=1, descending=largest, stable=True)
    for k in range(1, N + 1):
        best = top_k(*scored, k, largest=largest)
        assert best.indices.tolist() == order.indices[:, :k].tolist()
        assert best.scores.tolist() == order.values[:, :k].tolist()


def test_a_table(scored):
    """The columns have a line for each query and rank."""
    best = top_k(*scored, 2)
    indices, scores = best
    columns = best.columns()
    assert list(columns) == ["query", "rank", "train", "score"]
    assert columns["query"].tolist() == [0, 0, 1, 1, 2, 2]
    assert columns["rank"].tolist() == [0, 1, 0, 1, 0, 1]
    assert columns["train"].tolist() == indices.flatten().tolist()
    assert columns["score"].tolist() == scores.flatten().tolist()


def test_progress(scored, capsys):
    """Passes over the data show their progress if the fit was asked to."""
    _, train, queries = scored
    for verbose in (0, 1):
        fitted = Explicit(REGULARIZATION, verbose=verbose).fit(train)
        capsys.readouterr()
        top_k(fitted, train, queries, 2)
        assert ("batches" in capsys.readouterr().err) == bool(verbose)


MEMORY = """
import resource
import sys

import torch
from fimkit import EKFAC, ModelData
from fimkit.influence import top_k

class Made:
    "Examples that are made when asked for."
    def __init__(self, n):
        self.n = n
    def __len__(self):
        return self.n
    def __getitem__(self, i):
        if i >= self.n:
            raise IndexError
        return torch.full((200,), float(i % 13)).cos(), i % 10

torch.manual_seed(0)
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(200, 400), torch.nn.Tanh(), torch.nn.Linear(400, 10))
data = ModelData(model, Made(int(sys.argv[1])), batch_size=64)
fitted = EKFAC(1e-3).fit(data[:256])
def highest():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def score(data):
    top_k(fitted, data, data[:20], 5, measurement="margin", normalization="relatif")
score(data[:256])
before = highest()
score(data)
print(highest() - before)
"""


@pytest.mark.slow
def test_memory_is_independent_of_the_training_set():
    """10,000 examples by 84,410 parameters would take 3.1 GiB in float32."""
    command = [sys.executable, "-W", "ignore", "-c", MEMORY, "10000"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 32  # MiB


def test_self_influence(scored, case):
    """High for the examples that only their own presence explains, never negative."""
    fitted, train, _ = scored
    rows = case.gradients
    expected = (rows * reference.ifvp(rows, rows, REGULARIZATION)).sum(1)
    found = self_influence(fitted, train)
    assert found.shape == (N,)
    assert (found > 0).all()
    assert reference.error(found, expected) <= 1e-9
    diagonal = pairwise_scores(fitted, train, train).diagonal()
    assert reference.error(found, diagonal.copy()) <= 1e-9


def test_an_example_helps_itself(scored):
    fitted, train, _ = scored
    scores = pairwise_scores(fitted, train, train)
    assert (scores.diagonal() > 0).all()
    assert reference.error(scores, scores.T.copy()) <= 1e-9


def test_positive_scores_lower_the_loss_of_the_query(case, queries):
    """A step along (F + λ I)⁻¹ of the training gradient changes the loss by minus the score."""
    model = case.model()
    train = ModelData(model, case.batch())
    fitted = Explicit(REGULARIZATION).fit(train)
    scores = pairwise_scores(fitted, train, ModelData(model, queries))
    parameters = list(model.parameters())
    step = 1e-6
    before = torch.stack([loss_of(model, case, queries, i) for i in range(3)])
    for j in range(0, N, 5):
        directions = torch.as_tensor(fitted.transform(train[j]))[0].split(
            [parameter.numel() for parameter in parameters]
        )
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter -= step * direction.view_as(parameter)
            after = torch.stack([loss_of(model, case, queries, i) for i in range(3)])
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += step * direction.view_as(parameter)
        change = (after - before) / step
        assert torch.allclose(change, -torch.from_numpy(scores[:, j]), rtol=1e-3, atol=1e-4)


def loss_of(model, case, batch, i):
    return case.example_loss(model, reference.take(batch, [i])).detach()


def test_flipped_labels_stand_out():
    """What self-influence is for: of a trained model, wrong labels have the highest scores."""
    generator = torch.Generator().manual_seed(0)
    x, y = points(classes=2)(60, generator)
    y = (x[:, 0] > 0).long()
    flipped = [5, 17, 33]
    y[flipped] = 1 - y[flipped]
    model = mlp(outputs=2).double()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    data = ModelData(model, (x, y))
    scores = self_influence(Explicit().fit(data), data)
    assert sorted(np.argsort(-scores)[:3].tolist()) == flipped


@pytest.mark.parametrize("k", [0, -1, N + 1, 2.0, True, None])
def test_errors_of_k(k):
    case = BY_NAME["mlp"]
    data = ModelData(case.model(), case.batch())
    fitted = Explicit().fit(data)
    with pytest.raises(IFVPUsageError, match=r"from 1 to len\(train\)=12; got"):
        top_k(fitted, data, data, k)


def test_errors_of_data():
    case = BY_NAME["mlp"]
    data = ModelData(case.model(), case.batch())
    fitted = Explicit().fit(data)
    with pytest.raises(IFVPUsageError, match=r"train must be a ModelData.*got list"):
        pairwise_scores(fitted, case.batches(5), data)
    with pytest.raises(IFVPUsageError, match=r"queries must be a ModelData.*got Tensor"):
        pairwise_scores(fitted, data, case.gradients)
    with pytest.raises(IFVPUsageError, match=r"data must be a ModelData.*got Tensor"):
        self_influence(fitted, case.gradients)
    for train, queries, name in ((None, data, "train"), (data, None, "queries")):
        with pytest.raises(IFVPUsageError, match=f"{name} must be a ModelData.*got NoneType"):
            top_k(fitted, train, queries, 1)
    for train, queries, name in ((data[:0], data, "train"), (data, data[:0], "queries")):
        with pytest.raises(IFVPUsageError, match=f"^{name} has no examples"):
            pairwise_scores(fitted, train, queries)
    other = ModelData(mlp(False).double(), case.batch())
    with pytest.raises(IFVPUsageError, match="other trainable parameters than the one fitted"):
        pairwise_scores(fitted, other, data)


@pytest.mark.parametrize("method", [Explicit, EKFAC, DataInf])
@pytest.mark.parametrize("normalization", [None, "relatif"])
def test_scores_that_overflow(method, normalization):
    """Gradients of 1e19 are finite in float32, and products of two of them are not."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, 5, generator=generator)
    weights = torch.rand(20, 3, 2, generator=generator)
    model = torch.nn.Linear(5, 2)

    def loss(model, batch):
        return (model(batch[0]) * batch[1]).sum((1, 2))

    data, big, huge = (
        ModelData(model, (size * x, weights), batch_size=7) for size in (0.01, 1e19, 1e37)
    )
    fitted = method(1e-3, loss=loss).fit(data)
    exact = method(1e-3, loss=loss, dtype=torch.float64).fit(data)
    options = {"normalization": normalization}
    for score in (
        lambda e: pairwise_scores(e, big, big[:3], **options),
        lambda e: sum(influence.layer_scores(e, big, big[:3], **options).values()),
        lambda e: influence.token_scores(e, big, big[:3], **options).scores,
        lambda e: top_k(e, big, big[:3], 2, **options).scores,
    ):
        with pytest.raises(IFVPUsageError, match=r"finite.*train\[0:7\] overflow.*torch\.float64"):
            score(fitted)
        assert np.isfinite(score(exact)).all()
    assert np.isfinite(self_influence(fitted, big)).all()  # in float64 as it is
    with pytest.raises(IFVPUsageError, match=r"finite.*queries\[0:3\] overflow"):
        pairwise_scores(fitted, data, huge[:3], **options)
    with pytest.raises(IFVPUsageError, match=r"finite.*data\[0:20\] overflow"):
        self_influence(exact, ModelData(model.double(), (1e170 * x.double(), weights.double())))


def test_estimators_in_other_hands():
    """A frozen estimator stands in for the one inside; a pipeline or a search does not."""
    case = BY_NAME["mlp"]
    data = ModelData(case.model(), case.batch())
    fitted = Explicit(REGULARIZATION).fit(data)
    frozen = FrozenEstimator(fitted)
    assert np.array_equal(pairwise_scores(frozen, data, data), pairwise_scores(fitted, data, data))
    assert np.array_equal(self_influence(frozen, data), self_influence(fitted, data))
    search = GridSearchCV(Explicit(), {"regularization": [1.0]}, cv=2).fit(data)
    for other in (search, make_pipeline(fitted), None):
        for score in (lambda e: pairwise_scores(e, data, data), lambda e: self_influence(e, data)):
            with pytest.raises(
                IFVPUsageError, match=r"of fimkit; got .*as search\.best_estimator_"
            ):
                score(other)
    pairwise_scores(search.best_estimator_, data, data)
    for score in (lambda e: pairwise_scores(e, data, data), lambda e: self_influence(e, data)):
        with pytest.raises(IFVPUsageError, match=r"the class EKFAC.*EKFAC\(\)\.fit\(train\)"):
            score(EKFAC)
    with pytest.raises(NotFittedError):
        pairwise_scores(Explicit(), data, data)


def test_a_collate_function_that_drops_examples():
    """No score may belong to another example, or to none."""
    case = BY_NAME["mlp"]
    model, examples = case.model(), list(zip(*case.batch(), strict=True))
    loader = DataLoader(examples, 4, collate_fn=lambda items: default_collate(items[1:]))
    fitted = Explicit(REGULARIZATION).fit(model, loader)
    data = ModelData(model, loader)
    for ask in (
        lambda: pairwise_scores(fitted, data, data),
        lambda: top_k(fitted, data, data, 3),
        lambda: self_influence(fitted, data),
        lambda: fitted.transform(data),
        lambda: Explicit(REGULARIZATION).fit(data),
    ):
        with pytest.raises(IFVPUsageError, match="batch 0: 4 examples of the ModelData gave 3"):
            ask()


def test_a_measurement_of_part_of_the_batch(scored):
    def first_only(model, batch):
        return sum(parameter.sum() for parameter in model.parameters())[None]

    with pytest.raises(IFVPUsageError, match=r"batch 0: .*=first_only .* for 2 examples"):
        pairwise_scores(*scored, measurement=first_only)
