"""Fits that are interrupted and go on, against fits that are not."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import fimkit
from fimkit import EKFAC, KFAC, DataInf, Diagonal, Explicit, IFVPUsageError
from tests import ranks

METHODS = {
    "explicit primal": lambda: Explicit(0.1, solver="primal"),
    "explicit turns primal": lambda: Explicit(0.1, blocks="parameter"),
    "explicit dual": lambda: Explicit(0.1, solver="dual", fisher="exact"),
    "datainf": lambda: DataInf(0.1),
    "ekfac": lambda: EKFAC(0.1),
    "ekfac, sampled": lambda: EKFAC(0.1, fisher="mc", cache_budget=0),
    "kfac": lambda: KFAC(0.1),
    "diagonal": lambda: Diagonal(0.1, fisher="mc"),
}


class Interrupted(Exception):
    pass


class Stopping(torch.utils.data.TensorDataset):
    """Examples of which so many can be read before an interruption."""

    def __init__(self, *tensors):
        super().__init__(*tensors)
        self.left = None

    def __getitem__(self, index):
        if self.left is not None:
            if not self.left:
                raise Interrupted
            self.left -= 1
        return super().__getitem__(index)


def loader(dataset, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.utils.data.DataLoader(dataset, batch_size=2, shuffle=True, generator=generator)


def numbers(estimator):
    v = torch.linspace(-1, 1, estimator.n_features_in_, dtype=torch.float64)
    return estimator.transform(v)


@pytest.mark.parametrize("kind", ["mlp", "branching", "convolution"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("read", [9, 23, 31])
def test_an_interrupted_fit_goes_on_to_the_same_result(tmp_path, monkeypatch, name, kind, read):
    # Without a seed, an interrupted fit's own is taken; here so by the uninterrupted one.
    monkeypatch.setattr("fimkit.estimators.settings.secrets.randbits", lambda bits: 11)
    model, x, y = ranks.problem(kind)
    if kind == "branching":
        x = x.clone()
        x[:, 0] = 4
    dataset = Stopping(x, y)
    expected = METHODS[name]().fit(model, loader(dataset))
    dataset.left = read
    interrupted = METHODS[name]()
    options = {"checkpoint": tmp_path / "state", "checkpoint_every": 2}
    try:
        interrupted.fit(model, loader(dataset), **options)
    except Interrupted:
        assert any((tmp_path / "state").iterdir())
    dataset.left = None
    monkeypatch.setattr("fimkit.estimators.settings.secrets.randbits", lambda bits: 12)
    if "n_samples_seen_" not in vars(interrupted):
        # Another order, which the checkpoint's random states undo.
        interrupted.fit(model, loader(dataset, seed=5), **options)
    assert torch.equal(numbers(interrupted), numbers(expected))
    assert interrupted.n_samples_seen_ == expected.n_samples_seen_
    assert interrupted.coverage_ == expected.coverage_
    assert list((tmp_path / "state").iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


@pytest.fixture
def interrupted(tmp_path):
    """A folder with the state of a fit, the model and the data."""
    model, x, y = ranks.problem("mlp")
    dataset = Stopping(x, y)
    dataset.left = 9
    with pytest.raises(Interrupted):
        EKFAC(0.1).fit(model, loader(dataset), checkpoint=tmp_path, checkpoint_every=1)
    dataset.left = None
    return tmp_path, model, dataset


def test_another_fit_is_refused(interrupted):
    folder, model, dataset = interrupted
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(IFVPUsageError, match=r"regularization was 0\.1, and is now 0\.2"):
        EKFAC(0.2).fit(model, loader(dataset), checkpoint=folder)
    with pytest.raises(IFVPUsageError, match="the estimator was EKFAC, and is now KFAC"):
        KFAC(0.1).fit(model, loader(dataset), checkpoint=folder)
    shuffled = Stopping(dataset.tensors[0].flip(0), dataset.tensors[1])
    with pytest.raises(IFVPUsageError, match="batch 0 holds other examples"):
        EKFAC(0.1).fit(model, loader(shuffled), checkpoint=folder)
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    with pytest.raises(IFVPUsageError, match=r"the model's '0\.weight' was"):
        EKFAC(0.1).fit(model, loader(dataset), checkpoint=folder)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("method", [EKFAC, DataInf, Explicit])
def test_another_activation_or_loss_is_refused(tmp_path, method):
    model, x, y = ranks.problem("mlp")
    data = ranks.batches(x, y, range(8), 2)
    stop_after(2, data, method(0.1, loss=torch.nn.CrossEntropyLoss()), model, tmp_path)
    other = torch.nn.Sequential(model[0], torch.nn.Sigmoid(), model[2])
    with pytest.raises(IFVPUsageError, match=r"layer '1' was Tanh\(\), and is now Sigmoid\(\)"):
        method(0.1, loss=torch.nn.CrossEntropyLoss()).fit(other, data, checkpoint=tmp_path)
    smoothed = torch.nn.CrossEntropyLoss(label_smoothing=0.3)
    with pytest.raises(IFVPUsageError, match=r"loss\.label_smoothing was 0\.0, and is now 0\.3"):
        method(0.1, loss=smoothed).fit(model, data, checkpoint=tmp_path)


def stop_after(count, data, estimator, model, folder):
    """Interrupt a fit after so many batches, each of which is written."""

    def some():
        yield from data[:count]
        raise Interrupted

    with pytest.raises(Interrupted):
        estimator.fit(model, Repeated(some), checkpoint=folder, checkpoint_every=1)


class Repeated:
    """What can be iterated over again."""

    def __init__(self, make):
        self.make = make

    def __iter__(self):
        return self.make()


@pytest.mark.parametrize("method", [EKFAC, DataInf])
def test_fewer_batches_than_were_passed_are_refused(tmp_path, method):
    model, x, y = ranks.problem("mlp")
    data = ranks.batches(x, y, range(16), 2)
    stop_after(4, data, method(0.1), model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(IFVPUsageError, match=r"the data have 2 batches, and 4 had been passed"):
        method(0.1).fit(model, data[:2], checkpoint=tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert numbers(method(0.1).fit(model, data, checkpoint=tmp_path)).equal(
        numbers(method(0.1).fit(model, data))
    )


class Sentence:
    """An example that is neither tensor nor container."""

    def __init__(self, text, label):
        self.text, self.label = text, label


def of_texts(model, batch):
    """Losses of texts, which only the loss turns into tensors."""
    x = torch.tensor([[float(ord(c)) / 100 for c in sentence.text] for sentence in batch])
    y = torch.tensor([sentence.label for sentence in batch])
    return torch.nn.functional.cross_entropy(model(x.double()), y, reduction="none")


def test_other_texts_are_refused(tmp_path):
    model, _, _ = ranks.problem("mlp")

    def batches(*texts):
        return [[Sentence(text, i % 3) for i, text in enumerate(some)] for some in texts]

    data = batches(("apple", "grape"), ("lemon", "mango"), ("peach", "olive"))
    stop_after(2, data, DataInf(0.1, loss=of_texts), model, tmp_path)
    for other in (batches(("apple", "grape"), ("lemon", "melon"), ("peach", "olive")), data[1:]):
        with pytest.raises(IFVPUsageError, match=r"batch [01] holds other examples"):
            DataInf(0.1, loss=of_texts).fit(model, other, checkpoint=tmp_path)
    again = batches(("apple", "grape"), ("lemon", "mango"), ("peach", "olive"))
    resumed = DataInf(0.1, loss=of_texts).fit(model, again, checkpoint=tmp_path)
    assert numbers(resumed).equal(numbers(DataInf(0.1, loss=of_texts).fit(model, data)))


def test_a_sparse_buffer_is_compared(tmp_path):
    class Spread(torch.nn.Module):
        def __init__(self, matrix):
            super().__init__()
            self.register_buffer("matrix", matrix)
            self.last = torch.nn.Linear(5, 3).double()

        def forward(self, x):
            return self.last((self.matrix @ x.T).T)

    _, x, y = ranks.problem("mlp")
    data = ranks.batches(x, y, range(8), 2)
    matrix = torch.eye(5, dtype=torch.float64)
    model = Spread(matrix.to_sparse())
    stop_after(2, data, DataInf(0.1), model, tmp_path)
    model.matrix = matrix.roll(1, 0).to_sparse()
    with pytest.raises(IFVPUsageError, match="the model's 'matrix' was"):
        DataInf(0.1).fit(model, data, checkpoint=tmp_path)
    model.matrix = matrix.to_sparse()
    resumed = DataInf(0.1).fit(model, data, checkpoint=tmp_path)
    assert numbers(resumed).equal(numbers(DataInf(0.1).fit(model, data)))


@pytest.mark.parametrize("method", [DataInf, lambda a: Explicit(a, solver="dual"), EKFAC])
def test_a_fit_that_is_killed_while_it_removes_its_files_can_be_repeated(
    tmp_path, monkeypatch, method
):
    model, x, y = ranks.problem("mlp")
    data = ranks.batches(x, y, range(8), 2)
    unlink = Path.unlink
    left = 0

    def killed(path, missing_ok=False):
        nonlocal left
        if path.exists() and path.parent == tmp_path and not path.name.startswith("."):
            if not left:
                raise Interrupted
            left -= 1
        unlink(path, missing_ok=missing_ok)

    expected = numbers(method(0.1).fit(model, data))
    options = {"checkpoint": tmp_path, "checkpoint_every": 1}
    for count in range(12):
        left = count
        monkeypatch.setattr(Path, "unlink", killed)
        try:
            method(0.1).fit(model, data, **options)
        except Interrupted:
            pass
        else:
            break
        monkeypatch.undo()
        assert numbers(method(0.1).fit(model, data, **options)).equal(expected)
        assert list(tmp_path.iterdir()) == []
    assert 0 < count < 11


def test_what_is_no_folder_for_files_is_refused(tmp_path, monkeypatch):
    model, x, y = ranks.problem("mlp")
    (tmp_path / "file").write_text("kept")

    def refused(folder, message):
        with pytest.raises(IFVPUsageError, match=message):
            Diagonal(0.1).fit(model, [(x, y)], checkpoint=folder)

    refused(tmp_path / "file", "file' is no folder that files can be written into")
    refused(tmp_path / "file" / "inside", "inside' is no folder that files can be written into")
    refused("/proc/none", "'/proc/none' is no folder that files can be written into")
    refused(3, r"checkpoint is int; expected the path of a folder")
    monkeypatch.setattr("os.access", lambda path, mode: False)  # a superuser may write everywhere
    refused(tmp_path, "no permission to write into it")
    assert (tmp_path / "file").read_text() == "kept"


def test_a_file_that_is_damaged_or_gone_is_told_with_what_to_remove(tmp_path):
    model, x, y = ranks.problem("mlp")
    data = ranks.batches(x, y, range(8), 2)

    def refused(message):
        with pytest.raises(IFVPUsageError, match=message) as caught:
            DataInf(0.1).fit(model, data, checkpoint=tmp_path)
        assert "Remove the folder's files to begin anew" in str(caught.value)

    stop_after(3, data, DataInf(0.1), model, tmp_path)
    rows = tmp_path / "rank-0-of-1.rows-1.fimkit"
    whole = rows.read_bytes()
    rows.write_bytes(whole[:-8])
    refused(r"rows-1\.fimkit', of the interrupted fit, cannot be read")
    rows.unlink()
    refused(r"rows-1\.fimkit', of the interrupted fit, is not there")
    rows.write_bytes(whole)
    state = tmp_path / "rank-0-of-1.pass-0.fimkit"
    state.write_bytes(whole)
    refused(r"pass-0\.fimkit', of the interrupted fit, cannot be read")
    state.write_bytes(state.read_bytes()[:50])
    refused(r"pass-0\.fimkit', of the interrupted fit, cannot be read")


@pytest.mark.parametrize("fails", [False, True])
def test_a_resumed_fit_leaves_random_states_as_they_were(tmp_path, fails):
    model, x, y = ranks.problem("mlp")
    drawn = Drawing(x, y)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    drawn.left = 9
    with pytest.raises(Interrupted):
        DataInf(0.1).fit(model, loader(drawn), checkpoint=tmp_path, checkpoint_every=1)
    random.seed(2)
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(2)
    data = loader(drawn, seed=5)
    before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    states = torch.get_rng_state(), data.generator.get_state()
    drawn.left = 20 if fails else None
    if fails:
        with pytest.raises(Interrupted):
            DataInf(0.1).fit(model, data, checkpoint=tmp_path)
    else:
        DataInf(0.1).fit(model, data, checkpoint=tmp_path)
    assert before == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    assert torch.equal(states[0], torch.get_rng_state())
    assert torch.equal(states[1], data.generator.get_state())


class Drawing(Stopping):
    """Examples that take random numbers to read."""

    def __getitem__(self, index):
        random.random()
        np.random.rand()  # noqa: NPY002
        return super().__getitem__(index)


def test_an_interval_that_is_none_and_rows_in_a_folder_are_refused(interrupted, tmp_path):
    _, model, dataset = interrupted
    with pytest.raises(IFVPUsageError, match="checkpoint_every is 0"):
        EKFAC().fit(model, loader(dataset), checkpoint=tmp_path, checkpoint_every=0)
    with pytest.raises(IFVPUsageError, match="storage='memory' with checkpoint="):
        DataInf(storage=tmp_path / "rows").fit(
            model, loader(dataset), checkpoint=tmp_path / "other"
        )


def test_rows_are_written_once(tmp_path, monkeypatch):
    model, x, y = ranks.problem("mlp")
    written = []
    write = fimkit.serialization.write

    def count(path, header, tensors):
        written.append((Path(path).name, sum(t.nbytes for t in tensors.values())))
        write(path, header, tensors)

    monkeypatch.setattr("fimkit.serialization.write", count)
    data = ranks.batches(x, y, range(ranks.N), 1)
    DataInf(0.1).fit(model, data, checkpoint=tmp_path, checkpoint_every=1)
    sizes = {size for name, size in written if "rows" in name}
    assert len(sizes) == 1


_KILLED = """
import os, signal, sys
import torch
import fimkit.serialization as serialization
from fimkit import EKFAC
from tests import ranks

