"""The processes that fit together: those of torch.distributed's default group, or this one alone.

Ranks pass over their own data without a word to each other and meet at the end of each pass, so
that they may have any number of examples and batches. What went wrong on one is exchanged before
anything else is, so that none waits for what never comes. It is left in the group's store at once,
for ranks that are so late that the others have given up waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from fimkit.exceptions import IFVPUsageError, RankError

__all__ = ["Ranks"]


class Ranks:
    """The ranks of a group, as one of them sees it. Its methods are called by all, in one order.

    Parameters
    ----------
    rank : int, default=0
    size : int, default=1
        One where there is no group; then nothing is exchanged.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    @classmethod
    def current(cls) -> Self:
        """Return the default process group's ranks, or this process alone if there is none."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def alone(self) -> bool:
        """Whether there is one rank only."""
        return self.size == 1

    # -- what is exchanged -------------------------------------------------------------------------

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, small and picklable, in order."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.size
        self._meet(dist.all_gather_object, values, value)
        return values

    def add_up(self, *tensors: Tensor) -> None:
        """Put the sum over ranks in the place of each tensor; all ranks get the same numbers."""
        if self.alone:
            return
        for tensor in tensors:
            carried = _carried(tensor)
            self._meet(dist.all_reduce, carried)
            if carried is not tensor:
                tensor.copy_(carried)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Put one rank's numbers in the place of those of the others."""
        if self.alone or not tensor.numel():
            return
        carried = _carried(tensor)
        # As bytes, since not every backend carries every dtype.
        self._meet(dist.broadcast, carried.view(-1).view(torch.uint8), source)
        if carried is not tensor and self.rank != source:
            tensor.copy_(carried)

    def _meet(self, collective: Callable[..., Any], *arguments: Any) -> None:
        if not dist.is_initialized() or dist.get_world_size() != self.size:
            raise RankError(
                f"this was fitted by a process group of {self.size} ranks, each of which keeps its "
                "own rows, and that group has ended. Call save(path) on all ranks before it does; "
                "one process can load the file."
            )
        try:
            collective(*arguments)
        except RuntimeError as error:
            left = self._read_notes()
            if left:
                raise RankError(_joined(left)) from error
            raise RankError(
                f"rank {self.rank} lost the other ranks: one ended, or did not come within the "
                "process group's timeout (init_process_group(timeout=...) must be longer than "
                f"ranks' passes over their data differ). {type(error).__name__}: {error}"
            ) from error

    # -- errors ------------------------------------------------------------------------------------

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a part in which ranks do not meet; where it fails on one, it fails on all.

        Raises
        ------
        RankError
            On the ranks that did not fail, naming those that did and why.
        """
        try:
            yield
        except Exception as error:
            if not self.alone:
                error.add_note(f"on rank {self.rank} of {self.size}")
                self._leave_note(_told(error))
                try:
                    self.gather(_told(error))
                except RankError as lost:  # this rank's own error tells more
                    error.add_note(str(lost))
                else:
                    self._leave_note("")
            raise
        failed = {i: told for i, told in enumerate(self.gather(None)) if told is not None}
        if failed:
            raise RankError(_joined(failed))

    def _leave_note(self, text: str) -> None:
        """Leave a text for ranks that come when this one no longer waits; an empty one is none."""
        with suppress(RuntimeError):  # the store ends with the process that keeps it
            _store().set(f"fimkit: rank {self.rank} failed", text)

    def _read_notes(self) -> dict[int, str]:
        """Return what the ranks left that failed and were not heard."""
        found = {}
        with suppress(RuntimeError):
            for rank in range(self.size):
                key = f"fimkit: rank {rank} failed"
                if rank != self.rank and _store().check([key]):
                    found[rank] = _store().get(key).decode()
        return {rank: text for rank, text in found.items() if text}

    def check_same(self, values: Mapping[str, Any], remedy: str) -> None:
        """Raise on all ranks if they have other values under any name.

        Raises
        ------
        IFVPUsageError
            Naming the first difference, who has it, and the remedy.
        """
        everyone = self.gather(dict(values))
        first = everyone[0]
        for rank, theirs in enumerate(everyone):
            for name in {**first, **theirs}:
                if first.get(name) != theirs.get(name):
                    raise IFVPUsageError(
                        f"ranks differ in {name}: {first.get(name, 'absent')!s:.200} on rank 0, "
                        f"{theirs.get(name, 'absent')!s:.200} on rank {rank}. {remedy}"
                    )

    # -- work --------------------------------------------------------------------------------------

    def divide(self, costs: Sequence[float]) -> list[int]:
        """Return the rank that takes each piece of work: the dearest first, to the least busy."""
        owners = [0] * len(costs)
        load = [0.0] * self.size
        for piece in sorted(range(len(costs)), key=lambda i: -costs[i]):
            owners[piece] = load.index(min(load))
            load[owners[piece]] += costs[piece]
        return owners


def _store() -> Any:
    """Return where the ranks of the group found each other."""
    return dist.distributed_c10d._get_default_store()


def _joined(failed: Mapping[int, str]) -> str:
    return "; ".join(f"rank {rank} failed: {told}" for rank, told in failed.items())


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _carried(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy that is contiguous and where the group's backend takes it."""
    backend = dist.get_backend()
    if "nccl" in backend:
        device = torch.device("cuda", torch.cuda.current_device())
        return tensor.contiguous() if tensor.is_cuda else tensor.contiguous().to(device)
    return tensor.contiguous().cpu()
