"""Bad input is refused by name, and leaves estimator and model as they were."""

import copy
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.utils._param_validation import InvalidParameterError
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

from fimkit import (
    EKFAC,
    KFAC,
    DataInf,
    Diagonal,
    Explicit,
    IFVPUsageError,
    ModelData,
    SingularFisherError,
)
from fimkit.losses import Loss
from tests.cases import Apply, mlp, points, split
from tests.state import unchanged

N = 6


def batch():
    return points()(N, torch.Generator().manual_seed(0))


def model():
    torch.manual_seed(0)
    return mlp().double()


def spoiled(value, where=4):
    """Return batches of two with one bad number."""
    x, y = batch()
    x[where, 1] = value
    return split((x, y), N, 2)


def exhausted():
    batches = iter(split(batch(), N, 2))
    assert list(batches)
    return batches


def frozen():
    return model().requires_grad_(False)


def with_layer(layer):
    return nn.Sequential(nn.Linear(5, 4), layer, nn.Linear(4, 3)).double()


def of_outputs(function):
    """Return a model whose outputs are changed by a function."""
    return Apply(lambda self, x: function(self.inner(x)), inner=model())


def made_in_inference():
    with torch.inference_mode():
        return model()


def hooked():
    network = model()
    network[0].weight.register_hook(lambda gradient: gradient * 2)
    return network


def dropping():
    """Return a loader that leaves out an example of each batch."""
    items = TensorDataset(*batch())
    return DataLoader(
        items, batch_size=3, collate_fn=lambda examples: default_collate(examples[1:])
    )


def of_targets(function):
    x, y = batch()
    return [(x, function(y))]


def scalar_loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def column_loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")[:, None]


def one_loss(model, batch):
    return scalar_loss(model, batch)[None]


def of_outputs_and_targets(outputs, targets):
    return (outputs - targets).square().sum(1)


def losses_of_tokens(model, batch):
    """One loss per position, of two positions per example."""
    return nn.functional.cross_entropy(
        model(batch[0]).repeat_interleave(2, 0), batch[1].repeat_interleave(2), reduction="none"
    )


def number_loss(model, batch):
    return 1.0


def detached_loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none").detach()


def infinite_loss(model, batch):
    return (model(batch[0])[:, 0] * 0).log()


