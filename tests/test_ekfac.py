"""`EKFAC` and `KFAC` against dense float64 references, layer by layer."""

import inspect
import pickle
from copy import deepcopy
from functools import cache

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.utils._param_validation import InvalidParameterError
from torch import nn
from torch.nn.functional import cross_entropy

from fimkit import Explicit, IFVPUsageError, ModelData, SingularFisherError
from fimkit.estimators.ekfac import EKFAC, KFAC, Diagonal
from fimkit.losses import CrossEntropy
from fimkit.operators import symmetric
from fimkit.statistics import linear as statistics
from tests import kronecker_reference as kronecker
from tests import reference
from tests.cases import (
    BY_NAME,
    Apply,
    Case,
    called_twice,
    images,
    one_label_per_sequence,
    points,
    regression,
    sequences,
    split,
    tagged,
    tied_layers,
    tokens,
)
from tests.exactness import blocks_of
from tests.kronecker_reference import Conv1D
from tests.state import unchanged

# Enough examples that no layer's factor is of low rank for want of them.
N = 20


# -- situations ------------------------------------------------------------------------------------


def pooled(*modules):
    """Return modules whose outputs at all positions are averaged."""
    return Apply(lambda self, x: self.body(x).tanh().mean(1), body=nn.Sequential(*modules))


def volumes(n, generator):
    return (
        torch.randn(n, 2, 3, 3, 3, generator=generator, dtype=torch.float64),
        torch.randint(3, (n,), generator=generator),
    )


def pictures(n, generator):
    x, y = images(n, generator)
    return torch.cat([x, x.flip(1).transpose(2, 3).cumsum(2)], 1), y


def looked_up():
    """A table looked up at every position, the padding's row without gradient."""
    return Apply(
        lambda self, ids: self.head(self.table(ids).tanh().flatten(1)),
        table=nn.Embedding(7, 3, padding_idx=2),
        head=nn.Linear(12, 3),
    )


def looked_up_twice():
    """A table looked up for a pair of tokens, and for all tokens."""
    return Apply(
        lambda self, ids: self.head(self.table(ids[:, :2]).sum(1) * self.table(ids).mean(1)),
        table=nn.Embedding(7, 3),
        head=nn.Linear(3, 3),
    )


def tied_table(bias):
    """A table that is looked up, and multiplied by at the end."""

    def build():
        model = Apply(
            lambda self, ids: self.head(self.body(self.table(ids)).tanh()),
            table=nn.Embedding(7, 3),
            body=nn.Linear(3, 3),
            head=nn.Linear(3, 7, bias),
        )
        model.head.weight = model.table.weight
        return model

    return build


def shared_with_one_bias():
    """One weight in two layers, of which only the second has a bias."""
    model = Apply(
        lambda self, x: self.head(self.second(self.first(x).tanh()).tanh()),
        first=nn.Linear(5, 5, bias=False),
        second=nn.Linear(5, 5),
        head=nn.Linear(5, 3),
    )
    model.second.weight = model.first.weight
    return model


def smooth_mlp(bias=True):
    return nn.Sequential(
        nn.Linear(5, 6, bias), nn.Tanh(), nn.Linear(6, 4, bias), nn.Tanh(), nn.Linear(4, 3, bias)
    )


def situation(name, build, data, loss="cross_entropy", example_loss=None):
    example_loss = example_loss or reference.negative_log_likelihood
    return Case(f"kronecker, {name}", build, data, loss, example_loss)


SITUATIONS = {
    case.name.removeprefix("kronecker, "): case
    for case in [
        situation("linear", smooth_mlp, points()),
        situation("linear without biases", lambda: smooth_mlp(False), points()),
        situation(
            "squared error",
            lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)),
            regression(3),
            "mse",
            reference.half_squared_error,
        ),
        situation(
            "binary",
            lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)),
            lambda n, g: (points()(n, g)[0], torch.rand(n, 2, generator=g).round().double()),
            "bce",
            lambda model, example: nn.functional.binary_cross_entropy_with_logits(
                model(example[0]), example[1], reduction="sum"
            ),
        ),
        # Sequences: products are rotated where positions are many, their factors where few.
        situation(
            "few positions",
            lambda: pooled(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)),
            sequences(length=2),
        ),
        situation(
            "many positions",
            lambda: pooled(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)),
            sequences(length=9),
        ),
        situation(
            "labels that do not count",
            lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)),
            tagged(),
        ),
        situation(
            "convolution in 1-D",
            lambda: nn.Sequential(
                nn.Conv1d(4, 4, 2, stride=2, padding=1),
                nn.Tanh(),
                nn.Conv1d(4, 4, 2, groups=2, bias=False),
                nn.Flatten(),
                nn.Linear(4 * 2, 3),
            ),
            sequences(features=5, length=4),
        ),
        situation(
            "convolution in 2-D",
            lambda: nn.Sequential(
                nn.Conv2d(2, 4, 2, stride=2, groups=2),
                nn.Tanh(),
                nn.Conv2d(4, 2, (1, 2), dilation=2, padding=1, padding_mode="circular"),
                nn.Tanh(),
                nn.AdaptiveAvgPool2d((1, 2)),
                nn.Flatten(),
                nn.Linear(4, 3),
            ),
            pictures,
        ),
        situation(
            "convolution in 3-D",
            lambda: nn.Sequential(
                nn.Conv3d(2, 2, 2, groups=2),
                nn.Tanh(),
                nn.AdaptiveAvgPool3d(1),
                nn.Flatten(),
                nn.Linear(2, 3),
            ),
            volumes,
        ),
        situation(
            "convolutions with one position",
            lambda: nn.Sequential(
                nn.Conv1d(4, 4, 5, groups=2),
                nn.Tanh(),
                nn.Conv1d(4, 3, 1, bias=False),
                nn.Flatten(),
            ),
            sequences(length=4),
        ),
        situation("table", looked_up, one_label_per_sequence(tokens())),
        situation("table looked up twice", looked_up_twice, one_label_per_sequence(tokens())),
        situation("tied table", tied_table(False), tokens()),
        situation("tied table, product with a bias", tied_table(True), tokens()),
        situation(
            "transposed weights",
            lambda: pooled(Conv1D(5, 4), nn.Tanh(), Conv1D(4, 4, bias=False), Conv1D(4, 3)),
            sequences(),
        ),
        situation("called twice", called_twice, sequences()),
        situation("shared weight", tied_layers, points()),
        situation("shared weight, one bias", shared_with_one_bias, points()),
        situation("language model", BY_NAME["language model"].build, tokens()),
        situation("tied language model", BY_NAME["tied language model"].build, tokens()),
    ]
}

