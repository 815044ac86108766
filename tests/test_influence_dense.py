"""Influence scores of every method, measurement and normalization against dense references."""

from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fimkit import (
    EKFAC,
    DataInf,
    Explicit,
    IFVPUsageError,
    ModelData,
    RegularizationCV,
    influence,
)
from tests import kronecker_reference as kronecker
from tests import reference
from tests.cases import Apply, Attention, Case, images, points, regression, tagged, tokens

N, QUERIES, REGULARIZATION = 20, 5, 1e-2


def mlp():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2),
        nn.Tanh(),
        nn.Conv2d(4, 4, 2, groups=2, bias=False),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


def transformer():
    def forward(self, ids):
        x = self.tokens(ids)
        x = x + self.attention(F.layer_norm(x, x.shape[-1:]))
        return self.head(F.layer_norm(x, x.shape[-1:]))

    return Apply(forward, tokens=nn.Embedding(7, 4), attention=Attention(4), head=nn.Linear(4, 7))


CASES = {
    "mlp": Case("influence mlp", mlp, points()),
    "cnn": Case("influence cnn", cnn, images),
    "transformer": Case("influence transformer", transformer, tokens()),
}


# -- the reference ---------------------------------------------------------------------------------


def lines(model, example):
    """Return the logits, a line per target that counts, and these targets."""
    logits = reference.outputs(model, example).flatten(0, -2)
    targets = reference.labels(example).flatten()
    return [(line, int(y)) for line, y in zip(logits, targets, strict=True) if y != -100]


def logit(model, example):
    return sum(line[y] for line, y in lines(model, example))


def log_odds(model, example):
    probabilities = [(line.softmax(0)[y]) for line, y in lines(model, example)]
    return sum((p / (1 - p)).log() for p in probabilities)


def margin(model, example):
    return sum(
        line[y] - max(line[k] for k in range(len(line)) if k != y)
        for line, y in lines(model, example)
    )


def squared_length(model, example):
    return reference.outputs(model, example).pow(2).sum()


def squared_lengths(model, batch):
    return model(batch[0]).pow(2).flatten(1).sum(1)


# What is asked for, how the reference computes it, and whether more of it is better.
MEASUREMENTS = {
    "loss": ("loss", reference.negative_log_likelihood, -1),
    "logit": ("logit", logit, 1),
    "log_odds": ("log_odds", log_odds, 1),
    "margin": ("margin", margin, 1),
    "callable": (squared_lengths, squared_length, 1),
}


def queries_of(case):
    return case.data(QUERIES, torch.Generator().manual_seed(7))


@cache
def train_gradients(name):
    case = CASES[name]
    return reference.gradients(case.model(), case.example_loss, case.batch(N), N)


@cache
def layer_indices(name):
    """Return the flat positions of each module's parameters, by its name."""
    out, start = {}, 0
    for parameter, value in CASES[name].model().named_parameters():
        out.setdefault(parameter.rpartition(".")[0], []).extend(range(start, start + value.numel()))
        start += value.numel()
    return out


@cache
def damped_inverse(name, method):
    """Return the dense ``(p, p)`` matrix that a method puts in the place of ``(F + λI)⁻¹``."""
    rows = train_gradients(name)
    eye = torch.eye(rows.shape[1], dtype=torch.float64)
    if method is Explicit:
        return torch.linalg.inv(reference.damped(rows, REGULARIZATION))
    out = torch.zeros_like(eye)
    if method is DataInf:
        for positions in layer_indices(name).values():
            here = torch.tensor(positions)
            own, inner = rows[:, here], eye[: len(here), : len(here)]
            inverses = [torch.linalg.inv(REGULARIZATION * inner + torch.outer(g, g)) for g in own]
            out[here[:, None], here] = torch.stack(inverses).mean(0)
        return out
    case = CASES[name]
    batch = case.batch(N)
    found = kronecker.layers(
        case.model(),
        kronecker.empirical(case.example_loss),
        [reference.take(batch, [i]) for i in range(N)],
    )
    starts, start = {}, 0
    for parameter, value in case.model().named_parameters():
        starts[parameter] = start + torch.arange(value.numel())
        start += value.numel()
    for layer in found.values():
        here = torch.cat([starts[parameter] for parameter in layer.names])
        inner = eye[: len(here), : len(here)]
        out[here[:, None], here] = torch.linalg.inv(layer.ekfac() + REGULARIZATION * inner)
    assert (out.diagonal() > 0).all()  # every parameter is in a layer
    return out


