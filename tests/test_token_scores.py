"""Scores of tokens against gradients of parameters that are alive at one token only."""

import contextlib
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fimkit import EKFAC, DataInf, Explicit, IFVPUsageError, ModelData, RegularizationCV, influence
from tests import reference
from tests.cases import Apply, mlp, points

REGULARIZATION = 1e-2
VOCABULARY, WIDTH = 9, 4
LENGTHS = [5, 3, 4, 2, 5, 1, 3, 2, 2, 4]


class Layer(nn.Module):
    """A layer of a transformer, of torch's own modules."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.up, self.down = nn.Linear(WIDTH, 6), nn.Linear(6, WIDTH, bias=False)

    def forward(self, x, kept, causal):
        h = self.norm(x)
        blocked = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1) if causal else None
        x = x + self.attention(h, h, h, key_padding_mask=~kept, attn_mask=blocked)[0]
        return x + self.down(F.gelu(self.up(x)))


class Scale(nn.Module):
    """A scale and a shift, written out."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x):
        return self.weight * x + self.bias


class Language(nn.Module):
    """A causal language model; its head may be tied to the embedding."""

    def __init__(self, *, tied=False, positions=False, scaled=False):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(8, WIDTH) if positions else None
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.scale = Scale() if scaled else nn.Identity()
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=not tied)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, input_ids, attention_mask):
        x = self.embedding(input_ids)
        if self.positions is not None:
            x = x + self.positions(torch.arange(input_ids.shape[1]))
        for layer in self.layers:
            x = layer(x, attention_mask.bool(), True)
        return self.head(self.scale(x))


class Classifier(nn.Module):
    """An encoder of tokens whose mean goes through a head."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layer = Layer()
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, input_ids, attention_mask):
        kept = attention_mask.bool()
        x = self.layer(self.embedding(input_ids), kept, False)
        return self.head((x * kept[..., None]).sum(1) / kept.sum(1, keepdim=True))


def made(model, **settings):
    torch.manual_seed(3)
    model = model(**settings).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def examples(lengths, *, classes, seed=0):
    """Token ids with a label for each token, or one."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in lengths:
        ids = torch.randint(VOCABULARY, (length,), generator=generator)
        labels = torch.randint(VOCABULARY, (length,), generator=generator)
        found.append((ids, labels[0] % 3 if classes else labels))
    return found


