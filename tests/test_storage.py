"""Rows in a folder: the same results, bounded memory, and nothing left behind."""

import copy
import gc
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from sklearn.base import clone
from torch import nn

from fimkit import DataInf, IFVPUsageError, ModelData
from fimkit.statistics import RowAccumulator, RowFolder, StoredRowAccumulator
from tests import reference, test_fisher_kinds
from tests.cases import BY_NAME, CASES, Apply, points, split
from tests.test_explicit import to_float32

MLP = BY_NAME["mlp"]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs file locks")


def subfolders(folder):
    return [path for path in Path(folder).iterdir() if path.is_dir()]


def both(folder, model, batches, **settings):
    """Fit in memory and in a folder."""
    memory = DataInf(**settings).fit(model, batches)
    return memory, DataInf(**settings, storage=folder).fit(model, batches)


def same(memory, stored, vectors):
    assert torch.equal(stored.transform(vectors), memory.transform(vectors))
    assert torch.equal(stored.inverse_transform(vectors), memory.inverse_transform(vectors))
    assert stored.regularization_ == memory.regularization_
    assert stored.score(vectors) == memory.score(vectors)
    assert stored.coverage_ == memory.coverage_


# -- the same results ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_results_are_those_of_memory(case, dtype, tmp_path):
    model, batches = case.model(), case.batches(5, 1, 4)
    if dtype == torch.float32:
        model, batches = model.float(), [to_float32(batch) for batch in batches]
    memory, stored = both(tmp_path, model, batches, loss=case.loss)
    same(memory, stored, case.gradients.to(dtype))
    assert stored.dtype_ == dtype


@pytest.mark.parametrize("kind", ["mc", "exact"])
@pytest.mark.parametrize("name", ["cross-entropy of sequences", "GaussianNLLLoss(sum)"])
def test_rows_with_weights(name, kind, tmp_path):
    case = test_fisher_kinds.BY_NAME[name]
    settings = {"loss": case.loss(), "fisher": kind, "n_mc_samples": 3, "random_state": 0}
    batches = split(case.batch(), test_fisher_kinds.N, 4)
    memory, stored = both(tmp_path, case.model(), batches, **settings)
    p = memory.n_features_in_
    same(memory, stored, torch.randn(3, p, dtype=torch.float64))


def sequences(*lengths, features=20, classes=3):
    """Return batches of sequences, each batch with a length of its own."""
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(3, length, features, generator=generator, dtype=torch.float64),
            torch.randint(classes, (3,), generator=generator),
        )
        for length in lengths
    ]


def routed():
    """A layer that sequences of one position do not meet."""

    def forward(self, x):
        h = self.first(x).tanh()
        return self.head(h if x.shape[1] == 1 else h + self.second(h)).sum(1)

    return Apply(forward, first=nn.Linear(20, 10), second=nn.Linear(10, 10), head=nn.Linear(10, 3))


@pytest.mark.parametrize(
    "lengths",
    [(4, 2, 4, 6), (4, 8, 2), (8, 4), (1, 1, 4), (4, 1, 1), (1, 4, 8, 1), (1, 1)],
    ids=str,
)
@pytest.mark.parametrize("budget", [None, 1])
def test_batches_of_other_lengths(lengths, budget, tmp_path, monkeypatch):
    """Factors are padded, and rows are dense where some batch's are, as in memory."""
    if budget is not None:
        monkeypatch.setattr("fimkit.operators.memory.BUDGET", budget)
    model = routed().double()
    memory, stored = both(tmp_path, model, sequences(*lengths))
    shapes = [
        [
            (type(rows), rows.n, *(tensor.shape for tensor in rows.tensors))
            for rows in all_rows(fitted)
        ]
        for fitted in (memory, stored)
    ]
    assert shapes[0] == shapes[1]
    same(memory, stored, torch.randn(4, memory.n_features_in_, dtype=torch.float64))
    # What was joined is not kept twice.
    (subfolder,) = subfolders(tmp_path)
    kept = sum(tensor.nbytes for rows in all_rows(stored) for tensor in rows.tensors)
    assert sum(path.stat().st_size for path in subfolder.iterdir()) == kept


def all_rows(fitted):
    return [rows for _, op in fitted.fisher_.blocks.values() for _, rows in op.rows.groups]


def test_an_example_may_have_more_rows_than_another(tmp_path):
    """Rows and weights are padded with zeros, those of parameters without gradient, too."""
    model, parts = BY_NAME["unused parameters"].model(), []
    for c in (1, 3, 2):
        data = ModelData(model, points()(5, torch.Generator().manual_seed(c)))
        fitted = DataInf(fisher="mc", n_mc_samples=c, random_state=0).fit(data)
        parts.extend(fitted.gradients(data, None))
    accumulators = RowAccumulator(), StoredRowAccumulator(RowFolder(tmp_path))
    for accumulator in accumulators:
        for part in parts:
            accumulator.update(part)
    memory, stored = (accumulator.result() for accumulator in accumulators)
    assert memory.shape == stored.shape == (45, fitted.n_features_in_)
    assert [rows.c for _, rows in stored.groups] == [3] * len(memory.groups)
    assert torch.equal(memory.weights, stored.weights)
    assert torch.equal(*(r.dense(slice(0, 15), torch.float64) for r in (memory, stored)))