@cache
def query_gradients(name, measurement):
    """Return gradients of what training should raise."""
    case = CASES[name]
    _, function, sign = MEASUREMENTS[measurement]
    return sign * reference.gradients(case.model(), function, queries_of(case), QUERIES)


def expected_scores(name, method, measurement="loss", normalization=None, columns=slice(None)):
    """Training goes along the negative gradient of the loss, preconditioned.

    Columns are those of the training gradient that are taken into account.
    """
    inverse, rows = damped_inverse(name, method), train_gradients(name)
    rising = query_gradients(name, measurement) @ inverse
    scores = rising[:, columns] @ -rows[:, columns].T
    if normalization == "relatif":
        scores = scores / (rows @ inverse * rows).sum(1).sqrt()
    return scores


# -- what is asked of fimkit -----------------------------------------------------------------------


@pytest.fixture(params=CASES)
def name(request):
    return request.param


@pytest.fixture(params=[Explicit, EKFAC, DataInf])
def method(request):
    return request.param


def fitted_on(name, method, **settings):
    case = CASES[name]
    model = case.model()
    data = ModelData(model, case.batch(N), batch_size=7)
    return method(REGULARIZATION, **settings).fit(data), model


def data_of(name, model, *, size=N):
    case = CASES[name]
    return (
        ModelData(model, case.batch(N), batch_size=size),
        ModelData(model, queries_of(case), batch_size=size),
    )


@pytest.mark.parametrize("normalization", [None, "relatif"])
@pytest.mark.parametrize("measurement", MEASUREMENTS)
def test_pairwise_scores(name, method, measurement, normalization):
    fitted, model = fitted_on(name, method)
    expected = expected_scores(name, method, measurement, normalization)
    given = MEASUREMENTS[measurement][0]
    for size in (1, 7, N):
        found = influence.pairwise_scores(
            fitted,
            *data_of(name, model, size=size),
            measurement=given,
            normalization=normalization,
        )
        assert reference.error(found, expected) <= 1e-9
    best = influence.top_k(
        fitted,
        *data_of(name, model, size=3),
        4,
        measurement=given,
        normalization=normalization,
    )
    order = expected.argsort(1, descending=True)[:, :4]
    assert best.indices.tolist() == order.tolist()
    assert reference.error(best.scores, expected.gather(1, order)) <= 1e-9


@pytest.mark.parametrize("normalization", [None, "relatif"])
@pytest.mark.parametrize("measurement", ["loss", "margin"])
def test_layer_scores(name, method, measurement, normalization):
    fitted, model = fitted_on(name, method)
    data = data_of(name, model, size=7)
    options = {"measurement": measurement, "normalization": normalization}
    found = influence.layer_scores(fitted, *data, **options)
    assert list(found) == list(layer_indices(name))
    for layer, columns in layer_indices(name).items():
        expected = expected_scores(name, method, measurement, normalization, columns)
        assert reference.error(found[layer], expected) <= 1e-9
    whole = influence.pairwise_scores(fitted, *data, **options)
    assert reference.error(sum(found.values()), whole) <= 1e-12


def test_scores_of_single_parameters(name, method):
    """A layer's weight and bias have their gradients in one, which are told apart."""
    fitted, model = fitted_on(name, method)
    found = influence.layer_scores(fitted, *data_of(name, model), blocks="parameter")
    start = 0
    for parameter, value in model.named_parameters():
        columns = slice(start, start + value.numel())
        expected = expected_scores(name, method, columns=columns).numpy()
        assert np.abs(found[parameter] - expected).max() <= 1e-9 * np.abs(expected).max()
        start = columns.stop
    assert list(found) == [parameter for parameter, _ in model.named_parameters()]


def test_layers_by_pattern():
    fitted, model = fitted_on("mlp", Explicit)
    data = data_of("mlp", model)
    parts = influence.layer_scores(fitted, *data, blocks={"ends": ["0.*", "4.*"], "middle": "2.*"})
    layers = influence.layer_scores(fitted, *data)
    assert reference.error(parts["ends"], layers["0"] + layers["4"]) <= 1e-12
    assert reference.error(parts["middle"], layers["2"]) <= 1e-12


