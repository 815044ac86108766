"""Every operator against its dense form."""

import pytest
import torch

from fimkit.exceptions import IFVPUsageError, SingularFisherError
from fimkit.operators import (
    BlockDiagonalOperator,
    Columns,
    DenseOperator,
    DenseRows,
    FactoredRows,
    GramOperator,
    MatrixLayout,
    RowMatrix,
    memory,
)
from tests import reference
from tests.operator_suite import OperatorSuite, error


def spread(n, p, seed=0):
    """Return an ``(n, p)`` matrix of rows with well-spread singular values."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, p, generator=generator, dtype=torch.float64)
    return rows * torch.logspace(0, -1, p, dtype=torch.float64)


class TestDense(OperatorSuite):
    singular = False

    def make(self):
        return DenseOperator(reference.fisher(spread(30, 8)))

    def dense(self, damping):
        return reference.damped(spread(30, 8), damping)


class TestDenseOfLowRank(OperatorSuite):
    def make(self):
        return DenseOperator(reference.fisher(spread(5, 9)))

    def dense(self, damping):
        return reference.damped(spread(5, 9), damping)


class TestGram(OperatorSuite):
    """Two groups of columns, one of them factored and split in two, and c weighted rows.

    Of all 8 examples two have no row.
    """

    n, c = 6, 2
    examples, size = 8, 17

    def parts(self):
        generator = torch.Generator().manual_seed(0)

        def randn(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        inputs = randn(self.n, 1, 1, 4)
        inputs[..., -1] = 1
        return inputs, randn(self.n, self.c, 1, 1, 3), randn(self.n, self.c, 5)

    def weights(self):
        return torch.linspace(0.1, 2, self.n * self.c, dtype=torch.float64).view(self.n, self.c)

    def make(self):
        inputs, signals, rows = self.parts()
        factored = FactoredRows(inputs, signals, MatrixLayout(1, 3, 3, bias=True))
        # The weight lies before the dense group, the bias after it.
        columns = Columns((slice(0, 9), slice(14, 17)))
        groups = [(columns, factored), (Columns((slice(9, 14),)), DenseRows(rows))]
        matrix = RowMatrix(groups, self.size, self.weights())
        return GramOperator(matrix, self.examples, torch.device("cpu"))

    def dense(self, damping):
        inputs, signals, rows = self.parts()
        out = damping * torch.eye(self.size, dtype=torch.float64)
        for i in range(self.n):
            for j in range(self.c):
                matrix = torch.outer(signals[i, j, 0, 0], inputs[i, 0, 0])
                row = torch.zeros(self.size, dtype=torch.float64)
                row[:17] = torch.cat([matrix[:, :-1].flatten(), rows[i, j], matrix[:, -1]])
                out += self.weights()[i, j] * torch.outer(row, row) / self.examples
        return out


def test_gram_of_columns_without_rows():
    """Columns that no group covers are zero, as `RowMatrix` says."""
    rows = torch.cat([spread(3, 5), torch.zeros(3, 2)], 1)
    groups = [(Columns((slice(0, 5),)), DenseRows(spread(3, 5)[:, None]))]
    operator = GramOperator(RowMatrix(groups, 7), 3, torch.device("cpu"))
    vectors = torch.ones(2, 7, dtype=torch.float64)
    torch.full((1000,), torch.nan, dtype=torch.float64)  # memory that is used again
    expected = reference.ifvp(rows, vectors, 0.5)
    assert error(operator.solve(vectors, 0.5), expected) <= 1e-12
    assert error(operator.matmul(vectors, 0.5), vectors @ reference.damped(rows, 0.5)) <= 1e-12
    assert error(operator.matmul(vectors), vectors @ reference.fisher(rows)) <= 1e-12
    quadratics = (vectors * expected).sum(1)
    assert error(operator.inverse_quadratic(vectors, 0.5), quadratics) <= 1e-12
    assert error(operator.spectrum().quadratics(vectors, [0.5])[0], quadratics) <= 1e-12
    assert error(operator.to_dense(), reference.fisher(rows)) <= 1e-12
    assert error(operator.diagonal(), reference.fisher(rows).diagonal()) <= 1e-12
    logdet = float(torch.linalg.slogdet(reference.damped(rows, 0.5))[1])
    assert abs(operator.logdet(0.5) - logdet) <= 1e-12


class TestGramOfManyRows(OperatorSuite):
    """More rows than parameters, without weights."""

    dampings = (1.0, 1e-2)

    def make(self):
        rows = DenseRows(spread(40, 4)[:, None])
        matrix = RowMatrix([(Columns((slice(0, 4),)), rows)], 4)
        return GramOperator(matrix, 40, torch.device("cpu"))

    def dense(self, damping):
        return reference.damped(spread(40, 4), damping)


class TestBlockDiagonal(OperatorSuite):
    """A dense block in two parts around a dual block."""

    outer = (*range(3), *range(9, 12))
    inner = tuple(range(3, 9))

    def make(self):
        dense = DenseOperator(reference.fisher(spread(20, 6, seed=1)))
        rows = RowMatrix([(Columns((slice(0, 6),)), DenseRows(spread(4, 6, seed=2)[:, None]))], 6)
        gram = GramOperator(rows, 4, torch.device("cpu"))
        return BlockDiagonalOperator(
            {
                "outer": (Columns((slice(0, 3), slice(9, 12))), dense),
                "inner": (Columns((slice(3, 9),)), gram),
            }
        )

    def dense(self, damping):
        dampings = damping if isinstance(damping, tuple) else (damping, damping)
        out = torch.zeros(12, 12, dtype=torch.float64)
        for block, rows, value in zip(
            (self.outer, self.inner),
            (spread(20, 6, seed=1), spread(4, 6, seed=2)),
            dampings,
            strict=True,
        ):
            here = torch.tensor(block)
            out[here[:, None], here] = reference.damped(rows, value)
        return out

    def test_a_damping_for_each_block(self, operator):
        dampings, vectors = (0.5, 0.02), self.vectors(5)
        matrix = self.dense(dampings)
        expected = torch.linalg.solve(matrix, vectors.T).T
        assert error(operator.solve(vectors, dampings), expected) <= 1e-10
        assert error(operator.matmul(vectors, dampings), vectors @ matrix) <= 1e-12
        quadratics = operator.inverse_quadratic(vectors, dampings)
        assert error(quadratics, (vectors * expected).sum(1)) <= 1e-10
        assert abs(operator.logdet(dampings) - float(torch.linalg.slogdet(matrix)[1])) <= 1e-9
        assert error(operator.diagonal(dampings), matrix.diagonal()) <= 1e-12
        assert abs(operator.trace(dampings) - float(matrix.trace())) <= 1e-10
        assert error(operator.to_dense(dampings), matrix) <= 1e-12


def test_dampings_of_blocks():
    """One number, one per block in order, or by name in any order; others are refused."""
    first, second = (
        DenseOperator(reference.fisher(spread(30, 4))),
        GramOperator(
            RowMatrix([(Columns((slice(0, 3),)), DenseRows(spread(2, 3)[:, None]))], 3),
            2,
            torch.device("cpu"),
        ),
    )
    places = Columns((slice(0, 4),)), Columns((slice(4, 7),))
    blocks = BlockDiagonalOperator({"a": (places[0], first), "b": (places[1], second)})
    v = spread(2, 7)
    expected = torch.cat([first.solve(v[:, :4], 0.1), second.solve(v[:, 4:], 0.5)], 1)
    assert torch.equal(blocks.solve(v, [0.1, 0.5]), expected)
    assert torch.equal(blocks.solve(v, {"b": 0.5, "a": 0.1}), expected)
    for damping in ([0.1], {"a": 0.1}, {"a": 0.1, "c": 0.5}, None, "auto"):
        with pytest.raises(IFVPUsageError, match=r"one for each of the 2 blocks.*: a, b"):
            blocks.solve(v, damping)
    with pytest.raises(SingularFisherError, match=r"^block 'b'"):
        blocks.logdet([0.1, 0.0])


@pytest.mark.parametrize("each", [0, 1, 7, 30, 1000])
@pytest.mark.parametrize("n", [0, 1, 7, 100])
def test_chunks_are_as_large_as_each_other(n, each):
    parts = list(memory.chunks(n, each, budget=70))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(n))
    sizes = {part.stop - part.start for part in parts}
    assert not sizes or max(sizes) - min(sizes) <= 1
    assert all(size == 1 or size * each <= 70 for size in sizes)
    assert len(parts) == -(-n // max(1, 70 // max(1, each)))