# Layers that lose directions of their gradients where inputs are averaged or signals are added up
# over positions, so that no basis of the rest is determined: keys, whose signals add up to zero,
# and circular windows, whose entries all have one mean.
UNDETERMINED = {
    ("language model", "reduce"): {"attention.qkv.weight"},
    ("tied language model", "reduce"): {"attention.qkv.weight"},
    ("convolution in 2-D", "reduce"): {"2.weight"},
}

KINDS = ("empirical", "mc", "exact", "predicted")


class Recording(CrossEntropy):
    """Softmax cross-entropy that remembers the labels it draws, batch by batch."""

    def __init__(self):
        super().__init__()
        self.drawn = []

    def sample(self, outputs, targets, uniforms):
        labels = super().sample(outputs, targets, uniforms)
        self.drawn.append(labels)
        return labels


def settings_of(case, fisher, n_mc_samples=2):
    """Return what an estimator is given for one kind of Fisher."""
    loss = Recording() if fisher == "mc" and case.loss == "cross_entropy" else case.loss
    return {"loss": loss, "fisher": fisher, "n_mc_samples": n_mc_samples, "random_state": 3}


def scalars_of(case, settings, n_batches, classes=-1):
    """Return what the reference differentiates, after the estimator's fit."""
    fisher, loss = settings["fisher"], case.example_loss
    if fisher == "mc":
        drawn, samples = settings["loss"].drawn, settings["n_mc_samples"]
        first = [drawn[b * samples : (b + 1) * samples] for b in range(n_batches)]
        labels = [[y[i] for y in batch] for batch in first for i in range(len(batch[0]))]
        return kronecker.at_labels(loss, labels)
    if fisher == "predicted":
        return kronecker.predicted(loss, classes)
    if fisher == "exact" and case.loss == "cross_entropy":
        return kronecker.exact_softmax(classes)
    if fisher == "exact":
        return kronecker.exact_logits if case.loss == "bce" else kronecker.exact_outputs
    return kronecker.empirical(loss)


def examples_of(case, n=N):
    batch = case.batch(n)
    return [reference.take(batch, [i], case.dim) for i in range(n)]


def difference(found, expected):
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


def key_of(weight):
    return weight.removesuffix(".weight")


@cache
def references(name, fisher, sharing):
    """Return the estimators fitted to a situation, and the reference's layers."""
    case = SITUATIONS[name]
    batches = case.batches(7, n=N)
    settings = settings_of(case, fisher)
    model = case.model()
    ekfac = EKFAC(weight_sharing=sharing, **settings).fit(model, batches)
    scalars = scalars_of(case, settings, len(batches))
    layers = kronecker.layers(model, scalars, examples_of(case), weight_sharing=sharing)
    kfac = KFAC(weight_sharing=sharing, **settings_of(case, fisher)).fit(model, batches)
    return ekfac, kfac, layers


def combinations():
    """Yield every situation with every kind of Fisher that it has."""
    for name, case in SITUATIONS.items():
        for fisher in KINDS:
            every = fisher in ("empirical", "exact")
            if every or case.loss == "cross_entropy":
                for sharing in ("expand", "reduce") if every else ("expand",):
                    yield pytest.param(name, fisher, sharing, id=f"{name}-{fisher}-{sharing}")


@pytest.mark.parametrize(("name", "fisher", "sharing"), list(combinations()))
def test_equals_the_definition(name, fisher, sharing):
    """K-FAC is the Kronecker product of the sides, whichever eigenvectors they have.

    EK-FAC has their eigenvectors, the Fisher's trace, and an error that is no larger.
    """
    ekfac, kfac, layers = references(name, fisher, sharing)
    assert set(kfac.eigenvalues_) == set(ekfac.eigenvalues_) == {key_of(name) for name in layers}
    for weight, layer in layers.items():
        F, key = layer.fisher(), key_of(weight)
        fine, coarse = (blocks_of(fitted)[key][1].to_dense() for fitted in (ekfac, kfac))
        assert difference(coarse, layer.kfac()) <= 1e-12
        if weight not in UNDETERMINED.get((name, sharing), ()):
            assert difference(fine, layer.ekfac()) <= 1e-9
        trace = pytest.approx(float(F.trace()), rel=1e-10)
        assert float(ekfac.eigenvalues_[key].sum()) == trace
        assert float(fine.trace()) == trace
        assert float((fine - F).norm()) <= float((coarse - F).norm()) + 1e-12 * float(F.norm())


def test_position_counts_choose_both_orders_of_rotation():
    """Of the situations above, some rotate factors before they form products, some after."""
    orders = set()
    for name, positions in (("few positions", 2), ("many positions", 9)):
        for values in references(name, "empirical", "expand")[0].eigenvalues_.values():
            _, out, columns = values.shape
            orders.add(positions * (out**2 + columns**2) < out * columns * (out + columns))
    assert orders == {True, False}


@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_panels(width, sharing, monkeypatch):
    """Factors are summed panel by panel, on and above the diagonal; all of each counts."""
    name = "linear" if sharing == "expand" else "many positions"
    monkeypatch.setattr(symmetric, "_PANEL", width)
    case = SITUATIONS[name]
    fitted = EKFAC(weight_sharing=sharing).fit(case.model(), case.batches(7, n=N))
    expected = references(name, "empirical", sharing)[0]
    assert difference(fitted.fisher_.to_dense(), expected.fisher_.to_dense()) <= 1e-9


# -- sides without a basis -------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [0, 3, 5])
@pytest.mark.parametrize("name", ["linear", "convolution in 1-D", "transposed weights"])
def test_sides_above_the_largest_have_no_basis(name, largest, monkeypatch):
    monkeypatch.setattr(statistics, "_LARGEST_SIDE", largest)
    case = SITUATIONS[name]
    scalars = kronecker.empirical(case.example_loss)
    layers = kronecker.layers(case.model(), scalars, examples_of(case))
    ekfac, kfac = (
        method(loss=case.loss).fit(case.model(), case.batches(7, n=N)) for method in (EKFAC, KFAC)
    )
    for weight, layer in layers.items():
        key = key_of(weight)
        found, expected = blocks_of(ekfac)[key][1].to_dense(), layer.ekfac(largest=largest)
        assert difference(found, expected) <= 1e-9
        found, expected = blocks_of(kfac)[key][1].to_dense(), layer.kfac(largest=largest)
        assert difference(found, expected) <= 1e-12
        shape, bases = ekfac.eigenvalues_[key].shape, ekfac.eigenvectors_[key]
        for basis, size in zip(bases, shape[1:], strict=True):
            assert (basis is None) == (size > largest)


@pytest.mark.parametrize("name", ["table", "tied table", "tied table, product with a bias"])
def test_vocabularies_have_no_basis(name, monkeypatch):
    """However small they are, and a head of their size not where it is a side above the largest."""
    monkeypatch.setattr(statistics, "_LARGEST_SIDE", 6)
    case = SITUATIONS[name]
    ekfac = EKFAC().fit(case.model(), case.batches(7, n=N))
    rows, columns = ekfac.eigenvectors_["table"]
    assert rows is None
    assert columns.shape == (1, 3, 3)
    assert ekfac.eigenvalues_["table"].shape == (1, 7, 3)


