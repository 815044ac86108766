"""The eigen-Kronecker operator against dense matrices made of explicit Kronecker products."""

import pickle
from functools import cache

import numpy as np
import pytest
import torch
from scipy.stats import special_ortho_group

from fimkit import SingularFisherError
from fimkit.operators import (
    BlockDiagonalOperator,
    Columns,
    DenseOperator,
    EigenKroneckerOperator,
    FactoredRows,
    MatrixLayout,
    RowMatrix,
)
from tests import reference
from tests.operator_suite import OperatorSuite, error


def orthogonal(groups, m, seed):
    """Return ``(groups, m, m)`` orthogonal matrices, none of them near symmetric."""
    if m == 1:
        return torch.ones(groups, 1, 1, dtype=torch.float64)
    bases = special_ortho_group.rvs(m, size=groups, random_state=seed).reshape(groups, m, m)
    assert all(np.abs(basis - basis.T).max() > 0.1 for basis in bases)
    return torch.from_numpy(bases)


def places(layout):
    """Return where each entry of the matrices ``(groups, out, columns)`` lies in the flat vector.

    The weight comes first in its own order, ``(groups, out, in)`` or ``(in, out)``, then the bias.
    """
    groups, out, in_ = layout.groups, layout.out, layout.in_
    weight = torch.arange(groups * out * in_)
    weight = weight.view(in_, out).T[None] if layout.transposed else weight.view(groups, out, in_)
    if not layout.bias:
        return weight
    bias = groups * out * in_ + torch.arange(groups * out).view(groups, out, 1)
    return torch.cat([weight, bias], 2)


def dense_of(layout, eigenvalues, output_basis, input_basis):
    """Return ``Σ_ij Λ_ij u_ij u_ijᵀ``, u_ij the outer product of columns i of Q_S and j of Q_A."""
    where = places(layout)
    out = torch.zeros(layout.size, layout.size, dtype=torch.float64)
    for g in range(layout.groups):
        for i in range(layout.out):
            for j in range(layout.columns):
                left = torch.eye(layout.out, dtype=torch.float64)[i]
                right = torch.eye(layout.columns, dtype=torch.float64)[j]
                left = left if output_basis is None else output_basis[g, :, i]
                right = right if input_basis is None else input_basis[g, :, j]
                vector = torch.zeros(layout.size, dtype=torch.float64)
                vector[where[g]] = torch.outer(left, right)
                out += eigenvalues[g, i, j] * torch.outer(vector, vector)
    return out


class KroneckerSuite(OperatorSuite):
    layout: MatrixLayout
    output_identity = False
    input_identity = False
    singular = False

    def parts(self):
        layout = self.layout
        generator = torch.Generator().manual_seed(1)
        shape = (layout.groups, layout.out, layout.columns)
        spread = torch.logspace(0, -2, layout.size, dtype=torch.float64)
        eigenvalues = spread[torch.randperm(layout.size, generator=generator)].view(shape)
        return (
            layout,
            eigenvalues,
            None if self.output_identity else orthogonal(layout.groups, layout.out, 2),
            None if self.input_identity else orthogonal(layout.groups, layout.columns, 3),
        )

    def make(self):
        return EigenKroneckerOperator(*self.parts())

    def dense(self, damping):
        matrix = _dense(type(self))
        return matrix + damping * torch.eye(len(matrix), dtype=torch.float64)

    @pytest.mark.parametrize(("positions", "c"), [(1, 1), (2, 1), (1, 3), (2, 2)])
    def test_solutions_of_rows_in_factors(self, operator, positions, c, monkeypatch):
        layout = self.layout
        inputs = torch.randn(3, positions, layout.groups, layout.columns, dtype=torch.float64)
        signals = torch.randn(3, c, positions, layout.groups, layout.out, dtype=torch.float64)
        whole = Columns((slice(0, layout.size),))
        rows = RowMatrix([(whole, FactoredRows(inputs, signals, layout))], layout.size)
        matrices = torch.einsum("nctgo,ntgi->ncgoi", signals, inputs).flatten(0, 1)
        vectors = torch.empty(3 * c, layout.size, dtype=torch.float64)
        vectors[:, places(layout).flatten()] = matrices.flatten(1)
        monkeypatch.setattr(EigenKroneckerOperator, "_rotate", None)  # which is of dense vectors
        for damping in self.dampings:
            expected = torch.linalg.solve(self.dense(damping), vectors.T).T
            found = torch.full_like(vectors, torch.nan)
            operator.solve_rows(rows, damping, found)
            assert error(found, expected) <= self.tolerance / damping


