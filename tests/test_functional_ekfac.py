"""`ifvp_at_x_ekfac` and its caches against dense float64 references."""

import copy
import inspect
import random
import types
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, linear, pad
from torch.utils.checkpoint import checkpoint

from fimkit import EKFAC, IFVPUsageError, SingularFisherError
from fimkit.functional import EKFAC_CACHE_KEY, MLPCache, ifvp_at_x_ekfac, manual_cache_forward
from tests import reference
from tests.state import unchanged

N, T, CLASSES = 7, 4, 3
DAMPING = 1e-3
DOCUMENTED = """
def ifvp_at_x_ekfac(
    func: Callable, *x, in_dims: Tuple | None = None, batch_size: int = 1,
    max_iter: int | None = None, mlp_cache: MLPCache | List[MLPCache], damping: float = 0.0
) -> Callable: ...
"""


def randn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed + 100 * len(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def ones_appended(x):
    return pad(x, (0, 1), value=1.0)


def register(module, forward):
    """Give a module a recording forward and a cache, as users do."""
    cache = MLPCache()
    module.forward = types.MethodType(manual_cache_forward(forward), module)
    setattr(module, EKFAC_CACHE_KEY, cache)
    return cache


def record(module, x, hidden):
    if hasattr(module, EKFAC_CACHE_KEY):
        getattr(module, EKFAC_CACHE_KEY).input_hidden_pairs.append((x, hidden))


# The reference: nothing of fimkit, one backward pass per example, dense matrices.


def dense_ekfac(examples):
    """Return the EK-FAC matrix of one layer, given ``(a, s, kept)`` of every example.

    ``a`` is ``(T, in)``, ``s`` is ``(T, out)``, and ``kept`` ``(T,)`` selects positions.
    """
    n = len(examples)
    positions = sum(int(kept.sum()) for _, _, kept in examples)
    A = sum(a[kept].T @ a[kept] for a, _, kept in examples) / positions
    S = sum(s[kept].T @ s[kept] for _, s, kept in examples) / n
    gradients = torch.stack([s.T @ a for a, s, _ in examples])
    bases = []
    for factor in (S, A):
        values, vectors = torch.linalg.eigh(factor)
        assert values.diff().min() > 1e-6 * values.max(), "the eigenbasis is not determined"
        bases.append(vectors)
    basis = torch.kron(*bases)
    eigenvalues = (gradients.flatten(1) @ basis).square().mean(0)
    return basis @ eigenvalues.diag() @ basis.T


def solved(matrix, damping, v):
    damped = matrix + damping * torch.eye(len(matrix), dtype=torch.float64)
    return torch.linalg.solve(damped, v.reshape(-1, len(matrix)).T).T.reshape(v.shape)


def close(found, expected, tolerance=1e-9):
    assert found.shape == expected.shape
    return reference.error(found.flatten(-2), expected.flatten(-2)) <= tolerance


# Two modules: a body with two layers at every position, the first with a bias, which mixes
# positions, and a head on the pooled positions, with a bias.


def parameters():
    return {
        "body.w0": randn(5, 4, seed=1),
        "body.b0": randn(5, seed=2),
        "body.w1": randn(CLASSES, 5, seed=3),
        "head.w2": randn(CLASSES, CLASSES, seed=4),
        "head.b2": randn(CLASSES, seed=5),
    }


SHAPES = [[(5, 5), (CLASSES, 5)], [(CLASSES, CLASSES + 1)]]


class Net(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.body, self.head = nn.Module(), nn.Module()
        for name, value in parameters().items():
            module, key = name.split(".")
            self.get_submodule(module).register_parameter(key, nn.Parameter(value.to(dtype)))
        self.caches = [register(self.body, self.body_forward), register(self.head, head_forward)]

    @staticmethod
    def body_forward(self, x):
        hidden = linear(x, self.w0, self.b0)
        record(self, ones_appended(x), hidden)
        mixed = hidden.tanh().cumsum(1)
        scores = linear(mixed, self.w1)
        record(self, mixed, scores)
        return scores

    def forward(self, x):
        scores = self.body(x)
        return scores, self.head(scores.tanh().mean(1))


def head_forward(self, pooled):
    hidden = linear(pooled, self.w2, self.b2)
    record(self, ones_appended(pooled), hidden)
    return hidden


def losses_of(scores, logits, y, mask):
    """The loss of every example: its class, and its class again at positions that count."""
    tokens = cross_entropy(scores.movedim(-1, 1), y[:, None].expand(mask.shape), reduction="none")
    return cross_entropy(logits, y, reduction="none") + (tokens * mask).sum(1)


def data(n=N):
    lengths = torch.arange(n) % T + 1
    mask = torch.arange(T) < lengths[:, None]
    return randn(n, T, 4), torch.arange(n) % CLASSES, mask


def expected_matrices(n=N, masked=True):
    """Return the EK-FAC matrix of every layer of `Net`, nested by cache."""
    values = parameters()
    x, y, mask = data(n)
    found = [[], [], []]
    for i in range(n):
        inner = torch.zeros(1, T, 5, dtype=torch.float64, requires_grad=True)
        scored = torch.zeros(1, T, CLASSES, dtype=torch.float64, requires_grad=True)
        out = torch.zeros(1, CLASSES, dtype=torch.float64, requires_grad=True)
        hidden = x[i : i + 1] @ values["body.w0"].T + values["body.b0"] + inner
        mixed = hidden.tanh().cumsum(1)
        scores = mixed @ values["body.w1"].T + scored
        pooled = scores.tanh().mean(1)
        logits = pooled @ values["head.w2"].T + values["head.b2"] + out
        loss = losses_of(scores, logits, y[i : i + 1], mask[i : i + 1]).sum()
        signals = torch.autograd.grad(loss, (inner, scored, out))
        inputs = (ones_appended(x[i]), mixed[0], ones_appended(pooled))
        kept = mask[i] if masked else torch.ones(T, dtype=torch.bool)
        kepts = (kept, kept, torch.ones(1, dtype=torch.bool))
        for layer, a, s, k in zip(found, inputs, signals, kepts, strict=True):
            layer.append((a.detach(), s.flatten(0, -2), k))
    matrices = [dense_ekfac(layer) for layer in found]
    return [matrices[:2], matrices[2:]]


def vectors(*lead):
    return [
        [randn(*lead, *shape, seed=i + 10 * j) for j, shape in enumerate(shapes)]
        for i, shapes in enumerate(SHAPES)
    ]


def func_of(net, masked=True):
    def func(values, x, y, mask):
        losses = losses_of(*functional_call(net, values, x), y, mask)
        return (losses, mask) if masked else losses

    return func


def fitted(net=None, *, n=N, masked=True, **kwargs):
    net = Net() if net is None else net
    return ifvp_at_x_ekfac(
        func_of(net, masked),
        dict(net.named_parameters()),
        *data(n),
        **{"in_dims": (None, 0, 0, 0), "mlp_cache": net.caches, "damping": DAMPING, **kwargs},
    )


def agree(found, matrices, v, damping=DAMPING, tolerance=1e-9):
    for found_layers, layers, vs in zip(found, matrices, v, strict=True):
        for one, matrix, vector in zip(found_layers, layers, vs, strict=True):
            assert close(one, solved(matrix, damping, vector), tolerance)
    return True


# A single linear layer without a bias, the smallest use.


def plain_forward(self, x):
    hidden = linear(x, self.weight)
    record(self, x, hidden)
    return hidden


def single(dtype=torch.float64, forward=plain_forward):
    layer = nn.Linear(4, CLASSES, bias=False, dtype=dtype)
    layer.weight.data = randn(CLASSES, 4, seed=6, dtype=dtype)
    return layer, register(layer, forward)


def single_func(layer):
    return lambda x, y: cross_entropy(layer(x), y, reduction="none")


def single_data(n=20, dtype=torch.float64):
    return randn(n, 4, dtype=dtype), torch.arange(n) % CLASSES


def single_matrix(n=20):
    x, y = single_data(n)
    probabilities = (x @ randn(CLASSES, 4, seed=6).T).softmax(-1)
    s = probabilities - torch.eye(CLASSES, dtype=torch.float64)[y]
    kept = torch.ones(1, dtype=torch.bool)
    return dense_ekfac([(x[i : i + 1], s[i : i + 1], kept) for i in range(n)])


def test_the_signature_is_the_documented_one():
    from fimkit.functional import ekfac

    namespace = {}
    exec("from __future__ import annotations\n" + DOCUMENTED, namespace)
    assert inspect.signature(ifvp_at_x_ekfac) == inspect.signature(namespace["ifvp_at_x_ekfac"])
    inspect.signature(ekfac.ifvp_at_x_ekfac, eval_str=True)  # every name in it is defined


def in_tensor(memory, x):
    return memory.setdefault(x.shape, torch.empty_like(x)).copy_(x)


def in_array(memory, x):
    array = memory.setdefault(x.shape, np.empty(x.shape))
    array[:] = x
    return torch.from_numpy(array)


@pytest.mark.parametrize("write", [in_tensor, in_array])
@pytest.mark.parametrize("batch_size", [1, 7, 10])
def test_inputs_in_memory_that_is_written_to_again(batch_size, write):
    """By the next batch, and by the first one's check of an example by itself."""
    memory = {}

    def forward(self, x):
        return plain_forward(self, write(memory, x))

    layer, cache = single(forward=forward)
    ifvp = ifvp_at_x_ekfac(
        single_func(layer), *single_data(), batch_size=batch_size, mlp_cache=cache, damping=DAMPING
    )
    v = randn(2, CLASSES, 4)
    assert close(ifvp([v])[0], solved(single_matrix(), DAMPING, v))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, N, 100])
