"""Fitted estimators in files."""

import copy
import hashlib
import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from torch import nn

import fimkit
from fimkit import (
    EKFAC,
    KFAC,
    DataInf,
    Diagonal,
    Explicit,
    IFVPUsageError,
    ModelData,
    RegularizationCV,
    influence,
    serialization,
)
from tests.cases import BY_NAME, CASES
from tests.formats import write

FORMATS = Path(__file__).parent / "formats"

METHODS = [
    Explicit(1e-2, solver="primal"),
    Explicit(1e-2, solver="dual"),
    Explicit(1e-2, blocks="layer"),
    DataInf(1e-2),
    DataInf(1e-2, blocks="parameter"),
    EKFAC(1e-2),
    KFAC(1e-2),
    Diagonal(1e-2),
]
CASE = BY_NAME["mlp"]


def answers(fitted, data):
    """Return everything that a fitted estimator answers, on vectors and on a ModelData."""
    rows = fitted.transform(data)
    out = [np.asarray(influence.self_influence(fitted, data))]
    for vectors in (rows, data):
        out += [
            fitted.transform(vectors),
            fitted.inverse_transform(vectors),
            fitted.mahalanobis(vectors),
            fitted.score_samples(vectors),
            fitted.score_path(vectors, [1e-2, 1.0]),
        ]
    return out


def assert_alike(loaded, fitted, data):
    assert type(loaded) is type(fitted)
    assert repr(loaded) == repr(fitted)
    for one, other in zip(answers(loaded, data), answers(fitted, data), strict=True):
        assert one.dtype == other.dtype
        assert np.array_equal(one, other)
    names = {name for name in vars(fitted) if name.endswith("_")} - {"fisher_"}
    assert names >= {"coverage_", "device_", "dtype_", "n_features_in_", "parameter_shapes_"}
    for name in names | {"regularization_"}:
        assert getattr(loaded, name) == getattr(fitted, name), name
    for regularization in ("auto", 0.5):
        loaded = copy.copy(loaded).set_params(regularization=regularization)
        fitted = copy.copy(fitted).set_params(regularization=regularization)
        assert np.array_equal(loaded.transform(data), fitted.transform(data))


@pytest.mark.parametrize("fisher", ["empirical", "mc", "exact"])
@pytest.mark.parametrize("estimator", METHODS, ids=repr)
def test_a_loaded_estimator_answers_alike(estimator, fisher, tmp_path):
    data = ModelData(CASE.model(), CASE.batch(), batch_size=5)
    fitted = clone(estimator).set_params(fisher=fisher, n_mc_samples=2, random_state=3).fit(data)
    fitted.save(tmp_path / "fitted")
    loaded = fimkit.load(tmp_path / "fitted")
    assert_alike(loaded, fitted, data)
    again = clone(loaded).fit(data)
    assert np.array_equal(again.transform(data), fitted.transform(data))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("estimator", [DataInf(1e-2), EKFAC(1e-2)], ids=repr)
def test_every_layer_type(case, estimator, tmp_path):
    fitted = clone(estimator).set_params(loss=case.loss).fit(case.model(), case.batches(5))
    fitted.save(tmp_path / "fitted")
    loaded = fimkit.load(tmp_path / "fitted", loss=case.loss)
    for damping in (1e-2, 1.0):
        found, expected = (each.fisher_.to_dense(damping) for each in (loaded, fitted))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtypes(dtype, tmp_path):
    data = ModelData(CASE.model(), CASE.batch())
    fitted = DataInf(1e-2, dtype=dtype).fit(data)
    fitted.save(tmp_path / "fitted")
    assert_alike(fimkit.load(tmp_path / "fitted"), fitted, data)


PARAMETERS = [
    {"regularization": [1e-2, 1e-1], "parameters": ["0.*", "2.*"]},
    {"regularization": {"0": 1e-2, "2": np.float64(1e-1)}, "parameters": ("0.*", "2.*")},
    {"regularization": np.array([1e-2, 1e-1]), "parameters": np.array(["0.*", "2.*"])},
    {"regularization": torch.tensor([1e-2, 1e-1]), "parameters": ["0.*", "2.*"]},
    {"blocks": {"a": "0.*", "b": ["2.*", "4.*"]}, "regularization": "auto"},
    {"blocks": (0, 0, 1, 1, 0, 0), "dtype": torch.float64, "device": torch.device("cpu")},
    {"random_state": np.random.RandomState(3), "fisher": "mc", "verbose": True},
    {"loss": fimkit.losses.LOSSES["cross_entropy"](), "regularization": np.int64(2)},
]


