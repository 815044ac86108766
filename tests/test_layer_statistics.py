"""Statistics of a linear layer by themselves, against sums over dense vectors and matrices."""

import pytest
import torch

from fimkit.distributed import Ranks
from fimkit.operators import MatrixLayout, memory
from fimkit.statistics import LinearStatistics, linear
from fimkit.statistics.sides import Gathered, Side, rotate

from .reference import error

LIKE = torch.empty(0, dtype=torch.float64)


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def apart(vectors):
    """Return vectors, and their last column, that hides in memory that is not theirs."""
    last = vectors[..., -1:]
    return vectors[..., :-1].clone(), last


def inputs(n, positions, groups, columns, last):
    """Return inputs whose last column is what two calls make of a constant: 1 and 0, or numbers."""
    a = random(n, positions, groups, columns)
    if last == "constants":
        a[..., -1] = (torch.arange(positions) % 2 == 0).double()[None, :, None]
    return a


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("positions", [1, 4])
def test_side_with_its_last_column_apart(positions, groups, diagonal):
    side = Side(groups, 5, LIKE, diagonal=diagonal)
    expected = torch.zeros(groups, 5, 5).double()
    for n in (3, 300, 2, 255, 7):
        vectors = random(groups, n, positions, 5)
        side.add(*apart(vectors))
        expected += torch.einsum("gnti,gntj->gij", vectors, vectors)
    expected /= 10
    if diagonal:
        assert error(side.finish(10), expected.diagonal(dim1=1, dim2=2)) < 1e-12
    else:
        assert error(side.finish(10).triu(), expected.triu()) < 1e-12


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("fastest", [False, True])
@pytest.mark.parametrize("identity", [False, True])
def test_rotation_with_the_last_column_apart(groups, fastest, identity):
    vectors = random(groups, 4, 6, 5)
    x, last = apart(vectors)
    if fastest:
        x = x.mT.contiguous().mT
    basis = None if identity else random(groups, 5, 5)
    expected = vectors if identity else vectors @ basis[:, None]
    assert error(rotate(basis, x, last), expected) < 1e-12
    whole = vectors.mT.contiguous().mT if fastest else vectors
    found = rotate(basis, whole)
    assert error(found, expected) < 1e-12
    found.zero_()
    assert bool(whole.any())


def test_gathered_rows_are_copies():
    """Whoever handed them over may write to them again."""
    gathered = Gathered(10)
    a, b = random(6, 3), random(6, 2, 4)
    given = a.clone(), b.clone()
    assert gathered.add(*given) == []
    for tensor in given:
        tensor.zero_()
    more = random(4, 3), random(4, 2, 4)
    (rows,) = gathered.add(*more)
    for found, *parts in zip(rows, (a, b), more, strict=True):
        assert torch.equal(found, torch.cat(parts))
    assert gathered.take() == []


def test_rows_that_are_enough_are_not_copied():
    gathered = Gathered(10)
    assert gathered.add(random(3, 2)) == []
    many = random(10, 2)
    ((found,),) = gathered.add(many)
    assert found is many
    ((held,),) = gathered.take()
    assert len(held) == 3


def test_rows_of_another_shape_are_not_joined():
    gathered = Gathered(10)
    first, second = random(6, 2), random(7, 3)
    assert gathered.add(first) == []
    ((found,),) = gathered.add(second)
    assert torch.equal(found, first)
    ((found,),) = gathered.take()
    assert torch.equal(found, second)


def test_state_of_gathered_rows():
    gathered, other = Gathered(10), Gathered(10)
    rows = random(6, 2)
    gathered.add(rows)
    other.add(random(5, 4))
    other.load_state_dict(gathered.state_dict())
    gathered.add(random(3, 2))
    ((found,),) = other.take()
    assert torch.equal(found, rows)
    other.load_state_dict(gathered.state_dict())
    gathered.take()
    other.load_state_dict(gathered.state_dict())
    assert other.take() == []


def dense_sides(a, s, weights, mask, *, reduce):
    """Return the sums of outer products of both sides, and over what the input's mean is."""
    n, positions = a.shape[:2]
    kept = torch.ones(n, positions).double() if mask is None else mask.double()
    a, s = a * kept[:, :, None, None], s * kept[:, None, :, None, None]
    count = kept.sum()
    if reduce:
        a = a.sum(1, keepdim=True) / kept.sum(1).clamp(min=1)[:, None, None, None]
        s, count = s.sum(2, keepdim=True), n
    output = torch.einsum("nc,nctgi,nctgj->gij", weights, s, s)
    return output, torch.einsum("ntgi,ntgj->gij", a, a), count


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("last", ["constants", "numbers"])
@pytest.mark.parametrize(("positions", "groups"), [(1, 1), (4, 1), (1, 2), (4, 2)])
def test_sides_of_a_layer(positions, groups, last, reduce, masked):
    layout = MatrixLayout(groups, 3, 4, bias=True)
    layer = LinearStatistics(layout, LIKE, "reduce" if reduce else "expand")
    output, input, count = 0, 0, 0
    for n in (5, 260, 3):
        a = inputs(n, positions, groups, 5, last)
        s, weights = random(n, 2, positions, groups, 3), torch.rand(n, 2).double()
        mask = (torch.rand(n, positions) < 0.6) if masked else None
        layer.add_positions(apart(a), s, weights, mask)
        sums = dense_sides(a, s, weights, mask, reduce=reduce)
        output, input, count = output + sums[0], input + sums[1], count + sums[2]
    assert error(layer.output.finish(268).triu(), output.triu() / 268) < 1e-12
    assert error(layer.input.finish(268).triu(), input.triu() / count) < 1e-12


@pytest.mark.parametrize("working_set", [1, 600, 2**20])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize("positions", [1, 2, 50])
@pytest.mark.parametrize("groups", [1, 2])
def test_squares_of_a_layer(monkeypatch, groups, positions, identity, weighted, working_set):
    """By whichever of its ways: gathered, and rotated before or after a sum over positions."""
    monkeypatch.setattr(memory, "WORKING_SET", working_set)
    monkeypatch.setattr(linear, "_ROWS", 2)
    layout = MatrixLayout(groups, 3, 4, bias=True)
    layer = LinearStatistics(layout, LIKE, "expand")
    left = torch.eye(3).double().expand(groups, -1, -1) if identity else random(groups, 3, 3)
    right = random(groups, 5, 5)
    layer.set_bases(None if identity else left.clone(), right.clone())
    layer.begin_eigenvalues(2.0, 0.5)
    expected = 0
    for n, c in ((7, 2), (3, 2), (4, 1), (530, 1), (2, 1)):
        a = inputs(n, positions, groups, 5, "constants")
        s = random(n, c, positions, groups, 3)
        weights = torch.rand(n, c).double() if weighted else None
        layer.add_squares(apart(a), s, weights)
        squares = torch.einsum("nctgo,goi,ntga,gaj->ncgij", s, left, a, right).square()
        w = torch.ones(n, c).double() if weights is None else weights
        expected = expected + torch.einsum("nc,ncgij->gij", w, squares)
    layer.reduce_eigenvalues(Ranks())
    assert error(layer.eigen_corrected(546).eigenvalues, expected / 546) < 1e-12
