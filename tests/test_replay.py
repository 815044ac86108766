"""Two passes over the same data: whatever is kept, and in whatever pieces it comes."""

import gc
import random
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import dropout
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    TensorDataset,
)

from fimkit import IFVPUsageError, ModelData
from fimkit.estimators.ekfac import EKFAC, KFAC, Diagonal
from fimkit.gradients import GroupGradients, engine
from fimkit.losses import CrossEntropy
from fimkit.operators import memory
from tests import kronecker_reference as kronecker
from tests import reference
from tests.cases import BY_NAME, Apply, N, split
from tests.state import differences, of_torch, unchanged
from tests.test_ekfac import SITUATIONS, Recording, blocks_of, difference

CASE = SITUATIONS["linear"]
SOME = [
    "linear",
    "few positions",
    "many positions",
    "convolution in 2-D",
    "table looked up twice",
    "tied table",
    "transposed weights",
    "called twice",
    "shared weight",
]
BUDGETS = {"nothing is kept": 0, "some is kept": 2000, "all is kept": 2**30}

parametrize_budgets = pytest.mark.parametrize("budget", BUDGETS.values(), ids=list(BUDGETS))


def same(found, expected, tolerance=1e-10):
    assert set(found.eigenvalues_) == set(expected.eigenvalues_)
    return difference(found.fisher_.to_dense(), expected.fisher_.to_dense()) <= tolerance


def counted(case=CASE):
    """Return the case's model, and the sizes of the batches that it runs on.

    Single examples, which checks are made with, do not count.
    """
    inner, calls = case.model(), []

    def forward(self, *inputs):
        if len(inputs[0]) > 1:
            calls.append(len(inputs[0]))
        return self.inner(*inputs)

    return Apply(forward, inner=inner), calls


# -- the same for every division -------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, 2**30])
@pytest.mark.parametrize("fisher", ["empirical", "mc"])
@pytest.mark.parametrize("name", SOME)
def test_batches_and_order_do_not_matter(name, fisher, budget):
    case = SITUATIONS[name]
    settings = {"fisher": fisher, "random_state": 1, "n_mc_samples": 2}
    expected = EKFAC(**settings).fit(case.model(), [case.batch()])
    for sizes in ((1,), (5,), (7, 1, 4)):
        fitted = EKFAC(cache_budget=budget, **settings).fit(case.model(), case.batches(*sizes))
        assert fitted.n_samples_seen_ == N
        assert same(fitted, expected, 1e-9)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2)).tolist()
    x, y = case.batch()
    loader = DataLoader(TensorDataset(x, y), batch_size=5, sampler=order)
    assert same(EKFAC(cache_budget=budget, **settings).fit(case.model(), loader), expected, 1e-9)


@pytest.mark.parametrize("method", [EKFAC, KFAC])
@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("chunk", [1, 2000])
def test_chunks_do_not_matter(name, fisher, method, chunk, monkeypatch):
    case = SITUATIONS[name]
    expected = method(fisher=fisher).fit(case.model(), case.batches(7))
    monkeypatch.setattr(memory, "BUDGET", chunk)
    monkeypatch.setattr(memory, "WORKING_SET", chunk)
    assert same(method(fisher=fisher).fit(case.model(), case.batches(7)), expected, 1e-9)


@pytest.mark.parametrize("name", ["cnn", "language model", "self-attention, time first", "GRU"])
def test_budgets_do_not_matter_with_other_parameters(name):
    """Blocks and diagonals are of the first pass only."""
    case = BY_NAME[name]
    fits = [
        EKFAC(cache_budget=budget).fit(case.model(), case.batches(5)) for budget in BUDGETS.values()
    ]
    assert same(fits[0], fits[2])
    assert same(fits[1], fits[2])


# -- what is kept ----------------------------------------------------------------------------------


