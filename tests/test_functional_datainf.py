"""The functions of `fimkit.functional` for DataInf, against their formula example by example."""

import inspect
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from fimkit import DataInf, IFVPUsageError, SingularFisherError
from fimkit.functional import ifvp_at_x_datainf, ifvp_datainf, per_example, single_example
from tests import reference
from tests.test_functional_explicit import Dot, Square, randn

N = 30
DIMS = (None, 0, 0)
DOCUMENTED = """
def ifvp_datainf(
    func: Callable,
    argnums: int,
    in_dims: Tuple[None | int, ...],
    regularization: float | List[float] | None = None,
    param_layer_map: List[int] | None = None,
) -> Callable: ...
def ifvp_at_x_datainf(
    func: Callable,
    argnums: int,
    in_dims: Tuple[None | int, ...],
    regularization: List[float] | None = None,
    *x,
    param_layer_map: List[int] | None = None,
) -> Callable: ...
"""

SHAPES = {"0.weight": (4, 3), "0.bias": (4,), "2.weight": (2, 4), "2.bias": (2,)}

# What is given as the map, with the parameters in each layer, in order.
MAPS = {
    "none": (None, [[0], [1], [2], [3]]),
    "layers": ([0, 0, 1, 1], [[0, 1], [2, 3]]),
    "one": ((0, 0, 0, 0), [[0, 1, 2, 3]]),
    "each": ([0, 1, 2, 3], [[0], [1], [2], [3]]),
    "gaps, in another order": (np.array([7, 7, 3, 5]), [[2], [3], [0, 1]]),
    "interleaved": (torch.tensor([1, 0, 1, 0]), [[1, 3], [0, 2]]),
    "backwards": ([3, 2, 1, 0], [[3], [2], [1], [0]]),
}
parametrize_maps = pytest.mark.parametrize("name", MAPS)


def network(dtype=torch.float64):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


MODEL = network()


def loss(parameters, x, y):
    if not isinstance(parameters, dict):
        parameters = dict(zip(SHAPES, parameters, strict=True))
    parameters = {name: parameters[name].reshape(shape) for name, shape in SHAPES.items()}
    return cross_entropy(functional_call(MODEL, parameters, (x,)), y)


def arguments(n=N, dtype=torch.float64):
    model = network(dtype)
    return tuple(model.parameters()), 2 * randn(n, 3, dtype=dtype), torch.arange(n) % 2


def gradients(n=N):
    """Return the gradient of every example, by one backward pass each, shape ``(n, p)``."""
    _, x, y = arguments(n)
    return reference.gradients(network(), lambda m, b: cross_entropy(m(b[0]), b[1]), (x, y), n)


def columns(members):
    """Return the places of some parameters in the flat vector."""
    sizes = [int(np.prod(shape)) for shape in SHAPES.values()]
    starts = np.cumsum([0, *sizes])
    return torch.cat([torch.arange(starts[i], starts[i + 1]) for i in members])


def mean_of_inverses(rows, damping):
    eye = torch.eye(rows.shape[1], dtype=torch.float64)
    inverses = [torch.linalg.inv(damping * eye + torch.outer(g, g)) for g in rows.double()]
    return sum(inverses) / len(inverses)


def applied(rows, layers, dampings, vectors):
    """Return M v of flat vectors ``(..., p)``, layer by layer."""
    out = torch.full_like(vectors, torch.nan)
    for members, damping in zip(layers, dampings, strict=True):
        here = columns(members)
        out[..., here] = vectors[..., here] @ mean_of_inverses(rows[:, here], damping)
    return out


def per_layer(flat, layers):
    return tuple(flat[..., columns(members)] for members in layers)


def per_parameter(flat, *, shaped=True):
    lead = flat.shape[:-1]
    pieces = [flat[..., columns([i])] for i in range(len(SHAPES))]
    return tuple(
        piece.reshape(*lead, *shape) if shaped else piece
        for piece, shape in zip(pieces, SHAPES.values(), strict=True)
    )


def vectors_of(rows, k=None):
    """Return one vector or k: training gradients, then random ones."""
    several = torch.cat([rows[:2], randn(30, rows.shape[1])])
    return several[1] if k is None else several[:k]