def test_bfloat16_is_half_as_large_and_as_exact_as_that(tmp_path):
    model, batch = nn.Linear(30, 20), to_float32(points(30, 20)(40, torch.Generator()))
    vectors, sizes = torch.randn(3, 620), []
    for dtype in (torch.float32, torch.bfloat16):
        memory, stored = both(tmp_path / str(dtype), model, split(batch, 40, 7), dtype=dtype)
        (subfolder,) = subfolders(tmp_path / str(dtype))
        sizes.append(sum(path.stat().st_size for path in subfolder.iterdir()))
        same(memory, stored, vectors)
        ((_, rows),) = stored.fisher_.rows.groups
        assert {tensor.dtype for tensor in rows.tensors} == {dtype}
        if dtype == torch.float32:
            expected = stored.transform(vectors)
    assert sizes == [4 * 40 * (31 + 20), 2 * 40 * (31 + 20)]
    assert 1e-6 < reference.error(stored.transform(vectors), expected) <= 1e-2


@pytest.mark.slow
def test_rows_are_mapped_and_memory_is_bounded(tmp_path):
    """A process that may not have as much memory as the rows take."""
    script = """
        import resource, sys, torch
        torch.set_num_threads(1)
        from torch import nn
        from fimkit import DataInf
        from fimkit.operators import memory
        memory.BUDGET = 2**20

        def batches(n):
            generator = torch.Generator().manual_seed(0)
            for _ in range(n):
                x = torch.randn(50, 1000, generator=generator)
                yield x, torch.randint(4, (50,), generator=generator)

        model = nn.Sequential(nn.Linear(1000, 4))
        vectors = torch.ones(2, 4004)
        DataInf(storage=sys.argv[2]).fit(model, batches(3)).transform(vectors)
        used = int(open("/proc/self/statm").read().split()[5]) * resource.getpagesize()
        limit = used + 60 * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        fitted = DataInf(storage=sys.argv[1]).fit(model, batches(600))
        assert fitted.n_samples_seen_ == 30000  # 115 MiB of inputs
        assert fitted.transform(vectors).isfinite().all()
        print("done")
    """
    if not sys.platform.startswith("linux"):
        pytest.skip("limits memory as Linux does")
    stored = run(script, tmp_path, tmp_path)
    assert stored.stdout == "done\n", stored.stderr
    memory = run(script, "memory", tmp_path)
    assert memory.returncode != 0
    assert "memory" in memory.stderr


# -- whose the files are ---------------------------------------------------------------------------


def run(script, *arguments):
    return subprocess.run(command(script, *arguments), capture_output=True, text=True)


def command(script, *arguments):
    return [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]


FIT = """
    import os, signal, sys, torch
    from torch import nn
    from fimkit import DataInf
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    x, y = torch.randn(20, 4), torch.arange(20) % 3
    fitted = DataInf(storage=sys.argv[1]).fit(model, [(x, y)])
"""


def fit(folder, regularization="auto"):
    return DataInf(regularization, storage=folder).fit(MLP.model(), MLP.batches(5))


def test_each_fit_has_its_own_subfolder(tmp_path):
    """Which goes with the estimator, or with its next fit."""
    first, second = fit(tmp_path / "new" / "folder"), fit(tmp_path / "new" / "folder")
    parent = tmp_path / "new" / "folder"
    assert len(subfolders(parent)) == 2
    kept = first.fisher_
    vectors = MLP.gradients
    expected = second.transform(vectors)
    del first
    gc.collect()
    (left,) = subfolders(parent)
    assert torch.equal(kept.solve(vectors, second._damping()), expected), "mapped rows stay"
    second.fit(MLP.model(), MLP.batches(5))
    (again,) = subfolders(parent)
    assert again != left
    assert torch.equal(second.transform(vectors), expected)
    second.set_params(storage="memory").fit(MLP.model(), MLP.batches(5))
    assert subfolders(parent) == []
    assert torch.equal(second.transform(vectors), expected)


def test_a_path_named_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fitted = DataInf(storage=Path("memory")).fit(MLP.model(), MLP.batches(5))
    monkeypatch.chdir("/")
    assert len(subfolders(tmp_path / "memory")) == 1
    del fitted
    gc.collect()
    assert subfolders(tmp_path / "memory") == []


def test_the_end_of_a_process_leaves_nothing(tmp_path):
    assert run(FIT, tmp_path).returncode == 0
    assert subfolders(tmp_path) == []


def test_a_forked_process_removes_nothing(tmp_path):
    script = (
        FIT
        + """
    if os.fork() == 0:
        del fitted
        sys.exit(0)
    assert os.wait()[1] == 0
    assert len([path for path in os.scandir(sys.argv[1]) if path.is_dir()]) == 1
    print(float(fitted.transform(torch.ones(15)).sum()))
    """
    )
    found = run(script, tmp_path)
    assert found.returncode == 0, found.stderr
    assert subfolders(tmp_path) == []


