"""λ: applied when solving, 'auto', one per block, and none."""

from types import MappingProxyType

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.utils._param_validation import InvalidParameterError
from torch import nn

from fimkit import Explicit, IFVPUsageError, SingularFisherError
from tests import reference
from tests.cases import BY_NAME, Apply, N, points

CASE = BY_NAME["mlp"]
LAYERS = ("0", "2", "4")

# Blocks by the estimator's parameter, as the parameters' names in each.
NAMES = [f"{layer}.{kind}" for layer in LAYERS for kind in ("weight", "bias")]
MAPPING = {"ends": ["0.*", "4.*"], "middle": ["2.weight"], "bias": "2.bias"}
BLOCKS = {
    "all": (NAMES,),
    "layer": tuple([f"{layer}.weight", f"{layer}.bias"] for layer in LAYERS),
    "parameter": tuple([name] for name in NAMES),
    "mapping": (["0.weight", "0.bias", "4.weight", "4.bias"], ["2.weight"], ["2.bias"]),
}
BLOCK_NAMES = {
    "all": ("all",),
    "layer": LAYERS,
    "parameter": tuple(NAMES),
    "mapping": tuple(MAPPING),
}


def argument(blocks):
    return MAPPING if blocks == "mapping" else blocks


def columns(case, names):
    """Return the places of parameters in the flat vector."""
    places, start = {}, 0
    for name, parameter in case.model().named_parameters():
        places[name] = range(start, start + parameter.numel())
        start += parameter.numel()
    return [i for name in names for i in places[name]]


def block_columns(blocks):
    return [columns(CASE, names) for names in BLOCKS[blocks]]


def fit(blocks="all", regularization="auto", solver="auto", case=CASE):
    estimator = Explicit(regularization, blocks=argument(blocks), solver=solver, loss=case.loss)
    return estimator.fit(case.model(), case.batches(5))


# -- lazy ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["primal", "dual"])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_setting_it_equals_a_refit(blocks, solver):
    fitted = fit(blocks, 1e-1, solver)
    vectors = CASE.gradients
    for regularization in (1e-3, "auto", 1e-1, 1e-6):
        found = fitted.set_params(regularization=regularization).transform(vectors)
        again = fit(blocks, regularization, solver).transform(vectors)
        assert reference.error(found, again) <= 1e-12
        norms = fitted.mahalanobis(vectors)
        again = fit(blocks, regularization, solver).mahalanobis(vectors)
        assert reference.error(norms, again) <= 1e-12


def test_it_is_not_added_up():
    """Solving at one λ leaves nothing behind for the next."""
    fitted = fit(regularization=1.0)
    first = fitted.transform(CASE.gradients)
    matrix = fitted.fisher_.to_dense()
    for _ in range(3):
        fitted.set_params(regularization=0.5).transform(CASE.gradients)
        assert torch.equal(fitted.set_params(regularization=1.0).transform(CASE.gradients), first)
    assert torch.equal(fitted.fisher_.to_dense(), matrix)


@pytest.mark.parametrize(
    "value",
    [1, np.float32(1), np.float64(1), np.int64(1), np.array(1.0), torch.tensor(1.0)],
    ids=repr,
)
def test_kinds_of_numbers(value):
    fitted = fit(regularization=value)
    assert fitted.regularization_ == 1.0
    expected = reference.ifvp(CASE.gradients, CASE.gradients, 1.0)
    assert reference.error(fitted.transform(CASE.gradients), expected) <= 1e-9


# -- auto ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", BLOCKS)
def test_auto_is_a_tenth_of_the_mean_diagonal(blocks):
    places = block_columns(blocks)
    expected = [reference.automatic(CASE.gradients, block) for block in places]
    found = fit(blocks).regularization_
    if blocks == "all":
        assert found == pytest.approx(expected[0], rel=1e-12)
        return
    assert tuple(found) == BLOCK_NAMES[blocks]
    assert list(found.values()) == pytest.approx(expected, rel=1e-12)


def test_auto_of_a_block_without_gradient_is_the_whole_models():
    """As of LoRA's A while its B is zero."""

    def forward(self, x):
        return self.layer(x) + self.b(self.a(x))

    model = Apply(
        forward,
        layer=nn.Linear(5, 3),
        a=nn.Linear(5, 2, bias=False),
        b=nn.Linear(2, 3, bias=False),
    ).double()
    nn.init.zeros_(model.b.weight)
    batch = points()(N, torch.Generator().manual_seed(0))
    rows = reference.gradients(model, reference.negative_log_likelihood, batch, N)
    assert not rows[:, 18:28].any()
    fitted = Explicit(blocks="layer").fit(model, [batch])
    assert fitted.regularization_ == pytest.approx(
        {
            "layer": reference.automatic(rows, slice(0, 18)),
            "a": reference.automatic(rows),
            "b": reference.automatic(rows, slice(28, 34)),
        },
        rel=1e-12,
    )
    vectors = torch.randn(2, rows.shape[1], dtype=torch.float64)
    blocks = [range(18), range(18, 28), range(28, 34)]
    expected = reference.ifvp(rows, vectors, fitted.regularization_.values(), blocks)
    assert reference.error(fitted.transform(vectors), expected) <= 1e-9