# What is given to the estimator and to its fit, by name, and the message that answers it.
FAILURES = {
    # data
    "no data": ({}, lambda: (model(),), r"fit\(model\) has no data; call fit\(model, dataloader\)"),
    "no batches": ({}, lambda: (model(), []), "no batches; give at least one example"),
    "an empty loader": (
        {},
        lambda: (model(), DataLoader(TensorDataset(torch.ones(0, 5), torch.ones(0)))),
        "no batches; give at least one example",
    ),
    "no examples of a ModelData": (
        {},
        lambda: (ModelData(model(), batch())[:0],),
        "select none of the 6 of its dataset; select at least one",
    ),
    "an exhausted iterator": ({}, lambda: (model(), exhausted()), "iterated over before is empty"),
    "a batch without examples": (
        {},
        lambda: (model(), [batch(), (torch.ones(0, 5).double(), torch.ones(0).long())]),
        "batch 1: it has no examples",
    ),
    "a dataset": (
        {},
        lambda: (model(), TensorDataset(*batch())),
        r"dataloader is a dataset \(TensorDataset\); give a DataLoader",
    ),
    "a single batch": ({}, lambda: (model(), batch()), r"single batch;.*such as \[\(x, y\)\]"),
    "a tensor": ({}, lambda: (model(), batch()[0]), "dataloader is a single batch"),
    "an array": ({}, lambda: (model(), batch()[0].numpy()), "dataloader is a single batch"),
    "a string": ({}, lambda: (model(), "loader"), "dataloader is str; give a DataLoader"),
    "a mapping": (
        {},
        lambda: (model(), {"x": batch()[0], "labels": batch()[1]}),
        "dataloader is dict; give a DataLoader",
    ),
    "a number": ({}, lambda: (model(), 3), "dataloader is int; give a DataLoader"),
    "a generator function": (
        {},
        lambda: (model(), lambda: iter([batch()])),
        "dataloader is function; give a DataLoader",
    ),
    "a class of loaders": ({}, lambda: (model(), DataLoader), "is the class DataLoader; give a"),
    "numbers for batches": (
        {},
        lambda: (model(), [1, 2]),
        r"batch 0: a batch must be a tuple or list \(\*inputs, targets\).*got int",
    ),
    "examples for batches": (
        {},
        lambda: (model(), TensorDataset(*batch())[0]),
        "dataloader is a single batch",
    ),
    "a list of examples": (
        {},
        lambda: (model(), list(TensorDataset(*batch()))),
        r"batch 0: .* outputs of shape \(3,\) and targets of shape \(\); expected outputs \(B, C.*"
        r"looks like a single example.*DataLoader\(dataset, batch_size",
    ),
    "examples with a number for a target": (
        {},
        lambda: (model(), [(batch()[0][0], 1)]),
        "needs integer class targets; got int.*looks like a single example",
    ),
    **{
        f"{n} examples not collated": (
            {},
            lambda n=n: (model(), DataLoader(TensorDataset(*batch()), n, collate_fn=list)),
            r"batch 0: Sequential was called with \(input=\(float64 \(5,\), int64 \(\)\).*raised "
            f"TypeError.*looks like a list of {n} examples.*own collate_fn",
        )
        for n in (2, 6)
    },
    "lists of numbers, collated": (
        {},
        lambda: (
            Apply(lambda self, x: self.inner(x.double()), inner=model()),
            DataLoader([{"x": x.tolist(), "labels": 1} for x in batch()[0]], 3),
        ),
        r"x=\[float64 \(3,\), .*AttributeError.*has a list where a tensor is expected.*set_format",
    ),
    "labels that are lists of numbers, collated": (
        {"loss": "causal_lm"},
        lambda: (model(), DataLoader([{"x": 1, "labels": [1] * 9}] * 4, 2)),
        r"needs labels that are token ids.* and 6 more.*has a list where a tensor is expected",
    ),
    "a tuple of inputs, targets and indices": (
        {},
        lambda: (model(), [(*batch(), torch.arange(N))]),
        r"Sequential was called with \(input=float64 \(6, 5\), int64 \(6,\)\), for a batch .*takes "
        r"\(input\)\. All elements of a tuple but the last.*such as indices",
    ),
    "keys that the model does not take": (
        {},
        lambda: (model(), [{"x": batch()[0], "labels": batch()[1]}]),
        r"called with \(x=float64 \(6, 5\)\).*takes \(input\)\. The items of a mapping.*rename",
    ),
    "inputs in another order": (
        {},
        lambda: (
            Apply(lambda self, x, cache: cache.size_of(self.inner(x)), inner=model()),
            [(batch()[0], batch()[0], batch()[1])],
        ),
        r"AttributeError: .*size_of.*takes \(.*\), in this order\. Give a mapping with these names",
    ),
    "targets beside inputs": (
        {},
        lambda: (model(), *batch()),
        r"fit\(model, dataloader\) got 1 more.*DataLoader\(TensorDataset\(x, y\).*ModelData\(model",
    ),
    # the model
    "arguments swapped": (
        {},
        lambda: ([batch()], model()),
        r"model must be a torch\.nn\.Module.*got list \(the arguments look swapped\)",
    ),
    "no model": ({}, lambda: (None, [batch()]), "got NoneType"),
    "a class": ({}, lambda: (nn.Linear, [batch()]), "got the class Linear"),
    "nothing trainable": (
        {},
        lambda: (frozen(), [batch()]),
        r"no trainable parameters \(6 in all, none with requires_grad\)",
    ),
    "no parameters": ({}, lambda: (nn.ReLU(), [batch()]), r"no trainable parameters \(0 in all"),
    "data twice": (
        {},
        lambda: (ModelData(model(), batch()), DataLoader(TensorDataset(*batch()))),
        "a ModelData brings its own data, and a DataLoader was given beside it",
    ),
    "batch norm without statistics": (
        {},
        lambda: (with_layer(nn.BatchNorm1d(4, track_running_stats=False)), [batch()]),
        r"layer '1' \(BatchNorm1d\) has no running statistics.*track_running_stats=True",
    ),
    "a model of inference mode": (
        {},
        lambda: (made_in_inference(), [batch()]),
        r"parameter '0\.weight' was made under torch\.inference_mode",
    ),
    "a gradient hook": (
        {},
        lambda: (hooked(), [batch()]),
        r"do not add up to autograd's gradient for '0\.weight'.*a hook on the parameter",
    ),
    "inputs changed in place": (
        {},
        lambda: (Apply(lambda self, x: self.inner(x.sub_(0.5)), inner=model()), [batch()]),
        "batch 0: the model or the loss changes its inputs in place",
    ),
    "examples that collation drops": (
        {"fisher": "mc", "random_state": 0},
        lambda: (model(), dropping()),
        "batch 0: the loader drew 3 examples and the batch holds 2",
    ),
    # parameters
    "an unknown name": (
        {"parameters": ["0.weight", "0.wieght"]},
        lambda: (model(), [batch()]),
        r"parameters: '0\.wieght' matches none of '0\.weight', '0\.bias'",
    ),
    "an unknown pattern": (
        {"parameters": "head.*"},
        lambda: (model(), [batch()]),
        r"parameters: 'head\.\*' matches none of",
    ),
    "a frozen name": (
        {"parameters": "0.*"},
        lambda: (nn.Sequential(nn.Linear(5, 3).requires_grad_(False), nn.Linear(3, 3)), [batch()]),
        r"matches only frozen parameters \('0\.weight', …\); call requires_grad_\(\)",
    ),
    "no names": (
        {"parameters": []},
        lambda: (model(), [batch()]),
        "parameters is empty; give at least one name",
    ),
    "numbers for names": (
        {"parameters": [3]},
        lambda: (model(), [batch()]),
        "parameters holds a int; expected names of parameters",
    ),
    "parameters for names": (
        {"parameters": list(mlp().parameters())},
        lambda: (model(), [batch()]),
        "parameters holds a Parameter; expected names of parameters, as model.named_parameters",
    ),
    "a number for names": (
        {"parameters": 3},
        lambda: (model(), [batch()]),
        "'parameters' parameter of Explicit must be.*3",
    ),
    # numbers
    "NaN inputs": ({}, lambda: (model(), spoiled(torch.nan)), "batch 2: NaN or infinite"),
    "infinite inputs": ({}, lambda: (model(), spoiled(torch.inf, 0)), "batch 0: NaN or inf"),
    "an infinite loss": (
        {"loss": infinite_loss},
        lambda: (model(), [batch()]),
        "batch 0: NaN or infinite losses or gradients",
    ),
    "NaN weights": (
        {},
        lambda: (of_outputs(lambda out: out * torch.nan), [batch()]),
        "batch 0: NaN or infinite losses or gradients",
    ),
    # losses
    "an unknown loss": (
        {"loss": "crossentropy"},
        lambda: (model(), [batch()]),
        r"'loss' parameter of Explicit must be.*'crossentropy'",
    ),
    "a class as loss": (
        {"loss": nn.CrossEntropyLoss},
        lambda: (model(), [batch()]),
        r"loss=CrossEntropyLoss is a class; give an instance, CrossEntropyLoss\(\)",
    ),
    "a scalar loss": (
        {"loss": scalar_loss},
        lambda: (model(), [batch()]),
        r"loss=scalar_loss returned a tensor of shape \(\); expected one loss per example.*"
        "reduction as 'none'.*Hugging Face.*'causal_lm'",
    ),
    **{
        f"a loss of {name}": (
            {"loss": loss},
            lambda: (model(), [batch()]),
            r"was called as loss\(model, batch\), for a batch \(float64 \(6, 5\), int64 \(6,\)\), "
            r"and raised .*not outputs and targets: write lambda model, batch",
        )
        for name, loss in {
            "outputs and targets": of_outputs_and_targets,
            "torch's functions": nn.functional.cross_entropy,
            "torch's functions that look at the batch first": nn.functional.mse_loss,
            "an output's shape": lambda outputs, targets: torch.ones(outputs.shape),
            "one argument": lambda batch: batch,
            "three arguments": lambda model, x, y: nn.functional.cross_entropy(model(x), y),
        }.items()
    },
    "losses of tokens": (
        {"loss": losses_of_tokens},
        lambda: (model(), [batch()]),
        r"batch 0: the loss returned 12 losses for 6 examples, 2 for each.*losses\.view\(6, -1\)",
    ),
    "one loss for all examples": (
        {"loss": one_loss},
        lambda: (model(), [batch()]),
        r"batch 0: loss=one_loss returned one loss for 6 examples.*expected shape \(6,\), so give "
        "its reduction as 'none'.*'causal_lm'.*single example",
    ),
    "one loss for all examples of a mapping": (
        {"loss": lambda model, batch: one_loss(model, (batch["x"], batch["y"]))},
        lambda: (model(), [{"x": batch()[0], "y": batch()[1], "name": "train"}]),
        r"returned one loss for 6 examples.*expected shape \(6,\)",
    ),
    "losses in a column": (
        {"loss": column_loss},
        lambda: (model(), [batch()]),
        r"loss=column_loss returned a tensor of shape \(6, 1\); expected one loss per example",
    ),
    "a number as loss": (
        {"loss": number_loss},
        lambda: (model(), [batch()]),
        r"loss=number_loss returned float; expected one loss per example",
    ),
    "detached losses": (
        {"loss": detached_loss},
        lambda: (model(), [batch()]),
        "do not depend on any selected parameter through autograd",
    ),
    "a detached model": (
        {},
        lambda: (of_outputs(torch.Tensor.detach), [batch()]),
        "do not depend on any selected parameter through autograd",
    ),
    # shapes and targets
    "floating targets": (
        {},
        lambda: (model(), of_targets(torch.Tensor.double)),
        r"needs integer class targets; got a torch\.float64 tensor.*loss='mse'",
    ),
    "targets that are no tensor": (
        {},
        lambda: (model(), of_targets(torch.Tensor.tolist)),
        r"needs integer class targets; got a list of int.*torch\.tensor",
    ),
    "names of classes as targets": (
        {},
        lambda: (model(), [(batch()[0], ["a"] * len(batch()[0]))]),
        "needs integer class targets; got a list of str.*LabelEncoder",
    ),
    "targets of another length": (
        {},
        lambda: (model(), of_targets(lambda y: y[:-1])),
        r"outputs of shape \(6, 3\) and targets of shape \(5,\)",
    ),
    "one-hot targets": (
        {},
        lambda: (model(), of_targets(lambda y: nn.functional.one_hot(y, 3))),
        r"outputs of shape \(6, 3\) and targets of shape \(6, 3\).*one-hot .* by \.argmax\(1\)",
    ),
    "targets in a column": (
        {},
        lambda: (model(), of_targets(lambda y: y[:, None])),
        r"targets of shape \(6, 1\); expected.*by \.squeeze\(1\)",
    ),
    "one logit for two classes": (
        {},
        lambda: (of_outputs(lambda out: out[:, :1]), of_targets(lambda y: y.clamp(max=1))),
        r"outputs of 1 classes.*For one logit of two classes use loss='bce'",
    ),
    "classes in two places": (
        {},
        lambda: (
            of_outputs(lambda out: out[:, :, None].expand(-1, 3, 3)),
            of_targets(lambda y: y[:, None].expand(-1, 3)),
        ),
        r"cannot tell which dimension of outputs of shape \(6, 3, 3\) holds the classes",
    ),
    "targets that would broadcast": (
        {"loss": "mse"},
        lambda: (of_outputs(lambda out: out[:, :1]), of_targets(lambda y: y.repeat(2, 1).T)),
        r"outputs of shape \(6, 1\) and targets of shape \(6, 2\).*broadcasting",
    ),
    "outputs that are no tensor": (
        {},
        lambda: (of_outputs(lambda out: (out, out)), [batch()]),
        r"whose output is a floating tensor \(B, \.\.\.\) or has \.logits; got a tuple",
    ),
    "integer outputs": (
        {},
        lambda: (of_outputs(lambda out: out.argmax(1)), [batch()]),
        r"got a torch\.int64 tensor of shape \(6,\)",
    ),
    "a mapping without labels": (
        {},
        lambda: (model(), [{"input": batch()[0], "target": batch()[1]}]),
        r"mapping with keys \['input', 'target'\], without 'labels'",
    ),
    "a batch without targets": (
        {},
        lambda: (model(), [(batch()[0],)]),
        "tuple or list.*got tuple of length 1",
    ),
    "a batch that is a tensor": (
        {},
        lambda: (model(), [batch()[0]]),
        "tuple or list.*got Tensor",
    ),
    # settings, by scikit-learn's own check
    "a negative λ": (
        {"regularization": -1.0},
        lambda: (model(), [batch()]),
        "'regularization' parameter of Explicit must be.*-1.0",
    ),
    "an unknown solver": (
        {"solver": "cg"},
        lambda: (model(), [batch()]),
        "'solver' parameter of Explicit must be.*'cg'",
    ),
    "an unknown kind": (
        {"fisher": "true"},
        lambda: (model(), [batch()]),
        "'fisher' parameter of Explicit must be.*'true'",
    ),
    "no samples": (
        {"fisher": "mc", "n_mc_samples": 0},
        lambda: (model(), [batch()]),
        "'n_mc_samples' parameter of Explicit must be.*0",
    ),
    "a dtype of numpy": (
        {"dtype": np.float64},
        lambda: (model(), [batch()]),
        "'dtype' parameter of Explicit must be",
    ),
    **{
        f"dtype {dtype}": (
            {"dtype": dtype},
            lambda: (model(), [batch()]),
            f"'dtype' parameter of Explicit must be a torch.dtype among .*{dtype}",
        )
        for dtype in (torch.int64, torch.float16, torch.bfloat16, torch.complex64)
    },
    "an unknown device": (
        {"device": "nonsense"},
        lambda: (model(), [batch()]),
        "device='nonsense' cannot be used here: .*Give a device of this machine, such as 'cpu'",
    ),
    "a device that is not there": (
        {"device": torch.device("cuda", 99)},
        lambda: (model(), [batch()]),
        "device='cuda:99' cannot be used here: .*Give a device of this machine",
    ),
    "a device without numbers": (
        {"device": "meta"},
        lambda: (model(), [batch()]),
        "device='meta' holds no numbers",
    ),
    "a number for a device": (
        {"device": 0},
        lambda: (model(), [batch()]),
        "'device' parameter of Explicit must be.*0",
    ),
    "a name for λ": (
        {"regularization": ["a"]},
        lambda: (model(), [batch()]),
        r"regularization\[0\] is 'a'; expected a number",
    ),
    "True for λ": (
        {"regularization": True},
        lambda: (model(), [batch()]),
        "regularization=True; expected 'auto', a number",
    ),
    "too many λ": (
        {"regularization": [1.0, 1.0]},
        lambda: (model(), [batch()]),
        r"regularization has 2 values; expected one number, or one per block: 1 \(all\)",
    ),
    "unknown blocks": (
        {"blocks": "layers"},
        lambda: (model(), [batch()]),
        "'blocks' parameter of Explicit must be.*'layers'",
    ),
}  # fmt: skip