def test_forward_passes():
    """One for each batch that is kept, else two; of layers without a second pass always one."""
    x, y = CASE.batch(N)
    batches = split((x, y), N, 3)
    calls = {}
    for name, budget in BUDGETS.items():
        model, calls[name] = counted()
        EKFAC(cache_budget=budget).fit(model, batches)
    assert calls["all is kept"] == [3] * 4
    assert calls["nothing is kept"] == [3] * 8
    assert 4 < len(calls["some is kept"]) < 8
    model, once = counted()
    KFAC().fit(model, batches)
    assert once == [3] * 4


@pytest.mark.parametrize("method", [Diagonal, KFAC, EKFAC])
def test_gradients_of_earlier_batches_are_gone_before_the_next_forward_pass(method):
    """Unless they are kept on purpose, only one batch's take memory at a time."""
    gc.collect()  # what other tests left
    model = nn.Linear(5, 3)
    x, y = torch.randn(12, 5), torch.arange(12) % 3
    living = []

    def count(module, inputs):
        if len(inputs[0]) == 3:  # a whole batch, not an example on its own
            living.append(sum(type(o) is GroupGradients for o in gc.get_objects()))

    model.register_forward_pre_hook(count)
    lean = {"cache_budget": 0} if method is EKFAC else {}
    method(regularization=0.1, **lean).fit(model, split((x, y), 12, 3))
    assert len(living) >= 4
    assert not any(living)


def sometimes_turned(self, x, turn):
    """Take positions first in some batches, as numbers say, and draw random numbers."""

    def turned(h):
        return torch.where(turn.any(), h.transpose(0, 1), h) if len(h) == h.shape[1] else h

    torch.rand(3)
    return self.second(turned(self.first(turned(x)).tanh()).sum(1))


def sometimes_turning():
    layers = {"first": nn.Linear(5, 3), "second": nn.Linear(3, 3)}
    return Apply(sometimes_turned, **layers).double()