@pytest.mark.parametrize("parameters", PARAMETERS, ids=lambda settings: " ".join(settings))
def test_parameters(parameters, tmp_path):
    data = ModelData(CASE.model(), CASE.batch())
    fitted = Explicit(blocks="layer").set_params(**parameters).fit(data)
    fitted.save(tmp_path / "fitted")
    loaded = fimkit.load(tmp_path / "fitted")
    assert np.array_equal(loaded.transform(data), fitted.transform(data))
    for name, value in fitted.get_params().items():
        found = getattr(loaded, name)
        if name == "random_state" and value is not None:
            assert found.randint(1000, size=9).tolist() == value.randint(1000, size=9).tolist()
        elif name == "loss" and not isinstance(value, str):
            assert type(found) is type(value)
        elif isinstance(value, np.generic):
            assert found == value
        else:
            assert type(found) is type(value)
            assert np.array_equal(found, value)


def test_rows_in_a_folder(tmp_path):
    data = ModelData(CASE.model(), CASE.batch(), batch_size=5)
    fitted = DataInf(1e-2, storage=tmp_path / "rows").fit(data)
    fitted.save(tmp_path / "fitted")
    loaded = fimkit.load(tmp_path / "fitted")
    expected = fitted.transform(data)
    del fitted
    assert np.array_equal(loaded.transform(data), expected)
    assert loaded.storage == tmp_path / "rows"


def own_loss(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y, reduction="none")


@pytest.mark.parametrize(
    ("loss", "name"), [(own_loss, "own_loss"), (nn.CrossEntropyLoss(), "CrossEntropyLoss")]
)
def test_losses_that_are_code_are_given_again(loss, name, tmp_path):
    data = ModelData(CASE.model(), CASE.batch())
    fitted = EKFAC(1e-2, loss=loss).fit(data)
    fitted.save(tmp_path / "fitted")
    with pytest.raises(IFVPUsageError, match=rf"loss of its own, {name},.*load\(path, loss=...\)"):
        fimkit.load(tmp_path / "fitted")
    loaded = fimkit.load(tmp_path / "fitted", loss=loss)
    assert loaded.loss is loss
    assert np.array_equal(loaded.transform(data), fitted.transform(data))


def test_the_chosen_of_a_search(tmp_path):
    data = ModelData(CASE.model(), CASE.batch())
    search = RegularizationCV(EKFAC(), [1e-2], cv=2).fit(data)
    search.save(tmp_path / "fitted")
    assert_alike(fimkit.load(tmp_path / "fitted"), search.estimator_, data)


def test_size():
    """A fit of a 1,210-parameter network takes less than 100 KB, in a pickle and in a file."""
    model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    data = ModelData(model, (torch.randn(300, 64), torch.arange(300) % 10))
    fitted = EKFAC().fit(data)
    assert fitted.n_features_in_ == 1210
    assert len(pickle.dumps(fitted)) < 100_000


def test_is_safetensors(tmp_path):
    """The library of that name reads the same tensors."""
    safetensors = pytest.importorskip("safetensors.torch")
    fitted = EKFAC(1e-2).fit(CASE.model(), CASE.batches(5))
    fitted.save(tmp_path / "fitted")
    tensors = safetensors.load_file(tmp_path / "fitted")
    assert any(torch.equal(t, fitted.eigenvalues_["0"]) for t in tensors.values())


@pytest.mark.cuda
def test_cuda(tmp_path):
    model = CASE.model().cuda()
    x, y = CASE.batch()
    fitted = EKFAC(1e-2).fit(model, [(x.cuda(), y.cuda())])
    fitted.save(tmp_path / "fitted")
    for device in ("cpu", "cuda"):
        loaded = fimkit.load(tmp_path / "fitted", device=device)
        assert loaded.device_.type == loaded.fisher_.device.type == device
        expected = fitted.transform(CASE.gradients)
        assert torch.allclose(loaded.transform(CASE.gradients), expected, rtol=1e-9)