# -- padding ---------------------------------------------------------------------------------------


class Reader(nn.Module):
    """Attention among all tokens that are no padding, with a table, and labels at each position."""

    def __init__(self, tied=False, width=4, vocabulary=7):
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = Conv1D(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids, attention_mask):
        x = self.table(ids)
        q, k, v = self.qkv(x.tanh()).chunk(3, -1)
        scores = (q @ k.mT).masked_fill(attention_mask[:, None] == 0, -torch.inf)
        return self.head((x + self.out(scores.softmax(-1) @ v)).tanh())


LENGTHS = (3, 5, 2, 5, 4, 3, 1, 2, 5, 4, 3, 5)


def ragged():
    """Yield tokens and labels of each length, the first label of each not counting."""
    generator = torch.Generator().manual_seed(0)
    for length in LENGTHS:
        ids, labels = torch.randint(7, (2, length), generator=generator)
        labels[0] = -100 if length > 1 else labels[0]
        yield ids, labels


def padded(examples, length=5):
    """Return one batch, filled up with tokens that mean nothing and labels that do not count."""
    generator = torch.Generator().manual_seed(1)
    n = len(examples)
    ids = torch.randint(7, (n, length), generator=generator)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for i, (tokens_, targets) in enumerate(examples):
        ids[i, : len(tokens_)], labels[i, : len(targets)] = tokens_, targets
        mask[i, : len(tokens_)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def reader(tied):
    torch.manual_seed(2)
    model = Reader(tied).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.7)
    return model


class MaskedLoss(CrossEntropy):
    """Token losses with the positions that count, of batches (ids, mask, labels)."""

    def losses(self, outputs, targets):
        logits, labels, mask = outputs[0], targets[0], targets[1]
        return super().losses(logits, labels), mask

    def outputs(self, model, batch):
        return (model(batch[0], batch[1]).mT,)  # classes in dimension 1

    def targets(self, batch):
        return batch[2], batch[1]

    def sample(self, outputs, targets, uniforms):
        return super().sample(outputs[0], targets[0], uniforms), targets[1]

    def mode(self, outputs, targets):
        return super().mode(outputs[0], targets[0]), targets[1]

    def exact(self, outputs, targets):
        return super().exact(outputs[0], targets[0])


def masked_loss(model, batch):
    ids, mask, labels = batch
    losses = nn.functional.cross_entropy(model(ids, mask).mT, labels, reduction="none")
    return losses.sum(1), mask


