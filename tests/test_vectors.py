"""Vectors in every container: what comes out is as what came in."""

import copy

import numpy as np
import pytest
import torch
from sklearn.base import clone

from fimkit import EKFAC, KFAC, Diagonal, Explicit, IFVPUsageError, ModelData
from fimkit.vectors import ParameterSpace
from tests import reference
from tests.cases import BY_NAME, mlp, points

CASE = BY_NAME["tied language model"]
REGULARIZATION = 1e-2


@pytest.fixture(scope="module")
def fitted():
    return Explicit(REGULARIZATION).fit(CASE.model(), CASE.batches(5))


@pytest.fixture(scope="module")
def shapes(fitted):
    return fitted.parameter_shapes_


def expected(vectors):
    return reference.ifvp(CASE.gradients, vectors, REGULARIZATION)


def flat(k=3):
    return CASE.gradients[:k].clone()


def by_name(vectors, shapes):
    """Cut ``(p,)`` or ``(k, p)`` vectors into one tensor per parameter."""
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    pieces = vectors.split(sizes, -1)
    lead = vectors.shape[:-1]
    return {
        name: piece.reshape(*lead, *shape)
        for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
    }


def joined(pieces, lead):
    first = len(lead)
    return torch.cat([torch.as_tensor(piece).flatten(first).double() for piece in pieces], -1)


CONTAINERS = {
    "dict": lambda pieces: pieces,
    "dict in another order": lambda pieces: dict(reversed(pieces.items())),
    "dict of arrays": lambda pieces: {name: piece.numpy() for name, piece in pieces.items()},
    "list": lambda pieces: list(pieces.values()),
    "tuple": lambda pieces: tuple(pieces.values()),
    "list of arrays": lambda pieces: [piece.numpy() for piece in pieces.values()],
}


@pytest.mark.parametrize("k", [None, 0, 1, 3])
@pytest.mark.parametrize("container", CONTAINERS)
def test_one_tensor_per_parameter(fitted, shapes, container, k):
    vectors = flat()[0] if k is None else flat(k)
    given = CONTAINERS[container](by_name(vectors, shapes))
    found = fitted.transform(given)
    assert type(found) is type(given)
    if isinstance(given, dict):
        assert set(found) == set(given)
        given, found = ([part[name] for name in shapes] for part in (given, found))
    for before, after in zip(given, found, strict=True):
        assert type(before) is type(after)
        assert before.shape == after.shape
        assert before.dtype == after.dtype
    out = joined(found, vectors.shape[:-1])
    assert out.shape == vectors.shape
    if k != 0:
        assert reference.error(torch.atleast_2d(out), expected(torch.atleast_2d(vectors))) <= 1e-9


@pytest.mark.parametrize(
    "estimator",
    [
        Explicit(solver="primal"),
        Explicit(solver="dual"),
        Explicit(blocks="layer"),
        EKFAC(),
        KFAC(),
        Diagonal(),
    ],
    ids=repr,
)
@pytest.mark.parametrize("container", [*CONTAINERS, "tensor", "array"])
def test_no_vectors(shapes, container, estimator):
    """What comes out is as empty as what came in, and no number is made up."""
    fitted = clone(estimator).set_params(regularization=0.1).fit(CASE.model(), CASE.batches(5))
    pieces = by_name(flat(0), shapes)
    given = {"tensor": flat(0), "array": flat(0).numpy()}.get(container)
    if given is None:
        given = CONTAINERS[container](pieces)
    for method in (fitted.transform, fitted.inverse_transform):
        found = method(given)
        assert type(found) is type(given)
        if isinstance(found, torch.Tensor | np.ndarray):
            assert found.shape == (0, 132)
            continue
        found = found if isinstance(found, dict) else dict(zip(shapes, found, strict=True))
        assert {name: tuple(piece.shape) for name, piece in found.items()} == {
            name: (0, *shape) for name, shape in shapes.items()
        }
    for method in (fitted.mahalanobis, fitted.score_samples):
        assert method(given).shape == (0,)
        assert method(given).dtype == np.float64
    for method in (fitted.score, lambda vectors: fitted.score_path(vectors, [0.1, 1])):
        with pytest.raises(IFVPUsageError, match="mean over vectors, and there are none"):
            method(given)


# The result is rounded to the vectors' own dtype, no more.
DTYPES = {
    torch.float64: 1e-9,
    torch.float32: 1e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 2e-2,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [None, 0, 1, 3])
