"""Every kind of layer against single examples' gradients, and how each is covered.

Captured gradients are compared with autograd's while fitting, and what disagrees is computed
another way: a broken rule gives right numbers slowly. So the coverage is checked with the numbers.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fimkit import Explicit, IFVPUsageError, losses
from fimkit.operators import LookupRows
from tests import dense, reference
from tests.cases import split

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

# Examples; positions of a sequence.
N, T = 9, 4
KINDS = ("empirical", "mc", "exact", "predicted")
# Batches of 1, of 7 and of all, and how the matrix is kept. A lone example proves nothing of where
# examples are in a tensor: others come after it.
FITS = (((1,), "primal"), ((7,), "dual"), ((N,), "primal"), ((1, 7, 1), "dual"))
SLOW = ("torch.func", "one backward pass per example")


@dataclass(frozen=True, eq=False)
class Case:
    """A layer, the inputs that it is called on, and how its parameters are to be covered.

    Attributes
    ----------
    inputs : callable
        ``inputs(n, generator)`` returns a tuple of tensors with n examples.
    coverage : str, or dict of str to str
        The rule that must see every parameter, ``"slow"`` for none; by prefix if it is a dict.
    call : callable, optional
        ``call(layer, *inputs)``, where it is more than calling the layer.
    """

    name: str
    layer: Callable[[], nn.Module]
    inputs: Callable[[int, torch.Generator], tuple[torch.Tensor, ...]]
    coverage: Any
    call: Callable[..., torch.Tensor] | None = None

    def model(self) -> Mixed:
        with torch.random.fork_rng():
            torch.manual_seed(zlib.crc32(self.name.encode()))
            model = Mixed(self.layer(), self.call).double()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.2 * torch.randn_like(parameter))
                for name, buffer in model.named_buffers():
                    if name.endswith("running_mean"):
                        buffer.copy_(torch.randn_like(buffer))
                    if name.endswith("running_var"):
                        buffer.copy_(torch.rand_like(buffer) + 0.5)
        return model

    def batch(self) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        return (*self.inputs(N, generator), torch.randint(3, (N,), generator=generator))

    def covered(self, name: str) -> tuple[str, ...]:
        """Return the ways in which a parameter may be covered."""
        expected = self.coverage
        if isinstance(expected, dict):
            found = [value for key, value in expected.items() if name.startswith(f"layer.{key}")]
            expected = found[-1]
        return SLOW if expected == "slow" else (f"captured ({expected})",)


class Mixed(nn.Module):
    """A layer whose outputs are squashed, and mixed to three logits by fixed numbers."""

    def __init__(self, layer, call=None):
        super().__init__()
        self.layer = layer
        self.call = call

    def forward(self, *inputs):
        out = self.layer(*inputs) if self.call is None else self.call(self.layer, *inputs)
        out = out.flatten(1).tanh()
        numbers = torch.arange(3 * out.shape[1], dtype=out.dtype)
        return out @ numbers.sin().view(-1, 3)


@cache
def examples_of(case):
    """Return the outputs and Jacobians of a case's examples."""
    model = case.model().eval()
    return dense.examples_of(model, case.batch(), torch.arange(3)[None], dense.CATEGORICAL)


def normal(*shape):
    def inputs(n, generator):
        return (torch.randn(n, *shape, generator=generator, dtype=torch.float64),)

    return inputs


