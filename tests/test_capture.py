"""What taking per-example gradients must honour, and leave as it was."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from fimkit import Explicit, IFVPUsageError
from tests import reference
from tests.cases import BY_NAME, CASES, Apply, N, mlp, points, split
from tests.state import of_model, unchanged


def data(n=N, generator=None):
    return points()(n, generator or torch.Generator().manual_seed(0))


def exact(fitted, model, batch, *, names=None, loss=reference.negative_log_likelihood):
    """Check a fit's matrix against the definition, for a model that is not wrapped."""
    rows = reference.gradients(model, loss, batch, len(batch[-1]), names=names)
    found, expected = fitted.fisher_.to_dense(), reference.fisher(rows)
    return float((found - expected).norm() / expected.norm()) <= 1e-12


def wanted(prefixes, names):
    return [name for name in names if any(name.startswith(prefix) for prefix in prefixes)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_how_parameters_are_covered(case):
    """Every parameter has an entry; the fast way is taken where it can be, and only there."""
    fitted = Explicit(loss=case.loss).fit(case.model(), case.batches(5))
    names = list(fitted.coverage_)
    assert names == fitted.parameter_names_
    slow = ("torch.func", "one backward pass per example")
    never = wanted(("never.",), names)
    for name in wanted(case.captured, names):
        assert fitted.coverage_[name].startswith("captured"), name
    for name in wanted(case.fallback, names):
        assert fitted.coverage_[name] in slow, name
    for name in set(names) - set(never):
        seen = fitted.coverage_[name].startswith("captured") or fitted.coverage_[name] in slow
        assert seen or not case.gradients_of(name).abs().max() > 1e-12, name
    assert all(fitted.coverage_[name] == "no gradient seen" for name in never)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_leaves_model_and_random_states_alone(case):
    model = case.model()
    with unchanged(model):
        fitted = Explicit(loss=case.loss).fit(model, case.batches(5))
        fitted.transform(case.gradients)


def test_grads_are_untouched():
    """Grads of an unfinished training step stay, also where there are none."""
    model = mlp().double()
    for parameter in list(model.parameters())[::2]:
        parameter.grad = torch.randn_like(parameter)
    with unchanged(model):
        Explicit().fit(model, [data()])


def test_gradients_of_weights_are_not_computed():
    """Beyond the check of the first batch, no weight's own gradient is asked for."""
    model = mlp().double()
    counts = dict.fromkeys(model.state_dict(), 0)

    def count(name):
        counts[name] += 1

    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda gradient, name=name: count(name))
    batches = split(data(), N, 4)
    Explicit().fit(model, batches[:1])
    first = dict(counts)
    Explicit().fit(model, batches)
    assert {name: counts[name] - first[name] for name in counts} == first


def test_does_not_keep_the_model():
    model = mlp().double()
    gone = weakref.ref(model)
    fitted = Explicit().fit(model, [data()])
    del model
    gc.collect()
    assert gone() is None
    assert fitted.transform(torch.ones(fitted.n_features_in_)).isfinite().all()


@pytest.mark.parametrize(
    "activation",
    [nn.ReLU(inplace=True), nn.LeakyReLU(0.1, inplace=True), nn.Hardtanh(inplace=True)],
    ids=repr,
)
@pytest.mark.parametrize("positions", [(), (4,), (2, 3)], ids=str)
def test_in_place_activations(activation, positions, generator):
    """Outputs of layers on more than two dimensions are views, which is where this goes wrong."""
    model = nn.Sequential(nn.Linear(5, 4), activation, nn.Linear(4, 3), nn.Flatten(1)).double()
    x = torch.randn(N, *positions, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(N, model(x).shape[1], generator=generator, dtype=torch.float64)
    fitted = Explicit(loss="mse").fit(model, [(x, y)])
    assert set(fitted.coverage_.values()) == {"captured (linear)"}
    assert exact(fitted, model, (x, y), loss=reference.half_squared_error)


@pytest.mark.parametrize(
    ("frozen", "left"),
    [
        (("0.weight", "0.bias"), ("2.weight", "2.bias", "4.weight", "4.bias")),
        (("2.weight", "2.bias"), ("0.weight", "0.bias", "4.weight", "4.bias")),
        (("0.weight", "2.weight", "4.weight"), ("0.bias", "2.bias", "4.bias")),
        (("0.bias", "4.weight"), ("0.weight", "2.weight", "2.bias", "4.bias")),
    ],
    ids=lambda names: " ".join(names),
)
def test_frozen_parameters(frozen, left):
    model = mlp().double()
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    fitted = Explicit().fit(model, [data()])
    assert tuple(fitted.parameter_names_) == left
    assert exact(fitted, model, data())


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        ("2.*", ("2.weight", "2.bias")),
        (["*.bias"], ("0.bias", "2.bias", "4.bias")),
        (["4.bias", "0.weight"], ("0.weight", "4.bias")),  # in the model's order
    ],
    ids=str,
)
def test_selected_parameters(patterns, left):
    model = mlp().double()
    with unchanged(model):
        fitted = Explicit(parameters=patterns).fit(model, [data()])
    assert tuple(fitted.parameter_names_) == left
    assert exact(fitted, model, data(), names=left)