# -- what is refused -------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    fitted = EKFAC(1e-2).fit(CASE.model(), CASE.batches(5))
    path = tmp_path / "fitted.fimkit"
    fitted.save(path)
    return path


def changed(path, change, *, keep_digest=False):
    """Let ``change`` edit the description of a file, and its header in it."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    description = json.loads(content[8 : 8 + length])
    header = json.loads(description["__metadata__"]["header"])
    change(description, header)
    metadata = description.get("__metadata__", {})
    if "header" in metadata:
        metadata["header"] = json.dumps(header)
        if not keep_digest:
            digest = hashlib.sha256(metadata["header"].encode()).hexdigest()
            metadata["header_sha256"] = digest
    encoded = json.dumps(description).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + length :])


def test_every_truncation_is_refused(saved):
    content = saved.read_bytes()
    for end in {*range(0, len(content), 97), *range(12), len(content) - 1}:
        saved.write_bytes(content[:end])
        with pytest.raises(IFVPUsageError, match=re.escape(repr(str(saved)))):
            fimkit.load(saved)
    saved.write_bytes(content + b"\0")
    with pytest.raises(IFVPUsageError, match=r"take \d+ bytes, and \d+ are there"):
        fimkit.load(saved)


@pytest.mark.parametrize(
    "content",
    [b"", b"fimkit", b"\0" * 100, b"\xff" * 100, pickle.dumps({}), b"\2\0\0\0\0\0\0\0{}"],
    ids=repr,
)
def test_foreign_files_are_refused(content, tmp_path):
    path = tmp_path / "foreign"
    path.write_bytes(content)
    with pytest.raises(IFVPUsageError, match="is no file of fimkit, or not a whole one"):
        fimkit.load(path)
    torch.save({"x": torch.ones(3)}, path)
    with pytest.raises(IFVPUsageError, match="is no file of fimkit"):
        fimkit.load(path)


def eigenvalues_of(description):
    return next(name for name in description if name.endswith("eigenvalues"))


def other_version(description, header):
    description["__metadata__"].update(format_version="2", fimkit_version="9.0")


def other_format(description, header):
    description["__metadata__"]["format"] = "pt"


def other_shape(description, header):
    description[eigenvalues_of(description)]["shape"][0] = 7


def turned_shape(description, header):
    description[eigenvalues_of(description)]["shape"].reverse()


def negative_shape(description, header):
    description[eigenvalues_of(description)]["shape"][0] = -1


def other_dtype(description, header):
    description[eigenvalues_of(description)]["dtype"] = "F8"


def overlap(description, header):
    description[eigenvalues_of(description)]["data_offsets"] = [0, 8]


def shifted(description, header):
    """The bytes of the first tensor are those of the next, in part."""
    entry = next(entry for name, entry in description.items() if name != "__metadata__")
    entry["data_offsets"] = [offset + 8 for offset in entry["data_offsets"]]


def lost_tensor(description, header):
    text = json.dumps(header["fitted"]).replace(eigenvalues_of(description), "lost")
    header["fitted"] = json.loads(text)


def other_class(description, header):
    header["class"] = "os.system"


def other_kind(description, header):
    header["fitted"] = {"is": "Popen", "args": "true"}


def other_parameter(description, header):
    header["parameters"]["items"].append(["damping", 1])


def other_size(description, header):
    items = header["fitted"]["items"]
    header["fitted"]["items"] = [[k, 7 if k == "n_features_in_" else v] for k, v in items]


def endless_shape(description, header):
    description["none"] = {"dtype": "F32", "shape": [0, 2**70], "data_offsets": [0, 0]}
    description.update({name: description.pop(name) for name in [*description] if name != "none"})


def lost_attribute(description, header):
    items = header["fitted"]["items"]
    header["fitted"]["items"] = [item for item in items if item[0] != "_space"]


@pytest.mark.parametrize(
    "name", ["dtype_", "coverage_", "n_samples_seen_", "_settings", "_traces", "parameter_names_"]
)
@pytest.mark.parametrize("value", ["lost", None, 1.5, 2**70])
def test_fitted_attributes_are_checked(saved, name, value):
    def change(description, header):
        items = [item for item in header["fitted"]["items"] if item[0] != name]
        header["fitted"]["items"] = items + [[name, value]] * (value != "lost")

    if (name, value) == ("n_samples_seen_", 2**70):
        return  # it is an integer
    changed(saved, change)
    with pytest.raises(IFVPUsageError, match=f"is damaged.*{name}"):
        fimkit.load(saved)


@pytest.mark.parametrize(
    ("pattern", "other"),
    [('"transposed": false', '"transposed": true'), ('"bias": true', '"bias": false')],
)
def test_a_header_changed_by_hand_is_refused(saved, pattern, other):
    """Its numbers would be others, where nothing else shows that."""

    def change(description, header):
        written = json.dumps(header["fitted"])
        assert pattern in written
        header["fitted"] = json.loads(written.replace(pattern, other))

    changed(saved, change, keep_digest=True)
    with pytest.raises(IFVPUsageError, match="is damaged: its header is not the one"):
        fimkit.load(saved)


def test_integers_without_end_are_refused(saved):
    def change(description, header):
        written = json.dumps(header["fitted"])
        header["fitted"] = json.loads(re.sub(r'"groups": \d+', f'"groups": {2**70}', written))

    changed(saved, change)
    with pytest.raises(IFVPUsageError, match="is damaged"):
        fimkit.load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_version, r"by fimkit 9.0 in version 2 .*up to 1; install a later fimkit"),
        (other_format, "no file of fimkit"),
        (other_shape, "is damaged.*is said to be bytes"),
        (turned_shape, "is damaged.*shapes of a EigenKroneckerOperator do not fit"),
        (negative_shape, r"is damaged.*has the shape \[-1"),
        (endless_shape, "is damaged"),
        (other_dtype, "is damaged"),
        (overlap, "is damaged.*bytes 0 to 8"),
        (shifted, r"is damaged.*is said to be bytes 8 to \d+"),
        (lost_tensor, "is damaged.*lost"),
        (other_class, "is damaged.*os.system"),
        (other_kind, "is damaged.*'Popen' is nothing that is kept in files"),
        (other_parameter, "is damaged.*damping"),
        (other_size, "is damaged.*parameters"),
        (lost_attribute, "is damaged.*_space"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damaged_files_are_refused(saved, change, message):
    fimkit.load(saved)
    changed(saved, lambda description, header: None)
    fimkit.load(saved)
    changed(saved, change)
    with pytest.raises(IFVPUsageError, match=message):
        fimkit.load(saved)


class Network(write.Network):
    """Rows of every form: looked up, dense, factored, and none."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(2, 2)


