"""Models and batches as data: one case for each way in which a model may meet its parameters.

Every case is small (p a few hundred at most), in float64, and the same on every run.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from tests import reference

# Positions per example, and examples of a case. A batch of T examples has as many examples as
# positions, so that no shape tells the two axes apart.
T = 4
N = 12


@dataclass(frozen=True)
class Case:
    """A model, its data, the loss as fimkit is given it and as the reference computes it.

    Attributes
    ----------
    data : callable
        ``data(n, generator)`` returns one batch of n examples, along dimension ``dim``.
    captured : tuple of str
        Parameters that must be captured, by prefix of their names: the fast way.
    fallback : tuple of str
        Parameters that no rule can cover.
    """

    name: str
    build: Callable[[], nn.Module]
    data: Callable[[int, torch.Generator], Any]
    loss: Any = "cross_entropy"
    example_loss: Callable[[nn.Module, Any], Tensor] = reference.negative_log_likelihood
    dim: int = 0
    captured: tuple[str, ...] = ()
    fallback: tuple[str, ...] = field(default=())

    def model(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(zlib.crc32(self.name.encode()))
            model = self.build().double()
            with torch.no_grad():
                for parameter in model.parameters():
                    # No weight stays at one and no bias at zero, where a mistake may not show.
                    parameter.add_(0.2 * torch.randn_like(parameter))
        return model

    def batch(self, n: int = N) -> Any:
        return self.data(n, torch.Generator().manual_seed(zlib.crc32(self.name.encode())))

    def batches(self, *sizes: int, n: int = N) -> list[Any]:
        """Return the n examples in batches of the sizes given, the last one repeated."""
        return split(self.batch(n), n, *sizes, dim=self.dim)

    @property
    def gradients(self) -> Tensor:
        """Gradients of the N examples, shape ``(N, p)``."""
        return _gradients(self)

    def gradients_of(self, name: str) -> Tensor:
        """Gradients of the N examples with respect to one parameter, shape ``(N, size)``."""
        sizes = {key: p.numel() for key, p in self.model().named_parameters()}
        parts = self.gradients.split(list(sizes.values()), 1)
        return parts[list(sizes).index(name)]


@cache
def _gradients(case: Case) -> Tensor:
    return reference.gradients(case.model(), case.example_loss, case.batch(), N, dim=case.dim)


def split(batch: Any, n: int, *sizes: int, dim: int = 0) -> list[Any]:
    """Cut a batch of n examples into batches of the sizes given, the last one repeated."""
    out, start, sizes = [], 0, list(sizes)
    while start < n:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        out.append(reference.take(batch, range(start, min(start + size, n)), dim))
        start += size
    return out


# -- data ------------------------------------------------------------------------------------------


def images(n, generator):
    return (
        torch.randn(n, 1, 6, 6, generator=generator, dtype=torch.float64),
        torch.randint(3, (n,), generator=generator),
    )


def points(features=5, classes=3):
    def data(n, generator):
        return (
            torch.randn(n, features, generator=generator, dtype=torch.float64),
            torch.randint(classes, (n,), generator=generator),
        )

    return data


def regression(*shape, features=5):
    def data(n, generator):
        return (
            torch.randn(n, features, generator=generator, dtype=torch.float64),
            torch.randn(n, *shape, generator=generator, dtype=torch.float64),
        )

    return data


def sequences(features=5, classes=3, length=T):
    """Sequences with one label each."""

    def data(n, generator):
        return (
            torch.randn(n, length, features, generator=generator, dtype=torch.float64),
            torch.randint(classes, (n,), generator=generator),
        )

    return data


def tagged(features=5, classes=3, length=T):
    """Sequences with a label at each position, some of which do not count."""

    def data(n, generator):
        x = torch.randn(n, length, features, generator=generator, dtype=torch.float64)
        y = torch.randint(classes, (n, length), generator=generator)
        y[1::3, 0] = -100
        return x, y

    return data


def time_first(data):
    """The same data with positions along dimension 0 and examples along dimension 1."""

    def transposed(n, generator):
        x, y = data(n, generator)
        return x.transpose(0, 1).contiguous(), (y.T.contiguous() if y.ndim > 1 else y[None])

    return transposed


def tokens(vocabulary=7, length=T):
    """Token ids and labels, the labels of each prompt not counting."""

    def data(n, generator):
        ids = torch.randint(vocabulary, (n, length), generator=generator)
        targets = torch.randint(vocabulary, (n, length), generator=generator)
        targets[:, 0] = -100
        targets[::3, 1] = -100
        return ids, targets

    return data


def token_dict(n, generator):
    ids, targets = tokens()(n, generator)
    attention_mask = torch.ones_like(ids)
    attention_mask[::2, -1] = 0
    return {"input_ids": ids, "attention_mask": attention_mask, "labels": targets}


def pairs(n, generator):
    """A query sequence, a longer context of another width, and a label."""
    return (
        torch.randn(n, T, 6, generator=generator, dtype=torch.float64),
        torch.randn(n, T + 1, 5, generator=generator, dtype=torch.float64),
        torch.randint(3, (n,), generator=generator),
    )


# -- models ----------------------------------------------------------------------------------------


class Apply(nn.Module):
    """A model written as a function of its modules and parameters."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | nn.Parameter | Tensor):
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                part = nn.Parameter(part)
            setattr(self, name, part)
        self.function = function

    def forward(self, *inputs, **keywords):
        return self.function(self, *inputs, **keywords)


