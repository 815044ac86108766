"""Numbers that stand for values: other ones for other values, the same in other processes."""

import functools
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from fimkit.checksum import checksum, digest


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


class Plain:
    def __init__(self, value):
        self.value = value


@dataclass(slots=True)
class Record:
    value: object


class Image:
    """Shows its numbers as images do."""

    def __init__(self, values):
        self._values = np.asarray(values)

    @property
    def __array_interface__(self):
        return self._values.__array_interface__


LONG = torch.arange(5000.0)

DIFFERENT = [
    (torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])),
    (torch.zeros(2, 3), torch.zeros(3, 2)),
    (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
    (torch.eye(3).to_sparse(), torch.eye(3).roll(1, 0).to_sparse()),
    (np.array(["a", "b"]), np.array(["a", "c"])),
    (np.array(["a", None], dtype=object), np.array(["b", None], dtype=object)),
    ("ab", "ac"),
    (["a", "b"], ["ab"]),
    ([["a"], "b"], [["a", "b"]]),
    ({"a": 1}, {"a": 2}),
    ({"a", "b"}, {"a", "c"}),
    (1, 1.0),
    (b"a", "a"),
    (torch.tanh, torch.sin),
    (functools.partial(max, 1), functools.partial(max, 2)),
    (Image([1, 2]), Image([1, 3])),
    *((kind(LONG), kind(LONG.flip(0))) for kind in (Slotted, Plain, Record)),
    (Plain([Plain("a")]), Plain([Plain("b")])),
]


@pytest.mark.parametrize("pair", DIFFERENT, ids=lambda pair: type(pair[0]).__name__)
def test_other_values_have_other_numbers(pair):
    first, second = pair
    assert digest(first) != digest(second)
    assert digest(first) == digest(first)


def test_what_holds_itself_ends():
    first, second = Plain("a"), Plain("b")
    first.itself, second.itself = first, second
    assert digest(first) != digest(second)


def test_other_processes_find_the_same_numbers():
    code = (
        "from tests.test_checksum import DIFFERENT, digest\n"
        "print(' '.join(digest(one) + digest(other) for one, other in DIFFERENT))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.split() == [digest(one) + digest(other) for one, other in DIFFERENT]


def test_a_sparse_tensor_is_the_same_uncoalesced():
    indices = torch.tensor([[0, 0, 2]])
    apart = torch.sparse_coo_tensor(
        indices, torch.tensor([1.0, 2.0, 3.0]), (3,), check_invariants=True
    )
    assert checksum(apart) == checksum(torch.tensor([3.0, 0, 3.0]).to_sparse())


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_compressed_sparse_tensors():
    eye = torch.eye(3)
    assert checksum(eye.to_sparse_csr()) == checksum(eye.to_sparse())
    assert checksum(eye.to_sparse_csr()) != checksum(eye.roll(1, 0).to_sparse_csr())