@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_flat(fitted, dtype, k, library):
    if library == "numpy" and dtype == torch.bfloat16:
        dtype = torch.float64  # numpy has no bfloat16
    vectors = (flat()[0] if k is None else flat(k)).to(dtype)
    given = vectors.clone().numpy() if library == "numpy" else vectors.clone()
    found = fitted.transform(given)
    assert type(found) is type(given)
    assert found.shape == given.shape
    assert found.dtype == given.dtype
    assert torch.equal(torch.as_tensor(given), vectors), "vectors are not written to"
    if k != 0:
        out = torch.atleast_2d(torch.as_tensor(found))
        assert reference.error(out, expected(torch.atleast_2d(vectors))) <= DTYPES[dtype]


def test_dtypes_may_differ_between_parameters(fitted, shapes):
    pieces = by_name(flat(), shapes)
    first = next(iter(pieces))
    pieces[first] = pieces[first].float()
    found = fitted.transform(pieces)
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        name: tensor.dtype for name, tensor in pieces.items()
    }
    vectors = joined(pieces.values(), (3,))
    assert reference.error(joined(found.values(), (3,)), expected(vectors)) <= 1e-6


@pytest.mark.parametrize(
    "view",
    [
        lambda v: torch.stack([v, v], 2)[:, :, 0],
        lambda v: v.T.contiguous().T,
        lambda v: torch.cat([v, v])[::2],
        lambda v: v[:1].expand(3, -1),
        lambda v: np.asfortranarray(v.numpy()),
        lambda v: np.repeat(v.numpy(), 2, 1)[:, ::2],
        lambda v: v.numpy()[::-1],
        lambda v: v.numpy().astype(">f8"),
    ],
    ids=["inner stride", "transposed", "outer stride", "expanded", "Fortran order", "array stride",
         "negative stride", "big-endian"],
)  # fmt: skip
def test_memory_layouts(fitted, view):
    vectors = view(flat())
    found = fitted.transform(vectors)
    assert found.dtype == vectors.dtype
    values = torch.as_tensor(np.ascontiguousarray(vectors, dtype=float))
    assert reference.error(np.asarray(found, dtype=float), expected(values)) <= 1e-9


def test_read_only_arrays(fitted):
    vectors = flat().numpy()
    vectors.flags.writeable = False
    found = fitted.transform(vectors)
    assert found.flags.writeable
    assert reference.error(found, expected(flat())) <= 1e-9


def test_results_are_detached(fitted, shapes):
    """Vectors may carry a graph, as gradients taken with create_graph do."""
    vectors = flat().requires_grad_()
    assert not fitted.transform(vectors * 2).requires_grad
    pieces = by_name(vectors * 2, shapes)
    assert not any(piece.requires_grad for piece in fitted.transform(pieces).values())
    assert not fitted.transform(torch.nn.Parameter(flat())).requires_grad


def test_gradients_as_autograd_gives_them(fitted):
    """The tuple of torch.autograd.grad goes in as it is; a tied parameter is in it once."""
    model, batch = CASE.model(), CASE.batch()
    first = reference.take(batch, [0])
    gradients = torch.autograd.grad(CASE.example_loss(model, first), list(model.parameters()))
    found = fitted.transform(gradients)
    assert isinstance(found, tuple)
    assert reference.error(joined(found, ()), expected(flat(1))[0]) <= 1e-9


def test_model_data(fitted):
    """The gradients of its examples, batch by batch, as one array."""
    data = ModelData(CASE.model(), CASE.batch(), batch_size=5)
    found = fitted.transform(data[[3, 0, 7, 2, 4, 1]])
    assert isinstance(found, np.ndarray)
    assert reference.error(found, expected(CASE.gradients[[3, 0, 7, 2, 4, 1]])) <= 1e-9


def test_model_data_has_a_memory_guard(fitted, monkeypatch):
    data = ModelData(CASE.model(), CASE.batch())
    monkeypatch.setattr("fimkit.estimators.base._DENSE_LIMIT", 1000)
    with pytest.raises(IFVPUsageError, match=r"12 examples over 132 parameters.*fimkit\.influence"):
        fitted.transform(data)


def test_fit_transform():
    data = ModelData(CASE.model(), CASE.batch(), batch_size=5)
    found = Explicit(REGULARIZATION).fit_transform(data)
    assert reference.error(found, expected(CASE.gradients)) <= 1e-9


def test_inverse_transform(fitted):
    """The operator that transform inverts."""
    vectors = flat()
    damped = reference.damped(CASE.gradients, REGULARIZATION)
    assert reference.error(fitted.inverse_transform(vectors), vectors @ damped) <= 1e-12
    assert reference.error(fitted.inverse_transform(fitted.transform(vectors)), vectors) <= 1e-9


