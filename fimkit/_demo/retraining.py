"""Digits left out in truth: a convex model trained to its minimum again without each of a few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot, pad

from fimkit import ModelData, influence
from fimkit._demo.digits import SIDE, Digits
from fimkit._demo.evaluation import METHODS, correlations
from fimkit._demo.reference import Reference

__all__ = ["LeftOut", "foretold", "leave_out"]

Numbers = npt.NDArray[np.float64]

# Training digits left out, one at a time.
_LEFT_OUT = 100

# Of all parameters, biases included, so that there is one minimum.
_PENALTY = 1e-3

# Largest element of the gradient at a minimum, and steps that may be taken to it.
_FLAT = 1e-10
_STEPS = 200


@dataclass(frozen=True)
class LeftOut:
    """Softmax regression on the digits, and what it lost with each of some training digits.

    Attributes
    ----------
    model : torch.nn.Linear
        Trained on all training digits, float64.
    indices : ndarray of shape (m,)
        The training digits that were left out, one at a time.
    rises : ndarray of shape (n_test, m)
        By how much the loss of each test digit rose.
    """

    model: nn.Linear
    indices: npt.NDArray[np.intp]
    rises: Numbers


def leave_out(digits: Digits, seed: int) -> LeftOut:
    """Train a softmax regression on the labels given, and again without each of a few digits.

    It minimises the mean loss and half the penalty times the parameters' square. An example is left
    out of the sum of the losses, which stays divided by n.

    Parameters
    ----------
    digits : Digits
    seed : int
        Decides which training digits are left out.

    Returns
    -------
    left_out : LeftOut

    Raises
    ------
    RuntimeError
        If a minimum is not reached.
    """
    images, test_images = (
        pad(each.double(), (0, 1), value=1) for each in (digits.train_images, digits.test_images)
    )
    targets = one_hot(digits.train_labels, 10).double()
    chosen = np.random.default_rng(seed).permutation(len(images))[:_LEFT_OUT]
    full, factor = _train(images, targets)
    without = _train_without(images, targets, chosen, full, factor)

    def losses(weights: Tensor) -> Tensor:
        labels = digits.test_labels.expand(len(weights), -1)
        return cross_entropy((test_images @ weights.mT).mT, labels, reduction="none")

    model = nn.Linear(SIDE**2, 10, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(full[:, :-1])
        model.bias.copy_(full[:, -1])
    return LeftOut(model, chosen, (losses(without) - losses(full[None])).T.numpy())


def foretold(left_out: LeftOut, digits: Digits, methods: Sequence[str]) -> dict[str, float]:
    """Return how well each method's scores foretell the rises, and the plain product of gradients.

    Parameters
    ----------
    left_out : LeftOut
    digits : Digits
    methods : sequence of str
        Keys of `fimkit._demo.evaluation.METHODS`.

    Returns
    -------
    correlations : dict of str to float
        By method, and ``"gradient product"``. Pearson's correlation over the digits left out, the
        mean over test digits. λ is a tenth of the mean of F's diagonal, as
        ``regularization="auto"`` has it for the whole of F, for every method.
    """
    model = left_out.model
    pairs = [
        (digits.train_images.double(), digits.train_labels),
        (digits.test_images.double(), digits.test_labels),
    ]
    train, test = (ModelData(model, pair) for pair in pairs)
    gradients, test_gradients = (
        torch.cat(list(Reference(model, *pair).gradients())) for pair in pairs
    )
    damping = 0.1 * gradients.square().mean().item()
    scores = {
        method: influence.pairwise_scores(METHODS[method](damping).fit(train), train, test)
        for method in methods
    }
    scores["gradient product"] = (test_gradients @ gradients.T).numpy()
    return {
        name: correlations(values[:, left_out.indices], left_out.rises)[0]
        for name, values in scores.items()
    }


def _train(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights ``(10, d)`` by Newton's method, and the Hessian's factor there."""
    n, d = images.shape
    weights = images.new_zeros(10, d)
    for _ in range(_STEPS):
        p = (images @ weights.T).softmax(1)
        curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        hessian = torch.einsum("nab,nc,nd->acbd", curvature, images, images).reshape(10 * d, -1) / n
        hessian.diagonal().add_(_PENALTY)
        factor = torch.linalg.cholesky(hessian)
        gradient = (p - targets).T @ images / n + _PENALTY * weights
        if gradient.abs().max() < _FLAT:
            return weights, factor
        weights = weights - torch.cholesky_solve(gradient.view(-1, 1), factor).view_as(weights)
    raise RuntimeError(f"Newton's method has not converged after {_STEPS} steps")


def _train_without(
    images: Tensor, targets: Tensor, chosen: npt.NDArray[np.intp], full: Tensor, factor: Tensor
) -> Tensor:
    """Return the weights ``(m, 10, d)`` without each example, from those of all.

    The Hessian of all examples stays in the place of each problem's own, which it differs from by
    one example's: the steps shrink fast enough, and one factor serves every problem.
    """
    kept = images.new_ones(len(chosen), len(images), 1)
    kept[range(len(chosen)), chosen] = 0
    weights = full.repeat(len(chosen), 1, 1)
    for _ in range(_STEPS):
        errors = ((images @ weights.mT).softmax(2) - targets).mul_(kept)
        gradients = errors.mT @ images / len(images) + _PENALTY * weights
        if gradients.abs().max() < _FLAT:
            return weights
        steps = torch.cholesky_solve(gradients.flatten(1).T, factor)
        weights = weights - steps.T.view_as(weights)
    raise RuntimeError(f"retraining has not converged after {_STEPS} steps")
