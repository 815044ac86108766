"""Per-example gradients of a model, batch by batch.

Calls on parameters are captured during one forward pass; one backward pass per scalar stops at
their outputs, so weight gradients are never formed. What no rule covers comes from torch.func.
Nothing captured is trusted: before a new pattern of calls is used, random sums of the rows are
compared with autograd's own gradient of the same sums of losses, parameter by parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fimkit.exceptions import IFVPUsageError
from fimkit.gradients.capture import Capture
from fimkit.gradients.fallback import FallbackGradients
from fimkit.gradients.groups import BatchGradients, GroupGradients, Located
from fimkit.gradients.modes import AmbientAutocast
from fimkit.gradients.objective import Objective
from fimkit.gradients.pairing import Group, pair_parameters
from fimkit.gradients.rules import Use
from fimkit.gradients.tree import tensors
from fimkit.gradients.verification import Finding, RandomSum, graph_shape, same_scalars
from fimkit.losses import Uniforms
from fimkit.operators import Columns
from fimkit.vectors import ParameterSpace

__all__ = ["GradientEngine"]

_DEPENDENT = (
    "the loss of one example depends on the others in its batch (batch statistics, a division by "
    "the batch's length), or differs between calls (randomness in the model)"
)


@dataclass
class _Pass:
    """One forward pass: the scalars, by column and stacked, and what was captured on the way."""

    batch: Any
    labels: list[Any]
    columns: Sequence[Tensor]
    scalars: Tensor
    weights: Tensor | None
    mask: Tensor | None
    uses: list[Use]
    graph: frozenset[tuple[Any, int]]
    rearranged: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Examples and rows per example."""
        return self.scalars.shape[0], self.scalars.shape[1]

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
        self._fallback = FallbackGradients(model, objective, self._autocast)
        self._fallback_names: set[str] = set()
        self._groups: list[Group] | None = None
        self._found: dict[Any, list[Finding]] = {}
        self.coverage = dict.fromkeys(space.shapes, "no gradient seen")

    def gradients(self, batch: Any, uniforms: Uniforms | None = None) -> BatchGradients:
        """Return the per-example gradients of a batch.

        Parameters
        ----------
        batch
            As the loss takes it, on the model's device.
        uniforms : callable, optional
            The numbers that labels are drawn with; only for sampled labels.

        Raises
        ------
        IFVPUsageError
            If a parameter's per-example gradients do not add up to autograd's gradient.
        """
        run = self._forward(batch, uniforms)
        found = self._found.get(run.key)
        checked = found is not None and not any(finding.silent for finding in found)
        signals = self._signals(run, keep_graph=not checked)
        if found is None or not _holds(found, run, signals):
            found = self._verify(run, signals)
        shared = {tensor.untyped_storage().data_ptr() for tensor in tensors(batch)}
        shared.update(buffer.untyped_storage().data_ptr() for buffer in self._model.buffers())
        for use in run.uses:
            del use.edge  # it holds the graph, which may go now
            use.own_input(shared)
        return self._collect(run, _locate(run, signals, found), self._fallback_rows(run))

    def _forward(self, batch: Any, uniforms: Uniforms | None) -> _Pass:
        with self._autocast.restored(), Capture(self._parameters) as capture:
            self._objective.loss.targets(batch)  # refuses a batch without any
            outputs = self._objective.loss.outputs(self._model, batch)
            labels = self._objective.labels(outputs, batch, uniforms)
            columns, weights, mask = self._objective.columns(outputs, labels)
            scalars = torch.stack(tuple(columns), 1)
        if not scalars.shape[0]:
            raise IFVPUsageError("it has no examples; remove empty batches.")
        if not scalars.requires_grad:
            raise IFVPUsageError(
                "the losses do not depend on any selected parameter through autograd: the model "
                "or the loss detaches its result, for instance by torch.no_grad() or .item()."
            )
        mask = _padding_mask(batch) if mask is None else mask
        graph = graph_shape(scalars, capture.detached)
        return _Pass(
            batch, labels, columns, scalars, weights, mask, capture.uses, graph, capture.rearranged
        )

    def _signals(self, run: _Pass, *, keep_graph: bool) -> list[Tensor | None]:
        """Return, per use, the gradients ``(c, *output shape)`` of the scalars, None for zero.

        The graph goes with the last of them, layer by layer, unless it is to be kept.
        """
        edges = [use.edge for use in run.uses]
        if not edges:
            return []
        last = len(run.columns) - 1
        per_scalar = [
            torch.autograd.grad(
                column.sum(), edges, retain_graph=keep_graph or i < last, allow_unused=True
            )
            for i, column in enumerate(run.columns)
        ]
        return [_stack(values) for values in zip(*per_scalar, strict=True)]

    def _verify(self, run: _Pass, signals: list[Tensor | None]) -> list[Finding]:
        """Find where the examples are in each call, and check every parameter's rows.

        Parameters that fail move to the fallback, which must pass the same check.
        """
        check = RandomSum(run.scalars, run.uses, self._parameters, self._autocast.precision)
        check.refuse_infinite()
        found = [
            check.find(i, use, signal)
            for i, (use, signal) in enumerate(zip(run.uses, signals, strict=True))
        ]
        for use, finding in zip(run.uses, found, strict=True):
            if finding.layout is None:
                self._fallback_names.update(use.names)
        located = _locate(run, signals, found)
        while True:  # what falls back may pair the rest in another way
            groups = self._groups or self._pair(run.uses)
            captured = self._collect(run, located, {}, groups)
            wrong = check.disagreeing(captured, self._places(fallback=False))
            if not wrong:
                break
            self._fallback_names.update(wrong)
        self._groups = groups
        for group in self._groups:
            if not self._fallback_names.isdisjoint(group.names):
                self._fallback_names.update(group.names)
        self._verify_fallback(run, check)
        self._verify_alone(run)
        # Without a proof, or where examples may change places, look again in the next batch.
        if not run.rearranged and all(finding.proven or finding.silent for finding in found):
            self._found[run.key] = found
        for name in self._space.shapes:
            if name in self._fallback_names:
                self.coverage[name] = self._fallback.description
        for use in run.uses:
            for name in set(use.names) - self._fallback_names:
                self.coverage[name] = use.description
        return found

    def _pair(self, uses: list[Use]) -> list[Group]:
        return pair_parameters(self._space.shapes, uses, self._fallback_names, self._blocks)

    def _places(self, *, fallback: bool) -> dict[str, slice]:
        places = self._space.slices.items()
        return {name: s for name, s in places if (name in self._fallback_names) == fallback}

    def _verify_fallback(self, run: _Pass, check: RandomSum) -> None:
        if not self._fallback_names:
            return
        wrong: list[str] = []
        problem: Exception | None = None
        for cut in self._fallback.cuts(run.batch, run.labels, run.shape[0]):
            self._fallback.use(cut)
            try:
                rows = self._collect(run, [], self._fallback_rows(run))
            except Exception as error:  # of a wrong cut, or truly a fault
                problem = problem or error
                continue
            wrong = check.disagreeing(rows, self._places(fallback=True))
            if not wrong:
                return
        names = ", ".join(map(repr, wrong or sorted(self._fallback_names)))
        alone = "" if wrong else f" (an example alone raised {type(problem).__name__}: {problem})"
        raise IFVPUsageError(
            f"the gradients of single examples do not add up to autograd's gradient for {names}"
            f"{alone}: {_DEPENDENT}, or a tensor of the batch has its examples neither along its "
            "first nor its second dimension. Remove the dependence, or leave these parameters out "
            "with parameters=."
        ) from problem

    def _verify_alone(self, run: _Pass) -> None:
        """Refuse losses of an example that are others without the rest of its batch."""
        if run.shape[0] < 2:
            return
        alone = 0
        for scalars in self._fallback.first_alone(run.batch, run.labels, run.shape[0]):
            if same_scalars(scalars, run.scalars[:1]):
                return
            alone += 1
        if alone:
            raise IFVPUsageError(
                f"an example alone has another loss than in its batch: {_DEPENDENT}. Remove the "
                "dependence."
            )

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
        return BatchGradients(out, self._space.size, run.scalars.detach(), run.weights, run.mask)


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


def _holds(found: list[Finding], run: _Pass, signals: list[Tensor | None]) -> bool:
    """Whether what was found before can hold this batch, and calls without gradient have none."""
    n = run.shape[0]
    for finding, use in zip(found, run.uses, strict=True):
        if finding.layout is not None and not finding.layout.fits(use.lead, n):
            return False
    silent = [s for f, s in zip(found, signals, strict=True) if f.silent and s is not None]
    return not silent or not torch.stack([signal.any() for signal in silent]).any()


def _locate(run: _Pass, signals: list[Tensor | None], found: list[Finding]) -> list[Located]:
    """Return the calls that carry gradient and whose examples are found."""
    return [
        Located(use, signal, finding.layout)
        for use, signal, finding in zip(run.uses, signals, found, strict=True)
        if signal is not None and finding.layout is not None
    ]