def modules_in(arguments):
    for argument in arguments:
        if isinstance(argument, nn.Module):
            yield argument
        elif isinstance(argument, ModelData):
            yield argument.model


@pytest.mark.parametrize("name", FAILURES)
def test_refused_by_name_and_without_a_trace(name):
    settings, make, message = FAILURES[name]
    estimator = Explicit(1e-3).fit(model(), [batch()])
    vectors = torch.randn(3, estimator.n_features_in_, dtype=torch.float64)
    before = estimator.transform(vectors)
    estimator.set_params(**settings)
    state = {key: id(value) for key, value in vars(estimator).items()}
    arguments = make()
    with (
        unchanged(*modules_in(arguments)),
        pytest.raises((IFVPUsageError, InvalidParameterError), match=message),
    ):
        estimator.fit(*arguments)
    assert {key: id(value) for key, value in vars(estimator).items()} == state
    estimator.set_params(regularization=1e-3)
    assert torch.equal(estimator.transform(vectors), before)


@pytest.mark.parametrize("name", ["NaN inputs", "no batches", "a scalar loss"])
def test_a_first_fit_that_fails_leaves_nothing(name):
    settings, make, message = FAILURES[name]
    estimator = Explicit(**settings)
    with pytest.raises(IFVPUsageError, match=message):
        estimator.fit(*make())
    assert set(vars(estimator)) == set(estimator.get_params())
    with pytest.raises(NotFittedError):
        estimator.transform(torch.ones(79))


