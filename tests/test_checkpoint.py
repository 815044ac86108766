"""Fits that are interrupted and go on, against fits that are not."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

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