def tokens(*shape, vocabulary=7, first=0):
    """Token ids; those of the first half of the examples are at least ``first``."""

    def inputs(n, generator):
        ids = torch.randint(vocabulary, (n, *shape), generator=generator)
        early = torch.randint(first, vocabulary, (n // 2, *shape), generator=generator)
        return (torch.cat([early, ids[n // 2 :]]),)

    return inputs


# -- convolutions ----------------------------------------------------------------------------------

SIZES = {1: (7,), 2: (5, 4), 3: (4, 3, 4)}
KERNELS = {1: 3, 2: (3, 2), 3: 2}
PADDINGS = {1: 1, 2: (1, 2), 3: (2, 1, 0)}
STRIDES = {1: 2, 2: (2, 3), 3: (1, 2, 3)}
DILATIONS = {1: 2, 2: (1, 2), 3: (2, 1, 2)}


def convolution(dims, channels=(4, 4), **settings):
    settings.setdefault("kernel_size", KERNELS[dims])
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    shown = ", ".join(f"{key}={value}" for key, value in settings.items())
    return Case(
        f"{kind.__name__}{channels}({shown})",
        lambda: kind(*channels, **settings),
        normal(channels[0], *SIZES[dims]),
        "convolution",
    )


CONVOLUTIONS = [
    case
    for d in (1, 2, 3)
    for case in (
        convolution(d),
        convolution(d, bias=False),
        convolution(d, stride=STRIDES[d]),
        convolution(d, stride=2, padding=1),
        convolution(d, dilation=DILATIONS[d]),
        convolution(d, groups=2),
        convolution(d, groups=4),
        convolution(d, (4, 8), groups=4, bias=False),
        convolution(d, padding=PADDINGS[d]),
        convolution(d, padding="valid", stride=2),
        convolution(d, kernel_size=3, padding="same"),
        convolution(d, kernel_size=2, padding="same", bias=False),
        convolution(d, (2, 2), kernel_size=3, padding="same", dilation=2, groups=2),
        *(convolution(d, padding=1, padding_mode=mode) for mode in ("reflect", "replicate")),
        convolution(d, padding=PADDINGS[d], padding_mode="circular"),
        convolution(d, kernel_size=2, padding="same", padding_mode="circular"),
        convolution(d, kernel_size=3, padding="same", padding_mode="reflect"),
        convolution(
            d,
            groups=2,
            stride=STRIDES[d],
            dilation=DILATIONS[d],
            padding=2,
            padding_mode="replicate",
            bias=False,
        ),
    )
]


def windows(inner):
    """Call a layer on (B * W, C, L), with the example index running slowest or fastest."""

    def call(layer, x):
        b, w = x.shape[:2]
        x = x.transpose(0, 1) if inner else x
        out = layer(x.flatten(0, 1))
        return out.view(w, b, -1).transpose(0, 1) if inner else out.view(b, -1)

    return call


def one_by_one(layer, x):
    """Call a layer on each example without a batch dimension."""
    return torch.stack([layer(example) for example in x])


def windows_one_by_one(layer, x):
    """Call a layer on the examples' windows, one window at a time."""
    return torch.stack([layer(x[:, i]) for i in range(x.shape[1])], 1)


CALLS_OF_CONVOLUTIONS = [
    Case("windows merged", lambda: nn.Conv1d(2, 3, 2), normal(3, 2, 5), "convolution", windows(0)),
    Case(
        "windows merged, example fastest",
        lambda: nn.Conv2d(2, 2, 2, groups=2),
        normal(3, 2, 4, 3),
        "convolution",
        windows(1),
    ),
    Case(
        "windows in turn",
        lambda: nn.Conv1d(2, 3, 2, padding=1, padding_mode="reflect"),
        normal(3, 2, 5),
        "convolution",
        windows_one_by_one,
    ),
    Case("without a batch", lambda: nn.Conv2d(2, 2, 2), normal(2, 4, 3), "slow", one_by_one),
    Case(
        "by function, on a weight of its own",
        lambda: nn.ParameterDict({"w": torch.randn(4, 2, 3), "b": torch.randn(4)}),
        normal(4, 6),
        "convolution",
        lambda p, x: F.conv1d(x, p["w"], p["b"], 2, padding=1, groups=2),
    ),
    Case(
        "by function, a filter for every example",
        lambda: nn.Conv1d(3, 2, 3),
        normal(3, 6),
        "convolution",
        lambda layer, x: F.conv1d(input=x, weight=layer.weight, bias=layer.bias, stride=(2,)),
    ),
]

# -- tables ----------------------------------------------------------------------------------------


def first_of(layer, ids):
    """Look up one token of each example."""
    return layer(ids[:, 0])


EMBEDDINGS = [
    Case("Embedding", lambda: nn.Embedding(7, 3), tokens(T), "embedding"),
    Case("Embedding, one token", lambda: nn.Embedding(7, 3), tokens(T), "embedding", first_of),
    Case("Embedding, two axes", lambda: nn.Embedding(7, 3), tokens(2, 3), "embedding"),
    Case("Embedding, repeated", lambda: nn.Embedding(2, 3), tokens(6, vocabulary=2), "embedding"),
    Case(
        "Embedding, time first",
        lambda: nn.Embedding(7, 3),
        tokens(T),
        "embedding",
        lambda layer, ids: layer(ids.T).transpose(0, 1),
    ),
    # The padding is met for the first time when everything has been checked.
    Case(
        "Embedding, padding_idx=0",
        lambda: nn.Embedding(5, 3, padding_idx=0),
        tokens(T, vocabulary=5, first=1),
        "embedding",
    ),
    Case(
        "Embedding, padding_idx=-5",
        lambda: nn.Embedding(5, 3, padding_idx=-5),
        tokens(T, vocabulary=5, first=1),
        "embedding",
    ),
    Case(
        "embedding by function, padding_idx=-5",
        lambda: nn.Embedding(5, 3),
        tokens(T, vocabulary=5, first=1),
        "embedding",
        lambda layer, ids: F.embedding(ids, layer.weight, padding_idx=-5),
    ),
    Case(
        "Embedding, called twice",
        lambda: nn.Embedding(7, 3),
        tokens(T),
        "embedding",
        lambda layer, ids: layer(ids) + layer(ids.flip(1)[:, :1]),
    ),
    Case("Embedding, sparse", lambda: nn.Embedding(7, 3, sparse=True), tokens(T), "embedding"),
    Case(
        "Embedding that bounds norms",
        lambda: nn.Embedding(7, 3, max_norm=10.0),
        tokens(T),
        "slow",
    ),
    Case("EmbeddingBag", lambda: nn.EmbeddingBag(7, 3, mode="mean"), tokens(T), "slow"),
]

# -- norms -----------------------------------------------------------------------------------------


def norm(layer, *shape, rule):
    return Case(repr(layer()) + f" on {shape}", layer, normal(*shape), rule)


def after_linear(layer, width, *shape):
    """A layer without parameters, behind one that has some."""
    return Case(
        f"{layer()!r} behind a linear layer",
        lambda: nn.Sequential(nn.Linear(width, width), layer()),
        normal(*shape),
        "linear",
    )


NORMS = [
    *(
        norm(layer, *shape, rule="layer norm")
        for layer, shape in [
            (lambda: nn.LayerNorm(5), (5,)),
            (lambda: nn.LayerNorm(5), (T, 5)),
            (lambda: nn.LayerNorm(5), (2, 3, 5)),
            (lambda: nn.LayerNorm((3, 4)), (3, 4)),
            (lambda: nn.LayerNorm((3, 4)), (2, 3, 4)),
            (lambda: nn.LayerNorm((2, 3, 2), eps=0.3), (2, 3, 2)),
            (lambda: nn.LayerNorm(5, bias=False), (T, 5)),
        ]
    ),
    *(
        norm(layer, *shape, rule="RMS norm")
        for layer, shape in [
            (lambda: nn.RMSNorm(5), (5,)),
            (lambda: nn.RMSNorm(5, eps=0.3), (T, 5)),
            (lambda: nn.RMSNorm((3, 4)), (2, 3, 4)),
        ]
    ),
    *(
        norm(layer, *shape, rule="group norm")
        for layer, shape in [
            (lambda: nn.GroupNorm(2, 6), (6,)),
            (lambda: nn.GroupNorm(1, 4), (4, 5)),
            (lambda: nn.GroupNorm(2, 4, eps=0.3), (4, 3, 2)),
            (lambda: nn.GroupNorm(4, 4), (4, 2, 2, 2)),
        ]
    ),
    *(
        norm(layer, *shape, rule="batch norm")
        for layer, shape in [
            (lambda: nn.BatchNorm1d(5), (5,)),
            (lambda: nn.BatchNorm1d(4, eps=0.3), (4, 3)),
            (lambda: nn.BatchNorm2d(4, momentum=None), (4, 3, 2)),
            (lambda: nn.BatchNorm3d(3), (3, 2, 2, 2)),
        ]
    ),
    after_linear(lambda: nn.LayerNorm(5, elementwise_affine=False), 5, T, 5),
    after_linear(lambda: nn.RMSNorm(5, elementwise_affine=False), 5, T, 5),
    after_linear(lambda: nn.GroupNorm(2, 4, affine=False), 5, 4, 5),
    after_linear(lambda: nn.BatchNorm1d(4, affine=False), 5, 4, 5),
    norm(lambda: nn.InstanceNorm1d(4, affine=True), 4, 5, rule="slow"),
    norm(lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True), 3, 2, 3, rule="slow"),
]

# -- attention -------------------------------------------------------------------------------------

CAUSAL = torch.full((T, T), True).triu(1)


def attention(name, *, rest=None, context=None, masked=False, call=None, **settings):
    """Attention of width 4, over itself or over a context ``(length, width)``.

    The projections of inputs and outputs are linear; ``rest`` says which parameters are not.
    """
    call = call or {}

    def forward(layer, x, *others):
        arguments = dict(call)
        if masked:
            *others, arguments["key_padding_mask"] = others
        k = others[0] if others else x
        v = others[-1] if others else x
        x, k, v = (part if layer.batch_first else part.transpose(0, 1) for part in (x, k, v))
        out, weights = layer(x, k, v, **arguments)
        out = out if layer.batch_first else out.transpose(0, 1)
        return out if weights is None else torch.cat([out.flatten(1), weights.flatten(1)], 1)

    def inputs(n, generator):
        shapes = [(T, 4), *(context or [])]
        out = [torch.randn(n, *s, generator=generator, dtype=torch.float64) for s in shapes]
        if masked:
            mask = torch.rand(n, shapes[-1][0], generator=generator) < 0.4
            mask[:, 0] = False
            out.append(mask)
        return tuple(out)

    return Case(
        f"attention, {name}",
        lambda: nn.MultiheadAttention(4, 2, **settings),
        inputs,
        {"": "linear", **(rest or {})},
        forward,
    )


ATTENTION = [
    *(
        attention(f"{name}, {'batch' if first else 'time'} first", batch_first=first, **settings)
        for first in (True, False)
        for name, settings in {
            "self": {},
            "self, without weights": {"call": {"need_weights": False}},
            "cross": {"context": [(5, 4)]},
            "cross, keys and values apart": {"context": [(5, 4), (5, 4)]},
            "cross of other widths": {"context": [(5, 3), (5, 2)], "kdim": 3, "vdim": 2},
            "padded": {"masked": True},
        }.items()
    ),
    attention("no bias", bias=False, batch_first=True),
    attention(
        "added keys and values",
        rest={"bias_k": "expansion", "bias_v": "expansion"},
        add_bias_kv=True,
        batch_first=True,
    ),
    attention("added zeros", add_zero_attn=True, call={"average_attn_weights": False}),
    attention("causal", batch_first=True, call={"attn_mask": CAUSAL, "need_weights": False}),
    attention(
        "causal by hint", call={"attn_mask": CAUSAL, "is_causal": True, "need_weights": False}
    ),
    attention("scores added to", call={"attn_mask": CAUSAL.double().mul(-0.7)}),
    attention(
        "padded cross, of other widths", masked=True, context=[(5, 3), (5, 2)], kdim=3, vdim=2
    ),
    attention("dropout, which is off in evaluation", dropout=0.5, batch_first=True),
]

# -- products --------------------------------------------------------------------------------------


class Conv1D(nn.Module):
    """A linear layer with its weight stored (in, out), as GPT-2 has them."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        size_out = (*x.size()[:-1], self.nf)
        x = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return x.view(size_out)


def product(name, call, coverage, *shape, **parameters):
    shapes = {"w": (5, 3), **parameters}

    def layer():
        return nn.ParameterDict({key: torch.randn(shape) for key, shape in shapes.items()})

    return Case(name, layer, normal(*shape), coverage, call)


PRODUCTS = [
    Case("Linear", lambda: nn.Linear(5, 3), normal(5), "linear"),
    Case("Linear, positions", lambda: nn.Linear(5, 3, bias=False), normal(2, 3, 5), "linear"),
    Case("Conv1D of GPT-2", lambda: Conv1D(3, 5), normal(T, 5), "addmm"),
    Case("Conv1D of GPT-2, no positions", lambda: Conv1D(3, 5), normal(5), "addmm"),
    Case(
        "Conv1D of GPT-2, in a row",
        lambda: nn.Sequential(Conv1D(6, 5), nn.GELU(), Conv1D(4, 6)),
        normal(T, 5),
        "addmm",
    ),
    product("@", lambda p, x: x @ p["w"], "matmul", T, 5),
    product("torch.matmul", lambda p, x: torch.matmul(x, p["w"]), "matmul", 2, 3, 5),
    product("Tensor.matmul", lambda p, x: x.matmul(p["w"]), "matmul", 5),
    product("torch.mm", lambda p, x: torch.mm(x, p["w"]), "matmul", 5),
    product("Tensor.mm", lambda p, x: x.flatten(0, 1).mm(p["w"]).view(len(x), -1), "matmul", T, 5),
    product("torch.matmul by name", lambda p, x: torch.matmul(x, other=p["w"]), "matmul", T, 5),
    product(
        "torch.matmul, both by name",
        lambda p, x: torch.matmul(other=p["w"], input=x),
        "matmul",
        5,
    ),
    product("torch.mm by name", lambda p, x: torch.mm(x, mat2=p["w"]), "matmul", 5),
    product("Tensor.matmul by name", lambda p, x: x.matmul(other=p["w"]), "matmul", T, 5),
    product("Tensor.mm by name", lambda p, x: x.mm(mat2=p["w"]), "matmul", 5),
    product("torch.matmul by NumPy's name", lambda p, x: torch.matmul(x, x2=p["w"]), "slow", 5),
    product("@, a weight for the left side", lambda p, x: p["w"] @ x, "slow", 3, 2),
    product(
        "addmm with factors",
        lambda p, x: torch.addmm(p["b"], x, p["w"], beta=0.5, alpha=2),
        "slow",
        5,
        b=(3,),
    ),
    product(
        "addmm with a matrix added",
        lambda p, x: torch.addmm(p["b"], x, p["w"]),
        {"w": "addmm", "b": "slow"},
        5,
        b=(1, 3),
    ),
    product("einsum", lambda p, x: torch.einsum("bti,io->bto", x, p["w"]), "slow", T, 5),
    product("linear on a transpose", lambda p, x: F.linear(x, p["w"].T), "slow", 5),
    product("low rank", lambda p, x: x @ (p["a"] @ p["w"]), "slow", 4, a=(4, 5)),
    product(
        "low rank, in turn",
        lambda p, x: (x @ p["a"]) @ p["w"],
        "matmul",
        4,
        a=(4, 5),
    ),
]

# -- what all examples share -----------------------------------------------------------------------


def shared(name, call, coverage, *shape, **parameters):
    """Parameters, or modules, that meet inputs of a shape directly."""

    def layer():
        parts = {
            key: p if callable(p) else partial(torch.randn, p) for key, p in parameters.items()
        }
        built = {key: build() for key, build in parts.items()}
        modules = any(isinstance(part, nn.Module) for part in built.values())
        return nn.ModuleDict(built) if modules else nn.ParameterDict(built)

    return Case(name, layer, normal(*shape), coverage, call)


def in_place(layer, x):
    """Scale and shift the same memory again and again."""
    x = x.tanh()
    x *= layer["w"]
    x.mul_(layer["w"]).add_(layer["b"], alpha=-0.5)
    x -= layer["b"]
    return x


def of_views(name, call, coverage="multiplication", **parameters):
    return shared(f"multiplication by {name}", call, coverage, 2, 3, 4, **parameters)


PRODUCTS_BY_ELEMENT = [
    shared("w * x", lambda p, x: p["w"] * x, "multiplication", T, 5, w=(5,)),
    shared("x * w", lambda p, x: x * p["w"], "multiplication", 5, w=(5,)),
    shared("torch.mul", lambda p, x: torch.mul(x, other=p["w"]), "multiplication", 2, 3, w=(3,)),
    shared("Tensor.mul", lambda p, x: x.mul(p["w"]), "multiplication", T, 5, w=(T, 1)),
    shared("a scalar times x", lambda p, x: p["w"] * x, "multiplication", T, 3, w=()),
    shared("one number times x", lambda p, x: x * p["w"], "multiplication", T, 3, w=(1,)),
    shared("w * x, x of size 1", lambda p, x: x * p["w"], "multiplication", T, 1, w=(5,)),
    shared("w * x, of another dtype", lambda p, x: x.float() * p["w"], "multiplication", 5, w=(5,)),
    of_views("a weight per channel", lambda p, x: p["w"] * x, w=(2, 1, 1)),
    of_views("unsqueezed", lambda p, x: x * p["w"][None, :, None, None], w=(2,)),
    of_views("reshaped", lambda p, x: x * p["w"].view(1, -1, 1, 1), w=(2,)),
    of_views("transposed", lambda p, x: x * p["w"].T, w=(4, 3)),
    of_views("in part", lambda p, x: x * p["w"][1:, 2:6], w=(4, 7)),
    of_views("every other", lambda p, x: x * p["w"][::2], w=(5, 4)),
    of_views("a part for each half", lambda p, x: x * p["w"][:4] + x * p["w"][1:], w=(5,)),
    of_views("overlapping windows", lambda p, x: x * p["w"].unfold(0, 4, 1), "slow", w=(6,)),
    of_views("a function of the weight", lambda p, x: x * p["w"].exp(), "slow", w=(4,)),
    of_views("its square", lambda p, x: x * (p["w"] * p["w"]), "slow", w=(4,)),
    of_views("a detached weight", lambda p, x: (x + p["w"]) * p["w"].detach(), "addition", w=(4,)),
]

SUMS_BY_ELEMENT = [
    shared("w + x", lambda p, x: p["w"] + x, "addition", T, 5, w=(T, 5)),
    shared("x + w", lambda p, x: x + p["w"], "addition", T, 5, w=(1, T, 5)),
    shared("x + w, w per position", lambda p, x: x + p["w"], "addition", T, 5, w=(T, 1)),
    shared("x + w, longer", lambda p, x: x + p["w"][:, :T], "addition", T, 5, w=(1, T + 2, 5)),
    shared(
        "torch.add with alpha", lambda p, x: torch.add(x, p["w"], alpha=2), "addition", 5, w=(5,)
    ),
    shared("torch.add to w", lambda p, x: torch.add(p["w"], x, alpha=2), "addition", 5, w=(5,)),
    shared("x - w", lambda p, x: x - p["w"], "subtraction", T, 5, w=(5,)),
    shared("w - x", lambda p, x: p["w"] - x, "subtraction", T, 5, w=(5,)),
    shared(
        "torch.sub with alpha", lambda p, x: torch.sub(x, p["w"], alpha=2), "subtraction", 5, w=(5,)
    ),
    shared("in place", in_place, {"w": "multiplication", "b": "subtraction"}, T, 5, w=(5,), b=(5,)),
    shared(
        "in place of a view",
        lambda p, x: x.tanh().transpose(1, 2).mul_(p["w"]),
        "slow",
        T,
        5,
        w=(T,),
    ),
    shared(
        "scale and shift",
        lambda p, x: (x * p["w"] + p["b"]).tanh() * p["w"],
        {"w": "multiplication", "b": "addition"},
        T,
        5,
        w=(5,),
        b=(5,),
    ),
    shared("a product and a sum", lambda p, x: x @ p["w"] + p["w"][0], "addition", T, 5, w=(5, 5)),
    shared(
        "x + w, time first",
        lambda p, x: (x.transpose(0, 1) + p["w"]).transpose(0, 1),
        "addition",
        T,
        5,
        w=(5,),
    ),
    shared(
        "x + w per position, time first",
        lambda p, x: (x.transpose(0, 1) + p["w"][:, None]).transpose(0, 1),
        "slow",
        T,
        5,
        w=(T, 5),
    ),
    shared(
        "windows merged, + w",
        lambda p, x: (x.flatten(0, 1) + p["w"]).view_as(x),
        "addition",
        3,
        T,
        5,
        w=(T, 5),
    ),
    shared(
        "two parameters first", lambda p, x: x + (p["w"] + p["b"]), "slow", T, 5, w=(T, 5), b=(5,)
    ),
]

EXPANSIONS = [
    shared(
        "class token",
        lambda p, x: torch.cat([p["w"].expand(len(x), -1, -1), x], 1),
        "expansion",
        T,
        5,
        w=(1, 1, 5),
    ),
    shared(
        "class token as a vector",
        lambda p, x: torch.cat([p["w"].expand((len(x), 1, -1)), x], 1),
        "expansion",
        T,
        5,
        w=(5,),
    ),
    shared(
        "class token, repeated",
        lambda p, x: torch.cat([p["w"].repeat(len(x), 1, 1), x], 1),
        "expansion",
        T,
        5,
        w=(1, 1, 5),
    ),
    shared(
        "tokens, unsqueezed",
        lambda p, x: torch.cat([p["w"][None].expand(len(x), -1, -1), x], 1),
        "expansion",
        T,
        5,
        w=(2, 5),
    ),
    shared("expand_as", lambda p, x: x.sin() / p["w"].expand_as(x), "expansion", T, 5, w=(T, 1)),
    shared(
        "broadcast_to",
        lambda p, x: x.cos() * torch.broadcast_to(p["w"], x.shape),
        "expansion",
        T,
        5,
        w=(5,),
    ),
    shared(
        "expanded along positions only", lambda p, x: x + p["w"].expand(T, -1), "slow", T, 5, w=(5,)
    ),
    shared("tiled", lambda p, x: x * p["w"].repeat(len(x), 1, 2), "slow", T, 6, w=(3,)),
]


def looked_up(name, call, coverage="embedding", **settings):
    """Positions looked up once for all examples."""
    table = partial(nn.Embedding, T + 2, 3, **settings)
    return shared(f"positions, {name}", lambda p, x: call(p["e"], x), coverage, T, 3, e=table)


POSITIONS = torch.arange(T)
LOOKUPS = [
    looked_up("+", lambda e, x: x + e(POSITIONS)),
    looked_up("of one row", lambda e, x: e(POSITIONS[None]) + x),
    looked_up("unsqueezed", lambda e, x: torch.add(x, e(POSITIONS)[None])),
    looked_up("in place", lambda e, x: x.tanh().add_(e(POSITIONS.flip(0)))),
    looked_up("repeated entries", lambda e, x: x + e(POSITIONS // 2)),
    looked_up("padding_idx=2", lambda e, x: x + e(POSITIONS), padding_idx=2),
    looked_up("added twice", lambda e, x: (lambda p: (x + p).tanh() + (p + x.sin()))(e(POSITIONS))),
    looked_up("expanded", lambda e, x: x * e(POSITIONS[None]).expand(len(x), -1, -1)),
    looked_up("repeated", lambda e, x: x * e(POSITIONS)[None].repeat(len(x), 1, 1)),
    looked_up("and indices of examples", lambda e, x: e((x[..., 0] > 0).long()) + e(POSITIONS)),
    looked_up("one for all positions", lambda e, x: x + e(POSITIONS[1:2])),
    looked_up("multiplied by", lambda e, x: x * e(POSITIONS), "slow"),
    looked_up("subtracted", lambda e, x: x - e(POSITIONS), "slow"),
    looked_up(
        "added, and multiplied by", lambda e, x: (lambda p: (x + p) * p)(e(POSITIONS)), "slow"
    ),
    looked_up("scaled in place", lambda e, x: x + e(POSITIONS).mul_(2), "slow"),
    looked_up("in part", lambda e, x: x + e(torch.arange(T + 2))[:T], "slow"),
    looked_up(
        "of rows and columns",
        lambda e, x: x + (e(POSITIONS)[:, None] + e(POSITIONS)).sum(1),
        "slow",
    ),
]

SHARED = [*PRODUCTS_BY_ELEMENT, *SUMS_BY_ELEMENT, *EXPANSIONS, *LOOKUPS]

# -- subclasses ------------------------------------------------------------------------------------


class OwnLinear(nn.Linear):
    """A subclass that adds nothing."""


class ScaledConv2d(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x).relu()


class StandardizedConv2d(nn.Conv2d):
    """A convolution by a function of its weight."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias)


class ChannelsFirstNorm(nn.LayerNorm):
    """Layer norm over channels, as ConvNeXt has it."""

    def forward(self, x):
        x = x.movedim(1, -1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).movedim(
            -1, 1
        )


class ShiftedNorm(nn.RMSNorm):
    """RMS norm by one plus its weight, as Gemma has it."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, 1 + self.weight, self.eps)


class ScaledEmbedding(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * self.embedding_dim**0.5


class OwnAttention(nn.MultiheadAttention):
    def forward(self, x):
        return x + super().forward(x, x, x, need_weights=False)[0]


SUBCLASSES = [
    Case("subclass of Linear", lambda: OwnLinear(5, 3), normal(T, 5), "linear"),
    Case("subclass of Conv2d", lambda: ScaledConv2d(2, 3, 2), normal(2, 3, 3), "convolution"),
    Case("standardized Conv2d", lambda: StandardizedConv2d(2, 3, 2), normal(2, 3, 3),
         {"weight": "slow", "bias": "convolution"}),
    Case("subclass of LayerNorm", lambda: ChannelsFirstNorm(3), normal(3, 4), "layer norm"),
    Case("subclass of RMSNorm", lambda: ShiftedNorm(3), normal(3), "slow"),
    Case("subclass of Embedding", lambda: ScaledEmbedding(7, 3), tokens(T), "embedding"),
    Case(
        "subclass of MultiheadAttention",
        lambda: OwnAttention(4, 2, batch_first=True),
        normal(T, 4),
        "linear",
    ),
]  # fmt: skip

# -- what no rule covers ---------------------------------------------------------------------------


def first_output(layer, x):
    return layer(x)[0]


def two_halves(layer, x):
    return layer(*x.chunk(2, -1))


OTHERS = [
    Case("Bilinear", lambda: nn.Bilinear(3, 2, 4), normal(5), "slow",
         lambda layer, x: layer(x[:, :3], x[:, 3:])),
    Case("LSTM", lambda: nn.LSTM(3, 2, batch_first=True), normal(T, 3), "slow", first_output),
    Case("GRU", lambda: nn.GRU(3, 2, batch_first=True, bidirectional=True), normal(T, 3), "slow",
         first_output),
    Case("RNN", lambda: nn.RNN(3, 2, batch_first=True, bias=False), normal(T, 3), "slow",
         first_output),
    Case("LSTMCell", lambda: nn.LSTMCell(3, 2), normal(7), "slow",
         lambda layer, x: layer(x[:, :3], (x[:, 3:5], x[:, 5:]))[0]),
    Case("ConvTranspose1d", lambda: nn.ConvTranspose1d(2, 3, 2, stride=2), normal(2, 3), "slow"),
    Case("ConvTranspose2d", lambda: nn.ConvTranspose2d(2, 2, 2, groups=2), normal(2, 3, 2), "slow"),
    Case("PReLU", lambda: nn.PReLU(3), normal(3, 2), "slow"),
]  # fmt: skip

CASES = [
    *CONVOLUTIONS,
    *CALLS_OF_CONVOLUTIONS,
    *EMBEDDINGS,
    *NORMS,
    *ATTENTION,
    *PRODUCTS,
    *SHARED,
    *SUBCLASSES,
    *OTHERS,
]
assert len({case.name for case in CASES}) == len(CASES)
parametrize_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@parametrize_cases
def test_how_parameters_are_covered(case):
    """By the rule for the layer; all that has none by torch.func or backward passes."""
    for sizes in ((N,), (7,)):
        fitted = Explicit().fit(case.model(), split(case.batch(), N, *sizes))
        assert list(fitted.coverage_) == fitted.parameter_names_
        for name, found in fitted.coverage_.items():
            assert found in case.covered(name), name


@parametrize_cases
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_definition(case, kind):
    """Whatever the kind of Fisher, the batch size and the solver."""
    examples, batch = examples_of(case), case.batch()
    random = torch.randn(2, examples.jacobians.shape[2], dtype=torch.float64)
    for sizes, solver in FITS if kind == "empirical" else FITS[1:3]:
        loss = losses.resolve_loss("cross_entropy")
        draws = dense.keep_draws(loss)
        fitted = Explicit(loss=loss, fisher=kind, n_mc_samples=2, random_state=0, solver=solver)
        fitted.fit(case.model(), split(batch, N, *sizes))
        weighted = examples.rows(kind, batch[-1], dense.sets_of_labels(draws, 2))
        expected = weighted.fisher()
        assert dense.distance(fitted.fisher_.to_dense(), expected) <= 1e-11
        vectors = torch.cat([weighted.gradients[:3], random])
        expected = dense.solve(expected, vectors, dense.heuristic(expected))
        assert reference.error(fitted.transform(vectors), expected) <= 1e-9


@parametrize_cases
def test_parameters_apart(case):
    """Each parameter in a block of its own, then each in a fit of its own, the others frozen."""
    model, batches = case.model(), split(case.batch(), N, 7)
    whole = examples_of(case).rows("empirical", case.batch()[-1]).fisher()
    fitted = Explicit(blocks="parameter").fit(model, batches)
    start, expected = 0, torch.zeros_like(whole)
    for name, parameter in model.named_parameters():
        own = slice(start, start + parameter.numel())
        start = own.stop
        expected[own, own] = whole[own, own]
        model.requires_grad_(False)
        parameter.requires_grad_(True)
        alone = Explicit().fit(model, batches)
        assert alone.parameter_names_ == [name]
        assert dense.distance(alone.fisher_.to_dense(), whole[own, own]) <= 1e-11
        assert alone.coverage_[name] in case.covered(name)
    assert dense.distance(fitted.fisher_.to_dense(), expected) <= 1e-11


@pytest.mark.parametrize("solver", ["primal", "dual"])
@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        (lambda: nn.Conv1d(2, 3, 2, groups=1), lambda length: normal(2, length)),
        (lambda: nn.Conv1d(8, 8, 2), lambda length: normal(8, length)),
        (lambda: nn.Linear(9, 8), lambda length: normal(length, 9)),
        (lambda: nn.Linear(3, 2), lambda length: normal(length, 3)),
        (lambda: nn.Embedding(12, 2), lambda length: tokens(length, vocabulary=12)),
        (lambda: nn.LayerNorm(3), lambda length: normal(length, 3)),
        (lambda: nn.GroupNorm(2, 4), lambda length: normal(4, length)),
    ],
    ids=[
        "Conv1d, wide rows",
        "Conv1d",
        "Linear",
        "Linear, wide",
        "Embedding",
        "LayerNorm",
        "GroupNorm",
    ],
)
def test_batches_of_different_lengths(layer, inputs, solver):
    """What is kept of shorter examples, as factors or as rows, joins what is kept of longer."""

    def pooled(layer, *inputs):
        out = layer(*inputs)
        return torch.stack([out.sum((1, 2)), out.square().mean((1, 2)), out.amax((1, 2))], 1)

    model = Mixed(layer(), pooled).double()
    batches = [
        (*inputs(length)(n, torch.Generator().manual_seed(n)), torch.arange(n) % 3)
        for n, length in ((4, 5), (3, 2), (1, 9), (2, 1))
        if length > 1 or not isinstance(model.layer, nn.Conv1d)
    ]
    rows = torch.cat(
        [
            reference.gradients(model, reference.negative_log_likelihood, batch, len(batch[-1]))
            for batch in batches
        ]
    )
    fitted = Explicit(1e-2, solver=solver).fit(model, batches)
    assert fitted.coverage_["layer.weight"].startswith("captured")
    assert dense.distance(fitted.fisher_.to_dense(), reference.fisher(rows)) <= 1e-12
    expected = reference.ifvp(rows, rows, 1e-2)
    assert reference.error(fitted.transform(rows), expected) <= 1e-9


class Largest(TorchDispatchMode):
    """Notes the most numbers that any result of an operator has."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, tuple | list) else [out]:
            if isinstance(part, torch.Tensor) and 0 not in part.stride():
                self.numbers = max(self.numbers, part.numel())
        return out


def test_big_tables_are_never_one_hot():
    """Neither rows of a table's size for each example, nor anything vocabulary by vocabulary."""
    vocabulary, width, n = 20_000, 8, 40
    model = Mixed(nn.Embedding(vocabulary, width)).double()
    (ids,) = tokens(T, vocabulary=vocabulary)(n, torch.Generator().manual_seed(0))
    ids[::5] = ids[0]
    batch = ids, torch.arange(n) % 3
    parameters = vocabulary * width
    with Largest() as largest:
        fitted = Explicit(1e-2).fit(model, split(batch, n, 16))
        rows = reference.gradients(model, reference.negative_log_likelihood, batch, n)
        found = fitted.transform(rows[:2])
        fitted.score(rows[:2])
    assert largest.numbers == n * parameters, "the reference's own rows"
    with Largest() as largest:
        again = Explicit(1e-2).fit(model, split(batch, n, 16))
        vectors = rows[:2].clone()
        assert torch.equal(again.transform(vectors), found)
        again.score(vectors)
    assert largest.numbers <= 2 * parameters, "one vector, or the two given"
    ((_, kept),) = fitted.fisher_.rows.groups
    assert isinstance(kept, LookupRows)
    assert kept.indices.numel() + kept.signals.numel() == n * T * (1 + width)
    gram = rows @ rows.T
    coefficients = torch.linalg.solve(gram + n * 1e-2 * torch.eye(n, dtype=gram.dtype), gram[:, :2])
    assert reference.error(found, (rows[:2] - coefficients.T @ rows) / 1e-2) <= 1e-9


def test_tables_scaled_by_frequency_in_the_batch_are_refused():
    """Their gradient at one example depends on the others of its batch."""
    model = Mixed(nn.Embedding(5, 3, scale_grad_by_freq=True)).double()
    batch = (*tokens(T, vocabulary=5)(N, torch.Generator().manual_seed(0)), torch.arange(N) % 3)
    with pytest.raises(IFVPUsageError, match=r"'layer\.weight'.*depends on the others"):
        Explicit().fit(model, [batch])


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(5), nn.BatchNorm1d(5, affine=False)], ids=repr)
def test_batch_statistics_are_left_alone(layer):
    """Running statistics are used, whatever the mode, and are not updated."""
    model = Mixed(nn.Sequential(nn.Linear(5, 5), layer)).double().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batch = (*normal(5)(N, torch.Generator().manual_seed(0)), torch.arange(N) % 3)
    Explicit().fit(model, [batch])
    assert model.layer[1].training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