def test_shared_parameters_are_one():
    case = BY_NAME["tied language model"]
    fitted = Explicit().fit(case.model(), case.batches(5))
    assert "head.weight" not in fitted.parameter_names_
    assert fitted.parameter_names_.count("tokens.weight") == 1
    assert fitted.n_features_in_ == case.gradients.shape[1]


# -- modes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_ambient_modes(mode):
    model = mlp().double()
    expected = Explicit().fit(model, [data()])
    with mode():
        batch = data()  # under inference_mode, tensors that autograd refuses to save
        with unchanged(model):
            fitted = Explicit().fit(model, [batch])
        found = fitted.transform(torch.ones(fitted.n_features_in_, dtype=torch.float64))
    ones = torch.ones(fitted.n_features_in_, dtype=torch.float64)
    assert torch.equal(found, expected.transform(ones))
    assert exact(fitted, model, data())


def test_ambient_autocast():
    """The model runs in the precision that is in force, statistics and solutions in their own."""
    model = mlp()
    x, y = data()
    rows = reference.gradients(
        copy.deepcopy(model).double(), reference.negative_log_likelihood, (x, y), N
    )
    vectors = rows.float()
    with torch.autocast("cpu", torch.bfloat16), unchanged(model):
        fitted = Explicit().fit(model, [(x.float(), y)])
        found = fitted.transform(vectors)
    assert torch.equal(found, fitted.transform(vectors))
    expected = reference.fisher(rows)
    distance = float((fitted.fisher_.to_dense() - expected).norm() / expected.norm())
    assert 1e-5 < distance < 0.1, "rounded as bfloat16 rounds"


def test_evaluation_mode_with_every_flag_restored():
    """Dropout does nothing, batch norm uses and keeps its statistics, flags differ by module."""
    model = nn.Sequential(
        nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.9), nn.Sequential(nn.Dropout(0.9)),
        nn.Linear(6, 3),
    ).double()  # fmt: skip
    model(data()[0])  # moves the running statistics away from their start
    model.train()
    model[1].eval()
    model[3].eval()
    model[3][0].train()
    with unchanged(model):
        fitted = Explicit().fit(model, split(data(), N, 5))
    assert exact(fitted, model, data())


class Failing(nn.Module):
    def forward(self, x):
        raise RuntimeError("the model's own error")


@pytest.mark.parametrize("where", ["forward", "loss", "loader", "backward"])
def test_restores_everything_when_something_raises(where):
    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("the model's own error")

    def batches():
        yield data()
        raise RuntimeError("the model's own error")

    def loss(model, batch):
        model(batch[0])
        raise RuntimeError("the model's own error")

    model = mlp().double()
    if where == "forward":
        model.append(Failing())
    if where == "backward":
        model = Apply(lambda self, x: Backward.apply(self.inner(x)), inner=model)
    next(model.children()).train(False)
    estimator = Explicit(loss=loss if where == "loss" else "cross_entropy")
    loader = batches() if where == "loader" else [data()]
    with unchanged(model), pytest.raises(RuntimeError, match="the model's own error"):
        estimator.fit(model, loader)
    assert not hasattr(estimator, "fisher_")


def test_random_states_with_a_shuffling_loader():
    """A loader that shuffles draws from torch's generator, which is put back."""
    loader = DataLoader(TensorDataset(*data()), batch_size=5, shuffle=True)
    model = mlp().double()
    with unchanged(model):
        fitted = Explicit().fit(model, loader)
    assert exact(fitted, model, data())