def test_equals_the_definition(batch_size, masked):
    matrices = expected_matrices(masked=masked)
    v = vectors(2)
    for damping in (1e-4, 0.1):
        ifvp = fitted(masked=masked, batch_size=batch_size, damping=damping)
        assert agree(ifvp(v), matrices, v, damping)


def test_a_mask_matters_and_one_of_ones_does_not():
    masked, whole = expected_matrices(masked=True), expected_matrices(masked=False)
    assert not torch.allclose(masked[0][0], whole[0][0])
    torch.testing.assert_close(masked[0][0].trace(), whole[0][0].trace())  # Λ is never masked
    net, v = Net(), vectors()
    inner = func_of(net, masked=False)

    def with_ones(values, x, y, mask):
        return inner(values, x, y, mask), torch.ones(mask.shape)

    for func in (inner, with_ones):
        ifvp = ifvp_at_x_ekfac(
            func,
            dict(net.named_parameters()),
            *data(),
            in_dims=(None, 0, 0, 0),
            batch_size=2,
            mlp_cache=net.caches,
            damping=DAMPING,
        )
        assert agree(ifvp(v), whole, v)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32])
def test_masks_of_any_dtype(dtype):
    net, v = Net(), vectors()
    inner = func_of(net)

    def func(*arguments):
        losses, mask = inner(*arguments)
        return losses, mask.to(dtype)

    ifvp = ifvp_at_x_ekfac(
        func,
        dict(net.named_parameters()),
        *data(),
        in_dims=(None, 0, 0, 0),
        batch_size=3,
        mlp_cache=net.caches,
        damping=DAMPING,
    )
    assert agree(ifvp(v), expected_matrices(), v)


