"""The first pass of Kronecker-factored methods, from batches to the parts of a Fisher."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch

from fimkit.distributed import Ranks
from fimkit.estimators.run import Run
from fimkit.exceptions import IFVPUsageError, warn
from fimkit.gradients import BatchGradients, GroupGradients
from fimkit.operators import (
    Columns,
    EigenKroneckerOperator,
    MatrixLayout,
    Operator,
    RowMatrix,
)
from fimkit.record import PassRecord
from fimkit.statistics import (
    DiagonalAccumulator,
    FisherAccumulator,
    LayerStatistics,
    Solver,
    WeightSharing,
    layer_statistics,
)

__all__ = ["LayerParts", "first_pass"]

# A parameter outside Kronecker layers with at most this many numbers gets its exact block.
_DENSE_BLOCK = 1024


class LayerParts:
    """The first pass: a layer's factors, or the block or diagonal of what is in no such layer.

    Parameters
    ----------
    run : Run
    weight_sharing : {"expand", "reduce"}
    fallback : {"auto", "raise"}
    apart : collection of str
        Weights known to be one linear map in some batches only: they are in no layer.
    """

    def __init__(
        self,
        run: Run,
        weight_sharing: WeightSharing,
        fallback: str,
        apart: Collection[str] = (),
    ) -> None:
        self.layers: dict[str, LayerStatistics] = {}
        self.groups: dict[str, tuple[Columns, tuple[str, ...]]] = {}
        self._rest: dict[str, FisherAccumulator | DiagonalAccumulator] = {}
        self._forms: dict[str, tuple[str, MatrixLayout | None]] = {}
        self._like = torch.empty(0, dtype=run.dtype, device=run.device)
        # The rows of a dual form would stay on their ranks.
        self._solver: Solver = "auto" if run.ranks.alone else "primal"
        self._weight_sharing: WeightSharing = weight_sharing
        self._fallback = fallback
        self._apart = apart
        self._masked = False
        self._mask_met = False

    def update(self, gradients: BatchGradients) -> None:
        """Add one batch.

        Raises
        ------
        _NoLayerError
            If what was a layer in earlier batches is none, or another one: its sides are not to be
            mixed. In another pass over all batches, it is to be in no layer throughout.
        """
        for group in gradients.groups:
            met = group.key in self.layers and not group.empty
            if met and _form(group) != self._forms[group.key]:
                raise _NoLayerError(group.key)
        outside: list[str] = []
        for group in gradients.groups:
            key = group.key
            self.groups.setdefault(key, (group.columns, group.group.names))
            if group.empty:
                continue
            if key not in self._forms:
                self._begin(key, *_form(group))
                if key in self._rest:
                    outside += group.group.names
            self._add(group, gradients)
        self._look_for_mask(gradients)
        if outside and self._fallback == "raise":
            raise IFVPUsageError(
                f"{', '.join(map(repr, outside))} are in no layer that can be Kronecker-factored; "
                "leave them out with parameters=, or use fallback='auto' for their exact block "
                "or diagonal."
            )

    def add_eigenvalues(self, gradients: BatchGradients) -> None:
        """Add one batch in the eigenbases of the layers."""
        for group in gradients.groups:
            if group.key in self.layers:
                self.layers[group.key].add_eigenvalues(group, gradients.weights)

    def state_dict(self) -> dict[str, Any]:
        """Return what has been accumulated."""
        return {
            "groups": self.groups,
            "forms": self._forms,
            "masks": (self._masked, self._mask_met),
            "layers": {key: layer.state_dict() for key, layer in self.layers.items()},
            "rest": {key: rest.state_dict() for key, rest in self._rest.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what was accumulated before."""
        self.groups = state["groups"]
        self._masked, self._mask_met = state["masks"]
        for key, form in state["forms"].items():
            self._begin(key, *form)
        for key, layer in self.layers.items():
            layer.load_state_dict(state["layers"][key])
        for key, rest in self._rest.items():
            rest.load_state_dict(state["rest"][key])

    def reduce(self, ranks: Ranks) -> None:
        """Add what the other ranks accumulated, also for layers that only they have met.

        Raises
        ------
        IFVPUsageError
            On all ranks, if they divide parameters into layers in different ways.
        """
        masks = ranks.gather((self._masked, self._mask_met))
        self._masked, self._mask_met = (any(told) for told in zip(*masks, strict=True))
        known: dict[str, tuple[Any, ...]] = {}
        for rank, theirs in enumerate(ranks.gather((self.groups, self._forms))):
            for key, place in theirs[0].items():
                form = theirs[1].get(key)
                earlier = known.setdefault(key, (place, form))
                if earlier[0] != place or (None not in (earlier[1], form) and earlier[1] != form):
                    raise _differing(key, rank)
                known[key] = (place, earlier[1] or form)
        members = Counter(name for (_, names), _ in known.values() for name in names)
        for name, times in members.items():
            if times > 1:
                raise _differing(name, None)
        for key, (place, form) in known.items():
            self.groups.setdefault(key, place)
            if form is not None and key not in self._forms:
                self._begin(key, *form)
        self.groups = {key: self.groups[key] for key in known}  # in the order of all ranks
        self.layers = {key: self.layers[key] for key in known if key in self.layers}
        for layer in self.layers.values():
            layer.reduce_factors(ranks)
        for key in known:
            if key in self._rest:
                self._rest[key].reduce(ranks)

    def warn_of_unused_mask(self) -> None:
        """Warn if no layer had positions of the masks' shape."""
        if self._masked and not self._mask_met:
            warn(
                "a padding mask was given, and no Kronecker layer has positions of its shape "
                "(examples, positions): padding counts in the factors of all layers."
            )

    def _look_for_mask(self, gradients: BatchGradients) -> None:
        mask = gradients.mask
        if mask is None or mask.shape[1] == 1 or self._mask_met:
            return
        layers = [layer for layer in self.layers.values() if layer.has_positions]
        self._masked = self._masked or bool(layers)
        self._mask_met = any(layer.mask_met for layer in layers)

    def rest(self, key: str, n: int) -> tuple[Operator, str]:
        """Return the operator of parameters outside Kronecker layers, and how it is called."""
        accumulator = self._rest.get(key)
        if accumulator is None:  # no example met it
            zero = self._like.new_zeros(self.groups[key][0].size)
            return EigenKroneckerOperator.diagonal_of(zero), "zero"
        dense = isinstance(accumulator, FisherAccumulator)
        return accumulator.result(n), "dense block" if dense else "diagonal"

    def _add(self, group: GroupGradients, gradients: BatchGradients) -> None:
        if group.key in self.layers:
            self.layers[group.key].add_factors(group, gradients.weights, gradients.mask)
        else:
            inner = Columns((slice(0, group.columns.size),))
            rows = RowMatrix([(inner, group.rows())], group.columns.size, gradients.weights)
            self._rest[group.key].update(rows)

    def _begin(self, key: str, form: str, layout: MatrixLayout | None) -> None:
        """Make the statistics of a group, empty."""
        self._forms[key] = form, layout
        statistics = None
        if key not in self._apart:
            statistics = layer_statistics(form, layout, self._like, self._weight_sharing)
        size = self.groups[key][0].size
        if statistics is not None:
            self.layers[key] = statistics
        elif size <= _DENSE_BLOCK:
            self._rest[key] = FisherAccumulator(size, self._like.device, self._solver)
        else:
            self._rest[key] = DiagonalAccumulator(size, self._like)


