"""Two passes over the same batches: gradients kept within a budget, the rest computed again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from fimkit.estimators.run import Run
from fimkit.exceptions import IFVPUsageError
from fimkit.gradients import BatchGradients, Places
from fimkit.record import PassRecord
from fimkit.replay import RandomStates, loader_generators

__all__ = ["ReplayedPasses"]


class ReplayedPasses:
    """Gives every batch's gradients, then those of its Kronecker layers again.

    Parameters
    ----------
    run : Run
    budget : int
        Bytes of gradients to keep between the passes. Batches beyond it are run through the model
        again, with the random states of the first pass. Those that a pass changes (Python's,
        NumPy's and the loader's generators) are afterwards what one pass makes of them.
    """

    def __init__(self, run: Run, budget: int) -> None:
        self._run = run
        self._budget = budget
        self._kept: list[BatchGradients] = []
        self._places: dict[int, Places] = {}  # of the batches that are not kept
        self._record = PassRecord()
        if getattr(run.data, "persistent_workers", False):
            # Starting workers draws a number, so they start before any pass.
            with RandomStates(loader_generators(run.data)):
                iter(run.data)

    def state_dict(self) -> dict[str, Any]:
        """Return the record of the first pass. What it kept is not in it."""
        return self._record.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a pass of before, of which nothing is kept."""
        self._record.load_state_dict(state)

    def first(self, start: int = 0) -> Iterator[BatchGradients]:
        """Yield the gradients of every batch, from the start each time, or of those from one on.

        Raises
        ------
        IFVPUsageError
            If the budget is exceeded by data that can be iterated over only once.
        """
        if not start:
            self._kept.clear()
            self._places.clear()
            self._record = PassRecord()
        i, used, full = start, 0, start > 0
        for gradients in self._run.gradients(start):  # enumerate would hold on to each
            layers = gradients.layers()
            used += layers.nbytes
            full = full or used > self._budget
            if full:
                self._places[i] = gradients.places
            again = full or self._run.checkpoint is not None  # of which nothing is kept
            self._record.append(layers.scalars, *(_sides(layers) if again else ()))
            yield gradients
            if not full:
                self._kept.append(layers)
            elif isinstance(self._run.data, Iterator):
                raise IFVPUsageError(
                    f"the gradients of the first {i + 1} batches take more than "
                    f"cache_budget={self._budget} bytes, and the data, an iterator, cannot be "
                    "passed over again; give a DataLoader or a list, or a larger cache_budget."
                )
            del gradients, layers
            i += 1

    def second(self, start: int = 0) -> Iterator[BatchGradients]:
        """Yield the same gradients again, from a batch on, of groups that are Kronecker layers.

        Raises
        ------
        IFVPUsageError
            If the data gives other batches than before, by the batch.
        """
        yield from self._kept[start:]
        if len(self._kept) == len(self._record):
            return
        self._run.states.restore()
        i, n = max(start, len(self._kept)), len(self._record)
        for gradients in self._run.gradients(i, self._places):
            if i == n:
                raise self._changed(f"there are more batches than {n}")
            layers = gradients.layers()
            other = self._record.difference(i, layers.scalars, *_sides(layers))
            if other is not None:
                raise self._changed(f"batch {i} has other {other}")
            yield layers
            del gradients, layers
            i += 1
        if i != n:  # what ends among the batches that were kept ends unseen
            raise self._changed(f"there are fewer batches: {i} at most, instead of {n}")

    def _changed(self, what: str) -> IFVPUsageError:
        return IFVPUsageError(
            f"the second pass over the data differs from the first: {what}. Give a loader that "
            "repeats its batches (the random numbers of torch, of the loader's generator, of "
            "Python's random and of numpy.random are repeated, no others, and none in persistent "
            "workers), or a larger cache_budget, so that one pass is enough."
        )


def _sides(gradients: BatchGradients) -> tuple[list[Tensor], list[Tensor]]:
    """Return the inputs of all layers, and the gradients at their outputs."""
    calls = [call for group in gradients.groups for call in group.calls]
    return [call.use.x for call in calls], [call.signals for call in calls]
