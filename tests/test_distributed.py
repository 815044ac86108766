"""Fits of several processes, each with its own shard, against one process with all examples."""

from __future__ import annotations

import pytest
import torch

from tests import ranks


@pytest.fixture(scope="module")
def alone():
    """What one process finds, without a group."""
    torch.set_num_threads(1)
    found = {}
    for name, (kind, make) in ranks.CASES.items():
        model, x, y = ranks.problem(kind)
        step = 1 if kind == "branching" else 4
        estimator = make().fit(model, ranks.batches(x, y, range(ranks.N), step))
        found[name] = ranks.results(estimator, model, x, y)
    return found


@pytest.fixture(scope="module", params=[1, 2, pytest.param(4, marks=pytest.mark.slow)])
def together(request, tmp_path_factory):
    """What every rank of a group finds, in all cases."""
    return ranks.start(ranks.fit_cases, request.param, folder=tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", ranks.CASES)
def test_ranks_fit_what_one_process_fits(alone, together, name):
    for rank, found in enumerate(together):
        assert isinstance(found, dict), f"rank {rank}: {found}"
        assert found[name]["coverage"] == alone[name]["coverage"]
        for key, values in found[name].items():
            if key == "coverage":
                continue
            expected = alone[name][key]
            assert values.shape == expected.shape
            distance = float((values - expected).norm() / expected.norm())
            assert distance < 1e-10, f"rank {rank}, {key}: {distance}"
