"""Symmetric eigendecompositions, one alone and several side by side."""

import tracemalloc

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info

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


SPECTRA = {
    "zero": np.zeros,
    "all the same": np.ones,
    "gaps": lambda m: np.linspace(1, 2, m),
    "half of them zero": lambda m: np.linspace(-1, 1, m).clip(min=0),
    "clusters": lambda m: 1 + np.arange(m) // 10 + 1e-13 * np.arange(m),
    "all sizes": lambda m: np.logspace(-30, 0, m),
}


@pytest.mark.parametrize("m", [3, 64, 65, 130, 333])
@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_every_spectrum_is_found_in_the_memory_of_the_matrix(kind, m, diagonal, dtype):
    generator = np.random.default_rng(m)
    spectrum = generator.permutation(SPECTRA[kind](m))
    basis = np.linalg.qr(generator.standard_normal((m, m))).Q
    given = (np.diag(spectrum) if diagonal else (basis * spectrum) @ basis.T).astype(dtype)
    overwritten = given.copy()
    overwritten[np.tril_indices(m, -1)] = np.nan  # is not read
    eigenvalues = lapack.eigh_in_place(overwritten)

    assert eigenvalues.dtype == np.float64
    vectors, wide = overwritten.astype(np.float64), np.triu(given).astype(np.float64)
    wide += np.triu(wide, 1).T
    largest = spectrum.max()
    assert np.abs(eigenvalues - np.linalg.eigvalsh(wide)).max() <= 1e-12 * largest
    assert (np.diff(eigenvalues) >= 0).all()
    rounding = 1e-12 if dtype == np.float64 else 1e-6
    assert np.linalg.norm((vectors * eigenvalues) @ vectors.T - wide) <= rounding * largest
    assert np.linalg.norm(vectors.T @ vectors - np.eye(m)) <= rounding


@pytest.mark.parametrize("exponent", [-1074, -1060, -997, -500, 500, 997, 1008])
def test_tiny_and_huge_matrices_are_decomposed_as_exactly(exponent):
    factor = np.random.default_rng(0).integers(-9, 10, (80, 70)).astype(float)
    given = factor @ factor.T  # whole numbers, which no power of two rounds
    vectors = given * 2.0**exponent
    eigenvalues = lapack.eigh_in_place(vectors) / 2.0**exponent
    largest = np.linalg.norm(given)
    step = 5.0 if exponent < -1022 else 0.0  # half of one, of each number as it is returned
    assert np.linalg.norm(eigenvalues - np.linalg.eigvalsh(given)) <= 1e-12 * largest + step
    product = (vectors * eigenvalues) @ vectors.T
    assert np.linalg.norm(product - given) <= 1e-12 * largest + step
    assert np.linalg.norm(vectors.T @ vectors - np.eye(80)) <= 1e-12


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_two_squares_of_memory_are_taken(dtype):
    m = 500
    matrix = gram(m).numpy().astype(dtype)
    tracemalloc.start()
    lapack.eigh_in_place(matrix)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 16 * m**2 <= most < 17 * m**2


@pytest.mark.parametrize("start", [0, 1, 2])
def test_the_memory_of_a_matrix_is_used_from_an_address_of_float64(start):
    matrix = np.zeros(start + 65 * 65, np.float32)[start:].reshape(65, 65)
    kept = lapack._float64_within(matrix, 65 * 64 // 2)
    assert len(kept) == 65 * 64 // 2
    assert kept.flags.aligned
    kept[...] = np.nan
    assert np.isnan(matrix).sum() == len(kept)  # of each number, the half with the exponent


@pytest.mark.parametrize("m", [9, 90])
def test_only_the_upper_triangle_is_read(m):
    matrix = gram(m)
    eigenvalues, vectors = eigh(matrix.triu() + torch.full((m, m), 7.0).double().tril(-1))
    assert error((vectors * eigenvalues) @ vectors.T, matrix) < 1e-12


def test_a_transposed_matrix_is_read_as_it_is_given():
    matrix = gram(80).triu().T.contiguous().T  # in memory by columns
    eigenvalues, vectors = eigh(matrix)
    assert error((vectors * eigenvalues) @ vectors.T, gram(80)) < 1e-12


def test_matrices_too_large_for_the_workspace_are_decomposed_all_the_same(monkeypatch):
    monkeypatch.setattr("fimkit.operators.eigh.LARGEST", 70)
    monkeypatch.setattr("fimkit.operators.eigh.eigh_in_place", None)
    eigenvalues, vectors = eigh(gram(71))
    assert error((vectors * eigenvalues) @ vectors.T, gram(71)) < 1e-12


def test_the_largest_workspace_is_what_32_bits_count():
    def workspace(m):
        return 1 + 4 * m + m * lapack._stride(m)

    assert workspace(lapack.LARGEST) <= np.iinfo(np.intc).max < workspace(lapack.LARGEST + 1)


@pytest.mark.parametrize("m", [64, 65, 72, 96, 127, 128])
def test_rows_that_lie_farther_apart_than_they_are_long_are_decomposed(m):
    assert lapack._stride(m) % 16 == 8
    assert lapack._stride(m) >= m
    eigenvalues, vectors = eigh(gram(m))
    assert error((vectors * eigenvalues) @ vectors.T, gram(m)) < 1e-12
    assert error(vectors.T @ vectors, torch.eye(m).double()) < 1e-12


@pytest.mark.parametrize("m", [30, 70])
def test_matrices_anywhere_in_memory_are_overwritten(m):
    given = gram(2, m).float()
    matrix = torch.stack([given, given], -1)[..., 1]
    vectors = eigh_all({"strided": matrix}, Ranks())["strided"][1]
    assert vectors is matrix
    assert error(vectors.mT @ vectors, torch.eye(m).expand(2, m, m)) < 1e-6
    assert (
        error(vectors.mT @ given @ vectors, torch.linspace(1, 2, m).diag().expand(2, m, m)) < 1e-5
    )


def test_no_convergence_is_told_and_leaves_the_threads_as_they_were(monkeypatch):
    found = lapack._routine

    def fail(*arguments):
        arguments[-1]._obj.value = 3

    monkeypatch.setattr(
        lapack, "_routine", lambda name, number: fail if name == "dstedc" else found(name, number)
    )
    before = torch.get_num_threads(), [pool["num_threads"] for pool in threadpool_info()]
    with pytest.raises(np.linalg.LinAlgError, match=r"dstedc did not converge \(info=3\)"):
        eigh_all({"a": gram(70), "b": gram(80), "c": gram(65)}, Ranks())
    assert before == (torch.get_num_threads(), [pool["num_threads"] for pool in threadpool_info()])


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


def test_large_numbers_are_finite_though_their_sum_is_not():
    matrix = torch.full((40, 40), 1e36) + torch.eye(40) * 1e36
    eigenvalues, _ = eigh_all({"large": matrix.clone()}, Ranks())["large"]
    assert float(eigenvalues[-1]) == pytest.approx(41e36, rel=1e-5)
    for value in (torch.inf, torch.nan):
        matrix[3, 3] = value
        with pytest.raises(IFVPUsageError, match="'large' is not finite"):
            eigh_all({"large": matrix.clone()}, Ranks())