def test_mahalanobis(fitted, shapes):
    """vᵀ (F + λ I)⁻¹ v, in float64, whatever the container."""
    norms = (flat() * expected(flat())).sum(1)
    pieces = by_name(flat(), shapes)
    for vectors in (flat(), flat().numpy(), pieces, list(pieces.values())):
        found = fitted.mahalanobis(vectors)
        assert found.shape == (3,)
        assert found.dtype == np.float64
        assert reference.error(found, norms) <= 1e-9
    assert reference.error(fitted.mahalanobis(flat()[0]), norms[:1]) <= 1e-9
    assert fitted.mahalanobis(flat(0)).shape == (0,)
    data = ModelData(CASE.model(), CASE.batch(), batch_size=5)
    assert reference.error(fitted.mahalanobis(data[:3]), norms) <= 1e-9


def test_score(fitted):
    """The Gaussian log-likelihood under the covariance F + λ I."""
    damped = reference.damped(CASE.gradients, REGULARIZATION)
    normal = torch.distributions.MultivariateNormal(torch.zeros(len(damped)).double(), damped)
    expected = normal.log_prob(flat())
    assert fitted.score_samples(flat()) == pytest.approx(expected.numpy(), rel=1e-9)
    assert fitted.score(flat()) == pytest.approx(float(expected.mean()), rel=1e-9)
    path = fitted.score_path(flat(), [1e-1, REGULARIZATION])
    assert path[1] == pytest.approx(fitted.score(flat()), rel=1e-9)
    assert path[0] != pytest.approx(path[1], rel=1e-3)


# -- errors ----------------------------------------------------------------------------------------


def parameters(change):
    """Return a builder of a dict of vectors with a change made to it."""

    def build(shapes):
        pieces = by_name(flat(), shapes)
        return change(pieces)

    return build


def renamed(pieces):
    pieces["head.wrong"] = pieces.pop("final.weight")
    return pieces


def without(pieces):
    del pieces["final.weight"]
    return pieces


def misshaped(pieces):
    return {**pieces, "final.weight": pieces["final.weight"][:, :-1]}


def unequal(pieces):
    return {**pieces, "final.weight": pieces["final.weight"][:2]}


def partly_batched(pieces):
    return {**pieces, "final.weight": pieces["final.weight"][0]}


def with_value(value):
    def build(shapes):
        vectors = flat()
        vectors[1, 5] = value
        return vectors

    return build


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda s: flat()[:, :-1], r"shape \(3, 131\); expected \(132,\) or \(k, 132\)"),
        (lambda s: flat()[None], r"shape \(1, 3, 132\); expected \(132,\) or \(k, 132\)"),
        (lambda s: torch.tensor(1.0), r"shape \(\); expected"),
        (lambda s: flat().numpy().T, r"shape \(132, 3\)"),
        (parameters(renamed), r"lacks 'final\.weight' and has unknown 'head\.wrong'"),
        (parameters(without), r"lacks 'final\.weight'; expected exactly"),
        (parameters(misshaped), r"vectors\['final\.weight'\] has shape \(3, 3\); expected \(4,\)"),
        (parameters(unequal), r"differ in their leading size k.*'final\.weight': 2"),
        (parameters(partly_batched), r"differ in their leading size k.*'final\.weight': None"),
        (parameters(lambda p: list(p.values())[:-1]), "sequence of 7 arrays, but there are 8"),
        (lambda s: flat().long(), r"dtype torch\.int64.*floating"),
        (lambda s: flat().numpy().astype(int), r"dtype int64.*floating"),
        (lambda s: flat().bool(), r"dtype torch\.bool.*floating"),
        (lambda s: flat().numpy() > 0, "dtype bool.*floating"),
        (lambda s: flat().numpy().astype(object), "dtype object.*floating"),
        (lambda s: flat().numpy().astype(str), "dtype <U32.*floating"),
        (lambda s: flat().numpy().astype(complex), "dtype complex128"),
        (lambda s: flat().to(torch.complex64), r"dtype torch\.complex64"),
        (lambda s: flat().numpy().astype(np.longdouble), "which torch lacks; use float64"),
        (lambda s: flat().to(torch.float8_e5m2), r"float8_e5m2; use bfloat16 or wider"),
        (lambda s: flat().to_sparse(), r"dense tensor; got one of layout torch\.sparse_coo"),
        (lambda s: flat().to("meta"), "dense tensor; got one of layout .* on meta"),
        (lambda s: np.array(1.0), r"shape \(\); expected"),
        (lambda s: [], "sequence of 0 arrays, but there are 8"),
        (lambda s: {}, r"lacks 'positions'.*expected exactly"),
        (parameters(lambda p: dict(enumerate(p.values()))), "has unknown 0, 1, 2"),
        (parameters(lambda p: {**p, "head.weight": None}), r"unknown 'head\.weight'"),
        (parameters(lambda p: [None] * len(p)), r"vectors\['positions'\] is None.*backward"),
        (parameters(lambda p: {n: t.int() for n, t in p.items()}), r"vectors\['positions'\] has"),
        (lambda s: "gradients", "must be a numpy array.*got str"),
        (lambda s: 3.0, "must be a numpy array.*got float"),
        (lambda s: None, "must be a numpy array.*got NoneType"),
        (parameters(lambda p: [t.tolist() for t in p.values()]), "must be a numpy array.*got list"),
        (with_value(torch.nan), "NaN or infinity"),
        (with_value(torch.inf), "NaN or infinity"),
        (with_value(-torch.inf), "NaN or infinity"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["transform", "mahalanobis", "score"])