def pooled_matrix(x, y, kept):
    """Return the EK-FAC matrix of one linear map at every position, losses of pooled scores."""
    weight, examples = randn(CLASSES, 4, seed=6), []
    for i in range(len(x)):
        offset = torch.zeros(*x.shape[1:-1], CLASSES, dtype=torch.float64, requires_grad=True)
        scores = (x[i] @ weight.T + offset).tanh().flatten(0, -2).sum(0)
        (s,) = torch.autograd.grad(cross_entropy(scores, y[i]), offset)
        examples.append((x[i].flatten(0, -2), s.flatten(0, -2), kept[i].flatten()))
    return dense_ekfac(examples)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 9])
def test_a_mask_may_leave_out_whole_batches(batch_size):
    """Their examples count in the means of S and Λ, and in Λ with their whole gradients."""
    layer, cache = single()
    x, y = randn(9, T, 4), torch.arange(9) % CLASSES
    kept = (torch.arange(9)[:, None] + torch.arange(T)) % 3 > 0
    kept[3:6] = False

    def func(x, y, mask):
        return cross_entropy(layer(x).tanh().sum(1), y, reduction="none"), mask

    ifvp = ifvp_at_x_ekfac(
        func, x, y, kept, batch_size=batch_size, mlp_cache=cache, damping=DAMPING
    )
    v = randn(2, CLASSES, 4)
    assert close(ifvp([v])[0], solved(pooled_matrix(x, y, kept), DAMPING, v))


@pytest.mark.parametrize("batch_size", [1, 3, 7])
@pytest.mark.parametrize("lead", [(), (T,), (2, 3)])
def test_positions_in_any_dimensions(lead, batch_size):
    layer, cache = single()
    x, y = randn(7, *lead, 4), torch.arange(7) % CLASSES

    def func(x, y):
        scores = layer(x).tanh()
        return cross_entropy(scores.view(len(x), -1, CLASSES).sum(1), y, reduction="none")

    ifvp = ifvp_at_x_ekfac(func, x, y, batch_size=batch_size, mlp_cache=cache, damping=DAMPING)
    v = randn(2, CLASSES, 4)
    matrix = pooled_matrix(x if lead else x[:, None], y, torch.ones(7, *(lead or (1,))).bool())
    assert close(ifvp([v])[0], solved(matrix, DAMPING, v))


def test_max_iter_counts_batches():
    v = vectors()
    assert agree(fitted(batch_size=3, max_iter=2)(v), expected_matrices(6), v)
    assert agree(fitted(batch_size=3, max_iter=9)(v), expected_matrices(N), v)
    assert agree(fitted(batch_size=6, max_iter=1)(v), expected_matrices(6), v)


def test_examples_along_any_dimension_and_in_containers():
    net, v = Net(), vectors()
    inner = func_of(net)

    def func(batch, values, scale):
        assert scale == "one"
        return inner(values, batch["x"].movedim(1, 0), *batch["rest"])

    x, y, mask = data()
    ifvp = ifvp_at_x_ekfac(
        lambda x, mask, *rest: func({"x": x, "rest": [rest[0], mask.T.bool()]}, *rest[1:]),
        x.movedim(0, 1),
        mask.T.double(),
        y,
        dict(net.named_parameters()),
        "one",
        in_dims=(1, -1, 0, None, None),
        batch_size=3,
        mlp_cache=net.caches,
        damping=DAMPING,
    )
    assert agree(ifvp(v), expected_matrices(), v)

    ifvp = ifvp_at_x_ekfac(
        lambda batch: inner({}, batch["x"], *batch["rest"]),
        {"x": x, "rest": [y, mask]},
        batch_size=3,
        mlp_cache=net.caches,
        damping=DAMPING,
    )
    assert agree(ifvp(v), expected_matrices(), v)


def test_flat_parameters():
    """A func that unflattens one parameter vector, and sets gradients to zero by hand."""
    net, v = Net(), vectors()
    inner = func_of(net)
    names, shapes = zip(*((k, p.shape) for k, p in net.named_parameters()), strict=True)

    def func(flat, x, y, mask):
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.grad is not None:
                    parameter.grad.zero_()
        pieces = flat.split([shape.numel() for shape in shapes])
        values = {k: f.view(s) for k, f, s in zip(names, pieces, shapes, strict=True)}
        return inner(values, x, y, mask)

    ifvp = ifvp_at_x_ekfac(
        func,
        torch.cat([parameter.flatten() for parameter in net.parameters()]),
        *data(),
        in_dims=(None, 0, 0, 0),
        batch_size=3,
        mlp_cache=net.caches,
        damping=DAMPING,
    )
    assert agree(ifvp(v), expected_matrices(), v)


def test_equals_the_estimator():
    class Recorded(nn.Linear):
        @manual_cache_forward
        def forward(self, x):
            hidden = super().forward(x)
            record(self, ones_appended(x), hidden)
            return hidden

    torch.manual_seed(0)
    model = nn.Sequential(Recorded(4, 5), nn.Tanh(), Recorded(5, CLASSES)).double()
    x, y = single_data()
    p = sum(parameter.numel() for parameter in model.parameters())
    v = randn(2, p)
    expected = EKFAC(DAMPING).fit(model, [(x, y)]).transform(v)

    caches = [MLPCache(), MLPCache()]
    for layer, cache in zip((model[0], model[2]), caches, strict=True):
        setattr(layer, EKFAC_CACHE_KEY, cache)
    ifvp = ifvp_at_x_ekfac(
        lambda x, y: cross_entropy(model(x), y, reduction="none"),
        x,
        y,
        batch_size=6,
        mlp_cache=caches,
        damping=DAMPING,
    )
    pieces = v.split([parameter.numel() for parameter in model.parameters()], 1)
    nested = [
        [torch.cat([weight.view(2, out, -1), bias[..., None]], 2)]
        for weight, bias, out in zip(pieces[::2], pieces[1::2], (5, CLASSES), strict=True)
    ]
    found = [layer for (layer,) in ifvp(nested)]
    flat = [part.flatten(1) for layer in found for part in (layer[..., :-1], layer[..., -1])]
    assert reference.error(torch.cat(flat, 1), expected) <= 1e-9


