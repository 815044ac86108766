"""No silent wrong number: whatever is captured wrongly is found out in the first batch."""

import copy
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fimkit import EKFAC, DataInf, Explicit, IFVPUsageError, ModelData
from fimkit.gradients import engine
from fimkit.gradients.capture import Capture
from fimkit.gradients.layout import BatchLayout
from fimkit.gradients.rules.linear import LinearUse
from fimkit.gradients.verification import RandomSum
from tests import reference
from tests.cases import BY_NAME, Apply, N, T, mlp, points, sequences, split
from tests.state import unchanged

FALLBACK = {"torch.func", "one backward pass per example"}


def distance(fitted, rows):
    expected = reference.fisher(rows)
    return float((fitted.fisher_.to_dense() - expected).norm() / expected.norm())


# -- rules that are made wrong ---------------------------------------------------------------------


def of_each(change):
    """Make a wrong method of a right one, all of whose tensors are changed."""

    def wrong(method):
        def sabotaged(*arguments):
            out = method(*arguments)
            return tuple(map(change, out)) if isinstance(out, tuple) else change(out)

        return sabotaged

    return wrong


def scaled(factor):
    return of_each(lambda out: factor * out)


@of_each
def scaled_for_one_example(out):
    out = out.clone()
    out[-1] *= 1.01
    return out


@of_each
def rolled(out):
    """Give every example its neighbour's values; their sum is right."""
    return out.roll(1, 0)


@of_each
def reversed_positions(out):
    return out.flip(1)


@of_each
def first_position_only(out):
    out = out.clone()
    out[:, 1:] = 0
    return out


def transposed(method):
    """Split a ``(B, T, ...)`` tensor as if its first dimension were the positions."""

    def sabotaged(self, tensor, lead, batch):
        layout = BatchLayout(1) if len(lead) > 1 else self
        return method(layout, tensor, lead, batch)

    return sabotaged


def seen_twice(method):
    def sabotaged(self, *arguments):
        before = len(self.uses)
        output = method(self, *arguments)
        self.uses.extend(copy.copy(use) for use in self.uses[before:])
        return output

    return sabotaged


def seen_once_per_parameter(method):
    """Overlook later calls of a layer."""

    def sabotaged(self, *arguments):
        before = len(self.uses)
        output = method(self, *arguments)
        known = {use.names for use in self.uses[:before]}
        self.uses[before:] = [use for use in self.uses[before:] if use.names not in known]
        return output

    return sabotaged


SABOTAGES = {
    "scaled inputs": (LinearUse, "inputs", scaled(1 + 1e-6)),
    "scaled signals": (LinearUse, "signals", scaled(1 + 1e-6)),
    "an example's inputs scaled": (LinearUse, "inputs", scaled_for_one_example),
    "inputs of the next example": (LinearUse, "inputs", rolled),
    "signals of the next example": (LinearUse, "signals", rolled),
    "positions in the wrong order": (LinearUse, "inputs", reversed_positions),
    "positions left out": (LinearUse, "inputs", first_position_only),
    "transposed axes": (BatchLayout, "split", transposed),
    "calls counted twice": (Capture, "__torch_function__", seen_twice),
    "calls overlooked": (Capture, "__torch_function__", seen_once_per_parameter),
}


