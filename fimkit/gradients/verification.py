"""Checks of captured gradients against autograd, so that no wrong number passes silently."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fimkit.exceptions import IFVPUsageError
from fimkit.gradients.groups import BatchGradients, GroupGradients
from fimkit.gradients.layout import BatchLayout, candidate_layouts
from fimkit.gradients.rules import Use

__all__ = ["Finding", "RandomSum", "graph_shape", "same_scalars"]

# Relative disagreement at which captured and true gradients count as different.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
_COARSE_TOLERANCE = 5e-2


@dataclass(frozen=True)
class Finding:
    """Where the examples of a call are.

    Attributes
    ----------
    layout : BatchLayout or None
        The one that fits best; None if none does.
    proven : bool
        Whether it is the only one that fits, by gradients that are not all zero.
    silent : bool
        Whether there was no gradient to prove it by.
    """

    layout: BatchLayout | None
    proven: bool
    silent: bool = False


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
    precision : torch.dtype, optional
        The coarsest dtype in which the model computes, where that is not its parameters'.
    """

    def __init__(
        self,
        scalars: Tensor,
        uses: Sequence[Use],
        parameters: Mapping[str, Tensor],
        precision: torch.dtype | None = None,
    ) -> None:
        self._precision = set() if precision is None else {precision}
        generator = torch.Generator("cpu").manual_seed(0)
        random = torch.randn(scalars.shape, generator=generator, dtype=torch.float64, device="cpu")
        self.coefficients = random.to(scalars)
        inputs: list[Any] = [*(use.edge for use in uses), *parameters.values()]
        self._total = (self.coefficients * scalars).sum()
        gradients = torch.autograd.grad(
            self._total,
            inputs,
            retain_graph=True,
            allow_unused=True,
        )
        self._total = self._total.detach()
        self._signals: list[Tensor | None] = list(gradients[: len(uses)])
        self._parameters = {
            name: torch.zeros_like(parameter) if gradient is None else gradient.to_dense()
            for (name, parameter), gradient in zip(
                parameters.items(), gradients[len(uses) :], strict=True
            )
        }

    def find(self, i: int, use: Use, signals: Tensor | None) -> Finding:
        """Find the layout under which each position answers to one example's scalars only.

        Asked once of each call: what it takes is forgotten.

        At a position of example i the gradient of the random sum must be the same combination of
        that example's signals; a wrong layout, or a position shared by examples, fails.
        """
        n = self.coefficients.shape[0]
        candidates = candidate_layouts(use.lead, n)
        observed, self._signals[i] = self._signals[i], None
        size = 0.0 if signals is None or observed is None else _norm(observed)
        if signals is None or observed is None or not size:
            layout = candidates[0] if candidates else BatchLayout(None)
            return Finding(layout, proven=False, silent=signals is None or not signals.any())
        tolerance = max(_tolerance(dtype) for dtype in {observed.dtype, *self._precision})
        weights = self.coefficients.to(signals)
        fitting: list[tuple[float, BatchLayout]] = []
        for layout in candidates:
            expected = sum(
                layout.split(signal, use.lead, n).flatten(1) * weights[:, j, None]
                for j, signal in enumerate(signals)
            )
            error = layout.split(observed, use.lead, n).flatten(1) - expected
            if _norm(error) <= tolerance * size:
                fitting.append((_norm(error), layout))
        if not fitting:
            return Finding(None, proven=True)
        return Finding(min(fitting, key=lambda item: item[0])[1], proven=len(fitting) == 1)

    def refuse_infinite(self) -> None:
        """Raise if the scalars or their gradients are not finite."""
        checked = [self._total, *self._parameters.values()]
        if not all(bool(tensor.sum().isfinite()) for tensor in checked):
            raise IFVPUsageError(
                "NaN or infinite losses or gradients; look for NaN inputs, log(0) in the loss, or "
                "a diverged model."
            )

    def disagreeing(self, gradients: BatchGradients, places: Mapping[str, slice]) -> list[str]:
        """Return the parameters whose rows do not add up to autograd's gradient.

        Parameters
        ----------
        gradients : BatchGradients
            Gradients of the groups to check.
        places : mapping of str to slice
            Where each parameter to check lies in the flat vector.
        """
        if not gradients.groups:
            return []
        found = [self._combined(group) for group in gradients.groups]
        sums, magnitudes = found[0][0].new_zeros(2, gradients.size)
        for group, (total, bound) in zip(gradients.groups, found, strict=True):
            group.columns.put(sums[None], total)
            group.columns.put(magnitudes[None], bound)
        dtypes = {gradient.dtype for gradient in self._parameters.values()} | self._precision
        tolerance = max(_tolerance(dtype) for dtype in (*dtypes, sums.dtype))
        floor = min(tolerance, 100 * max(torch.finfo(dtype).eps for dtype in dtypes))
        everything = sum(_norm(gradient) ** 2 for gradient in self._parameters.values()) ** 0.5
        wrong = []
        for name, place in places.items():
            true = self._parameters[name].flatten().to(sums)
            scale = max(_norm(magnitudes[place]), _norm(true))
            error = _norm(sums[place] - true)
            if not error <= tolerance * scale + floor * everything:
                wrong.append(name)
        return wrong

    def _combined(self, group: GroupGradients) -> tuple[Tensor, Tensor]:
        """Return the random sum of a group's rows, and a bound on the sizes of what it adds up."""
        rows = group.rows()
        weights = self.coefficients.to(rows.device, rows.dtype)[None]
        return rows.combine(weights), rows.magnitudes().combine(weights.abs())


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


def same_scalars(one: Tensor, other: Tensor) -> bool:
    """Whether two computations of the same scalars agree, up to the rounding of their dtype."""
    if one.shape != other.shape:
        return False
    tolerance = 10 * _tolerance(other.dtype)
    scale = other.abs().max().clamp(min=1)
    return bool(((one - other).abs() <= tolerance * scale).all())


def _tolerance(dtype: torch.dtype) -> float:
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return _COARSE_TOLERANCE
    return _TOLERANCE.get(dtype, _COARSE_TOLERANCE)


def _norm(tensor: Tensor) -> float:
    return float(tensor.float().norm() if tensor.dtype != torch.float64 else tensor.norm())