@pytest.mark.parametrize("batch_size", [1, 3, N])
def test_equals_the_estimator_with_attention_and_padding(batch_size):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.into, self.out = nn.Linear(6, 18), nn.Linear(6, CLASSES)

        @manual_cache_forward
        def forward(self, x):
            hidden = self.into(x)
            record(self, ones_appended(x), hidden)
            mixed = nn.functional.scaled_dot_product_attention(*hidden.chunk(3, -1), is_causal=True)
            scores = self.out(mixed)
            record(self, ones_appended(mixed), scores)
            return scores

    torch.manual_seed(0)
    model, cache = Attention().double(), MLPCache()
    x, y = randn(N, T, 6), (torch.arange(N)[:, None] + torch.arange(T)) % CLASSES
    kept = torch.arange(T) <= torch.arange(N)[:, None] % T

    def losses(x, y, kept):
        tokens = cross_entropy(model(x).movedim(-1, 1), y, reduction="none")
        return (tokens * kept).sum(1), kept

    sizes = [parameter.numel() for parameter in model.parameters()]
    v = randn(2, sum(sizes))
    expected = EKFAC(DAMPING, loss=lambda _, batch: losses(*batch))
    expected = expected.fit(model, [(x, y, kept)]).transform(v)
    setattr(model, EKFAC_CACHE_KEY, cache)
    ifvp = ifvp_at_x_ekfac(
        losses, x, y, kept, batch_size=batch_size, mlp_cache=cache, damping=DAMPING
    )
    pieces = v.split(sizes, 1)
    found = ifvp(
        [
            torch.cat([weight.view(2, out, -1), bias[..., None]], 2)
            for weight, bias, out in zip(pieces[::2], pieces[1::2], (18, CLASSES), strict=True)
        ]
    )
    flat = [part.flatten(1) for layer in found for part in (layer[..., :-1], layer[..., -1])]
    assert reference.error(torch.cat(flat, 1), expected) <= 1e-9


def test_a_single_cache_nests_either_way():
    layer, cache = single()
    ifvp = ifvp_at_x_ekfac(
        single_func(layer), *single_data(), batch_size=6, mlp_cache=cache, damping=DAMPING
    )
    v = randn(3, CLASSES, 4)
    expected = solved(single_matrix(), DAMPING, v)
    nested, flat = ifvp([[v]]), ifvp([v])
    assert isinstance(nested, list)
    assert isinstance(nested[0], list)
    assert isinstance(flat, list)
    assert isinstance(ifvp((v,)), tuple)
    for found in (nested[0][0], flat[0], ifvp((v,))[0]):
        assert close(found, expected)
        assert found.dtype == v.dtype
        assert not found.requires_grad
    assert close(ifvp([v[1]])[0], expected[1])
    assert ifvp([v[:0]])[0].shape == (0, CLASSES, 4)


@pytest.mark.parametrize(
    ("model", "given", "tolerance"),
    [
        (torch.float64, torch.float32, 1e-6),
        (torch.float32, torch.float64, 1e-4),
        (torch.bfloat16, torch.float32, 0.1),
        (torch.float32, torch.bfloat16, 0.02),
    ],
)
def test_results_have_the_dtype_of_their_vector(model, given, tolerance):
    layer, cache = single(model)
    ifvp = ifvp_at_x_ekfac(
        single_func(layer), *single_data(dtype=model), batch_size=6, mlp_cache=cache, damping=0.1
    )
    v = randn(3, CLASSES, 4, dtype=given)
    (found,) = ifvp([v])
    assert found.dtype == given
    assert close(found.double(), solved(single_matrix(), 0.1, v.double()), tolerance)


def test_one_backward_pass_per_batch_and_nothing_left_behind():
    class Counted(torch.autograd.Function):
        backwards = 0

        @staticmethod
        def forward(ctx, losses):
            return losses.clone()

        @staticmethod
        def backward(ctx, gradient):
            Counted.backwards += 1
            return gradient

    net = Net()
    inner, calls = func_of(net), []

    def func(values, x, y, mask):
        calls.append(len(x))
        losses, mask = inner(values, x, y, mask)
        return Counted.apply(losses), mask

    state = torch.get_rng_state()
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    ifvp_at_x_ekfac(
        func,
        dict(net.named_parameters()),
        *data(),
        in_dims=(None, 0, 0, 0),
        batch_size=3,
        mlp_cache=net.caches,
    )
    assert calls == [3, 1, 3, 1, 3, 3, 1]  # the second one is that of a check
    assert Counted.backwards == 6 + 1  # that of the check
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(cache.input_hidden_pairs == [] for cache in net.caches)
    copy.deepcopy(net)


def test_caches_share_nothing():
    one, other = MLPCache(), MLPCache()
    one.input_hidden_pairs.append((randn(2, 3), randn(2, 4)))
    assert other.input_hidden_pairs == []
    assert MLPCache().input_hidden_pairs == []
    one.clear()
    assert one.input_hidden_pairs == []


def test_a_forward_outside_holds_its_own_pairs_only():
    layer, cache = single()
    for n in (5, 2):
        layer(randn(n, 4))
        ((a, s),) = cache.input_hidden_pairs
        assert (a.shape, s.shape) == ((n, 4), (n, CLASSES))
    with torch.inference_mode():
        layer(randn(3, 4))
    delattr(layer, EKFAC_CACHE_KEY)
    cache.clear()
    assert layer(randn(2, 4)).shape == (2, CLASSES)
    assert cache.input_hidden_pairs == []


