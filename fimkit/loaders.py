"""What a data loader draws: the positions of its examples, all of them or a rank's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
)
from torch.utils.data.distributed import DistributedSampler

from fimkit.exceptions import IFVPUsageError

__all__ = [
    "Indices",
    "check_shares",
    "distribution",
    "refuse_samplers",
    "tagged_batches",
    "without_repeats",
]

Indices = npt.NDArray[np.integer[Any]]


def refuse_samplers(loader: DataLoader[Any]) -> None:
    """Refuse a loader that may leave examples of its dataset out, or repeat some."""
    if isinstance(loader.dataset, IterableDataset):
        return  # refused for what it is
    batches, sampler = loader.batch_sampler, _sampler_of(loader)
    remedy = (
        "and a ModelData is all of its dataset; give ModelData(model, loader.dataset, "
        "indices=...) with the positions of its examples, and collate_fn= if the loader has one."
    )
    if type(batches) is not BatchSampler:
        raise IFVPUsageError(f"the loader draws by a batch_sampler of its own, {remedy}")
    n = len(loader.dataset)  # type: ignore[arg-type]
    whole = type(sampler) is SequentialSampler or (
        type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == n
    )
    if not whole or len(sampler.data_source) != n:
        raise IFVPUsageError(f"the loader draws by a {type(sampler).__name__} of its own, {remedy}")
    if batches.drop_last and n % batches.batch_size:
        raise IFVPUsageError(
            f"the loader has drop_last=True, which drops {n % batches.batch_size} of {n} "
            f"examples, {remedy}"
        )


def _sampler_of(loader: DataLoader[Any]) -> Any:
    """Return what a loader takes its examples' positions from."""
    return getattr(loader.batch_sampler, "sampler", loader.sampler)


class _Tagged(Dataset[Any]):
    """A dataset whose examples come with their positions."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, index: Any) -> tuple[Any, Any]:
        return index, self.dataset[index]


class _TaggedCollate:
    """A collate function that keeps positions apart from examples."""

    def __init__(self, collate_fn: Callable[[list[Any]], Any]) -> None:
        self.collate_fn = collate_fn

    def __call__(self, items: list[tuple[Any, Any]]) -> tuple[Any, Any]:
        return [index for index, _ in items], self.collate_fn([example for _, example in items])


def tagged_batches(loader: DataLoader[Any]) -> Iterator[tuple[Indices, Any]]:
    """Yield a loader's batches, with the positions of their examples in its dataset."""
    tagged = _remade(
        loader, _Tagged(loader.dataset), loader.batch_sampler, _TaggedCollate(loader.collate_fn)
    )
    for indices, batch in tagged:
        yield np.asarray(indices), batch


def _remade(
    loader: DataLoader[Any], dataset: Any, batch_sampler: Any, collate_fn: Any
) -> DataLoader[Any]:
    """Return a loader with other parts and the same workers."""
    return DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        collate_fn=collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
    )


class _OwnPositions(Sampler[int]):
    """What a `DistributedSampler` draws for its rank, without what it repeats to fill up.

    Parameters
    ----------
    sampler : DistributedSampler
    """

    def __init__(self, sampler: DistributedSampler[Any]) -> None:
        self.whole = sampler

    def __iter__(self) -> Iterator[int]:
        return islice(self.whole, len(self))

    def __len__(self) -> int:
        whole = self.whole
        return len(range(whole.rank, len(whole.dataset), whole.num_replicas))  # type: ignore[arg-type]


def without_repeats(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return a loader that draws no example twice for a `DistributedSampler` to be even."""
    sampler = _sampler_of(loader)
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
        return loader
    n = len(sampler.dataset)  # type: ignore[arg-type]
    if n % sampler.num_replicas == 0:
        return loader
    batches = loader.batch_sampler
    plain = type(loader) is DataLoader and type(sampler) is DistributedSampler
    if not plain or not isinstance(batches, BatchSampler) or type(batches) is not BatchSampler:
        raise IFVPUsageError(
            f"the {type(sampler).__name__} repeats {-n % sampler.num_replicas} of {n} examples, so "
            f"that all {sampler.num_replicas} ranks have as many; give a plain DataLoader with a "
            "plain DistributedSampler, of which each example is taken once, or drop_last=True."
        )
    own = BatchSampler(_OwnPositions(sampler), batches.batch_size, batches.drop_last)
    return _remade(loader, loader.dataset, own, loader.collate_fn)


def distribution(data: Any) -> dict[str, Any] | None:
    """Return how a `DistributedSampler` shares a dataset out, by the names of its arguments.

    Returns
    -------
    arguments : dict of str to object, or None
        ``rank``, and what must be the same for all ranks so that none takes another's examples.
        None where data are not drawn by one.
    """
    sampler = _sampler_of(data) if isinstance(data, DataLoader) else None
    if isinstance(sampler, _OwnPositions):
        sampler = sampler.whole
    if not isinstance(sampler, DistributedSampler):
        return None
    order = {"seed": sampler.seed, "epoch": sampler.epoch} if sampler.shuffle else {}
    return {
        "rank": sampler.rank,
        "num_replicas": sampler.num_replicas,
        "len(dataset)": len(sampler.dataset),  # type: ignore[arg-type]
        "drop_last": sampler.drop_last,
        "shuffle": sampler.shuffle,
        **order,
    }


def check_shares(shares: Sequence[Mapping[str, Any] | None]) -> None:
    """Raise if ranks' samplers, by `distribution`, do not take each example of one dataset once."""
    sampling = [rank for rank, share in enumerate(shares) if share is not None]
    if not sampling:
        return
    remedy = (
        "give each rank DistributedSampler(dataset) of its own, made after init_process_group, all "
        "with the same arguments, dataset and epoch."
    )
    size, first = len(shares), shares[sampling[0]] or {}
    drawn: dict[int, int] = {}
    for rank, share in enumerate(shares):
        if share is None:
            raise IFVPUsageError(
                f"rank {sampling[0]} draws by a DistributedSampler, and rank {rank} by none, so "
                f"that examples may be taken twice, or not at all; {remedy}"
            )
        if share["num_replicas"] != size:
            raise IFVPUsageError(
                f"the DistributedSampler of rank {rank} shares its dataset out over "
                f"{share['num_replicas']} ranks, and {size} fit together; {remedy}"
            )
        for name in first:
            if name != "rank" and first[name] != share.get(name):
                raise IFVPUsageError(
                    f"the DistributedSamplers of ranks {sampling[0]} and {rank} have different "
                    f"{name}: {first[name]} and {share.get(name)}, so that examples are taken "
                    f"twice, or not at all; {remedy}"
                )
        earlier = drawn.setdefault(share["rank"], rank)
        if earlier != rank:
            raise IFVPUsageError(
                f"ranks {earlier} and {rank} both draw shard {share['rank']} of {size}; {remedy}"
            )