@pytest.mark.parametrize("budget", [1, 3000])
def test_queries_in_parts(monkeypatch, budget):
    """Queries whose products do not fit the budget are scored in turn."""
    fitted, model = fitted_on("cnn", EKFAC)
    train, queries = data_of("cnn", model, size=7)
    expected = expected_scores("cnn", EKFAC)
    monkeypatch.setattr(influence, "_QUERY_BUDGET", budget)
    sizes = []
    ifvps = influence._ifvps
    monkeypatch.setattr(
        influence,
        "_ifvps",
        lambda estimator, part, measurement: (
            sizes.append(len(part)) or ifvps(estimator, part, measurement)
        ),
    )
    assert reference.error(influence.pairwise_scores(fitted, train, queries), expected) <= 1e-9
    assert sum(sizes) == QUERIES
    assert len(sizes) > 1
    best = influence.top_k(fitted, train, queries, 3, largest=False)
    order = expected.argsort(1)[:, :3]
    assert best.indices.tolist() == order.tolist()
    assert reference.error(best.scores, expected.gather(1, order)) <= 1e-9


def test_the_training_set_is_passed_once():
    class Counted(torch.utils.data.Dataset):
        def __init__(self, tensors):
            self.tensors, self.read = tensors, []

        def __len__(self):
            return len(self.tensors[0])

        def __getitem__(self, i):
            self.read.append(i)
            return tuple(tensor[i] for tensor in self.tensors)

    fitted, model = fitted_on("mlp", EKFAC)
    train = Counted(CASES["mlp"].batch(N))
    queries = Counted(queries_of(CASES["mlp"]))
    for function in (
        influence.pairwise_scores,
        influence.layer_scores,
        lambda *data, **options: influence.top_k(*data, 2, **options),
    ):
        data = ModelData(model, train, batch_size=3), ModelData(model, queries, batch_size=2)
        function(fitted, *data, normalization="relatif", measurement="margin")
        assert train.read == list(range(N))
        assert queries.read == list(range(QUERIES))
        train.read, queries.read = [], []


def test_a_regularization_that_was_searched_for():
    """The search stands for its estimator at the λ it chose."""
    case = CASES["mlp"]
    train, queries = data_of("mlp", case.model())
    search = RegularizationCV(EKFAC(), [1e-2], cv=2).fit(train)
    fitted = EKFAC(search.regularization_).fit(train)
    for options in ({}, {"measurement": "margin", "normalization": "relatif"}):
        found = influence.layer_scores(search, train, queries, **options)
        expected = influence.layer_scores(fitted, train, queries, **options)
        for layer, scores in expected.items():
            assert reference.error(found[layer], scores) <= 1e-12


def test_an_example_without_gradient_scores_zero():
    """All its targets are ignored; its self-influence, by which RelatIF divides, is zero."""
    case = CASES["transformer"]
    ids, targets = case.batch(N)
    targets[4] = -100
    model = case.model()
    train = ModelData(model, (ids, targets))
    fitted = EKFAC(REGULARIZATION).fit(train)
    queries = ModelData(model, queries_of(case))
    scores = influence.pairwise_scores(fitted, train, queries, normalization="relatif")
    assert (scores[:, 4] == 0).all()
    assert np.isfinite(scores).all()
    assert (np.delete(scores, 4, 1) != 0).all()


# -- measurements of other losses ------------------------------------------------------------------


def binary(n, generator):
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    return x, torch.rand(n, 2, generator=generator).round().double()


@pytest.mark.parametrize("measurement", ["logit", "log_odds", "margin"])
@pytest.mark.parametrize("loss", ["bce", nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0))])
def test_binary_measurements(measurement, loss):
    """The logarithm of the odds of what each output should be."""
    case = Case("influence binary", lambda: nn.Linear(5, 2), binary)
    model, train, queries = case.model(), case.batch(N), queries_of(case)
    fitted = Explicit(REGULARIZATION, loss=loss).fit(ModelData(model, train))

    def odds(model, example):
        p = model(example[0]).sigmoid()
        right = torch.where(example[1] > 0, p, 1 - p)
        return (right / (1 - right)).log().sum()

    def summed(model, example):
        weight = None if loss == "bce" else loss.pos_weight
        function = F.binary_cross_entropy_with_logits
        losses = function(model(example[0]), *example[1:], pos_weight=weight, reduction="none")
        return losses.sum() if loss == "bce" else losses.mean()

    rows = reference.gradients(model, summed, train, N)
    of_queries = reference.gradients(model, odds, queries, QUERIES)
    expected = -of_queries @ reference.ifvp(rows, rows, REGULARIZATION).T
    data = ModelData(model, train), ModelData(model, queries)
    found = influence.pairwise_scores(fitted, *data, measurement=measurement)
    assert reference.error(found, expected) <= 1e-9