def test_errors(fitted, shapes, build, message, method):
    with pytest.raises(IFVPUsageError, match=message):
        getattr(fitted, method)(build(shapes))


@pytest.mark.parametrize("convert", [lambda v: v, torch.Tensor.numpy, list])
def test_results_that_exceed_float16_are_refused(fitted, shapes, convert):
    """Not infinite without a word: 10⁴ times the vector, where λ is 10⁻⁴ times as large."""
    vectors = torch.full((132,), 40.0, dtype=torch.float16)
    given = list(by_name(vectors, shapes).values()) if convert is list else convert(vectors)
    small = copy.deepcopy(fitted).set_params(regularization=1e-4)
    with pytest.raises(IFVPUsageError, match=r"result exceeds the range of float16.*a wider one"):
        small.transform(given)
    assert small.transform(vectors.float()).isfinite().all()


@pytest.mark.parametrize(
    ("regularizations", "message"),
    [
        ([], r"regularizations=\[\]; expected a sequence of at least one number"),
        ("auto", "regularizations='auto'; expected a sequence"),
        (1.0, r"regularizations=1\.0; expected a sequence"),
        (None, "regularizations=None; expected a sequence"),
        ({0.1: 0.2}, "expected a sequence"),
        (np.array(1.0), r"regularizations=array\(1\.\); expected a sequence"),
        (np.empty(0), "expected a sequence of at least one number"),
        ([0.1, "1"], r"regularizations\[1\] is '1'; expected a number"),
        ([[0.1]], r"regularizations\[0\] is \[0\.1\]; expected a number"),
        ([0.1, -1], r"regularizations\[1\] is -1\.0; expected a finite number, not negative"),
        ([torch.nan], r"regularizations\[0\] is nan; expected a finite number"),
    ],
)
def test_errors_of_paths(fitted, regularizations, message):
    with pytest.raises(IFVPUsageError, match=message):
        fitted.score_path(flat(), regularizations)


def test_kinds_of_paths(fitted):
    expected = fitted.score_path(flat(), [0.5, 1.0])
    for path in ((0.5, 1), np.array([0.5, 1]), torch.tensor([0.5, 1]), [np.float32(0.5), 1]):
        assert np.array_equal(fitted.score_path(flat(), path), expected)


@pytest.mark.parametrize("frozen", [False, True])
def test_width_of_the_full_model(frozen):
    """Vectors of all parameters, where only some were selected or are trainable."""
    model = mlp().double()
    p = sum(parameter.numel() for parameter in model.parameters())
    estimator = Explicit() if frozen else Explicit(parameters="0.*")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or name.startswith("0."))
    fitted = estimator.fit(model, [points()(5, torch.Generator().manual_seed(0))])
    message = (
        rf"shape \({p},\); expected \(36,\).*width of {p} is that of the full model.*36 numbers"
    )
    with pytest.raises(IFVPUsageError, match=message):
        fitted.transform(torch.ones(p))


def test_model_data_of_another_model(fitted):
    data = ModelData(mlp().double(), points()(5, torch.Generator().manual_seed(0)))
    with pytest.raises(IFVPUsageError, match="other trainable parameters than the one fitted"):
        fitted.transform(data)


# -- the space of parameters -----------------------------------------------------------------------


class TestParameterSpace:
    space = ParameterSpace({"a": (2, 3), "b": (), "c": (4,)}, 20)

    def test_places(self):
        assert self.space.size == 11
        assert self.space.slices == {"a": slice(0, 6), "b": slice(6, 7), "c": slice(7, 11)}

    def test_scalar_parameters(self):
        vectors = {"a": torch.ones(2, 3), "b": torch.tensor(2.0), "c": torch.zeros(4)}
        found, restore = self.space.flatten(vectors)
        assert found.tolist() == [[1.0] * 6 + [2.0] + [0.0] * 4]
        back = restore(found * 2)
        assert back["b"].shape == ()
        assert back["b"] == 4

    def test_several_vectors_of_scalars(self):
        vectors = {"a": np.ones((5, 2, 3)), "b": np.arange(5.0), "c": np.zeros((5, 4))}
        found, restore = self.space.flatten(vectors)
        assert found.shape == (5, 11)
        assert found[:, 6].tolist() == [0, 1, 2, 3, 4]
        assert restore(found)["b"].shape == (5,)