def close(found, expected, tolerance=1e-9):
    """Whether the tensors of a container, or the items of a dict, are near their counterparts."""
    assert type(found) is type(expected)
    if isinstance(found, dict):
        assert list(found) == list(expected)
        found, expected = found.values(), expected.values()
    pairs = list(zip(found, expected, strict=True))
    assert all(a.shape == b.shape for a, b in pairs)
    return all(reference.error(a.flatten(), b.flatten()) <= tolerance for a, b in pairs)


@pytest.mark.parametrize("documented", ["ifvp_datainf", "ifvp_at_x_datainf"])
def test_signatures_are_the_documented_ones(documented):
    namespace = {}
    exec(f"from __future__ import annotations\n{DOCUMENTED}", namespace)
    function = {f.__name__: f for f in (ifvp_datainf, ifvp_at_x_datainf)}[documented]
    assert inspect.signature(function) == inspect.signature(namespace[documented])
    inspect.signature(function, eval_str=True)  # every name in it is defined


@pytest.mark.parametrize("n", [1, 7, N])
@parametrize_maps
def test_equals_the_definition(name, n):
    rows, x = gradients(n), arguments(n)
    layer_map, layers = MAPS[name]
    dampings = [0.02 * (b + 1) for b in range(len(layers))]
    ifvp = ifvp_datainf(loss, 0, DIMS, dampings, layer_map)
    at_x = ifvp_at_x_datainf(loss, 0, DIMS, dampings, *x, param_layer_map=layer_map)
    for k in (None, 1, 3, 16):
        vectors = vectors_of(rows, k)
        expected = applied(rows, layers, dampings, vectors)
        v = per_layer(vectors, layers)
        found = ifvp(x, v)
        assert close(found, per_layer(expected, layers))
        assert all(map(torch.equal, at_x(v), found))
        if len(layers) < len(SHAPES):
            for shaped in (True, False):
                v = per_parameter(vectors, shaped=shaped)
                found = ifvp(x, v)
                assert close(found, per_parameter(expected, shaped=shaped))
                assert all(map(torch.equal, at_x(v), found))


@parametrize_maps
def test_the_automatic_regularization(name):
    rows, x = gradients(), arguments()
    layer_map, layers = MAPS[name]
    dampings = [reference.automatic(rows, columns(members)) for members in layers]
    vectors = vectors_of(rows, 3)
    expected = per_layer(applied(rows, layers, dampings, vectors), layers)
    found = ifvp_datainf(loss, 0, DIMS, param_layer_map=layer_map)(x, per_layer(vectors, layers))
    assert close(found, expected)
    at_x = ifvp_at_x_datainf(loss, 0, DIMS, None, *x, param_layer_map=layer_map)
    assert all(map(torch.equal, at_x(per_layer(vectors, layers)), found))


def test_it_is_not_the_inverse_of_the_mean():
    rows, x = gradients(), arguments()
    vectors = vectors_of(rows, 3)
    wrong = reference.ifvp(rows, vectors, 0.02)
    (found,) = ifvp_datainf(loss, 0, DIMS, 0.02, [0] * 4)(x, (vectors,))
    assert reference.error(found, wrong) > 0.1


@pytest.mark.parametrize("name", ["none", "layers", "interleaved"])
def test_float32(name):
    rows, x = gradients(), arguments(dtype=torch.float32)
    layer_map, layers = MAPS[name]
    vectors = vectors_of(rows, 5)
    expected = per_layer(applied(rows, layers, [0.01] * len(layers), vectors), layers)
    ifvp = ifvp_at_x_datainf(loss, 0, DIMS, 0.01, *x, param_layer_map=layer_map)
    found = ifvp(tuple(piece.float() for piece in per_layer(vectors, layers)))
    assert {piece.dtype for piece in found} == {torch.float32}
    assert close(found, expected, 1e-5)


@pytest.mark.parametrize("regularization", [None, 0.03, [0.03, 0.5]])
def test_equals_the_estimator(regularization):
    (parameters, x, y), rows = arguments(), gradients()
    value = "auto" if regularization is None else regularization
    fitted = DataInf(value, blocks="layer").fit(network(), [(x, y)])
    vectors = vectors_of(rows, 6)
    expected = per_parameter(torch.as_tensor(fitted.transform(vectors)))
    ifvp = ifvp_datainf(loss, 0, DIMS, regularization, [0, 0, 1, 1])
    assert close(ifvp((parameters, x, y), per_parameter(vectors)), expected, 1e-12)


