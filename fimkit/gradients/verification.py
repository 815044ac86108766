"""Checks of captured gradients against autograd, so that no wrong number passes silently."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
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

__all__ = ["RandomSum", "graph_shape", "same_scalars", "still_fit"]

# Relative disagreement at which captured and true gradients count as different.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
_COARSE_TOLERANCE = 5e-2


def still_fit(
    scalars: Tensor,
    calls: Sequence[tuple[Use, Tensor, BatchLayout]],
    parameters: Mapping[str, Tensor],
    precision: torch.dtype,
) -> bool:
    """Whether layouts that were found in other batches hold in this one.

    At every position the gradient of a random sum of the scalars must be the same combination of
    its example's signals; both are compared along one random direction of features.

    Parameters
    ----------
    scalars : Tensor of shape (B, c)
    calls : sequence of (Use, Tensor, BatchLayout)
        Calls with their signals ``(c, *output shape)``.
    parameters : mapping of str to Tensor
        The tracked parameters.
    precision : torch.dtype
        As for `RandomSum`.
    """
    n = len(scalars)
    if not all(layout.fits(use.lead, n) for use, _, layout in calls):
        return False
    calls = [call for call in calls if call[2].axis is not None]
    if not calls:
        return True
    coefficients = _coefficients(scalars)
    fitting = []

    def look(i: int, observed: Tensor) -> None:
        use, signals, layout = calls[i]
        tolerance = max(_tolerance(d) for d in {observed.dtype, precision})
        direction = _direction(observed, len(use.lead))
        one, *each = (
            layout.split(tensor.reshape(*use.lead, -1) @ direction, use.lead, n)
            for tensor in (observed, *signals)
        )
        weights = coefficients.to(signals)
        other = sum(signal * weights[:, j, None] for j, signal in enumerate(each))
        fitting.append(((one - other).norm() <= tolerance * one.norm()).to(scalars.device))

    # A bias's gradient costs little, and leads past its call; other calls' gradients are kept.
    biases = {
        i: name
        for i, (use, _, _) in enumerate(calls)
        for name in use.names
        if parameters[name].ndim <= 1
    }
    kept = [i for i in range(len(calls)) if i not in biases]
    gradients = _watched_gradients(
        (coefficients * scalars).sum(),
        [*(calls[i][0].edge for i in kept), *(parameters[name] for name in {*biases.values()})],
        {i: calls[i][0].edge for i in biases},
        look,
    )
    for i, gradient in zip(kept, gradients, strict=False):
        if gradient is not None:
            look(i, gradient)
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


def _fitting(
    lead: tuple[int, ...],
    observed: Tensor,
    signals: Tensor,
    coefficients: Tensor,
    precision: torch.dtype,
) -> list[tuple[float, BatchLayout]]:
    """Return the layouts under which each position answers to one example only, with their errors.

    Parameters
    ----------
    lead : tuple of int
        Dimensions that examples may lie along.
    observed : Tensor of shape (*lead, ...)
        Gradients of a sum of n examples' c scalars ...
    signals : Tensor of shape (c, *lead, ...)
        ... and of each of the c, of all examples.
    coefficients : Tensor of shape (n, c)
        Of the sum.
    precision : torch.dtype
    """
    n, size = len(coefficients), _norm(observed)
    tolerance = max(_tolerance(dtype) for dtype in {observed.dtype, precision})
    weights = coefficients.to(signals)
    fitting: list[tuple[float, BatchLayout]] = []
    for layout in candidate_layouts(lead, n):
        expected = sum(
            layout.split(signal, lead, n).flatten(1) * weights[:, j, None]
            for j, signal in enumerate(signals)
        )
        error = _norm(layout.split(observed, lead, n).flatten(1) - expected)
        if error <= tolerance * size:
            fitting.append((error, layout))
    return fitting


def _coefficients(scalars: Tensor) -> Tensor:
    """Return the random coefficients of a sum of scalars, the same for the same shape."""
    generator = torch.Generator("cpu").manual_seed(0)
    random = torch.randn(scalars.shape, generator=generator, dtype=torch.float64, device="cpu")
    return random.to(scalars)


def _direction(like: Tensor, lead: int) -> Tensor:
    """Return a random direction of the features behind the leading dimensions."""
    generator = torch.Generator(like.device).manual_seed(1)
    size = math.prod(like.shape[lead:])
    return torch.randn(size, generator=generator, dtype=like.dtype, device=like.device)


class RandomSum:
    """Autograd's gradients of one random combination of a batch's scalars.

    Parameters
    ----------
    scalars : Tensor of shape (B, c)
        Scalars whose gradients are the rows.
    uses : sequence of Use
        Captured calls.
    signals : sequence of Tensor of shape (c, *output shape), or None
        Gradients of the scalars at their outputs.
    parameters : mapping of str to Tensor
        The tracked parameters.
    precision : torch.dtype
        The coarsest dtype in which the model computes.

    Attributes
    ----------
    layouts : list of BatchLayout or None
        Of each call, where each position answers to one example's scalars only: the gradient of
        the random sum there is the same combination of that example's signals. None if nowhere.
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
        signals: Sequence[Tensor | None],
        parameters: Mapping[str, Tensor],
        precision: torch.dtype,
    ) -> None:
        self._precision = precision
        self.coefficients = _coefficients(scalars)
        # What the loss does not depend on is met by no gradient.
        self.layouts: list[BatchLayout | None] = [
            self._likeliest(use) or BatchLayout(None) for use in uses
        ]
        told = set()

        def look(i: int, observed: Tensor) -> None:
            signal = signals[i]
            if signal is not None and _norm(observed):
                fitting = _fitting(
                    uses[i].lead, observed, signal, self.coefficients, self._precision
                )
                self.layouts[i] = min(fitting, key=lambda item: item[0])[1] if fitting else None
                if len(fitting) <= 1:
                    told.add(i)
            elif signal is not None:
                self.layouts[i] = self._likeliest(uses[i])

        total = (self.coefficients * scalars).sum()
        edges = {i: use.edge for i, use in enumerate(uses)}
        gradients = _watched_gradients(total, list(parameters.values()), edges, look)
        self._total = total.detach()
        self._parameters = {
            name: torch.zeros_like(parameter) if gradient is None else gradient.to_dense()
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
        }
        self.guessed = len(told) < len(uses)
        self.tells = any(bool(gradient.any()) for gradient in self._parameters.values())

    def _likeliest(self, use: Use) -> BatchLayout | None:
        """Return the layout of a call whose gradients cannot tell."""
        candidates = candidate_layouts(use.lead, len(self.coefficients))
        return candidates[0] if candidates else None

    def refuse_infinite(self) -> None:
        """Raise if the scalars or their gradients are not finite."""
        checked = [self._total, *self._parameters.values()]
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
        weights = self.coefficients.to(rows.device, rows.dtype)[None]
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