def test_a_module_that_runs_twice_has_two_positions():
    """Each run is a position of the same layer, and an example's gradient sums over both."""
    layer, cache = single()
    x, y = single_data(40)
    left, right = x[:20], x[20:]

    def func(left, right, y):
        return cross_entropy(layer(left).tanh() + 2 * layer(right), y, reduction="none")

    ifvp = ifvp_at_x_ekfac(
        func, left, right, y[:20], batch_size=6, mlp_cache=cache, damping=DAMPING
    )
    weight = randn(CLASSES, 4, seed=6)
    examples = []
    for i in range(20):
        offset = torch.zeros(2, CLASSES, dtype=torch.float64, requires_grad=True)
        a = torch.stack([left[i], right[i]])
        hidden = a @ weight.T + offset
        loss = cross_entropy(hidden[0].tanh() + 2 * hidden[1], y[i])
        (s,) = torch.autograd.grad(loss, offset)
        examples.append((a, s, torch.ones(2, dtype=torch.bool)))
    v = randn(CLASSES, 4)
    assert close(ifvp([v])[0], solved(dense_ekfac(examples), DAMPING, v))


@pytest.mark.parametrize(
    "noise",
    [
        lambda h: nn.functional.dropout(h, 0.5),
        lambda h: h + torch.randn_like(h),
        lambda h: h + torch.from_numpy(np.random.standard_normal(h.shape)),  # noqa: NPY002
        lambda h: h * random.random(),
    ],
    ids=["dropout", "torch", "numpy", "python"],
)
def test_random_numbers_are_drawn_alike_in_both_passes(noise):
    """And all random states are left as they were."""

    def forward(self, x):
        hidden = linear(x, self.weight)
        record(self, x, hidden)
        return noise(hidden)

    layer, cache = single(forward=forward)
    batches = []

    def func(x, y):
        losses = cross_entropy(layer(x), y, reduction="none")
        batches.append(losses.detach())
        return losses

    with unchanged(layer):
        ifvp_at_x_ekfac(func, *single_data(), batch_size=6, mlp_cache=cache)
    assert len(batches) == 8
    for first, second in zip(batches[:4], batches[4:], strict=True):
        assert torch.equal(first, second)


def test_another_second_pass_is_refused():
    layer, cache = single()
    inner, calls = single_func(layer), []

    def func(x, y):
        calls.append(x)
        return inner(x, y) * (1 + (len(calls) == 7))

    with pytest.raises(IFVPUsageError, match="other losses for batch 1"):
        ifvp_at_x_ekfac(func, *single_data(), batch_size=6, mlp_cache=cache)


@pytest.mark.parametrize("place", ["inputs of", "gradients at"])
def test_another_second_pass_is_refused_where_losses_are_the_same(place):
    """As those of a head of zeros are, whatever noise there is before it or after it."""
    generator = torch.Generator().manual_seed(0)
    noise = partial(torch.rand, generator=generator, dtype=torch.float64)

    def forward(self, x):
        x = x * noise(x.shape) if place == "inputs of" else x
        hidden = linear(x, self.weight)
        record(self, x, hidden)
        return hidden * noise(hidden.shape) if place == "gradients at" else hidden

    layer, cache = single(forward=forward)
    nn.init.zeros_(layer.weight)
    with pytest.raises(IFVPUsageError, match=f"func gave other {place} layers for batch 0"):
        ifvp_at_x_ekfac(single_func(layer), *single_data(), batch_size=6, mlp_cache=cache)


def test_what_func_does_to_its_data_in_place_is_done_to_copies():
    layer, cache = single()
    x, y = single_data()
    ifvp = ifvp_at_x_ekfac(
        lambda x, y: single_func(layer)(x.mul_(2), y),
        x / 2,
        y,
        batch_size=6,
        mlp_cache=cache,
        damping=DAMPING,
    )
    v = randn(CLASSES, 4)
    assert close(ifvp([v])[0], solved(single_matrix(), DAMPING, v))
    given = x.clone()
    ifvp_at_x_ekfac(
        lambda x, y: single_func(layer)(x.mul_(2), y), x, y, batch_size=6, mlp_cache=cache
    )
    assert torch.equal(x, given)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_ambient_modes_do_not_matter(mode):
    layer, cache = single()
    v = randn(CLASSES, 4)
    expected = solved(single_matrix(), DAMPING, v)
    with mode():
        x, y = single_data()
        ifvp = ifvp_at_x_ekfac(
            single_func(layer), x, y, batch_size=6, mlp_cache=cache, damping=DAMPING
        )
        assert close(ifvp([v])[0], expected)
    assert close(ifvp([v])[0], expected)


def test_autocast_holds_in_func_only():
    layer, cache = single(torch.float32)
    x, y = single_data(dtype=torch.float32)
    v = randn(CLASSES, 4)
    hidden = []

    def func(x, y):
        hidden.append(layer(x))
        return cross_entropy(hidden[-1].float(), y, reduction="none")

    with torch.autocast("cpu", torch.bfloat16):
        ifvp = ifvp_at_x_ekfac(func, x, y, batch_size=20, mlp_cache=cache, damping=0.1)
        (found,) = ifvp([v])
    assert hidden[0].dtype == torch.bfloat16
    assert torch.equal(ifvp([v])[0], found)
    assert close(found, solved(single_matrix(), 0.1, v), 0.02)


def test_checkpointed_forwards_count_once():
    layer, cache = single()
    v = randn(CLASSES, 4)

    def func(x, y):
        return cross_entropy(checkpoint(layer, x, use_reentrant=False), y, reduction="none")

    ifvp = ifvp_at_x_ekfac(func, *single_data(), batch_size=6, mlp_cache=cache, damping=DAMPING)
    assert close(ifvp([v])[0], solved(single_matrix(), DAMPING, v))
    assert cache.input_hidden_pairs == []  # although it ran again in the backward passes


