"""What is kept of a forward pass stays as it was, whatever is written where afterwards."""

import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fimkit import EKFAC, DataInf, Diagonal, Explicit, IFVPUsageError, ModelData
from fimkit.functional import (
    EKFAC_CACHE_KEY,
    MLPCache,
    ifvp_at_x_ekfac,
    ifvp_datainf,
    ifvp_explicit,
    manual_cache_forward,
)
from fimkit.gradients import engine, ownership
from fimkit.gradients.ownership import owned
from tests import dense, exactness, reference
from tests.cases import BY_NAME, Apply, N, points, split

WIDTH = 5


def batch(n=N):
    return points()(n, torch.Generator().manual_seed(0))


def layers():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = {"first": nn.Linear(WIDTH, 4, bias=False), "second": nn.Linear(4, 3)}
        return {name: module.double() for name, module in made.items()}


# -- models that work in memory of their own -------------------------------------------------------


def zeros(*shape):
    return torch.zeros(*shape, dtype=torch.float64)


class Memory:
    """Tensors that a model writes to, one of each size, so that none is larger than needed."""

    def __init__(self):
        self.values = {}

    def __getitem__(self, size):
        return self.values.setdefault(size, zeros(size, WIDTH))


def in_memory(memory, write):
    def forward(self, x):
        inputs = memory[len(x)]
        write(inputs, x)
        return self.second(self.first(inputs).tanh())

    return forward


def by_data(memory, x):
    memory.data[:] = x


def in_parts(memory, x):
    memory[:, 2:] = x[:, 2:]
    memory[:, :2].copy_(x[:, :2])


def in_array():
    arrays = {}

    def forward(self, x):
        array = arrays.setdefault(len(x), np.empty((len(x), WIDTH)))
        array[:] = x
        return self.second(self.first(torch.from_numpy(array)).tanh())

    return forward


def with_graph():
    memory = {}

    def forward(self, x):
        hidden = self.first(x).tanh()
        inputs = memory.setdefault(len(x), zeros(len(x), 4)).detach_()
        return self.second(inputs.copy_(hidden))

    return forward


class Buffers(nn.Module):
    """A part with tensors of its own: buffers, attributes, or inside other objects."""

    def __init__(self, how):
        super().__init__()
        for size in range(1, 6):
            if how == "buffer":
                self.register_buffer(f"of_{size}", zeros(size, WIDTH), persistent=False)
            else:
                setattr(self, f"of_{size}", zeros(size, WIDTH))
        if how == "object":
            self.inner = [{"tensors": Memory()}]

    def forward(self, x):
        inner = getattr(self, "inner", None)
        memory = inner[0]["tensors"][len(x)] if inner else getattr(self, f"of_{len(x)}")
        return memory.copy_(x)


def through_part(self, x):
    return self.second(self.first(self.part(x)).tanh())


WORKING = {
    "a tensor that nothing but the forward knows": lambda: (in_memory(Memory(), Tensor.copy_), {}),
    "in parts": lambda: (in_memory(Memory(), in_parts), {}),
    "by .data": lambda: (in_memory(Memory(), by_data), {}),
    "an array": lambda: (in_array(), {}),
    "with a graph": lambda: (with_graph(), {}),
    "an attribute": lambda: (through_part, {"part": Buffers("attribute")}),
    "a buffer": lambda: (through_part, {"part": Buffers("buffer")}),
    "an object in a list": lambda: (through_part, {"part": Buffers("object")}),
}


@pytest.mark.parametrize("name", WORKING)
def test_models_that_work_in_memory_of_their_own(name):
    forward, modules = WORKING[name]()
    made = layers()
    plain = Apply(lambda self, x: self.second(self.first(x).tanh()), **made)
    model = Apply(forward, **made, **modules)
    coverage = exactness.check(plain, batch(), reference.negative_log_likelihood, fitted_to=model)
    assert set(coverage.values()) == {"captured (linear)"}
    kept, again = (
        EKFAC(cache_budget=budget).fit(model, split(batch(), N, 3)) for budget in (2**30, 0)
    )
    assert dense.distance(again.fisher_.to_dense(), kept.fisher_.to_dense()) <= 1e-12
    rows = reference.gradients(plain, reference.negative_log_likelihood, batch(), N)
    data = ModelData(model, batch(), batch_size=5)
    found = Diagonal(regularization=1.0).fit(plain, split(batch(), N, N)).transform(data)
    expected = rows / (1 + rows.square().mean(0))
    assert reference.error(found, expected) <= 1e-12