def rewritten(estimator, change, path):
    """Fit and save an estimator, and let ``change`` edit what is saved and its tensors."""
    batch = torch.randint(7, (6, 2)), torch.arange(6) % 4
    fitted = clone(estimator).set_params(fisher="exact").fit(Network().double(), [batch])
    fitted.save(path)
    fimkit.load(path)
    header, tensors = serialization.read(path)
    change(dict(header["fitted"]["items"]), tensors)
    serialization.write(path, header, tensors)


def described(node, kind):
    """Yield the descriptions of everything of a kind."""
    if isinstance(node, dict) and node.get("is") == kind:
        yield node
    for inner in node.values() if isinstance(node, dict) else node:
        if isinstance(inner, dict | list):
            yield from described(inner, kind)


PRIMAL, DUAL = Explicit(1e-2, solver="primal"), Explicit(1e-2, solver="dual")
FIELDS = [
    (PRIMAL, "DenseOperator", ["matrix"]),
    (PRIMAL, "Columns", ["parts"]),
    (PRIMAL, "ParameterSpace", ["shapes", "full_size"]),
    (PRIMAL, "Settings", ["objective", "seed", "patterns", "dtype", "verbose"]),
    (PRIMAL, "Objective", ["fisher", "n_samples"]),
    (DUAL, "GramOperator", ["rows", "n"]),
    (DUAL, "RowMatrix", ["groups", "size", "weights"]),
    (DUAL, "DenseRows", ["rows"]),
    (DUAL, "FactoredRows", ["inputs", "signals", "layout"]),
    (DUAL, "LookupRows", ["indices", "signals", "vocabulary"]),
    (DUAL, "ZeroRows", ["n", "c", "width", "dtype"]),
    (DataInf(1e-2), "BlockDiagonalOperator", ["blocks"]),
    (DataInf(1e-2), "DataInfOperator", ["rows", "n", "joint"]),
    (
        EKFAC(1e-2),
        "EigenKroneckerOperator",
        ["layout", "eigenvalues", "output_basis", "input_basis"],
    ),
    (EKFAC(1e-2), "MatrixLayout", ["groups", "out", "in_", "bias", "transposed"]),
]