def mlp(bias: bool = True, outputs: int = 3, features: int = 5) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(features, 6, bias),
        nn.Tanh(),
        nn.Linear(6, 4, bias),
        nn.ReLU(),
        nn.Linear(4, outputs, bias),
    )


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, stride=2, dilation=1, groups=2, bias=False),
        nn.GroupNorm(2, 4),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(16, 3),
    )


def other_convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(5, 4, 3, padding="same", padding_mode="circular"),
        nn.PReLU(),
        nn.ConvTranspose1d(4, 3, 3, stride=2, output_padding=1),
        nn.InstanceNorm1d(3, affine=True),
        nn.Conv1d(3, 3, 3, dilation=2, padding=1),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
    )


class Attention(nn.Module):
    def __init__(self, width, heads=2):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x, mask=None):
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / (d / self.heads) ** 0.5
        scores = scores + torch.full((t, t), -torch.inf, dtype=x.dtype).triu(1)
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None] == 0, -1e9)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def shared_positions() -> Apply:
    """Positions looked up once for all examples, in front of a scale for each channel."""

    def forward(self, x):
        h = x + self.positions(torch.arange(x.shape[1])[None])
        return self.head((self.scale * h.tanh()).cumsum(1).tanh().sum(1))

    return Apply(
        forward, positions=nn.Embedding(T + 2, 5), scale=torch.ones(5), head=nn.Linear(5, 3)
    )


class LanguageModel(nn.Module):
    """Token and position embeddings, layer norm, causal attention and a head."""

    def __init__(self, *, tied=False, logits=False, vocabulary=7, width=4):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width, padding_idx=0)
        self.positions = nn.Parameter(torch.randn(T, width))
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width)
        self.final = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.tokens.weight
        self.logits = logits

    def forward(self, input_ids, attention_mask=None):
        x = self.tokens(input_ids) + self.positions
        x = x + self.attention(self.norm(x), attention_mask)
        out = self.head(self.final(x))
        return SimpleNamespace(logits=out, loss=None) if self.logits else out


def self_attention(batch_first):
    def forward(self, x):
        x = x if batch_first else x.transpose(0, 1)
        out, _ = self.attention(x, x, x, need_weights=False)
        return self.head(out.mean(1 if batch_first else 0))

    return lambda: Apply(
        forward,
        attention=nn.MultiheadAttention(6, 2, batch_first=batch_first, add_bias_kv=True),
        head=nn.Linear(6, 3),
    )


def cross_attention(batch_first, width):
    """Attention to a context; of another width than 6 it has separate projections."""

    def forward(self, x, context):
        context = context if width == 5 else self.widen(context)
        if not batch_first:
            x, context = x.transpose(0, 1), context.transpose(0, 1)
        out, _ = self.attention(x, context, context)
        return self.head(out.mean(1 if batch_first else 0))

    return lambda: Apply(
        forward,
        attention=nn.MultiheadAttention(6, 2, kdim=width, vdim=width, batch_first=batch_first),
        head=nn.Linear(6, 3),
        widen=nn.Linear(5, 6) if width == 6 else nn.Identity(),
    )