class Failure:
    """Raises an error at one place, from the batch of a given number on.

    Parameters
    ----------
    place : {"data", "forward", "loss", "backward"}
    number : int
        Of the batch, counted over all passes.
    error : Exception
    """

    def __init__(self, place, number, error):
        self.place, self.number, self.error = place, number, error
        self.batches = 0

    def at(self, place):
        if place == self.place and self.batches > self.number:
            raise self.error

    def __iter__(self):
        """Yield three batches of two, as often as asked."""
        for part in split(batch(), N, 2):
            self.batches += 1
            self.at("data")
            yield part

    def model(self):
        class Backward(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, signal):
                self.at("backward")
                return signal

        def forward(module, x):
            self.at("forward")
            return Backward.apply(module.inner(x))

        return Apply(forward, inner=model()).train()

    def loss(self, model, batch):
        self.at("loss")
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["data", "forward", "loss", "backward"])
@pytest.mark.parametrize(
    ("estimator", "number"),
    [
        *product([Explicit(1e-3), DataInf(1e-3), KFAC(1e-3), Diagonal(1e-3)], range(3)),
        *product([EKFAC(1e-3, cache_budget=0)], range(6)),
    ],
)
def test_a_fit_that_stops_in_the_middle_leaves_no_trace(estimator, place, number, error):
    """In the first batch, a later one, or those of the second pass; also when interrupted."""
    failure = Failure(place, number, error("halt"))
    network = failure.model()
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    estimator = clone(estimator).set_params(loss=Failure(None, 0, None).loss)
    estimator.fit(model(), split(batch(), N, 2))
    vectors = torch.randn(3, estimator.n_features_in_, dtype=torch.float64)
    before = estimator.transform(vectors)
    estimator.set_params(loss=failure.loss)
    state = {key: id(value) for key, value in vars(estimator).items()}
    with unchanged(network), pytest.raises(error, match="halt") as caught:
        estimator.fit(network, failure)
    assert failure.batches == number + 1, "it stopped where it was meant to"
    if place != "data" and error is RuntimeError:
        assert caught.value.__notes__[-1] == f"in batch {number % 3} of the data"
    assert {key: id(value) for key, value in vars(estimator).items()} == state
    assert torch.equal(estimator.transform(vectors), before)
    first = clone(estimator)
    with unchanged(network), pytest.raises(error, match="halt"):
        first.fit(network, Failure("data", 1, error("halt")))
    assert set(vars(first)) == set(first.get_params())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["forward", "loss", "backward"])
