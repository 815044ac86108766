"""Losses per example, and how models and batches come together."""

from collections import UserDict, namedtuple
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fimkit import Explicit, IFVPUsageError, losses
from tests import reference
from tests.cases import Apply, mlp, points, split

N = 9


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def randint(high, *shape):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(0))


def distance(fitted, model, example_loss, batch, n=N):
    """Return the distance of a fit's matrix from the definition, relative to its size."""
    expected = reference.fisher(reference.gradients(model, example_loss, batch, n))
    return float((fitted.fisher_.to_dense() - expected).norm() / expected.norm())


class Shaped(nn.Module):
    """A linear layer whose outputs have a given shape for each example."""

    def __init__(self, *shape):
        super().__init__()
        self.shape = shape
        self.layer = nn.Linear(5, torch.Size(shape).numel())

    def forward(self, x):
        return self.layer(x).view(-1, *self.shape)


# -- cross-entropy ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outputs", "targets", "example_loss"),
    [
        ((3,), (), reference.negative_log_likelihood),
        ((4, 3), (4,), reference.negative_log_likelihood),
        ((3, 4), (4,), reference.negative_log_likelihood_of_maps),
        ((3, 2, 4), (2, 4), reference.negative_log_likelihood_of_maps),
        ((2, 4, 3), (2, 4), reference.negative_log_likelihood),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_cross_entropy(outputs, targets, example_loss, dtype):
    """Classes along dimension 1 or the last; tokens are summed, never averaged."""
    model = Shaped(*outputs).double()
    batch = randn(N, 5), randint(3, N, *targets)
    fitted = Explicit().fit(model, split((batch[0], batch[1].to(dtype)), N, 4))
    assert distance(fitted, model, example_loss, batch) <= 1e-12


def test_ignored_targets_do_not_count():
    model = Shaped(4, 3).double()
    x, y = randn(N, 5), randint(3, N, 4)
    y[::2, 1:] = -100
    y[1] = -100  # an example of which nothing counts has no gradient, but is an example
    fitted = Explicit().fit(model, split((x, y), N, 4))
    assert fitted.n_samples_seen_ == N
    assert distance(fitted, model, lossless_when_empty, (x, y)) <= 1e-12


def lossless_when_empty(model, example):
    if (example[1] == -100).all():
        return 0 * model(example[0]).sum()
    return reference.negative_log_likelihood(model, example)


# -- squared error ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outputs", "targets"),
    [((3,), (3,)), ((1,), (1,)), ((1,), ()), ((), ()), ((), (1,)), ((2, 3), (2, 3))],
    ids=str,
)
def test_squared_error_is_half_the_sum(outputs, targets):
    model = Shaped(*outputs).double()
    batch = randn(N, 5), randn(N, *targets, seed=1)
    fitted = Explicit(loss="mse").fit(model, split(batch, N, 4))
    assert distance(fitted, model, reference.half_squared_error, batch) <= 1e-12


def test_squared_error_of_integer_targets():
    model = Shaped(2).double()
    batch = randn(N, 5), randint(4, N, 2)
    fitted = Explicit(loss="mse").fit(model, [batch])
    assert distance(fitted, model, reference.half_squared_error, batch) <= 1e-12


def test_binary_cross_entropy():
    def example_loss(model, example):
        x, y = example
        p = model(x).sigmoid()
        return -(y * p.log() + (1 - y) * (1 - p).log()).sum()

    model = Shaped(3).double()
    batch = randn(N, 5), randint(2, N, 3).double()
    fitted = Explicit(loss="bce").fit(model, split(batch, N, 4))
    assert distance(fitted, model, example_loss, batch) <= 1e-12