def test_a_lookup_by_positions_in_a_memory():
    memory = {}

    def forward(self, x):
        positions = memory.setdefault(len(x), x.clone()).copy_(x)
        return self.head(self.table(positions).tanh().sum(1))

    model = Apply(forward, table=nn.Embedding(7, 6), head=nn.Linear(6, 3)).double()
    plain = Apply(
        lambda self, x: self.head(self.table(x).tanh().sum(1)), table=model.table, head=model.head
    )
    x = torch.randint(7, (N, 4), generator=torch.Generator().manual_seed(0))
    exactness.check(plain, (x, batch()[1]), reference.negative_log_likelihood, fitted_to=model)


# -- batches that are filled again -----------------------------------------------------------------


class Example:
    """A batch that fimkit does not look into."""

    def __init__(self, x, y):
        self.x, self.y = x, y


def filled_again(whole, size, form):
    """Return an iterable whose batches are all the same tensors."""

    class Loader:
        def __iter__(self):
            x, y = torch.empty_like(whole[0][:size]), torch.empty_like(whole[1][:size])
            made = form(x, y)
            for start in range(0, N, size):
                x.copy_(whole[0][start : start + size])
                y.copy_(whole[1][start : start + size])
                yield made

    return Loader()


FORMS = {
    "a tuple": (lambda x, y: (x, y), "cross_entropy"),
    "an object": (
        Example,
        lambda model, b: F.cross_entropy(model(b.x), b.y, reduction="none"),
    ),
    "views": (lambda x, y: (x.t().t(), y.view(-1)), "cross_entropy"),
}


@pytest.mark.filterwarnings("ignore:.*it was not checked that no example's loss depends")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "method",
    [
        Explicit(solver="dual"),
        DataInf(),
        EKFAC(),
        EKFAC(cache_budget=0),
        EKFAC(cache_budget=1000),
    ],
)
def test_batches_that_are_filled_again(method, form):
    make, loss = FORMS[form]
    model = Apply(lambda self, x: self.second(self.first(x).tanh()), **layers())
    whole = batch()
    rows = reference.gradients(model, reference.negative_log_likelihood, whole, N)
    method.set_params(loss=loss, regularization=0.01)
    found = method.fit(model, filled_again(whole, 4, make)).transform(rows)
    expected = type(method)(**{**method.get_params(), "loss": "cross_entropy"})
    expected = expected.fit(model, [whole]).transform(rows)
    assert reference.error(found, expected) <= 1e-9


# -- within one forward pass -----------------------------------------------------------------------


def overwriting(self, x):
    memory = zeros(len(x), WIDTH)
    memory.copy_(x)
    hidden = self.first(memory)
    memory.copy_(hidden.detach().repeat(1, 2)[:, :WIDTH])
    return self.second(hidden) + memory[:, :3]


def later_overwriting(self, x):
    """Only in batches of two."""
    hidden = self.first(x).tanh()
    out = self.second(hidden)
    if len(x) == 2:
        hidden.relu_()
    return out


METHODS = [Explicit(), DataInf(), EKFAC(), EKFAC(cache_budget=0)]


@pytest.mark.parametrize("method", METHODS)
def test_inputs_that_are_overwritten_before_their_gradients_are_refused(method):
    model = Apply(overwriting, **layers())
    message = "batch 0: an input of the call on 'first.weight' was changed in place"
    with pytest.raises(IFVPUsageError, match=message):
        method.fit(model, split(batch(), N, 3))


@pytest.mark.parametrize("method", METHODS)
def test_inputs_that_are_overwritten_in_a_later_batch_are_refused(method):
    model = Apply(later_overwriting, **layers())
    message = "batch 3: an input of the call on 'second.bias', 'second.weight' was changed in place"
    with pytest.raises(IFVPUsageError, match=message):
        method.fit(model, split(batch(11), 11, 3))


@pytest.mark.parametrize("sizes", [(3,), (4, 3, 5)])
def test_inputs_that_autograd_has_a_copy_of_may_be_overwritten(sizes):
    """Under autocasting it keeps the input in another dtype."""

    def forward(self, x):
        hidden = x * 1.0
        out = self.first(hidden)
        if len(x) != 4:  # the first batch, of some
            hidden.zero_()
        return self.second(out.tanh()).float()

    model = Apply(forward, **layers()).float()
    x, y = batch()
    whole = x.float(), y
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = reference.gradients(model, reference.negative_log_likelihood, whole, N)
        fitted = Explicit().fit(model, split(whole, N, *sizes))
    assert fitted.coverage_["first.weight"] in {"torch.func", "one backward pass per example"}
    assert dense.distance(fitted.fisher_.to_dense(), reference.fisher(rows)) <= 0.02


