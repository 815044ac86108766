"""Two passes over the same batches: gradients kept within a budget, the rest computed again."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fimkit.data import ModelData
from fimkit.estimators.run import Run
from fimkit.exceptions import IFVPUsageError
from fimkit.gradients import BatchGradients

__all__ = ["ReplayedPasses"]

# Relative difference at which two computations of a batch's losses count as different.
_TOLERANCE = 1e-3


class ReplayedPasses:
    """Gives every batch's gradients, then those of its Kronecker layers again.

    Parameters
    ----------
    run : Run
    budget : int
        Bytes of gradients to keep between the passes. Batches beyond it are run through the model
        again, with torch's and the loader's random states as in the first pass.
    """

    def __init__(self, run: Run, budget: int) -> None:
        self._run = run
        self._budget = budget
        self._kept: list[BatchGradients] = []
        self._scalars: list[Tensor] = []
        self._states = _random_states(run)

    def first(self) -> Iterator[BatchGradients]:
        """Yield the gradients of every batch.

        Raises
        ------
        IFVPUsageError
            If the budget is exceeded by data that can be iterated over only once.
        """
        used, full = 0, False
        for i, gradients in enumerate(self._run.gradients()):
            yield gradients
            gradients = gradients.layers()
            self._scalars.append(gradients.scalars)
            used += gradients.nbytes
            full = full or used > self._budget
            if not full:
                self._kept.append(gradients)
            elif isinstance(self._run.data, Iterator):
                raise IFVPUsageError(
                    f"the gradients of the first {i + 1} batches take more than "
                    f"cache_budget={self._budget} bytes, and the data, an iterator, cannot be "
                    "passed over again; give a DataLoader or a list, or a larger cache_budget."
                )

    def second(self) -> Iterator[BatchGradients]:
        """Yield the same gradients again, of groups that are Kronecker layers.

        Raises
        ------
        IFVPUsageError
            If the data gives other batches than before, by the batch.
        """
        yield from self._kept
        if len(self._kept) == len(self._scalars):
            return
        _restore(self._states, self._run)
        i = len(self._kept)
        for gradients in self._run.gradients(start=i):
            if i >= len(self._scalars) or not _same(gradients.scalars, self._scalars[i]):
                raise self._changed(f"batch {i} has other losses")
            yield gradients.layers()
            i += 1
        if i != len(self._scalars):
            raise self._changed(f"there are {i} batches instead of {len(self._scalars)}")

    def _changed(self, what: str) -> IFVPUsageError:
        return IFVPUsageError(
            f"the second pass over the data differs from the first: {what}. Give a loader that "
            "repeats its batches (no random augmentation), or a larger cache_budget, so that one "
            "pass is enough."
        )


def _random_states(run: Run) -> list[Tensor]:
    """Return the random states that a pass starts from."""
    states = [torch.get_rng_state()]
    if run.model_device.type == "cuda":
        states.append(torch.cuda.get_rng_state(run.model_device))
    return [*states, *(generator.get_state() for generator in _generators(run))]


def _restore(states: list[Tensor], run: Run) -> None:
    torch.set_rng_state(states[0])
    if run.model_device.type == "cuda":
        torch.cuda.set_rng_state(states[1], run.model_device)
    generators = _generators(run)
    for generator, state in zip(generators, states[len(states) - len(generators) :], strict=True):
        generator.set_state(state)


def _generators(run: Run) -> list[torch.Generator]:
    """Return the loader's own generators, wherever it keeps them."""
    data = run.data
    if isinstance(data, ModelData) or not isinstance(data, DataLoader):
        return []
    inner = getattr(data.batch_sampler, "sampler", None)
    owners = (data, data.sampler, data.batch_sampler, inner)
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _same(second: Tensor, first: Tensor) -> bool:
    return second.shape == first.shape and torch.allclose(
        second, first, rtol=_TOLERANCE, atol=_TOLERANCE * float(first.abs().mean())
    )