def padded(items):
    """Pad the examples of a batch to the longest of them."""
    ids = nn.utils.rnn.pad_sequence([ids for ids, _ in items], batch_first=True)
    mask = [torch.ones(len(ids), dtype=torch.long) for ids, _ in items]
    labels = [y for _, y in items]
    if labels[0].ndim:
        labels = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    else:
        labels = torch.stack(labels)
    mask = nn.utils.rnn.pad_sequence(mask, batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


# -- the reference ---------------------------------------------------------------------------------


class PlainAttention(nn.Module):
    """What `nn.MultiheadAttention` computes of one sequence, by layers with its parameters."""

    def __init__(self, attention):
        super().__init__()
        self.heads = attention.num_heads
        self.qkv, self.out = nn.Linear(1, 1), nn.Linear(1, 1)
        self.qkv.weight, self.qkv.bias = attention.in_proj_weight, attention.in_proj_bias
        self.out.weight, self.out.bias = attention.out_proj.weight, attention.out_proj.bias

    def forward(self, x, *_, key_padding_mask, attn_mask):
        assert not key_padding_mask.any()
        parts = self.qkv(x)[0].view(x.shape[1], 3, self.heads, -1).permute(1, 2, 0, 3)
        q, k, v = parts
        weights = q @ k.mT / q.shape[-1] ** 0.5
        if attn_mask is not None:
            weights = weights.masked_fill(attn_mask, -torch.inf)
        return self.out((weights.softmax(-1) @ v).transpose(0, 1).flatten(1)[None]), None


@contextlib.contextmanager
def alive_at(model, token, length, alone):
    """Let the parameters of layers met by tokens have their gradient at one token, or at none.

    Embeddings of positions are looked up once for all examples, and are each one's own all the
    same. Of an example of one token, ``alone`` in its batch, all is that token's.
    """
    handles, inside = [], []

    def hook(module, inputs, output):
        own = (alone or isinstance(module, nn.Embedding)) and output.ndim == 2
        own = own and len(output) == length
        if inside or not (own or output.shape[:-1] == (1, length)):
            return output
        inside.append(module)
        parameters = {name: p.detach() for name, p in module.named_parameters()}
        dead = torch.func.functional_call(module, parameters, inputs)
        inside.pop()
        here = torch.arange(length)[:, None] == token
        return torch.where(here, output, dead)

    for module in model.modules():
        if isinstance(module, nn.Linear | nn.LayerNorm | nn.Embedding | Scale):
            handles.append(module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def token_gradients(model, items, *, alone=False):
    """Return ``(n, T, p)`` gradients by token, ``(n, p)`` of the rest, all for lone examples."""
    plain = copy.copy(model)
    plain._modules = copy.deepcopy(model, {id(p): p for p in model.parameters()})._modules
    for layer in plain.modules():
        if isinstance(layer, Layer):
            layer.attention = PlainAttention(layer.attention)
    parameters = list(model.parameters())
    longest = max(len(ids) for ids, _ in items)

    def gradient(example):
        loss = reference.negative_log_likelihood(plain, example)
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        zero = [
            torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)
        ]
        return torch.cat([g.flatten() for g in zero])

    tokens, rest = [], []
    for item in items:
        example, length = padded([item]), len(item[0])
        with alive_at(plain, -1, length, alone):
            rest.append(gradient(example))  # of layers that are not met by tokens
        rows = []
        for token in range(length):
            with alive_at(plain, token, length, alone):
                rows.append(gradient(example) - rest[-1])
        rows += [torch.zeros_like(rest[-1])] * (longest - length)
        tokens.append(torch.stack(rows))
    return torch.stack(tokens), torch.stack(rest)


# -- what is asked of fimkit -----------------------------------------------------------------------

MODELS = {
    "language": (Language, {}),
    "tied": (Language, {"tied": True}),
    "positions": (Language, {"positions": True}),
    "scaled": (Language, {"scaled": True}),
    "classifier": (Classifier, {}),
}


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def data_of(name, size):
    kind, settings = MODELS[name]
    model = made(kind, **settings)
    train = examples(LENGTHS, classes=kind is Classifier)
    queries = examples([4, 2, 5], classes=kind is Classifier, seed=9)
    return model, [
        ModelData(model, items, batch_size=size, collate_fn=padded) for items in (train, queries)
    ]


@pytest.mark.parametrize("size", [1, 3, len(LENGTHS)])
@pytest.mark.parametrize("method", [Explicit, EKFAC, DataInf])
def test_token_scores(name, method, size):
    model, (train, queries) = data_of(name, size)
    tokens, rest = token_gradients(model, train.dataset, alone=size == 1)
    fitted = method(REGULARIZATION).fit(train)
    rows = tokens.sum(1) + rest
    of_queries, others = token_gradients(model, queries.dataset)
    of_queries = of_queries.sum(1) + others
    if method is Explicit:
        ifvps = reference.ifvp(rows, of_queries, REGULARIZATION)
    else:
        ifvps = torch.as_tensor(fitted.transform(of_queries))
    expected = torch.einsum("kp,ntp->knt", ifvps, tokens).numpy()
    expected_rest = (ifvps @ rest.T).numpy()

    found = influence.token_scores(fitted, train, queries)
    assert found.scores.shape == (3, len(LENGTHS), max(LENGTHS))
    assert np.abs(found.scores - expected).max() <= 1e-9 * np.abs(expected).max()
    assert np.abs(found.rest - expected_rest).max() <= 1e-9 * np.abs(expected).max()
    expected_names = {"head.weight", "head.bias"} if name == "classifier" else set()
    assert set(found.undivided) == expected_names
    assert found.rest.any() == bool(expected_names)
    whole = influence.pairwise_scores(fitted, train, queries)
    assert reference.error(found.scores.sum(2) + found.rest, whole) <= 1e-12


def test_tokens_behind_the_end_score_zero():
    """Padding takes part in no loss and no attention, so that it has no gradient."""
    _, (train, queries) = data_of("language", 4)
    fitted = EKFAC(REGULARIZATION).fit(train)
    scores = influence.token_scores(fitted, train, queries).scores
    for i, length in enumerate(LENGTHS):
        assert (scores[:, i, length:] == 0).all()
        assert (scores[:, i, :length] != 0).all()


@pytest.mark.parametrize("name", ["tied", "classifier"])
def test_options(name, monkeypatch):
    """Measurements and RelatIF are those of the whole score; queries may be scored in parts."""
    _, (train, queries) = data_of(name, 4)
    search = RegularizationCV(EKFAC(), [REGULARIZATION], cv=2).fit(train)
    options = {"measurement": "margin", "normalization": "relatif"}
    found = influence.token_scores(search, train, queries, **options)
    whole = influence.pairwise_scores(search, train, queries, **options)
    assert reference.error(found.scores.sum(2) + found.rest, whole) <= 1e-12
    monkeypatch.setattr(influence, "_QUERY_BUDGET", 1)
    parts = influence.token_scores(search, train, queries, **options)
    assert reference.error(parts.scores.flatten(), found.scores.flatten()) <= 1e-12
    assert reference.error(parts.rest.flatten() + 1, found.rest.flatten() + 1) <= 1e-12
    assert parts.undivided == found.undivided


def test_examples_without_tokens():
    model = mlp().double()
    data = ModelData(model, points()(12, torch.Generator().manual_seed(0)))
    fitted = EKFAC(REGULARIZATION).fit(data)
    with pytest.raises(IFVPUsageError, match=r"no layer meets several tokens.*pairwise_scores"):
        influence.token_scores(fitted, data, data)


def test_rows_that_are_tokens_by_chance():
    """A second input is as long as the first in one batch only."""

    def forward(self, x, other):
        return self.end(self.first(x).tanh().sum(1) + self.second(other).tanh().sum(1))

    model = Apply(
        forward, first=nn.Linear(3, 4), second=nn.Linear(2, 4), end=nn.Linear(4, 3)
    ).double()
    generator = torch.Generator().manual_seed(0)
    items = [
        (
            torch.randn(5, 3, generator=generator, dtype=torch.float64),
            torch.randn(length, 2, generator=generator, dtype=torch.float64),
            torch.tensor(length % 3),
        )
        for length in (5, 5, 4, 4)
    ]
    data = ModelData(model, items, batch_size=2)
    fitted = Explicit(REGULARIZATION).fit(data)
    with pytest.raises(IFVPUsageError, match=r"'second\.weight' meets as many rows .* one length"):
        influence.token_scores(fitted, data, data)
    apart = influence.token_scores(fitted, data[2:], data)
    assert set(apart.undivided) == {"second.weight", "second.bias", "end.weight", "end.bias"}
    assert apart.rest.any()


@pytest.mark.parametrize("axes", [(0, 1), (1, 0)])
def test_windows_are_no_tokens(axes):
    """Rows that are windows of tokens, or heads, are as many as tokens but in another order."""

    def forward(self, x):
        x = self.first(x)
        n, length, width = x.shape
        windows = x.view(n, 2, length // 2, width)
        windows = windows.transpose(1, 2) if axes == (0, 1) else windows.flatten(0, 1)
        return self.end(self.inner(windows).tanh().reshape(n, length, width).sum(1))

    model = Apply(
        forward, first=nn.Linear(3, 4), inner=nn.Linear(4, 4), end=nn.Linear(4, 3)
    ).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, 3, generator=generator, dtype=torch.float64)
    data = ModelData(model, (x, torch.arange(6) % 3), batch_size=3)
    fitted = Explicit(REGULARIZATION).fit(data)
    found = influence.token_scores(fitted, data, data)
    assert set(found.undivided) == {"inner.weight", "inner.bias", "end.weight", "end.bias"}
    whole = influence.pairwise_scores(fitted, data, data)
    assert reference.error(found.scores.sum(2) + found.rest, whole) <= 1e-12
