"""The functions of `fimkit.functional` for the explicit Fisher, against dense references."""

import inspect
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad

from fimkit import IFVPUsageError, SingularFisherError
from fimkit.functional import ifvp_at_x_explicit, ifvp_explicit, per_example, single_example
from tests import reference

N = 12
DOCUMENTED = """
def ifvp_explicit(func: Callable, argnums: int = 0, regularization: float = 0.0) -> Callable: ...
def ifvp_at_x_explicit(
    func: Callable, *x, argnums: int | Tuple[int, ...] = 0, regularization: float = 0.0
) -> Callable: ...
"""


def randn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed + 100 * len(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def flat(*pieces):
    """Return the tensors of nested containers as one vector."""
    out = []
    for piece in pieces:
        if isinstance(piece, torch.Tensor):
            out.append(piece.detach().double().flatten())
        elif piece is not None:
            out.append(flat(*(piece.values() if isinstance(piece, dict) else piece)))
    return torch.cat(out)


def outer_products(gradients):
    return sum(torch.outer(g, g) for g in gradients)


def solved(matrix, regularization, v):
    damped = matrix + regularization * torch.eye(len(matrix), dtype=torch.float64)
    return torch.linalg.solve(damped, v.double()[..., None])[..., 0]


def close(found, expected, tolerance=1e-9):
    return reference.error(found, expected) <= tolerance


# A regression of three parameters, 2-D labels and a shared temperature; residuals per example.
def residuals(weight, bias, x, y, temperature=1.0):
    return (torch.tanh(x @ weight + bias) - y).square() / temperature


def mean_loss(weight, bias, x, y, temperature=1.0):
    return residuals(weight, bias, x, y, temperature).mean()


def sum_loss(weight, bias, x, y, temperature=1.0):
    return residuals(weight, bias, x, y, temperature).sum()


def arguments(n=N, d=3, dtype=torch.float64):
    return (
        randn(d, seed=1, dtype=dtype),
        randn(1, seed=2, dtype=dtype)[0],
        randn(n, d, dtype=dtype),
        randn(n, seed=3, dtype=dtype),
    )


def example_gradients(x, argnums, temperature=1.0):
    """Return the gradient of every example's own loss, flattened."""
    weight, bias, inputs, labels = x
    return [
        flat(
            grad(lambda *a, i=i: residuals(*a, inputs[i], labels[i], temperature), argnums)(
                weight, bias
            )
        )
        for i in range(len(labels))
    ]


@pytest.mark.parametrize("documented", ["ifvp_explicit", "ifvp_at_x_explicit"])
def test_signatures_are_the_documented_ones(documented):
    namespace = {}
    exec(f"from __future__ import annotations\n{DOCUMENTED}", namespace)
    function = {f.__name__: f for f in (ifvp_explicit, ifvp_at_x_explicit)}[documented]
    assert inspect.signature(function) == inspect.signature(namespace[documented])
    inspect.signature(function, eval_str=True)  # every name in it is defined


@pytest.mark.parametrize("d", [3, 20], ids=["p<n", "p>n"])
@pytest.mark.parametrize(("loss", "divisor"), [(mean_loss, N), (sum_loss, 1)])
def test_mean_and_sum_of_examples(loss, divisor, d):
    x = arguments(d=d)
    gradients = example_gradients(x, 0)
    matrix = outer_products(gradients) / divisor
    vectors = torch.stack([*gradients[:4], randn(d)])
    for regularization in (1e-4, 0.3):
        expected = solved(matrix, regularization, vectors)
        found = ifvp_explicit(loss, regularization=regularization)(x, vectors)
        assert found.dtype == torch.float64
        assert close(found, expected)
        at_x = ifvp_at_x_explicit(loss, *x, regularization=regularization)
        assert torch.equal(at_x(vectors), found)


def test_it_is_not_the_outer_product_of_the_mean_gradient():
    x = arguments()
    mean_gradient = flat(grad(mean_loss)(*x))
    v = randn(3)
    wrong = solved(torch.outer(mean_gradient, mean_gradient), 0.1, v)
    assert not close(ifvp_explicit(mean_loss, regularization=0.1)(x, v), wrong, 0.1)


def test_no_regularization_where_there_are_enough_examples():
    x = arguments()
    matrix = outer_products(example_gradients(x, 0)) / N
    v = randn(2, 3)
    assert close(ifvp_explicit(mean_loss)(x, v), solved(matrix, 0, v))
    assert close(ifvp_at_x_explicit(mean_loss, *x)(v), solved(matrix, 0, v))


@pytest.mark.parametrize("argnums", [(0, 1), (1, 0), (-3, 0), (1,), 1, -3])
def test_argnums_concatenates_in_its_order(argnums):
    x = arguments()
    order = tuple(i % 4 for i in argnums) if isinstance(argnums, tuple) else argnums % 4
    matrix = outer_products(example_gradients(x, order)) / N
    v = randn(3, len(matrix))
    expected = solved(matrix, 0.01, v)
    by_example = per_example(residuals, (None, None, 0, 0))
    assert close(ifvp_explicit(by_example, argnums, 0.01)(x, v), expected)
    if 0 in np.atleast_1d(order):  # else the weight is taken for data, of another leading size
        assert close(ifvp_explicit(mean_loss, argnums, 0.01)(x, v), expected)


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("container", [dict, list, tuple])
def test_nested_arguments(reduction, container):
    model = network()
    names = [name for name, _ in model.named_parameters()]
    weights = dict(model.named_parameters())
    inputs, labels = randn(N, 3), torch.arange(N) % 2

    def loss(parameters, batch, module, options):
        if not isinstance(parameters, dict):
            parameters = dict(zip(names, parameters, strict=True))
        logits = functional_call(module, parameters, (batch["inputs"][0] * options["scale"],))
        losses = nn.functional.cross_entropy(logits, batch["labels"], reduction=reduction)
        return losses.reshape(options["shape"])

    nested = weights if container is dict else container(weights.values())
    batch = {"inputs": (inputs,), "labels": labels}
    x = (nested, batch, model, {"scale": torch.tensor(2.0), "shape": (1,), "unused": None})
    gradients = []
    for i in range(N):
        value = nn.functional.cross_entropy(model(2 * inputs[i]), labels[i])
        gradients.append(flat(torch.autograd.grad(value, list(model.parameters()))))
    matrix = outer_products(gradients) / (N if reduction == "mean" else 1)
    vectors = torch.stack([gradients[0], randn(len(matrix))])
    expected = solved(matrix, 1e-3, vectors)
    assert close(ifvp_explicit(loss, regularization=1e-3)(x, vectors), expected)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_nested_argument_among_the_selected():
    x = arguments()

    def loss(x, pair, y):
        return mean_loss(pair["weight"], pair["more"][0], x, y)

    nested = {"weight": x[0], "more": (x[1], torch.zeros(0, 2)), "name": "pair"}
    matrix = outer_products(example_gradients(x, (0, 1))) / N
    v = randn(4)
    found = ifvp_at_x_explicit(loss, x[2], nested, x[3], argnums=1, regularization=0.1)(v)
    assert close(found, solved(matrix, 0.1, v))


def test_vectors_keep_shape_and_dtype():
    x = arguments()
    matrix = outer_products(example_gradients(x, 0)) / N
    ifvp = ifvp_at_x_explicit(mean_loss, *x, regularization=0.1)
    for v in (randn(3), randn(1, 3), randn(3, 3), randn(5, 3), randn(3, 7).T):
        found = ifvp(v)
        assert found.shape == v.shape
        assert close(found, solved(matrix, 0.1, v))
        assert torch.equal(ifvp_explicit(mean_loss, regularization=0.1)(x, v), found)
    assert ifvp(torch.zeros(0, 3)).shape == (0, 3)
    v = randn(4, 3).float().requires_grad_()
    found = ifvp(v)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert close(found, solved(matrix, 0.1, v.detach()), 1e-6)


def test_float32_parameters_with_training_gradients():
    x = arguments(d=40, dtype=torch.float32)
    gradients = torch.stack(example_gradients(tuple(a.double() for a in x), 0))
    matrix = outer_products(gradients) / N
    regularization = 0.1 * float(matrix.trace()) / 40
    for v in (gradients, gradients.float()):
        found = ifvp_explicit(mean_loss, regularization=regularization)(x, v)
        assert found.dtype == v.dtype
        assert close(found, solved(matrix, regularization, v), 1e-4)


@pytest.mark.cuda
def test_vectors_and_parameters_on_two_devices():
    x = arguments(d=20)
    v = randn(2, 20)
    expected = ifvp_explicit(mean_loss, regularization=0.1)(x, v)
    found = ifvp_explicit(mean_loss, regularization=0.1)([a.cuda() for a in x], v)
    assert found.device == v.device
    assert close(found, expected)


def test_a_scalar_parameter_alone_needs_no_regularization():
    def loss(scale, x, y):
        return (scale * x - y).square().mean()

    scale, x, y = torch.tensor(0.5).double(), randn(N), randn(N, seed=1)
    gradients = (2 * (scale * x - y) * x).square()
    assert close(ifvp_explicit(loss)((scale, x, y), randn(1)), randn(1) / gradients.mean())
    assert close(ifvp_explicit(loss)((scale, x, y), randn(4, 1)), randn(4, 1) / gradients.mean())


# -- one example -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_function_of_its_parameters_alone_is_one_example(shape):
    def loss(theta):
        return theta.sin().sum().reshape(shape)

    theta = randn(5)
    matrix = torch.outer(theta.cos(), theta.cos())
    v = randn(5, 5, seed=2)  # k = p, and not symmetric
    for vectors in (v, v[0], theta.cos()):
        found = ifvp_explicit(loss, regularization=0.1)((theta,), vectors)
        assert close(found, solved(matrix, 0.1, vectors))


@pytest.mark.parametrize("loss", [mean_loss, sum_loss])
def test_one_example_in_the_data(loss):
    x = arguments(n=1)
    matrix = outer_products(example_gradients(x, 0))
    v = randn(2, 3)
    assert close(ifvp_explicit(loss, regularization=0.1)(x, v), solved(matrix, 0.1, v))


def test_single_example_says_that_the_call_is_one():
    x = arguments()
    gradient = flat(grad(mean_loss)(*x))
    v = randn(2, 3)
    expected = solved(torch.outer(gradient, gradient), 0.1, v)
    wrapped = single_example(mean_loss)
    assert close(ifvp_explicit(wrapped, regularization=0.1)(x, v), expected)
    assert close(ifvp_at_x_explicit(wrapped, *x, regularization=0.1)(v), expected)
    assert torch.equal(wrapped(*x), mean_loss(*x))


# -- what is neither a mean nor a sum ----------------------------------------------------------


def penalized_sum(weight, bias, x, y):
    return sum_loss(weight, bias, x, y) + weight.square().sum()


def weighted_mean(weight, bias, x, y):
    weights = torch.arange(1.0, len(y) + 1).double() if len(y) > 1 else torch.ones(1).double()
    return (weights * residuals(weight, bias, x, y)).sum() / weights.sum()


def standardized(weight, bias, x, y):
    if len(x) == 1:
        raise RuntimeError("one row has no deviation")
    return mean_loss(weight, bias, x / x.std(0), y)


def random_weights(weight, bias, x, y):
    return (torch.rand_like(y) * residuals(weight, bias, x, y)).mean()


def mean_of_some(weight, bias, x, y):
    kept = (y > 0).double()  # a slice without any is 0 / 0
    return (kept * residuals(weight, bias, x, y)).sum() / kept.sum()


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (penalized_sum, "neither the mean nor the sum of its values at the 12 slices"),
        (weighted_mean, "neither the mean nor the sum"),
        (standardized, r"cannot be evaluated .*RuntimeError: one row has no deviation"),
        (random_weights, "neither the mean nor the sum"),
        (mean_of_some, "cannot be evaluated .*NaN or infinite"),
    ],
)
def test_whatever_is_neither_is_one_example_with_a_warning(loss, told):
    x = arguments()
    with torch.random.fork_rng(devices=[]):
        gradient = flat(grad(loss)(*x))
    v = randn(2, 3)
    expected = solved(torch.outer(gradient, gradient), 0.1, v)
    message = rf"rank 1.*{told}(?s:.*)per_example(?s:.*)single_example"
    with torch.random.fork_rng(devices=[]), pytest.warns(UserWarning, match=message) as seen:
        found = ifvp_explicit(loss, regularization=0.1)(x, v)
    assert close(found, expected)
    assert [warning.filename for warning in seen] == [__file__]
    with pytest.warns(UserWarning, match="rank 1") as seen:
        ifvp_at_x_explicit(loss, *x, regularization=0.1)
    assert [warning.filename for warning in seen] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ifvp_explicit(single_example(loss), regularization=0.1)(x, v)