class FromMapping(nn.Module):
    """A reader that takes keyword arguments."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, attention_mask):
        return self.inner(input_ids, attention_mask)


PADDING = {
    "attention mask of the batch": "cross_entropy",
    "mask of a callable loss": masked_loss,
    "mask of a loss": MaskedLoss(),
}


def as_given(where, batch):
    return batch if "batch" in where else tuple(batch.values())


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("where", "fisher"),
    [
        *(("attention mask of the batch", fisher) for fisher in KINDS),
        ("mask of a callable loss", "empirical"),
        *(("mask of a loss", fisher) for fisher in KINDS),
    ],
)
@pytest.mark.parametrize("method", [EKFAC, KFAC])
def test_padding_changes_nothing(method, where, fisher, tied, sharing):
    """The same factors (all of K-FAC) and eigenvalues as without any padding."""
    examples = list(ragged())
    model = FromMapping(reader(tied))
    settings = {"loss": PADDING[where], "fisher": fisher, "weight_sharing": sharing}
    settings |= {"random_state": 5, "n_mc_samples": 2}
    alone = [as_given(where, padded([e], len(e[0]))) for e in examples]
    expected = method(**settings).fit(model, alone)
    for batches in (
        [padded(examples)],
        [padded(examples[:7], 5), padded(examples[7:], 6)],
    ):
        found = method(**settings).fit(model, [as_given(where, batch) for batch in batches])
        assert len(found.eigenvalues_) == (3 if tied else 4)
        for name, (_, operator) in blocks_of(found).items():
            if name == "inner.qkv" and sharing == "reduce" and method is EKFAC:
                continue  # signals at keys add up to zero, so no basis is determined
            same = blocks_of(expected)[name][1].to_dense()
            assert difference(operator.to_dense(), same) <= 1e-9, name


@pytest.mark.parametrize("method", [EKFAC, KFAC])
@pytest.mark.parametrize("shape", [(6, 3), (6, 5)])
def test_a_mask_that_fits_no_layer_is_told(method, shape):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x, y = torch.randn(6, 4, 3), torch.arange(6) % 2

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch["x"]).sum(1), batch["y"], reduction="none")

    batch = {"x": x, "y": y, "attention_mask": torch.ones(6, 4)}
    method(loss=loss).fit(model, [batch])
    with pytest.warns(UserWarning, match="no Kronecker layer has positions of its shape"):
        method(loss=loss).fit(model, [batch | {"attention_mask": torch.ones(shape)}])


@pytest.mark.parametrize("method", [EKFAC, KFAC])
def test_a_mask_is_not_missed_in_whole_gradients(method):
    """Of a tied table the sides are of examples, whatever the mask; nor is it where none is."""
    model, ids = SITUATIONS["tied table"].model(), SITUATIONS["tied table"].batch(N)[0]

    def loss(model, batch):
        ids, mask = batch
        losses = nn.functional.cross_entropy(model(ids).mT, ids, reduction="none")
        return (losses * mask).sum(1), mask

    for parameters in ("table.weight", "body.bias"):
        method(loss=loss, parameters=parameters).fit(model, [(ids, torch.ones_like(ids))])


def some_positions(n, length):
    """Return a mask that keeps a part of all positions, at least one of each example."""
    mask = torch.rand(n, length, generator=torch.Generator().manual_seed(4)) < 0.6
    mask[:, -1] |= ~mask.any(1)
    return mask


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("where", ["loss", "batch"])
@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("few positions", 2),
        ("many positions", 9),
        ("transposed weights", 4),
        ("called twice", 4),
        ("table", 4),
        ("table looked up twice", 4),
        ("convolution in 1-D", 3),
    ],
)
def test_masks_select_positions_of_the_factors_only(name, length, where, sharing):
    """Eigenvalues are of whole gradients, also where masked positions carry some."""
    case = SITUATIONS[name]
    model, x, y = case.model(), *case.batch(N)
    mask = some_positions(N, length)

    def loss(model, batch):
        losses = nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")
        return (losses, batch["mask"]) if where == "loss" else losses

    key = "mask" if where == "loss" else "attention_mask"
    batches = [
        {"x": x[part], "y": y[part], key: mask[part].long()}
        for part in (slice(0, 7), slice(7, 14), slice(14, 20))
    ]
    if where == "loss":  # which goes first
        for batch in batches:
            batch["attention_mask"] = torch.ones_like(batch["mask"])
    scalars = kronecker.empirical(case.example_loss)
    layers = kronecker.layers(
        model, scalars, examples_of(case), masks=list(mask), weight_sharing=sharing
    )
    ekfac, kfac = (
        method(loss=loss, weight_sharing=sharing).fit(model, batches) for method in (EKFAC, KFAC)
    )
    for weight, layer in layers.items():
        found = blocks_of(ekfac)[key_of(weight)][1]
        assert found.trace() == pytest.approx(float(layer.fisher().trace()), rel=1e-10)
        assert difference(found.to_dense(), layer.ekfac()) <= 1e-9
        assert difference(blocks_of(kfac)[key_of(weight)][1].to_dense(), layer.kfac()) <= 1e-12


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
def test_lengths_that_differ_beside_a_layer_with_one_position(fisher):
    """The exact Fisher has as many rows per example as tokens: others in every batch."""

    def forward(self, x):
        return self.head((self.each(x) + self.mean(x.mean(1))[:, None]).tanh()).transpose(1, 2)

    parts = {"each": nn.Linear(5, 4), "mean": nn.Linear(5, 4), "head": nn.Linear(4, 3)}
    model = situation("two lengths", lambda: Apply(forward, **parts), None).model()
    generator = torch.Generator().manual_seed(1)
    batches = [
        (
            torch.randn(n, length, 5, generator=generator, dtype=torch.float64),
            torch.randint(3, (n, length), generator=generator),
        )
        for n, length in ((4, 2), (5, 4), (1, 4), (6, 2), (4, 2))
    ]
    examples = [reference.take(batch, [i]) for batch in batches for i in range(len(batch[0]))]
    example_loss = reference.negative_log_likelihood_of_maps
    exact = fisher == "exact"
    scalars = kronecker.exact_softmax(1) if exact else kronecker.empirical(example_loss)
    layers = kronecker.layers(model, scalars, examples)
    ekfac, kfac = (method(fisher=fisher).fit(model, batches) for method in (EKFAC, KFAC))
    for weight, layer in layers.items():
        found = blocks_of(ekfac)[key_of(weight)][1]
        assert difference(found.to_dense(), layer.ekfac()) <= 1e-9
        assert difference(blocks_of(kfac)[key_of(weight)][1].to_dense(), layer.kfac()) <= 1e-12


# -- parameters in no Kronecker layer --------------------------------------------------------------


def mixed():
    """Layers, and what is none: norms, a wide shift, a slope, and parameters of no use."""

    def forward(self, x):
        h = self.norm(self.first(x)).tanh() + self.wide.view(-1, 4).mean(0)
        self.ignored(h)
        return self.head(self.slope(h))

    return Apply(
        forward,
        first=nn.Linear(5, 4),
        norm=nn.LayerNorm(4),
        wide=torch.zeros(1028),
        slope=nn.PReLU(),
        head=nn.Linear(4, 3),
        never=nn.Linear(3, 2),
        ignored=nn.Linear(4, 2, bias=False),
        frozen=nn.Parameter(torch.ones(3), requires_grad=False),
    )


MIXED = situation("mixed", mixed, points())
TREATMENT = {
    "wide": "diagonal",
    "first.weight": "Kronecker layer",
    "first.bias": "Kronecker layer",
    "norm.weight": "dense block",
    "norm.bias": "dense block",
    "slope.weight": "dense block",
    "head.weight": "Kronecker layer",
    "head.bias": "Kronecker layer",
    "never.weight": "zero",
    "never.bias": "zero",
    "ignored.weight": "zero",
}
BLOCKS = ("wide", "first", "norm.weight", "norm.bias", "slope.weight", "head")
ZERO_BLOCKS = ("never.weight", "ignored.weight")


@pytest.mark.parametrize("method", [EKFAC, KFAC])
@pytest.mark.parametrize("fisher", KINDS)
def test_other_parameters(method, fisher):
    """Exact blocks of at most 1024 numbers, else the exact diagonal."""
    settings = settings_of(MIXED, fisher)
    batches = MIXED.batches(7, n=N)
    model = MIXED.model()
    fitted = method(**settings).fit(model, batches)
    scalars = scalars_of(MIXED, settings, len(batches))
    rows = kronecker.rows(model, scalars, examples_of(MIXED))
    assert list(fitted.coverage_) == fitted.parameter_names_ == list(TREATMENT)
    for name, how in TREATMENT.items():
        assert fitted.coverage_[name].startswith(how + ": "), name
    blocks = blocks_of(fitted)
    assert list(blocks)[: len(BLOCKS)] == list(BLOCKS)
    everything = torch.cat([columns for columns, _ in blocks.values()])
    assert torch.equal(everything.sort().values, torch.arange(fitted.n_features_in_))
    for name, (columns, operator) in blocks.items():
        exact = rows[:, columns].T @ rows[:, columns] / N
        if TREATMENT.get(name, "") == "dense block":
            assert difference(operator.to_dense(), exact) <= 1e-12
        elif name == "wide":
            assert difference(operator.to_dense(), torch.diag(exact.diagonal())) <= 1e-12
        elif name not in BLOCKS:
            assert exact.norm() == operator.to_dense().norm() == 0
    assert set(fitted.eigenvalues_) == set(fitted.eigenvectors_) == {"first", "head"}
    vectors = torch.randn(2, fitted.n_features_in_, dtype=torch.float64)
    zero = blocks["never.weight"][0]
    whole = 0.1 * fitted.fisher_.trace() / fitted.n_features_in_
    assert difference(fitted.transform(vectors)[:, zero], vectors[:, zero] / whole) <= 1e-12


def test_dense_blocks_up_to_1024_numbers():
    def shifted(size):
        return lambda: Apply(
            lambda self, x: self.head(x) + self.shift.view(-1, 4)[:, :3].sum(0).tanh(),
            head=nn.Linear(5, 3),
            shift=torch.zeros(size),
        )

    for size, how in ((1024, "dense block"), (1028, "diagonal")):
        case = situation(f"{size} numbers", shifted(size), points())
        fitted = EKFAC().fit(case.model(), case.batches(7))
        assert fitted.coverage_["shift"].startswith(how)


@pytest.mark.parametrize("method", [EKFAC, KFAC])
def test_fallback_may_be_refused(method):
    model, batches = MIXED.model(), MIXED.batches(7)
    with pytest.raises(ValueError, match=r"'wide'.*are in no layer.*parameters=") as caught:
        method(fallback="raise").fit(model, batches)
    outside = [name for name, how in TREATMENT.items() if how in ("dense block", "diagonal")]
    assert all(f"{name!r}" in str(caught.value) for name in outside)
    assert "first" not in str(caught.value)
    without = method(fallback="raise", parameters=["first.*", "head.*"]).fit(model, batches)
    assert {how.split(":")[0] for how in without.coverage_.values()} == {"Kronecker layer"}
    method(fallback="raise").fit(SITUATIONS["linear"].model(), batches)


def test_refusal_of_a_parameter_met_later():
    def forward(self, x, shifted):
        return self.head(x) + (self.shift if shifted.item() else 0)

    model = Apply(forward, head=nn.Linear(5, 3), shift=torch.zeros(3)).double()
    x, y = points()(8, torch.Generator().manual_seed(0))
    batches = [(x[:4], torch.tensor(False), y[:4]), (x[4:], torch.tensor(True), y[4:])]
    with pytest.raises(ValueError, match="'shift' are in no layer"):
        EKFAC(fallback="raise").fit(model, batches)


def conditional(extra):
    """A layer, or one more use of the first, in batches that say so."""

    def forward(self, x, with_extra):
        h = self.first(x)
        if with_extra.item():
            h = h + (self.extra(x) if extra else x @ self.first.weight)
        return self.head(h.tanh())

    parts = {"extra": nn.Linear(5, 5)} if extra else {}
    return Apply(forward, first=nn.Linear(5, 5), head=nn.Linear(5, 3), **parts)


def conditional_batches(*flags):
    x, y = points()(N, torch.Generator().manual_seed(0))
    batches = [
        (x[part], torch.tensor(flag), y[part])
        for part, flag in ((slice(0, 8), True), (slice(8, N), False))
    ]
    return batches if flags == (True, False) else batches[::-1]


@pytest.mark.parametrize("method", [EKFAC, KFAC])
def test_layer_first_met_in_a_later_batch(method):
    """Which batch is first decides about nothing."""
    model = situation("conditional", lambda: conditional(True), points()).model()
    first = method().fit(model, conditional_batches(True, False))
    later = method().fit(model, conditional_batches(False, True))
    assert later.coverage_ == first.coverage_
    assert set(later.eigenvalues_) == set(first.eigenvalues_) == {"first", "extra", "head"}
    assert difference(later.fisher_.to_dense(), first.fisher_.to_dense()) <= 1e-9


def sometimes_tied(where):
    """A table that is looked up, or multiplied by, in batches that say so."""

    def forward(self, ids, flag):
        looked_up = where == "product" or flag.item()
        h = (self.table if looked_up else self.other)(ids).tanh()
        product = where == "lookup" or flag.item()
        return nn.functional.linear(h, (self.table if product else self.other).weight)

    return Apply(forward, table=nn.Embedding(7, 3), other=nn.Embedding(7, 3))


def either(first, second, *shape, bias=False):
    """A weight that is used in one of two ways, as batches say."""

    def forward(self, x, flag):
        use = first if flag.item() else second
        return self.head(use(x, self.first.weight, self.first.bias).tanh())

    layer = nn.Module()
    layer.weight = nn.Parameter(torch.randn(shape))
    layer.bias = nn.Parameter(torch.randn(shape[0])) if bias else None
    return Apply(forward, first=layer, head=nn.Linear(shape[0], 3))


def two_maps(bias):
    def transposed(x, weight, bias):
        return x @ weight if bias is None else torch.addmm(bias, x, weight)

    return either(nn.functional.linear, transposed, 5, 5, bias=bias)


def two_groupings():
    def conv(x, weight, bias):
        return nn.functional.conv1d(x, weight, bias).mean(2)

    def grouped(x, weight, bias):
        return nn.functional.conv1d(x.view(-1, 4, 3), weight, bias, groups=2).mean(2)

    return either(conv, grouped, 4, 2, 2)


SOMETIMES = {
    "two maps": (lambda: two_maps(False), points()),
    "two maps, with a bias": (lambda: two_maps(True), points()),
    "maps of two groupings": (two_groupings, sequences(features=6, length=2)),
    "linear, and transposed": (lambda: conditional(False), points()),
    "table, and looked up": (lambda: sometimes_tied("lookup"), tokens()),
    "table, and multiplied by": (lambda: sometimes_tied("product"), tokens()),
}


@pytest.mark.parametrize("method", [EKFAC, KFAC])
@pytest.mark.parametrize("flags", [(True, False), (False, True)])
@pytest.mark.parametrize("name", SOMETIMES)
def test_uses_that_differ_between_batches(name, flags, method):
    """What is one map in some batches only is in no layer: it has its exact block."""
    build, data = SOMETIMES[name]
    case = situation(name, build, data)
    model, (x, y) = case.model(), case.batch(N)
    halves = slice(0, 8), slice(8, N)
    batches = [(x[h], torch.tensor(flag), y[h]) for h, flag in zip(halves, flags, strict=True)]
    fitted = method().fit(model, batches)
    assert fitted.n_samples_seen_ == N
    rows = torch.cat([rows_at_flag(model, *batch) for batch in batches])
    F, start = reference.fisher(rows), 0
    for key, parameter in model.named_parameters():
        own = slice(start, start + parameter.numel())
        start = own.stop
        if fitted.coverage_[key].startswith("dense block"):
            assert difference(fitted.fisher_.to_dense()[own, own], F[own, own]) <= 1e-12
    shared = "table.weight" if "table" in name else "first.weight"
    assert fitted.coverage_[shared].startswith("dense block")
    if method is EKFAC:
        assert fitted.fisher_.trace() == pytest.approx(float(F.trace()), rel=1e-10)
    if name != "linear, and transposed" or flags == (False, True):  # not seen in the first batch
        message = f"'{shared}' is one linear map in some .*parameters="
        with pytest.raises(IFVPUsageError, match=message):
            method().fit(model, iter(batches))
    with pytest.raises(IFVPUsageError, match=f"'{shared}'.* in no layer that can be Kron"):
        method(fallback="raise").fit(model, batches)


def rows_at_flag(model, x, flag, y):
    """Return the gradients of single examples."""
    rows = []
    for i in range(len(x)):
        out = model(x[i : i + 1], flag).movedim(-1, 1)
        loss = nn.functional.cross_entropy(out, y[i : i + 1], reduction="sum")
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows)


class Rest:
    """An iterable that goes on where it was left, and does not say so."""

    def __init__(self, batches):
        self.batches = iter(batches)

    def __iter__(self):
        return self.batches


@pytest.mark.parametrize("more", [0, 3])
@pytest.mark.parametrize("method", [EKFAC, KFAC])
def test_a_pass_that_cannot_begin_again(method, more):
    build, data = SOMETIMES["linear, and transposed"]
    case = situation("", build, data)
    model, (x, y) = case.model(), case.batch(N)
    flags = [False, True, *[False] * more]
    batches = [(x[i : i + 4], torch.tensor(flag), y[i : i + 4]) for i, flag in enumerate(flags)]
    message = "batch 0 has other losses" if more else "there are fewer batches: 0|has no batches"
    with pytest.raises(IFVPUsageError, match=message):
        method().fit(model, Rest(batches))


# -- precision -------------------------------------------------------------------------------------


def as_float(batch, dtype=torch.float32):
    return tuple(part.to(dtype) if part.is_floating_point() else part for part in batch)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eigenvectors_are_of_float64(dtype, threads, monkeypatch):
    """Whatever the model's precision; and threads are as many afterwards as before."""
    case = SITUATIONS["convolution in 1-D"]
    seen = []
    original = np.linalg.eigh

    def watched(matrix, *arguments, **keywords):
        seen.append((matrix.dtype, matrix.shape))
        return original(matrix, *arguments, **keywords)

    monkeypatch.setattr(np.linalg, "eigh", watched)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        fitted = EKFAC().fit(
            case.model().to(dtype), [as_float(batch, dtype) for batch in case.batches(7, n=N)]
        )
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    shapes = [(1, 4, 4), (1, 9, 9), (2, 2, 2), (2, 4, 4), (1, 3, 3), (1, 9, 9)]
    assert sorted(seen) == sorted((np.float64, shape) for shape in shapes)
    assert fitted.dtype_ == torch.float32
    for name, values in fitted.eigenvalues_.items():
        assert values.dtype == torch.float32
        assert all(basis.dtype == torch.float32 for basis in fitted.eigenvectors_[name])
        for basis in fitted.eigenvectors_[name]:
            eye = torch.eye(basis.shape[-1])
            assert float((basis.mT @ basis - eye).abs().max()) <= 1e-6