# -- modules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "outputs", "targets"),
    [
        (nn.CrossEntropyLoss(), (3,), randint(3, N)),
        (nn.CrossEntropyLoss(), (3, 4), randint(3, N, 4)),
        (nn.CrossEntropyLoss(label_smoothing=0.1), (3,), randint(3, N)),
        (nn.CrossEntropyLoss(reduction="sum", ignore_index=1), (3, 4), randint(3, N, 4)),
        (nn.MSELoss(), (4,), randn(N, 4, seed=1)),
        (nn.MSELoss(reduction="sum"), (2, 2), randn(N, 2, 2, seed=1)),
        (nn.BCEWithLogitsLoss(), (4,), randint(2, N, 4).double()),
        (nn.HuberLoss(delta=0.5), (4,), randn(N, 4, seed=1)),
        (nn.PoissonNLLLoss(), (4,), randint(5, N, 4).double()),
    ],
    ids=lambda value: str(value) if isinstance(value, nn.Module) else "",
)
def test_modules_are_taken_literally(module, outputs, targets):
    """The module's own value on each example alone, means and all."""
    model = Shaped(*outputs).double()
    batch = randn(N, 5), targets

    def example_loss(model, example):
        return module(model(example[0]), example[1])

    fitted = Explicit(loss=module).fit(model, split(batch, N, 4))
    assert distance(fitted, model, example_loss, batch) <= 1e-12


# -- callables -------------------------------------------------------------------------------------


def smooth_losses(model, batch):
    x, y = batch
    return F.huber_loss(model(x), y, reduction="none", delta=0.5).sum(1)


def masked_losses(model, batch):
    """Losses of padded sequences, with the mask of the positions that count."""
    x, y = batch
    mask = y != -100
    token_losses = F.cross_entropy(model(x).movedim(-1, 1), y, reduction="none")
    return (token_losses * mask).sum(1), mask


def test_callable():
    model = Shaped(3).double()
    batch = randn(N, 5), randn(N, 3, seed=1)
    fitted = Explicit(loss=smooth_losses).fit(model, split(batch, N, 4))
    assert distance(fitted, model, smooth_losses, batch) <= 1e-12


def test_callable_with_a_mask():
    """The mask is for methods that average over positions; the gradients are the losses' own."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = randn(N, 4, 5), randint(3, N, 4)
    y[::2, 2:] = -100
    fitted = Explicit(loss=masked_losses).fit(model, split((x, y), N, 4))
    assert distance(fitted, model, reference.negative_log_likelihood, (x, y)) <= 1e-12


@pytest.mark.parametrize("pair", [lambda losses, mask: (losses, None), lambda *both: [*both]])
def test_callable_with_a_mask_or_none_in_any_sequence(pair):
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(N, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch = x, torch.arange(N) % 3

    def loss(model, batch):
        losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return pair(losses, torch.ones(len(losses), 1))

    fitted = Explicit(loss=loss).fit(model, [batch]).fisher_.to_dense()
    torch.testing.assert_close(fitted, Explicit().fit(model, [batch]).fisher_.to_dense())


def test_callable_that_calls_parts_of_the_model():
    """A loss may run the model twice, or reach into it; all that it uses is seen."""

    def loss(model, batch):
        x, y = batch
        penalty = model[0](x).square().mean(1) + model(-x).logsumexp(1)
        return F.cross_entropy(model(x), y, reduction="none") + 0.1 * penalty

    model = mlp().double()
    batch = points()(N, torch.Generator().manual_seed(0))
    fitted = Explicit(loss=loss).fit(model, split(batch, N, 4))
    assert distance(fitted, model, loss, batch) <= 1e-12
    assert set(fitted.coverage_.values()) == {"captured (linear)"}


@pytest.mark.parametrize(
    "batch",
    [
        (randn(1, 5), randint(3, 1)),
        (randn(1, 7, 5), randint(3, 1, 7)),  # of one sequence
        (randn(7, 1, 5), randint(3, 7, 1)),  # positions first
        (randn(7, 5), torch.tensor(2)),  # one example of several parts
        (randn(7, 5), randn(2, 4)),  # a graph, with its edges
    ],
    ids=["rows", "sequence", "positions first", "parts", "graph"],
)
def test_one_loss_of_one_example(batch):
    def loss(model, batch):
        return model(batch[0]).square().sum()[None]

    fitted = Explicit(loss=loss).fit(Shaped(3).double(), [batch] * 2)
    assert fitted.n_samples_seen_ == 2


class FourthPower(losses.Loss):
    """A loss of one's own, with an unusual batch."""

    def outputs(self, model, batch):
        return model(batch["x"])

    def targets(self, batch):
        return batch["y"]

    def losses(self, outputs, targets):
        return (outputs - targets).pow(4).sum(1)