@cache
def _dense(suite):
    return dense_of(*suite().parts())


class TestMatrix(KroneckerSuite):
    layout = MatrixLayout(1, 3, 4)


class TestSquareMatrix(KroneckerSuite):
    """No shape tells the two sides apart."""

    layout = MatrixLayout(1, 4, 4)


class TestBias(KroneckerSuite):
    layout = MatrixLayout(1, 4, 3, bias=True)


class TestGroups(KroneckerSuite):
    layout = MatrixLayout(3, 2, 3)


class TestGroupsWithBias(KroneckerSuite):
    layout = MatrixLayout(2, 3, 2, bias=True)


class TestIdentityOutput(KroneckerSuite):
    layout = MatrixLayout(1, 5, 3)
    output_identity = True


class TestIdentityInput(KroneckerSuite):
    layout = MatrixLayout(2, 3, 3, bias=True)
    input_identity = True


class TestIdentities(KroneckerSuite):
    layout = MatrixLayout(1, 3, 4, transposed=True)
    output_identity = input_identity = True


class TestDiagonal(KroneckerSuite):
    layout = MatrixLayout(1, 7, 1)
    output_identity = input_identity = True

    def make(self):
        return EigenKroneckerOperator.diagonal_of(self.parts()[1].flatten())

    def dense(self, damping):
        return torch.diag(self.parts()[1].flatten() + damping)


class TestOfLowRank(KroneckerSuite):
    """Some eigenvalues are zero, as where there are fewer examples than directions."""

    layout = MatrixLayout(1, 3, 4)
    singular = True

    def parts(self):
        layout, eigenvalues, *bases = super().parts()
        return layout, torch.where(eigenvalues > 0.1, eigenvalues, 0), *bases


class TestTransposedWithBias(KroneckerSuite):
    layout = MatrixLayout(1, 3, 4, bias=True, transposed=True)


class TestBlocks(OperatorSuite):
    """Two layers whose biases lie apart from their weights, a dense block and a diagonal."""

    singular = False
    names = ("first", "second", "dense", "diagonal")
    columns = (
        (slice(3, 15), slice(17, 20)),  # a weight of (4, 3) numbers and its bias
        (slice(20, 32), slice(0, 3), slice(32, 35)),  # two groups of (3, 2) and their bias
        (slice(15, 17), slice(35, 37)),
        (slice(37, 40),),
    )

    def operators(self):
        first, second = TestTransposedWithBias(), TestGroupsWithBias()
        rows = torch.randn(9, 4, generator=torch.Generator().manual_seed(4)).double()
        diagonal = torch.tensor([0.3, 0.2, 0.7], dtype=torch.float64)
        return [
            (first.make(), first.dense(0.0)),
            (second.make(), second.dense(0.0)),
            (DenseOperator(reference.fisher(rows)), reference.fisher(rows)),
            (EigenKroneckerOperator.diagonal_of(diagonal), torch.diag(diagonal)),
        ]

    def make(self):
        blocks = zip(self.names, self.columns, self.operators(), strict=True)
        return BlockDiagonalOperator({name: (Columns(c), op) for name, c, (op, _) in blocks})

    def dense(self, damping):
        dampings = damping if isinstance(damping, tuple) else (damping,) * 4
        out = torch.zeros(40, 40, dtype=torch.float64)
        blocks = zip(self.columns, self.operators(), dampings, strict=True)
        for columns, (_, matrix), value in blocks:
            here = torch.cat([torch.arange(part.start, part.stop) for part in columns])
            out[here[:, None], here] = matrix + value * torch.eye(len(here), dtype=torch.float64)
        return out

    @pytest.mark.parametrize("k", [0, 1, 7])
    def test_a_damping_for_each_block(self, operator, k):
        dampings, vectors = (0.5, 0.02, 1e-3, 2.0), self.vectors(k)
        matrix = self.dense(dampings)
        expected = torch.linalg.solve(matrix, vectors.T).T
        assert error(operator.solve(vectors, dampings), expected) <= 1e-10
        assert error(operator.matmul(vectors, dampings), vectors @ matrix) <= 1e-12
        quadratics = operator.inverse_quadratic(vectors, dampings)
        assert error(quadratics, (vectors * expected).sum(1)) <= 1e-10
        assert operator.logdet(dampings) == pytest.approx(
            float(torch.linalg.slogdet(matrix)[1]), rel=1e-10
        )


