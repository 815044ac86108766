"""Wrong results that were seen in other Fisher code, each beside the right one.

Every test has the definition's result and what the fault makes of it, both from single examples'
backward passes. The two differ by per cents, and fimkit's is the first.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fimkit import Explicit, losses
from tests import dense, reference
from tests.cases import split

N = 12
SOLVERS = ["primal", "dual"]


def compare(model, batch, wrong, *, right=None, loss="cross_entropy", **settings):
    """Check that fits have the right matrix and products, from which the wrong are far.

    The right matrix is the empirical Fisher when not given.
    """
    right = reference.fisher(gradients(model, batch)) if right is None else right
    regularization = dense.heuristic(right)
    vectors = gradients(model, batch)[:4]
    solution = dense.solve(right, vectors, regularization)
    assert dense.distance(wrong, right) > 0.01
    assert reference.error(dense.solve(wrong, vectors, regularization), solution) > 0.01
    for solver in SOLVERS:
        for size in (1, 7, N):
            fitted = Explicit(regularization, loss=loss, solver=solver, **settings)
            fitted.fit(model, split(batch, N, size))
            assert dense.distance(fitted.fisher_.to_dense(), right) <= 1e-9
            assert reference.error(fitted.transform(vectors), solution) <= 1e-9


def gradients(model, batch):
    return reference.gradients(model, reference.negative_log_likelihood, batch, N)


def images(channels, generator):
    x = torch.randn(N, channels, 5, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (N,), generator=generator)


def classifier(convolution, outputs):
    """A convolution whose bias is absent, and a head that is frozen."""
    head = nn.Linear(outputs, 3).requires_grad_(False)
    return nn.Sequential(convolution, nn.Tanh(), nn.Flatten(), head).double()


def signals(model, x, y):
    """Return the gradient of one example's loss at the output of the model's first layer."""
    out = model[0](x).detach().requires_grad_()
    (signal,) = torch.autograd.grad(F.cross_entropy(model[1:](out), y), out)
    return signal


def test_groups_of_a_convolution_are_not_averaged(generator):
    """Fault: all groups' gradients are taken with the mean of the groups' patches."""
    groups, outputs = 2, 2
    model = classifier(nn.Conv2d(4, 4, 3, groups=groups, bias=False), 4 * 9)
    batch = images(4, generator)

    def by_patches(average):
        rows = []
        for i in range(N):
            x, y = (part[i : i + 1] for part in batch)
            s = signals(model, x, y).reshape(groups, outputs, 9)
            a = F.unfold(x, 3).view(groups, 2 * 9, 9)
            if average:
                a = a.mean(0, keepdim=True).expand_as(a)
            rows.append(torch.einsum("got,git->goi", s, a).flatten())
        return torch.stack(rows)

    assert dense.distance(by_patches(average=False), gradients(model, batch)) <= 1e-12
    compare(model, batch, reference.fisher(by_patches(average=True)))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_is_not_taken_for_zeros(mode, generator):
    """Fault: patches are cut from the input with zeros around it, whatever the padding mode."""
    model = classifier(nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode, bias=False), 3 * 25)
    batch = images(2, generator)

    def by_patches(mode, **value):
        rows = []
        for i in range(N):
            x, y = (part[i : i + 1] for part in batch)
            patches = F.unfold(F.pad(x, (1, 1, 1, 1), mode, **value), 3)[0]
            rows.append((signals(model, x, y).view(3, 25) @ patches.T).flatten())
        return torch.stack(rows)

    assert dense.distance(by_patches(mode), gradients(model, batch)) <= 1e-12
    compare(model, batch, reference.fisher(by_patches("constant", value=0)))


class Repeated(nn.Module):
    """A layer called three times; only the calls of ``counted`` give its gradient."""

    def __init__(self, counted=(0, 1, 2)):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)
        self.counted = counted

    def forward(self, x):
        for call in range(3):
            weight, bias = self.layer.weight, self.layer.bias
            if call not in self.counted:
                weight, bias = weight.detach(), bias.detach()
            x = F.linear(x, weight, bias).tanh()
        return self.head(x)


@pytest.mark.parametrize("counted", [(0,), (2,)], ids=["first", "last"])
def test_repeated_layers_count_every_time(counted, generator):
    """Fault: one call's activations overwrite the others'."""
    model, faulty = Repeated().double(), Repeated(counted).double()
    faulty.load_state_dict(model.state_dict())
    x = torch.randn(N, 4, generator=generator, dtype=torch.float64)
    batch = x, torch.randint(3, (N,), generator=generator)
    compare(model, batch, reference.fisher(gradients(faulty, batch)))


class ByModule(nn.Module):
    """The same by the layer's own calls, which is how it is usually written."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layer(self.layer(self.layer(x).tanh()).tanh()).tanh())


def test_repeated_layers_are_not_separate_layers(generator):
    """Fault: every call is a layer of its own, and what they have in common is lost."""
    model = ByModule().double()
    x = torch.randn(N, 4, generator=generator, dtype=torch.float64)
    batch = x, torch.randint(3, (N,), generator=generator)
    each = []
    for call in range(3):
        faulty = Repeated((call,)).double()
        faulty.load_state_dict(model.state_dict())
        each.append(gradients(faulty, batch))
    layer = sum(reference.fisher(rows)[:20, :20] for rows in each)
    wrong = reference.fisher(gradients(model, batch))
    wrong[:20, :20] = layer
    compare(model, batch, wrong)