@pytest.mark.parametrize(
    ("estimator", "kind", "field"),
    [(estimator, kind, field) for estimator, kind, fields in FIELDS for field in fields],
)
def test_types_of_what_is_nested_are_checked(estimator, kind, field, tmp_path):
    def change(fitted, tensors):
        next(described([*fitted.values()], kind))[field] = 1.5

    rewritten(estimator, change, tmp_path / "fitted")
    with pytest.raises(IFVPUsageError, match=f"is damaged.* {field} of a {kind} is of type float"):
        fimkit.load(tmp_path / "fitted")


def reshaped(name, *shape):
    def change(fitted, tensors):
        tensors[f"fitted.fisher_.{name}"] = tensors[f"fitted.fisher_.{name}"].reshape(shape)

    return change


def cut(name):
    def change(fitted, tensors):
        tensors[f"fitted.fisher_.{name}"] = tensors[f"fitted.fisher_.{name}"][:-1]

    return change


def negative_index(fitted, tensors):
    tensors["fitted.fisher_.rows.groups.0.1.indices"][0, 0] = -1


def fewer_words(fitted, tensors):
    """Than the parameters have, and the indices."""
    (rows,) = described(fitted["fisher_"], "LookupRows")
    rows["vocabulary"] = 1


def columns_at(places):
    """Give some groups, or blocks, other columns; they have 21, 3, 3, 16 and 6 in this order."""

    def change(fitted, tensors):
        columns = list(described(fitted["fisher_"], "Columns"))
        for group, parts in places.items():
            columns[group]["parts"]["items"] = [
                {"is": "slice", "start": start, "stop": stop} for start, stop in parts
            ]

    return change


@pytest.mark.parametrize(
    ("estimator", "kind", "change"),
    [
        (PRIMAL, "DenseOperator", reshaped("matrix", 343, 7)),
        (EKFAC(1e-2), "EigenKroneckerOperator", reshaped("blocks.linear.1.input_basis", 1, 2, 8)),
        (EKFAC(1e-2), "EigenKroneckerOperator", reshaped("blocks.linear.1.output_basis", 4, 2, 2)),
        (EKFAC(1e-2), "EigenKroneckerOperator", reshaped("blocks.linear.1.eigenvalues", 1, 2, 8)),
        (EKFAC(1e-2), "BlockDiagonalOperator", columns_at({2: [(21, 24)]})),
        (EKFAC(1e-2), "BlockDiagonalOperator", columns_at({1: [(21, 25)], 2: [(25, 27)]})),
        (EKFAC(1e-2), "BlockDiagonalOperator", columns_at({4: [(43, 51), (51, 49)]})),
        (DUAL, "FactoredRows", reshaped("rows.groups.3.1.inputs", 6, 1, 4, 1)),
        (DUAL, "FactoredRows", reshaped("rows.groups.3.1.signals", 6, 4, 1, 4, 1)),
        (DUAL, "LookupRows", reshaped("rows.groups.0.1.indices", 2, 6)),
        (DUAL, "LookupRows", negative_index),
        (DUAL, "LookupRows", fewer_words),
        (DUAL, "RowMatrix", columns_at({1: [(20, 23)]})),
        (DUAL, "RowMatrix", columns_at({1: [(21, 23)]})),
        (DUAL, "RowMatrix", columns_at({4: [(43, 51), (51, 49)]})),
        (DUAL, "RowMatrix", columns_at({4: [(44, 50)]})),
        (DUAL, "RowMatrix", columns_at({0: [(-3, 18)]})),
        (DUAL, "RowMatrix", cut("rows.groups.1.1.rows")),
        (DUAL, "RowMatrix", reshaped("rows.weights", 4, 6)),
    ],
)
def test_shapes_that_do_not_fit_together(estimator, kind, change, tmp_path):
    rewritten(estimator, change, tmp_path / "fitted")
    with pytest.raises(IFVPUsageError, match=f"the shapes of a {kind} do not fit together"):
        fimkit.load(tmp_path / "fitted")