@pytest.mark.parametrize("method", ["transform", "mahalanobis", "score"])
def test_gradients_that_stop_in_the_middle_leave_no_trace(method, place, error):
    failure = Failure(place, 3, error("halt"))
    network = failure.model()
    estimator = Explicit(1e-3, loss=failure.loss).fit(network, failure)
    vectors = torch.randn(3, estimator.n_features_in_, dtype=torch.float64)
    before = estimator.transform(vectors)
    failure.batches = 4
    with unchanged(network), pytest.raises(error, match="halt"):
        getattr(estimator, method)(ModelData(network, batch(), batch_size=2))
    assert torch.equal(estimator.transform(vectors), before)


@pytest.mark.parametrize(
    "layer", [nn.LazyLinear(3), nn.Linear(4, 3, device="meta")], ids=["lazy", "meta"]
)
def test_models_without_numbers(layer):
    message = r"parameter '1\.weight' holds no numbers yet; load the model's weights, or run a lazy"
    with pytest.raises(IFVPUsageError, match=message):
        Explicit().fit(nn.Sequential(nn.Linear(5, 4), layer), [batch()])


def test_what_fit_transform_refuses():
    """Before the fit: a model with a loader would be fitted, and then be no vectors."""
    estimator = Explicit()
    with pytest.raises(IFVPUsageError, match=r"data must be a ModelData.*got Sequential"):
        estimator.fit_transform(model(), [batch()])
    assert not hasattr(estimator, "fisher_")


