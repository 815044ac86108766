"""Settings and fixtures of all tests."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed

# The matrices here are tiny: more threads only get in each other's way.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded():
    """Start every test from the same random state, and leave torch's as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def process_group(tmp_path, monkeypatch):
    """A group of this process alone."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch has no gloo backend")
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "gloo",
        init_method=(tmp_path / "store").as_uri(),
        rank=0,
        world_size=1,
        timeout=timedelta(seconds=20),
    )
    yield
    torch.distributed.destroy_process_group()