def test_descriptions_without_end_are_refused(tmp_path):
    path, nested = tmp_path / "nested", b"[" * 100_000
    path.write_bytes(len(nested).to_bytes(8, "little") + nested)
    with pytest.raises(IFVPUsageError, match="no file of fimkit"):
        fimkit.load(path)


def test_what_cannot_be_saved(tmp_path):
    class Own(EKFAC):
        pass

    with pytest.raises(NotFittedError):
        EKFAC().save(tmp_path / "fitted")
    fitted = Own().fit(CASE.model(), CASE.batches(5))
    with pytest.raises(IFVPUsageError, match="Own is no class of fimkit's"):
        fitted.save(tmp_path / "fitted")
    fitted = EKFAC().fit(CASE.model(), CASE.batches(5)).set_params(verbose=object())
    with pytest.raises(IFVPUsageError, match=r"parameters\.verbose holds a object"):
        fitted.save(tmp_path / "fitted")
    assert list(tmp_path.iterdir()) == []


def test_writing_is_atomic(saved, monkeypatch):
    """A failure on the way leaves the file that was there, and nothing beside it."""
    before = saved.read_bytes()
    fitted = Explicit().fit(CASE.model(), CASE.batches(5))

    def full(descriptor):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space left"):
            fitted.save(saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]
    fitted.save(str(saved))
    assert type(fimkit.load(str(saved))) is Explicit
    with pytest.raises(FileNotFoundError):
        fitted.save(saved.parent / "nowhere" / "fitted")
    with pytest.raises(FileNotFoundError):
        fimkit.load(saved.parent / "nowhere")


@pytest.mark.parametrize("path", sorted(FORMATS.glob("1/*.fimkit")), ids=lambda path: path.stem)
def test_files_of_version_1(path):
    """They are read as long as this version is supported; see `formats/write.py`."""
    expected = json.loads((path.parent / "answers.json").read_text())[path.stem]
    loaded = fimkit.load(path)
    vectors = np.linspace(-1, 1, 3 * loaded.n_features_in_).reshape(3, -1)
    for method in ("transform", "inverse_transform", "score_samples"):
        assert getattr(loaded, method)(vectors) == pytest.approx(np.array(expected[method]))


def test_there_are_files_of_version_1():
    assert len(list(FORMATS.glob("1/*.fimkit"))) == 6


def test_paths_from_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    batches = [(torch.randn(6, 3), torch.arange(6) % 2)]
    EKFAC().fit(nn.Linear(3, 2), batches, checkpoint="~/states").save("~/small.fimkit")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.fimkit", "states"]
    assert fimkit.load("~/small.fimkit").n_samples_seen_ == 6


def test_a_folder_that_is_missing_is_named(tmp_path):
    fitted = EKFAC().fit(nn.Linear(3, 2), [(torch.randn(6, 3), torch.arange(6) % 2)])
    with pytest.raises(FileNotFoundError, match=r"no such folder.*make it first") as caught:
        fitted.save(tmp_path / "results" / "small.fimkit")
    assert caught.value.filename == str(tmp_path / "results")


@pytest.mark.parametrize("device", ["nonsense", "meta"])
def test_devices_to_load_on(device, tmp_path):
    path = tmp_path / "small.fimkit"
    EKFAC().fit(nn.Linear(3, 2), [(torch.randn(6, 3), torch.arange(6) % 2)]).save(path)
    with pytest.raises(IFVPUsageError, match=f"device='{device}'"):
        fimkit.load(path, device=device)