def test_factors_side_by_side_are_those_one_after_the_other():
    case = SITUATIONS["language model"]
    before = torch.get_num_threads()
    fits = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        fits.append(EKFAC().fit(case.model(), case.batches(7, n=N)))
        torch.set_num_threads(before)
    assert difference(*(fitted.fisher_.to_dense() for fitted in fits)) <= 1e-9


@pytest.mark.parametrize("name", ["linear", "many positions", "convolution in 2-D", "tied table"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 2e-3), (torch.float16, 0.03), (torch.bfloat16, 0.2), ("autocast", 0.2)],
)
def test_low_precision_models(name, dtype, tolerance):
    """Statistics are float32, and close to those of the float64 model."""
    case = SITUATIONS[name]
    exact = EKFAC().fit(case.model(), case.batches(7, n=N))
    if dtype == "autocast":
        model, batches = case.model().float(), [as_float(b) for b in case.batches(7, n=N)]
        with torch.autocast("cpu", torch.bfloat16):
            fitted = EKFAC().fit(model, batches)
    else:
        batches = [as_float(b, dtype) for b in case.batches(7, n=N)]
        fitted = EKFAC().fit(case.model().to(dtype), batches)
    assert fitted.dtype_ == torch.float32
    assert fitted.fisher_.trace() == pytest.approx(exact.fisher_.trace(), rel=tolerance)
    assert difference(fitted.fisher_.to_dense().double(), exact.fisher_.to_dense()) <= tolerance
    gradients = torch.randn(3, fitted.n_features_in_)
    assert fitted.transform(gradients).dtype == torch.float32
    found, expected = fitted.transform(gradients).double(), exact.transform(gradients.double())
    assert reference.error(found, expected) <= 5 * tolerance
    assert fitted.transform(gradients.bfloat16()).dtype == torch.bfloat16


