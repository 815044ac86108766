"""Symmetric eigendecompositions, one alone and several side by side."""

import numpy as np
import pytest
import torch

from fimkit.distributed import Ranks
from fimkit.exceptions import IFVPUsageError
from fimkit.operators import lapack
from fimkit.operators.eigh import eigh, eigh_all

from .reference import error


def gram(*shape, seed=0):
    """Return positive definite matrices with gaps between their eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(
        torch.randn(*shape, shape[-1], dtype=torch.float64, generator=generator)
    )
    return (basis.Q * torch.linspace(1, 2, shape[-1], dtype=torch.float64)) @ basis.Q.mT


@pytest.mark.parametrize("shape", [(1,), (5,), (63,), (64,), (150,), (3, 5), (2, 70), (2, 2, 65)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_matrix_is_its_eigenvectors_and_eigenvalues(shape, dtype):
    matrix = gram(*shape).to(dtype)
    given = matrix.clone()
    eigenvalues, vectors = eigh(matrix)
    assert eigenvalues.dtype == vectors.dtype == torch.float64
    assert torch.equal(matrix, given)
    m, unit = matrix.double(), torch.eye(shape[-1], dtype=torch.float64)
    symmetric = m.tril() + m.tril(-1).mT
    assert error(m @ vectors, vectors * eigenvalues[..., None, :]) < 1e-6
    assert error((vectors * eigenvalues[..., None, :]) @ vectors.mT, symmetric) < 1e-12
    assert error(vectors.mT @ vectors, unit.expand_as(m)) < 1e-12
    assert torch.equal(eigenvalues, eigenvalues.sort().values)


@pytest.mark.parametrize("m", [9, 90])
def test_only_the_lower_triangle_is_read(m):
    matrix = gram(m)
    eigenvalues, vectors = eigh(matrix.tril() + torch.full((m, m), 7.0).double().triu(1))
    assert error((vectors * eigenvalues) @ vectors.T, matrix) < 1e-12


def test_a_transposed_matrix_is_read_as_it_is_given():
    matrix = gram(80).tril().T.contiguous().T  # in memory by columns
    eigenvalues, vectors = eigh(matrix)
    assert error((vectors * eigenvalues) @ vectors.T, gram(80)) < 1e-12


def test_matrices_too_large_for_the_workspace_are_decomposed_all_the_same(monkeypatch):
    monkeypatch.setattr("fimkit.operators.eigh.LARGEST", 70)
    monkeypatch.setattr("fimkit.operators.eigh.eigh_in_place", None)
    eigenvalues, vectors = eigh(gram(71))
    assert error((vectors * eigenvalues) @ vectors.T, gram(71)) < 1e-12


def test_the_largest_workspace_is_what_32_bits_count():
    m = lapack.LARGEST
    assert 1 + 4 * m + m**2 <= np.iinfo(np.intc).max < 1 + 4 * (m + 1) + (m + 1) ** 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_matrices_side_by_side_are_overwritten_by_their_eigenvectors(dtype):
    sizes = {"a": (1, 120), "b": (2, 30), "c": (1, 90), "d": (1, 7), "e": (3, 66)}
    given = {name: gram(*shape, seed=i).to(dtype) for i, (name, shape) in enumerate(sizes.items())}
    matrices = {name: matrix.clone() for name, matrix in given.items()}
    threads = torch.get_num_threads()
    found = eigh_all(matrices, Ranks())
    assert torch.get_num_threads() == threads
    assert list(found) == list(sizes)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for name, (eigenvalues, vectors) in found.items():
        assert eigenvalues.dtype == vectors.dtype == dtype
        assert vectors.data_ptr() == matrices[name].data_ptr()
        product = (vectors * eigenvalues[..., None, :]) @ vectors.mT
        assert error(product, given[name]) < tolerance


def test_a_matrix_that_is_not_finite_is_refused_by_its_name():
    broken = gram(70)
    broken[3, 2] = torch.inf
    with pytest.raises(IFVPUsageError, match=r"'second'.*not finite"):
        eigh_all({"first": gram(70), "second": broken}, Ranks())