def test_no_damping():
    """Fine for a factor of full rank; a singular one is refused, by layer."""
    torch.manual_seed(0)
    layer, cache = single()

    def func(x, y):
        return 0.5 * (layer(x) - y).square().sum(1)

    x, y = randn(20, 4), randn(20, CLASSES, seed=1)
    ifvp = ifvp_at_x_ekfac(func, x, y, batch_size=6, mlp_cache=cache)
    s = x @ randn(CLASSES, 4, seed=6).T - y
    kept = torch.ones(1, dtype=torch.bool)
    matrix = dense_ekfac([(x[i : i + 1], s[i : i + 1], kept) for i in range(20)])
    v = randn(CLASSES, 4)
    assert close(ifvp([v])[0], solved(matrix, 0, v))

    few = ifvp_at_x_ekfac(func, x[:2], y[:2], mlp_cache=cache)
    with pytest.raises(SingularFisherError, match="layer 0 of cache 0, with damping=0"):
        few([v])


def test_overflow_is_refused():
    layer, cache = single(torch.float32)
    x, y = single_data(dtype=torch.float32)
    inner = single_func(layer)
    with pytest.raises(IFVPUsageError, match=r"eigenvalues of layer 0 of cache 0 are not finite"):
        ifvp_at_x_ekfac(lambda x, y: 1e12 * inner(x, y), 1e12 * x, y, batch_size=6, mlp_cache=cache)
    ifvp = ifvp_at_x_ekfac(inner, x, y, batch_size=6, mlp_cache=cache, damping=1e-6)
    assert ifvp([randn(CLASSES, 4)])[0].isfinite().all()
    with pytest.raises(SingularFisherError, match=r"layer 0 .*overflows torch\.float16"):
        ifvp([torch.ones(CLASSES, 4, dtype=torch.float16)])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"func": 3}, "expected a callable"),
        ({"damping": -1.0}, "at least 0"),
        ({"damping": float("nan")}, "at least 0"),
        ({"batch_size": 0}, "batch_size is 0; expected an integer of at least 1"),
        ({"max_iter": 0}, "max_iter is 0; expected an integer of at least 1"),
        ({"mlp_cache": None}, "expected an MLPCache"),
        ({"mlp_cache": []}, "expected an MLPCache"),
        ({"in_dims": (0,)}, "func has 2 argument"),
        ({"in_dims": (None, None)}, "a dimension for at least one"),
        ({"in_dims": (2, 0)}, "without the dimension 2"),
        ({"in_dims": (1, 0)}, "4 in argument 0, 20 in argument 1"),
        ({"x": (torch.zeros(0, 4), torch.zeros(0))}, "0 in argument 0"),
        ({"x": ()}, "in_dims is"),
    ],
)
def test_arguments_that_cannot_be_used(changed, message):
    layer, cache = single()
    changed = {"func": single_func(layer), "x": single_data(), "mlp_cache": cache, **changed}
    with pytest.raises(IFVPUsageError, match=message):
        ifvp_at_x_ekfac(changed.pop("func"), *changed.pop("x"), **changed)


@pytest.mark.parametrize("detached", [True, False])
def test_parameters_treated_as_data(detached):
    net = Net()
    values = {k: p.detach() if detached else p for k, p in net.named_parameters()}
    with pytest.raises(IFVPUsageError, match=r"give in_dims=\(None, 0, \.\.\.\)"):
        ifvp_at_x_ekfac(func_of(net), values, *data(), mlp_cache=net.caches)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda losses: losses.mean(), "a single number for a batch of 6; .* one loss per example"),
        (lambda losses: losses[:, None], r"shape \(6, 1\) for a batch of 6"),
        (lambda losses: losses.detach(), "do not require grad"),
        (lambda losses: losses.tolist(), "6 values"),
        (lambda losses: None, "losses of NoneType"),
        (lambda losses: (losses, torch.ones(6)), r"mask of shape \(6,\)"),
        (lambda losses: (losses, torch.ones(5, 1)), r"mask of shape \(5, 1\)"),
        (lambda losses: (losses, [1] * 6), "mask of list"),
        (lambda losses: (losses, torch.full((6, 1), 0.5)), "other than 0 and 1"),
        (lambda losses: (losses, torch.eye(6)[:, :2]), r"\(6, 2\), .* have 1 position"),
        (lambda losses: losses / 0, "a loss is NaN or infinite in batch 0"),
        (lambda losses: losses * torch.tensor([1.0] * 5 + [torch.nan]), "a loss is NaN"),
        (lambda losses: losses.sqrt() - losses.sqrt(), "gradient of layer 0 of cache 0 is NaN"),
    ],
)
def test_outputs_that_cannot_be_used(returned, message):
    layer, cache = single()
    inner = single_func(layer)

    def func(x, y):
        losses = inner(x, y)
        if "gradient of layer" in message:
            losses = losses - losses.detach()
        return returned(losses)

    with pytest.raises(IFVPUsageError, match=message):
        ifvp_at_x_ekfac(func, *single_data(6), batch_size=6, mlp_cache=cache)
    assert cache.input_hidden_pairs == []


# Losses that depend on other examples, and where examples are not.


def batch_normalised(hidden):
    return nn.functional.batch_norm(hidden, None, None, training=True)


