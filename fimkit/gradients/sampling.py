"""Random numbers that belong to examples, not to batches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fimkit.exceptions import IFVPUsageError

__all__ = ["ExampleUniforms"]


class ExampleUniforms:
    """Uniform numbers by seed, example and sample, for drawing labels.

    Each call is one sample: it starts every example's own stream of a counter-based generator,
    so that neither batch size nor order changes what an example gets.

    Parameters
    ----------
    seed : int
    indices : ndarray of int, or int
        Positions of the batch's examples in the dataset; or, where those are unknown, the number
        of examples before the batch.
    dataset : int, default=0
        Which numbering of examples it is; others with the same positions have other numbers.
    """

    def __init__(self, seed: int, indices: npt.NDArray[np.integer] | int, dataset: int = 0) -> None:
        self._seed = seed
        self._dataset = dataset
        self._indices = indices
        self._sample = 0

    def __call__(self, shape: Sequence[int]) -> Tensor:
        """Return numbers in [0, 1) of a shape that has the examples first."""
        n, m = shape[0], math.prod(shape[1:])
        indices = self._indices
        if isinstance(indices, int):
            indices = np.arange(indices, indices + n)
        if len(indices) != n:
            raise IFVPUsageError(
                f"the loader drew {len(indices)} examples and the batch holds {n}, so that sampled "
                "labels (fisher='mc') cannot be told which example they are for; let collate_fn "
                "keep every example, and leave some out by the dataset or the sampler."
            )
        numbers = np.empty((n, m))
        for row, index in zip(numbers, indices, strict=True):
            counter = [0, self._dataset, self._sample, int(index)]
            bits = np.random.Philox(key=self._seed, counter=counter)
            np.random.Generator(bits).random(out=row)
        self._sample += 1
        return torch.from_numpy(numbers).view(*shape)