class LanguageModel(nn.Module):
    """Token embeddings that are also the head's weight; one of the uses may be cut off."""

    def __init__(self, cut=None):
        super().__init__()
        self.tokens = nn.Embedding(6, 4)
        self.hidden = nn.Linear(4, 4)
        self.cut = cut

    def forward(self, ids):
        weights = {
            use: self.tokens.weight.detach() if use == self.cut else self.tokens.weight
            for use in ("embedding", "head")
        }
        h = F.embedding(ids, weights["embedding"])
        h = (h + self.hidden(h).tanh()).cumsum(1)
        return F.linear(h, weights["head"])


class TiedByModules(nn.Module):
    """The same with a head that shares the embedding's parameter."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(6, 4)
        self.hidden = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        h = self.tokens(ids)
        return self.head((h + self.hidden(h).tanh()).cumsum(1))


@pytest.mark.parametrize("kind", [LanguageModel, TiedByModules])
def test_tied_weights_are_one_parameter(kind, generator):
    """Fault: the embedding and the head are two layers, their gradients never added up."""
    model = kind().double()
    ids = torch.randint(6, (N, 4), generator=generator)
    batch = ids, torch.randint(6, (N, 4), generator=generator)
    uses = []
    for cut in ("head", "embedding"):
        part = LanguageModel(cut).double()
        part.load_state_dict(model.state_dict(), strict=False)
        uses.append(gradients(part, batch))
    right = gradients(model, batch)
    tied = slice(0, 24)
    assert dense.distance((uses[0] + uses[1])[:, tied], right[:, tied]) <= 1e-12
    wrong = reference.fisher(right)
    wrong[tied, tied] = sum(reference.fisher(rows[:, tied]) for rows in uses)
    compare(model, batch, wrong)


class Attending(nn.Module):
    """A layer before causal attention; where told, its outputs give no gradient."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.attention.requires_grad_(False)
        self.head = nn.Linear(4, 3)
        self.dropped = None

    def forward(self, x):
        h = self.hidden(x).tanh()
        if self.dropped is not None:
            h = torch.where(self.dropped, h.detach(), h)
        t = x.shape[1]
        mask = torch.full((t, t), True).triu(1)
        return self.head(h + self.attention(h, h, h, attn_mask=mask, need_weights=False)[0])


@pytest.mark.parametrize("kind", ["empirical", "exact"])
def test_prompts_that_are_not_scored_still_carry_gradient(kind, generator):
    """Fault: positions whose target is ignored are dropped from hidden layers, too.

    Later positions attend to them: the gradient passes through them, and through how they were
    computed.
    """
    model = Attending().double()
    x = torch.randn(N, 5, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (N, 5), generator=generator)
    y[:, :3] = dense.IGNORED
    y[::3, 3] = dense.IGNORED

    def fisher(mine):
        """Return the sum over some examples of their parts of the Fisher, over N."""
        tokens = torch.arange(15).view(5, 3)
        examples = dense.examples_of(model, (x[mine], y[mine]), tokens, dense.CATEGORICAL)
        return examples.rows(kind, y[mine]).fisher() * len(x[mine]) / N

    right = fisher(torch.arange(N))
    wrong = torch.zeros_like(right)
    for prompt in (3, 4):
        model.dropped = torch.arange(5)[:, None] < prompt
        wrong += fisher((y == dense.IGNORED).sum(1) == prompt)
    model.dropped = None
    compare(model, (x, y), wrong, right=right, fisher=kind)


class Sampled:
    """A fit's labels, and the gradients at them."""

    def __init__(self, model, batch, samples):
        self.loss = losses.resolve_loss("cross_entropy")
        draws = dense.keep_draws(self.loss)
        settings = {"loss": self.loss, "fisher": "mc", "n_mc_samples": samples, "random_state": 0}
        Explicit(**settings).fit(model, [batch])
        self.gradients = torch.stack(
            [
                gradients(model, (batch[0], labels))
                for labels in dense.sets_of_labels(draws, samples)
            ]
        )


@pytest.mark.parametrize("samples", [2, 10])
@pytest.mark.parametrize("fault", ["mean of losses", "losses divided", "losses summed"])
def test_samples_are_not_averaged_in_the_loss(samples, fault, generator):
    """Fault: the loss is a mean over samples, so that the Fisher falls with their number.

    Either one gradient of the mean stands for all samples, or each sample's is divided; or the
    outer products are added up over samples instead of averaged.
    """
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    x = torch.randn(N, 4, generator=generator, dtype=torch.float64)
    batch = x, torch.randint(3, (N,), generator=generator)
    sampled = Sampled(model, batch, samples)
    right = reference.fisher(sampled.gradients.flatten(0, 1))
    wrong = {
        "mean of losses": reference.fisher(sampled.gradients.mean(0)),
        "losses divided": samples * reference.fisher(sampled.gradients.flatten(0, 1) / samples),
        "losses summed": samples * right,
    }[fault]
    settings = {"fisher": "mc", "n_mc_samples": samples, "random_state": 0}
    compare(model, batch, wrong, right=right, **settings)
