r"""The mean over examples of the damped inverse, as DataInf has it, in closed form.

With :math:`F_i = g_i g_i^\top`, or the sum over an example's rows taken together, the Woodbury
identity gives for each block of p parameters

.. math:: M = \frac{1}{n} \sum_i (\lambda I + F_i)^{-1}
            = \frac{1}{\lambda} (I - U^\top U) , \qquad
          u_r = \sqrt{\frac{w_r}{n (\lambda + \|b_r\|^2)}} \; b_r ,

with the directions :math:`b_r` of F's rows: the rows themselves with their weights, or, where the
rows of an example are taken together, the orthogonal combinations that diagonalise its
:math:`F_i`. So M times any number of vectors is two matrix products. Its own inverse is

.. math:: M^{-1} = \lambda (I - U^\top U)^{-1}
                 = \lambda (I + U^\top (I - U U^\top)^{-1} U) ,

through the cheaper of the two matrices. As for the dual form of the exact Fisher, arithmetic is
float64 in chunks, whatever the rows are stored in; but products with M are float32 where rows and
vectors are and that is precise. For rows that stand for themselves each term is
:math:`(u_r^\top v) u_r` with :math:`\sum_r \|u_r\|^2 \leq 1`, so what float32 errs by is a few
roundings of v; only where the difference leaves little of v does that matter, and that is seen
from the result.

Kwon et al., "DataInf: efficiently estimating data influence in LoRA-tuned LLMs and diffusion
models", ICLR 2024, section 3: the swap of mean and inverse, and its closed form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fimkit.operators import memory
from fimkit.operators.base import Operator
from fimkit.operators.cholesky import singular
from fimkit.operators.eigh import eigh
from fimkit.operators.row_matrix import RowMatrix, squared_norms
from fimkit.operators.spectrum import Spectrum

__all__ = ["DataInfOperator"]

# What has to be left of a vector, times λ, for float32: then its result errs by 2·10⁻⁶ at most.
_LEFT = 0.25

# How many roundings of a vector its result must exceed, so that five digits of it are right.
_ROUNDINGS = 1e5


class DataInfOperator(Operator):
    r"""``M = (1/n) Σ (λI + F_i)⁻¹`` over the rows of a `RowMatrix`, λ being the damping.

    `solve` multiplies by M, and `inverse_quadratic` is ``vᵀ M v``. There is no undamped matrix:
    `matmul`, `diagonal`, `trace`, `logdet` and `to_dense` are those of ``M⁻¹`` at the damping
    given, in the place of ``F + damping I``. Every damping must be positive.

    Parameters
    ----------
    rows : RowMatrix
        Gradients with their weights.
    n : int
        Number of examples; those without rows count, too, with ``F_i = 0``.
    device : torch.device
        Where the rows are.
    joint : bool, default=False
        Whether the rows of an example are taken together, ``F_i = Σ_c w_c g_c g_cᵀ``. Otherwise
        each row stands for itself, with its weight: ``M = (1/n) Σ_ic w_ic (λI + g_ic g_icᵀ)⁻¹``;
        then the weights of an example must sum to at most one.

    Attributes
    ----------
    fisher_trace : float
        Trace of the Fisher information matrix ``F = (1/n) Σ F_i``.
    """

    def __init__(
        self, rows: RowMatrix, n: int, device: torch.device, *, joint: bool = False
    ) -> None:
        self.rows = rows
        self.n = n
        self.joint = joint
        self.size = rows.size
        self.device = device
        dtype = memory.accumulation_dtype(device)
        weights = rows.flat_weights(torch.empty(0, dtype=dtype, device=device))
        self._rotation: Tensor | None = None
        if joint:
            scale = weights.sqrt().view(rows.n, rows.c, 1)
            grams = rows.example_grams(dtype).mul_(scale).mul_(scale.mT)
            norms, basis = eigh(grams)
            self._rotation = basis.mul_(scale)
            self._norms = norms.flatten()
            self._weights = torch.full_like(weights, 1 / n)
        else:
            self._norms = rows.squared_norms(dtype)
            self._weights = weights / n
        self.fisher_trace = float(self._weights @ self._norms)
        self._largest = float(self._norms.max()) if len(self._norms) else 0.0
        self._gram: Tensor | None = None
        self._kept: tuple[float, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_gram": None, "_kept": None}

    def matmul(self, vectors: Tensor, damping: float = 0.0) -> Tensor:
        """Return ``M⁻¹ v`` for each of ``(k, p)`` vectors."""
        factor = self._factor(damping)
        out = vectors * damping  # which columns without rows keep
        for some in self._vector_chunks(vectors.shape[0]):
            if self._primal:
                columns = vectors[some].to(factor.dtype).T
                out[some] = torch.cholesky_solve(columns, factor).T.mul_(damping)
                continue
            scale = self._shrinkage(damping).sqrt_()
            coordinates = self._project(vectors[some], factor.dtype).mul_(scale).T
            coefficients = torch.cholesky_solve(coordinates, factor).T * scale
            target, given = out[some], vectors[some]
            for part, place, values in self._combine(coefficients):
                target[part, place] = values.add_(given[part, place]).mul_(damping)
        return out

    def solve(self, vectors: Tensor, damping: float, out: Tensor | None = None) -> Tensor:
        """Return ``M v`` for each of ``(k, p)`` vectors, in ``out`` if given."""
        if not self._is_narrow(vectors):
            return self._solve_wide(vectors, damping, out)
        out = self._solve(vectors, damping, torch.float32, out)
        spoiled = self._spoiled(vectors, out, damping)
        if bool(spoiled.any()):
            out[spoiled] = self._solve_wide(vectors[spoiled], damping)
        return out

    def _solve_wide(self, vectors: Tensor, damping: float, out: Tensor | None = None) -> Tensor:
        """Return ``M v`` by products in float64, or raise if nothing is left of a vector."""
        out = self._solve(vectors, damping, self._norms.dtype, out)
        given, left = (
            torch.linalg.vector_norm(x, dim=1, dtype=self._norms.dtype) for x in (vectors, out)
        )
        self._refuse_rounding(given, left, damping)
        return out

    def _solve(
        self, vectors: Tensor, damping: float, dtype: torch.dtype, out: Tensor | None
    ) -> Tensor:
        """Return ``M v`` for each of ``(k, p)`` vectors, by products in ``dtype``."""
        shrinkage = self._shrinkage(damping)
        out = torch.div(vectors, damping, out=out)  # which columns without rows keep
        for some in self._vector_chunks(vectors.shape[0]):
            target, given = out[some], vectors[some]
            coefficients = (self._project(given, dtype) * shrinkage).to(dtype)
            for part, place, values in self._combine(coefficients):
                target[part, place] = values.neg_().add_(given[part, place]).div_(damping)
        return out

    def _is_narrow(self, vectors: Tensor) -> bool:
        """Whether float32 holds rows and vectors, and its products err by roundings of v only."""
        dtypes = [vectors.dtype, *self.rows.dtypes]
        # Rows taken together may nearly cancel in their directions, which magnifies roundings.
        return (
            self._rotation is None
            and all(dtype.itemsize <= torch.float32.itemsize for dtype in dtypes)
            and memory.float32_is_exact(self.device)
        )

    def _spoiled(self, vectors: Tensor, solved: Tensor, damping: float) -> Tensor:
        """Return where roundings of float32 may matter, or its range has been left, ``(k,)``."""
        given, left = (
            torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).to(self._norms)
            for x in (vectors, solved)
        )
        # Below this squares, inner products with rows that count, or coefficients may underflow.
        root, longest = math.sqrt(damping), math.sqrt(self._largest)
        least = max(1e-18, 1e-25 / root, 1e-30 * self.n * longest)
        precise: Tensor = (given >= least) & (left * damping >= _LEFT * given) & left.isfinite()
        return ~precise

    def solve_rows(self, rows: RowMatrix, damping: float, out: Tensor) -> None:
        """Write ``M v`` for each row into ``out``, shape ``(n * c, p)``."""
        products = self._along(self.rows.products(rows, self._norms.dtype, self.device).T)
        rows.less(self._combine, products * self._shrinkage(damping), out)
        out.div_(damping)

    def inverse_quadratic(self, vectors: Tensor | RowMatrix, damping: float) -> Tensor:
        """Return ``vᵀ M v`` for each vector, or each row, shape ``(k,)``."""
        return self.quadratics(vectors, [damping])[0]

    def quadratics(self, vectors: Tensor | RowMatrix, dampings: Sequence[float]) -> Tensor:
        """Return ``vᵀ M v`` for L dampings and k vectors or rows, projected once, ``(L, k)``."""
        if isinstance(vectors, RowMatrix):
            products = self.rows.products(vectors, self._norms.dtype, self.device).T
            return self._quadratics(vectors, self._along(products), dampings)
        parts = [
            self._quadratics(part, self._project(part, self._norms.dtype), dampings)
            for part in map(vectors.__getitem__, self._vector_chunks(vectors.shape[0]))
        ]
        return torch.cat(parts, 1) if parts else self._norms.new_empty((len(dampings), 0))

    def _quadratics(
        self, vectors: Tensor | RowMatrix, products: Tensor, dampings: Sequence[float]
    ) -> Tensor:
        norms, squares = squared_norms(vectors, products.dtype), products.square()
        out = torch.stack([(norms - squares @ self._shrinkage(d)) / d for d in dampings])
        for values, damping in zip(out, dampings, strict=True):
            self._refuse_rounding(norms, values, damping)
        return out

    def diagonal(self, damping: float = 0.0) -> Tensor:
        """Return the diagonal of ``M⁻¹``, shape ``(p,)``."""
        factor = self._factor(damping)
        if self._primal:
            return torch.cholesky_inverse(factor).diagonal() * damping
        scaled = self._shrinkage(damping).sqrt_().diag()
        white: Tensor = torch.linalg.solve_triangular(factor, scaled, upper=False)
        out = white.new_ones(self.size)
        for _, place, values in self._combine(white):
            out[place] += values.square_().sum(0)
        return out.mul_(damping)

    def trace(self, damping: float = 0.0) -> float:
        """Return the trace of ``M⁻¹``."""
        factor = self._factor(damping)
        inverse = torch.cholesky_inverse(factor)
        return damping * (self.size - len(factor) + float(inverse.diagonal().sum()))

    def logdet(self, damping: float) -> float:
        """Return ``log det M⁻¹``."""
        shrunk = 2 * float(self._factor(damping).diagonal().log().sum())
        return self.size * math.log(damping) - shrunk

    def spectrum(self) -> Spectrum:
        """Return what gives inverse quadratic forms and log determinants at many dampings."""
        return _DataInfSpectrum(self)

    def to_dense(self, damping: float = 0.0) -> Tensor:
        """Return ``M⁻¹`` as a ``(p, p)`` tensor."""
        self._check(damping)
        return self.matmul(torch.eye(self.size).to(self._norms), damping)

    # -- directions ----------------------------------------------------------------------------

    def _project(self, vectors: Tensor, dtype: torch.dtype) -> Tensor:
        """Return inner products of ``(k, p)`` vectors with all directions b, ``(k, r)``."""
        return self._along(self.rows.project(vectors, dtype))

    def _along(self, products: Tensor) -> Tensor:
        """Turn ``(k, r)`` inner products with rows into those with the directions b."""
        return products if self._rotation is None else _rotate(products, self._rotation)

    def _combine(self, coefficients: Tensor) -> Any:
        """Add up the directions weighted by ``(k, r)`` coefficients, as `RowMatrix.combine`."""
        if self._rotation is not None:
            coefficients = _rotate(coefficients, self._rotation.mT)
        return self.rows.combine(coefficients)

    def _shrinkage(self, damping: float) -> Tensor:
        """Return ``w / (n (λ + ‖b‖²))`` of every direction, shape ``(r,)``."""
        self._check(damping)
        return self._weights / (self._norms + damping)

    def _vector_chunks(self, k: int) -> list[slice]:
        # Every chunk of vectors reads all rows, so chunks are larger than those of other loops.
        each = len(self._norms) * self._norms.element_size()
        return list(memory.chunks(k, each, budget=8 * memory.BUDGET))

    # -- the inverse ---------------------------------------------------------------------------

    @property
    def _primal(self) -> bool:
        """Whether the matrix over parameters costs less than that over directions, for one λ.

        It is summed up again for every other λ, while the directions' inner products are kept.
        """
        return 3 * self.size < 2 * len(self._norms)

    def _factor(self, damping: float) -> Tensor:
        """Return the lower factor of ``I - UᵀU``, or of ``I - UUᵀ`` where that costs less."""
        self._check(damping)
        kept = self._kept  # read once, since another thread may replace it
        if kept is not None and kept[0] == damping:
            return kept[1]
        matrix = (self._outer if self._primal else self._inner)(damping).neg_()
        matrix.diagonal().add_(1)
        factor: Tensor
        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info) != 0:
            raise singular(damping, "all gradients are parallel, or nearly so, and far longer")
        self._kept = damping, factor
        return factor

    def _inner(self, damping: float) -> Tensor:
        """Return ``UUᵀ``, shape ``(r, r)``."""
        if self._gram is None:
            gram = self.rows.gram(self._norms.dtype, self.device)
            if self._rotation is not None:
                gram = _rotate(gram, self._rotation)
                gram = _rotate(gram.T, self._rotation)
            self._gram = gram
        scale = self._shrinkage(damping).sqrt_()
        return (self._gram * scale).mul_(scale[:, None])

    def _outer(self, damping: float) -> Tensor:
        """Return ``UᵀU``, shape ``(p, p)``."""
        return self.rows.outer(self._shrinkage(damping).sqrt_(), self._rotation)

    def _check(self, damping: float) -> None:
        if damping <= torch.finfo(self._norms.dtype).eps * self._largest or not damping > 0:
            raise singular(damping, "each example's F_i has no inverse without damping")

    def _refuse_rounding(self, given: Tensor, left: Tensor, damping: float) -> None:
        """Raise if what ``I - UᵀU`` leaves, ``left`` times λ, is little but rounding."""
        least = _ROUNDINGS * torch.finfo(given.dtype).eps
        if bool((left * damping < least * given).any()):
            raise singular(
                damping, "of a vector along gradients far longer, less than five digits are right"
            )


class _DataInfSpectrum(Spectrum):
    """Quadratic forms from one projection; every damping has its own determinant."""

    def __init__(self, operator: DataInfOperator) -> None:
        self._operator = operator

    def quadratics(self, vectors: Tensor | RowMatrix, dampings: Sequence[float]) -> Tensor:
        """Return ``vᵀ M v`` for L dampings and k vectors or rows, shape ``(L, k)``."""
        return self._operator.quadratics(vectors, dampings)

    def logdets(self, dampings: Sequence[float]) -> list[float]:
        """Return ``log det M⁻¹`` for each damping."""
        return [self._operator.logdet(damping) for damping in dampings]


def _rotate(values: Tensor, rotation: Tensor) -> Tensor:
    """Multiply each example's c of ``(k, n * c)`` values by its own ``(c, c)`` matrix."""
    n, c = rotation.shape[:2]
    rotated = values.view(-1, n, c).transpose(0, 1) @ rotation
    return rotated.transpose(0, 1).flatten(1)