def test_data_of_different_leading_sizes_is_in_doubt():
    x = arguments()
    gradient = flat(grad(mean_loss, 1)(*x))
    with pytest.warns(UserWarning, match=r"3 in argument 0, 12 in argument 2, 12 in argument 3"):
        found = ifvp_explicit(mean_loss, 1, 0.1)(x, torch.ones(1).double())
    assert close(found, 1 / (gradient.square() + 0.1))


def test_a_penalty_inside_the_mean_is_each_examples_own():
    x = arguments()

    def loss(weight, bias, x, y):
        return mean_loss(weight, bias, x, y) + weight.square().sum()

    gradients = [g + 2 * x[0] for g in example_gradients(x, 0)]
    expected = solved(outer_products(gradients) / N, 0.1, randn(3))
    assert close(ifvp_explicit(loss, regularization=0.1)(x, randn(3)), expected)


@pytest.mark.parametrize(("reduce", "divisor"), [(torch.mean, N), (torch.sum, 1)])
def test_losses_that_cancel_leave_it_to_the_gradients(reduce, divisor):
    def loss(weight, x):
        return reduce(x @ weight)

    weight, x = torch.zeros(3).double(), randn(N, 3)
    matrix = x.T @ x / divisor
    found = ifvp_explicit(loss, regularization=0.1)((weight, x), randn(3))
    assert close(found, solved(matrix, 0.1, randn(3)))