@pytest.mark.parametrize("data", [[batch()], model(), None])
def test_what_gradients_refuses(data):
    estimator = Explicit().fit(model(), [batch()])
    with pytest.raises(IFVPUsageError, match=r"data must be a ModelData.*got"):
        next(estimator.gradients(data))


def test_batches_are_named_by_position():
    """Also where the model itself raises: the message tells which batch it was."""
    x, y = batch()
    with pytest.raises(IFVPUsageError, match=r"batch 2: .*needs integer class targets"):
        Explicit().fit(model(), [(x, y), (x, y), (x, y.double())])


def test_a_class_out_of_range_is_torchs_own_error():
    x, y = batch()
    y[0] = 3
    network = model()
    with unchanged(network), pytest.raises((IndexError, IFVPUsageError)):
        Explicit().fit(network, [(x, y)])


@pytest.mark.parametrize(
    "call",
    [
        lambda estimator: estimator.transform(torch.ones(3)),
        lambda estimator: estimator.inverse_transform(torch.ones(3)),
        lambda estimator: estimator.mahalanobis(torch.ones(3)),
        lambda estimator: estimator.score(torch.ones(3)),
        lambda estimator: estimator.score_samples(torch.ones(3)),
        lambda estimator: estimator.score_path(torch.ones(3), [1.0]),
        lambda estimator: estimator.regularization_,
        lambda estimator: next(estimator.gradients(ModelData(model(), batch()))),
    ],
)
def test_not_fitted(call):
    with pytest.raises(NotFittedError, match="Explicit instance is not fitted yet"):
        call(Explicit())


def test_kinds_of_errors():
    """All are ValueErrors, as a caller of scikit-learn expects."""
    assert issubclass(IFVPUsageError, ValueError)
    assert issubclass(SingularFisherError, ValueError)


def test_gradients_that_stop_early_restore_the_model():
    """A generator of gradients that is dropped half-way leaves nothing behind."""
    network = model().train()
    data = ModelData(network, batch(), batch_size=2)
    estimator = Explicit().fit(data)
    with unchanged(network):
        gradients = estimator.gradients(data)
        next(gradients)
        gradients.close()


