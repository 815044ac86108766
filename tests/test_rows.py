"""Factored rows against the outer products that they stand for."""

from dataclasses import dataclass, replace

import pytest
import torch

from fimkit.operators import (
    Columns,
    DenseRows,
    FactoredRows,
    LookupRows,
    MatrixLayout,
    RowMatrix,
    ZeroRows,
    join_rows,
    memory,
)
from tests.operator_suite import error


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Factors:
    """Rows of n examples, c each, with T positions, and what they stand for."""

    n: int = 5
    c: int = 1
    positions: int = 1
    groups: int = 1
    out: int = 3
    in_: int = 4
    bias: bool = False
    transposed: bool = False

    def make(self):
        layout = MatrixLayout(self.groups, self.out, self.in_, self.bias, self.transposed)
        inputs, signals = self.factors()
        return FactoredRows(inputs, signals, layout)

    def factors(self):
        inputs = randn(self.n, self.positions, self.groups, self.in_ + self.bias)
        if self.bias:
            inputs[..., -1] = 1
            inputs[-1, -1, :, -1] = 0  # a position that does not meet the bias
        return inputs, randn(self.n, self.c, self.positions, self.groups, self.out)

    def dense(self):
        """Sum the outer products, one by one."""
        inputs, signals = self.factors()
        rows = []
        for i in range(self.n):
            for j in range(self.c):
                weights, biases = [], []
                for group in range(self.groups):
                    matrix = sum(
                        torch.outer(signals[i, j, t, group], inputs[i, t, group])
                        for t in range(self.positions)
                    )
                    weight = matrix[:, : self.in_]
                    weights.append((weight.T if self.transposed else weight).flatten())
                    biases.append(matrix[:, self.in_ :].flatten())
                rows.append(torch.cat(weights + biases))
        return torch.stack(rows).view(self.n, self.c, -1)


@dataclass(frozen=True)
class Lookups:
    """Rows of a table that was looked up, some entries more than once by one example."""

    n: int = 5
    c: int = 1
    positions: int = 3
    vocabulary: int = 4
    features: int = 2

    def factors(self):
        generator = torch.Generator().manual_seed(0)
        shape = (self.n, self.positions)
        indices = torch.randint(self.vocabulary, shape, generator=generator)
        return indices, randn(self.n, self.c, self.positions, self.features)

    def make(self):
        return LookupRows(*self.factors(), self.vocabulary)

    def dense(self):
        indices, signals = self.factors()
        rows = torch.zeros(self.n, self.c, self.vocabulary, self.features, dtype=torch.float64)
        for i in range(self.n):
            for j in range(self.c):
                for t in range(self.positions):
                    rows[i, j, indices[i, t]] += signals[i, j, t]
        return rows.flatten(2)


@dataclass(frozen=True)
class Stored:
    n: int = 5
    c: int = 2
    width: int = 6

    def make(self):
        return DenseRows(self.dense())

    def dense(self):
        return randn(self.n, self.c, self.width)


@dataclass(frozen=True)
class Zeros:
    """Rows of a group that no example meets."""

    n: int = 5
    c: int = 2
    width: int = 12

    def make(self):
        return ZeroRows((self.n, self.c, self.width), torch.empty(0, dtype=torch.float64))

    def dense(self):
        return torch.zeros(self.n, self.c, self.width, dtype=torch.float64)


KINDS = [
    Factors(),
    Factors(bias=True),
    Factors(c=3, bias=True),
    Factors(positions=4, bias=True),
    Factors(positions=2, c=2, out=9, in_=8, bias=True),  # factors are smaller than rows
    Factors(positions=2, groups=3, out=2, in_=2, bias=True),
    Factors(groups=2, c=2),
    Factors(positions=3, groups=2, c=2, out=9, in_=8, bias=True),
    Factors(transposed=True),
    Factors(transposed=True, bias=True, positions=3, c=2),
    Factors(n=1, positions=7, bias=True),
    Lookups(),
    Lookups(c=2, positions=6),
    Lookups(positions=1, vocabulary=9),
    Stored(),
    Zeros(),
]

# More than one tile of the Gram matrix.
MANY = [
    Factors(n=520, out=1, in_=2, bias=True),
    Factors(n=300, c=2, out=2, in_=2),
    Factors(n=260, c=2, positions=2, out=2, in_=2),
    Stored(n=300, c=2, width=3),
]