def test_loss_class():
    model = Shaped(3).double()
    batch = {"x": randn(N, 5), "y": randn(N, 3, seed=1)}
    fitted = Explicit(loss=FourthPower()).fit(model, split(batch, N, 4))

    def example_loss(model, example):
        return (model(example["x"]) - example["y"]).pow(4).sum()

    assert distance(fitted, model, example_loss, batch) <= 1e-12


# -- batches and outputs ---------------------------------------------------------------------------

Pair = namedtuple("Pair", "x y")


class Outputs(nn.Module):
    """A model of keyword arguments whose output holds the logits."""

    def __init__(self, wrap):
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.wrap = wrap

    def forward(self, x, scale=None, labels=None):
        assert labels is None
        return self.wrap(self.layer(x if scale is None else x * scale[:, None]))


def unwrapped(model, example):
    """The likelihood of the layer inside `Outputs`."""
    if not isinstance(example, dict):
        x, scale, y = example if len(example) == 3 else (example[0], None, example[1])
    else:
        x, scale, y = example["x"], example.get("scale"), example["labels"]
    x = x if scale is None else x * scale[:, None]
    return reference.negative_log_likelihood(model.layer, (x, y))


@pytest.mark.parametrize(
    "container",
    [
        lambda x, s, y: (x, y),
        lambda x, s, y: [x, y],
        lambda x, s, y: (x, s, y),
        lambda x, s, y: Pair(x, y),
        lambda x, s, y: {"x": x, "labels": y},
        lambda x, s, y: {"labels": y, "scale": s, "x": x},
        lambda x, s, y: UserDict(x=x, labels=y),
    ],
    ids=["tuple", "list", "two inputs", "named tuple", "dict", "dict of two inputs", "mapping"],
)
def test_batches(container):
    batch = container(randn(N, 5), randn(N, seed=1), randint(3, N))
    model = Outputs(lambda logits: logits).double()
    fitted = Explicit().fit(model, [batch])
    plain = dict(batch) if isinstance(batch, UserDict) else batch
    plain = tuple(batch) if isinstance(batch, Pair) else plain
    assert distance(fitted, model, unwrapped, plain) <= 1e-12


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: SimpleNamespace(logits=logits, loss=None),
        lambda logits: {"logits": logits, "loss": None},
    ],
    ids=["attribute", "key"],
)
@pytest.mark.parametrize("as_dict", [True, False])
def test_logits_are_found_in_outputs(wrap, as_dict):
    model = Outputs(wrap).double()
    x, y = randn(N, 5), randint(3, N)
    batch = {"x": x, "labels": y} if as_dict else (x, y)
    assert distance(Explicit().fit(model, [batch]), model, unwrapped, batch) <= 1e-12


# -- where the classes are -------------------------------------------------------------------------


class Tagger(nn.Module):
    """Three classes at every position, by layers that see all positions."""

    def __init__(self, finish):
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.finish = finish

    def forward(self, x):
        return self.finish(self.layer(x.cumsum(1)))


def named(logits):
    return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("fisher", ["empirical", "exact", "predicted"])
@pytest.mark.parametrize("first", [3, 4])
def test_as_many_positions_as_classes(first, fisher):
    """Logits of output objects have the classes last, whatever the sizes of a batch."""
    batches = [
        (randn(4, length, 5, seed=length), randint(3, 4, length)) for length in (first, 7 - first)
    ]
    model = Tagger(named).double()
    rows = []
    for x, y in batches:
        for example, labels in zip(x, y, strict=True):
            logs = model(example[None]).logits[0].log_softmax(1)
            if fisher == "exact":
                rows += [(logs[t, c], logs[t, c].exp()) for t in range(len(logs)) for c in range(3)]
            else:
                best = logs.argmax(1) if fisher == "predicted" else labels
                rows += [(logs.gather(1, best[:, None]).sum(), torch.ones(()))]
    expected = 0
    for row, weight in rows:
        grads = torch.autograd.grad(row, list(model.parameters()), retain_graph=True)
        vector = torch.cat([grad.flatten() for grad in grads])
        expected = expected + weight.detach() * vector.outer(vector) / 8
    found = Explicit(fisher=fisher).fit(model, batches).fisher_.to_dense()
    assert float((found - expected).norm() / expected.norm()) <= 1e-12