# -- what arguments may be -------------------------------------------------------------------------


@pytest.mark.parametrize("container", [tuple, list, dict, MappingProxyType])
def test_containers_of_parameters_and_vectors(container):
    (parameters, x, y), rows = arguments(), gradients()
    vectors = vectors_of(rows, 3)
    layers = MAPS["layers"][1]
    expected = per_parameter(applied(rows, layers, [0.1, 0.2], vectors))
    keyed = container in (dict, MappingProxyType)
    given = dict(zip(SHAPES, parameters, strict=True)) if keyed else parameters
    ifvp = ifvp_at_x_datainf(
        loss, 0, DIMS, [0.1, 0.2], container(given), x, y, param_layer_map=[0, 0, 1, 1]
    )
    assert close(ifvp(per_parameter(vectors)), expected)
    assert close(ifvp(list(per_parameter(vectors))), list(expected))
    if keyed:
        backwards = dict(reversed(list(zip(SHAPES, per_parameter(vectors), strict=True))))
        wanted = dict(reversed(list(zip(SHAPES, expected, strict=True))))
        assert close(ifvp(backwards), wanted)
        assert close(ifvp(MappingProxyType(backwards)), wanted)
    assert all(parameter.grad is None for parameter in parameters)


def test_a_sequence_as_long_as_there_are_layers_is_per_layer_and_a_mapping_per_parameter():
    a, b = randn(3), randn(3, seed=1)
    x = randn(N, 3)

    def product(parameters, x):
        return (x @ parameters["a"]).sin() + (x @ parameters["b"]).square()

    rows = {"a": x * (x @ a).cos()[:, None], "b": 2 * x * (x @ b)[:, None]}
    expected = {
        key: randn(2, 3, seed=i) @ mean_of_inverses(rows[key], damping)
        for i, (key, damping) in enumerate([("a", 0.1), ("b", 0.7)])
    }
    ifvp = ifvp_datainf(product, 0, (None, 0), [0.7, 0.1], [1, 0])
    given = ({"a": a, "b": b}, x)
    v = {"a": randn(2, 3), "b": randn(2, 3, seed=1)}
    assert close(ifvp(given, v), expected)
    assert close(ifvp(given, (v["b"], v["a"])), (expected["b"], expected["a"]))


@pytest.mark.parametrize("shape", [(), (1,), (6,), (2, 3), (1, 6), (6, 1), (3, 2, 1), (6, 6)])
def test_no_number_of_vectors_is_ambiguous(shape):
    width = int(np.prod(shape))
    parameter, x = randn(width).reshape(shape), randn(7, width)

    def product(parameter, x):
        return (x @ parameter.flatten()).sin()

    rows = x * (x @ parameter.flatten()).cos()[:, None]
    matrix = mean_of_inverses(rows, 0.1)
    ifvp = ifvp_at_x_datainf(product, 0, (None, 0), [0.1], parameter, x)
    assert not ifvp(parameter).requires_grad
    for k in (None, 1, 2, 3, 6, width):
        flat = randn(1 if k is None else k, width)
        expected, lead = flat @ matrix, () if k is None else (k,)
        for one in {shape, (width,)}:
            found = ifvp(flat.reshape((*lead, *one)))
            assert found.shape == (*lead, *one)
            assert reference.error(found.reshape(-1, width), expected) <= 1e-9
            for container in (tuple, list):
                assert close(ifvp(container([flat.reshape((*lead, *one))])), container([found]), 0)
    assert ifvp(torch.zeros(0, *shape)).shape == (0, *shape)
    assert ifvp(torch.zeros(0, width)).shape == (0, width)