def test_auto_of_no_gradient_at_all_is_refused():
    model = Apply(lambda self, x: 0 * self.layer(x), layer=nn.Linear(5, 3)).double()
    batch = points()(N, torch.Generator().manual_seed(0))
    fitted = Explicit(loss="mse").fit(model, [(batch[0], torch.zeros(N, 3).double())])
    with pytest.raises(SingularFisherError, match=r"trace, which is zero.*Give a number"):
        fitted.transform(torch.ones(18))
    found = fitted.set_params(regularization=0.5).transform(torch.ones(18))
    assert torch.equal(found, torch.full((18,), 2.0))


# -- blocks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["auto", "primal", "dual"])
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("kind", ["number", "list", "tuple", "array", "tensor", "mapping"])
def test_blocks_equal_dense_blocks(blocks, kind, solver):
    places = block_columns(blocks)
    values = [1e-3 * (i + 1) for i in range(len(places))]
    fitted = fit(blocks, "auto", solver)
    if kind == "number":
        values = [2e-3] * len(places)
        given = 2e-3
    elif kind == "mapping":
        given = MappingProxyType(dict(zip(BLOCK_NAMES[blocks], values, strict=True)))
    else:
        given = {"list": list, "tuple": tuple, "array": np.array, "tensor": torch.tensor}[kind](
            values
        )
    fitted.set_params(regularization=given)
    vectors = CASE.gradients
    expected = reference.ifvp(vectors, vectors, values, places)
    tolerance = 1e-6 if kind == "tensor" else 1e-9  # torch.tensor rounds λ to float32
    assert reference.error(fitted.transform(vectors), expected) <= tolerance
    norms = (vectors * expected).sum(1)
    assert reference.error(fitted.mahalanobis(vectors), norms) <= tolerance
    dense = reference.fisher(vectors, places)
    assert float((fitted.fisher_.to_dense() - dense).norm()) <= 1e-12 * float(dense.norm())
    assert fitted.fisher_.trace() == pytest.approx(float(dense.trace()), rel=1e-12)


def test_layers_are_modules():
    """The parameters of one module, its children apart; those of the root are 'model'."""
    model = BY_NAME["language model"].model()
    fitted = Explicit(1e-2, blocks="layer").fit(model, BY_NAME["language model"].batches(5))
    expected = ["model", "tokens", "norm", "attention.qkv", "attention.out", "final", "head"]
    assert list(fitted.set_params(regularization="auto").regularization_) == expected


def test_blocks_that_cut_a_layer_in_two():
    """A bias apart from its weight, and a block whose parameters are not neighbours."""
    case = BY_NAME["language model"]
    blocks = {
        "biases": ["*bias"],
        "embeddings": ["tokens.*", "positions", "head.*"],
        "rest": ["norm.weight", "final.weight", "attention.*.weight"],
    }
    names = [
        ["norm.bias", "attention.qkv.bias"],
        ["positions", "tokens.weight", "head.weight"],
        ["norm.weight", "attention.qkv.weight", "attention.out.weight", "final.weight"],
    ]
    places = [columns(case, part) for part in names]
    values = [1e-3, 1e-2, 1e-1]
    estimator = Explicit(values, blocks=blocks)
    fitted = estimator.fit(case.model(), case.batches(5))
    expected = reference.ifvp(case.gradients, case.gradients, values, places)
    assert reference.error(fitted.transform(case.gradients), expected) <= 1e-9


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"a": ["0.*"], "b": ["2.*"]}, r"'4\.weight', '4\.bias' belong to no block"),
        ({}, r"'0\.weight', .*'4\.bias' belong to no block"),
        ({"a": "*", "b": "*"}, r"'0\.weight' is in both 'a' and 'b'"),
        ({"a": 3}, r"blocks\['a'\] is 3; expected names of parameters"),
        ({"a": ["*", 3]}, r"blocks\['a'\] holds a int; expected names of parameters"),
        ({"a": "*", "b": []}, r"blocks\['b'\] is empty; give at least one name"),
        ({0: "*"}, "blocks has the key 0; the name of a block is a string"),
        ({"a": ["*"], "b": ["2.bias"]}, r"'2\.bias' is in both 'a' and 'b'"),
        ({"a": ["*"], "b": ["nothing.*"]}, r"blocks\['b'\]: 'nothing\.\*' matches none of"),
    ],
)
def test_errors_of_blocks(blocks, message):
    with pytest.raises(IFVPUsageError, match=message):
        Explicit(blocks=blocks).fit(CASE.model(), CASE.batches(5))