def centred_in_pairs(hidden):
    """Examples depend on their neighbours only."""
    pairs = hidden[: len(hidden) // 2 * 2].unflatten(0, (-1, 2))
    return torch.cat([(pairs - 0.1 * pairs.flip(1)).flatten(0, 1), hidden[len(pairs) * 2 :]])


DEPENDENT = {
    "batch statistics": lambda h, y: cross_entropy(batch_normalised(h), y, reduction="none"),
    "a mean over the batch": lambda h, y: cross_entropy(h, y).expand(len(y)),
    "less the mean": lambda h, y: (
        (losses := cross_entropy(h, y, reduction="none")) - 0.5 * losses.mean()
    ),
    "contrast": lambda h, y: cross_entropy(h @ h.T, torch.arange(len(y)), reduction="none"),
    "neighbours": lambda h, y: cross_entropy(centred_in_pairs(h), y, reduction="none"),
    "softmax over the batch": lambda h, y: -h.log_softmax(0)[:, 0],
    "in another order": lambda h, y: cross_entropy(h, y, reduction="none").flip(0),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_size", [2, 3, 20])
@pytest.mark.parametrize("name", DEPENDENT)
def test_losses_that_depend_on_other_examples_are_refused(name, batch_size, dtype):
    layer, cache = single(dtype)
    message = r"hidden vectors of layer 0 of cache 0.*do not follow the losses.*batch_size=1"
    with pytest.raises(IFVPUsageError, match=message):
        ifvp_at_x_ekfac(
            lambda x, y: DEPENDENT[name](layer(x), y),
            *single_data(dtype=dtype),
            batch_size=batch_size,
            mlp_cache=cache,
        )
    assert cache.input_hidden_pairs == []


@pytest.mark.parametrize("name", ["a mean over the batch", "in another order"])
def test_lone_examples_depend_on_none(name):
    layer, cache = single()
    ifvp = ifvp_at_x_ekfac(
        lambda x, y: DEPENDENT[name](layer(x), y),
        *single_data(),
        mlp_cache=cache,
        damping=DAMPING,
    )
    v = randn(CLASSES, 4)
    assert close(ifvp([v])[0], solved(single_matrix(), DAMPING, v))


@pytest.mark.parametrize("divisor", ["examples", "tokens"])
def test_losses_divided_by_something_of_the_batch_are_refused(divisor):
    """Which gradients alone do not show."""
    net = Net()
    inner = func_of(net)

    def func(values, x, y, mask):
        losses, mask = inner(values, x, y, mask)
        return losses / (len(x) if divisor == "examples" else mask.sum()), mask

    def fit(batch_size):
        return ifvp_at_x_ekfac(
            func,
            dict(net.named_parameters()),
            *data(),
            in_dims=(None, 0, 0, 0),
            batch_size=batch_size,
            mlp_cache=net.caches,
            damping=DAMPING,
        )

    with pytest.raises(IFVPUsageError, match=r"has loss .* by itself, .* in a batch of 3"):
        fit(3)
    assert all(cache.input_hidden_pairs == [] for cache in net.caches)
    fit(1)


def test_losses_that_cannot_be_computed_alone():
    """Are not asked for: a func may be written for one size of batch."""
    layer, cache = single()
    inner = single_func(layer)

    def func(x, y):
        return inner(x.view(5, 4), y)

    ifvp = ifvp_at_x_ekfac(func, *single_data(), batch_size=5, mlp_cache=cache, damping=DAMPING)
    v = randn(CLASSES, 4)
    assert close(ifvp([v])[0], solved(single_matrix(), DAMPING, v))


@pytest.mark.parametrize("last_only", [True, False])
@pytest.mark.parametrize("n", [2, 4])
def test_time_first_is_refused(n, last_only):
    """Also where there are as many positions as examples, so that no shape tells."""

    def forward(self, x):
        x = x.movedim(0, 1)
        hidden = linear(x, self.weight)
        record(self, x, hidden)
        return (hidden[-1:] if last_only else hidden).movedim(0, 1)

    layer, cache = single(forward=forward)
    with pytest.raises(IFVPUsageError, match=r"time first.*with the examples first"):
        ifvp_at_x_ekfac(
            lambda x, y: cross_entropy(layer(x).sum(1), y, reduction="none"),
            randn(n, n, 4),
            torch.arange(n) % CLASSES,
            batch_size=n,
            mlp_cache=cache,
        )


def test_dependence_in_a_later_batch_of_another_length_is_refused():
    """What is recorded there has not been checked yet."""
    layer, cache = single()

    def func(x, y, lengths):
        scores = layer(x[:, : lengths.max()])
        if scores.shape[1] < T:
            scores = scores - scores.mean(0)
        return cross_entropy(scores.sum(1), y, reduction="none")

    x, y, lengths = randn(8, T, 4), torch.arange(8) % CLASSES, torch.tensor([T] * 6 + [2] * 2)
    with pytest.raises(IFVPUsageError, match=r"shape \(2, 2, 3\), do not follow the losses"):
        ifvp_at_x_ekfac(func, x, y, lengths, batch_size=2, mlp_cache=cache)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounding_errors_are_no_dependence(dtype):
    """Of a deep model whose first layers have gradients that are only rounding errors."""
    torch.manual_seed(0)
    deep = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)) for _ in range(12)))
    deep = deep.to(dtype)
    layer, cache = single(dtype)
    shift = nn.Linear(4, 1, bias=False, dtype=dtype)
    other = register(shift, plain_forward)
    x, y = single_data(dtype=dtype)

    def func(x, y):
        scores = deep(pad(layer(x), (0, 16 - CLASSES)))
        return cross_entropy(scores + shift(x), y, reduction="none")  # softmax ignores a shift

    ifvp = ifvp_at_x_ekfac(func, x, y, batch_size=8, mlp_cache=[cache, other], damping=0.1)
    assert ifvp([[randn(CLASSES, 4)], [randn(1, 4)]])[0][0].isfinite().all()


def test_a_mask_of_zeros_is_refused():
    layer, cache = single()
    inner = single_func(layer)
    with pytest.raises(IFVPUsageError, match="0 everywhere"):
        ifvp_at_x_ekfac(
            lambda x, y: (inner(x, y), torch.zeros(len(x), 1)), *single_data(), mlp_cache=cache
        )