@pytest.mark.parametrize("argnums", [0, (0, 1), (1, 0), (1,)])
def test_argnums_may_select_several_arguments(argnums):
    weight, bias, x, y = randn(3), randn(1)[0], randn(N, 3), randn(N, seed=1)

    def squares(weight, bias, x, y):
        return (torch.tanh(x @ weight + bias) - y).square()

    value = torch.tanh(x @ weight + bias)
    bias_rows = (2 * (value - y) * (1 - value.square()))[:, None]
    rows = {0: x * bias_rows, 1: bias_rows}
    v = {0: randn(2, 3), 1: randn(2)}
    order = argnums if isinstance(argnums, tuple) else (argnums,)
    expected = tuple(
        (v[i].reshape(2, -1) @ mean_of_inverses(rows[i], 0.1)).reshape(v[i].shape) for i in order
    )
    found = ifvp_datainf(squares, argnums, (None, None, 0, 0), 0.1)(
        (weight, bias, x, y), tuple(v[i] for i in order)
    )
    assert close(found, expected)


@pytest.mark.parametrize(
    "regularization",
    [
        [0.1, 0.1, 0.2, 0.2],
        (0.1, 0.2),
        torch.tensor([0.1, 0.2], dtype=torch.float64),
        np.array([0.1, 0.1, 0.2, 0.2]),
        [torch.tensor(0.1, dtype=torch.float64), np.float64(0.2)],
    ],
)
def test_regularization_per_layer_or_per_parameter(regularization):
    rows, x = gradients(), arguments()
    layers = MAPS["layers"][1]
    vectors = vectors_of(rows, 2)
    expected = per_layer(applied(rows, layers, [0.1, 0.2], vectors), layers)
    ifvp = ifvp_datainf(loss, 0, DIMS, regularization, [0, 0, 1, 1])
    assert close(ifvp(x, per_layer(vectors, layers)), expected)


@pytest.mark.parametrize("regularization", [1, 1.0, np.float32(1), torch.tensor(1), [1] * 4])
def test_one_regularization_for_all(regularization):
    rows, x = gradients(), arguments()
    vectors = vectors_of(rows)
    expected = applied(rows, MAPS["none"][1], [1.0] * 4, vectors)
    found = ifvp_datainf(loss, 0, DIMS, regularization)(x, per_parameter(vectors))
    assert close(found, per_parameter(expected))


def test_examples_lie_along_in_dims():
    (parameters, x, y), rows = arguments(), gradients()
    vectors = vectors_of(rows, 2)
    expected = per_parameter(applied(rows, MAPS["none"][1], [0.1] * 4, vectors))
    for dims in [(None, 1, 0), (None, -1, -1), [None, 1, 0]]:
        assert close(
            ifvp_datainf(loss, 0, dims, 0.1)((parameters, x.T, y), per_parameter(vectors)), expected
        )

    def nested(data, shared, parameters):
        return loss(parameters, data["x"] * shared[0], data["y"]).reshape(1)

    ifvp = ifvp_datainf(nested, 2, (0, None, None), 0.1)
    given = [{"x": x / 2, "y": y}, (torch.full((3,), 2.0).double(), "unused"), parameters]
    assert close(ifvp(given, per_parameter(vectors)), expected)


def test_a_layer_without_gradient_takes_the_regularization_of_the_whole_model():
    x, unused = randn(N, 3), randn(2)
    rows = 2 * x * (x @ randn(3))[:, None]
    damping = 0.1 * float(rows.square().sum(1).mean()) / 5
    ifvp = ifvp_datainf(lambda w, x: (x @ w[0]).square(), 0, (None, 0))
    own = 0.1 * float(rows.square().mean())
    expected = (randn(3) @ mean_of_inverses(rows, own), unused / damping)
    assert close(ifvp(((randn(3), unused), x), (randn(3), unused)), expected)


def test_parameters_without_numbers():
    x = randn(N, 3)
    rows = 2 * x * (x @ randn(3))[:, None]
    given = ((torch.zeros(0, 2), randn(3), torch.zeros(0)), x)
    v = (torch.zeros(0, 2), randn(3), torch.zeros(0))
    for layer_map in (None, [0, 1, 1], [0, 0, 0]):
        found = ifvp_datainf(lambda w, x: (x @ w[1]).square(), 0, (None, 0), 0.1, layer_map)(
            given, v
        )
        assert torch.equal(found[0], v[0])
        assert torch.equal(found[2], v[2])
        assert close(found[1:2], (randn(3) @ mean_of_inverses(rows, 0.1),))


