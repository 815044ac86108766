"""`DataInfOperator` against its formula, written out example by example."""

import pickle
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fimkit import SingularFisherError
from fimkit.operators import (
    BlockDiagonalOperator,
    Columns,
    DataInfOperator,
    DenseRows,
    FactoredRows,
    MatrixLayout,
    RowMatrix,
)
from tests import dense
from tests.operator_suite import OperatorSuite, error

CPU = torch.device("cpu")


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def dense_rows(rows):
    """Return ``(n, c, p)`` rows as a matrix of one group."""
    p = rows.shape[2]
    return [(Columns((slice(0, p),)), DenseRows(rows))]


class DataInfSuite(OperatorSuite):
    """Two groups of columns, one of them factored and split in two, and c rows per example.

    A subclass says how many rows there are, and which of them are taken together.
    """

    undamped = False
    dampings = (1.0, 1e-2)
    n, c, joint = 6, 1, False
    #: All examples, those without rows counted.
    examples = 6
    size = 19  # two columns without rows

    def parts(self):
        inputs = randn(self.n, 1, 1, 4, seed=1)
        inputs[..., -1] = 1
        return inputs, randn(self.n, self.c, 1, 1, 3, seed=2), randn(self.n, self.c, 5, seed=3)

    def weights(self):
        values = torch.linspace(0.1, 2, self.n * self.c, dtype=torch.float64).view(self.n, self.c)
        return values if self.joint else values / values.sum(1, True)

    def make(self):
        inputs, signals, rows = self.parts()
        factored = FactoredRows(inputs, signals, MatrixLayout(1, 3, 3, bias=True))
        # The weight lies before the dense group, the bias after it.
        columns = Columns((slice(0, 9), slice(14, 17)))
        groups = [(columns, factored), (Columns((slice(9, 14),)), DenseRows(rows))]
        matrix = RowMatrix(groups, self.size, self.weights() if self.c > 1 else None)
        return DataInfOperator(matrix, self.examples, CPU, joint=self.joint)

    def rows(self):
        """Return the rows one by one, ``(n, c, p)``."""
        inputs, signals, stored = self.parts()
        out = torch.zeros(self.n, self.c, self.size, dtype=torch.float64)
        for i in range(self.n):
            for j in range(self.c):
                matrix = torch.outer(signals[i, j, 0, 0], inputs[i, 0, 0])
                out[i, j, :17] = torch.cat([matrix[:, :-1].flatten(), stored[i, j], matrix[:, -1]])
        return out

    def mean(self, damping):
        weights = self.weights() if self.c > 1 else torch.ones(self.n, 1)
        return dense.mean_of_inverses(
            self.rows(), weights, self.examples, damping, together=self.joint
        )

    def dense(self, damping):
        return torch.linalg.inv(self.mean(damping))

    def spanned(self):
        return self.rows().flatten(0, 1)

    @pytest.mark.parametrize("damping", [1e2, 1.0, 1e-2, 1e-5])
    def test_solutions_are_those_of_the_formula(self, operator, damping):
        """Without an inverse in between, as the suite's have it; k equal to the width, too."""
        for k in (1, operator.size, 40):
            vectors = self.vectors(k)
            found = operator.solve(vectors, damping)
            assert error(found, vectors @ self.mean(damping)) <= 1e-12 / min(1, damping**0.5)
            quadratics = torch.einsum("kp,pq,kq->k", vectors, self.mean(damping), vectors)
            assert error(operator.inverse_quadratic(vectors, damping), quadratics) <= 1e-10

    def test_positive_definite(self, operator):
        for damping in (1.0, 1e-3, 1e-6):
            inverse = operator.solve(torch.eye(operator.size, dtype=torch.float64), damping)
            assert error(inverse, inverse.T) <= 1e-12
            assert torch.linalg.eigvalsh(inverse).min() > 0

    def test_trace_of_the_fisher(self, operator):
        weights = self.weights() if self.c > 1 else torch.ones(self.n, 1)
        total = float((weights * self.rows().square().sum(2)).sum()) / self.examples
        assert operator.fisher_trace == pytest.approx(total, rel=1e-12)