def test_models_are_compared_by_their_parameters():
    """A copy, or another model of the same parameters, will do for gradients."""
    network = model()
    data = ModelData(network, batch())
    estimator = Explicit(1e-3).fit(data)
    copied = ModelData(copy.deepcopy(network), batch())
    assert np.array_equal(estimator.transform(copied), estimator.transform(data))


def test_errors_of_a_model_that_runs_are_its_own():
    """Not a misuse, in a batch that looks like one, once a batch has been passed."""
    x, y = batch()
    seen = []

    def forward(self, x):
        seen.append(x)
        return self.inner(x)

    network = Apply(forward, inner=model())
    with pytest.raises(TypeError, match="positional arguments") as caught:
        Explicit().fit(network, [(x, y), (x, y, y)])
    assert seen
    assert caught.value.__notes__[-1] == "in batch 1 of the data"


def test_errors_of_losses_of_ones_own_are_not_explained():
    class Own(Loss):
        def outputs(self, model, batch):
            raise TypeError("halt")

        def targets(self, batch):
            return None

    with pytest.raises(TypeError, match="halt"):
        Explicit(loss=Own()).fit(model(), [list(TensorDataset(*batch()))])


class EncoderDecoder(nn.Module):
    config = SimpleNamespace(is_encoder_decoder=True)

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 3)
        self.head = nn.Linear(3, 7)

    def forward(self, input_ids, decoder_input_ids=None, labels=None):
        given = input_ids if decoder_input_ids is None else decoder_input_ids
        return SimpleNamespace(logits=self.head(self.table(given)))


@pytest.mark.parametrize("loss", ["cross_entropy", "causal_lm", nn.CrossEntropyLoss()])
def test_labels_of_a_decoder_without_its_inputs(loss):
    """They would be left out, and the decoder run on other tokens."""
    ids = torch.arange(12).view(4, 3) % 7
    data = {"input_ids": ids, "labels": ids.flip(1)}
    with pytest.raises(IFVPUsageError, match=r"no decoder_input_ids.*prepare_decoder_input_ids_f"):
        Explicit(loss=loss).fit(EncoderDecoder(), [data])
    complete = {**data, "decoder_input_ids": ids.roll(1, 1)}
    assert Explicit().fit(EncoderDecoder(), [complete]).n_samples_seen_ == 4


class Squeezed(nn.Module):
    def forward(self, x):
        return x.squeeze()


class Squeezing(nn.Linear):
    def forward(self, x):
        return super().forward(x).squeeze()


def test_a_batch_of_one_example_that_is_squeezed():
    x, y = torch.randn(5, 3), torch.randn(5)
    with pytest.raises(IFVPUsageError, match=r"batch 1: Squeezing.*one example.*\.squeeze\(-1\)"):
        Explicit(loss="mse").fit(Squeezing(3, 1), [(x[:4], y[:4]), (x[4:], y[4:])])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (lambda x, y: (x.double(), y), r"inputs are float64 .* float32: .*\.to\(torch\.float32\)"),
        (lambda x, y: (x[:, :2], y), r"input=float32 \(6, 2\).*cannot be multiplied.*layers take"),
        (lambda x, y: (x.byte(), y), r"inputs are uint8 .* float32: .*\.to\(torch\.float32\)"),
        (lambda x, y: ((x, x), y), r"given tuples or mappings.*\(x1, x2, targets\)"),
        (lambda x, y: ({"input": x}, y), "given tuples or mappings.*with 'labels'"),
    ],
)
def test_inputs_that_the_model_cannot_take(batch, message):
    """The first batch's error says how the model was called, and what to do."""
    x, y = torch.randn(6, 3), torch.arange(6) % 2
    with pytest.raises(IFVPUsageError, match=f"batch 0: Linear was called with .*{message}"):
        Explicit().fit(nn.Linear(3, 2), [batch(x, y)])


def test_inputs_that_the_model_of_a_function_cannot_take():
    def loss(model, batch):
        return model(batch[0]).square().sum(1)

    batch = torch.randn(6, 3, dtype=torch.float64), torch.arange(6)
    with pytest.raises(IFVPUsageError, match=r"loss=loss was called.*inputs are float64"):
        Explicit(loss=loss).fit(nn.Linear(3, 2), [batch])


def test_pixels_that_are_squeezed_with_the_only_example():
    model = nn.Sequential(nn.Conv2d(1, 3, 2), Squeezed())
    x, y = torch.randn(5, 1, 2, 2), torch.arange(5) % 3
    with pytest.raises(IFVPUsageError, match=r"batch 1: .*\.squeeze\(\) drops the dimension"):
        Explicit().fit(model, [(x[:4], y[:4]), (x[4:], y[4:])])