@pytest.mark.parametrize("length", [3, 4])
def test_classes_that_are_not_where_a_loss_looks(length):
    """Refused for every length, not only where the shapes happen not to fit."""
    batch = randn(N, length, 5), randint(3, N, length)
    second = Tagger(lambda out: named(out.movedim(-1, 1))).double()
    if length != 3:  # else they are like any that have the classes last
        with pytest.raises(IFVPUsageError, match=r"\.logits .* classes last.*return the tensor"):
            Explicit().fit(second, [batch])
    for module in (nn.CrossEntropyLoss(reduction="sum"), nn.CrossEntropyLoss()):
        with pytest.raises(
            IFVPUsageError, match=r"classes along dimension 1, and \.logits.*'causal_lm'.*'cross_e"
        ):
            Explicit(loss=module).fit(Tagger(named).double(), [batch])


def test_both_remedies_where_classes_cannot_be_told():
    batch = randn(N, 3, 5), randint(3, N, 3)
    with pytest.raises(IFVPUsageError, match=r"sum'\).*out\.movedim\(-1, 1\).*with \.logits"):
        Explicit().fit(Tagger(lambda out: out).double(), [batch])
    model, moved = Tagger(named).double(), Tagger(lambda out: out.movedim(-1, 1)).double()
    moved.load_state_dict(model.state_dict())
    loss = nn.CrossEntropyLoss(reduction="sum")
    one = Explicit().fit(model, [batch]).fisher_.to_dense()
    other = Explicit(loss=loss).fit(moved, [batch]).fisher_.to_dense()
    assert float((one - other).norm()) <= 1e-12 * float(one.norm())


# -- other kinds of Fisher -------------------------------------------------------------------------


def class_rows(model, x):
    """Return gradients of minus the log-probability of every class, ``(n, C, p)``, and p."""
    rows, weights = [], []
    for example in x:
        logs = model(example[None])[0].log_softmax(0)
        grads = [
            torch.autograd.grad(-log, list(model.parameters()), retain_graph=True) for log in logs
        ]
        rows.append(torch.stack([torch.cat([g.flatten() for g in grad]) for grad in grads]))
        weights.append(logs.detach().exp())
    return torch.stack(rows), torch.stack(weights)


def exact_fisher(model, x):
    rows, weights = class_rows(model, x)
    return torch.einsum("nc,ncp,ncq->pq", weights, rows, rows) / len(x)