class TestOneRowEach(DataInfSuite):
    pass


class TestMoreExamplesThanParameters(DataInfSuite):
    n = examples = 30


class TestExamplesWithoutRows(DataInfSuite):
    examples = 8


class TestWeightedRows(DataInfSuite):
    """As for sampled labels: the mean over all samples."""

    c = 3


class TestHardlyMoreRowsThanParameters(DataInfSuite):
    n = examples = 24

    def test_a_path_multiplies_rows_once(self, monkeypatch):
        """What it multiplies anew for each λ, as a matrix over parameters is, takes far longer."""
        operator, products = self.make(), []
        gram = RowMatrix.gram
        monkeypatch.setattr(RowMatrix, "outer", None)
        monkeypatch.setattr(RowMatrix, "gram", lambda *given: products.append(1) or gram(*given))
        found = operator.spectrum().logdets(self.dampings)
        assert found == pytest.approx([float(self.dense(d).logdet()) for d in self.dampings])
        assert len(products) == 1


class TestManyWeightedRows(DataInfSuite):
    n = examples = 15
    c = 2


class TestRowsTakenTogether(DataInfSuite):
    """As for the exact Fisher: an example's rows make one F_i."""

    c, joint = 3, True


class TestManyRowsTakenTogether(DataInfSuite):
    n = examples = 9
    c, joint = 4, True


class TestBlocks(OperatorSuite):
    """Two blocks, the first in two parts."""

    undamped = False
    dampings = (1.0, 1e-2)
    outer = (*range(3), *range(9, 12))
    inner = tuple(range(3, 9))

    def rows(self):
        return randn(7, 1, 6, seed=1), randn(4, 1, 6, seed=2)

    def make(self):
        first, second = (
            DataInfOperator(RowMatrix(dense_rows(rows), 6), len(rows), CPU) for rows in self.rows()
        )
        return BlockDiagonalOperator(
            {
                "outer": (Columns((slice(0, 3), slice(9, 12))), first),
                "inner": (Columns((slice(3, 9),)), second),
            }
        )

    def dense(self, damping):
        dampings = damping if isinstance(damping, tuple) else (damping, damping)
        out = torch.zeros(12, 12, dtype=torch.float64)
        for block, rows, value in zip((self.outer, self.inner), self.rows(), dampings, strict=True):
            here = torch.tensor(block)
            ones = torch.ones(len(rows), 1)
            mean = dense.mean_of_inverses(rows, ones, len(rows), value, together=False)
            out[here[:, None], here] = torch.linalg.inv(mean)
        return out

    def spanned(self):
        return self.dense(1.0)

    def test_a_damping_for_each_block(self, operator):
        dampings, vectors = (0.5, 0.02), self.vectors(5)
        matrix = self.dense(dampings)
        expected = torch.linalg.solve(matrix, vectors.T).T
        assert error(operator.solve(vectors, dampings), expected) <= 1e-10
        assert error(operator.matmul(vectors, dampings), vectors @ matrix) <= 1e-11
        quadratics = operator.inverse_quadratic(vectors, dampings)
        assert error(quadratics, (vectors * expected).sum(1)) <= 1e-10
        assert abs(operator.logdet(dampings) - float(torch.linalg.slogdet(matrix)[1])) <= 1e-9
        assert error(operator.diagonal(dampings), matrix.diagonal()) <= 1e-11
        assert operator.trace(dampings) == pytest.approx(float(matrix.trace()), rel=1e-11)
        assert error(operator.to_dense(dampings), matrix) <= 1e-11


