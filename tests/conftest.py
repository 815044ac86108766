"""Settings and fixtures of all tests."""

import pytest
import torch

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