def test_precision_may_be_asked_for():
    case = SITUATIONS["linear"]
    batches = [as_float(batch) for batch in case.batches(7, n=N)]
    fitted = EKFAC(dtype=torch.float64).fit(case.model().float(), batches)
    assert fitted.dtype_ == torch.float64
    assert all(values.dtype == torch.float64 for values in fitted.eigenvalues_.values())


def growing(scale, name="linear"):
    """Return float32 batches of which the last has inputs that are much larger."""
    case = SITUATIONS[name]
    batches = [as_float(batch) for batch in case.batches(7, n=N)]
    batches[-1] = (batches[-1][0] * scale, batches[-1][1])
    return case.model().float(), batches


@pytest.mark.parametrize("method", [EKFAC, KFAC])
def test_factors_that_overflow(method):
    """Inputs are finite, their squares are not."""
    model, batches = growing(1e20)
    with pytest.raises(ValueError, match=r"'0\.weight \(input side\)' is not finite.*float64"):
        method().fit(model, batches)
    method(dtype=torch.float64).fit(model, batches)


@pytest.mark.parametrize("method", [EKFAC, KFAC])
def test_eigenvalues_that_overflow(method):
    """Both factors are finite, their products are not."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    batches = [
        as_float(batch) for batch in split(regression(3)(N, torch.Generator().manual_seed(0)), N, 7)
    ]
    batches[-1] = tuple(1e10 * part for part in batches[-1])
    with pytest.raises(ValueError, match=r"'0(\.weight)?'.* not finite.*float64"):
        method(loss="mse").fit(model, batches)
    fitted = method(loss="mse", dtype=torch.float64).fit(model, batches)
    assert fitted.transform(torch.ones(fitted.n_features_in_)).isfinite().all()


@pytest.mark.cuda
def test_solver_that_fails_on_the_device(monkeypatch):
    """The decomposition is then done on the CPU."""
    case = SITUATIONS["linear"]
    model = case.model().cuda()
    expected = EKFAC().fit(model, case.batches(7, n=N))
    original = torch.linalg.eigh
    devices = []

    def failing(matrix, *arguments, **keywords):
        devices.append(matrix.device.type)
        if matrix.device.type == "cuda":
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return original(matrix, *arguments, **keywords)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    found = EKFAC().fit(model, case.batches(7, n=N))
    assert devices == ["cuda"] * 6
    assert found.fisher_.device.type == "cuda"
    assert difference(found.fisher_.to_dense(), expected.fisher_.to_dense()) <= 1e-9


@pytest.mark.cuda
@pytest.mark.parametrize("name", SITUATIONS)
def test_on_a_device(name):
    case = SITUATIONS[name]
    expected = EKFAC(loss=case.loss).fit(case.model(), case.batches(7, n=N))
    found = EKFAC(loss=case.loss).fit(case.model().cuda(), case.batches(7, n=N))
    assert found.fisher_.device.type == "cuda"
    assert difference(found.fisher_.to_dense().cpu(), expected.fisher_.to_dense()) <= 1e-8


# -- fitted attributes -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SITUATIONS)
def test_eigenvalues_and_eigenvectors(name):
    """Shapes, columns that are orthonormal, and that make the factors diagonal."""
    ekfac, kfac, layers = references(name, "empirical", "expand")
    assert set(ekfac.eigenvectors_) == set(ekfac.eigenvalues_) == {key_of(w) for w in layers}
    for weight, layer in layers.items():
        values = ekfac.eigenvalues_[key_of(weight)]
        bases = ekfac.eigenvectors_[key_of(weight)]
        assert values.shape == layer.index.shape
        assert float(values.min()) >= 0
        for basis, factor, size in zip(bases, layer.factors(), values.shape[1:], strict=True):
            if basis is None:
                assert layer.tables
                continue
            assert basis.shape == (len(values), size, size)
            eye = torch.eye(size, dtype=torch.float64).expand_as(basis)
            assert float((basis.mT @ basis - eye).abs().max()) <= 1e-12
            rotated = basis.mT @ factor @ basis
            off = rotated - rotated.diagonal(0, 1, 2).diag_embed()
            assert float(off.norm()) <= 1e-12 * float(factor.norm())
        assert all(
            torch.equal(basis, other) if basis is not None else other is None
            for basis, other in zip(bases, kfac.eigenvectors_[key_of(weight)], strict=True)
        )


def test_a_model_that_is_one_layer():
    model = nn.Linear(5, 3).double()
    batch = points()(N, torch.Generator().manual_seed(0))
    fitted = EKFAC(1e-2).fit(model, [batch])
    (name,) = fitted.eigenvalues_
    assert fitted.regularization_ == 1e-2
    assert fitted.eigenvalues_[name].shape == (1, 3, 6)
    scalars = kronecker.empirical(reference.negative_log_likelihood)
    examples = [reference.take(batch, [i]) for i in range(N)]
    expected = kronecker.layers(model, scalars, examples)["weight"].ekfac()
    assert difference(fitted.fisher_.to_dense(), expected) <= 1e-9
    vectors = torch.randn(2, 18, dtype=torch.float64)
    damped = expected + 1e-2 * torch.eye(18, dtype=torch.float64)
    assert reference.error(
        fitted.transform(vectors), torch.linalg.solve(damped, vectors.T).T
    ) <= 1e-9  # fmt: skip


# -- as an estimator -------------------------------------------------------------------------------


def dense_damped(fitted, dampings):
    """Return the dense approximation with a damping for each block, from its own blocks."""
    out = torch.zeros(fitted.n_features_in_, fitted.n_features_in_, dtype=torch.float64)
    for (columns, operator), damping in zip(blocks_of(fitted).values(), dampings, strict=True):
        eye = torch.eye(len(columns), dtype=torch.float64)
        out[columns[:, None], columns] = operator.to_dense() + damping * eye
    return out


@pytest.mark.parametrize("method", [EKFAC, KFAC])
@pytest.mark.parametrize("name", ["linear", "convolution in 1-D", "tied language model"])
def test_regularization(method, name):
    """One for all, 'auto' a tenth of each block's mean eigenvalue, or one by the layer's name."""
    case = SITUATIONS[name]
    model, batches = case.model(), case.batches(7, n=N)
    fitted = method(1.0).fit(model, batches)
    blocks = blocks_of(fitted)
    vectors = torch.cat([case.gradients[:3], torch.randn(2, fitted.n_features_in_).double()])
    automatic = {
        key: 0.1 * float(operator.to_dense().trace()) / len(columns)
        for key, (columns, operator) in blocks.items()
    }
    mapping = {key: 0.01 * (i + 1) for i, key in enumerate(blocks)}
    for value, dampings in (
        (1e-3, dict.fromkeys(blocks, 1e-3)),
        ("auto", automatic),
        (mapping, mapping),
        (list(mapping.values()), mapping),
        (0.3, dict.fromkeys(blocks, 0.3)),
    ):
        fitted.set_params(regularization=value)
        in_force = fitted.regularization_
        in_force = in_force if isinstance(in_force, dict) else dict.fromkeys(blocks, in_force)
        assert in_force == pytest.approx(dampings, rel=1e-10)
        damped = dense_damped(fitted, dampings.values())
        expected = torch.linalg.solve(damped, vectors.T).T
        assert reference.error(fitted.transform(vectors), expected) <= 1e-8
        assert reference.error(fitted.inverse_transform(vectors), vectors @ damped) <= 1e-10
        again = method(value).fit(model, batches).transform(vectors)
        assert reference.error(fitted.transform(vectors), again) <= 1e-12
    with pytest.raises(ValueError, match="expected one per block"):
        fitted.set_params(regularization={"nothing": 1.0}).transform(vectors)


@pytest.mark.parametrize("method", [EKFAC, KFAC])
def test_scores_are_of_the_same_matrix(method):
    case = SITUATIONS["linear"]
    fitted = method(0.1).fit(case.model(), case.batches(7, n=N))
    held_out = case.gradients
    normal = torch.distributions.MultivariateNormal(
        torch.zeros(fitted.n_features_in_).double(),
        dense_damped(fitted, [0.1] * len(blocks_of(fitted))),
    )
    expected = normal.log_prob(held_out)
    assert fitted.score_samples(held_out) == pytest.approx(expected.numpy(), rel=1e-9)
    path = fitted.score_path(held_out, [1.0, 0.1])
    assert path[1] == pytest.approx(fitted.score(held_out), rel=1e-12)


def test_float32_scores_are_refused_alike():
    """Below the rounding of the statistics there is no inverse, however it is asked for."""
    model, batches = growing(1.0)
    fitted = EKFAC(1e-12).fit(model, batches)
    vectors = torch.randn(2, fitted.n_features_in_)
    for attempt in (
        lambda: fitted.transform(vectors),
        lambda: fitted.score(vectors),
        lambda: fitted.score_path(vectors, [1e-12]),
    ):
        with pytest.raises(SingularFisherError, match="larger regularization"):
            attempt()


@pytest.mark.parametrize("method", [EKFAC, KFAC])
def test_pickle_and_clone(method):
    case = SITUATIONS["tied language model"]
    fitted = method(1e-2, weight_sharing="reduce", fisher="mc", random_state=1)
    fitted.fit(case.model(), case.batches(7, n=N))
    vectors = torch.randn(3, fitted.n_features_in_, dtype=torch.float64)
    data = pickle.dumps(fitted)
    assert b"LanguageModel" not in data
    again = pickle.loads(data)
    assert torch.equal(again.transform(vectors), fitted.transform(vectors))
    assert again.coverage_ == fitted.coverage_
    assert again.set_params(regularization="auto").regularization_ == (
        fitted.set_params(regularization="auto").regularization_
    )
    copied = clone(fitted)
    assert copied.get_params() == fitted.get_params()
    assert not any(name.endswith("_") for name in vars(copied))


def test_parameters_of_the_constructor():
    shared = set(inspect.signature(Explicit).parameters) - {"solver", "blocks"}
    own = {"weight_sharing", "fallback"}
    assert set(inspect.signature(KFAC).parameters) == shared | own
    assert set(inspect.signature(EKFAC).parameters) == shared | own | {"cache_budget"}
    assert set(inspect.signature(Diagonal).parameters) == shared
    case = SITUATIONS["linear"]
    for wrong in ({"weight_sharing": "sum"}, {"fallback": "skip"}, {"cache_budget": -1}):
        with pytest.raises(InvalidParameterError, match=next(iter(wrong))):
            EKFAC(**wrong).fit(case.model(), case.batches(7))


@pytest.mark.parametrize("method", [EKFAC, KFAC])
def test_failed_fit_leaves_the_estimator(method):
    case = SITUATIONS["linear"]
    fitted = method(1e-2).fit(case.model(), case.batches(7, n=N))
    before = dict(vars(fitted))
    model, batches = growing(1e20)
    with unchanged(model), pytest.raises(ValueError, match="not finite"):
        fitted.fit(model, batches)
    assert dict(vars(fitted)) == before
    bad = case.batches(7, n=N)
    bad[1][0][0, 0] = torch.nan
    with pytest.raises(ValueError, match="batch 1: NaN"):
        fitted.fit(case.model(), bad)
    assert dict(vars(fitted)) == before


@pytest.mark.parametrize("cache_budget", [0, 2**30])
@pytest.mark.parametrize("name", ["convolution in 2-D", "tied language model", "shared weight"])
def test_model_is_left_alone(name, cache_budget):
    """Its weights, flags, hooks and gradients, its modes, and the global random state."""
    case = SITUATIONS[name]
    model = case.model().train()
    next(model.children()).eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for context in (torch.enable_grad(), torch.no_grad()):
        with unchanged(model), context:
            EKFAC(cache_budget=cache_budget).fit(model, case.batches(7, n=N))


def test_fit_transform_of_model_data():
    case = SITUATIONS["linear"]
    data = ModelData(case.model(), case.batch(N), batch_size=7)
    found = EKFAC(1e-2).fit_transform(data)
    fitted = EKFAC(1e-2).fit(case.model(), case.batches(7, n=N))
    rows = kronecker.rows(case.model(), kronecker.empirical(case.example_loss), examples_of(case))
    assert reference.error(found, fitted.transform(rows)) <= 1e-9


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (lambda b: torch.ones(1, 4), r"mask of shape \(1, 4\) for 6 examples; expected \(6, T\)"),
        (lambda b: torch.zeros(b, 4).log(), "mask with other values than 0 and 1"),
        (lambda b: torch.full((b, 4), torch.nan), "mask with other values than 0 and 1"),
        (lambda b: torch.ones(b), r"mask a tensor of shape \(6,\); expected shape \(B, T\)"),
    ],
)
@pytest.mark.parametrize("method", [EKFAC, KFAC])
def test_masks_that_are_none(method, mask, message):
    def loss(model, batch):
        losses = nn.functional.cross_entropy(model(batch[0]).mean(1), batch[1], reduction="none")
        return losses, mask(len(losses))

    batch = torch.randn(6, 4, 3), torch.tensor([0, 1, 0, 1, 1, 0])
    with pytest.raises(IFVPUsageError, match=message):
        method(loss=loss).fit(nn.Linear(3, 2), [batch])


@pytest.mark.parametrize("method", [EKFAC, KFAC, Diagonal])
def test_overflow_outside_layers_is_refused_by_name(method):
    """Squares of gradients near 1e22 are beyond float32."""

    def loss(model, batch):
        return (model(batch[0]) * 1e22).sum(1)

    x = torch.randn(5, 2000)
    with pytest.raises(IFVPUsageError, match=r"the Fisher of block '.*' is not finite.*float64"):
        method(loss=loss).fit(nn.LayerNorm(2000), [(x, x)])


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
def test_many_small_batches_are_one_large_one(fisher):
    """Rows are gathered for larger products, some of them more than once in a pass."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2500, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (2500,), generator=generator)
    whole, few = (
        EKFAC(fisher=fisher).fit(model, split((x, y), 2500, size)) for size in (2500, 300)
    )
    trace = Explicit(fisher=fisher).fit(model, [(x, y)]).fisher_.trace()
    assert few.fisher_.trace() == pytest.approx(trace, rel=1e-10)
    for name, eigenvalues in whole.eigenvalues_.items():
        torch.testing.assert_close(few.eigenvalues_[name], eigenvalues, rtol=1e-9, atol=1e-18)