def test_vectors_keep_dtype_and_are_detached():
    rows, x = gradients(), arguments()
    vectors = vectors_of(rows, 4)
    layers = MAPS["layers"][1]
    expected = per_parameter(applied(rows, layers, [0.1] * 2, vectors))
    ifvp = ifvp_at_x_datainf(loss, 0, DIMS, 0.1, *x, param_layer_map=[0, 0, 1, 1])
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    v = [a.to(t).requires_grad_() for a, t in zip(per_parameter(vectors), dtypes, strict=True)]
    before = [piece.detach().clone() for piece in v]
    found = ifvp(v)
    assert [piece.dtype for piece in found] == dtypes
    assert not any(piece.requires_grad for piece in found)
    assert all(map(torch.equal, v, before))
    assert close(found, list(expected), 1e-2)
    transposed = [piece.mT.contiguous().mT if piece.ndim > 2 else piece for piece in v]
    assert all(map(torch.equal, ifvp(transposed), found))


@pytest.mark.cuda
def test_vectors_and_parameters_on_two_devices():
    rows, (parameters, x, y) = gradients(), arguments()
    v = per_parameter(vectors_of(rows, 3))
    expected = ifvp_datainf(loss, 0, DIMS, 0.1)((parameters, x, y), v)

    given = (tuple(p.detach().cuda() for p in parameters), x.cuda(), y.cuda())
    found = ifvp_datainf(loss, 0, DIMS, 0.1)(given, v)
    assert {piece.device for piece in found} == {torch.device("cpu")}
    assert close(found, expected)


# -- how gradients are obtained --------------------------------------------------------------------


def branching(parameters, x, y):
    return loss(parameters, x, y) * (2 if float(x.sum()) > 1e6 else 1)


def older(parameters, x, y):
    return Square.apply(loss(parameters, x, y).sqrt())


@pytest.mark.parametrize("func", [branching, older, single_example(loss)])
@pytest.mark.parametrize("budget", [None, 5 * 8 * 26])
def test_functions_that_vmap_refuses_and_chunks(func, budget, monkeypatch):
    rows, x = gradients(), arguments()
    vectors = vectors_of(rows, 3)
    layers = MAPS["interleaved"][1]
    expected = per_layer(applied(rows, layers, [0.1, 0.2], vectors), layers)
    if budget is not None:
        monkeypatch.setattr("fimkit.operators.memory.BUDGET", budget)
    ifvp = ifvp_datainf(func, 0, DIMS, [0.1, 0.2], [1, 0, 1, 0])
    assert close(ifvp(x, per_layer(vectors, layers)), expected)


def test_examples_do_not_cost_one_call_each():
    calls = []

    def counted(*x):
        calls.append(None)
        return loss(*x)

    ifvp = ifvp_at_x_datainf(counted, 0, DIMS, 0.1, *arguments(500))
    assert len(calls) <= 2
    ifvp(per_parameter(vectors_of(gradients(), 3)))
    assert len(calls) <= 2