def test_hooks_of_the_user_stay_and_take_effect():
    model = mlp().double()
    model[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    model[2].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    with unchanged(model):
        fitted = Explicit().fit(model, [data()])
    assert exact(fitted, model, data())


# -- wrapped models --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["whole", "in place", "a layer", "called before"])
def test_compiled_models(how):
    plain = mlp().double()
    model = copy.deepcopy(plain)
    if how == "in place":
        model.compile(backend="eager")
    elif how == "a layer":
        model[0] = torch.compile(model[0], backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    if how == "called before":
        F.cross_entropy(model(data()[0]), data()[1]).backward()
    before = of_model(model)
    fitted = Explicit().fit(model, split(data(), N, 5))
    assert of_model(model) == before
    if how != "a layer":
        assert fitted.parameter_names_ == [name for name, _ in plain.named_parameters()]
    assert set(fitted.coverage_.values()) == {"captured (linear)"}
    assert exact(fitted, plain, data())
    assert torch.allclose(model(data()[0]), plain(data()[0]))
    torch.compiler.reset()


def test_data_parallel():
    model = mlp().double()
    wrapped = nn.DataParallel(model)
    with unchanged(wrapped):
        fitted = Explicit().fit(wrapped, [data()])
    assert fitted.parameter_names_ == [name for name, _ in model.named_parameters()]
    assert exact(fitted, model, data())


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel():
    model = mlp().double()
    wrapped = nn.parallel.DistributedDataParallel(model)
    F.cross_entropy(wrapped(data()[0]), data()[1]).backward()
    with unchanged(model):
        fitted = Explicit().fit(wrapped, split(data(), N, 5))
    assert fitted.parameter_names_ == [name for name, _ in model.named_parameters()]
    assert exact(fitted, model, data())


# -- checkpoints -----------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, body, *, reentrant, twice=False):
        super().__init__()
        self.body = body
        self.head = nn.Linear(3, 3)
        self.reentrant = reentrant
        self.twice = twice

    def forward(self, x):
        x = x.requires_grad_(self.reentrant)
        h = checkpoint(self.body, x, use_reentrant=self.reentrant)
        if self.twice:
            h = h + checkpoint(self.body, 2 * x, use_reentrant=self.reentrant)
        return self.head(h)


@pytest.mark.parametrize("twice", [False, True])
def test_checkpoints_do_not_count_twice(twice):
    """Layers in a checkpoint run again during the backward pass, when nothing is captured."""
    model = Checkpointed(mlp(), reentrant=False, twice=twice).double()
    with unchanged(model):
        fitted = Explicit().fit(model, split(data(), N, 5))
    assert set(fitted.coverage_.values()) == {"captured (linear)"}
    assert exact(fitted, model, data())


def test_reentrant_checkpoints_are_refused_by_name():
    model = Checkpointed(mlp(), reentrant=True).double()
    message = r"reentrant activation checkpointing around body\.0\.bias.*use_reentrant=False"
    with unchanged(model), pytest.raises(IFVPUsageError, match=message):
        Explicit().fit(model, [data()])


# -- precision -------------------------------------------------------------------------------------


class InFloat32(nn.Module):
    """A norm that computes in float32 whatever its input, as many language models have it."""

    def forward(self, x):
        h = x.float()
        return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


@pytest.mark.parametrize("last", [False, True], ids=["inside", "at the end"])
def test_models_that_compute_in_less_than_their_parameters(last):
    """Their rounding is no disagreement of gradients, whichever dtype parameters have."""
    layers = [nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)]
    layers.insert(3 if last else 1, InFloat32())
    model = nn.Sequential(*layers).double()
    fitted = Explicit().fit(model, split(data(), N, 5))
    assert set(fitted.coverage_.values()) == {"captured (linear)"}
    rows = reference.gradients(model, reference.negative_log_likelihood, data(), N)
    expected = reference.fisher(rows)
    assert float((fitted.fisher_.to_dense() - expected).norm() / expected.norm()) <= 1e-6


@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("fails", [False, True])
def test_tables_that_bound_norms_are_left_alone(layer, fails):
    """PyTorch scales down in place the rows that are looked up."""
    model = nn.Sequential(layer(7, 5, max_norm=0.5), nn.Flatten(), nn.Linear(5, 3)).double()
    x, y = torch.arange(N)[:, None] % 6, torch.arange(N) % 3
    before = model[0].weight.detach().clone()
    assert (before.norm(dim=1) > 0.5).all()
    batches = split((x, y), N, 5)
    if fails:
        with pytest.raises(IFVPUsageError, match="targets"):
            Explicit().fit(model, [*batches, (x, torch.full((N,), 3))])
    else:
        fitted = Explicit().fit(model, batches)
    assert torch.equal(model[0].weight, before)
    if not fails:
        assert exact(fitted, model, (x, y))