# -- errors of λ -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "value", "message"),
    [
        ("all", -1e-3, "-0.001; expected a finite number, not negative"),
        ("all", float("nan"), "nan; expected a finite number"),
        ("all", float("inf"), "inf; expected a finite number"),
        ("all", "automatic", "regularization='automatic'; expected 'auto'"),
        ("all", None, "regularization=None; expected 'auto', a number"),
        ("all", True, "regularization=True; expected 'auto', a number"),
        ("all", np.True_, r"regularization=np\.True_; expected 'auto', a number"),
        ("all", 1j, "regularization=1j; expected 'auto', a number"),
        ("all", b"auto", "regularization=b'auto'; expected 'auto', a number"),
        ("all", {1.0}, r"regularization=\{1\.0\}; expected 'auto', a number"),
        ("all", np.array("auto"), "expected 'auto', a number"),
        ("all", np.array(True), r"regularization=array\(True\); expected 'auto', a number"),
        ("all", torch.tensor(torch.nan), "nan; expected a finite number"),
        ("all", ["auto"], r"regularization\[0\] is 'auto'; expected a number"),
        ("all", [True], r"regularization\[0\] is True; expected a number"),
        ("all", [None], r"regularization\[0\] is None; expected a number"),
        ("all", [[1e-3]], r"regularization\[0\] is \[0\.001\]; expected a number"),
        ("all", np.ones((1, 1)), r"regularization\[0\] is array\(\[1\.\]\); expected a number"),
        ("all", [torch.nan], r"regularization\[0\] is nan; expected a finite number"),
        ("all", [], "0 values; expected one number, or one per block"),
        ("all", {}, r"keys \[\]; expected one per block: \['all'\]"),
        ("all", {0: 1.0}, r"keys \[0\]; expected one per block: \['all'\]"),
        ("all", {"all": "1"}, "regularization of block 'all' is '1'; expected a number"),
        ("layer", [1e-3, 1e-3], r"2 values; expected one number, or one per block: 3 \(0, 2, 4\)"),
        ("layer", [1e-3, -1, 1e-3], r"regularization\[1\] is -1\.0; expected a finite number"),
        ("layer", {"0": 1.0, "2": -1, "4": 1}, "block '2' is -1.0; expected a finite number"),
        ("layer", {"0": 1.0, "2": 1.0}, r"keys \['0', '2'\]; expected one per block: \['0', '2',"),
        ("layer", {"0": 1.0, "2": 1.0, "head": 1.0}, r"keys \['0', '2', 'head'\]"),
    ],
)
def test_errors(blocks, value, message):
    fitted = fit(blocks)
    fitted.set_params(regularization=value)
    for method in (fitted.transform, fitted.mahalanobis, fitted.inverse_transform):
        with pytest.raises(IFVPUsageError, match=message):
            method(CASE.gradients)
    with pytest.raises(IFVPUsageError, match=message):
        _ = fitted.regularization_
    with pytest.raises((IFVPUsageError, InvalidParameterError)):
        clone(fitted).fit(CASE.model(), CASE.batches(5)).transform(CASE.gradients)


# -- none ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["dual", "primal"])
@pytest.mark.parametrize("regularization", [0, 1e-20])
def test_singular(solver, regularization):
    """Never NaN or inf, and never a meaningless number: p > n has no inverse."""
    fitted = fit("all", regularization, solver)
    for method in (fitted.transform, fitted.mahalanobis):
        with pytest.raises(SingularFisherError, match=r"singular.*larger regularization"):
            method(CASE.gradients)
    fitted.set_params(regularization="auto")
    assert fitted.transform(CASE.gradients).isfinite().all()


def test_singular_in_one_block():
    fitted = fit("layer", [0.0, 1e-2, 1e-2])
    with pytest.raises(SingularFisherError, match="larger regularization"):
        fitted.transform(CASE.gradients)


def test_no_regularization_where_there_is_an_inverse():
    model = nn.Linear(3, 2).double()
    x, _ = points(3)(40, torch.Generator().manual_seed(0))
    y = torch.randn(40, 2, dtype=torch.float64)
    rows = reference.gradients(model, reference.half_squared_error, (x, y), 40)
    assert torch.linalg.cond(reference.fisher(rows)) < 1e3
    fitted = Explicit(0, loss="mse").fit(model, [(x, y)])
    expected = reference.ifvp(rows, rows, 0.0)
    assert reference.error(fitted.transform(rows), expected) <= 1e-9
    norms = (rows * expected).sum(1)
    assert reference.error(fitted.mahalanobis(rows), norms) <= 1e-9
    dual = Explicit(0, loss="mse", solver="dual").fit(model, [(x, y)])
    with pytest.raises(SingularFisherError, match="larger regularization"):
        dual.transform(rows)
