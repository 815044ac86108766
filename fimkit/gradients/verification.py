"""Checks of captured gradients against autograd, so that no wrong number passes silently."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils.hooks import RemovableHandle

from fimkit.exceptions import IFVPUsageError
from fimkit.gradients.groups import BatchGradients, GroupGradients
from fimkit.gradients.layout import BatchLayout, candidate_layouts
from fimkit.gradients.rules import Use
from fimkit.operators.memory import float32_is_exact

__all__ = ["PlacesCheck", "RandomSum", "graph_shape", "same_scalars"]

# Relative disagreement at which captured and true gradients count as different.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
_COARSE_TOLERANCE = 5e-2

# How many random sums of features tell gradients apart. Where tolerances are near the rounding
# errors, these must not count for more in the sums than they do.
_SUMS = 8
_COARSE_SUMS = 32


class _Seen:
    """Gradients of a random sum of scalars at calls, by a few random sums of each's features.

    So that each position's is told by a few numbers; a single one could be next to nothing by
    chance, and the rounding errors in it not. Gradients are seen on their way only, and before the
    signals are computed, so that the graph need not outlive these.

    Parameters
    ----------
    scalars : Tensor of shape (n, c)
    uses : sequence of Use
        Captured calls.
    precision : torch.dtype
        As for `RandomSum`.

    Attributes
    ----------
    coefficients : Tensor of shape (n, c)
        Of the sum.
    total : Tensor
        The sum, once differentiated, without its graph.
    """

    total: Tensor

    def __init__(self, scalars: Tensor, uses: Sequence[Use], precision: torch.dtype) -> None:
        self._uses = uses
        self._precision = precision
        self._seen: dict[int, Tensor] = {}
        self.coefficients = _coefficients(scalars)

    def differentiate(
        self, scalars: Tensor, inputs: Sequence[Any], calls: Iterable[int]
    ) -> tuple[Tensor | None, ...]:
        """Return the sum's gradients by some inputs, having seen those at some calls on the way."""
        total = (self.coefficients * scalars).sum()
        self.total = total.detach()
        edges = {i: self._uses[i].edge for i in calls}
        return _watched_gradients(total, inputs, edges, self.look)

    def look(self, i: int, gradient: Tensor) -> None:
        """Look at the gradient at a call."""
        self._seen[i] = self._sums(gradient, self._uses[i].lead)

    def __contains__(self, i: int) -> bool:
        """Whether there is a gradient at a call."""
        return i in self._seen

    def nonzero(self, i: int) -> bool:
        """Whether there is a gradient at a call, and not of zero."""
        return i in self and bool(self._seen[i].any())

    def errors(
        self, i: int, layouts: Iterable[BatchLayout], signal: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield how far positions are from answering to one example each, and how far they may be.

        Parameters
        ----------
        i : int
            Of a call with a gradient.
        layouts : iterable of BatchLayout
            By each, which example each position is taken to belong to.
        signal : Tensor of shape (c, *output shape)
            Gradients of each of the c scalars, of all examples: the sum's must be their combination
            by the coefficients of the example.
        """
        lead, n = self._uses[i].lead, len(self.coefficients)
        sums = self._sums(signal, (len(signal), *lead))
        weights = self.coefficients.to(sums)
        for layout in layouts:
            observed = layout.split(self._seen[i], lead, n)
            expected = sum(
                layout.split(each, lead, n) * weights[:, j, None, None]
                for j, each in enumerate(sums)
            )
            yield (observed - expected).norm(), self._tolerance(signal) * observed.norm()

    def _tolerance(self, gradient: Tensor) -> float:
        return max(_tolerance(dtype) for dtype in {gradient.dtype, self._precision})

    def _sums(self, gradient: Tensor, lead: tuple[int, ...]) -> Tensor:
        """Return sums of the features behind leading dimensions, in groups, with random signs."""
        size = math.prod(gradient.shape[len(lead) :])
        generator = torch.Generator(gradient.device).manual_seed(0x5EED)
        signs = torch.randint(2, (size,), generator=generator, device=gradient.device)
        signs = (2 * signs - 1).to(gradient)
        most = _SUMS if self._tolerance(gradient) < _COARSE_TOLERANCE else _COARSE_SUMS
        number = max(1, min(most, size))
        shape = number, size // number
        whole = math.prod(shape)
        features = gradient.reshape(*lead, size)
        groups = features[..., :whole].view(*lead, *shape)
        sums = [torch.einsum("...gf,gf->...g", groups, signs[:whole].view(shape))]
        if whole < size:
            sums.append((features[..., whole:] @ signs[whole:])[..., None])
        return torch.cat(sums, -1).to(torch.promote_types(gradient.dtype, torch.float32))


class PlacesCheck:
    """Whether layouts that were found in other batches hold in this one.

    At every position the gradient of a random sum of the scalars must be the same combination of
    its example's signals.

    Parameters
    ----------
    scalars : Tensor of shape (B, c)
    uses : sequence of Use
        Captured calls.
    layouts : sequence of BatchLayout or None
        Of each; None for calls whose gradients are not used.
    parameters : mapping of str to Tensor
        The tracked parameters.
    precision : torch.dtype
        As for `RandomSum`.
    """

    def __init__(
        self,
        scalars: Tensor,
        uses: Sequence[Use],
        layouts: Sequence[BatchLayout | None],
        parameters: Mapping[str, Tensor],
        precision: torch.dtype,
    ) -> None:
        self._n, self._device = len(scalars), scalars.device
        self._calls = list(zip(uses, layouts, strict=True))
        self._seen = _Seen(scalars, uses, precision)
        told = [
            i
            for i, (_, layout) in enumerate(self._calls)
            if layout is not None and layout.axis is not None
        ]
        # A bias's gradient costs little, and leads past its call; other calls' gradients are kept.
        biases = {i: name for i in told for name in uses[i].names if parameters[name].ndim <= 1}
        kept = [i for i in told if i not in biases]
        inputs = [*(uses[i].edge for i in kept), *(parameters[name] for name in {*biases.values()})]
        if not inputs:
            return
        gradients = self._seen.differentiate(scalars, inputs, biases)
        for i, gradient in zip(kept, gradients, strict=False):
            if gradient is not None:
                self._seen.look(i, gradient)

    def holds(self, signals: Sequence[Tensor | None]) -> bool:
        """Whether the layouts fit the calls' signals ``(c, *output shape)``, None for zero."""
        fitting = []
        for i, ((use, layout), signal) in enumerate(zip(self._calls, signals, strict=True)):
            if signal is None or layout is None:
                continue
            if not layout.fits(use.lead, self._n):
                return False
            if i in self._seen:
                ((error, limit),) = self._seen.errors(i, [layout], signal)
                fitting.append((error <= limit).to(self._device))
        return not fitting or bool(torch.stack(fitting).all())


def _watched_gradients(
    total: Tensor,
    inputs: Sequence[Any],
    edges: Mapping[int, GradientEdge],
    look: Callable[[int, Tensor], None],
) -> tuple[Tensor | None, ...]:
    """Differentiate a sum, and let ``look(i, gradient)`` see that at each edge, on the way only."""

    def watch(i: int, edge: GradientEdge) -> RemovableHandle:
        def meet(gradients: tuple[Tensor | None, ...]) -> None:
            gradient = gradients[edge.output_nr]
            if gradient is not None:
                look(i, gradient)

        return edge.node.register_prehook(meet)

    handles = [watch(i, edge) for i, edge in edges.items()]
    try:
        return torch.autograd.grad(total, inputs, retain_graph=True, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()


def _coefficients(scalars: Tensor) -> Tensor:
    """Return the random coefficients of a sum of scalars, the same for the same shape."""
    generator = torch.Generator("cpu").manual_seed(0)
    random = torch.randn(scalars.shape, generator=generator, dtype=torch.float64, device="cpu")
    return random.to(scalars)


class RandomSum:
    """Autograd's gradients of one random combination of a batch's scalars.

    Parameters
    ----------
    scalars : Tensor of shape (B, c)
        Scalars whose gradients are the rows.
    uses : sequence of Use
        Captured calls.
    parameters : mapping of str to Tensor
        The tracked parameters.
    precision : torch.dtype
        The coarsest dtype in which the model computes.

    Attributes
    ----------
    layouts : list of BatchLayout or None
        Of each call, once looked for: where each position answers to one example's scalars only.
        The gradient of the random sum there is the same combination of that example's signals.
        None if nowhere.
    guessed : bool
        Whether a layout that was found is only the likeliest: its call had no gradient, or so few
        that others fit as well.
    tells : bool
        Whether any parameter has a gradient, without which no check can fail.
    """

    def __init__(
        self,
        scalars: Tensor,
        uses: Sequence[Use],
        parameters: Mapping[str, Tensor],
        precision: torch.dtype,
    ) -> None:
        self._uses = uses
        self._precision = precision
        self._seen = _Seen(scalars, uses, precision)
        self.layouts: list[BatchLayout | None] = []
        self.guessed = True
        everywhere = range(len(uses))
        gradients = self._seen.differentiate(scalars, list(parameters.values()), everywhere)
        self._parameters = {
            name: torch.zeros_like(parameter) if gradient is None else gradient.to_dense()
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
        }
        self.tells = any(bool(gradient.any()) for gradient in self._parameters.values())

    def look_for_places(self, signals: Sequence[Tensor | None]) -> None:
        """Find the layouts, given the gradients ``(c, *output shape)`` of the scalars at the calls.

        None is a gradient of zero.
        """
        self.layouts, self.guessed = [], False
        for i, (use, signal) in enumerate(zip(self._uses, signals, strict=True)):
            candidates = candidate_layouts(use.lead, len(self._seen.coefficients))
            if signal is not None and self._seen.nonzero(i):
                errors = zip(candidates, self._seen.errors(i, candidates, signal), strict=True)
                fitting = [(float(e), layout) for layout, (e, limit) in errors if e <= limit]
                self.guessed = self.guessed or len(fitting) > 1
                best = min(fitting, key=lambda item: item[0])[1] if fitting else None
            else:
                self.guessed = True
                best = candidates[0] if candidates else None
                if best is None and signal is None:  # what no gradient meets lies anywhere
                    best = BatchLayout(None)
            self.layouts.append(best)

    def refuse_infinite(self) -> None:
        """Raise if the scalars or their gradients are not finite."""
        checked = [self._seen.total, *self._parameters.values()]
        if not all(bool(tensor.sum().isfinite()) for tensor in checked):
            raise IFVPUsageError(
                "NaN or infinite losses or gradients; look for NaN inputs, log(0) in the loss, or "
                "a diverged model."
            )

    def disagreeing(self, gradients: BatchGradients, names: Sequence[str]) -> list[str]:
        """Return the parameters, of those named, whose rows do not add up to autograd's gradient.

        Rows that there are none of are zero.
        """
        if not gradients.groups:
            return []
        true = {name: _norm(gradient) for name, gradient in self._parameters.items()}
        dtypes = {gradient.dtype for gradient in self._parameters.values()} | {self._precision}
        finest = max(100 * torch.finfo(dtype).eps for dtype in dtypes)
        dtypes |= {group.dtype for group in gradients.groups}
        tolerance = max(_tolerance(dtype) for dtype in dtypes)
        everything = min(tolerance, finest) * sum(norm**2 for norm in true.values()) ** 0.5
        wrong = {name for name, norm in true.items() if not norm <= tolerance * norm + everything}
        for group in gradients.groups:  # each takes its parameters' memory several times
            wrong.difference_update(group.group.names)
            wrong |= self._differing(group, true, tolerance, everything)
        return [name for name in names if name in wrong]

    def _differing(
        self, group: GroupGradients, true: Mapping[str, float], tolerance: float, everything: float
    ) -> set[str]:
        """Return the parameters of a group whose rows do not add up to autograd's gradient.

        Up to a part of its size, or of what it adds up, and of everything.
        """
        rows = group.rows()
        weights = self._seen.coefficients.to(rows.device, rows.dtype)[None]
        gradients = {name: self._parameters[name].flatten() for name in group.group.names}
        sizes = [gradient.numel() for gradient in gradients.values()]
        sums = torch.split(rows.combine(weights)[0], sizes)
        errors = {
            name: _norm(found - gradient.to(found))
            for found, (name, gradient) in zip(sums, gradients.items(), strict=True)
        }
        del sums
        limits = {name: tolerance * true[name] + everything for name in errors}
        if not all(error <= limits[name] for name, error in errors.items()):
            bounds = torch.split(rows.magnitudes().combine(weights.abs())[0], sizes)
            for name, bound in zip(limits, bounds, strict=True):
                limits[name] = max(limits[name], tolerance * _norm(bound) + everything)
        return {name for name, error in errors.items() if not error <= limits[name]}


def graph_shape(end: Tensor, detached: Iterable[str]) -> frozenset[tuple[Any, int]]:
    """Count what the autograd graph is made of, so that a use that was not seen before shows.

    Parameters
    ----------
    end : Tensor
        The end of the graph.
    detached : iterable of str
        Parameters met without gradients, which name a checkpointed part.

    Returns
    -------
    frozenset of (str or int, int)
        How many nodes of each name there are, and how many edges lead to each parameter.

    Raises
    ------
    IFVPUsageError
        If part of the graph is a reentrant checkpoint, which hides its layers.
    """
    counts: Counter[Any] = Counter()
    seen: set[Any] = set()
    stack = [end.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        counts[node.name()] += 1
        for after, _ in node.next_functions:
            variable = getattr(after, "variable", None)
            if variable is None:
                stack.append(after)
            else:
                counts[id(variable)] += 1
    if "CheckpointFunctionBackward" in counts:
        where = f" around {', '.join(sorted(detached))}" if detached else ""
        raise IFVPUsageError(
            f"the model uses reentrant activation checkpointing{where}, which hides its layers "
            "from autograd.grad; pass use_reentrant=False to torch.utils.checkpoint.checkpoint."
        )
    return frozenset(counts.items())


def same_scalars(one: Tensor, other: Tensor, precision: torch.dtype) -> bool | None:
    """Whether two computations of the same scalars agree, up to the rounding of their dtypes.

    None where small scalars cannot tell: they may be what large numbers left, with their rounding.
    """
    if one.shape != other.shape:
        return False
    tolerance = 10 * max(_tolerance(dtype) for dtype in (other.dtype, precision))
    error, scale = float((one - other).abs().max()), float(other.abs().max())
    if error <= min(tolerance, 1e-3) * scale:
        return True
    return None if error <= tolerance * max(scale, 1) else False


def _tolerance(dtype: torch.dtype) -> float:
    if dtype == torch.float32 and not float32_is_exact():
        return _COARSE_TOLERANCE
    return _TOLERANCE.get(dtype, _COARSE_TOLERANCE)


def _norm(tensor: Tensor) -> float:
    fine = tensor.dtype == torch.float64 or tensor.is_complex()
    return float(tensor.norm() if fine else tensor.float().norm())