def _form(group: GroupGradients) -> tuple[str, MatrixLayout | None]:
    """Return how calls act on a group, which is the same in all batches of a layer."""
    return group.form, group.layout or group.table


def _differing(name: str, rank: int | None) -> IFVPUsageError:
    whose = "ranks take" if rank is None else f"rank {rank} takes"
    return IFVPUsageError(
        f"{whose} {name!r} in another form than the others (its calls differ between batches); "
        "leave it out with parameters=, or use Explicit."
    )


class _NoLayerError(Exception):
    """What earlier batches took for a layer is none, or another one."""

    def __init__(self, weight: str) -> None:
        super().__init__(weight)
        self.weight = weight


def first_pass(
    run: Run,
    weight_sharing: WeightSharing,
    fallback: str,
    statistics: Mapping[str, Any] | None = None,
    batches: Callable[[int], Iterator[BatchGradients]] | None = None,
) -> tuple[LayerParts, bool]:
    """Return the parts of a pass over all batches, begun again where a layer is seen to be none.

    An expert's tokens may lie by examples in one batch, as of one example alone, and not in others;
    and a weight may be transposed in some. The rest is as for `Run.accumulate`.
    """
    apart: set[str] = set()
    attempts = _Attempts(batches or run.gradients)
    while True:
        parts = LayerParts(run, weight_sharing, fallback, apart)
        try:
            passed = run.accumulate({"parts": parts, **(statistics or {})}, parts.update, attempts)
        except _NoLayerError as error:
            if isinstance(run.data, Iterator) or run.checkpoint is not None or not run.ranks.alone:
                raise IFVPUsageError(
                    f"{error.weight!r} is one linear map in some batches, and none or another one "
                    "in others (its calls differ, or examples are not apart, as an expert's "
                    "tokens), and the pass cannot begin again to treat them alike: give a "
                    "DataLoader or a list, to one process, without checkpoint=, or leave it out "
                    "with parameters=."
                ) from error
            apart.add(error.weight)
            run.begin_again()
        else:
            return parts, passed


class _Attempts:
    """The batches of a pass, which may begin again and then has to meet the same ones.

    Parameters
    ----------
    batches : callable
        Gives their gradients, from a batch on.
    """

    def __init__(self, batches: Callable[[int], Iterator[BatchGradients]]) -> None:
        self._batches = batches
        self._met = PassRecord()

    def __call__(self, start: int) -> Iterator[BatchGradients]:
        """Yield the gradients of every batch, from one on.

        Raises
        ------
        IFVPUsageError
            If a batch is another one than in the attempt before, as of data that come once only.
        """
        before, self._met = self._met, PassRecord()
        for gradients in self._batches(start):
            i = len(self._met)
            self._met.append(gradients.scalars)
            other = before.difference(i, gradients.scalars) if i < len(before) else None
            if other is not None:
                raise self._changed(f"batch {i} has other {other}")
            yield gradients
            del gradients
        if len(self._met) < len(before):
            raise self._changed(f"there are fewer batches: {len(self._met)}")

    def _changed(self, what: str) -> IFVPUsageError:
        return IFVPUsageError(
            "a parameter is one linear map in some batches only, so that the pass over the data "
            f"began again, and {what} then; give a DataLoader or a list that repeats its batches, "
            "or leave such parameters out with parameters=."
        )
