"""The frame of a fit: what was given, checked, and passes over its batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import reduce
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from tqdm import tqdm

from fimkit.data import (
    ModelData,
    OwnPositions,
    check_batches,
    described,
    indexed_batches,
    sampler_of,
)
from fimkit.distributed import Ranks
from fimkit.estimators.blocks import select_parameters
from fimkit.estimators.settings import Settings
from fimkit.exceptions import IFVPUsageError
from fimkit.gradients import (
    UNSEEN,
    AmbientAutocast,
    BatchGradients,
    GradientEngine,
    unwrap,
)
from fimkit.gradients.sampling import ExampleUniforms
from fimkit.gradients.tree import to_device
from fimkit.vectors import ParameterSpace

__all__ = ["Run"]


class Run:
    """A fit's model and data, checked against its settings, and passes over the data.

    Parameters
    ----------
    settings : Settings
        Device and dtype are the model's where they leave that open.
    model : Module or ModelData
    dataloader : iterable of batches
        Ignored where ``model`` is a `ModelData`.
    space : ParameterSpace, optional
        The parameters that the model must have; any when not given.
    ranks : Ranks, optional
        Which fit together, each with data of its own; this process alone when not given.

    Attributes
    ----------
    settings : Settings
        With nothing left open.
    sizes : list of int
        Examples of each batch that was passed here.
    """

    def __init__(
        self,
        settings: Settings,
        model: Any,
        dataloader: Any = None,
        *,
        space: ParameterSpace | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks or Ranks()
        if isinstance(model, ModelData):
            if isinstance(dataloader, ModelData | DataLoader):
                raise IFVPUsageError(
                    "a ModelData brings its own data, and a "
                    f"{type(dataloader).__name__} was given beside it; give one of the two."
                )
            model, data = model.model, model
        else:
            _check_model(model, dataloader)
            data = check_batches(dataloader)
        self.data = data
        self.model = unwrap(model)
        _refuse_parts(self.model)
        _refuse_batch_statistics(self.model)
        self.space = select_parameters(self.model, settings.patterns)
        if space is not None and space.shapes != self.space.shapes:
            raise IFVPUsageError(
                "the ModelData's model has other trainable parameters than the one fitted: "
                f"{_difference(space.shapes, self.space.shapes)}."
            )
        parameters = dict(self.model.named_parameters())
        selected = [parameters[name] for name in self.space.shapes]
        self.model_device = next(iter(parameters.values())).device
        self.device = settings.device or selected[0].device
        self.dtype = settings.dtype or reduce(
            torch.promote_types, (parameter.dtype for parameter in selected), torch.float32
        )
        self.settings = replace(settings, device=self.device, dtype=self.dtype)
        self.blocks: dict[str, int] | None = None
        self.sizes: list[int] = []
        self._total: int | None = None
        self._numbering = 0
        self._autocast = AmbientAutocast()
        self._made: GradientEngine | None = None

    @property
    def n(self) -> int:
        """Number of examples passed, on all ranks once a pass has ended."""
        return sum(self.sizes) if self._total is None else self._total

    @property
    def engine(self) -> GradientEngine:
        """What computes gradients; made when first asked for."""
        if self._made is None:
            self._made = GradientEngine(
                self.model,
                self.settings.objective,
                self.space,
                self.dtype,
                self.device,
                self.blocks,
                self._autocast,
            )
        return self._made

    def keep_on(self, device: torch.device) -> None:
        """Keep rows and statistics on this device, wherever the model is; before any pass."""
        self.device = device
        self.settings = replace(self.settings, device=device)

    def agree(self) -> None:
        """Settle with the other ranks what all must have in common for sampled labels.

        All take rank 0's seed. An example's random numbers go by its position in the dataset, where
        all ranks take theirs from one (by a `DistributedSampler`, or as `ModelData` of positions
        none of which two ranks have); otherwise each rank's positions have numbers of their own.

        Raises
        ------
        IFVPUsageError
            On all ranks, if two of them draw the same shard.
        """
        seed = self.ranks.gather(self.settings.seed)[0]
        self.settings = replace(self.settings, seed=seed)
        sampler = sampler_of(self.data) if isinstance(self.data, DataLoader) else None
        own = None
        if isinstance(sampler, DistributedSampler | OwnPositions):
            own = sampler.num_replicas, sampler.rank
        shards = self.ranks.gather(own)
        for rank, shard in enumerate(shards):
            earlier = shards.index(shard)
            if shard is not None and earlier < rank:
                raise IFVPUsageError(
                    f"ranks {earlier} and {rank} both draw shard {shard[1]} of {shard[0]}; give "
                    "each rank DistributedSampler(dataset) of its own, made after "
                    "init_process_group."
                )
        one_dataset = None not in shards
        if not one_dataset and self.settings.objective.fisher == "mc":
            one_dataset = self._positions_are_shared_out()
        self._numbering = 0 if one_dataset else self.ranks.rank

    def _positions_are_shared_out(self) -> bool:
        """Whether all ranks have `ModelData` of as long a dataset, and none the same positions."""
        data = self.data if isinstance(self.data, ModelData) else None
        lengths = self.ranks.gather(None if data is None else len(data.dataset))
        if data is None or len(set(lengths)) > 1:
            return False
        taken = torch.zeros(len(data.dataset), dtype=torch.int64)
        taken[torch.from_numpy(data.indices)] = 1
        self.ranks.add_up(taken)
        return bool((taken <= 1).all())

    def accumulate(
        self,
        update: Callable[[BatchGradients], None],
        batches: Callable[[], Iterator[BatchGradients]] | None = None,
    ) -> None:
        """Pass over the data, all ranks at once, each over its own; what fails on one fails on all.

        Parameters
        ----------
        update : callable
            Takes the gradients of each batch.
        batches : callable, optional
            Gives them; `gradients` when not given.
        """
        with self.ranks.together():
            for gradients in (batches or self.gradients)():
                update(gradients)
        told = self.ranks.gather((sum(self.sizes), self.engine.coverage))
        self._total = sum(n for n, _ in told)
        for _, coverage in reversed(told):
            seen = {name: how for name, how in coverage.items() if how != UNSEEN}
            self.engine.coverage.update(seen)

    def gradients(self, start: int = 0) -> Iterator[BatchGradients]:
        """Yield the per-example gradients of every batch.

        Parameters
        ----------
        start : int, default=0
            The first batch wanted; those before it have been passed already.

        Raises
        ------
        IFVPUsageError
            If there is no batch, or a batch gives numbers that are not finite.
        """
        batches = indexed_batches(self.data, indexed=self.settings.objective.fisher == "mc")
        unread: dict[int, Tensor] = {}
        before = sum(self.sizes[:start])
        silent = not self.settings.verbose or self.ranks.rank > 0
        progress = tqdm(
            islice(enumerate(batches), start, None),
            "batches",
            _length(self.data),
            initial=start,
            disable=silent,
            leave=False,
        )
        for i, (indices, batch) in progress:
            uniforms = ExampleUniforms(
                self.settings.seed, before if indices is None else indices, self._numbering
            )
            try:
                gradients = self.engine.gradients(to_device(batch, self.model_device), uniforms)
            except IFVPUsageError as error:
                raise type(error)(f"batch {i}: {error}") from error
            except Exception as error:
                error.add_note(f"in batch {i} of the data")
                raise
            before += gradients.n
            if i == len(self.sizes):
                self.sizes.append(gradients.n)
            unread[i] = gradients.is_finite()
            if unread[i].device.type == "cpu":  # elsewhere, waiting for the answer takes time
                _refuse_infinite(unread)
                unread.clear()
            yield gradients
        if not self.sizes:
            raise IFVPUsageError(
                "the data has no batches; give at least one example (an iterator that was "
                "iterated over before is empty: give a list or a DataLoader)."
            )
        _refuse_infinite(unread)


def _length(data: Any) -> int | None:
    """Return the number of batches, for the time left, where it is known."""
    try:
        return len(data.batches() if isinstance(data, ModelData) else data)
    except (TypeError, NotImplementedError):
        return None


def _refuse_infinite(finite: Mapping[int, Tensor]) -> None:
    flags = torch.stack(list(finite.values())).tolist() if finite else []
    bad = [i for i, value in zip(finite, flags, strict=True) if not value]
    if bad:
        raise IFVPUsageError(
            f"batch {bad[0]}: NaN or infinite losses or gradients"
            + (f" (and {len(bad) - 1} more batches)" if len(bad) > 1 else "")
            + "; look for NaN inputs, log(0) in the loss, or a diverged model."
        )


def _check_model(model: Any, dataloader: Any) -> None:
    if not isinstance(model, nn.Module):
        swapped = " (the arguments look swapped)" if isinstance(dataloader, nn.Module) else ""
        raise IFVPUsageError(
            f"model must be a torch.nn.Module or a ModelData; got {described(model)}{swapped}. "
            "Call fit(model, dataloader) or fit(ModelData(model, dataset))."
        )
    if dataloader is None:
        raise IFVPUsageError(
            "fit(model) has no data; call fit(model, dataloader) or fit(ModelData(model, dataset))."
        )


def _refuse_parts(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "placements"):
            raise IFVPUsageError(
                f"parameter {name!r} is a DTensor, of which each rank has a part (fully_shard, or "
                "tensor parallelism), and its layers communicate in every batch, of which ranks "
                "may have different numbers. Fit a plain copy of the model on each rank: "
                "plain.load_state_dict(get_model_state_dict(model, options=StateDictOptions("
                "full_state_dict=True))), from torch.distributed.checkpoint.state_dict."
            )


def _refuse_batch_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if batch_norm and getattr(module, "running_mean", None) is None:
            raise IFVPUsageError(
                f"layer {name!r} ({type(module).__name__}) has no running statistics, so the loss "
                "of an example depends on the others in its batch; train it with "
                "track_running_stats=True, or replace it by GroupNorm."
            )


def _difference(fitted: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    for name in {**fitted, **given}:
        if fitted.get(name) != given.get(name):
            return f"{name!r} was {fitted.get(name, 'absent')}, now {given.get(name, 'absent')}"
    return "their order differs"
