"""The suite that every curvature operator passes; subclass it with `make` and `dense`."""

from __future__ import annotations

import pytest
import torch

from fimkit import SingularFisherError
from fimkit.operators import Columns, DenseRows, RowMatrix, memory, row_matrix


def error(found, expected):
    """Return the relative error of a tensor, norm against norm."""
    assert found.shape == expected.shape
    scale = torch.linalg.vector_norm(expected.double())
    difference = torch.linalg.vector_norm(found.double() - expected.double())
    return float(difference / scale) if scale else float(difference)


class OperatorSuite:
    """Compares an operator with its dense form.

    A subclass supplies ``make()``, the operator, and ``dense(damping)``, the matrix that
    ``solve(v, damping)`` inverts, in float64 and computed by other means.
    """

    dampings = (1.0, 1e-3)
    #: Whether there is a matrix without damping.
    undamped = True
    #: Whether there is no inverse without damping.
    singular = True
    tolerance = 1e-11

    def make(self):
        raise NotImplementedError

    def dense(self, damping):
        raise NotImplementedError

    @pytest.fixture(autouse=True, params=[None, 1, 3000], ids="budget={}".format)
    def _budget(self, request, monkeypatch):
        """Run with the usual chunks, with chunks of one item, and with a few items each."""
        if request.param is not None:
            monkeypatch.setattr(memory, "BUDGET", request.param)
            monkeypatch.setattr(memory, "WORKING_SET", request.param)

    @pytest.fixture
    def operator(self):
        return self.make()

    @property
    def all_dampings(self):
        """Every damping for which there is a matrix, the least first."""
        return (0.0, *self.dampings) if self.undamped else self.dampings

    def spanned(self):
        """Return vectors that span the range of the matrix, as the gradients do."""
        return self.dense(0.0)

    def vectors(self, k, dtype=torch.float64):
        """Return k vectors: in the range of the matrix, then random ones."""
        spanned = self.spanned()
        random = torch.randn(k, spanned.shape[1], dtype=torch.float64)
        combined = torch.randn(k, len(spanned), dtype=torch.float64) @ spanned
        random[::2] = combined[::2]
        return random.to(dtype)

    def test_shape(self, operator):
        p = len(self.dense(1.0))
        assert (operator.size, operator.shape) == (p, (p, p))
        assert operator.device == torch.device("cpu")

    @pytest.mark.parametrize("k", [0, 1, 7, 40])
    def test_products(self, operator, k):
        vectors = self.vectors(k)
        before = vectors.clone()
        for damping in self.all_dampings:
            expected = vectors @ self.dense(damping)
            assert error(operator.matmul(vectors, damping), expected) <= self.tolerance
        if self.undamped:
            assert error(operator.matmul(vectors), vectors @ self.dense(0.0)) <= self.tolerance
        assert torch.equal(vectors, before)

    @pytest.mark.parametrize("k", [0, 1, 7, 40])
    def test_solutions(self, operator, k):
        vectors = self.vectors(k)
        before = vectors.clone()
        for damping in self.dampings:
            expected = torch.linalg.solve(self.dense(damping), vectors.T).T
            found = operator.solve(vectors, damping)
            assert error(found, expected) <= self.tolerance / damping
            quadratics = (vectors * expected).sum(1)
            found = operator.inverse_quadratic(vectors, damping)
            assert found.dtype == torch.float64
            assert error(found, quadratics) <= self.tolerance / damping
        assert torch.equal(vectors, before)

    def test_solutions_of_rows(self, operator, monkeypatch):
        """Gradients in any groups, several of an example, in parts that fit the budget."""
        monkeypatch.setattr(row_matrix, "BUDGET", 1)
        vectors = self.vectors(4)
        columns = [slice(i, i + 1) for i in range(operator.size)]
        groups = [(Columns((c,)), DenseRows(vectors[:, c].reshape(2, 2, 1))) for c in columns]
        rows = RowMatrix(groups, operator.size)
        for damping in self.dampings:
            expected = torch.linalg.solve(self.dense(damping), vectors.T).T
            found = torch.full_like(vectors, torch.nan)
            operator.solve_rows(rows, damping, found)
            assert error(found, expected) <= self.tolerance / damping
        found = torch.full((4, operator.size + 2), torch.nan)
        operator.solve_rows(rows, 1.0, found[:, 1:-1])
        assert found[:, [0, -1]].isnan().all()
        expected = torch.linalg.solve(self.dense(1.0), vectors.T).T
        assert error(found[:, 1:-1], expected) <= 4 * torch.finfo(torch.float32).eps

    def test_solve_into_a_given_tensor(self, operator):
        vectors = self.vectors(5)
        wide = torch.full((5, operator.size + 2), torch.nan, dtype=vectors.dtype)
        found = operator.solve(vectors, 1.0, wide[:, 1:-1])
        assert found.data_ptr() == wide[:, 1:].data_ptr()
        assert torch.equal(wide[:, 1:-1], operator.solve(vectors, 1.0))
        assert wide[:, [0, -1]].isnan().all()

    def test_solve_undoes_matmul(self, operator):
        vectors = self.vectors(5)
        for damping in self.dampings:
            found = operator.solve(operator.matmul(vectors, damping), damping)
            assert error(found, vectors) <= self.tolerance / damping

    def test_dampings_in_any_order(self, operator):
        """A factor that is kept for one damping is not taken for another."""
        vectors = self.vectors(2)
        first, second = self.dampings
        alone = [self.make().solve(vectors, damping) for damping in (first, second)]
        mixed = [operator.solve(vectors, damping) for damping in (first, second, first)]
        assert torch.equal(mixed[0], alone[0])
        assert torch.equal(mixed[1], alone[1])
        assert torch.equal(mixed[2], alone[0])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_results_have_the_dtype_of_the_vectors(self, operator, dtype):
        vectors = self.vectors(3).div(10).to(dtype)
        eps = torch.finfo(dtype).eps
        damping = self.all_dampings[0]
        product = operator.matmul(vectors, damping)
        assert product.dtype == dtype
        assert error(product, vectors.double() @ self.dense(damping)) <= 4 * eps
        solution = operator.solve(vectors, 1.0)
        assert solution.dtype == dtype
        expected = torch.linalg.solve(self.dense(1.0), vectors.double().T).T
        assert error(solution, expected) <= 4 * eps

    def test_columns_of_a_wider_array(self, operator):
        """Vectors need not be contiguous."""
        wide = torch.zeros(operator.size, 6, dtype=torch.float64)
        wide[:, ::2] = self.vectors(3).T
        vectors = wide[:, ::2].T
        assert not vectors.is_contiguous()
        for method in (operator.matmul, operator.solve, operator.inverse_quadratic):
            expected = method(vectors.contiguous(), 1.0)
            assert error(method(vectors, 1.0), expected) <= self.tolerance

    def test_scalars_and_diagonal(self, operator):
        for damping in self.all_dampings:
            matrix = self.dense(damping)
            assert error(operator.diagonal(damping), matrix.diagonal()) <= self.tolerance
            assert operator.trace(damping) == pytest.approx(float(matrix.trace()), rel=1e-11)
        if self.undamped:
            assert torch.equal(operator.diagonal(), operator.diagonal(0.0))
            assert operator.trace() == operator.trace(0.0)
        for damping in self.dampings:
            expected = float(torch.linalg.slogdet(self.dense(damping))[1])
            assert operator.logdet(damping) == pytest.approx(expected, rel=1e-9, abs=1e-9)

    def test_dense(self, operator):
        for damping in self.all_dampings:
            dense = operator.to_dense(damping)
            assert error(dense, self.dense(damping)) <= self.tolerance
            dense.zero_()
            again = operator.to_dense(damping)
            assert error(again, self.dense(damping)) <= self.tolerance, "a copy, not a view"
        if self.undamped:
            assert torch.equal(operator.to_dense(), operator.to_dense(0.0))

    def test_spectrum(self, operator):
        vectors, spectrum = self.vectors(4), operator.spectrum()
        quadratics = spectrum.quadratics(vectors, self.dampings)
        for i, damping in enumerate(self.dampings):
            expected = operator.inverse_quadratic(vectors, damping)
            assert error(quadratics[i], expected) <= 10 * self.tolerance / damping
        assert spectrum.logdets(self.dampings) == pytest.approx(
            [operator.logdet(damping) for damping in self.dampings], rel=1e-9, abs=1e-9
        )

    def test_no_damping(self, operator):
        vectors = self.vectors(2)
        if not self.singular:
            expected = torch.linalg.solve(self.dense(0.0), vectors.T).T
            assert error(operator.solve(vectors, 0.0), expected) <= 1e-7
            return
        attempts = [
            lambda damping: operator.solve(vectors, damping),
            lambda damping: operator.inverse_quadratic(vectors, damping),
            lambda damping: operator.logdet(damping),
        ]
        if not self.undamped:
            attempts += [
                lambda damping: operator.matmul(vectors, damping),
                operator.diagonal,
                operator.trace,
                operator.to_dense,
                lambda damping: operator.spectrum().quadratics(vectors, [damping]),
            ]
        if not self.undamped or torch.linalg.matrix_rank(self.dense(0.0)) < operator.size:
            attempts.append(lambda damping: operator.spectrum().logdets([damping]))
        for attempt in attempts:
            for damping in (0.0, 1e-18 * float(self.spanned().square().sum())):
                with pytest.raises(SingularFisherError, match="larger regularization"):
                    attempt(damping)