def test_losses_and_gradients_that_cancel_are_in_doubt():
    def loss(weight, x):
        return (x @ weight).sum()

    weight, x = torch.zeros(3).double(), randn(N, 3)
    x = torch.cat([x, -x])
    with pytest.warns(UserWarning, match="both the mean and the sum"):
        found = ifvp_explicit(loss, regularization=0.5)((weight, x), randn(3))
    assert close(found, 2 * randn(3))


def test_a_tensor_without_dimensions_is_a_constant():
    x = arguments()
    temperature = torch.tensor(2.0).double()
    matrix = outer_products(example_gradients(x, 0, temperature)) / N
    found = ifvp_explicit(mean_loss, regularization=0.1)((*x, temperature), randn(3))
    assert close(found, solved(matrix, 0.1, randn(3)))


@pytest.mark.parametrize(("loss", "divisor"), [(mean_loss, 300), (sum_loss, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_and_sum_are_told_apart_in_low_precision(loss, divisor, dtype):
    x = arguments(n=300, dtype=dtype)
    rows = torch.stack(example_gradients(tuple(a.double() for a in x), 0))
    matrix = rows.T @ rows / divisor
    found = ifvp_explicit(loss, regularization=0.1)(x, randn(3))
    assert close(found, solved(matrix, 0.1, randn(3)), 0.1 if dtype is torch.bfloat16 else 1e-5)


# -- per_example -------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [3, 20], ids=["p<n", "p>n"])
@pytest.mark.parametrize("dims", [(0, 0), (1, 0), (-1, -1)])
def test_per_example_slices_along_in_dims(d, dims):
    x = arguments(d=d)
    expected = solved(outer_products(example_gradients(x, (1, 0))) / N, 0.01, randn(2, d + 1))
    inputs = x[2] if dims[0] == 0 else x[2].T
    given = (x[0], x[1], inputs, x[3])
    wrapped = per_example(residuals, (None, None, *dims))
    found = ifvp_explicit(wrapped, (1, 0), 0.01)(given, randn(2, d + 1))
    assert close(found, expected)
    at_x = ifvp_at_x_explicit(wrapped, *given, argnums=(1, 0), regularization=0.01)
    assert torch.equal(at_x(randn(2, d + 1)), found)
    assert close(wrapped(*given)[None], mean_loss(*x)[None])


def test_per_example_shares_what_it_does_not_slice():
    x = arguments()
    scales = randn(5).square() + 1  # of another leading size than the data

    def loss(weight, data, scales):
        return residuals(weight, x[1], *data.values()).reshape(1) * scales.sum()

    gradients = [g * scales.sum() for g in example_gradients(x, 0)]
    wrapped = per_example(loss, (None, 0, None))
    data = {"x": x[2], "y": x[3]}
    found = ifvp_explicit(wrapped, regularization=0.1)((x[0], data, scales), randn(3))
    assert close(found, solved(outer_products(gradients) / N, 0.1, randn(3)))


def test_per_example_of_one_example():
    x = arguments(n=1)
    expected = solved(outer_products(example_gradients(x, 0)), 0.1, randn(3))
    wrapped = per_example(residuals, (None, None, 0, 0))
    assert close(ifvp_explicit(wrapped, regularization=0.1)(x, randn(3)), expected)


# -- how gradients are obtained ----------------------------------------------------------------


class Square(torch.autograd.Function):
    """A function of the older form, which torch.func does not accept."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, signal):
        return 2 * signal * ctx.saved_tensors[0]


def branching(weight, bias, x, y):
    return residuals(weight, bias, x, y).mean() * (2 if float(y.sum()) > 1e6 else 1)


def older(weight, bias, x, y):
    return Square.apply(torch.tanh(x @ weight + bias) - y).mean()


@pytest.mark.parametrize("loss", [branching, older])
def test_functions_that_vmap_refuses(loss):
    x = arguments()
    matrix = outer_products(example_gradients(x, 0)) / N
    expected = solved(matrix, 0.1, randn(3))
    assert close(ifvp_explicit(loss, regularization=0.1)(x, randn(3)), expected)
    wrapped = per_example(loss, (None, None, 0, 0))
    assert close(ifvp_explicit(wrapped, regularization=0.1)(x, randn(3)), expected)


def test_examples_do_not_cost_one_call_each():
    calls = []

    def loss(*x):
        calls.append(None)
        return mean_loss(*x)

    x = arguments(n=500)
    ifvp = ifvp_at_x_explicit(loss, *x, regularization=0.1)
    assert len(calls) <= 3
    ifvp(randn(3))
    ifvp(randn(2, 3))
    assert len(calls) <= 3


@pytest.mark.parametrize("d", [3, 20])
@pytest.mark.parametrize("loss", [mean_loss, branching])
def test_in_chunks(loss, d, monkeypatch):
    x = arguments(d=d)
    expected = ifvp_explicit(loss, regularization=0.1)(x, randn(d))
    monkeypatch.setattr("fimkit.operators.memory.BUDGET", 5 * 8 * d)
    assert close(ifvp_explicit(loss, regularization=0.1)(x, randn(d)), expected, 1e-12)


class Dot(torch.autograd.Function):
    """An inner product whose gradient is the other factor itself, not a copy."""

    @staticmethod
    def forward(ctx, weight, x):
        ctx.save_for_backward(x)
        return weight @ x

    @staticmethod
    def backward(ctx, signal):
        return ctx.saved_tensors[0], None


def test_later_changes_of_the_arguments_have_no_effect():
    weight, x = randn(3), randn(3, seed=1)
    ifvp = ifvp_at_x_explicit(single_example(Dot.apply), weight, x, regularization=1.0)
    before = ifvp(randn(3))
    assert close(before, solved(torch.outer(x, x), 1.0, randn(3)))
    weight.zero_()
    x.zero_()
    assert torch.equal(ifvp(randn(3)), before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("loss", [mean_loss, branching])
def test_gradients_are_taken_under_any_ambient_mode(mode, loss):
    expected = ifvp_explicit(mean_loss, regularization=0.1)(arguments(), randn(3))
    with mode():
        assert close(ifvp_explicit(loss, regularization=0.1)(arguments(), randn(3)), expected)
    assert torch.is_grad_enabled()


# -- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3, 12])
@pytest.mark.parametrize("d", [20, 4])
def test_singular_without_regularization(n, d):
    x = arguments(n=n, d=d)
    x[2][:, 0] = 0  # one direction that no example sees
    ifvp = ifvp_at_x_explicit(mean_loss, *x)
    with pytest.raises(SingularFisherError, match=r"regularization=0.*larger.*regularization=\d"):
        ifvp(torch.ones(d).double())
    with pytest.raises(SingularFisherError):
        ifvp_explicit(sum_loss)(x, torch.ones(d).double())
    assert ifvp_explicit(sum_loss, regularization=1e-3)(x, randn(d)).isfinite().all()


def test_singular_where_all_gradients_are_zero():
    x = (torch.zeros(3), torch.zeros(4, 3))
    with pytest.raises(SingularFisherError, match=r"such as regularization=0\.001,"):
        ifvp_explicit(single_example(lambda w, x: (x @ w).sum()))(x, torch.ones(3))


@pytest.mark.parametrize("value", [-1e-9, float("nan"), float("inf"), "auto", None, [0.1]])
def test_regularization_is_a_finite_number_of_at_least_zero(value):
    for make in (ifvp_explicit, ifvp_at_x_explicit):
        with pytest.raises(IFVPUsageError, match=r"regularization is .*expected a finite number"):
            make(mean_loss, regularization=value)


@pytest.mark.parametrize(
    ("argnums", "told"),
    [
        ((), r"argnums is \(\); expected"),
        ("0", "argnums is '0'; expected"),
        ([0, 1], r"argnums is \[0, 1\]; expected .*tuple"),
        ((0, 0), r"argnums is \(0, 0\), which selects an argument twice"),
        ((0, -4), "selects an argument twice"),
        (4, r"argnums is 4, but func was given 4 argument.*0 to 3"),
        (-5, "argnums is -5, but"),
        (3, "argument 3 of func.*dtype torch.int64"),
    ],
)
def test_argnums_that_cannot_be(argnums, told):
    x = (*arguments()[:3], torch.ones(N, dtype=torch.int64))
    with pytest.raises(IFVPUsageError, match=told):
        ifvp_explicit(mean_loss, argnums)(x, randn(3))
    with pytest.raises(IFVPUsageError, match=told):
        ifvp_at_x_explicit(mean_loss, *x, argnums=argnums)


@pytest.mark.parametrize("empty", [None, (), {"a": 1.0}, torch.zeros(0), nn.Linear(2, 2)])
def test_a_selected_argument_without_numbers(empty):
    with pytest.raises(IFVPUsageError, match=r"argument 0 of func.*without any number"):
        ifvp_explicit(mean_loss)((empty, torch.ones(2)), torch.ones(2))


@pytest.mark.parametrize(
    ("result", "told"),
    [
        (lambda value: value.expand(2), r"shape \(2,\); expected one loss.*\.mean\(\)"),
        (lambda value: value.reshape(1, 1), r"shape \(1, 1\); expected one loss"),
        (lambda value: (value, value), "returned a tuple; expected one loss"),
        (lambda value: 0.5, "returned a float; expected one loss"),
        (lambda value: (value > 0).long(), "dtype torch.int64; expected"),
        (lambda value: value.detach(), "does not depend on argument 0"),
        (lambda value: value * torch.nan, "func's loss is NaN or infinite"),
        (lambda value: (value * 0).sqrt(), "func's gradient is NaN or infinite"),
    ],
)
def test_results_that_are_no_loss(result, told):
    x = arguments()
    for wrap in (lambda f: f, single_example):
        loss = wrap(lambda *a: result(mean_loss(*a)))
        with pytest.raises(IFVPUsageError, match=told):
            ifvp_explicit(loss, regularization=0.1)(x, randn(3))


@pytest.mark.parametrize(
    ("result", "told"),
    [
        (lambda value: value.expand(2), r"shape \(2,\); expected one loss"),
        (lambda value: value.detach(), "does not depend on argument 0"),
        (lambda value: value.log() * 0, "func's loss at example 5 is NaN or infinite"),
        (lambda value: value.sqrt(), "func's gradient at example 5 is NaN or infinite"),
    ],
)
@pytest.mark.parametrize("vectorized", [True, False])
def test_results_that_are_no_loss_of_an_example(result, told, vectorized, monkeypatch):
    x = arguments()
    x[3][5] = torch.tanh(x[2][5] @ x[0] + x[1])  # its residual is zero

    def loss(*a):
        return result(residuals(*a) if vectorized else branching(*a))

    wrapped = per_example(loss, (None, None, 0, 0))
    for budget in (2**20, 4 * 8 * 3):
        monkeypatch.setattr("fimkit.operators.memory.BUDGET", budget)
        with pytest.raises(IFVPUsageError, match=told):
            ifvp_explicit(wrapped, regularization=0.1)(x, randn(3))


def test_a_loss_that_ignores_its_parameters():
    model = network()

    def loss(parameters, x):
        return model(x).square().mean()

    weights = dict(model.named_parameters())
    with pytest.raises(IFVPUsageError, match=r"does not depend on argument 0.*functional_call"):
        ifvp_explicit(loss, regularization=0.1)((weights, randn(N, 3)), randn(26))


@pytest.mark.parametrize(
    ("v", "told"),
    [
        (torch.ones(4), r"v has shape \(4,\); expected \(3,\) or \(k, 3\)"),
        (torch.ones(3, 4), r"v has shape \(3, 4\)"),
        (torch.ones(2, 2, 3), r"v has shape \(2, 2, 3\)"),
        (torch.tensor(1.0), r"v has shape \(\)"),
        (torch.ones(3, dtype=torch.int64), "v is of torch.int64; expected a floating-point"),
        ([1.0, 1.0, 1.0], "v is of list; expected a floating-point torch tensor"),
        (torch.tensor([1.0, torch.nan, 0.0]), "v contains NaN or infinity"),
    ],
)
def test_vectors_that_do_not_fit(v, told):
    with pytest.raises(IFVPUsageError, match=told):
        ifvp_explicit(mean_loss, regularization=0.1)(arguments(), v)


def test_x_is_the_tuple_of_arguments():
    with pytest.raises(IFVPUsageError, match=r"x is a Tensor; expected the tuple.*\(x,\)"):
        ifvp_explicit(torch.sum)(torch.ones(3), torch.ones(3))


def test_func_is_callable():
    for make in (
        ifvp_explicit,
        lambda func: ifvp_at_x_explicit(func, torch.ones(3)),
        single_example,
        lambda func: per_example(func, (None, 0)),
    ):
        with pytest.raises(IFVPUsageError, match="func is a Tensor; expected a callable"):
            make(torch.ones(3))


def test_errors_of_func_are_its_own():
    def loss(weight, x):
        raise KeyError("missing")

    x = (torch.ones(3), torch.ones(4, 3))
    for func in (loss, single_example(loss), per_example(loss, (None, 0))):
        with pytest.raises(KeyError, match="missing"):
            ifvp_explicit(func)(x, torch.ones(3))


@pytest.mark.parametrize("in_dims", [0, None, (None, None), (), (None, 0.0), "00"])
def test_in_dims_that_slice_nothing(in_dims):
    with pytest.raises(IFVPUsageError, match=r"in_dims is .*expected a tuple"):
        per_example(residuals, in_dims)


@pytest.mark.parametrize(
    ("in_dims", "told"),
    [
        ((None, 0, 0), r"in_dims has 3 entries.*given 4 argument"),
        ((0, None, 0, 0), "slices argument 0, but argnums selects"),
        ((None, None, 1, 0), "3 in argument 2, 12 in argument 3; expected the same number"),
        ((None, None, 0, 1), r"slices argument 3 along dimension 1.*shape \(12,\)"),
        ((None, 0, 0, 0), r"slices argument 1 along dimension 0.*shape \(\)"),
    ],
)
def test_in_dims_that_do_not_fit(in_dims, told):
    with pytest.raises(IFVPUsageError, match=told):
        ifvp_explicit(per_example(residuals, in_dims))(arguments(), randn(3))


def test_no_examples():
    weight, bias, x, y = arguments()
    x = (weight, bias, x[:0], y[:0])
    with pytest.raises(IFVPUsageError, match="leading size of 0"):
        ifvp_explicit(sum_loss, (0, 1))(x, randn(4))
    with pytest.raises(IFVPUsageError, match="no examples along in_dims"):
        ifvp_explicit(per_example(residuals, (None, None, 0, 0)))(x, randn(3))
    with pytest.raises(IFVPUsageError, match="no tensors; expected"):
        ifvp_explicit(per_example(lambda w, c: w.sum(), (None, 0)))((weight, 1), randn(3))