def appended(pair):
    def forward(self, x):
        hidden = linear(x, self.weight)
        record(self, *pair(x, hidden))
        return hidden

    return forward


def modified_output(self, x):
    hidden = linear(x, self.weight)
    record(self, x, hidden)
    return hidden.relu_()


def modified_input(self, x):
    x = x.clone()
    hidden = linear(x, self.weight)
    record(self, x, hidden)
    with torch.no_grad():
        x.zero_()
    return hidden


def unrecorded(self, x):
    return linear(x, self.weight)


def under_no_grad(self, x):
    hidden = linear(x, self.weight)
    with torch.no_grad():
        record(self, x, hidden.clone())
    return hidden


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (unrecorded, "recorded nothing in cache 0"),
        (modified_output, "layer 0 of cache 0 were modified in place"),
        (modified_input, "layer 0 of cache 0 were modified in place"),
        (under_no_grad, "layer 0 of cache 0 do not require grad"),
        (appended(lambda x, h: (x, h.clone())), "do not depend on the hidden vectors of layer 0"),
        (appended(lambda x, h: (x.T, h)), r"inputs of shape \(4, 6\)"),
        (appended(lambda x, h: (x.reshape(2, 3, 4), h.view(2, 3, 3))), "in a batch of 6"),
        (appended(lambda x, h: (x.numpy(), h)), "a tuple of ndarray, Tensor; expected a pair"),
    ],
)
def test_pairs_that_cannot_be_used(forward, message):
    layer, cache = single(forward=forward)
    with pytest.raises(IFVPUsageError, match=message):
        ifvp_at_x_ekfac(single_func(layer), *single_data(6), batch_size=6, mlp_cache=cache)
    assert cache.input_hidden_pairs == []


def test_pairs_of_wrong_length_are_refused_where_they_are_appended():
    with pytest.raises(IFVPUsageError, match="a tuple of Tensor; expected a pair of tensors"):
        MLPCache().input_hidden_pairs.append((randn(2, 3),))
    with pytest.raises(IFVPUsageError, match="given a Tensor; expected a pair of tensors"):
        MLPCache().input_hidden_pairs.append(randn(2, 3))


def test_one_cache_for_two_modules_is_refused():
    (one, cache), (other, _) = single(), single()
    setattr(other, EKFAC_CACHE_KEY, cache)
    with pytest.raises(IFVPUsageError, match="give each module a cache of its own"):
        ifvp_at_x_ekfac(
            lambda x, y: cross_entropy(one(x) + other(x), y, reduction="none"),
            *single_data(),
            mlp_cache=cache,
        )
    with pytest.raises(IFVPUsageError, match="the same MLPCache twice"):
        ifvp_at_x_ekfac(single_func(one), *single_data(), mlp_cache=[cache, cache])
    setattr(one, EKFAC_CACHE_KEY, [])
    with pytest.raises(IFVPUsageError, match="is a list; expected an MLPCache"):
        one(randn(2, 4))


def test_layers_that_change_between_batches_are_refused():
    layer, cache = single()
    extra = nn.Linear(4, CLASSES, bias=False, dtype=torch.float64)

    def forward(self, x):
        hidden = linear(x, self.weight)
        record(self, x, hidden)
        if 1 < len(x) < 6:
            more = extra(x)
            record(self, x, more)
            hidden = hidden + more
        return hidden

    layer.forward = types.MethodType(manual_cache_forward(forward), layer)
    with pytest.raises(IFVPUsageError, match="other shapes in batch 3"):
        ifvp_at_x_ekfac(single_func(layer), *single_data(), batch_size=6, mlp_cache=cache)
    with pytest.raises(IFVPUsageError, match=r"recorded \[1, 2\] pairs"):
        ifvp_at_x_ekfac(
            lambda x, y: layer(x).sum(1) + layer(x[:5]).sum(),
            *single_data(6),
            batch_size=6,
            mlp_cache=cache,
        )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda v: v[0][0], r"v, or one of its members, is a Tensor; expected v\[cache\]\[layer\]"),
        (lambda v: v[:1], "is a list of 1; expected"),
        (lambda v: [v[0][:1], v[1]], r"a list of 1; .* with \[2, 1\] layers"),
        (lambda v: [v[0], v[1][0]], "is a Tensor"),
        (lambda v: [v[0], [v[1][0].int()]], "layer 0 of cache 1 is of torch.int32"),
        (lambda v: [v[0], [v[1][0].numpy()]], "layer 0 of cache 1 is of ndarray"),
        (lambda v: [v[0][::-1], v[1]], r"layer 0 of cache 0 has shape .* expected \(5, 5\) or"),
        (lambda v: [v[0], [v[1][0][:, :-1]]], "record inputs with a last column of ones"),
        (lambda v: [v[0], [v[1][0] / 0]], "NaN or infinity"),
    ],
)
def test_vectors_that_do_not_fit(changed, message):
    ifvp = fitted()
    with pytest.raises(IFVPUsageError, match=message):
        ifvp(changed(vectors()))


@pytest.mark.cuda
def test_on_a_gpu():
    layer, cache = single()
    layer.cuda()
    x, y = (tensor.cuda() for tensor in single_data())
    ifvp = ifvp_at_x_ekfac(single_func(layer), x, y, batch_size=6, mlp_cache=cache, damping=DAMPING)
    v = randn(2, CLASSES, 4)
    expected = solved(single_matrix(), DAMPING, v)
    assert close(ifvp([v])[0], expected)
    assert ifvp([v.cuda()])[0].device.type == "cuda"
    assert close(ifvp([v.cuda()])[0].cpu(), expected)