def every_kind(test):
    """Run a test on every kind of rows, with every budget."""
    marked = pytest.mark.parametrize("kind", KINDS, ids=repr)(test)
    return pytest.mark.usefixtures("_budget")(marked)


@pytest.fixture(params=[None, 1, 2000], ids="budget={}".format)
def _budget(request, monkeypatch):
    """Run with the usual chunks, with chunks of one item, and with a few items each."""
    if request.param is not None:
        monkeypatch.setattr(memory, "BUDGET", request.param)


@every_kind
def test_dense(kind):
    rows, dense = kind.make(), kind.dense()
    assert (rows.n, rows.c, rows.width) == tuple(dense.shape)
    assert error(rows.dense(slice(0, rows.n), torch.float64), dense) <= 1e-14
    assert (
        error(rows.dense(slice(rows.n // 2, rows.n), torch.float64), dense[rows.n // 2 :]) <= 1e-14
    )
    assert error(rows.densify().rows, dense) <= 1e-14


@every_kind
@pytest.mark.parametrize("part", [slice(0, 5), slice(1, 4), slice(3, 3)], ids=str)
def test_examples(kind, part):
    """Rows of some examples, or of none, are of the same form and join the others."""
    rows, dense = kind.make(), kind.dense()
    some = rows.examples(part)
    assert type(some) is type(rows)
    assert (some.n, some.c, some.width) == (len(dense[part]), kind.c, dense.shape[2])
    assert error(some.densify().rows, dense[part]) <= 1e-14
    joined = join_rows([some, rows.examples(slice(0, 0)), rows])
    assert type(joined) is type(rows)
    assert error(joined.densify().rows, torch.cat([dense[part], dense])) <= 1e-14


@every_kind
@pytest.mark.parametrize("k", [0, 1, 2, 11])
def test_project(kind, k):
    dense = kind.dense()
    vectors = randn(k, dense.shape[2], seed=1)
    expected = torch.einsum("kp,ncp->knc", vectors, dense)
    assert error(kind.make().project(vectors, torch.float64), expected) <= 1e-13


@every_kind
@pytest.mark.parametrize("k", [0, 1, 2, 11])
def test_combine(kind, k):
    dense = kind.dense()
    coefficients = randn(k, *dense.shape[:2], seed=2)
    expected = torch.einsum("knc,ncp->kp", coefficients, dense)
    assert error(kind.make().combine(coefficients), expected) <= 1e-13


def gram(rows):
    matrix = RowMatrix([(Columns((slice(0, rows.width),)), rows)], rows.width)
    return matrix.gram(torch.float64, torch.device("cpu"))


@pytest.mark.parametrize("kind", MANY, ids=repr)
def test_gram_of_many_rows(kind):
    flat = kind.dense().flatten(0, 1)
    assert error(gram(kind.make()), flat @ flat.T) <= 1e-13


@every_kind
def test_gram_norms_and_diagonal(kind):
    rows, dense = kind.make(), kind.dense()
    flat = dense.flatten(0, 1)
    assert error(gram(rows), flat @ flat.T) <= 1e-13
    assert error(rows.squared_norms(torch.float64), dense.square().sum(2)) <= 1e-13
    assert error(rows.example_grams(torch.float64), dense @ dense.mT) <= 1e-13
    weights = randn(rows.n, rows.c, seed=3).abs()
    expected = torch.einsum("nc,ncp->p", weights, dense.square())
    assert error(rows.diagonal(weights), expected) <= 1e-13


OTHERS = {
    "as many positions": lambda kind: replace(kind, n=3),
    "other positions": lambda kind: replace(kind, n=6, positions=5),
    "one position": lambda kind: replace(kind, n=6, positions=1),
    "more rows": lambda kind: replace(kind, n=4, c=4),
    "stored": lambda kind: Stored(n=3, c=2, width=kind.dense().shape[2]),
    "zero": lambda kind: Zeros(n=3, c=1, width=kind.dense().shape[2]),
}


@every_kind
@pytest.mark.parametrize("name", OTHERS)
def test_products(kind, name):
    """Inner products with the rows of another matrix, in the same form or not."""
    if "position" in name and not hasattr(kind, "positions"):
        pytest.skip("rows without positions")
    other = OTHERS[name](kind)
    own, theirs = (k.make() for k in (kind, other))
    width = own.width
    expected = kind.dense().flatten(0, 1) @ other.dense().flatten(0, 1).T
    whole = Columns((slice(0, width),))
    matrices = [RowMatrix([(whole, rows)], width) for rows in (own, theirs)]
    cpu = torch.device("cpu")
    assert error(matrices[0].products(matrices[1], torch.float64, cpu), expected) <= 1e-13
    assert error(matrices[1].products(matrices[0], torch.float64, cpu), expected.T) <= 1e-13


@pytest.mark.parametrize("kind", MANY, ids=repr)
def test_products_of_many_rows(kind):
    other = replace(kind, n=kind.n - 7)
    out = torch.zeros(kind.n * kind.c, other.n * other.c, dtype=torch.float64)
    kind.make().add_products(other.make(), out)
    assert error(out, kind.dense().flatten(0, 1) @ other.dense().flatten(0, 1).T) <= 1e-13


def test_products_of_parameters_grouped_otherwise():
    """A bias that is folded in here may be apart there."""
    kind = Factors(n=4, positions=2, bias=True)
    dense = kind.dense().flatten(0, 1)
    parts = [slice(0, 12), slice(12, 15)]
    paired = RowMatrix([(Columns(tuple(parts)), kind.make())], 15)
    apart = RowMatrix([(Columns((p,)), DenseRows(dense[:, None, p])) for p in parts], 15)
    for one, other in ((paired, apart), (apart, paired)):
        found = one.products(other, torch.float64, torch.device("cpu"))
        assert error(found, dense @ dense.T) <= 1e-13


def test_a_block_does_not_lose_half_a_group():
    rows = RowMatrix([(Columns((slice(0, 12), slice(12, 15))), Factors(bias=True).make())], 15)
    with pytest.raises(ValueError, match="across"):
        rows.block(Columns((slice(0, 12),)))


@every_kind
def test_magnitudes_bound_the_rows(kind):
    bound = kind.make().magnitudes().densify().rows
    assert (bound >= kind.dense().abs() - 1e-14).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_arithmetic_is_wider_than_storage(dtype):
    """Rows kept in few digits are multiplied in many: products of stored numbers are exact."""
    kind = Factors(n=40, bias=True)
    inputs, signals = (factor.to(dtype) for factor in kind.factors())
    rows = FactoredRows(inputs, signals, kind.make().layout)
    exact = FactoredRows(inputs.double(), signals.double(), rows.layout)
    vectors = randn(1, rows.width, seed=1)
    found, expected = (r.project(vectors, torch.float64) for r in (rows, exact))
    assert error(found, expected) <= 1e-14
    coefficients = randn(1, 40, 1, seed=2)
    assert error(rows.combine(coefficients), exact.combine(coefficients)) <= 1e-14


@pytest.mark.parametrize(
    "kinds",
    [
        (Factors(bias=True), Factors(bias=True, positions=3)),
        (Factors(n=2, c=1), Factors(n=1, c=3, positions=2), Factors(n=4, c=2)),
        (Factors(bias=True), Stored(n=3, c=1, width=15)),
        (Factors(), Factors(transposed=True)),
        (Lookups(), Lookups(n=2, c=2, positions=1)),
        (Stored(c=1), Stored(n=2, c=3)),
        (Zeros(n=2, c=1), Factors(), Zeros(n=3, c=1)),
        (Zeros(n=2, width=8), Lookups(c=2)),
        (Factors(), Zeros(n=2, c=3)),
        (Stored(c=1, width=12), Zeros(n=2, c=3)),
        (Zeros(c=1), Zeros(n=1, c=3)),
    ],
    ids=lambda kinds: " + ".join(map(repr, kinds)),
)
def test_joined_rows_are_padded_with_zeros(kinds):
    joined = join_rows([kind.make() for kind in kinds])
    c = max(kind.c for kind in kinds)
    parts = [kind.dense() for kind in kinds]
    padded = [torch.nn.functional.pad(part, (0, 0, 0, c - part.shape[1])) for part in parts]
    assert error(joined.densify().rows, torch.cat(padded)) <= 1e-14


def test_factors_are_kept_only_where_they_are_smaller():
    assert isinstance(Factors(out=9, in_=9).make().compact(), FactoredRows)
    few = Factors(out=2, in_=3, positions=5)
    compact = few.make().compact()
    assert isinstance(compact, DenseRows)
    assert error(compact.rows, few.dense()) <= 1e-14


class TestRowMatrix:
    """Groups that do not lie side by side, and columns that no group covers."""

    # flat vector: bias of the first group, the second, nothing, weight of the first
    places = Columns((slice(10, 22), slice(0, 3))), Columns((slice(3, 9),))
    size = 22

    @pytest.fixture
    def kinds(self):
        return Factors(c=2, bias=True), Stored(c=2)

    @pytest.fixture
    def matrix(self, kinds):
        weights = torch.linspace(1, 2, 10, dtype=torch.float64).view(5, 2)
        groups = [(c, kind.make()) for c, kind in zip(self.places, kinds, strict=True)]
        return RowMatrix(groups, self.size, weights)

    @pytest.fixture
    def dense(self, kinds):
        first, second = (kind.dense().flatten(0, 1) for kind in kinds)
        return torch.cat([first[:, 12:], second, torch.zeros(10, 1), first[:, :12]], 1)

    def test_operations(self, matrix, dense):
        assert matrix.shape == (10, 22)
        assert error(matrix.dense(slice(0, 5), torch.float64), dense) <= 1e-14
        assert error(matrix.gram(torch.float64, torch.device("cpu")), dense @ dense.T) <= 1e-13
        vectors, coefficients = randn(3, 22), randn(3, 10)
        assert error(matrix.project(vectors, torch.float64), vectors @ dense.T) <= 1e-13
        found = torch.zeros(3, 22, dtype=torch.float64)
        for some, columns, values in matrix.combine(coefficients):
            found[some, columns] = values
        assert error(found, coefficients @ dense) <= 1e-13
        norms = matrix.squared_norms(torch.float64)
        assert error(norms, dense.square().sum(1)) <= 1e-13
        examples = dense.view(5, 2, 22)
        assert error(matrix.example_grams(torch.float64), examples @ examples.mT) <= 1e-13
        weights = randn(10).abs()
        assert error(matrix.diagonal(weights), weights @ dense.square()) <= 1e-13

    def test_block(self, matrix, dense):
        columns = Columns((slice(0, 3), slice(10, 22)))
        block = matrix.block(columns)
        expected = torch.cat([dense[:, 0:3], dense[:, 10:22]], 1)
        assert block.shape == (10, 15)
        assert error(block.dense(slice(0, 5), torch.float64), expected) <= 1e-14
        assert torch.equal(block.weights, matrix.weights)

    def test_cat_pads_weights_with_zeros(self, matrix, dense):
        """An example with fewer rows than another has rows of zero with weight zero."""
        kinds = Factors(n=2, c=3, bias=True), Stored(n=2, c=3)
        weights = torch.full((2, 3), 0.5, dtype=torch.float64)
        groups = [(c, kind.make()) for c, kind in zip(self.places, kinds, strict=True)]
        joined = RowMatrix.cat([matrix, RowMatrix(groups, self.size, weights)])
        assert joined.shape == (21, 22)
        flat = joined.flat_weights(torch.empty(0, dtype=torch.float64)).view(7, 3)
        assert torch.equal(flat[:5], torch.nn.functional.pad(matrix.weights, (0, 1)))
        assert torch.equal(flat[5:], weights)
        rows = joined.dense(slice(0, 7), torch.float64).view(7, 3, 22)
        assert error(rows[:5, :2], dense.view(5, 2, 22)) <= 1e-14
        assert not rows[:5, 2].any()


class TestMatrixLayout:
    @pytest.mark.parametrize(
        "layout",
        [
            MatrixLayout(1, 3, 4),
            MatrixLayout(1, 3, 4, bias=True),
            MatrixLayout(2, 3, 4, bias=True),
            MatrixLayout(1, 3, 4, bias=True, transposed=True),
        ],
        ids=repr,
    )
    def test_round_trip(self, layout):
        flat = randn(2, layout.size)
        matrices = layout.matrices(flat)
        assert matrices.shape == (2, layout.groups, layout.out, layout.columns)
        assert torch.equal(layout.flatten(matrices), flat)

    def test_bias_is_the_last_column(self):
        flat = torch.arange(8.0)[None]
        expected = torch.tensor([[[[0.0, 1.0, 2.0, 6.0], [3.0, 4.0, 5.0, 7.0]]]])
        assert torch.equal(MatrixLayout(1, 2, 3, bias=True).matrices(flat), expected)
