"""Per-example gradients of a model, batch by batch.

Calls on parameters are captured during one forward pass; one backward pass per scalar stops at
their outputs, so weight gradients are never formed. What no rule covers comes from torch.func.
Nothing captured is trusted: before a new pattern of calls is used, random sums of the rows are
compared with autograd's own gradient of the same sums of losses, parameter by parameter; and in
every batch whose numbers could move examples about, the gradients at the calls show whether they
are where they were found before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fimkit.exceptions import IFVPUsageError
from fimkit.gradients.capture import Capture
from fimkit.gradients.fallback import FallbackGradients
from fimkit.gradients.groups import BatchGradients, GroupGradients, Located
from fimkit.gradients.independence import DEPENDENT, IndependenceCheck, unchecked
from fimkit.gradients.layout import BatchLayout, Places
from fimkit.gradients.modes import AmbientAutocast
from fimkit.gradients.objective import Objective
from fimkit.gradients.ownership import owned, version
from fimkit.gradients.pairing import Group, pair_parameters
from fimkit.gradients.rules import Use
from fimkit.gradients.steady import are_steady
from fimkit.gradients.tables import bounded_tables
from fimkit.gradients.tree import common_length, map_tensors, tensors
from fimkit.gradients.verification import PlacesCheck, RandomSum, graph_shape
from fimkit.losses import Uniforms
from fimkit.losses.failures import explained
from fimkit.operators import Columns
from fimkit.replay import RandomStates
from fimkit.vectors import ParameterSpace, some_names

__all__ = ["UNSEEN", "GradientEngine"]

#: How the gradients of a parameter are obtained that no example has met.
UNSEEN = "no gradient seen"


@dataclass
class _Pass:
    """One forward pass: the scalars, by column and stacked, and what was captured on the way.

    The precision is the coarsest dtype that it computed in; overwritten are parameters of calls
    whose inputs were written to later in the pass.
    """

    batch: Any
    labels: list[Any]
    columns: Sequence[Tensor]
    scalars: Tensor
    weights: Tensor | None
    mask: Tensor | None
    uses: list[Use]
    overwritten: set[str]
    graph: frozenset[tuple[Any, int]]
    precision: torch.dtype
    steady: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Examples and rows per example."""
        return self.scalars.shape[0], self.scalars.shape[1]

    def release(self) -> None:
        """Let the graph go, and own what is kept of the calls, as the model may run again."""
        self.scalars, self.columns = self.scalars.detach(), ()
        for use in self.uses:
            del use.edge
        for use, x in zip(self.uses, owned([use.x for use in self.uses]), strict=True):
            use.x = x

    @property
    def key(self) -> Any:
        """What checks hold for: the graph, and that a lone example fits every layout."""
        n = self.shape[0]
        leading = tuple(tensor.ndim > 0 and tensor.shape[0] == n for tensor in tensors(self.batch))
        return n > 1, self.graph, leading, tuple((use.key, use.repeats(n)) for use in self.uses)