@pytest.mark.parametrize("name", SABOTAGES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_wrong_rules_are_found_and_replaced(name, dtype, monkeypatch):
    """The result stays exact, and coverage tells that the slow way was taken.

    The layer has as many positions as examples, and is called twice.
    """
    case = BY_NAME["a layer called twice"]
    batches = split(case.batch(T), T, T)
    owner, method, sabotage = SABOTAGES[name]
    if dtype == torch.float32 and name.startswith("scaled"):
        sabotage = scaled(1.01)
    monkeypatch.setattr(owner, method, sabotage(getattr(owner, method)))
    model = case.model()
    rows = reference.gradients(model, case.example_loss, batches[0], T)
    batches = [(x.to(dtype), y) for x, y in batches]
    fitted = Explicit().fit(model.to(dtype), batches)
    assert fitted.coverage_["layer.weight"] in FALLBACK
    assert distance(fitted, rows) <= (1e-12 if dtype == torch.float64 else 1e-5)


def test_one_wrong_layer_leaves_the_others(monkeypatch):
    """Only what disagrees is replaced."""
    case = BY_NAME["mlp"]
    inputs = LinearUse.inputs
    wrong = scaled(1.5)(inputs)

    def wrong_for_one(self, *arguments):
        return (wrong if "2.weight" in self.names else inputs)(self, *arguments)

    monkeypatch.setattr(LinearUse, "inputs", wrong_for_one)
    fitted = Explicit().fit(case.model(), case.batches(5))
    replaced = {name for name, how in fitted.coverage_.items() if how in FALLBACK}
    assert "2.weight" in replaced
    assert replaced <= {"2.weight", "2.bias"}
    assert distance(fitted, case.gradients) <= 1e-12


def test_what_takes_the_place_of_a_wrong_group_is_checked(monkeypatch):
    """Two biases share a weight. Where one falls back, the other may be folded in instead."""
    case = BY_NAME["tied layers"]
    inputs = LinearUse.inputs

    def without_ones(self, examples, constant=None):
        return inputs(self, examples, None if constant is None else 0.0)

    monkeypatch.setattr(LinearUse, "inputs", without_ones)
    fitted = Explicit().fit(case.model(), case.batches(5))
    assert distance(fitted, case.gradients) <= 1e-12


# -- patterns that only later batches show ---------------------------------------------------------


class Branches(nn.Module):
    """Examples take a branch by batch: a layer on B rows, or ones that no rule sees right."""

    def __init__(self, kind):
        super().__init__()
        self.first = nn.Linear(5, 3)
        self.second = nn.Linear(5, 3)
        self.kind = kind

    def forward(self, x):
        if x[0, 0] > 0:
            return self.first(x)
        if self.kind == "plain":
            return self.second(x)
        if self.kind == "both":
            return self.second(x) + self.first(2 * x).tanh()
        if self.kind == "unseen":
            return x @ self.second.weight.T + self.second.bias
        if self.kind == "positions":
            return self.second(torch.stack([x, x.tanh()], 1)).tanh().sum(1)
        assert self.kind == "time first"
        return self.second(torch.stack([x, x.tanh(), -x, x + 1])).tanh().cumsum(0)[-1]


@pytest.mark.parametrize("kind", ["plain", "both", "unseen", "positions", "time first"])
@pytest.mark.parametrize("solver", ["primal", "dual"])
def test_modules_that_first_fire_later(kind, solver):
    x, y = points()(N, torch.Generator().manual_seed(0))
    x[:, 0] = x[:, 0].abs() * torch.tensor([1.0] * 4 + [-1.0] * 4 + [1.0] * 2 + [-1.0] * 2)
    model = Branches(kind).double()
    rows = reference.gradients(model, reference.negative_log_likelihood, (x, y), N)
    fitted = Explicit(solver=solver).fit(model, split((x, y), N, 4, 4, 2))
    assert distance(fitted, rows) <= 1e-12
    assert "no gradient seen" not in fitted.coverage_.values()


@pytest.mark.parametrize("later", [4, 8, 12])
def test_experts_that_first_get_everything(later):
    """An expert is sent all positions of the first batch, then as many as there are examples.

    Then a leading size that is a multiple of the number of examples proves nothing.
    """

    def forward(self, x):
        out = x.flatten(0, 1)[:, :3].clone()
        chosen = x.flatten(0, 1)[:, 3] > 0
        out[chosen] = self.expert(x.flatten(0, 1)[chosen])
        return out.view(*x.shape[:2], 3).tanh().sum(1)

    model = Apply(forward, expert=nn.Linear(5, 3)).double()
    x, y = sequences()(2 * T, torch.Generator().manual_seed(0))
    chosen = torch.ones(2 * T * T, dtype=torch.bool)
    chosen[T * T :] = False
    chosen[T * T + torch.randperm(T * T, generator=torch.Generator().manual_seed(1))[:later]] = True
    x[..., 3] = x[..., 3].abs() * (2.0 * chosen.view(2 * T, T) - 1)
    rows = reference.gradients(model, reference.negative_log_likelihood, (x, y), 2 * T)
    fitted = Explicit().fit(model, split((x, y), 2 * T, T))
    assert distance(fitted, rows) <= 1e-12


@pytest.mark.parametrize(
    ("others", "dtype"),
    [(1e-5, torch.float32), (1e-9, torch.float64), (0.0, torch.float64)],
    ids=str,
)
def test_one_example_outweighs_the_first_batch(others, dtype):
    """An example whose gradient is all there is to see must not decide where examples lie.

    Only the last position has a gradient, and only the last example a large one: by itself it
    could be either.
    """

    def forward(self, x, scale):
        return self.second(self.first(x.transpose(0, 1)).tanh())[-1] * scale[:, None]

    model = Apply(forward, first=nn.Linear(5, 4), second=nn.Linear(4, 3)).double()
    x, y = sequences()(2 * T, torch.Generator().manual_seed(0))
    scale = torch.ones(2 * T, dtype=torch.float64)
    scale[: T - 1] = others
    rows = reference.gradients(model, reference.negative_log_likelihood, (x, scale, y), 2 * T)
    batches = split((x.to(dtype), scale.to(dtype), y), 2 * T, T)
    fitted = Explicit().fit(model.to(dtype), batches)
    assert distance(fitted, rows) <= (1e-12 if dtype == torch.float64 else 1e-5)


def test_an_example_alone_in_the_first_batch():
    """One example fits every layout, so it proves none for the batches that follow."""
    for name in ("merged windows, example fastest", "transposed inside", "time-first data"):
        case = BY_NAME[name]
        fitted = Explicit(loss=case.loss).fit(case.model(), case.batches(1, 4, 7))
        assert distance(fitted, case.gradients) <= 1e-12


def test_no_gradient_in_the_first_batch():
    """Calls without gradient prove no layout."""
    case = BY_NAME["in place after views"]
    x, y = case.batch()
    model = Apply(lambda self, x, on: self.inner(x) * on[:, None], inner=case.model())
    on = torch.ones(N, dtype=torch.float64)
    on[:4] = 0
    rows = reference.gradients(model, reference.negative_log_likelihood, (x, on, y), N)
    assert not rows[:4].any()
    fitted = Explicit().fit(model, split((x, on, y), N, 4))
    assert distance(fitted, rows) <= 1e-12


@pytest.mark.parametrize("method", [Explicit, DataInf, EKFAC])
@pytest.mark.parametrize("size", [1, 3, 4, 5])
def test_no_gradient_in_the_first_batch_of_a_model_with_shared_positions(method, size):
    """Of a call that no batch size divides; there is no layout to guess then."""

    def forward(self, ids):
        return self.head((self.tokens(ids) + self.positions(torch.arange(6)[None])).tanh())

    model = Apply(
        forward, tokens=nn.Embedding(7, 4), positions=nn.Embedding(6, 4), head=nn.Linear(4, 7)
    ).double()
    ids = torch.randint(7, (15, 6), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(1, 1)
    labels[:size] = -100
    first, *rest = split((ids, labels), 15, size)
    rows = torch.zeros(15, sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    told = (ids[size:], labels[size:])
    rows[size:] = reference.gradients(model, reference.negative_log_likelihood, told, 15 - size)
    fitted = method(1e-2).fit(model, [first, *rest])
    if method is Explicit:
        assert distance(fitted, rows) <= 1e-12
    expected = method(1e-2).fit(model, [*rest, first]).transform(rows)
    torch.testing.assert_close(fitted.transform(rows), expected, rtol=1e-9, atol=1e-12)
    assert not fitted.transform(ModelData(model, first, batch_size=size)).any()


def test_layers_without_gradient_are_not_checked_again_and_again(monkeypatch):
    """As the first factor of an adapter while its second is zero."""
    checks = []
    made = RandomSum.__init__

    def counting(self, *arguments):
        checks.append(self)
        made(self, *arguments)

    monkeypatch.setattr(RandomSum, "__init__", counting)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))

    model = Apply(
        forward, layer=nn.Linear(5, 3), down=nn.Linear(5, 2, bias=False), up=nn.Linear(2, 3)
    ).double()
    nn.init.zeros_(model.up.weight)
    x, y = sequences()(N, torch.Generator().manual_seed(0))
    batch = x[:, 0], y
    rows = reference.gradients(model, reference.negative_log_likelihood, batch, N)
    fitted = Explicit().fit(model, split(batch, N, 4))
    assert len(checks) == 1
    assert distance(fitted, rows) <= 1e-12


@pytest.mark.parametrize("ignored", [0, T])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_tensor_that_all_examples_share(one_by_one, ignored):
    """Its first dimension is no axis of examples, also where a batch has as many.

    Nor where the first batch is as long, and has no gradient to tell.
    """

    def forward(self, x, scales):
        out = torch.atan2(self.layer(x * scales[:, None]), self.shift)
        if one_by_one and bool((out > 99).all()):  # which vmap cannot tell
            raise AssertionError
        return out.tanh().sum(1)

    model = Apply(forward, layer=nn.Linear(5, 3), shift=torch.randn(T, 3)).double()
    x, y = sequences()(N, torch.Generator().manual_seed(0))
    scales = torch.linspace(0.5, 2, T, dtype=torch.float64)

    def example_loss(model, example):
        x, y = example
        return -model(x, scales)[0].log_softmax(0)[y[0]]

    rows = reference.gradients(model, example_loss, (x, y), N)
    rows[:ignored] = 0
    y[:ignored] = -100
    sizes = (T,) if ignored else (3, 5, T)
    batches = [(x, scales, y) for x, y in split((x, y), N, *sizes)]
    fitted = Explicit().fit(model, batches)
    slowest = fitted.coverage_["shift"] == "one backward pass per example"
    assert slowest == one_by_one
    assert distance(fitted, rows) <= 1e-12


# -- examples whose places the data decide ---------------------------------------------------------


def ragged(self, x, lengths):
    """Positions of all examples in a row, each as many as it has."""
    sizes = lengths.tolist()
    h = self.first(torch.cat([own[:size] for own, size in zip(x, sizes, strict=True)])).tanh()
    return self.second(torch.stack([part.sum(0) for part in h.split(sizes)]))


def sorted_by_length(self, x, lengths):
    order = sorted(range(len(x)), key=lambda i: int(lengths[i]))
    h = self.first(torch.stack([x[i] for i in order]).sum(1)).tanh()
    return self.second(torch.stack([h[order.index(i)] for i in range(len(x))]))


def rolled_by_data(self, x, lengths):
    shift = int(lengths[0])
    return self.second(self.first(x.sum(1).roll(shift, 0)).tanh().roll(-shift, 0))


def pooled_by_a_matrix(self, x, lengths):
    """Nodes of all graphs in a row, pooled by a product."""
    n, owner = len(x), torch.repeat_interleave(torch.arange(len(x)), lengths)
    nodes = torch.cat([x[i, :size] for i, size in enumerate(lengths.tolist())])
    h = self.first(nodes).tanh()
    return self.second(F.one_hot(owner, n).to(h).T @ h)


@pytest.mark.parametrize("forward", [ragged, sorted_by_length, rolled_by_data, pooled_by_a_matrix])
@pytest.mark.parametrize("solver", ["primal", "dual"])
def test_places_that_change_from_batch_to_batch(forward, solver):
    """The first batch looks regular, the second has as many positions and is not."""
    model = Apply(forward, first=nn.Linear(5, 4), second=nn.Linear(4, 3)).double()
    x, y = sequences()(6, torch.Generator().manual_seed(0))
    lengths = torch.tensor([2, 2, 2, 3, 1, 2])
    batch = x, lengths, y
    rows = reference.gradients(model, reference.negative_log_likelihood, batch, 6)
    batches = split(batch, 6, 3)
    for order in (batches, batches[::-1]):
        assert distance(Explicit(solver=solver).fit(model, order), rows) <= 1e-12


ORDERS = [(0, 1, 2), (1, 2, 0), (2, 0, 1)]


def by_slices(h, k):
    def order(h, k):
        return torch.cat([h[2 * i : 2 * i + 2] for i in ORDERS[k]])

    return order(h, k), lambda h: order(h, -k)


def by_parts(h, k):
    def order(h, k):
        parts = h[None].split(2, 1)
        return torch.cat([parts[i] for i in ORDERS[k]], 1)[0]

    return order(h, k), lambda h: order(h, -k)


def by_shapes(h, k):
    dims, shape = ((1, 0, 2), (3, 2, -1)) if k else ((0, 1, 2), (2, 3, -1))

    def order(h, shape):
        copy = h.view(shape).permute(dims).clone(memory_format=torch.contiguous_format)
        return copy.flatten(0, 1)

    return order(h, (2, 3, -1)), lambda h: order(h, shape)


def rolled_identity(n, k):
    return torch.tensor(np.roll(np.eye(n), k, 0).tolist(), dtype=torch.float64)


def by_a_matrix(h, k):
    order = rolled_identity(len(h), k)
    return order @ h, lambda h: (order.T @ h[None])[0]


def by_attention(h, k):
    """Each example attends to one."""
    one, order = rolled_identity(len(h), 0), rolled_identity(len(h), k)
    moved = F.scaled_dot_product_attention(1e4 * order[None], one[None], h[None])[0]
    return moved, lambda h: order.T @ h


def by_weights(h, k):
    """All but one example's weights are zero, and so is what they add."""
    order = rolled_identity(len(h), k)
    weights = (1e4 * order + 0 * h.sum()).softmax(1)
    return weights @ h, lambda h: order.T @ h


class Picked(torch.autograd.Function):
    """Rows by their indices, in a way that shows nothing of it."""

    @staticmethod
    def forward(ctx, h, indices):
        ctx.save_for_backward(indices)
        return h.detach()[indices]

    @staticmethod
    def backward(ctx, signals):
        (indices,) = ctx.saved_tensors
        return torch.zeros_like(signals).index_add(0, indices, signals), None


ROLLED = [torch.arange(6).roll(k) for k in range(3)]
ROLLED_BACK = [torch.arange(6).roll(-k) for k in range(3)]


def by_a_function_of_its_own(h, k):
    """As compiled code has it, which calls no function that is watched."""

    def pick(h, indices):
        with torch._C.DisableTorchFunction():
            return Picked.apply(h, indices)

    return pick(h, ROLLED[k]), lambda h: pick(h, ROLLED_BACK[k])


SCRIPTED = torch.jit.trace(lambda h, indices: h[indices], (torch.ones(6, 4), torch.arange(6)))


def by_a_scripted_function(h, k):
    return SCRIPTED(h, ROLLED[k]), lambda h: SCRIPTED(h, ROLLED_BACK[k])


MATRICES = [torch.eye(6, dtype=torch.float64).roll(k, 0)[:, :, None] for k in range(3)]
MATRICES_BACK = [matrix.transpose(0, 1).contiguous() for matrix in MATRICES]


def by_repetition(h, k):
    """All examples for each, all but one times zero."""
    return (h * MATRICES[k]).sum(1), lambda h: (h * MATRICES_BACK[k]).sum(1)


@pytest.mark.parametrize(
    "move",
    [
        by_a_function_of_its_own,
        by_a_scripted_function,
        by_repetition,
        by_slices,
        by_parts,
        by_shapes,
        by_a_matrix,
        by_attention,
        by_weights,
    ],
)
@pytest.mark.parametrize("of_inputs", [False, True])
def test_places_that_numbers_beside_the_tensors_change(move, of_inputs):
    """No call tells of them, as they are Python's; the first batch leaves examples in place."""

    def forward(self, x, k=0):
        back = nn.Identity()
        if of_inputs and x.shape[0] == 6:
            x, back = move(x, k)
        h = self.first(x).tanh()
        if not of_inputs and x.shape[0] == 6:
            h, back = move(h, k)
        return self.second(back(self.between(h).tanh()))

    layers = {"first": nn.Linear(5, 4), "between": nn.Linear(4, 4), "second": nn.Linear(4, 3)}
    model = Apply(forward, **layers).double()
    x, y = points()(18, torch.Generator().manual_seed(0))

    def loss(model, batch):
        x, k, y = batch
        return F.cross_entropy(model(x, k), y, reduction="none")

    rows = reference.gradients(model, reference.negative_log_likelihood, (x, y), 18)
    batches = [(x[6 * k : 6 * k + 6], k, y[6 * k : 6 * k + 6]) for k in range(3)]
    for some in (batches, batches[1:] + batches[:1]):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "batch 0: it was not checked")  # a number beside
            fitted = Explicit(loss=loss).fit(model, some)
        assert distance(fitted, torch.cat([rows[6 * k : 6 * k + 6] for _, k, _ in some])) <= 1e-12


