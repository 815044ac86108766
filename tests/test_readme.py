"""The examples of README.md run, and do what they say."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fimkit
from fimkit import EKFAC, Explicit
from tests.dense import distance, solve

README = Path(__file__).parent.parent / "README.md"


def block(marker):
    """Return the fenced block that follows a marker."""
    found = re.search(
        rf"^<!-- {marker} -->\n+```\w*\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL
    )
    assert found is not None, f"README.md has no block after <!-- {marker} -->"
    return found[1]


def run(*codes):
    """Return the names that blocks define, one after another."""
    names = {}
    for code in codes:
        exec(compile(code, str(README), "exec"), names)
    return names


@pytest.mark.skipif(not README.exists(), reason="README.md is not here")
def test_example():
    code = block("example")
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    names = run(code)
    explicit, ifvp, gradients = (names[name] for name in ("explicit", "ifvp", "test_gradients"))
    assert [u.shape for u in ifvp] == [g.shape for g in gradients]
    u = torch.cat([piece.flatten() for piece in ifvp]).double()
    v = torch.cat([piece.flatten() for piece in gradients]).double()
    residual = explicit.fisher_.to_dense() @ u + 1e-3 * u - v
    assert float(residual.norm() / v.norm()) < 1e-4
    assert float((u - v).norm() / v.norm()) > 1


@pytest.mark.skipif(not README.exists(), reason="README.md is not here")
def test_influence_example():
    names = run(block("example"), block("influence-example"))
    exact = copy.deepcopy(names["model"]).double()
    gradients = []
    for x, y in zip(names["x"].double(), names["y"], strict=True):
        loss = torch.nn.functional.cross_entropy(exact(x[None]), y[None])
        pieces = torch.autograd.grad(loss, list(exact.parameters()))
        gradients.append(torch.cat([piece.flatten() for piece in pieces]))
    train, queries = torch.stack(gradients).split([200, 56])
    expected = queries @ solve(train.T @ train / 200, train, 1e-3).T

    scores, values, indices, suspicious = (
        torch.from_numpy(names[name]) for name in ("scores", "values", "indices", "suspicious")
    )
    assert distance(scores, expected) < 1e-4  # the model is float32
    best_first = scores.sort(1, descending=True)
    assert torch.equal(indices, best_first.indices[:, :5])
    assert distance(values, best_first.values[:, :5]) < 1e-12
    own = (train * solve(train.T @ train / 200, train, 1e-3)).sum(1)
    assert distance(suspicious, own) < 1e-4


@pytest.mark.skipif(not README.exists(), reason="README.md is not here")
def test_sklearn_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run(block("example"), block("sklearn-example"), block("save-example"))
    data, chosen = names["data"], names["chosen"]
    assert names["features"].shape == (200, 8)
    assert len(names["search"].cv_results_["params"]) == 6
    assert np.isfinite(names["search"].cv_results_["mean_test_score"]).all()
    expected = Explicit(chosen.regularization_).fit(data).transform(data)
    assert np.array_equal(chosen.transform(data), expected)
    assert np.array_equal(names["loaded"].transform(data), expected)


@pytest.mark.slow
@pytest.mark.skipif(not README.exists(), reason="README.md is not here")
def test_distributed_example(tmp_path):
    code = block("distributed-example")
    (tmp_path / "fit.py").write_text(code)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = {"PYTHONPATH": str(README.parent), "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(
        [*launch, "fit.py"], cwd=tmp_path, env={**os.environ, **path}, check=True, timeout=300
    )
    lines = code.splitlines()
    names = run("\n".join(lines[: lines.index(next(li for li in lines if "is_available" in li))]))
    alone = EKFAC().fit(names["model"], [names["train_set"][:]])
    together = fimkit.load(tmp_path / "model.fimkit")
    assert together.n_samples_seen_ == 200
    assert distance(together.fisher_.to_dense(), alone.fisher_.to_dense()) < 1e-5