def test_rows_taken_together_are_not_rows_on_their_own():
    """The distinction matters: scaling each row on its own would make M indefinite."""
    rows = randn(1, 1, 4, seed=1).expand(5, 6, 4) + 1e-3 * randn(5, 6, 4)
    matrix = RowMatrix(dense_rows(rows), 4, torch.ones(5, 6, dtype=torch.float64))
    eye = torch.eye(4, dtype=torch.float64)
    together = DataInfOperator(matrix, 5, CPU, joint=True).solve(eye, 0.1)
    assert torch.linalg.eigvalsh(together).min() > 0
    alone = DataInfOperator(matrix, 5, CPU).solve(eye, 0.1)
    assert torch.linalg.eigvalsh(alone).min() < 0


def test_one_parameter():
    """Where all gradients are parallel M is a mean of numbers."""
    rows = randn(9, 1, 1)
    operator = DataInfOperator(RowMatrix(dense_rows(rows), 1), 9, CPU)
    for damping in (1.0, 1e-3, 1e-6):
        expected = (1 / (damping + rows.square())).mean()
        found = operator.solve(torch.ones(1, 1, dtype=torch.float64), damping)
        assert float(found) == pytest.approx(float(expected), rel=1e-9)
        assert operator.trace(damping) == pytest.approx(1 / float(expected), rel=1e-9)


@pytest.mark.parametrize("damping", [1e-2, 1e-5, 1e-8, 1e-11, 1e-13])
def test_a_vector_along_gradients_far_longer(damping):
    """M v of v = g is ‖g‖⁻² v, a difference of 1/λ v: right to five digits, or refused."""
    g = randn(1, 7)
    operator = DataInfOperator(RowMatrix(dense_rows(g[:, None]), 7), 1, CPU)
    exact = 1 / (damping + g.square().sum())
    if damping >= 1e-8:
        solved = operator.solve(g, damping)
        assert error(solved, g * exact) <= 1e-5
        norm = g.square().sum() * exact
        assert abs(operator.inverse_quadratic(g, damping) - norm) <= 1e-5 * norm
    elif damping < 1e-11:
        for ask in (operator.solve, operator.inverse_quadratic):
            with pytest.raises(SingularFisherError, match="less than five digits"):
                ask(g, damping)
    across = randn(1, 7, seed=1)
    across -= (across @ g.T) / g.square().sum() * g
    assert error(operator.solve(across, damping), across / damping) <= 1e-9


def test_zero_gradients():
    operator = DataInfOperator(RowMatrix(dense_rows(torch.zeros(3, 1, 4)), 4), 3, CPU)
    vectors = randn(2, 4)
    assert error(operator.solve(vectors, 0.1), vectors / 0.1) <= 1e-15
    assert error(operator.matmul(vectors, 0.1), vectors * 0.1) <= 1e-15
    with pytest.raises(SingularFisherError, match="larger regularization"):
        operator.solve(vectors, 0.0)


def float32_rows(n, p, spread, scale=1.0):
    """Return ``(n, 1, p)`` rows around one direction, at a distance of ``spread``."""
    return (scale * (randn(p) + spread * randn(n, 1, p, seed=1))).float()


