"""scikit-learn's digits with some training labels flipped, and a small network trained on them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

__all__ = ["SIDE", "Digits", "accuracy", "flipped_digits", "train_network"]

# An image is SIDE × SIDE pixels.
SIDE = 8

_TEST_SHARE = 0.2
_FLIPPED_SHARE = 0.1
_HIDDEN = 64
_EPOCHS = 100
_BATCH_SIZE = 64


@dataclass(frozen=True)
class Digits:
    """Training and test digits.

    Attributes
    ----------
    train_images, test_images : Tensor of shape (n, 64)
        Pixels from 0 to 1, float32.
    train_labels : Tensor of shape (n,)
        The labels the network is trained on, some of them flipped.
    true_labels : Tensor of shape (n,)
        What the training images show.
    test_labels : Tensor of shape (n_test,)
        What the test images show.
    """

    train_images: Tensor
    train_labels: Tensor
    true_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def flipped(self) -> npt.NDArray[np.bool_]:
        """Which training labels were flipped, shape ``(n,)``."""
        flipped: npt.NDArray[np.bool_] = (self.train_labels != self.true_labels).numpy()
        return flipped


def flipped_digits(seed: int) -> Digits:
    """Split the 1,797 digits and change a tenth of the training labels to another digit.

    Parameters
    ----------
    seed : int
        Decides the split, which labels are changed and to what.

    Returns
    -------
    digits : Digits
    """
    images, labels = load_digits(return_X_y=True)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=_TEST_SHARE, stratify=labels, random_state=seed
    )
    rng = np.random.default_rng(seed)
    chosen = rng.choice(train, size=round(_FLIPPED_SHARE * len(train)), replace=False)
    given = labels.copy()
    given[chosen] = (given[chosen] + rng.integers(1, 10, size=len(chosen))) % 10
    pixels = torch.tensor(images / 16, dtype=torch.float32)
    return Digits(
        train_images=pixels[train],
        train_labels=torch.tensor(given[train]),
        true_labels=torch.tensor(labels[train]),
        test_images=pixels[test],
        test_labels=torch.tensor(labels[test]),
    )


def train_network(digits: Digits, seed: int) -> nn.Sequential:
    """Train a 64-64-10 network with PyTorch's default AdamW, in float32.

    Parameters
    ----------
    digits : Digits
    seed : int
        Decides the initial parameters and the order of the examples.

    Returns
    -------
    model : torch.nn.Sequential
        In evaluation mode, without gradients.
    """
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(SIDE**2, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, 10))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in tqdm(range(_EPOCHS), "epochs", leave=False, disable=None):
        for batch in torch.split(torch.randperm(len(digits.train_labels)), _BATCH_SIZE):
            optimizer.zero_grad()
            logits = model(digits.train_images[batch])
            torch.autograd.backward(cross_entropy(logits, digits.train_labels[batch]))
            optimizer.step()
    optimizer.zero_grad()
    return model.eval()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images whose predicted digit is the label."""
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).double().mean())