def test_a_dimension_that_numbers_beside_the_tensors_choose():
    """As many positions as examples: either dimension may be theirs."""

    def forward(self, x, k=0):
        dims = (1, 0, 2) if k else (0, 1, 2)
        h = self.first(x).permute(dims).clone(memory_format=torch.contiguous_format).tanh()
        return self.second(self.between(h).permute(dims).tanh().sum(1))

    layers = {"first": nn.Linear(5, 4), "between": nn.Linear(4, 4), "second": nn.Linear(4, 3)}
    model = Apply(forward, **layers).double()
    x, y = sequences(length=4)(8, torch.Generator().manual_seed(0))

    def loss(model, batch):
        x, k, y = batch
        return F.cross_entropy(model(x, k), y, reduction="none")

    rows = reference.gradients(model, reference.negative_log_likelihood, (x, y), 8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "batch 0: it was not checked")  # a number beside
        fitted = Explicit(loss=loss).fit(model, [(x[:4], 0, y[:4]), (x[4:], 1, y[4:])])
    assert distance(fitted, rows) <= 1e-12


def turned(h):
    copy = h.view(2, 3, -1).transpose(0, 1).clone(memory_format=torch.contiguous_format)
    return copy.flatten(0, 1)


def turned_back(h):
    copy = h.view(3, 2, -1).transpose(0, 1).clone(memory_format=torch.contiguous_format)
    return copy.flatten(0, 1)