@pytest.mark.parametrize("n", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("p", [1, 3, 12, 300])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("fraction", [0.1, 1e-3, 1e-6])
def test_float32_rows(n, p, spread, fraction):
    """Training gradients as vectors, of which nearly nothing is left where λ is small."""
    rows = float32_rows(n, p, spread)
    operator = DataInfOperator(RowMatrix(dense_rows(rows), p), n, CPU)
    wide = rows.double()
    damping = fraction * float(wide.square().mean())
    mean = dense.mean_of_inverses(wide, torch.ones(n, 1), n, damping, together=False)
    vectors = torch.cat([rows[:, 0], randn(5, p, seed=2).float()])
    found = operator.solve(vectors, damping)
    assert found.dtype == torch.float32
    expected = vectors.double() @ mean
    for vector, own in zip(found, expected, strict=True):
        assert error(vector, own) <= 2e-6


@pytest.mark.parametrize(
    ("scale", "length"),
    [
        *[(1e-24, 1e-30), (1e-17, 1e-30), (1e-10, 1e-35), (1e-10, 1e-12), (1.0, 1e-25)],
        *[(1.0, 1e30), (1e10, 1e-15), (1e18, 1e8), (1e18, 1e15), (1e18, 1e25)],
    ],
)
def test_float32_rows_whose_products_leave_its_range(scale, length):
    rows = float32_rows(8, 20, 1.0, scale)
    operator = DataInfOperator(RowMatrix(dense_rows(rows), 20), 8, CPU)
    damping = 0.1 * float(rows.double().square().mean())
    near_one, ones = rows.double() / scale, torch.ones(8, 1)
    mean = dense.mean_of_inverses(near_one, ones, 8, damping / scale**2, together=False)
    vectors = (length * randn(3, 20, seed=2)).float()
    expected = vectors.double() @ mean / scale**2
    assert error(operator.solve(vectors, damping), expected) <= 1e-6


@pytest.mark.parametrize("spread", [1e-3, 1.0])
def test_float32_rows_taken_together(spread):
    rows = float32_rows(12, 40, spread).view(4, 3, 40)
    weights = torch.full((4, 3), 1 / 3)
    operator = DataInfOperator(RowMatrix(dense_rows(rows), 40, weights), 4, CPU, joint=True)
    damping = 1e-5 * float(rows.square().mean())
    mean = dense.mean_of_inverses(rows.double(), weights, 4, damping, together=True)
    vectors = rows.flatten(0, 1)
    for found, own in zip(operator.solve(vectors, damping), vectors.double() @ mean, strict=True):
        assert error(found, own) <= 1e-6


@pytest.mark.parametrize("coarse", ["autocast", "matmul precision", "a backend's own"])
def test_float32_products_are_not_left_to_a_coarser_dtype(coarse, monkeypatch):
    rows = float32_rows(30, 40, 1.0)
    operator = DataInfOperator(RowMatrix(dense_rows(rows), 40), 30, CPU)
    mean = dense.mean_of_inverses(rows.double(), torch.ones(30, 1), 30, 0.1, together=False)
    vectors = randn(4, 40, seed=2).float()
    context = nullcontext()
    if coarse == "autocast":
        context = torch.autocast("cpu", dtype=torch.bfloat16)
    elif coarse == "matmul precision":
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    else:
        monkeypatch.setattr(torch, "get_float32_matmul_precision", _refuse)
    with context, Dtypes() as dtypes:
        found = operator.solve(vectors, 0.1)
    assert error(found, vectors.double() @ mean) <= 1e-6
    assert dtypes.of_products == {torch.float64}
    with Dtypes() as dtypes:
        monkeypatch.undo()
        operator.solve(vectors, 0.1)
    assert dtypes.of_products == {torch.float32}


def _refuse():
    raise RuntimeError("you have used mix of the legacy and new APIs")


class Dtypes(TorchDispatchMode):
    """Notes the dtypes that matrices are multiplied in."""

    def __init__(self):
        super().__init__()
        self.of_products = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in {"mm", "bmm", "addmm", "addmm_"}:
            self.of_products.add(out.dtype)
        return out


@pytest.mark.parametrize("joint", [False, True])
def test_pickles_without_what_it_can_make_again(joint):
    rows = randn(20, 2, 50)
    weights = torch.full((20, 2), 0.5, dtype=torch.float64)
    operator = DataInfOperator(RowMatrix(dense_rows(rows), 50, weights), 20, CPU, joint=joint)
    before = len(pickle.dumps(operator))
    vectors = randn(3, 50)
    expected = operator.matmul(vectors, 0.1)
    assert len(pickle.dumps(operator)) == before
    assert torch.equal(pickle.loads(pickle.dumps(operator)).matmul(vectors, 0.1), expected)
