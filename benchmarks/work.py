"""Counting the least work of each method: matrix products, eigendecompositions, passes.

A product of (m, k) by (k, n) counts 2mkn operations; a symmetric one, XᵀX of (k, m), half of that
and its diagonal, k m (m + 1); a Cholesky factorisation of m m³/3; solving with it for k columns
2 m² k. Of the two ways to an inner product or a rotation of per-example gradients, by the factors
or by the gradients themselves, the cheaper one counts. What is neither a product, nor an
eigendecomposition, nor the model's own pass (squaring, copying, padding) counts nothing.

Sizes of a layer: ``out`` and ``columns`` (inputs, and one more for the bias) at T ``positions`` of
each of n examples; k vectors.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn


class Layer(NamedTuple):
    """The sizes of a linear map."""

    out: int
    columns: int
    positions: int = 1

    @property
    def size(self):
        """The number of parameters."""
        return self.out * self.columns


@dataclass(frozen=True)
class Work:
    """Operations in products, by the name of their dtype; sizes of eigendecompositions; passes.

    ``passes`` counts forward and backward passes over all training examples.
    """

    flops: Counter = field(default_factory=Counter)
    eigh: Counter = field(default_factory=Counter)
    passes: float = 0.0

    def __add__(self, other):
        return Work(self.flops + other.flops, self.eigh + other.eigh, self.passes + other.passes)


def products(flops, dtype):
    """Return the work of so many operations in products."""
    return Work(flops=Counter({dtype: round(flops)}))


def layers_of(problem):
    """Return the sizes of a problem's layers, by name."""
    positions, handles = {}, []
    for name, layer in problem.layers.items():

        def count(module, inputs, output, name=name):
            positions[name] = output[0].numel() // len(module.bias)

        handles.append(layer.register_forward_hook(count))
    problem.model(problem.x[:1])
    for handle in handles:
        handle.remove()
    return {
        name: Layer(len(m.bias), m.weight[0].numel() + 1, positions[name])
        for name, m in problem.layers.items()
        if isinstance(m, nn.Linear | nn.Conv2d)
    }


def product(m, k, n):
    """(m, k) times (k, n)."""
    return 2 * m * k * n


def symmetric(k, m):
    """XᵀX of (k, m)."""
    return k * m * (m + 1)


def cholesky(m):
    """A factorisation of (m, m)."""
    return m**3 / 3


def solve(m, k):
    """Forward and back substitution of k columns."""
    return 2 * m**2 * k


def form(layer, n):
    """N examples' gradients from their factors; an outer product alone is none."""
    return 0 if layer.positions == 1 else n * product(layer.out, layer.positions, layer.columns)


def project(layer, n, k):
    """All inner products of n gradients with k vectors; as much to add them up with weights."""
    by_factors = product(k * layer.out, layer.columns, n * layer.positions)
    by_gradients = form(layer, n) + product(k, layer.size, n)
    return min(by_factors, by_gradients)


def gram(layer, n):
    """All inner products of n gradients with each other."""
    positions = n * layer.positions
    by_factors = symmetric(layer.columns, positions) + symmetric(layer.out, positions)
    return min(by_factors, form(layer, n) + symmetric(layer.size, n))


def kronecker_factors(layer, n):
    """A and S."""
    positions = n * layer.positions
    return symmetric(positions, layer.columns) + symmetric(positions, layer.out)


def eigenvalues(layer, n):
    """Λ: gradients in the eigenbasis, squared and summed, which for one position is a product."""
    squares = product(layer.out, n, layer.columns) if layer.positions == 1 else 0
    return form(layer, n) + rotate_gradients(layer, n) + squares


def rotate_gradients(layer, n):
    """N examples' gradients into the eigenbasis, by their factors or themselves."""
    out, columns, positions = layer
    by_factors = positions * (product(1, out, out) + product(1, columns, columns))
    return n * min(by_factors, rotate(layer))


def rotate(layer):
    """One (out, columns) matrix into the eigenbasis, or back."""
    out, columns = layer.out, layer.columns
    return product(out, out, columns) + product(out, columns, columns)


def ekfac_fit(layers, n, dtype):
    """Passes once, since inputs and gradients may be kept; A, S, their eigenvectors, Λ."""
    flops = sum(kronecker_factors(layer, n) + eigenvalues(layer, n) for layer in layers)
    sizes = Counter(size for layer in layers for size in (layer.out, layer.columns))
    return Work(Counter({dtype: flops}), sizes, 1.0)


def ekfac_apply(layers, k, dtype):
    """K vectors into the eigenbasis and back."""
    return products(k * sum(2 * rotate(layer) for layer in layers), dtype)


def ekfac_score(layers, n, k, dtype):
    """Inner products of n training gradients with k queries' in the eigenbasis, or with them back.

    The queries' gradients are rotated by their factors, and then either back, or the training
    examples' are rotated as well.
    """
    flops = sum(
        form(layer, k)
        + rotate_gradients(layer, k)
        + min(k * rotate(layer), rotate_gradients(layer, n))
        + project(layer, n, k)
        for layer in layers
    )
    return products(flops, dtype)


def datainf_transform(layers, n, k, dtype):
    """Inner products with all gradients, and their weighted sum."""
    return products(sum(2 * project(layer, n, k) for layer in layers), dtype)


def primal_fit(layers, n, dtype):
    """F of p parameters."""
    size = sum(layer.size for layer in layers)
    flops = sum(form(layer, n) for layer in layers) + symmetric(n, size)
    return Work(Counter({dtype: flops}), passes=1.0)


def primal_solve(layers, k, dtype):
    """A factorisation of F + λI, and k solutions."""
    size = sum(layer.size for layer in layers)
    return products(cholesky(size) + solve(size, k), dtype)


def dual_fit(layers, n, dtype):
    """Gradients' inner products."""
    return Work(Counter({dtype: sum(gram(layer, n) for layer in layers)}), passes=1.0)


def dual_solve(layers, n, k, dtype):
    """Into the space of examples, a factorisation and k solutions there, and back."""
    flops = sum(2 * project(layer, n, k) for layer in layers) + cholesky(n) + solve(n, k)
    return products(flops, dtype)