def recurrent(kind, batch_first):
    def forward(self, x):
        out, _ = self.cells(x if batch_first else x.transpose(0, 1))
        return self.head(out[:, -1] if batch_first else out[-1])

    return lambda: Apply(forward, cells=kind(5, 3, batch_first=batch_first), head=nn.Linear(3, 3))


def called_twice() -> Apply:
    """A layer called on one position, then on T positions of every example."""

    def forward(self, x):
        once = self.layer(x.mean(1)).tanh()
        return self.head(self.layer(x).tanh().sum(1) + self.layer(once))

    return Apply(forward, layer=nn.Linear(5, 5), head=nn.Linear(5, 3))


def tied_layers() -> Apply:
    """Two layers with one weight and a bias each."""

    def forward(self, x):
        return self.head(self.second(self.first(x).tanh()))

    model = Apply(forward, first=nn.Linear(5, 5), second=nn.Linear(5, 5), head=nn.Linear(5, 3))
    model.second.weight = model.first.weight
    return model


def one_bias_for_two() -> Apply:
    """Two weights with the same bias."""

    def forward(self, x):
        return self.head(self.second(self.first(x).tanh()))

    model = Apply(forward, first=nn.Linear(5, 5), second=nn.Linear(5, 5), head=nn.Linear(5, 3))
    model.second.bias = model.first.bias
    return model


def tied_to_its_transpose() -> Apply:
    """An autoencoder whose decoder is the encoder's weight transposed."""
    return Apply(
        lambda self, x: F.linear(self.encoder(x).tanh(), self.encoder.weight.T, self.bias),
        encoder=nn.Linear(5, 3),
        bias=torch.zeros(5),
    )


def weight_normed() -> nn.Sequential:
    return nn.Sequential(weight_norm(nn.Linear(5, 4)), nn.Tanh(), weight_norm(nn.Linear(4, 3)))


def in_place_after_views() -> Apply:
    """Outputs of 3-D linear layers are views, on which the activations work in place."""

    def forward(self, x):
        h = F.relu_(self.first(x))
        h = self.second(h).view(-1, 4).mul_(0.7).add_(1)
        return self.head(h.view(x.shape[0], -1)).clamp_(min=-3)

    return Apply(forward, first=nn.Linear(5, 6), second=nn.Linear(6, 4), head=nn.Linear(4 * T, 3))


def transposed_inside() -> Apply:
    """Layers that see (T, B, features)."""

    def forward(self, x):
        h = self.second(self.first(x.transpose(0, 1)).tanh())
        return h.sum(0)

    return Apply(forward, first=nn.Linear(5, 4), second=nn.Linear(4, 3))


def time_first_model() -> Apply:
    """A model of (T, B, features) data."""
    return Apply(
        lambda self, x: self.second(self.first(x).cumsum(0).tanh()),
        first=nn.Linear(5, 4),
        second=nn.Linear(4, 3),
    )


def time_first_loss(model, batch):
    """Losses of (T, B) labels, one per example."""
    x, y = batch
    losses = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none")
    return losses.view(y.shape).sum(0)


def merged_windows(inner: bool) -> Apply:
    """Layers that see (B * T, features), with the example index running slowest or fastest."""

    def forward(self, x):
        b, t, _ = x.shape
        h = x.transpose(0, 1) if inner else x
        h = self.second(self.first(h.reshape(b * t, -1)).tanh())
        h = h.view(t, b, -1).transpose(0, 1) if inner else h.view(b, t, -1)
        return (h * torch.arange(1, t + 1, dtype=h.dtype)[:, None]).sum(1)

    return Apply(forward, first=nn.Linear(5, 4), second=nn.Linear(4, 3))


def weights_by_function() -> Apply:
    """Modules' weights used by functions: twice, in part, in overlapping parts, transposed."""

    def forward(self, x):
        h = F.linear(x, self.layer.weight).tanh() + self.layer(x)
        parts = F.linear(h, self.parts.weight[:3], self.parts.bias[:3])
        parts = parts + F.linear(h, self.parts.weight[2:5], self.parts.bias[2:5]).tanh()
        return parts + h @ self.product.weight.T

    return Apply(
        forward,
        layer=nn.Linear(5, 5),
        parts=nn.Linear(5, 6),
        product=nn.Linear(5, 3, bias=False),
    )