def test_later_changes_of_the_arguments_have_no_effect():
    weight, x = randn(3), randn(4, 3)
    regularization, layer_map, v = [0.5], [0], randn(3)
    ifvp = ifvp_at_x_datainf(
        Dot.apply, 0, (None, 0), regularization, weight, x, param_layer_map=layer_map
    )
    before = ifvp(v)
    assert reference.error(before, v @ mean_of_inverses(x, 0.5)) <= 1e-9
    weight.zero_(), x.zero_()
    regularization[0], layer_map[0] = 1.0, 1
    assert torch.equal(ifvp(v), before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("func", [loss, branching])
def test_gradients_are_taken_under_any_ambient_mode(mode, func):
    rows = gradients()
    v = per_parameter(vectors_of(rows, 3))
    expected = ifvp_datainf(loss, 0, DIMS, 0.1)(arguments(), v)
    with mode():
        inside = ifvp_at_x_datainf(func, 0, DIMS, 0.1, *arguments())
        own = per_parameter(vectors_of(rows, 3) * 1)
        assert close(inside(own), expected, 1e-12)
    assert close(inside(own), expected, 1e-12)
    assert close(inside(v), expected, 1e-12)
    assert torch.is_grad_enabled()


# -- errors ----------------------------------------------------------------------------------------


V = per_parameter(randn(26))


def refused(
    told,
    argnums,
    in_dims,
    regularization=None,
    *,
    param_layer_map=None,
    error=IFVPUsageError,
    func=loss,
    x=None,
    v=V,
):
    """Check that both functions raise an error that says something."""
    x = arguments() if x is None else x
    with pytest.raises(error, match=told):
        ifvp_datainf(func, argnums, in_dims, regularization, param_layer_map)(x, v)
    with pytest.raises(error, match=told):
        ifvp_at_x_datainf(
            func, argnums, in_dims, regularization, *x, param_layer_map=param_layer_map
        )(v)


@pytest.mark.parametrize(
    "value",
    [
        0,
        0.0,
        -1e-9,
        float("nan"),
        float("inf"),
        "auto",
        "0.1",
        True,
        {0: 0.1},
        [0.1, 0.0, 0.1, 0.1],
        [0.1, None, 0.1, 0.1],
        torch.tensor([0.1, 0.1, -0.1, 0.1]),
        torch.full((2, 2), 0.1),
        [[0.1], [0.1], [0.1], [0.1]],
    ],
)
def test_regularization_is_above_zero(value):
    told = (
        r"^regularization(\[[0-3]\])? is .*; expected a finite number above 0.*or None for a tenth"
    )
    with pytest.raises(IFVPUsageError, match=told):
        ifvp_datainf(loss, 0, DIMS, value)
    with pytest.raises(IFVPUsageError, match=told):
        ifvp_at_x_datainf(loss, 0, DIMS, value, *arguments())


def test_regularization_that_was_left_out_before_the_arguments():
    told = r"regularization\[0\] is .*Param.*it comes before the arguments of func, also where it"
    with pytest.raises(IFVPUsageError, match=told) as raised:
        ifvp_at_x_datainf(loss, 0, DIMS, *arguments())
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("n", [0, 1, 3, 5])
def test_regularization_of_another_length(n):
    layered = rf"regularization has {n} numbers; expected one for all, or one per layer: 2, or "
    with pytest.raises(IFVPUsageError, match=layered + "one per parameter: 4"):
        ifvp_datainf(loss, 0, DIMS, [0.1] * n, [0, 0, 1, 1])
    refused(f"regularization has {n} numbers; expected one for all", 0, DIMS, [0.1] * n)


def test_regularization_that_differs_within_a_layer():
    told = r"regularization is 0.2 for parameter 2 and 0.3 for parameter 3.*both in layer 8; give"
    with pytest.raises(IFVPUsageError, match=told):
        ifvp_datainf(loss, 0, DIMS, [0.1, 0.1, 0.2, 0.3], [2, 2, 8, 8])
    refused(told, 0, DIMS, [0.1, 0.1, 0.2, 0.3], param_layer_map=[2, 2, 8, 8])


@pytest.mark.parametrize("layer_map", [[0, 0, 1], [0, 0, 1, 1, 2], []])
@pytest.mark.parametrize("regularization", [None, 0.1])
def test_a_map_of_another_length(layer_map, regularization):
    told = rf"param_layer_map has {len(layer_map)} numbers; expected one for each of the 4 tensors"
    refused(told, 0, DIMS, regularization, param_layer_map=layer_map)


@pytest.mark.parametrize(
    "layer_map",
    [
        [0, 0, 1.0, 1],
        [0, 0, "1", 1],
        [0, 0, None, 1],
        [0, 0, -1, 1],
        [False, True, 1, 1],
        "0011",
        torch.tensor([0.0, 0, 1, 1]),
        np.array(0),
        1,
        {0: 0},
    ],
)
def test_a_map_that_is_not_of_integers(layer_map):
    refused(
        r"param_layer_map is (?s:.*); expected a list with the number of a layer",
        0,
        DIMS,
        param_layer_map=layer_map,
    )


@pytest.mark.parametrize("argnums", [-1, -3, (0, -1), (), "0", [0], 0.0, None])
def test_argnums_is_an_index_of_at_least_zero(argnums):
    refused(r"argnums is .*; expected the index, of at least 0, of the argument", argnums, DIMS)


@pytest.mark.parametrize(
    ("argnums", "told"),
    [
        (3, r"argnums is 3, but func was given 3 argument.*0 to 2"),
        ((0, 0), "selects an argument twice"),
        (2, "argument 2 of func.*dtype torch.int64"),
    ],
)
def test_argnums_that_do_not_fit(argnums, told):
    refused(told, argnums, DIMS)


@pytest.mark.parametrize(
    ("in_dims", "told"),
    [
        ((None, 0), r"in_dims has 2 entries.*given 3 argument"),
        ((None, 0, 0, 0), r"in_dims has 4 entries.*given 3 argument"),
        ((0, 0, 0), "slices argument 0, but argnums selects"),
        ((None, None, None), "in_dims is .*a dimension for at least one"),
        ((), "in_dims is .*expected a tuple"),
        (0, "in_dims is 0; expected a tuple"),
        (None, "in_dims is None; expected a tuple"),
        ((None, 1, 0), "3 in argument 1, 30 in argument 2; expected the same number"),
        ((None, 0, 1), r"slices argument 2 along dimension 1.*shape \(30,\)"),
    ],
)
def test_in_dims_that_do_not_fit(in_dims, told):
    refused(told, 0, in_dims)


def test_no_examples():
    parameters, x, y = arguments()
    refused("there are no examples along in_dims", 0, DIMS, x=(parameters, x[:0], y[:0]))


@pytest.mark.parametrize("first", ["cpu", "meta"])
def test_parameters_on_several_devices(first):
    parameters, x, y = arguments()
    moved = [
        p if (i == 2) != (first == "cpu") else p.detach().to("meta")
        for i, p in enumerate(parameters)
    ]
    other = {"cpu": "meta", "meta": "cpu"}[first]
    told = rf"parameter 2 of .* is on {other}, but parameter 0 is on {first}; move all"
    refused(told, 0, DIMS, 0.1, x=(moved, x, y))


@pytest.mark.parametrize(
    ("result", "told"),
    [
        (lambda value: value.expand(2), r"shape \(2,\); expected one loss.*\.mean\(\).*in_dims"),
        (lambda value: value.reshape(1, 1), r"shape \(1, 1\); expected one loss"),
        (lambda value: (value, value), "returned a tuple; expected one loss"),
        (lambda value: value.detach(), "does not depend on argument 0"),
        (lambda value: value * torch.nan, "func's loss at example 0 is NaN or infinite"),
        (lambda value: (value * 0).sqrt(), "func's gradient at example 0 is NaN or infinite"),
    ],
)
@pytest.mark.parametrize("vectorized", [True, False])
def test_results_that_are_no_loss(result, told, vectorized):
    refused(told, 0, DIMS, 0.1, func=lambda *a: result((loss if vectorized else branching)(*a)))


@pytest.mark.parametrize("budget", [2**20, 4 * 8 * 26])
def test_losses_that_are_nan_name_the_example(budget, monkeypatch):
    monkeypatch.setattr("fimkit.operators.memory.BUDGET", budget)
    parameters, x, y = arguments()
    x[17, 1] = torch.nan
    refused("func's loss at example 17 is NaN", 0, DIMS, x=(parameters, x, y))


def test_func_is_a_callable_of_one_example():
    refused("func is a Tensor; expected a callable", 0, DIMS, func=torch.ones(3))
    refused("wrapped by per_example; give the loss of one", 0, DIMS, func=per_example(loss, DIMS))


def test_x_is_the_tuple_of_arguments():
    with pytest.raises(IFVPUsageError, match=r"x is a Tensor; expected the tuple.*\(x,\)"):
        ifvp_datainf(loss, 0, DIMS)(torch.ones(3), (torch.ones(3),))


def test_every_gradient_is_zero():
    def flat(weight, x):
        return (weight * 0 * x).sum()

    x = (randn(3), randn(N, 3))
    refused(
        "automatic regularization .* zero",
        0,
        (None, 0),
        error=SingularFisherError,
        x=x,
        v=x[0],
        func=flat,
    )
    assert close((ifvp_datainf(flat, 0, (None, 0), 0.5)(x, x[0]),), (2 * x[0],))


def test_a_regularization_that_vanishes_against_the_gradients():
    refused(r"regularization=1e-18.*larger", 0, DIMS, 1e-18, error=SingularFisherError)


def test_results_that_overflow():
    v = tuple(piece.half() for piece in per_parameter(randn(26)))
    told = r"The IFVP of v\[0\] overflows torch.float16; give a larger regularization"
    refused(told, 0, DIMS, 1e-6, error=SingularFisherError, v=v)


WEIGHT, BIAS = torch.zeros(4, 3), torch.zeros(4)
LAST = (torch.zeros(2, 4), torch.zeros(2))


@pytest.mark.parametrize(
    ("v", "told"),
    [
        (1.0, "v is a float; expected a tuple or list of tensors, one per layer or"),
        (None, "v is a NoneType; expected"),
        (np.zeros(26), "v is a ndarray; expected"),
        ((), r"v is a tuple of 0; expected .*one per layer: 2, or one per parameter: 4"),
        ([WEIGHT, BIAS, LAST[0]], "v is a list of 3; expected"),
        (torch.zeros(26), "v is one tensor; expected .*one per layer: 2"),
        ({"0.weight": WEIGHT}, "v is a mapping with the keys .*expected a tensor, or a tuple"),
        (((WEIGHT, BIAS), LAST), r"v\[0\] is of tuple; expected a floating-point torch tensor"),
        ((WEIGHT, BIAS, *LAST[:1], [0.0, 0.0]), r"v\[3\] is of list; expected"),
        ((WEIGHT, BIAS.long(), *LAST), r"v\[1\] is of torch.int64; expected a floating"),
        ((WEIGHT, BIAS + 0j, *LAST), r"v\[1\] is of torch.complex64; expected a floating"),
        (
            (WEIGHT.T, BIAS, *LAST),
            r"v\[0\] has shape \(3, 4\); expected \(12,\) or \(4, 3\).* k in",
        ),
        ((WEIGHT, BIAS[:3], *LAST), r"v\[1\] has shape \(3,\); expected \(4,\), the shape"),
        ((WEIGHT, BIAS[0], *LAST), r"v\[1\] has shape \(\); expected \(4,\)"),
        ((WEIGHT[None, None], BIAS, *LAST), r"v\[0\] has shape \(1, 1, 4, 3\); expected"),
        (
            (torch.zeros(16), torch.zeros(9)),
            r"v\[1\] has shape \(9,\); expected \(10,\), the shape",
        ),
        ((torch.zeros(4, 4), torch.zeros(10)), r"v\[0\] has shape \(4, 4\); expected \(16,\)"),
        ((torch.zeros(2, 16), torch.zeros(3, 10)), r"unlike numbers.*2 in v\[0\], 3 in v\[1\]"),
        ((torch.zeros(2, 4, 3), BIAS, *LAST), r"unlike numbers.*2 in v\[0\], 1 in v\[1\]"),
        ((WEIGHT + torch.nan, BIAS, *LAST), r"v\[0\] contains NaN or infinity"),
        ((torch.zeros(16), torch.full((10,), torch.inf)), r"v\[1\] contains NaN or infinity"),
    ],
)
def test_vectors_that_do_not_fit(v, told):
    refused(told, 0, DIMS, 0.1, v=v, param_layer_map=[0, 0, 1, 1])


@pytest.mark.parametrize("keys", [["0.weight"], [*SHAPES, "3.bias"], ["a", "b", "c", "d"]])
def test_a_mapping_with_other_keys(keys):
    parameters, x, y = arguments()
    named = dict(zip(SHAPES, parameters, strict=True))
    told = r"v is a mapping with the keys .*; expected the keys \['0.weight', '0.bias'"
    refused(told, 0, DIMS, 0.1, x=(named, x, y), v=dict.fromkeys(keys, torch.zeros(2)))
    deeper = ({"0": {"weight": parameters[0], "bias": parameters[1]}, "2": parameters[2:]}, x, y)
    refused(
        "expected a tensor, or a tuple or list",
        0,
        DIMS,
        0.1,
        func=lambda w, x, y: loss((*w["0"].values(), *w["2"]), x, y),
        x=deeper,
        v=dict.fromkeys(deeper[0], torch.zeros(2)),
    )


def test_data_without_numbers():
    parameters, x, y = arguments()
    refused("argument 1 of func is on the meta device", 0, DIMS, x=(parameters, x.to("meta"), y))
