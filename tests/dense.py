"""Dense float64 references of every kind of Fisher, from densities written out by hand.

An example's rows come from three things: the Jacobian of its outputs, by one backward pass each;
the density of one label given its outputs; and the probability of every label. For continuous
labels those are the nodes of a quadrature that is exact here. Nothing imports fimkit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import multivariate_normal
from torch import Tensor, nn

from tests import reference

IGNORED = -100


# -- matrices --------------------------------------------------------------------------------------


def distance(found: Tensor, expected: Tensor) -> float:
    """Return how far a tensor is from another, relative to the other's norm."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float((found - expected).norm() / expected.norm())


def damped(matrix: Tensor, damping: Any) -> Tensor:
    """Return ``F + λ I``, λ one number or one per parameter."""
    return matrix + torch.as_tensor(damping, dtype=matrix.dtype).expand(len(matrix)).diag()


def solve(matrix: Tensor, vectors: Tensor, damping: Any) -> Tensor:
    """Return ``(F + λ I)⁻¹ v`` of ``(k, p)`` vectors."""
    return torch.linalg.solve(damped(matrix, damping), vectors.T).T


def log_likelihoods(matrix: Tensor, vectors: Tensor, damping: Any) -> np.ndarray:
    """Return the log-density of each vector in a Gaussian of covariance ``F + λ I``."""
    covariance = damped(matrix, damping).numpy()
    return np.atleast_1d(multivariate_normal(cov=covariance).logpdf(vectors.numpy()))


def heuristic(matrix: Tensor) -> float:
    """Return a tenth of the mean of the diagonal."""
    return 0.1 * float(matrix.diagonal().mean())


def mean_of_inverses(
    rows: Tensor, weights: Tensor, n: int, damping: float, *, together: bool
) -> Tensor:
    """Return ``(1/n) Σ_i (λI + F_i)⁻¹``, one inverse after the other.

    Parameters
    ----------
    rows, weights : Tensor of shape (m, c, p), (m, c)
    n : int
        Number of examples. Those without rows have no gradient.
    damping : float
    together : bool
        Whether ``F_i`` is the weighted sum over an example's rows. Otherwise every row has its
        own inverse, and they are averaged by weight.
    """
    identity = torch.eye(rows.shape[2], dtype=rows.dtype)
    out, left = torch.zeros_like(identity), float(n)
    for example, shares in zip(rows, weights, strict=True):
        outer = [torch.outer(row, row) for row in example]
        if together:
            outer = [sum(w * matrix for w, matrix in zip(shares, outer, strict=True))]
            shares = torch.ones(1)
        for share, matrix in zip(shares.tolist(), outer, strict=True):
            out += share * torch.linalg.inv(damping * identity + matrix) / n
            left -= share
    return out + left / n * identity / damping


class Weighted(NamedTuple):
    """Rows ``(n, c, p)`` of n examples, with the weight ``(n, c)`` of each in the Fisher."""

    rows: Tensor
    weights: Tensor

    def fisher(self) -> Tensor:
        rows = self.rows.flatten(0, 1)
        return (rows.T * self.weights.flatten()) @ rows / len(self.rows)

    @property
    def gradients(self) -> Tensor:
        """All rows, without their weights, shape ``(n * c, p)``."""
        return self.rows.flatten(0, 1)


# -- densities of one label ------------------------------------------------------------------------


class Density(NamedTuple):
    """The distribution of one label given m outputs.

    Attributes
    ----------
    nll : callable
        Minus its logarithm, up to a constant, of outputs ``(..., m)`` and labels ``(...)``.
    labels : callable
        From outputs ``(K, m)`` to L labels ``(K, L)`` and their probabilities, which sum to one.
    """

    nll: Callable[[Tensor, Tensor], Tensor]
    labels: Callable[[Tensor], tuple[Tensor, Tensor]]


def _classes(f):
    labels = torch.arange(f.shape[1]).expand(f.shape)
    return labels, f.exp() / f.exp().sum(1, True)


def _nodes(mean, variance):
    """Gauss-Hermite quadrature: exact for polynomials of degree 11."""
    x, w = (torch.as_tensor(part) for part in np.polynomial.hermite.hermgauss(6))
    return mean + (2 * variance).sqrt() * x, (w / math.sqrt(math.pi)).expand(len(mean), -1)


def _counts(rate):
    k = torch.arange(60, dtype=rate.dtype)
    return k.expand(len(rate), -1), (k * rate.log() - rate - torch.lgamma(k + 1)).exp()


def _bits(f):
    p = 1 / (1 + (-f).exp())
    return torch.tensor([0.0, 1.0], dtype=f.dtype).expand(len(f), -1), torch.cat([1 - p, p], 1)


CATEGORICAL = Density(
    lambda f, y: f.exp().sum(-1).log() - f.gather(-1, y.long()[..., None])[..., 0], _classes
)
BERNOULLI = Density(lambda f, y: (1 + f[..., 0].exp()).log() - y * f[..., 0], _bits)
POISSON_LOG = Density(lambda f, y: f[..., 0].exp() - y * f[..., 0], lambda f: _counts(f.exp()))


def poisson(shift: float) -> Density:
    """Of rates without a shift that is added to them."""
    return Density(
        lambda f, y: f[..., 0] - y * (f[..., 0] + shift).log(), lambda f: _counts(f + shift)
    )