def test_an_input_that_no_gradient_needs_may_be_overwritten():
    """Of a frozen weight beside a bias that is trained."""

    def forward(self, x):
        hidden = x.tanh()
        out = self.first(hidden)
        hidden.zero_()
        return self.second(out.tanh())

    model = Apply(forward, first=nn.Linear(WIDTH, 4), second=nn.Linear(4, 3)).double()
    model.first.weight.requires_grad_(False)
    rows = reference.gradients(model, reference.negative_log_likelihood, batch(), N)
    fitted = Explicit().fit(model, split(batch(), N, 3))
    assert fitted.coverage_["first.bias"] == "captured (linear)"
    assert dense.distance(fitted.fisher_.to_dense(), reference.fisher(rows)) <= 1e-12


# -- what is copied --------------------------------------------------------------------------------


def test_owned():
    base = torch.randn(100, 3)
    alone, twice = torch.randn(4, 3), torch.randn(4, 3)
    views = [twice.detach(), twice.detach()]
    del twice
    part = base[:4].detach()
    array = np.zeros((4, 3))
    given = [alone, *views, part, base.detach(), torch.from_numpy(array)]
    given.append(torch.randn(100, 3)[:4].detach())
    found = owned(given)
    same = [a.data_ptr() == b.data_ptr() for a, b in zip(found, given, strict=True)]
    assert same == [True, True, True, False, False, False, False]
    assert all(torch.equal(a, b) for a, b in zip(found, given, strict=True))
    assert owned([]) == []


def test_all_is_copied_where_torch_does_not_tell_who_has_memory(monkeypatch):
    monkeypatch.setattr(ownership, "_holders", None)
    x = torch.randn(4, 3)
    (found,) = owned([x])
    assert torch.equal(found, x)
    assert found.data_ptr() != x.data_ptr()


@pytest.mark.parametrize(
    ("name", "copied"),
    [
        ("mlp", 1),
        ("in place after views", 1),
        ("transformer encoder layer", 1),
    ],
)
def test_only_what_others_hold_is_copied(name, copied, monkeypatch):
    """The batch, but no hidden input: of those there is nothing but what is kept."""
    calls = []

    def recorded(tensors):
        out = owned(tensors)
        calls.append(sum(a is not b for a, b in zip(out, tensors, strict=True)))
        return out

    monkeypatch.setattr(engine, "owned", recorded)
    case = BY_NAME[name]
    Explicit(loss=case.loss).fit(case.model(), case.batches(5))
    assert calls == [copied] * len(case.batches(5))


# -- tables that bound their rows' norms -----------------------------------------------------------


def table_and_data():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    return table, torch.randint(7, (N, 4), generator=generator), torch.arange(N) % 3


@pytest.mark.parametrize("lookup", [F.embedding, F.embedding_bag])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("method", [Explicit(), EKFAC()])
def test_a_parameter_that_a_lookup_would_scale_down_is_left_alone(method, trained, lookup):
    """Of a module's table that is undone."""
    table, x, y = table_and_data()
    model = Apply(
        lambda self, x: self.head(lookup(x, self.table, max_norm=0.5).flatten(1)),
        head=nn.Linear(12 if lookup is F.embedding else 3, 3).double(),
    )
    model.table = nn.Parameter(table.clone(), requires_grad=trained)
    message = rf"F.{lookup.__name__} is called with max_norm=0.5, .* table of shape \(7, 3\)"
    with pytest.raises(IFVPUsageError, match=message):
        method.fit(model, [(x, y)])
    assert torch.equal(model.table, table)


def bounded_loss(table, x, y):
    return F.cross_entropy(F.embedding(x, table, max_norm=0.5).sum(1), y)


def test_functions_that_would_scale_down_a_table_are_refused():
    table, x, y = table_and_data()
    given = table.clone()
    message = r"F.embedding is called with max_norm=0.5, .* table of shape \(7, 3\)"
    with pytest.raises(IFVPUsageError, match=message):
        ifvp_explicit(bounded_loss, regularization=0.1)((given, x, y), torch.zeros(21).double())
    datainf = ifvp_datainf(bounded_loss, 0, (None, 0, 0), 0.1)
    with pytest.raises(IFVPUsageError, match=message):
        datainf((given, x[:, None], y[:, None]), (given,))
    assert torch.equal(given, table)

    @manual_cache_forward
    def forward(self, table, x):
        inputs = F.embedding(x, table, max_norm=0.5).sum(1)
        hidden = F.linear(inputs, self.weight)
        getattr(self, EKFAC_CACHE_KEY).input_hidden_pairs.append((inputs, hidden))
        return hidden

    layer, cache = nn.Linear(3, 3, bias=False).double(), MLPCache()
    layer.forward = types.MethodType(forward, layer)
    setattr(layer, EKFAC_CACHE_KEY, cache)

    def losses(table, x, y):
        return F.cross_entropy(layer(table, x), y, reduction="none")

    with pytest.raises(IFVPUsageError, match=message):
        ifvp_at_x_ekfac(losses, given, x, y, in_dims=(None, 0, 0), mlp_cache=cache)
    assert torch.equal(given, table)