@pytest.mark.parametrize("scale", [1e-12, 1.0])
@pytest.mark.parametrize("layer", ["convolution", "table"])
def test_squares_where_sums_over_positions_cancel(layer, scale):
    """Their reduced sides are rounding errors, and Λ is of whole gradients all the same."""
    norm = nn.InstanceNorm1d(4)
    if layer == "convolution":
        inner = nn.Sequential(norm, nn.Conv1d(4, 4, 1, bias=False), norm)
        x = torch.randn(40, 4, 16)
    else:
        table = nn.Embedding(9, 4)
        inner = Apply(lambda self, x: self.norm(self.table(x).mT), table=table, norm=norm)
        x = torch.randint(9, (40, 16))
    model = nn.Sequential(inner, nn.Tanh(), nn.Flatten(), nn.Linear(64, 3))
    y = torch.arange(40) % 3

    def loss(model, batch):
        return scale * cross_entropy(model(batch[0]), batch[1], reduction="none")

    found = EKFAC(loss=loss, weight_sharing="reduce").fit(model, split((x, y), 40, 7))
    exact = as_float((x, y), torch.float64)
    expected = Diagonal(loss=loss).fit(deepcopy(model).double(), [exact])
    assert found.fisher_.trace() == pytest.approx(expected.fisher_.trace(), rel=1e-5)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6])
def test_squares_of_tiny_gradients_do_not_underflow(scale):
    """In float32 the square of a square of 1e-12 would be zero."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = torch.randn(40, 5), torch.randn(40, 3)

    def fit(scale, dtype):
        def loss(model, batch):
            return scale * (model(batch[0]) - batch[1]).square().sum(1)

        batches = split((x.to(dtype), y.to(dtype)), 40, 7)
        return EKFAC(loss=loss).fit(deepcopy(model).to(dtype), batches)

    small, exact = fit(scale, torch.float32), fit(1.0, torch.float64)
    for name, eigenvalues in exact.eigenvalues_.items():
        bases = zip(small.eigenvectors_[name], exact.eigenvectors_[name], strict=True)
        for found, expected in bases:
            eye = torch.eye(found.shape[-1])
            assert (found.mT @ found - eye).abs().max() < 1e-5
            assert expected is not None
        found = small.eigenvalues_[name].double() / scale**2
        assert (found > 0).all()
        assert (found - eigenvalues).abs().max() < 1e-4 * eigenvalues.max()
        assert found.sum() == pytest.approx(float(eigenvalues.sum()), rel=1e-5)
