"""`ModelData`: a model with data that scikit-learn can slice."""

from collections import UserDict
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.model_selection import GridSearchCV, KFold, StratifiedKFold
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

from fimkit import EKFAC, IFVPUsageError, ModelData

N = 10
X = torch.arange(3.0 * N).view(N, 3)
Y = torch.arange(N) % 3


class Pairs(Dataset):
    """Examples as tuples of a tensor and an integer."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        return X[index], int(Y[index])


class Mappings(Pairs):
    def __getitem__(self, index):
        return UserDict(x=X[index], labels=Y[index])


class Texts(Pairs):
    """Examples that only a collate function makes batches of."""

    def __getitem__(self, index):
        return "a" * (index + 1), int(Y[index])


def lengths(examples):
    return torch.tensor([[float(len(text))] * 3 for text, _ in examples]), torch.tensor(
        [target for _, target in examples]
    )


@pytest.fixture
def model():
    return nn.Linear(3, 2)


def inputs(data):
    """Return the first feature of every example, which is three times its position."""
    return [int(value) // 3 for x, *_ in data.batches() for value in x[:, 0]]


SOURCES = {
    "dataset": lambda: Pairs(),
    "tensor dataset": lambda: TensorDataset(X, Y),
    "tensors": lambda: (X, Y),
    "list of tensors": lambda: [X, Y],
    "arrays": lambda: (X.numpy(), Y.numpy()),
    "loader": lambda: DataLoader(Pairs(), batch_size=4),
    "subset": lambda: Subset(Pairs(), range(N)),
}


@pytest.mark.parametrize("source", SOURCES)
def test_sources(model, source):
    data = ModelData(model, SOURCES[source](), batch_size=4)
    assert len(data) == N
    assert inputs(data) == list(range(N))
    assert [len(y) for _, y in data.batches()] == [4, 4, 2]
    assert data.targets.tolist() == Y.tolist()
    assert data[3:5].targets.tolist() == [0, 1]


def test_shape_counts_trainable_parameters(model):
    assert ModelData(model, (X, Y)).shape == (N, 8)
    assert ModelData(model, (X, Y)).ndim == 2
    model.bias.requires_grad_(False)
    assert ModelData(model, (X, Y)).shape == (N, 6)
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    assert ModelData(tied, (X, Y)).shape == (N, 15)


def test_loaders_bring_batch_size_and_collate_function(model):
    data = ModelData(model, DataLoader(Texts(), batch_size=3, collate_fn=lengths))
    assert data.batch_size == 3
    assert [x[:, 0].tolist() for x, _ in data[:4].batches()] == [[1, 2, 3], [4]]
    assert data.targets.tolist() == Y.tolist()
    own = ModelData(model, Texts(), batch_size=np.int64(2), collate_fn=lengths)
    assert [len(y) for _, y in own[5:].batches()] == [2, 2, 1]


def test_targets_of_mappings(model):
    assert ModelData(model, Mappings())[::-1].targets.tolist() == Y.tolist()[::-1]


def test_targets_of_several_numbers(model):
    data = ModelData(model, (X, torch.arange(20).view(N, 2)))
    assert data[[1]].targets.tolist() == [[2, 3]]


MASK = np.arange(N) % 4 == 1


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (3, [3]),
        (-1, [9]),
        (np.int64(2), [2]),
        (slice(2, 5), [2, 3, 4]),
        (slice(None, None, -4), [9, 5, 1]),
        (slice(8, 99), [8, 9]),
        ([4, 1, 4], [4, 1, 4]),
        ([-2, 0], [8, 0]),
        ((range(3, 5), slice(None)), [3, 4]),
        (np.array([7, 2]), [7, 2]),
        (np.array([7, 2], dtype=np.uint8), [7, 2]),
        (torch.tensor([7, 2]), [7, 2]),
        (MASK, [1, 5, 9]),
        (MASK.tolist(), [1, 5, 9]),
        (torch.from_numpy(MASK), [1, 5, 9]),
        ((MASK, ...), [1, 5, 9]),
        ((np.array([7, 2]), slice(None)), [7, 2]),
        ((..., slice(None)), list(range(N))),
        ((), list(range(N))),
        (..., list(range(N))),
        ([], []),
        (np.array([], dtype=int), []),
        (slice(4, 4), []),
    ],
    ids=repr,
)
def test_indexing(model, key, expected):
    data = ModelData(model, Pairs(), batch_size=4)
    part = data[key]
    assert isinstance(part, ModelData)
    assert part.model is model
    assert part.shape == (len(expected), 8)
    assert part.indices.tolist() == expected
    if expected:
        assert inputs(part) == expected
        assert part.targets.tolist() == Y[expected].tolist()
    assert len(data) == N


def test_slices_of_slices(model):
    part = ModelData(model, Pairs())[[8, 6, 4, 2]]
    assert part[1:].indices.tolist() == [6, 4, 2]
    assert part[-1].indices.tolist() == [2]
    assert part[[True, False, False, True]][::-1].indices.tolist() == [2, 8]


def test_indices(model):
    assert ModelData(model, Pairs(), indices=[3, -1]).indices.tolist() == [3, 9]
    assert len(ModelData(model, Pairs(), indices=[])) == 0


def test_splits_of_scikit_learn(model):
    data = ModelData(model, Pairs())
    for train, test in KFold(3, shuffle=True, random_state=0).split(data):
        assert sorted([*data[train].indices, *data[test].indices]) == list(range(N))
    for _, test in StratifiedKFold(3).split(data, data.targets):
        assert set(data[test].targets) == {0, 1, 2}


def test_repr(model):
    assert repr(ModelData(model, (X, Y))) == "ModelData(Linear, n=10, p=8)"


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y, strict=True))


@pytest.mark.parametrize(
    ("dataset", "settings", "message"),
    [
        ((X, Y[:-1]), {}, r"inputs and targets of lengths \[10, 9\]"),
        ((X, torch.tensor(1)), {}, r"lengths \[10, 0\]"),
        (Stream(), {}, "must have a length and be indexable by integers; got Stream"),
        (DataLoader(Stream()), {}, "must have a length and be indexable by integers; got Stream"),
        (zip(X, Y, strict=True), {}, "must have a length and be indexable by integers; got zip"),
        (None, {}, "must have a length and be indexable by integers; got NoneType"),
        ({"x": X, "labels": Y}, {}, "indexable by integers; got dict"),
        ("train", {}, "indexable by integers; got str"),
        (nn.Sequential(nn.Linear(3, 2)), {}, "indexable by integers; got Sequential"),
        (TensorDataset, {}, "indexable by integers; got the class TensorDataset"),
        ((X, Y.tolist()), {}, r"holds Tensor, list; give \(inputs, targets\) as tensors"),
        ((X, None), {}, "holds Tensor, NoneType"),
        ((Subset(X, [0]), Y.tolist()), {}, r"holds Subset, list; give \(inputs, targets\)"),
        ((Stream(), Stream()), {}, "holds Stream, Stream; .*datasets that have a length"),
        ((X, Subset(Y, range(9))), {}, r"of lengths \[10, 9\]"),
        ((X.tolist(), Y.tolist()), {}, r"a tuple of lists, .*list\(zip\(inputs, targets\)\)"),
        ((X.numpy(), Y.numpy().astype(str)), {}, "array of dtype <U21; give.*LabelEncoder"),
        ((X.numpy(), Y.numpy().astype(object)), {}, "array of dtype object; give.*LabelEncoder"),
        (DataLoader([(X, Y)], batch_size=None), {}, r"batch_size=None.*fit\(model, dataloader\)"),
        ((X, Y), {"batch_size": 0}, "batch_size must be an integer of at least 1; got 0"),
        ((X, Y), {"batch_size": 2.0}, "batch_size must be an integer of at least 1; got 2.0"),
        ((X, Y), {"batch_size": True}, "batch_size must be an integer"),
        ((X, Y), {"indices": [[1]]}, r"1-D sequence of integers; got shape \(1, 1\)"),
        ((X, Y), {"indices": [0.5]}, "1-D sequence of integers.*float64"),
        ((X, Y), {"indices": [0, 10]}, "from 0 to 10, outside a dataset of 10"),
        ((X, Y), {"indices": [-11]}, "from -11 to -11, outside a dataset of 10"),
    ],
)
def test_errors(model, dataset, settings, message):
    with pytest.raises(IFVPUsageError, match=message):
        ModelData(model, dataset, **settings)


def test_errors_of_the_model():
    with pytest.raises(IFVPUsageError, match=r"torch\.nn\.Module; got TensorDataset"):
        ModelData(TensorDataset(X, Y), nn.Linear(3, 2))
    with pytest.raises(IFVPUsageError, match=r"torch\.nn\.Module; got the class Linear"):
        ModelData(nn.Linear, (X, Y))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([(X[0], torch.ones(2)), (X[1], torch.ones(3))], r"some have shape \(2,\), some \(3,\)"),
        ([{"x": X[0], "target": 1}], r"no target: expected .*mapping with 'labels'; got dict"),
        ([(X[0],)], r"an example has no target: .*got tuple"),
        ([1, 2], r"an example has no target: .*got int"),
        (X, r"an example has no target: .*got Tensor"),
        ((X,), r"an example has no target: .*got tuple"),
    ],
)
def test_errors_of_targets(model, dataset, message):
    with pytest.raises(IFVPUsageError, match=message):
        _ = ModelData(model, dataset).targets


@pytest.mark.parametrize("source", SOURCES)
def test_no_targets(model, source):
    assert ModelData(model, SOURCES[source]())[:0].targets.shape == (0,)


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        (10, IndexError, r"length 10 with 10"),
        ([0, 11], IndexError, "length 10"),
        ([0, -11], IndexError, "length 10.*index -11 is out of bounds"),
        ([True] * 9, IndexError, "length 10.*boolean"),
        (torch.ones(11, dtype=torch.bool), IndexError, "boolean .*is 11"),
        (1.5, IndexError, "length 10"),
        ([0.0, 1.0], IndexError, r"length 10.*must be of integer \(or boolean\) type"),
        (np.array([1.0]), IndexError, "length 10.*must be of integer"),
        (torch.tensor(2.0), IndexError, "length 10.*must be of integer"),
        (None, IndexError, "with None; give an integer, slice, mask or 1-D array"),
        (True, IndexError, "with True; give an integer, slice, mask or 1-D array"),
        ([[0, 1]], IndexError, r"with array\(\[\[0, 1\]\]\); give an integer, slice, mask or 1-D"),
        ("0", IndexError, "length 10"),
        ((slice(None), 2), IFVPUsageError, "sliced by examples only"),
        ((slice(None), [0, 1]), IFVPUsageError, "sliced by examples only"),
        (([0], np.array([0, 1])), IFVPUsageError, "sliced by examples only"),
    ],
)
def test_errors_of_indexing(model, key, error, message):
    with pytest.raises(error, match=message):
        ModelData(model, Pairs())[key]


def frozen(array):
    array = array.copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "change",
    [lambda a: a[::-1].copy()[::-1], lambda a: a.astype(a.dtype.newbyteorder(">")), frozen],
    ids=["negative strides", "big-endian", "read-only"],
)
def test_arrays_of_any_memory(model, change):
    data = ModelData(model, (change(X.numpy()), change(Y.numpy())), batch_size=4)
    assert inputs(data) == list(range(N))
    assert data.targets.tolist() == Y.tolist()


def test_a_model_data_is_no_array(model):
    data = ModelData(model, (X, Y))
    for call in (np.asarray, PCA().fit):
        with pytest.raises(IFVPUsageError, match=r"no numbers; an estimator's transform\(data\)"):
            call(data)
    with pytest.raises(IFVPUsageError, match=r"must have a length .* got ModelData"):
        ModelData(model, data)


PART = TensorDataset(torch.zeros(6, 3), torch.zeros(6))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": SubsetRandomSampler([0, 3])}, "SubsetRandomSampler of its own"),
        ({"sampler": RandomSampler(PART, num_samples=4)}, "RandomSampler of its own"),
        ({"sampler": RandomSampler(PART, replacement=True)}, "RandomSampler of its own"),
        ({"sampler": RandomSampler(range(4))}, "RandomSampler of its own"),
        ({"sampler": SequentialSampler(range(4))}, "SequentialSampler of its own"),
        ({"batch_sampler": [[0, 1], [3, 4]]}, "batch_sampler of its own"),
        ({"batch_size": 4, "drop_last": True}, "drop_last=True, which drops 2 of 6 examples"),
    ],
)
def test_loaders_that_draw_a_part(model, settings, message):
    """A ModelData is all of its dataset, so a loader of a part of it is no way to make one."""
    with pytest.raises(IFVPUsageError, match=f"{message}, and .*indices="):
        ModelData(model, DataLoader(PART, **settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"shuffle": True},
        {"batch_size": 3, "drop_last": True},
        {"batch_sampler": BatchSampler(SequentialSampler(PART), 4, False)},
    ],
)
def test_loaders_that_draw_all(model, settings):
    assert len(ModelData(model, DataLoader(PART, **settings))) == 6


def test_targets_of_a_dataset_that_changes_its_tensors(model):
    class Halves(TensorDataset):
        def __getitem__(self, index):
            return self.tensors[0][index], self.tensors[1][index] > 4

    assert ModelData(model, Halves(X, torch.arange(N))).targets.tolist() == [False] * 5 + [True] * 5


class Column(Sequence):
    """One element of every example, which is no array."""

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        assert isinstance(index, int)
        return self.values[index]


COLUMNS = {
    "sequences": lambda: (Column(X), Column(Y)),
    "list of sequences": lambda: [Column(X), Column(Y.tolist())],
    "sequence and tensor": lambda: (Column(X), Y),
    "array and subset": lambda: (X.numpy(), Subset(Y, range(N))),
    "range": lambda: (X, Column(Y), range(N)),
}


@pytest.mark.parametrize("columns", COLUMNS)
def test_inputs_and_targets_apart(model, columns):
    """Each in a dataset of its own, or in an array."""
    data = ModelData(model, COLUMNS[columns](), batch_size=4)
    assert len(data) == N
    assert inputs(data) == list(range(N))
    assert inputs(data[[7, 2]]) == [7, 2]
    targets = np.arange(N) if columns == "range" else Y.numpy()
    assert data[::-1].targets.tolist() == targets[::-1].tolist()
    assert [y.tolist() for *_, y in data[3:9].batches()] == [
        targets[3:7].tolist(),
        targets[7:9].tolist(),
    ]


def test_lists_and_tuples_of_examples(model):
    """Of which neither is taken for inputs and targets."""
    examples = [(X[0], 1), (X[4], 0)]
    for dataset in (examples, tuple(examples), [list(example) for example in examples]):
        data = ModelData(model, dataset)
        assert inputs(data) == [0, 4]
        assert data.targets.tolist() == [1, 0]


def test_a_loader_of_a_list_of_tensors(model):
    """Which are its examples, while those of a list alone are inputs and targets."""
    loader = DataLoader(list(X), batch_size=4)
    data = ModelData(model, loader)
    assert len(data) == N
    for found, expected in zip(data.batches(), loader, strict=True):
        assert torch.equal(found, expected)


def check_as_tensors(dataset):
    """Search and fit with a dataset, and see that it is as with the tensors."""
    model = nn.Linear(3, 3)
    data, expected = ModelData(model, dataset, batch_size=4), ModelData(model, (X, Y), batch_size=4)
    assert data.targets.tolist() == Y.tolist()
    grid = {"regularization": [1e-2, 1.0]}
    searches = [
        GridSearchCV(EKFAC(), grid, cv=StratifiedKFold(2), error_score="raise").fit(each, Y)
        for each in (data, expected)
    ]
    scores = [search.cv_results_["mean_test_score"] for search in searches]
    assert np.array_equal(*scores)
    assert np.array_equal(searches[0].transform(data[3:9]), searches[1].transform(expected[3:9]))


def test_sliced_datasets_of_skorch():
    sliced = pytest.importorskip("skorch.helper").SliceDataset
    for dataset in (TensorDataset(X, Y), Pairs()):
        check_as_tensors((sliced(dataset), sliced(dataset, idx=1)))
        check_as_tensors((sliced(dataset), Y))
        check_as_tensors(sliced(dataset, idx=slice(None)))
    part = ModelData(nn.Linear(3, 3), (sliced(Pairs())[2:8], sliced(Pairs(), idx=1)[2:8]))
    assert inputs(part[[5, 0]]) == [7, 2]
    alone = ModelData(nn.Linear(3, 3), sliced(Pairs()))
    with pytest.raises(IFVPUsageError, match=r"without targets\. Give .*\(inputs, targets\)"):
        EKFAC().fit(alone)


def test_no_examples(model):
    data = ModelData(model, (X, Y))
    fitted = EKFAC(loss="mse").fit(ModelData(model, (X, X[:, :2])))
    message = r"\(Linear, n=0, p=8\) has no examples: .* none of the 10 .*; select at least one"
    for call in (clone(fitted).fit, fitted.transform, fitted.score):
        for empty in (data[:0], data[3:5][np.array([False, False])]):
            with pytest.raises(IFVPUsageError, match=message):
                call(empty)


def test_examples_of_uneven_length():
    examples = [(torch.randn(length), length % 2) for length in (3, 4)]
    with pytest.raises(IFVPUsageError, match=r"default_collate.*collate_fn=.*pad_sequence"):
        EKFAC().fit(ModelData(nn.Linear(4, 2), examples))


def test_an_error_of_the_dataset_itself_is_its_own():
    class Broken(list):
        def __getitem__(self, index):
            raise RuntimeError("no such file")

    with pytest.raises(RuntimeError, match="no such file"):
        EKFAC().fit(ModelData(nn.Linear(4, 2), Broken([1, 2])))


class Table:
    """As a data frame: by columns, with a length."""

    def __len__(self):
        return 5

    def __getitem__(self, column):
        raise KeyError(column)

    def to_numpy(self):
        return np.zeros((5, 3))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ((Table(), Table()), r"a tuple of Table, Table; .* such as table\.to_numpy\(\)"),
        (Table(), r"got Table, such as table\.to_numpy\(\)"),
        (("a", "b"), "a tuple of str, str; give"),
        ((None, None), "a tuple of NoneType, NoneType; give"),
        ((iter([1]), iter([2])), "a tuple of list_iterator"),
        ((DataLoader([1, 2]), DataLoader([1, 2])), "a tuple of DataLoader, DataLoader; give"),
    ],
)
def test_tuples_of_what_holds_no_examples(dataset, message):
    with pytest.raises(IFVPUsageError, match=message):
        ModelData(nn.Linear(3, 2), dataset)


def test_a_tuple_of_examples():
    data = ModelData(nn.Linear(3, 2), ((torch.ones(3), 0), (torch.zeros(3), 1)))
    assert EKFAC(0.1).fit(data).n_samples_seen_ == 2