@pytest.mark.parametrize("where", ["in the data", "before its lock", "while it is removed"])
def test_leftovers_of_a_crash_are_removed_by_the_next_fit(where, tmp_path):
    killed = FIT + "    os.kill(os.getpid(), signal.SIGKILL)"
    assert run(killed, tmp_path).returncode == -signal.SIGKILL
    (left,) = subfolders(tmp_path)
    assert len(list(left.iterdir())) == 3
    if where == "before its lock":
        for path in left.iterdir():
            path.unlink()
    elif where == "while it is removed":
        next(path for path in left.iterdir() if path.name != "lock").unlink()
    fitted = fit(tmp_path)
    assert not left.exists()
    assert len(subfolders(tmp_path)) == 1
    del fitted


@pytest.mark.parametrize("name", ["a folder of the user's", "fimkit-rows-kept"])
def test_folders_of_the_user_are_left_alone(name, tmp_path):
    notes = tmp_path / name / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("kept")
    fit(tmp_path)
    gc.collect()
    assert notes.read_text() == "kept"


def test_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    fitted = fit("~/rows")
    assert fitted._row_folder.path.parent == tmp_path / "rows"
    with pytest.raises(IFVPUsageError, match="storage is empty"):
        fit("")


def test_rows_of_a_living_process_are_not_removed(tmp_path):
    script = (
        FIT
        + """
    before = fitted.transform(torch.ones(15))
    print("ready", flush=True)
    input()
    again = DataInf(fitted.regularization_, storage=sys.argv[1]).fit(model, [(x, y)])
    assert torch.equal(fitted.transform(torch.ones(15)), before)
    assert torch.equal(fitted.inverse_transform(again.transform(torch.ones(15))).round(decimals=4),
                       torch.ones(15))
    print("same", flush=True)
    input()
    """
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command(script, tmp_path), **pipes) as sibling:
        assert sibling.stdout.readline() == "ready\n"
        (living,) = subfolders(tmp_path)
        files = sorted(living.iterdir())
        fitted = fit(tmp_path)
        assert len(subfolders(tmp_path)) == 2
        assert sorted(living.iterdir()) == files
        print(file=sibling.stdin, flush=True)
        assert sibling.stdout.readline() == "same\n"
        (own,) = (fitted._row_folder.path,)
        assert {living, own} < set(subfolders(tmp_path)), "nor those of this one by the other"
        sibling.send_signal(signal.SIGKILL)
    assert len(subfolders(tmp_path)) == 3
    fit(tmp_path)
    gc.collect()
    assert subfolders(tmp_path) == [own]


@pytest.mark.parametrize("failure", [IFVPUsageError, KeyboardInterrupt])
def test_a_failed_fit_removes_its_own(failure, tmp_path):
    kept = fit(tmp_path)
    before = subfolders(tmp_path)
    attributes = dict(vars(kept))

    def batches():
        x, y = MLP.batch()
        yield x[:5], y[:5]
        assert len(subfolders(tmp_path)) == 2
        if failure is KeyboardInterrupt:
            raise KeyboardInterrupt
        yield x[5:] * torch.nan, y[5:]

    with pytest.raises(failure) as caught:
        kept.fit(MLP.model(), batches())
    assert subfolders(tmp_path) == before, caught
    assert vars(kept) == attributes
    assert kept.transform(MLP.gradients).isfinite().all()


def test_it_can_be_neither_pickled_nor_copied(tmp_path):
    fitted = fit(tmp_path)
    for attempt in (pickle.dumps, copy.deepcopy):
        with pytest.raises(IFVPUsageError, match=r"fimkit-rows-.*pickled.*storage='memory'"):
            attempt(fitted)
    assert clone(fitted).get_params() == fitted.get_params()
    in_memory = pickle.loads(pickle.dumps(clone(fitted).set_params(storage="memory")))
    in_memory.fit(MLP.model(), MLP.batches(5))
    assert pickle.loads(pickle.dumps(in_memory)).score(MLP.gradients) == fitted.score(MLP.gradients)


# -- errors ----------------------------------------------------------------------------------------


class Untouched(list):
    """Batches that nobody may look at."""

    def __iter__(self):
        raise AssertionError("the data was read")


@pytest.mark.parametrize("inside", [(), ("folder",)])
def test_a_folder_that_cannot_be_used(inside, tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(IFVPUsageError, match=r"storage: the folder '.*file.*' cannot be used: "):
        DataInf(storage=file.joinpath(*inside)).fit(MLP.model(), Untouched())


def test_without_file_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(IFVPUsageError, match=r"Windows does not have; use storage='memory'"):
        DataInf(storage=tmp_path).fit(MLP.model(), Untouched())
    assert subfolders(tmp_path) == []


def test_no_storage(tmp_path):
    with pytest.raises(ValueError, match="'storage' parameter of DataInf must be"):
        DataInf(storage=None).fit(MLP.model(), Untouched())
    assert os.listdir(tmp_path) == []