@pytest.mark.parametrize("kind", ["chosen", "weighed"])
def test_places_that_are_chosen_by_numbers_from_those_that_shapes_give(kind):
    def forward(self, x, gates):
        h = self.first(x).tanh()
        if len(x) < 6:
            return self.second(self.between(h).tanh())
        gate = gates[:, None]
        if kind == "weighed":
            h = gate * turned(h) + (1 - gate) * h
            h = self.between(h).tanh()
            return self.second(gate * turned_back(h) + (1 - gate) * h)
        h = self.between(torch.where(gate > 0, turned(h), h)).tanh()
        return self.second(torch.where(gate > 0, turned_back(h), h))

    layers = {"first": nn.Linear(5, 4), "between": nn.Linear(4, 4), "second": nn.Linear(4, 3)}
    model = Apply(forward, **layers).double()
    x, y = points()(12, torch.Generator().manual_seed(0))
    batch = x, torch.arange(2, dtype=x.dtype).repeat_interleave(6), y
    rows = reference.gradients(model, reference.negative_log_likelihood, batch, 12)
    assert distance(Explicit().fit(model, split(batch, 12, 6)), rows) <= 1e-12


MEANS, VARIANCES = torch.zeros(4), torch.ones(4)


@pytest.mark.parametrize(
    "mix",
    [
        lambda h: h.sum(0),
        lambda h: h.sum(),
        lambda h: h.mean(0),
        lambda h: F.layer_norm(h, tuple(h.shape)),
        lambda h: F.batch_norm(h, MEANS, VARIANCES, training=True),
        lambda h: F.mse_loss(h, 0 * h),
        lambda h: F.cross_entropy(h, 0.25 + 0 * h),
    ],
    ids=["sum", "sum of all", "mean", "layer norm", "batch norm", "mean square", "cross-entropy"],
)
def test_examples_that_numbers_mix_in_a_later_batch(mix):
    def forward(self, x, gates):
        h = self.first(x)
        return self.second(h + gates * mix(h))

    model = Apply(forward, first=nn.Linear(5, 4), second=nn.Linear(4, 3))
    x, y = torch.randn(12, 5), torch.arange(12) % 3
    gates = torch.arange(2.0).repeat_interleave(6)[:, None]
    with pytest.raises(IFVPUsageError, match="batch 1: the gradients of single examples do not"):
        Explicit().fit(model, split((x, gates, y), 12, 6))