class Turning(Dataset):
    """Sequences with noise, which every other four of a model take positions first."""

    def __len__(self):
        return 16

    def __getitem__(self, i):
        return torch.randn(4, 5, dtype=torch.float64), torch.tensor(i // 4 % 2 == 1), i % 3


@pytest.mark.parametrize("fisher", ["empirical", "mc", "exact"])
def test_places_are_looked_at_in_the_first_pass_only(fisher, monkeypatch):
    """Also where they are others than before: the batch then runs again, alike."""
    model = sometimes_turning()
    checks = []

    class Watched(engine.PlacesCheck):
        def holds(self, signals):
            checks.append(super().holds(signals))
            return checks[-1]

    monkeypatch.setattr(engine, "PlacesCheck", Watched)
    kept, lean = EKFAC(fisher=fisher, random_state=0), EKFAC(fisher=fisher, random_state=0)
    for estimator, budget in ((kept, 2**30), (lean, 0)):
        checks.clear()
        torch.manual_seed(0)
        estimator.set_params(cache_budget=budget).fit(model, DataLoader(Turning(), 4))
        assert checks == [False, False, False]
    assert same(lean, kept)


class OfItsOwn(CrossEntropy):
    """A loss that draws labels from the global numbers."""

    def sample(self, outputs, targets, uniforms):
        return torch.multinomial(outputs.softmax(1), 1)[:, 0]


def test_numbers_that_a_loss_draws_before_its_batch_runs_again():
    """They come again in the second pass, and so do those of later batches."""
    model = sometimes_turning()

    def fit(budget):
        torch.manual_seed(0)
        ekfac = EKFAC(loss=OfItsOwn(), fisher="mc", random_state=0, cache_budget=budget)
        return ekfac.fit(model, DataLoader(Turning(), 4))

    assert same(fit(0), fit(2**30))


def test_a_batch_that_runs_again_takes_memory_once():
    """And the model is given other tensors, should it know these by their graph."""
    model = sometimes_turning()
    inputs, living, given = [], [], []

    def before(module, args):
        if len(args[0]) == 4:
            living.append(any(reference() is not None for reference in inputs))
            given.append(args[0])
            inputs.clear()

    def keep(module, args):
        inputs.append(weakref.ref(args[0].untyped_storage()))

    model.register_forward_pre_hook(before)
    model.second.register_forward_pre_hook(keep)
    batches = list(DataLoader(Turning(), 4))
    Diagonal().fit(model, batches)
    assert len(given) >= 7  # each but the first one twice
    assert not any(living)
    assert len({id(x) for x in given}) == len(given)


def test_nothing_to_pass_over_again():
    """Of parameters in no Kronecker layer."""
    case = BY_NAME["language model"]
    model, calls = counted(case)
    settings = {"parameters": ["*norm*", "*final*"], "cache_budget": 0}
    fitted = EKFAC(**settings).fit(model, iter(case.batches(5)))
    assert len(calls) == 3
    assert fitted.eigenvalues_ == {}


class Once:
    """An iterable that can be iterated over once and does not say so."""

    def __init__(self, batches):
        self.batches = iter(batches)

    def __iter__(self):
        return self.batches


def test_data_that_come_once():
    expected = EKFAC().fit(CASE.model(), CASE.batches(5))
    assert same(EKFAC().fit(CASE.model(), iter(CASE.batches(5))), expected)
    assert same(EKFAC().fit(CASE.model(), Once(CASE.batches(5))), expected)
    assert same(
        EKFAC(cache_budget=10**5).fit(CASE.model(), (batch for batch in CASE.batches(5))), expected
    )
    for budget in (0, 2000):
        message = f"cache_budget={budget} bytes.*iterator.*DataLoader or a list"
        with pytest.raises(IFVPUsageError, match=message):
            EKFAC(cache_budget=budget).fit(CASE.model(), iter(CASE.batches(5)))
    for budget, kept in ((0, 0), (2000, 1)):
        message = f"there are fewer batches: {kept} at most, instead of 3"
        with pytest.raises(IFVPUsageError, match=message):
            EKFAC(cache_budget=budget).fit(CASE.model(), Once(CASE.batches(5)))
    KFAC().fit(CASE.model(), iter(CASE.batches(5)))  # one pass is enough


class Refilled:
    """A loader that puts every batch into the same tensors."""

    def __init__(self, x, y, size, shared=False):
        self.x, self.y, self.size, self.shared = x, y, size, shared

    def __iter__(self):
        if self.shared:  # with memory that torch does not watch
            array = np.zeros((self.size, *self.x.shape[1:]))
            x = torch.from_numpy(array)
        else:
            x = torch.empty_like(self.x[: self.size])
            array = x
        y = torch.empty_like(self.y[: self.size])
        for start in range(0, len(self.x), self.size):
            array[:] = self.x[start : start + self.size]
            y[:] = self.y[start : start + self.size]
            yield x, y


@parametrize_budgets
@pytest.mark.parametrize("shared", [False, True])
def test_batches_that_are_filled_again(shared, budget):
    """What is kept of a batch does not change with the tensors that it came in."""
    x, y = CASE.batch()
    expected = EKFAC().fit(CASE.model(), split((x, y), N, 4))
    loader = Refilled(x, y, 4, shared)
    assert same(EKFAC(cache_budget=budget).fit(CASE.model(), loader), expected)


# -- randomness ------------------------------------------------------------------------------------


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


class Noisy(Dataset):
    """Examples with noise, drawn anew on each access."""

    def __init__(self, draw):
        self.x, self.y = CASE.batch()
        self.draw = draw
        self.generator = getattr(draw, "generator", None)

    def __len__(self):
        return N

    def __getitem__(self, index):
        return self.x[index] + self.draw(self.x[index].shape), self.y[index]


class Stream(IterableDataset):
    """Noisy examples in an order, without a length."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return (self.data[i] for i in range(len(self.data)))


def torch_noise(shape):
    return torch.randn(shape, dtype=torch.float64)


class SeededNoise:
    """Noise of a torch generator."""

    def __init__(self):
        self.generator = seeded()

    def __call__(self, shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)


def collated(examples):
    x, y = torch.utils.data.default_collate(examples)
    return x + 0.5 * torch.rand(len(x), 1, dtype=torch.float64), y


PLAIN = TensorDataset(*CASE.batch())
LOADERS = {
    "shuffled by a generator": lambda: DataLoader(PLAIN, 5, shuffle=True, generator=seeded()),
    "shuffled by torch's random state": lambda: DataLoader(PLAIN, 5, shuffle=True),
    "a sampler's generator": lambda: DataLoader(
        PLAIN, 5, sampler=RandomSampler(PLAIN, generator=seeded())
    ),
    "a generator besides the sampler's": lambda: DataLoader(
        PLAIN, 5, sampler=RandomSampler(PLAIN, generator=seeded()), generator=seeded(6)
    ),
    "a batch sampler's generator": lambda: DataLoader(
        PLAIN, batch_sampler=BatchSampler(RandomSampler(PLAIN, generator=seeded()), 5, False)
    ),
    "a generator inside a sampler of batches": lambda: DataLoader(
        PLAIN,
        batch_size=None,
        sampler=BatchSampler(RandomSampler(PLAIN, generator=seeded()), 5, False),
    ),
    "shuffled, with persistent workers": lambda: DataLoader(
        PLAIN, 5, shuffle=True, num_workers=2, persistent_workers=True
    ),
    "with replacement": lambda: DataLoader(
        PLAIN, 5, sampler=RandomSampler(PLAIN, replacement=True, num_samples=N)
    ),
    "noise": lambda: DataLoader(Noisy(torch_noise), 5, shuffle=True),
    "noise by a generator of the order": lambda: DataLoader(
        Noisy(torch_noise), 5, shuffle=True, generator=seeded()
    ),
    "noise in a worker": lambda: DataLoader(
        Noisy(torch_noise), 5, num_workers=1, generator=seeded()
    ),
    "noise in two workers": lambda: DataLoader(Noisy(torch_noise), 5, num_workers=2, shuffle=True),
    "noise of a stream": lambda: DataLoader(Stream(Noisy(torch_noise)), 5),
    "noise of a dataset's generator": lambda: DataLoader(Noisy(SeededNoise()), 5),
    "noise of a collate function": lambda: DataLoader(PLAIN, 5, collate_fn=collated),
    "noise of a ModelData": lambda: ModelData(CASE.model(), Noisy(torch_noise), batch_size=5),
}


def fit(data, **settings):
    """Fit from one random state, which is left as it is; a ModelData brings its model."""
    torch.manual_seed(7)
    given = (data,) if isinstance(data, ModelData) else (CASE.model(), data)
    with unchanged():
        return EKFAC(**settings).fit(*given)


@pytest.mark.parametrize("fisher", ["empirical", "mc"])
@pytest.mark.parametrize("name", LOADERS)
def test_random_states_are_replayed(name, fisher):
    """The second pass meets the batches of the first, and the labels drawn for them."""
    settings = {"fisher": fisher, "random_state": 1}
    expected = fit(LOADERS[name](), **settings)
    for budget in (0, 1000):
        found = fit(LOADERS[name](), cache_budget=budget, **settings)
        assert found.n_samples_seen_ == N
        assert same(found, expected)


@parametrize_budgets
def test_generator_goes_on_as_after_one_pass(budget):
    """A user's next epoch is the one that follows the fit's, however many passes it made."""
    generator = seeded()
    loader = DataLoader(PLAIN, 5, shuffle=True, generator=generator)
    list(loader)
    after_one = generator.get_state()
    generator.manual_seed(5)
    fit(loader, cache_budget=budget)
    assert torch.equal(generator.get_state(), after_one)


def numpy_noise(shape):
    return torch.from_numpy(np.random.standard_normal(shape))  # noqa: NPY002


def python_noise(shape):
    return torch.tensor([random.gauss() for _ in range(shape.numel())]).view(shape)


@pytest.fixture
def seeded_globally():
    """Return a function that seeds Python's and NumPy's random numbers, as before at the end."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002

    def seed():
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch.manual_seed(1)

    yield seed
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("draw", [numpy_noise, python_noise])
def test_random_states_of_python_and_numpy_are_replayed(draw, workers, seeded_globally):
    """And go on as after one pass, however many were made; torch's is left as it was."""
    loader = DataLoader(Noisy(draw), 5, shuffle=True, num_workers=workers)
    seeded_globally()
    before = of_torch()
    list(loader)
    after_one = {**of_torch(), "torch": before["torch"]}
    fits = []
    for budget in BUDGETS.values():
        seeded_globally()
        fits.append(EKFAC(cache_budget=budget).fit(CASE.model(), loader))
        assert differences(after_one, of_torch()) == []
    assert same(fits[0], fits[2])
    assert same(fits[1], fits[2])
    seeded_globally()
    random.seed(2)
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002
    assert not same(EKFAC().fit(CASE.model(), loader), fits[2], 1e-3)


@pytest.mark.parametrize("data", ["list", "loader", "ModelData"])
def test_labels_are_drawn_alike(data):
    """Both passes of a shuffled loader get the same labels, example by example."""
    loss = Recording()
    given = {
        "list": CASE.batches(5),
        "loader": DataLoader(PLAIN, 5, shuffle=True, generator=seeded()),
        "ModelData": ModelData(CASE.model(), CASE.batch(), batch_size=5),
    }[data]
    fit(given, loss=loss, fisher="mc", n_mc_samples=2, random_state=3, cache_budget=0)
    assert len(loss.drawn) == 2 * 2 * 3
    first, second = loss.drawn[:6], loss.drawn[6:]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len({tuple(labels.tolist()) for labels in first}) > 3


def test_trace_of_replayed_labels():
    """The second pass would not give the Fisher's trace with labels of its own."""
    loss = Recording()
    batches = CASE.batches(5)
    fitted = EKFAC(loss=loss, fisher="mc", random_state=3, cache_budget=0)
    model = CASE.model()
    fitted.fit(model, batches)
    scalars = kronecker.at_labels(CASE.example_loss, [[y] for part in loss.drawn[:3] for y in part])
    examples = [reference.take(CASE.batch(), [i]) for i in range(N)]
    rows = kronecker.rows(model, scalars, examples)
    for columns, operator in blocks_of(fitted).values():
        expected = float(rows[:, columns].square().sum() / N)
        assert operator.trace() == pytest.approx(expected, rel=1e-10)


# -- data that change ------------------------------------------------------------------------------


class Changing:
    """A list of batches that is another one each time."""

    def __init__(self, *passes):
        self.passes = list(passes)

    def __iter__(self):
        return iter(self.passes.pop(0))


def shifted(batches, i, by=0.1):
    out = list(batches)
    out[i] = (out[i][0] + by, out[i][1])
    return out


PLAIN_BATCHES = CASE.batches(4)
CHANGES = {
    "first batch": (0, shifted(PLAIN_BATCHES, 0), "batch 0 has other losses"),
    "last batch": (0, shifted(PLAIN_BATCHES, 2), "batch 2 has other losses"),
    "labels": (
        0,
        [PLAIN_BATCHES[0], (PLAIN_BATCHES[1][0], PLAIN_BATCHES[2][1]), PLAIN_BATCHES[2]],
        "batch 1 has other losses",
    ),
    "order": (0, PLAIN_BATCHES[::-1], "batch 0 has other losses"),
    "one more batch": (0, [*PLAIN_BATCHES, PLAIN_BATCHES[0]], "more batches than 3"),
    "one batch less": (0, PLAIN_BATCHES[:2], "fewer batches: 2 at most, instead of 3"),
    "none": (0, [], "fewer batches: 0 at most, instead of 3"),
    "other sizes": (0, CASE.batches(3, 5, 4), "batch 0 has other losses"),
    "by little": (0, shifted(PLAIN_BATCHES, 1, 1e-4), "batch 1 has other losses"),
    "some kept": (2000, shifted(PLAIN_BATCHES, 2), "batch 2 has other losses"),
    "some kept, none again": (2000, [], "fewer batches: 2 at most, instead of 3"),
    "some kept, one more batch": (2000, [*PLAIN_BATCHES, PLAIN_BATCHES[0]], "more batches than 3"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_data_are_refused(change):
    budget, second, message = CHANGES[change]
    model = CASE.model()
    fitted = EKFAC(0.5).fit(model, PLAIN_BATCHES)
    before = dict(vars(fitted))
    fitted.set_params(cache_budget=budget)
    with unchanged(model), pytest.raises(IFVPUsageError, match=message) as caught:
        fitted.fit(model, Changing(PLAIN_BATCHES, second))
    assert "second pass over the data differs from the first" in str(caught.value)
    assert "cache_budget" in str(caught.value)
    assert {**vars(fitted), "cache_budget": 2**30} == before


def test_changed_data_are_met_once_where_all_is_kept():
    fitted = EKFAC().fit(CASE.model(), Changing(PLAIN_BATCHES))
    assert same(fitted, EKFAC().fit(CASE.model(), PLAIN_BATCHES))


class OwnGenerator:
    """Noise of a generator that nobody else knows of."""

    def __init__(self):
        self.generator = np.random.default_rng(0)

    def __call__(self, shape):
        return torch.from_numpy(self.generator.standard_normal(shape))


class OwnOrder(Sampler):
    """An order of a generator that is not torch's."""

    def __init__(self):
        self.generator = np.random.default_rng(0)

    def __len__(self):
        return N

    def __iter__(self):
        return iter(self.generator.permutation(N).tolist())


@pytest.mark.parametrize(
    "loader",
    [
        lambda: DataLoader(Noisy(OwnGenerator()), 5),
        lambda: DataLoader(PLAIN, 5, sampler=OwnOrder()),
        lambda: DataLoader(Noisy(torch_noise), 5, num_workers=1, persistent_workers=True),
    ],
    ids=["noise", "order", "a worker that goes on"],
)
def test_random_numbers_that_cannot_be_replayed(loader):
    """Refused, not wrong, and fine where one pass is enough."""
    message = r"batch 0 has other losses\. .*numpy\.random are repeated, no others"
    with pytest.raises(IFVPUsageError, match=message):
        EKFAC(cache_budget=0).fit(CASE.model(), loader())
    assert EKFAC().fit(CASE.model(), loader()).n_samples_seen_ == N


def headless(dtype=torch.float64):
    """A model that gives all inputs the same outputs, as before its head is trained."""
    model = CASE.model().to(dtype)
    nn.init.zeros_(model[-1].weight)
    nn.init.zeros_(model[-1].bias)
    return model


class OwnLabels(OwnOrder):
    """Labels in an order of that kind."""

    def __iter__(self):
        x, y = CASE.batch()
        return iter(split((x, y[list(super().__iter__())]), N, 5))


class OwnNoise(nn.Module):
    """A model with noise that nobody else knows of, before its head or after it."""

    def __init__(self, inner, place):
        super().__init__()
        self.inner, self.place = inner, place
        self.generator = torch.Generator()
        self.generator.manual_seed(0)

    def forward(self, x):
        for i, layer in enumerate(self.inner):
            if i == self.place:
                x = x * torch.rand(x.shape, generator=self.generator, dtype=x.dtype)
            x = layer(x)
        return x * torch.rand(x.shape, generator=self.generator) if self.place is None else x


def as_dtype(batches, dtype):
    return [(x.to(dtype), y) for x, y in batches]


CONSTANT_LOSSES = {
    "noise in data": (lambda: DataLoader(Noisy(OwnGenerator()), 5), headless),
    "order": (lambda: DataLoader(PLAIN, 5, sampler=OwnOrder()), headless),
    "labels": (OwnLabels, headless),
    "noise in the model": (lambda: CASE.batches(5), lambda: OwnNoise(headless(), 0)),
    "noise before the head": (lambda: CASE.batches(5), lambda: OwnNoise(headless(), 4)),
    "noise after the head": (lambda: CASE.batches(5), lambda: OwnNoise(headless(), None)),
}


@pytest.mark.parametrize("budget", [0, 1500])
@pytest.mark.parametrize("name", CONSTANT_LOSSES)
def test_what_losses_do_not_tell(name, budget):
    """A head of zeros gives the same losses whatever comes; layers' inputs and gradients tell."""
    data, model = CONSTANT_LOSSES[name]
    message = r"batch \d has other (inputs of|gradients at) layers"
    with pytest.raises(IFVPUsageError, match=message):
        EKFAC(cache_budget=budget).fit(model(), data())
    assert EKFAC().fit(model(), data()).n_samples_seen_ == N


@pytest.mark.parametrize("times", [(1, 2), (2, 1)])
def test_batches_that_meet_layers_more_or_less_often_than_before(times):
    def forward(self, x, times):
        for _ in range(int(times[0])):
            x = self.layer(x).tanh()
        return x

    x, y = torch.randn(4, 3), torch.arange(4) % 3
    changed = Changing(*([(x, torch.tensor([n] * 4), y)] for n in times))
    with pytest.raises(IFVPUsageError, match="batch 0 has other losses"):
        EKFAC(cache_budget=0).fit(Apply(forward, layer=nn.Linear(3, 3)), changed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_losses_do_not_tell_in_coarser_dtypes(dtype):
    batches = as_dtype(PLAIN_BATCHES, dtype)
    model = headless(dtype)
    changed = Changing(batches, as_dtype(PLAIN_BATCHES[::-1], dtype))
    with pytest.raises(IFVPUsageError, match="batch 0 has other inputs of layers"):
        EKFAC(cache_budget=0).fit(model, changed)
    # Rounding is not told from the same: kernels may add up in any order.
    near = [(x * (1 + torch.finfo(dtype).eps * torch.randn_like(x).sign()), y) for x, y in batches]
    assert EKFAC(cache_budget=0).fit(model, Changing(batches, near)).n_samples_seen_ == N


def test_gradients_that_are_rounding_errors_are_not_compared():
    """Of examples fitted perfectly; the largest gradients tell what is small."""
    x, y = (part[:4] for part in CASE.batch())
    model = nn.Sequential(nn.Linear(5, 3, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.linalg.lstsq(x, 30 * torch.eye(3, dtype=x.dtype)[y])[0].T)
    x = x.float()
    assert model(x).argmax(1).tolist() == y.tolist()
    batches = [(x, y), (x, (y + 1) % 3)]
    again = [(x * (1 + 1e-6), y), batches[1]]
    losses = torch.nn.functional.cross_entropy(model(x), y, reduction="none")
    assert losses.max() < 1e-5
    assert EKFAC(cache_budget=0).fit(model, Changing(batches, again)).n_samples_seen_ == 8


@parametrize_budgets
def test_models_with_noise_of_their_own(budget):
    """Refused before any second pass: an example has another loss each time."""
    model = Apply(lambda self, x: self.inner(dropout(x, 0.5, training=True)), inner=CASE.model())
    with pytest.raises(IFVPUsageError, match=r"batch 0: .*randomness in the model"):
        EKFAC(cache_budget=budget).fit(model, PLAIN_BATCHES)


def test_models_with_noise_of_their_own_on_single_examples():
    """Where no other example tells, the second pass repeats the noise, or is refused."""

    def fit(budget):
        torch.manual_seed(3)
        model = Apply(lambda self, x: self.inner(dropout(x, training=True)), inner=CASE.model())
        return EKFAC(cache_budget=budget).fit(model, CASE.batches(1))

    assert same(fit(BUDGETS["nothing is kept"]), fit(BUDGETS["all is kept"]))
    with pytest.raises(IFVPUsageError, match=r"batch \d+ has other losses"):
        fit(BUDGETS["some is kept"])


def test_checks_draw_no_random_numbers():
    """A head of zeros hides the noise before it, which both passes meet alike."""

    def fit(budget):
        torch.manual_seed(3)
        model = headless()
        model.insert(4, Apply(lambda self, x: dropout(x, 0.5, training=True)))
        return EKFAC(cache_budget=budget).fit(model, PLAIN_BATCHES)

    assert same(fit(BUDGETS["nothing is kept"]), fit(BUDGETS["all is kept"]))
