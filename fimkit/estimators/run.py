"""The frame of a fit: what was given, checked, and passes over its batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from fimkit.checksum import digest
from fimkit.data import (
    ModelData,
    check_batches,
    described,
    indexed_batches,
)
from fimkit.distributed import Ranks
from fimkit.estimators.blocks import select_parameters
from fimkit.estimators.checkpoint import Checkpoint
from fimkit.estimators.settings import Settings
from fimkit.exceptions import IFVPUsageError, warn
from fimkit.gradients import (
    UNSEEN,
    AmbientAutocast,
    BatchGradients,
    GradientEngine,
    Places,
    unwrap,
)
from fimkit.gradients.sampling import ExampleUniforms
from fimkit.gradients.tree import to_device
from fimkit.loaders import check_shares, distribution
from fimkit.replay import RandomStates, loader_generators
from fimkit.vectors import ParameterSpace

__all__ = ["Run", "inside"]


def inside(model: Any) -> Any:
    """Return the model that is run, of a `ModelData` and of wrappers."""
    model = model.model if isinstance(model, ModelData) else model
    return unwrap(model) if isinstance(model, nn.Module) else model


class Run:
    """A fit's model and data, checked against its settings, and passes over the data.

    The model is `whole` as long as this is used.

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
            data: Any = model
        else:
            _check_model(model, dataloader)
            data = check_batches(dataloader)
        self.data = data
        self.model: nn.Module = inside(model)
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
        self.checkpoint: Checkpoint | None = None
        self._passes = self._resumed_pass = self._done = 0
        self._now: RandomStates | None = None
        self._resumed = False
        self._checksums: list[str] = []
        self._unread: dict[int, Tensor] = {}
        self._numbering = 0
        self._has_warned = False
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

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Run passes; where they go on from an interruption, random states are as before after it.

        They are those of another process meanwhile.
        """
        before = RandomStates(loader_generators(self.data))
        try:
            yield
        finally:
            if self._resumed:
                before.restore()

    def agree(self) -> None:
        """Settle with the other ranks what all must have in common for sampled labels.

        All take rank 0's seed. An example's random numbers go by its position in the dataset, where
        all ranks take theirs from one (by a `DistributedSampler`, or as `ModelData` of positions
        none of which two ranks have); otherwise each rank's positions have numbers of their own.

        Raises
        ------
        IFVPUsageError
            On all ranks, if their samplers take some examples twice, or leave some out.
        """
        seed = self.ranks.gather(self.settings.seed)[0]
        self.settings = replace(self.settings, seed=seed)
        shares = self.ranks.gather(distribution(self.data))
        one_dataset = None not in shares
        if not self.ranks.alone:
            check_shares(shares)
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
        statistics: Mapping[str, Any],
        update: Callable[[BatchGradients], None],
        batches: Callable[[int], Iterator[BatchGradients]] | None = None,
    ) -> bool:
        """Pass over the data, all ranks at once, each over its own; what fails on one fails on all.

        Parameters
        ----------
        statistics : mapping of str to object
            What has to be kept for the fit to go on after an interruption, with ``state_dict`` and
            ``load_state_dict``.
        update : callable
            Takes the gradients of each batch.
        batches : callable, optional
            Gives them, from a batch on; `gradients` when not given.

        Returns
        -------
        passed : bool
            False where an interrupted fit had ended this pass, and the statistics are those of a
            later one.
        """
        if not self._passes:
            self.states = RandomStates(loader_generators(self.data))
            state = None if self.checkpoint is None else self.checkpoint.read()
            with self.ranks.together():
                if state is not None:
                    self._resume(state, statistics)
            seeds = self.ranks.gather(self.settings.seed if state is not None else None)
            seed = next((seed for seed in seeds if seed is not None), self.settings.seed)
            self.settings = replace(self.settings, seed=seed)
        passed = self._passes >= self._resumed_pass
        if passed:
            if self.checkpoint is not None and self._passes:
                with self.ranks.together():
                    self._write(self._done, statistics)
                self.checkpoint.forget(self._passes - 1)
            with self.ranks.together():
                self._pass(statistics, update, batches or self.gradients)
        self._passes += 1
        told = self.ranks.gather((sum(self.sizes), self.engine.coverage))
        self._total = sum(n for n, _ in told)
        for _, coverage in reversed(told):
            seen = {name: how for name, how in coverage.items() if how != UNSEEN}
            self.engine.coverage.update(seen)
        if set(self.engine.coverage.values()) == {UNSEEN}:
            name, *others = self.engine.coverage
            more = f" and {len(others)} others" if others else ""
            raise IFVPUsageError(
                f"no loss depends on a selected parameter, {name!r}{more}; select some that the "
                "loss is a function of, by parameters= (all that require grad when not given)."
            )
        return passed

    def begin_again(self) -> None:
        """Return to where the first pass began, to group parameters anew."""
        self.states.restore()
        self.engine.regroup()
        self._unread.clear()

    def _pass(
        self,
        statistics: Mapping[str, Any],
        update: Callable[[BatchGradients], None],
        batches: Callable[[int], Iterator[BatchGradients]],
    ) -> None:
        """Make one pass, from where an interrupted one ended, and write checkpoints."""
        done, self._done = self._done, 0
        for gradients in batches(done):
            update(gradients)
            del gradients  # what is not kept is gone before the next batch
            done += 1
            if self.checkpoint is not None and done % self.checkpoint.every == 0:
                self._write(done, statistics)

    def _write(self, done: int, statistics: Mapping[str, Any]) -> None:
        assert self.checkpoint is not None
        self._refuse_infinite()
        state = {
            "pass": self._passes,
            "done": done,
            "seed": self.settings.seed,
            "sizes": self.sizes,
            "checksums": self._checksums,
            "engine": self.engine.state_dict(),
            "began": self.states.state_dict(),
            "now": RandomStates(loader_generators(self.data)).state_dict(),
            "statistics": {name: each.state_dict() for name, each in statistics.items()},
        }
        self.checkpoint.write(state)

    def _resume(self, state: Mapping[str, Any], statistics: Mapping[str, Any]) -> None:
        self._resumed = True
        self._resumed_pass, self._done = state["pass"], state["done"]
        self.settings = replace(self.settings, seed=state["seed"])
        self.sizes, self._checksums = state["sizes"], state["checksums"]
        self.engine.load_state_dict(state["engine"])
        self.states.load_state_dict(state["began"])
        self._now = RandomStates(loader_generators(self.data))
        self._now.load_state_dict(state["now"])
        for name, each in statistics.items():
            each.load_state_dict(state["statistics"][name])
        self.states.restore()

    def gradients(
        self, start: int = 0, places: Mapping[int, Places] | None = None
    ) -> Iterator[BatchGradients]:
        """Yield the per-example gradients of every batch.

        Parameters
        ----------
        start : int, default=0
            The first batch wanted; those before it have been passed already.
        places : mapping of int to Places, optional
            Where the examples of batches were in another pass, by the batch.

        Raises
        ------
        IFVPUsageError
            If there is no batch, or a batch gives numbers that are not finite.
        """
        batches = indexed_batches(self.data, indexed=self.settings.objective.fisher == "mc")
        numbered = enumerate(batches)
        passed = 0
        for i, (_, batch) in islice(numbered, start):
            self._check_again(i, batch)
            passed = i + 1
        if passed < start and self.checkpoint is not None:
            raise IFVPUsageError(
                f"the data have {passed} batches, and {start} had been passed when the checkpoint "
                "was written; give the same data in the same order, or another folder to begin "
                "anew."
            )
        if self._now is not None and not self._passes:
            self._now.restore()
            self._now = None
        before = sum(self.sizes[:start])
        silent = not self.settings.verbose or self.ranks.rank > 0
        progress = tqdm(
            numbered,
            "batches",
            _length(self.data),
            initial=start,
            disable=silent,
            leave=False,
        )
        for i, (indices, batch) in progress:
            self._check_again(i, batch)
            is_new = i >= len(self.sizes)
            if is_new and not self._has_warned:
                self._warn(i, self.settings.objective.loss.doubt(batch))
            uniforms = ExampleUniforms(
                self.settings.seed, before if indices is None else indices, self._numbering
            )
            try:
                gradients = self.engine.gradients(
                    to_device(batch, self.model_device), uniforms, (places or {}).get(i)
                )
            except IFVPUsageError as error:
                raise type(error)(f"batch {i}: {error}") from error
            except Exception as error:
                error.add_note(f"in batch {i} of the data")
                raise
            if is_new:
                self._warn(i, self.engine.doubt)
            if isinstance(self.data, ModelData) and len(indices) != gradients.n:
                raise IFVPUsageError(
                    f"batch {i}: {len(indices)} examples of the ModelData gave {gradients.n} "
                    "losses or measurements, so that results would belong to other examples; a "
                    "collate function keeps every example (leave some out by indices=), and a "
                    "loss or measurement returns one number for each."
                )
            before += gradients.n
            if i == len(self.sizes):
                self.sizes.append(gradients.n)
            self._unread[i] = gradients.is_finite()
            if self._unread[i].device.type == "cpu":  # elsewhere, waiting for the answer takes time
                self._refuse_infinite()
            yield gradients
            del gradients  # the next batch's forward pass needs the memory
        if not self.sizes:
            if isinstance(self.data, ModelData):
                raise IFVPUsageError(
                    f"{self.data!r} has no examples: its indices, or the slice that it is, select "
                    f"none of the {len(self.data.dataset)} of its dataset; select at least one."
                )
            raise IFVPUsageError(
                "the data has no batches; give at least one example (an iterator that was "
                "iterated over before is empty: give a list or a DataLoader)."
            )
        self._refuse_infinite()
        self.engine.finish()

    def _warn(self, i: int, doubt: str | None) -> None:
        """Warn of what the loss doubts about a batch, once."""
        if doubt is not None and not self._has_warned:
            self._has_warned = True
            warn(f"batch {i}: {doubt}")

    def _check_again(self, i: int, batch: Any) -> None:
        """Keep the checksum of a batch, or compare it with that of the same batch before."""
        if self.checkpoint is None:
            return
        found = digest(batch)
        if i == len(self._checksums):
            self._checksums.append(found)
        elif self._checksums[i] != found:
            raise IFVPUsageError(
                f"batch {i} holds other examples than when the checkpoint was written; give the "
                "same data in the same order, or another folder to begin anew."
            )

    def _refuse_infinite(self) -> None:
        _refuse_infinite(self._unread)
        self._unread.clear()


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