def test_places_are_not_looked_at_again_where_no_number_can_move_them(monkeypatch):
    """Pointwise functions, pooling and maps by parameters leave every example where it is."""

    def looked(*arguments):
        raise AssertionError

    monkeypatch.setattr(engine, "PlacesCheck", looked)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.GELU(), nn.AvgPool2d(2), nn.Flatten()
    )
    model.extend([nn.Linear(12, 5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 3)])
    x, y = torch.randn(12, 2, 6, 6), torch.arange(12) % 3
    Explicit().fit(model, split((x, y), 12, 4))


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.model(x.flip(0)).flip(0),
        lambda self, x: self.model(x)[torch.arange(len(x))],
        lambda self, x: self.model(x).sort(0).values,
    ],
)
def test_places_are_looked_at_again_after_calls_that_may_move_them(forward, monkeypatch):
    def look(*arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(engine, "PlacesCheck", look)
    x, y = torch.randn(4, 5).sort(0).values, torch.arange(4) % 3
    with torch.no_grad():
        model = nn.Linear(5, 3)
        model.weight.abs_()
    with pytest.raises(ZeroDivisionError):
        Explicit().fit(Apply(forward, model=model), [(x, y)] * 2)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_places_are_found_by_gradients_with_rounding_errors(dtype, size):
    """Of few positions, along whatever direction they are looked at."""
    for seed in range(10):
        torch.manual_seed(seed)
        layers = [layer for _ in range(8) for layer in (nn.Linear(80, 80), nn.Tanh())]
        model = nn.Sequential(*layers, nn.Linear(80, 4)).to(dtype)
        batch = torch.randn(size, 80).to(dtype), torch.arange(size)
        fitted = EKFAC(regularization=0.1, fallback="raise").fit(model, [batch])
        assert all("Kronecker layer" in how for how in fitted.coverage_.values())


def test_places_guessed_without_gradients_are_looked_at_again():
    """As many positions as examples, positions first, and a first batch without any gradient."""
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        model[0].bias.fill_(-100)  # nothing passes ...
    x = torch.randn(4, 8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        x[:, 4:] += 40 * model[0].weight.sign().sum(0)  # ... but for the later examples
        x[:, 4:] += 200 * model[0].weight[0]
    y = torch.arange(8) % 3

    def loss(model, batch):
        inputs, targets = batch
        return F.cross_entropy(model(inputs).sum(0), targets, reduction="none")

    def example_loss(model, example):
        inputs, targets = example
        return -model(inputs).sum(1)[0].log_softmax(0)[targets[0]]

    rows = reference.gradients(model, example_loss, (x.transpose(0, 1).contiguous(), y), 8)
    first = slice(0, model[0].weight.numel())
    assert not rows[:4, first].any()
    assert rows[4:, first].any()
    fitted = Explicit(loss=loss).fit(model, [(x[:, :4], y[:4]), (x[:, 4:], y[4:])])
    assert distance(fitted, rows) <= 1e-12


# -- small gradients beside large ones -------------------------------------------------------------


class Small(nn.Module):
    """A parameter that no rule covers, or that is used twice, beside one with large gradients."""

    def __init__(self, twice):
        super().__init__()
        self.large = nn.Linear(5, 3)
        self.small = nn.Linear(5, 3, bias=False)
        self.twice = twice

    def forward(self, x):
        small = torch.einsum("bi,oi->bo", x, self.small.weight)
        if self.twice:
            small = small + 0.3 * self.small(x)
        return self.large(100 * x) + 1e-4 * small


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_gradients_are_not_lost(twice, dtype):
    """They are far below the rounding of all gradients together."""
    model = Small(twice).double()
    batch = points()(N, torch.Generator().manual_seed(0))
    rows = reference.gradients(model, reference.negative_log_likelihood, batch, N)[:, -15:]
    fitted = Explicit(blocks="parameter").fit(model.to(dtype), [(batch[0].to(dtype), batch[1])])
    assert fitted.coverage_["small.weight"] in FALLBACK
    found = fitted.fisher_.diagonal()[-15:].double()
    expected = rows.square().mean(0)
    assert (found - expected).norm() <= (1e-4 if dtype == torch.float32 else 0.3) * expected.norm()


# -- examples that depend on each other, and on chance ---------------------------------------------


def centred_inside(self, x):
    h = self.first(x)
    return self.second(h - h.mean(0))


def centred_first(self, x):
    return self.second(self.first(x - x.mean(0)).tanh())


def batch_normalised(self, x):
    h = F.batch_norm(self.first(x), None, None, training=True)
    return self.second(h)


def attending_across(self, x):
    h = self.first(x)
    return self.second((h @ h.T).softmax(-1) @ h)


def the_last_by_the_others(self, x):
    """The first example does not notice."""
    h = self.first(x)
    return self.second(h / h.detach().abs().amax(1, True).cummax(0).values)


def previous_example(self, x):
    return self.second(self.first(x) + self.first(x).roll(1, 0).tanh())


@pytest.mark.parametrize(
    "forward",
    [
        centred_inside,
        centred_first,
        batch_normalised,
        attending_across,
        previous_example,
        the_last_by_the_others,
    ],
)
def test_examples_that_depend_on_each_other_are_refused(forward):
    model = Apply(forward, first=nn.Linear(5, 4), second=nn.Linear(4, 3)).double()
    batch = points()(N, torch.Generator().manual_seed(0))
    with (
        unchanged(model),
        pytest.raises(IFVPUsageError, match="one example depends on the others in its batch"),
    ):
        Explicit().fit(model, [batch])


def averaged(model, batch):
    """A mean over the batch, shared out among its examples."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none") / len(batch[1])


def contrastive(model, batch):
    z = model(batch[0])
    return -(z @ z.T).log_softmax(1).diagonal()


@pytest.mark.parametrize("loss", [averaged, contrastive])
def test_losses_that_depend_on_the_batch_are_refused(loss):
    batch = points()(N, torch.Generator().manual_seed(0))
    with pytest.raises(IFVPUsageError, match="one example depends on the others in its batch"):
        Explicit(loss=loss).fit(mlp().double(), [batch])


def dropped_out(self, x):
    return self.second(F.dropout(self.first(x), 0.5, training=True))


def noisy(self, x):
    return self.second(self.first(x + torch.randn_like(x)))


@pytest.mark.parametrize("forward", [dropped_out, noisy])
def test_randomness_inside_the_model_is_refused(forward):
    model = Apply(forward, first=nn.Linear(5, 4), second=nn.Linear(4, 3)).double()
    batch = points()(N, torch.Generator().manual_seed(0))
    with unchanged(model), pytest.raises(IFVPUsageError, match="random"):
        Explicit().fit(model, [batch])


def test_dependence_is_refused_by_the_names_of_the_parameters():
    def forward(self, x):
        h = self.alone(x)
        return h + self.mixed(x - self.before(x).mean(0))

    model = Apply(
        forward,
        alone=nn.Linear(5, 3),
        mixed=nn.Linear(5, 3, bias=False),
        before=nn.Linear(5, 5, bias=False),
    ).double()
    batch = points()(N, torch.Generator().manual_seed(0))
    with pytest.raises(IFVPUsageError, match=r"batch 0: .*'before\.weight'"):
        Explicit().fit(model, [batch])


def broadcasting(model, x, y):
    """Return losses of every output against every target, by mistake."""
    return (model(x) - y).square().mean(1)


@pytest.mark.parametrize(
    ("loss", "batch"),
    [
        (lambda model, batch: broadcasting(model, *batch), lambda x, y: (x, y)),
        (lambda m, b: broadcasting(m, b["x"], b["y"]), lambda x, y: {"x": x, "y": y}),
        (lambda m, b: broadcasting(m, b["x"], b["z"]), lambda x, y: {"x": x, "z": y}),
        (lambda m, b: broadcasting(m, b[1], b[0]), lambda x, y: (y, x)),
    ],
    ids=["tuple", "by the name of targets", "by another name", "targets first"],
)
def test_targets_broadcast_against_outputs_are_refused(loss, batch):
    """They are as long as the batch, and others in every batch: no tensor that examples share."""
    model, x = nn.Linear(3, 1), torch.randn(8, 3)
    y = torch.randn(8)
    batches = [batch(x[:4], y[:4]), batch(x[4:], y[4:])]
    for method in (Explicit, EKFAC):
        with pytest.raises(IFVPUsageError, match=r"\(B, 1\) broadcast against targets \(B,\)"):
            method(loss=loss).fit(model, batches)


@pytest.mark.parametrize("method", [Explicit, DataInf, EKFAC])
def test_a_model_that_needs_two_examples_and_mixes_them(method):
    def forward(self, x):
        return self.layer(nn.functional.batch_norm(x, None, None, training=True))

    model = Apply(forward, layer=nn.Linear(3, 2))
    with pytest.raises(IFVPUsageError, match="has another loss than in its batch"):
        method().fit(model, [(torch.randn(6, 3), torch.arange(6) % 2)])


def test_a_model_that_needs_two_examples_and_keeps_them_apart():
    def forward(self, x):
        assert len(x) > 1
        return self.layer(x)

    model = Apply(forward, layer=nn.Linear(3, 2)).double()
    batch = torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 2
    rows = reference.gradients(model.layer, reference.negative_log_likelihood, batch, 6)
    assert distance(Explicit().fit(model, [batch]), rows) <= 1e-12


@pytest.mark.parametrize("scale", [1.0, 0.01])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "mix",
    [
        lambda each, n: each / n,
        lambda each, n: each + each.mean(),
        lambda each, n: each.mean() + 0 * each,
    ],
    ids=["divided", "with the mean", "the mean"],
)
def test_small_losses_that_mix_examples(scale, dtype, mix):
    """Tell from rounding what is far below one, also in a coarse precision."""

    def loss(model, batch):
        each = (model(batch[0])[:, 0] - batch[1]).square()
        return mix(each, len(each))

    model, y = nn.Linear(5, 1), scale * torch.randn(16)
    with torch.no_grad():
        model.weight.mul_(scale)
    batch = torch.randn(16, 5).to(dtype), y.to(dtype)
    with pytest.raises(
        IFVPUsageError, match=r"loss (of one example )?depends on the (others|whole)"
    ):
        Explicit(loss=loss).fit(model.to(dtype), [batch])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [10.0, 100.0])
def test_losses_that_are_nothing_but_rounding(dtype, size):
    """A model sure of its labels leaves a loss of the size of its logits' rounding."""
    model = nn.Sequential(nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, 3))
    x = torch.randn(64, 5)
    with torch.no_grad():
        model[2].weight.mul_(size)
        logits = model(x)
        top = logits.topk(2).values
        x = x[(top[:, 0] - top[:, 1]).argsort(descending=True)][:16]
    y = model(x).argmax(1)
    fitted = EKFAC(1.0).fit(model.to(dtype), [(x.to(dtype), y)])
    assert fitted.n_samples_seen_ == 16


def with_codebook(model, x, codes):
    return torch.cdist(model(x), codes).min(1).values


@pytest.mark.parametrize("sizes", [(4, 6), (6, 4), (4, 4, 2)])
@pytest.mark.parametrize(
    ("loss", "batch"),
    [
        (lambda m, b: with_codebook(m, *b), lambda x, codes, _: (x, codes)),
        (lambda m, b: with_codebook(m, b["x"], b["y"]), lambda x, codes, _: {"x": x, "y": codes}),
        (
            lambda m, b: with_codebook(m, b[0], b[1].nan_to_num(1.0)) * b[2].sum(),
            lambda x, codes, rates: (x, torch.where(codes > 1, torch.nan, codes), rates),
        ),
        (
            lambda m, b: with_codebook(m, b[0], b[1].to_dense()),
            lambda x, codes, _: (x, codes.to_sparse()),
        ),
    ],
    ids=["tuple", "mapping", "two, one with gaps", "sparse"],
)
def test_tensors_that_examples_share_beside_none_of_their_own(loss, batch, sizes):
    """Wherever they stand, and however many examples a batch has beside theirs."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(3, 2).double()
    x, codes, rates = (
        torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((10, 3), (4, 2), (4,))
    )
    rows = reference.gradients(model, lambda m, one: loss(m, batch(one, codes, rates)), x, 10)
    batches = [batch(part, codes.clone(), rates) for part in x.split(sizes)]
    assert distance(Explicit(loss=loss).fit(model, batches), rows) <= 1e-12


def test_a_shared_tensor_as_long_as_the_only_batch_is_refused():
    """Nothing tells it from targets that are broadcast against every output."""
    model, codes = nn.Linear(3, 2), torch.randn(4, 2)

    def loss(model, batch):
        return with_codebook(model, *batch)

    batches = [(torch.randn(4, 3), codes) for _ in range(2)]
    with pytest.raises(IFVPUsageError, match=r"shape \(4, 2\) is as long as the batch.*batch size"):
        Explicit(loss=loss).fit(model, batches[:1])
    assert Explicit(loss=loss).fit(model, batches).n_samples_seen_ == 8
    with pytest.raises(IFVPUsageError, match=r"\(B, 1\) broadcast against targets"):
        EKFAC(loss=lambda m, b: broadcasting(m, b[0], b[1])).fit(
            nn.Linear(3, 1), [(torch.randn(4, 3), torch.randn(4), torch.arange(4))]
        )


@pytest.mark.parametrize("least", [3, 4])
def test_a_model_that_needs_several_examples_and_mixes_them(least):
    def forward(self, x):
        nearest = torch.cdist(x, x).topk(least, largest=False).indices
        return self.layer(x)[nearest].mean(1)

    model = Apply(forward, layer=nn.Linear(3, 2))
    with pytest.raises(IFVPUsageError, match="the loss of one example depends on the others"):
        Explicit().fit(model, [(torch.randn(16, 3), torch.arange(16) % 2)])


def test_an_encoder_that_pools_over_padding():
    """PyTorch's fast path, without gradients, has other numbers there."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x, padding):
        return self.head(self.encoder(x, src_key_padding_mask=padding).mean(1))

    model = Apply(forward, encoder=nn.TransformerEncoder(layer, 1), head=nn.Linear(8, 3))
    x, y = torch.randn(6, 5, 8), torch.arange(6) % 3
    padding = torch.arange(5) >= torch.tensor([5, 3, 4, 2, 5, 1])[:, None]
    batch = x.double(), padding, y
    model = model.double().eval()
    rows = reference.gradients(model, reference.negative_log_likelihood, batch, 6)
    assert distance(Explicit().fit(model, [batch]), rows) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_centred_by_the_batch(dtype):
    def forward(self, x):
        return self.layer(x - x.mean(0))

    model = Apply(forward, layer=nn.Linear(3, 2)).to(dtype)
    with pytest.raises(IFVPUsageError, match="the loss of one example depends on the others"):
        Explicit().fit(model, [(torch.randn(48, 3, dtype=dtype), torch.arange(48) % 2)])


def test_a_complex_parameter_is_compared_whole():
    def forward(self, x):
        return (
            torch.fft.irfft(torch.fft.rfft(x) * torch.view_as_complex(self.spectrum), n=8)
            @ self.out
        )

    model = Apply(forward, spectrum=torch.randn(5, 2), out=torch.randn(8, 3)).double()
    batch = torch.randn(6, 8, dtype=torch.float64), torch.arange(6) % 3
    rows = reference.gradients(model, reference.negative_log_likelihood, batch, 6)
    assert distance(Explicit().fit(model, [batch]), rows) <= 1e-12


def test_what_cannot_be_checked_warns():
    """An object of one's own is not cut, nor a batch of the only size that a model takes."""

    def loss(model, batch):
        return F.cross_entropy(model(batch.x), batch.y, reduction="none")

    model = nn.Linear(3, 2).double()
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.arange(8) % 2
    rows = reference.gradients(model, reference.negative_log_likelihood, (x, y), 8)
    batches = [SimpleNamespace(x=x[:4], y=y[:4]), SimpleNamespace(x=x[4:], y=y[4:])]
    with pytest.warns(UserWarning, match="not checked that no .* a SimpleNamespace") as caught:
        fitted = Explicit(loss=loss).fit(model, batches)
    assert len(caught) == 1
    assert distance(fitted, rows) <= 1e-12

    def forward(self, x):
        assert len(x) == 8
        return self.layer(x)

    fixed = Apply(forward, layer=model)
    with pytest.warns(UserWarning, match="the model runs on no part of the batch, a tuple"):
        fitted = Explicit().fit(fixed, [(x, y)])
    assert distance(fitted, rows) <= 1e-12


def test_a_model_that_warns_of_small_batches_is_checked():
    def forward(self, x):
        if len(x) < 6:
            warnings.warn("few examples", stacklevel=1)
        return self.layer(x - x.mean(0))

    model = Apply(forward, layer=nn.Linear(3, 2))
    with pytest.raises(IFVPUsageError, match="the loss of one example depends on the others"):
        Explicit().fit(model, [(torch.randn(6, 3), torch.arange(6) % 2)])


@pytest.mark.parametrize(
    "wrap", [lambda texts, y: (texts, y), lambda texts, y: {"t": texts, "y": y}]
)
@pytest.mark.parametrize("mixes", [False, True])
def test_lists_of_texts_are_cut(wrap, mixes):
    def loss(model, batch):
        texts, y = batch.values() if isinstance(batch, dict) else batch
        x = torch.tensor([[text.count(letter) for letter in "abc"] for text in texts]).double()
        return F.cross_entropy(model(x - x.mean(0) if mixes else x), y, reduction="none")

    model, y = nn.Linear(3, 2).double(), torch.arange(4) % 2
    texts = ["abba", "cab", "bcb", "a"]
    if mixes:
        with pytest.raises(IFVPUsageError, match="the loss of one example depends on the others"):
            Explicit(loss=loss).fit(model, [wrap(texts, y)])
        return
    x = torch.tensor([[2, 2, 0], [1, 1, 1], [0, 2, 1], [1, 0, 0]]).double()
    rows = reference.gradients(model, reference.negative_log_likelihood, (x, y), 4)
    assert distance(Explicit(loss=loss).fit(model, [wrap(texts, y)]), rows) <= 1e-12