torch.set_num_threads(1)
folder, when = sys.argv[1], int(sys.argv[2])
model, x, y = ranks.problem("mlp")
synced = os.fsync
calls = 0

def fsync(descriptor):
    global calls
    calls += 1
    if calls == when:  # in the middle of a write: the file is not renamed yet
        os.ftruncate(descriptor, 100)
        os.kill(os.getpid(), signal.SIGKILL)
    synced(descriptor)

os.fsync = fsync
ekfac = EKFAC(0.1, fisher="mc", cache_budget=0)
data = ranks.batches(x, y, range(ranks.N), 2)
ekfac.fit(model, data, checkpoint=folder, checkpoint_every=3)
ekfac.save(sys.argv[3])
"""


@pytest.mark.slow
def test_a_fit_that_is_killed_while_it_writes_goes_on(tmp_path, monkeypatch):
    folder, result = tmp_path / "state", tmp_path / "result.fimkit"

    def run(when):
        command = [sys.executable, "-c", _KILLED, str(folder), str(when), str(result)]
        return subprocess.run(command, check=False, capture_output=True, text=True)

    for when in (3, 4):  # in the first pass, and then in the second
        killed = run(when)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["state"]
    done = run(0)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.fimkit", "state"]
    assert list(folder.iterdir()) == []
    resumed = fimkit.load(result)
    model, x, y = ranks.problem("mlp")
    data = ranks.batches(x, y, range(ranks.N), 2)
    seed = resumed._settings.seed
    monkeypatch.setattr("fimkit.estimators.settings.secrets.randbits", lambda bits: seed)
    expected = EKFAC(0.1, fisher="mc", cache_budget=0).fit(model, data)
    assert torch.equal(numbers(resumed), numbers(expected))


def test_progress_tells_the_time_left(capsys):
    model, x, y = ranks.problem("mlp")
    dataset = torch.utils.data.TensorDataset(x, y)
    slow = torch.utils.data.DataLoader(
        dataset, batch_size=5, collate_fn=lambda items: (time.sleep(0.15), _collate(items))[1]
    )
    Diagonal(verbose=1).fit(model, slow)
    shown = capsys.readouterr().err
    assert "/5 [00:00<00:0" in shown


def _collate(items):
    return torch.utils.data.default_collate(items)