@pytest.mark.parametrize("measurement", ["logit", "log_odds", "margin"])
def test_measurements_of_a_loss_module(measurement):
    """A module's smoothing and ignored index are of the loss; the logits are the model's."""
    case = Case("influence tags", lambda: nn.Linear(5, 3), tagged())
    x, y = case.batch(N)
    y[y == -100] = 2
    model = case.model()

    def loss(outputs):
        return nn.CrossEntropyLoss(ignore_index=2, label_smoothing=0.1, reduction="sum")(*outputs)

    class ByClass(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = model

        def forward(self, x):
            return self.layer(x).movedim(-1, 1)

    module = nn.CrossEntropyLoss(ignore_index=2, label_smoothing=0.1, reduction="sum")
    wrapped = ByClass()
    train, queries = ModelData(wrapped, (x, y)), ModelData(wrapped, (x[:3], y[:3]))
    fitted = Explicit(REGULARIZATION, loss=module).fit(train)
    rows = reference.gradients(
        wrapped, lambda m, example: module(m(example[0]), example[1]), (x, y), N
    )
    of_queries = reference.gradients(
        model,
        MEASUREMENTS[measurement][1],
        (x[:3], torch.where(y[:3] == 2, -100, y[:3])),
        3,
    )
    expected = -of_queries @ reference.ifvp(rows, rows, REGULARIZATION).T
    found = influence.pairwise_scores(fitted, train, queries, measurement=measurement)
    assert reference.error(found, expected) <= 1e-9


@pytest.mark.parametrize("measurement", ["logit", "log_odds", "margin"])
def test_regression_has_no_logits(measurement):
    case = Case("influence regression", lambda: nn.Linear(5, 3), regression(3), "mse")
    for loss in ("mse", nn.MSELoss(), nn.L1Loss(), lambda m, b: (m(b[0]) - b[1]).abs().sum(1)):
        data = ModelData(case.model(), case.batch(N))
        fitted = Explicit(REGULARIZATION, loss=loss).fit(data)
        with pytest.raises(IFVPUsageError, match=rf"'{measurement}' needs the logits.*callable"):
            influence.pairwise_scores(fitted, data, data, measurement=measurement)


@pytest.mark.parametrize("measurement", ["odds", None, 3, nn.Linear(2, 2), nn.Linear])
def test_unknown_measurements(measurement):
    fitted, model = fitted_on("mlp", Explicit)
    data = data_of("mlp", model)
    with pytest.raises(IFVPUsageError, match="expected 'loss', 'logit', 'log_odds', 'margin', or"):
        influence.pairwise_scores(fitted, *data, measurement=measurement)


@pytest.mark.parametrize(
    "measurement",
    [
        lambda m, b: m(b[0]),
        lambda m, b: m(b[0]).sum(),
        lambda m, b: 1.0,
        lambda m, b: m(b[0]).argmax(1),
        # A pair was taken for losses with a mask, and its sign not turned.
        lambda m, b: (m(b[0])[:, 0], torch.ones(len(b[0]), 1)),
        lambda m, b: [m(b[0])[:, 0], None],
    ],
)
def test_measurements_of_another_shape(measurement):
    fitted, model = fitted_on("mlp", Explicit)
    data = data_of("mlp", model)
    expected = r"measurement=<lambda> returned .*; expected one number per example.*\(B,\)"
    with pytest.raises(IFVPUsageError, match=expected):
        influence.pairwise_scores(fitted, *data, measurement=measurement)


def test_a_constant_measurement():
    fitted, model = fitted_on("mlp", Explicit)
    data = data_of("mlp", model)
    with pytest.raises(IFVPUsageError, match="the values of measurement=<lambda> do not depend on"):
        influence.pairwise_scores(
            fitted, *data, measurement=lambda m, b: torch.ones(len(b[0]), dtype=torch.float64)
        )


def test_errors_of_options():
    fitted, model = fitted_on("mlp", Explicit)
    data = data_of("mlp", model)
    for normalization in ("relative", 1, np.array(["relatif", None]), np.zeros(2)):
        with pytest.raises(IFVPUsageError, match=r"normalization=.*expected None or 'relatif'"):
            influence.pairwise_scores(fitted, *data, normalization=normalization)
    with pytest.raises(IFVPUsageError, match="blocks='layers'; expected 'layer', 'parameter'"):
        influence.layer_scores(fitted, *data, blocks="layers")
    with pytest.raises(IFVPUsageError, match="matches none of the fitted parameters"):
        influence.layer_scores(fitted, *data, blocks={"a": "nothing"})