def test_a_tensor_in_the_place_of_a_batch():
    x, y = torch.randn(6, 3), torch.arange(6) % 2
    with pytest.raises(IFVPUsageError, match=r"from \[x, y\] in place of .* such as \[\(x, y\)\]"):
        Explicit().fit(nn.Linear(3, 2), [x, y])


def test_maps_without_a_dimension_of_channels():
    model, x = nn.Conv2d(1, 1, 1), torch.rand(3, 1, 2, 2)
    with pytest.raises(IFVPUsageError, match=r"expected equal shapes.*targets\.unsqueeze\(1\)"):
        Explicit(loss="bce").fit(model, [(x, x[:, 0])])


def test_a_primal_form_beyond_memory():
    model, x = nn.Linear(5_000_000, 1), torch.rand(2, 5_000_000)
    with pytest.raises(IFVPUsageError, match=r"200,000 GB.*use solver='dual'"):
        Explicit(loss="mse", solver="primal").fit(model, [(x, x[:, :1])])


def test_vectors_of_three_dimensions():
    fitted = Explicit().fit(nn.Linear(3, 2), [(torch.randn(6, 3), torch.arange(6) % 2)])
    with pytest.raises(IFVPUsageError, match=r"shape \(1, 2, 8\).*named_parameters\(\) order\.$"):
        fitted.transform(torch.zeros(1, 2, 8))


def logarithms(model):
    return nn.Sequential(model, nn.LogSoftmax(1))


DOUBTFUL = [
    ("cross_entropy", lambda m: nn.Sequential(m, nn.Softmax(1)), "takes logits.*with a softmax"),
    (nn.CrossEntropyLoss(), lambda m: nn.Sequential(m, nn.Softmax(1)), "takes logits.*softmax"),
    (
        "bce",
        lambda m: nn.Sequential(m, nn.Sigmoid(), nn.Unflatten(1, (2, 1)), nn.Flatten()),
        "takes logits.*with a sigmoid",
    ),
    (nn.BCEWithLogitsLoss(), lambda m: nn.Sequential(m, nn.Sigmoid()), "takes logits.*sigmoid"),
    (nn.NLLLoss(), lambda m: m, "takes logarithms of probabilities.*CrossEntropyLoss"),
    (nn.NLLLoss(), lambda m: nn.Sequential(m, nn.Softmax(1)), "takes logarithms"),
    (nn.CrossEntropyLoss(torch.ones(2)), lambda m: m, "weights have no effect.*reduction='sum'"),
]


@pytest.mark.parametrize(("loss", "build", "message"), DOUBTFUL)
def test_what_is_likely_wrong_warns_once(loss, build, message):
    binary = isinstance(loss, nn.BCEWithLogitsLoss) or loss == "bce"
    x, y = torch.randn(6, 3), torch.arange(6) % 2
    y = torch.stack([y, 1 - y], 1).float() if binary else y
    with pytest.warns(UserWarning, match=message) as caught:
        EKFAC(loss=loss, cache_budget=0).fit(build(nn.Linear(3, 2)), [(x, y), (x, y)])
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("loss", "build"),
    [
        ("cross_entropy", logarithms),
        (nn.NLLLoss(), logarithms),
        ("cross_entropy", lambda m: nn.Sequential(m, nn.Sigmoid())),
        (nn.CrossEntropyLoss(torch.ones(2), reduction="sum"), lambda m: m),
        (nn.CrossEntropyLoss(torch.ones(2), label_smoothing=0.1), lambda m: m),
        ("mse", lambda m: nn.Sequential(m, nn.Softmax(1))),
    ],
)
def test_what_may_be_meant_does_not_warn(loss, build):
    x, y = torch.randn(6, 3), torch.arange(6) % 2
    y = torch.stack([y, 1 - y], 1).float() if loss == "mse" else y
    assert EKFAC(loss=loss).fit(build(nn.Linear(3, 2)), [(x, y)]).n_samples_seen_ == 6


def test_warnings_point_at_the_line_of_the_user():
    model = nn.Sequential(nn.Linear(3, 2), nn.Softmax(1))
    data = ModelData(model, (torch.randn(8, 3), torch.arange(8) % 2))
    search = GridSearchCV(EKFAC(), {"regularization": [0.1, 1.0]}, cv=2)
    for fit in (EKFAC().fit, search.fit):
        with pytest.warns(UserWarning, match="with a softmax") as caught:
            fit(data)
        assert {warning.filename for warning in caught} == {__file__}