class GradientEngine:
    """Computes the rows of batches for one model, objective and selection of parameters.

    Parameters
    ----------
    model : Module
        Already in the state in which it is to be differentiated.
    objective : Objective
    space : ParameterSpace
        The selected parameters.
    dtype : torch.dtype
        What rows are kept in.
    device : torch.device
        Where rows are kept.
    blocks : mapping of str to int, optional
        Block of each parameter; a bias is folded into its weight only within one block.
    autocast : AmbientAutocast, optional
        The autocasting under which the model is run; what is in force when not given.

    Attributes
    ----------
    coverage : dict of str to str
        How each parameter's gradients are obtained.
    doubt : str or None
        What is likely wrong about the first batch's outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        space: ParameterSpace,
        dtype: torch.dtype,
        device: torch.device,
        blocks: Mapping[str, int] | None = None,
        autocast: AmbientAutocast | None = None,
    ) -> None:
        self._model = model
        self._autocast = autocast or AmbientAutocast()
        self._objective = objective
        self._space = space
        self._like = torch.empty(0, dtype=dtype, device=device)
        self._blocks = blocks
        named = dict(model.named_parameters())
        self._parameters = {name: named[name] for name in space.shapes}
        self._restored = {id(table) for table in bounded_tables(model)}
        self._fallback = FallbackGradients(model, objective, self._autocast)
        self._fallback_names: set[str] = set()
        self._groups: list[Group] | None = None
        self._found: dict[Any, Places] = {}
        self.coverage = dict.fromkeys(space.shapes, UNSEEN)
        self.doubt: str | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return what has been found out about the parameters, besides what every run finds."""
        groups = None if self._groups is None else [(g.weight, g.bias) for g in self._groups]
        fallback = sorted(self._fallback_names)
        return {"groups": groups, "fallback": fallback, "coverage": self.coverage}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what was found out before."""
        groups = state["groups"]
        self._groups = None if groups is None else [Group(*names) for names in groups]
        self._fallback_names = set(state["fallback"])
        self.coverage.update(state["coverage"])

    def gradients(
        self, batch: Any, uniforms: Uniforms | None = None, before: Places | None = None
    ) -> BatchGradients:
        """Return the per-example gradients of a batch.

        Parameters
        ----------
        batch
            As the loss takes it, on the model's device.
        uniforms : callable, optional
            The numbers that labels are drawn with; only for sampled labels.
        before : Places, optional
            Where the examples of the same batch were in another pass, which are not looked for
            again. That it is the same is for the caller to see.

        Raises
        ------
        IFVPUsageError
            If a parameter's per-example gradients do not add up to autograd's gradient.
        """
        states = RandomStates()
        run = self._forward(batch, uniforms)
        self._fallback.shared.meet(tensors(batch), run.shape[0])
        places = self._places(run, before)
        signals, check = self._signals_at(places, run, known=places is before), None
        if signals is None:
            if places is not None:  # examples are elsewhere in this batch, and the graph is gone
                labels = run.labels
                del run
                # Again with the same numbers, as other tensors: a model may remember the graph.
                with RandomStates():
                    states.restore()
                    run = self._forward(map_tensors(Tensor.detach, batch), uniforms, labels)
            signals, check = self._look_for_places(run)
        run.release()
        if check is not None:
            # Checks run the model again; where it draws random numbers, a second pass, which needs
            # no checks, is to meet the same.
            with RandomStates():
                places = self._verify(run, signals, check)
            if places.proven:
                self._found[run.key] = places
        assert places is not None
        located = _locate(run, signals, places.layouts)
        return self._collect(run, located, self._fallback_rows(run), places)

    def finish(self) -> None:
        """End a pass over all batches.

        Raises
        ------
        IFVPUsageError
            If losses may mix examples, for all that the batches tell.
        """
        self._fallback.shared.refuse_assumed()

    def regroup(self) -> None:
        """Pair weights and biases anew in the next batch, without those that fell back so far."""
        self._groups = None
        self._found.clear()

    def _forward(
        self, batch: Any, uniforms: Uniforms | None, labels: list[Any] | None = None
    ) -> _Pass:
        """Run the model and the loss, with the labels given or drawn."""
        versions = [tensor._version for tensor in tensors(batch)]
        loss, called = self._objective.loss, False
        capture = Capture(self._parameters, self._restored)
        try:
            with self._autocast.restored():
                loss.targets(batch)  # refuses a batch without any
                with capture:
                    outputs = loss.outputs(self._model, batch)
                called = True
                if not self._found:
                    self.doubt = loss.doubt_outputs(outputs)
                if labels is None:
                    labels = self._objective.labels(outputs, batch, uniforms)
                with capture:
                    columns, weights, mask = self._objective.columns(outputs, labels)
                scalars = torch.stack(tuple(columns), 1)
        except Exception as error:
            if self._found:
                raise
            misuse = explained(error, loss, self._model, batch, called=called)
            if misuse is None:
                raise
            raise misuse from error
        if versions != [tensor._version for tensor in tensors(batch)]:
            raise IFVPUsageError(
                "the model or the loss changes its inputs in place, so that they cannot be given "
                "to it again; let it work on a copy, such as x = x - x.mean() for x.sub_(x.mean())."
            )
        if not scalars.shape[0]:
            raise IFVPUsageError("it has no examples; remove empty batches.")
        self._objective.check_number(len(scalars), batch)
        if not scalars.requires_grad:
            raise IFVPUsageError(
                f"the values of {self._objective.loss.name} do not depend on any selected "
                "parameter through autograd: it is constant, or it or the model detaches its "
                "result, for instance by torch.no_grad() or .item()."
            )
        if mask is None:
            mask = _padding_mask(batch)
        else:
            mask = self._objective.checked_mask(mask, len(scalars))
        graph = graph_shape(scalars, capture.detached)
        self._refuse_foreign(graph)
        changed = [use for use in capture.uses if version(use.x) != use.version]
        precision = max(capture.dtypes, key=lambda dtype: torch.finfo(dtype).eps)
        return _Pass(
            batch,
            labels,
            columns,
            scalars,
            weights,
            mask,
            capture.uses,
            {name for use in changed for name in use.names},
            graph,
            precision,
            capture.steady and are_steady(dict(graph)),
        )

    def _refuse_foreign(self, graph: frozenset[tuple[Any, int]]) -> None:
        """Refuse losses of another model than the one given."""
        if not dict(graph).keys() & {id(parameter) for parameter in self._model.parameters()}:
            raise IFVPUsageError(
                f"the losses depend on no parameter of the {type(self._model).__name__} given: "
                f"{self._objective.loss.name} holds another model and runs that, or a copy, as "
                "scikit-learn makes of losses in a parameter grid. Let it run the model that it "
                "is called with, as loss(model, batch)."
            )

    def _signals(self, run: _Pass) -> list[Tensor | None]:
        """Return, per use, the gradients ``(c, *output shape)`` of the scalars, None for zero.

        The graph ends with that, and gives its memory back on the way.
        """
        edges = [use.edge for use in run.uses]
        if not edges:
            return []
        last = len(run.columns) - 1
        per_scalar = [
            torch.autograd.grad(column.sum(), edges, retain_graph=j < last, allow_unused=True)
            for j, column in enumerate(run.columns)
        ]
        return [_stack(values) for values in zip(*per_scalar, strict=True)]

    def _places(self, run: _Pass, before: Places | None) -> Places | None:
        """Return where the examples are, if the batch or such a pass was met before."""
        if not run.overwritten <= self._fallback_names:
            return None
        if before is not None and before.key == run.key:
            return before
        return self._found.get(run.key)

    def _signals_at(
        self, places: Places | None, run: _Pass, *, known: bool
    ) -> list[Tensor | None] | None:
        """Return the signals, or None if examples are at other places than given, if any are.

        Data may decide where examples are, so that is looked at unless it is known of the batch.
        """
        if places is None:
            return None
        check: PlacesCheck | None = None
        with _explained(run.overwritten):
            if not known and (places.guessed or not run.steady):
                check = PlacesCheck(
                    run.scalars, run.uses, places.layouts, self._parameters, run.precision
                )
            signals = self._signals(run)
        return signals if check is None or check.holds(signals) else None

    def _look_for_places(self, run: _Pass) -> tuple[list[Tensor | None], RandomSum]:
        """Return the signals, and what has looked for the places of examples."""
        with _explained(run.overwritten):
            check = RandomSum(run.scalars, run.uses, self._parameters, run.precision)
            signals = self._signals(run)
        check.look_for_places(signals)
        return signals, check

    def _verify(self, run: _Pass, signals: list[Tensor | None], check: RandomSum) -> Places:
        """Find where the examples are in each call, and check every parameter's rows.

        Parameters that fail move to the fallback, which must pass the same check.
        """
        check.refuse_infinite()
        layouts = check.layouts
        for use, layout in zip(run.uses, layouts, strict=True):
            if layout is None:
                self._fallback_names.update(use.names)
        self._fallback_names.update(run.overwritten, self._used_unseen(run))
        places = Places(run.key, layouts, check.guessed, check.tells)
        located = _locate(run, signals, layouts)
        while True:  # what falls back may pair the rest in another way
            groups = self._groups or self._pair(run.uses)
            captured = self._collect(run, located, {}, places, groups)
            wrong = check.disagreeing(captured, self._names(fallback=False))
            if not wrong:
                break
            self._fallback_names.update(wrong)
        self._groups = groups
        for group in self._groups:
            if not self._fallback_names.isdisjoint(group.names):
                self._fallback_names.update(group.names)
        self._verify_fallback(run, check, places)
        check_alone = IndependenceCheck(
            self._fallback, run.batch, run.labels, run.scalars, run.precision
        )
        if not check_alone.run():
            self.doubt = self.doubt or unchecked(run.batch)
        ways = {name: use.description for use in run.uses for name in use.names}
        ways.update(dict.fromkeys(self._fallback_names, self._fallback.description))
        reached = dict(run.graph)
        for name, parameter in self._parameters.items():
            if name in ways and id(parameter) in reached:
                self.coverage[name] = ways[name]
        return places

    def _used_unseen(self, run: _Pass) -> list[str]:
        """Return the parameters that the graph leads to more often than calls were captured."""
        edges = dict(run.graph)
        seen = Counter(name for use in run.uses for name in use.names)
        return [n for n, p in self._parameters.items() if edges.get(id(p), 0) > seen[n]]

    def _pair(self, uses: list[Use]) -> list[Group]:
        return pair_parameters(self._space.shapes, uses, self._fallback_names, self._blocks)

    def _names(self, *, fallback: bool) -> list[str]:
        return [n for n in self._space.shapes if (n in self._fallback_names) == fallback]

    def _verify_fallback(self, run: _Pass, check: RandomSum, places: Places) -> None:
        if not self._fallback_names:
            return
        wrong: list[str] = []
        problem: Exception | None = None
        for cut in self._fallback.cuts(run.batch, run.labels, run.shape[0]):
            self._fallback.use(cut)
            try:
                rows = self._collect(run, [], self._fallback_rows(run), places)
            except Exception as error:  # of a wrong cut, or truly a fault
                problem = problem or error
                continue
            wrong = check.disagreeing(rows, self._names(fallback=True))
            if not wrong:
                self._fallback.shared.assume(cut, tensors(run.batch), run.shape[0])
                return
        n, length = run.shape[0], common_length(run.batch)
        if length is not None and n > length and n % length == 0:
            raise IFVPUsageError(
                f"the loss returned {n} losses for {length} examples, {n // length} for each, as "
                f"of one per token; sum those of an example: losses.view({length}, -1).sum(1)."
            ) from problem
        names = some_names(wrong or sorted(self._fallback_names), 3)
        alone = "" if wrong else f" (an example alone raised {type(problem).__name__}: {problem})"
        raise IFVPUsageError(
            f"the gradients of single examples do not add up to autograd's gradient for {names}"
            f"{alone}: {DEPENDENT}, or a tensor of the batch has its examples neither along its "
            "first nor its second dimension, or the model takes them along another one than they "
            "lie (recurrent and attention layers without batch_first=True), or a hook on the "
            "parameter changes its gradient. Remove the cause, or leave these parameters out with "
            "parameters=."
        ) from problem

    def _fallback_rows(self, run: _Pass) -> dict[str, Tensor]:
        names = [name for name in self._space.shapes if name in self._fallback_names]
        if not names:
            return {}
        return self._fallback.rows(names, run.batch, run.labels, run.shape[0])

    def _collect(
        self,
        run: _Pass,
        located: list[Located],
        fallback: dict[str, Tensor],
        places: Places,
        groups: list[Group] | None = None,
    ) -> BatchGradients:
        """Return the gradients of the groups that are captured or given by ``fallback``."""
        out: list[GroupGradients] = []
        for group in groups or self._groups or []:
            columns = Columns(tuple(self._space.slices[name] for name in group.names))
            calls: list[Located] = []
            rows: Tensor | None = None
            if fallback.keys() >= set(group.names):
                rows = torch.cat(
                    [fallback[name].reshape(*run.shape, -1) for name in group.names], 2
                )
            elif self._fallback_names.isdisjoint(group.names):
                calls = [item for item in located if set(item.use.names) & set(group.names)]
            else:
                continue
            out.append(GroupGradients(group, columns, run.shape, self._like, calls, rows))
        return BatchGradients(
            out, self._space.size, run.scalars.detach(), run.weights, run.mask, places
        )


@contextmanager
def _explained(overwritten: set[str]) -> Iterator[None]:
    """Say what autograd's errors are about: that it needs inputs that were changed."""
    try:
        yield
    except RuntimeError as error:
        if not overwritten:
            raise
        raise IFVPUsageError(
            f"an input of the call on {some_names(sorted(overwritten), 3)} was changed in "
            "place after the call, and gradients there need it; give the call a copy, such as "
            "layer(x.clone()), or change another tensor, such as relu(x) for relu_(x)."
        ) from error


def _padding_mask(batch: Any) -> Tensor | None:
    """Return the attention mask of a mapping batch, True where a position is not padding."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _stack(values: tuple[Tensor | None, ...]) -> Tensor | None:
    """Stack the signals of all scalars, with zeros where one has none."""
    given = [value for value in values if value is not None and value.numel()]
    if not given:
        return None
    if len(values) == 1:
        return given[0][None]
    zero = torch.zeros_like(given[0])
    return torch.stack([zero if value is None else value for value in values])


def _locate(
    run: _Pass, signals: list[Tensor | None], layouts: list[BatchLayout | None]
) -> list[Located]:
    """Return the calls that carry gradient and whose examples are found."""
    return [
        Located(use, signal, layout)
        for use, signal, layout in zip(run.uses, signals, layouts, strict=True)
        if signal is not None and layout is not None
    ]