def gaussian(precision: float) -> Density:
    return Density(
        lambda f, y: precision / 2 * (f[..., 0] - y) ** 2,
        lambda f: _nodes(f, torch.tensor(1 / precision, dtype=f.dtype)),
    )


def gaussian_of_two(least: float = 0.0) -> Density:
    """Of outputs mean and variance; one below the least has its value but its own gradient."""

    def variance(f):
        return f[..., 1] + (f[..., 1].clamp(min=least) - f[..., 1]).detach()

    return Density(
        lambda f, y: (variance(f).log() + (y - f[..., 0]) ** 2 / variance(f)) / 2,
        lambda f: _nodes(f[:, :1], f[:, 1:].clamp(min=least)),
    )


# -- from densities to rows ------------------------------------------------------------------------


@dataclass(frozen=True)
class Examples:
    """Outputs and Jacobians of n examples, each taken alone, and how labels are distributed.

    Attributes
    ----------
    outputs, jacobians : Tensor of shape (n, M), (n, M, p)
    factors : Tensor of shape (K, m)
        The outputs that each of an example's K labels depends on.
    density : Density
    """

    outputs: Tensor
    jacobians: Tensor
    factors: Tensor
    density: Density

    def scores(self, labels: Tensor) -> Tensor:
        """Return the gradients of each label's -log density, ``(n, K, L, m)`` for ``(n, K, L)``."""
        f = self.outputs[:, self.factors].unsqueeze(2)
        f = f.expand(-1, -1, labels.shape[2], -1).clone().requires_grad_()
        counted = labels != IGNORED
        (scores,) = torch.autograd.grad(self.density.nll(f, labels * counted).sum(), f)
        return scores * counted[..., None]

    def at(self, labels: Tensor) -> Tensor:
        """Return the gradients of each example's sum over its labels, ``(n, p)`` for ``(n, K)``."""
        scores = self.scores(labels.reshape(len(labels), -1)[..., None])[:, :, 0]
        return torch.einsum("nkm,nkmp->np", scores, self.jacobians[:, self.factors])

    def over_labels(self, targets: Tensor) -> Weighted:
        """Return a row for each label that could be, weighted by its probability.

        Labels of one example are independent and their scores have mean zero, so each stands for
        itself. Those whose target is ignored do not count.
        """
        labels, probabilities = zip(
            *(self.density.labels(f[self.factors]) for f in self.outputs), strict=True
        )
        scores = self.scores(torch.stack(labels))
        rows = torch.einsum("nklm,nkmp->nklp", scores, self.jacobians[:, self.factors])
        counted = (targets.reshape(len(targets), -1) != IGNORED)[..., None]
        return Weighted(rows.flatten(1, 2), (torch.stack(probabilities) * counted).flatten(1))

    def most_probable(self, targets: Tensor) -> Tensor:
        """Return the most probable labels, ``(n, K)``, with ignored ones left as they are."""
        labels = [self.density.labels(f[self.factors]) for f in self.outputs]
        best = torch.stack([y.gather(1, p.argmax(1, True))[:, 0] for y, p in labels])
        targets = targets.reshape(len(targets), -1)
        return torch.where(targets == IGNORED, targets, best)

    def rows(self, kind: str, targets: Tensor, drawn: Sequence[Tensor] = ()) -> Weighted:
        """Return the rows of a kind of Fisher; for ``"mc"`` at the sets of labels drawn."""
        if kind == "exact":
            return self.over_labels(targets)
        if kind == "predicted":
            drawn = [self.most_probable(targets)]
        rows = torch.stack([self.at(y) for y in (drawn or [targets])], 1)
        return Weighted(rows, torch.full(rows.shape[:2], 1 / rows.shape[1], dtype=rows.dtype))


def keep_draws(loss: Any) -> list[Tensor]:
    """Make a loss object append to a list whatever labels it draws, and return that list."""
    draws: list[Tensor] = []
    sample = loss.sample

    def sample_and_keep(*arguments):
        draws.append(sample(*arguments))
        return draws[-1]

    loss.sample = sample_and_keep
    return draws


def sets_of_labels(draws: list[Tensor], samples: int) -> list[Tensor]:
    """Return the sets drawn for all examples, from the draws of batch after batch."""
    return [torch.cat(draws[i::samples]) for i in range(samples) if draws]


def flat_outputs(model: nn.Module, example: Any) -> Tensor:
    """Return all outputs of a batch of one, ``(M,)``: of a tuple one part after the other."""
    out = reference.outputs(model, example)
    if isinstance(out, Mapping):
        out = out["logits"]
    parts = out if isinstance(out, tuple) else (out,)
    return torch.cat([part.flatten() for part in parts])


def _flat(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    if gradient is None:
        return torch.zeros_like(parameter).flatten()
    return (gradient.to_dense() if gradient.is_sparse else gradient).flatten()


def examples_of(model: nn.Module, batch: Any, factors: Tensor, density: Density) -> Examples:
    """Take every example of a batch through a model in evaluation mode, alone."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    outputs, jacobians = [], []
    for i in range(len(reference.labels(batch))):
        out = flat_outputs(model, reference.take(batch, [i]))
        rows = []
        for value in out:
            found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            rows.append(torch.cat([_flat(g, p) for p, g in zip(parameters, found, strict=True)]))
        outputs.append(out.detach())
        jacobians.append(torch.stack(rows))
    return Examples(torch.stack(outputs), torch.stack(jacobians), factors, density)
