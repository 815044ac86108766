"""The Fisher by its definition: float64, `torch.func`, none of fimkit's own operators."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.linalg import vector_norm
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["Reference"]

_BATCH_SIZE = 64


class Reference:
    """Per-example gradients of a classifier's cross-entropy, and F times vectors, in float64.

    Parameters
    ----------
    model : torch.nn.Module
        Copied to float64.
    images : Tensor of shape (n, ...)
    labels : Tensor of shape (n,)
    """

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        self.model = copy.deepcopy(model).double()
        self.images = images.double()
        self.labels = labels

    def gradients(self) -> Iterator[Tensor]:
        """Yield the gradients of one batch after another, ``(batch, p)``."""
        parameters = {name: value.detach() for name, value in self.model.named_parameters()}

        def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
            logits = functional_call(self.model, parameters, (image[None],))
            return cross_entropy(logits, label[None])

        gradients = vmap(grad(loss), in_dims=(None, 0, 0))
        for images, labels in DataLoader(TensorDataset(self.images, self.labels), _BATCH_SIZE):
            parts = gradients(parameters, images, labels).values()
            yield torch.cat([part.flatten(1) for part in parts], 1)

    def norms(self) -> Tensor:
        """Return the norm of every example's gradient, ``(n,)``."""
        return torch.cat([vector_norm(gradients, dim=1) for gradients in self.gradients()])

    def residuals(self, solutions: Tensor, vectors: Tensor, damping: float) -> Tensor:
        """Return ``‖(F + λ I) u − v‖ / ‖v‖`` for every solution u of a vector v.

        Parameters
        ----------
        solutions, vectors : Tensor of shape (k, p)
        damping : float
            λ.

        Returns
        -------
        residuals : Tensor of shape (k,)
        """
        solutions, vectors = solutions.double(), vectors.double()
        left = damping * solutions
        for gradients in self.gradients():
            left += (solutions @ gradients.T) @ gradients / len(self.labels)
        residuals: Tensor = vector_norm(left - vectors, dim=1) / vector_norm(vectors, dim=1)
        return residuals
