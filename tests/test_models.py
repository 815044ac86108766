"""Whole models in plain torch, tiny, for all three methods."""

import pytest
import torch
from torch import nn

from fimkit import EKFAC, IFVPUsageError
from fimkit.estimators.ekfac import KFAC
from tests import dense, exactness, reference
from tests.cases import Apply, Attention, Case, images, sequences

N = 11


def lstm():
    def forward(self, x):
        return self.head(self.cells(x)[0][:, -1])

    return Apply(forward, cells=nn.LSTM(5, 3, batch_first=True), head=nn.Linear(3, 3))


class MixtureOfExperts(nn.Module):
    """Each token goes to the expert of its highest gate, weighted by the gate; one gets none."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 4)
        self.gate = nn.Linear(4, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = self.embed(x).flatten(0, 1)
        gates = self.gate(h)
        gates = torch.cat([gates[:, :3], torch.full_like(gates[:, :1], -1e9)], 1).softmax(-1)
        weight, chosen = gates.max(-1)
        out = torch.zeros_like(h)
        for i, expert in enumerate(self.experts):
            here = (chosen == i).nonzero()[:, 0]
            if len(here):
                out = out.index_add(0, here, weight[here, None] * expert(h[here]).tanh())
        return self.head(out.view(*x.shape[:2], -1).sum(1))


class Residual(nn.Module):
    def __init__(self, channels, width, stride):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.short = nn.Sequential(
            nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width)
        )

    def forward(self, x):
        return torch.relu_(self.body(x).add_(self.short(x)))


def resnet():
    """With running statistics that are not those of the start, in training mode as left by it."""
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, 1, 1, bias=False), nn.BatchNorm2d(3), nn.ReLU(inplace=True),
        Residual(3, 3, 1), Residual(3, 4, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 3),
    )  # fmt: skip
    for _ in range(3):
        model(torch.randn(16, 1, 6, 6))
    return model.train()


class VisionTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, 4, 3, stride=3)
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.positions = nn.Parameter(torch.zeros(1, 5, 4))
        self.norm = nn.LayerNorm(4)
        self.attention = Attention(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(len(x), -1, -1), h], 1) + self.positions
        return self.head((h + self.attention(self.norm(h)))[:, -1])


MODELS = [
    Case("whole, LSTM", lstm, sequences(), captured=("head",)),
    Case("whole, mixture of experts", MixtureOfExperts, sequences(), captured=("embed", "head")),
    Case("whole, ResNet", resnet, images, captured=("",)),
    Case("whole, ViT", VisionTransformer, images, captured=("",)),
]


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name.removeprefix("whole, "))
def test_equals_the_definition(case):
    model = case.model()
    coverage = exactness.check(model, case.batch(N), reference.negative_log_likelihood)
    for name, how in coverage.items():
        if name.startswith(case.captured):
            assert how.startswith("captured"), (name, how)


def test_an_expert_without_tokens_has_no_information():
    case = MODELS[1]
    fitted = EKFAC().fit(case.model(), case.batches(4, n=N))
    for kind in ("weight", "bias"):
        assert fitted.coverage_[f"experts.3.{kind}"] == "zero: no gradient seen"


@pytest.mark.parametrize("method", [EKFAC, KFAC])
@pytest.mark.parametrize("kind", [list, iter])
def test_experts_are_the_same_parts_at_any_batch_size(method, kind):
    """Of one example alone an expert is a layer, of several it is none."""
    case = MODELS[1]
    expected = method().fit(case.model(), case.batches(4, n=N))
    alone = kind(case.batches(1, 4, n=N))
    if kind is iter:
        with pytest.raises(
            IFVPUsageError,
            match="cannot begin again to treat them alike: give a DataLoader or a list",
        ):
            method().fit(case.model(), alone)
        return
    fitted = method().fit(case.model(), alone)
    assert fitted.n_samples_seen_ == N
    assert fitted.coverage_ == expected.coverage_
    assert dense.distance(fitted.fisher_.to_dense(), expected.fisher_.to_dense()) <= 1e-9
