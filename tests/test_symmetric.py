"""Sums of outer products by what is on and above their diagonals."""

import pytest
import torch

from fimkit.operators.symmetric import add_products, mirror_

from .reference import error


@pytest.mark.parametrize("m", [1, 5, 255, 256, 257, 600])
@pytest.mark.parametrize("b", [1, 3])
def test_sums_of_products(m, b):
    total = torch.zeros(m, m, dtype=torch.float64)
    rows, weights = torch.randn(b, 7, m, dtype=torch.float64), torch.rand(b, 7, 1).double()
    for _ in range(2):
        add_products(total, rows, weights * rows)
    expected = 2 * torch.einsum("bri,brj->ij", rows, weights * rows)
    assert error(mirror_(total), expected) < 1e-12
    assert torch.equal(total, total.T)


@pytest.mark.parametrize("shape", [(4, 4), (2, 300, 300), (3, 2, 5, 5)])
def test_mirrored_in_place(shape):
    given = torch.randn(shape)
    found = given.clone()
    assert mirror_(found) is found
    assert torch.equal(found, given.triu() + given.triu(1).mT)