def biases_apart() -> Apply:
    """Biases that are added by hand, one to the input of a layer."""
    return Apply(
        lambda self, x: F.linear((F.linear(x, self.w) + self.b).tanh() + self.c, self.v) + self.d,
        w=torch.randn(4, 5),
        b=torch.randn(4),
        c=torch.randn(4),
        v=torch.randn(3, 4),
        d=torch.randn(1, 3),
    )


def matrices_by_columns() -> Apply:
    """Weights stored (in, out), as GPT-2 has them."""

    def forward(self, x):
        h = torch.addmm(self.b, x.flatten(0, 1), self.w).tanh() @ self.v
        return h.view(x.shape[0], -1, 3).sum(1)

    return Apply(forward, w=torch.randn(5, 4), b=torch.randn(4), v=torch.randn(4, 3))


def shared_prompt() -> Apply:
    """A prompt that is the same for all examples: its first layer has no axis of examples."""

    def forward(self, x):
        prompt = self.project(self.prompt)  # (T, width), without examples
        return self.head((x + prompt).tanh().sum(1))

    return Apply(forward, prompt=torch.randn(T, 4), project=nn.Linear(4, 5), head=nn.Linear(5, 3))


def unused_parameters() -> Apply:
    """A layer that is never called, and one whose output the loss does not see."""

    def forward(self, x):
        self.ignored(x)
        return self.used(x)

    return Apply(forward, never=nn.Linear(2, 3), used=nn.Linear(5, 3), ignored=nn.Linear(5, 2))


def scalar_parameters() -> Apply:
    return Apply(
        lambda self, x: self.layer(x) * self.temperature + self.shift,
        temperature=torch.tensor(0.7),
        layer=nn.Linear(5, 3),
        shift=torch.tensor([0.3]),
    )


class LowRank(nn.Linear):
    """A linear layer with a forward of its own."""

    def __init__(self, in_features, out_features, rank=2):
        super().__init__(in_features, out_features)
        self.a = nn.Linear(in_features, rank, bias=False)
        self.b = nn.Linear(rank, out_features, bias=False)

    def forward(self, x):
        return 2 * super().forward(x) + self.b(self.a(x))


def subclass() -> nn.Sequential:
    return nn.Sequential(LowRank(5, 4), nn.Tanh(), LowRank(4, 3))


def routed() -> Apply:
    """Positions sent to one of two experts, by their first feature."""

    def forward(self, x):
        flat = x.flatten(0, 1)
        first = flat[:, 0] > 0
        out = flat.new_zeros(flat.shape[0], 3)
        out[first] = self.first(flat[first])
        out[~first] = self.second(flat[~first])
        return out.view(*x.shape[:2], 3).tanh().sum(1)

    return Apply(forward, first=nn.Linear(5, 3), second=nn.Linear(5, 3))


def bags() -> Apply:
    """A sum of embeddings in one call, and a product of two inputs with one weight."""
    return Apply(
        lambda self, ids: self.product(self.bag(ids), self.other(ids[:, 0])),
        bag=nn.EmbeddingBag(7, 4, mode="mean"),
        other=nn.Embedding(7, 3),
        product=nn.Bilinear(4, 3, 3),
    )


def one_label_per_sequence(data):
    def labelled(n, generator):
        ids, targets = data(n, generator)
        return ids, targets[:, -1] % 3

    return labelled


def checkpointed() -> Apply:
    """Layers in a checkpoint, run again during the backward pass."""

    def forward(self, x):
        h = checkpoint(lambda x: self.scale * self.body(x) + self.shift, x, use_reentrant=False)
        return self.head(h)

    body = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh())
    scale, shift = torch.ones(4), torch.zeros(1)
    return Apply(forward, body=body, head=nn.Linear(4, 3), scale=scale, shift=shift)


def mean_loss(model, batch):
    """A loss of two parts, with an unequal weight for each target."""
    x, y = batch
    out = model(x)
    return (out - y).abs().mean(1) + (out * torch.arange(3, dtype=out.dtype)).logsumexp(1)