class TestKinds:
    @pytest.fixture
    def model(self):
        return mlp(features=5).double()

    @pytest.fixture
    def batch(self):
        return points()(N, torch.Generator().manual_seed(0))

    @pytest.mark.parametrize("solver", ["primal", "dual"])
    def test_exact(self, model, batch, solver):
        expected = exact_fisher(model, batch[0])
        fitted = Explicit(1e-3, fisher="exact", solver=solver).fit(model, split(batch, N, 4))
        found = fitted.fisher_.to_dense()
        assert float((found - expected).norm() / expected.norm()) <= 1e-12
        rows, _ = class_rows(model, batch[0])
        vectors = rows[:, 0]
        damped = expected + 1e-3 * torch.eye(len(expected), dtype=torch.float64)
        ifvp = torch.linalg.solve(damped, vectors.T).T
        assert reference.error(fitted.transform(vectors), ifvp) <= 1e-9

    @pytest.mark.parametrize("solver", ["primal", "dual"])
    def test_exact_of_sequences_of_several_lengths(self, solver):
        """Rows per token and class, of which batches have different numbers.

        A layer that only short sequences meet has fewer rows still.
        """

        def forward(self, x):
            h = self.layer(x)
            return h + self.short(x).tanh() if x.shape[1] < 3 else h

        model = Apply(forward, layer=nn.Linear(5, 3), short=nn.Linear(5, 3)).double()
        batches = [(randn(2, t, 5, seed=t), randint(3, 2, t)) for t in (2, 4, 1)]
        expected = 0
        for x, _ in batches:
            for example in x:
                for log in model(example[None])[0].log_softmax(-1).flatten():
                    grads = torch.autograd.grad(
                        log, list(model.parameters()), retain_graph=True, materialize_grads=True
                    )
                    row = torch.cat([grad.flatten() for grad in grads])
                    expected = expected + log.detach().exp() * torch.outer(row, row) / 6
        fitted = Explicit(fisher="exact", solver=solver).fit(model, batches)
        found = fitted.fisher_.to_dense()
        assert float((found - expected).norm() / expected.norm()) <= 1e-12

    def test_exact_of_regression(self, model, batch):
        jacobian = torch.stack(
            [
                torch.cat([g.flatten() for g in torch.autograd.grad(out, list(model.parameters()))])
                for x in batch[0]
                for out in (model(x[None])[0, c] for c in range(3))
            ]
        )
        fitted = Explicit(fisher="exact", loss="mse").fit(model, [(batch[0], randn(N, 3))])
        expected = jacobian.T @ jacobian / N
        assert float((fitted.fisher_.to_dense() - expected).norm() / expected.norm()) <= 1e-12

    def test_predicted(self, model, batch):
        targets = model(batch[0]).argmax(1)
        fitted = Explicit(fisher="predicted").fit(model, split(batch, N, 4))
        at_predictions = batch[0], targets
        loss = reference.negative_log_likelihood
        assert distance(fitted, model, loss, at_predictions) <= 1e-12

    def test_sampled_labels_belong_to_examples(self, model, batch):
        """Neither batch size nor the loader's order changes what an example draws."""
        dataset = TensorDataset(*batch)
        settings = {"fisher": "mc", "random_state": 3, "n_mc_samples": 2}
        fits = [
            Explicit(**settings).fit(model, loader).fisher_.to_dense()
            for loader in (
                DataLoader(dataset, N),
                DataLoader(dataset, 4),
                DataLoader(dataset, 2, shuffle=True),
            )
        ]
        assert float((fits[0] - fits[1]).norm()) <= 1e-12 * float(fits[0].norm())
        assert float((fits[0] - fits[2]).norm()) <= 1e-12 * float(fits[0].norm())
        other = Explicit(**{**settings, "random_state": 4}).fit(model, [batch])
        assert float((fits[0] - other.fisher_.to_dense()).norm()) > 1e-3 * float(fits[0].norm())

    def test_mean_over_samples_tends_to_the_exact(self, model, batch):
        """The mean over samples: the loss is not divided by their number."""
        expected = exact_fisher(model, batch[0])
        errors = {}
        for samples in (1, 100):
            fitted = Explicit(fisher="mc", n_mc_samples=samples, random_state=0)
            found = fitted.fit(model, [batch]).fisher_.to_dense()
            errors[samples] = float((found - expected).norm() / expected.norm())
        assert errors[100] <= 0.1 < errors[1]

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"loss": "mse", "fisher": "predicted"}, "zero for loss='mse'"),
            ({"loss": smooth_losses, "fisher": "mc"}, "smooth_losses does not give"),
            ({"loss": nn.HuberLoss(), "fisher": "exact"}, r"HuberLoss\(\) is not"),
            (
                {"loss": nn.CrossEntropyLoss(label_smoothing=0.1), "fisher": "mc"},
                "with label_smoothing is not",
            ),
            (
                {"loss": nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)), "fisher": "exact"},
                "with pos_weight is not",
            ),
        ],
        ids=["mse", "callable", "HuberLoss", "label smoothing", "pos_weight"],
    )
    def test_what_is_no_likelihood_is_refused(self, model, settings, message):
        batch = randn(N, 5), randn(N, 3).sigmoid()
        if isinstance(settings["loss"], nn.CrossEntropyLoss):
            batch = randn(N, 5), randint(3, N)
        with pytest.raises(IFVPUsageError, match=message):
            Explicit(**settings).fit(model, [batch])


def test_exact_rows_have_a_limit():
    model = Apply(lambda self, x: self.layer(x).repeat(1, 1500), layer=nn.Linear(5, 3)).double()
    with pytest.raises(IFVPUsageError, match=r"4500 rows.*use fisher='mc'"):
        Explicit(fisher="exact").fit(model, [(randn(2, 5), randint(3, 2))])