def make(dtype=torch.float64):
    suite = TestBias()
    layout, *tensors = suite.parts()
    return EigenKroneckerOperator(layout, *(tensor.to(dtype) for tensor in tensors)), suite


def test_eigenvectors_are_columns():
    """F times a matrix made of two columns is that matrix times its eigenvalue."""
    operator, suite = make()
    _, eigenvalues, output_basis, input_basis = suite.parts()
    for i, j in ((0, 0), (1, 3), (3, 2)):
        matrix = torch.outer(output_basis[0, :, i], input_basis[0, :, j])
        flat = torch.cat([matrix[:, :-1].flatten(), matrix[:, -1]])[None]
        assert error(operator.matmul(flat), eigenvalues[0, i, j] * flat) <= 1e-13
        assert error(operator.solve(flat, 0.5), flat / (eigenvalues[0, i, j] + 0.5)) <= 1e-13


def test_float32():
    """Scalars are summed in float64, and vectors of float64 stay float64."""
    operator, suite = make(torch.float32)
    vectors = suite.vectors(5)
    assert operator.solve(vectors, 0.1).dtype == torch.float64
    expected = torch.linalg.solve(suite.dense(0.1), vectors.T).T
    assert error(operator.solve(vectors, 0.1), expected) <= 1e-5
    assert error(operator.matmul(vectors), vectors @ suite.dense(0.0)) <= 1e-5
    assert operator.inverse_quadratic(vectors, 0.1).dtype == torch.float64
    eigenvalues = operator.eigenvalues.double()
    assert operator.trace() == float(eigenvalues.sum())
    assert operator.logdet(0.1) == pytest.approx(float((eigenvalues + 0.1).log().sum()), rel=1e-14)


def test_one_of_many_groups_does_not_meet_another():
    suite = TestGroups()
    operator, where = suite.make(), places(suite.layout)
    vector = torch.zeros(1, operator.size, dtype=torch.float64)
    vector[0, where[1].flatten()] = 1.0
    product = operator.matmul(vector)
    assert product[0, where[0].flatten()].abs().max() == 0
    assert product[0, where[2].flatten()].abs().max() == 0
    assert product[0, where[1].flatten()].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_nearly_singular(dtype):
    """A damping is added exactly, so it only has to exceed the rounding of an eigenvalue."""
    operator, suite = make(dtype)
    operator.eigenvalues[0, 0, 0] = 0
    vectors, eps = suite.vectors(2).to(dtype), torch.finfo(dtype).eps
    largest = float(operator.eigenvalues.max())
    assert operator.solve(vectors, 2 * eps * largest).isfinite().all()
    for damping in (0.0, 0.5 * eps * largest):
        for attempt in (
            lambda damping: operator.solve(vectors, damping),
            lambda damping: operator.inverse_quadratic(vectors, damping),
            lambda damping: operator.logdet(damping),
        ):
            with pytest.raises(SingularFisherError, match="larger regularization"):
                attempt(damping)


def test_zero():
    """A layer that no example met: without damping there is no inverse, with it the identity's."""
    operator = EigenKroneckerOperator.diagonal_of(torch.zeros(4, dtype=torch.float64))
    vectors = torch.ones(2, 4, dtype=torch.float64)
    assert torch.equal(operator.solve(vectors, 0.5), 2 * vectors)
    assert operator.trace() == 0
    with pytest.raises(SingularFisherError):
        operator.solve(vectors, 0.0)


def test_pickle():
    operator, suite = make()
    vectors = suite.vectors(3)
    expected = operator.solve(vectors, 0.1)
    assert torch.equal(pickle.loads(pickle.dumps(operator)).solve(vectors, 0.1), expected)