CASES = [
    Case("mlp", mlp, points(), captured=("",)),
    Case("mlp without biases", lambda: mlp(False), points(), captured=("",)),
    Case("mlp, squared error", mlp, regression(3), "mse", reference.half_squared_error),
    Case(
        "mlp of one output",
        lambda: nn.Sequential(mlp(outputs=1), nn.Flatten(0)),
        regression(),
        "mse",
        reference.half_squared_error,
    ),
    Case("mlp, callable loss", mlp, regression(3), mean_loss, mean_loss),
    Case("cnn", cnn, images, captured=("7.",)),
    Case(
        "class maps",
        lambda: nn.Sequential(nn.Conv1d(4, 5, 3, padding="same"), nn.ReLU(), nn.Conv1d(5, 3, 1)),
        tagged(features=4, length=4),
        example_loss=reference.negative_log_likelihood_of_maps,
    ),
    Case("other convolutions", other_convolutions, sequences(features=6, length=5)),
    Case("language model", LanguageModel, tokens(), captured=("",)),
    Case("shared positions", shared_positions, sequences(), captured=("",)),
    Case("tied language model", lambda: LanguageModel(tied=True), tokens()),
    Case("outputs with logits", lambda: LanguageModel(logits=True), token_dict),
    Case("self-attention, batch first", self_attention(True), sequences(features=6)),
    Case("self-attention, time first", self_attention(False), sequences(features=6)),
    Case("cross-attention, batch first", cross_attention(True, 6), pairs),
    Case("cross-attention, time first", cross_attention(False, 6), pairs),
    Case("cross-attention, separate projections", cross_attention(True, 5), pairs),
    Case(
        "transformer encoder layer",
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(6, 2, 5, batch_first=True, norm_first=True),
            nn.Flatten(),
            nn.Linear(6 * T, 3),
        ),
        sequences(features=6),
    ),
    Case("LSTM, batch first", recurrent(nn.LSTM, True), sequences(), fallback=("cells.",)),
    Case("LSTM, time first", recurrent(nn.LSTM, False), sequences(), fallback=("cells.",)),
    Case("GRU", recurrent(nn.GRU, True), sequences(), fallback=("cells.",)),
    Case("a layer called twice", called_twice, sequences(), captured=("",)),
    Case("tied layers", tied_layers, points(), captured=("",)),
    Case("one bias for two weights", one_bias_for_two, points(), captured=("",)),
    Case(
        "tied to its transpose",
        tied_to_its_transpose,
        regression(5),
        "mse",
        reference.half_squared_error,
    ),
    Case("weight-normed layers", weight_normed, points(), captured=("0.bias", "2.bias")),
    Case("in place after views", in_place_after_views, sequences(), captured=("",)),
    Case("transposed inside", transposed_inside, sequences(), captured=("",)),
    Case(
        "time-first data",
        time_first_model,
        time_first(tagged()),
        time_first_loss,
        time_first_loss,
        dim=1,
        captured=("",),
    ),
    Case(
        "time-first recurrent data",
        lambda: Apply(
            lambda self, x: self.head(self.cells(x)[0]),
            cells=nn.LSTM(5, 3),
            head=nn.Linear(3, 3),
        ),
        time_first(tagged()),
        time_first_loss,
        time_first_loss,
        dim=1,
    ),
    Case("merged windows", lambda: merged_windows(False), sequences(), captured=("",)),
    Case(
        "merged windows, example fastest", lambda: merged_windows(True), sequences(), captured=("",)
    ),
    Case("weights by function", weights_by_function, points(), captured=("layer.", "parts.")),
    Case("biases apart", biases_apart, points(), captured=("",)),
    Case("matrices by columns", matrices_by_columns, sequences()),
    Case("shared prompt", shared_prompt, sequences(), fallback=("prompt", "project.")),
    Case("unused parameters", unused_parameters, points(), captured=("used.",)),
    Case("scalar parameters", scalar_parameters, points(), captured=("",)),
    Case("subclass of Linear", subclass, points(), captured=("",)),
    Case("routed positions", routed, sequences(), fallback=("",)),
    Case("bags and bilinear", bags, one_label_per_sequence(tokens())),
    Case("checkpointed", checkpointed, points(), captured=("",)),
    Case(
        "vmapped inside",
        lambda: Apply(
            lambda self, x: torch.vmap(self.layer)(x).tanh().sum(1), layer=nn.Linear(5, 3)
        ),
        sequences(),
    ),
]

BY_NAME = {case.name: case for case in CASES}
