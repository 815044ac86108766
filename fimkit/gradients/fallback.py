"""Per-example gradients of any parameter, by torch.func or one backward pass per example."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from fimkit.exceptions import IFVPUsageError
from fimkit.gradients.cuts import Cut, SharedTensors, cut_out, cuts, fits
from fimkit.gradients.modes import AmbientAutocast
from fimkit.gradients.objective import Objective
from fimkit.gradients.tree import map_tensors, tensors

__all__ = ["FallbackGradients"]

# Bytes of per-example gradients that one vmapped call may produce.
_VMAP_BUDGET = 64 * 2**20

# Parameters that a model may have to be run in float64 where its own precision does not tell.
_MOST_DOUBLED = 100_000_000


class FallbackGradients:
    """Rows of the parameters that no rule covers, one example at a time in meaning.

    Tried first as one vmapped call over the batch, which not every operator allows; after the
    first refusal examples go one by one.

    Parameters
    ----------
    model : Module
    objective : Objective
    autocast : AmbientAutocast
        The autocasting under which the model is run.

    Attributes
    ----------
    shared : SharedTensors
        What examples were found to share.
    """

    def __init__(self, model: nn.Module, objective: Objective, autocast: AmbientAutocast) -> None:
        self._program = _Program(model, objective)
        self._autocast = autocast
        self.vectorized = True
        self._cut: Cut | None = None
        self.shared = SharedTensors()

    @property
    def description(self) -> str:
        """How gradients are obtained."""
        return "torch.func" if self.vectorized else "one backward pass per example"

    def cuts(self, batch: Any, labels: list[Any], n: int) -> list[Cut]:
        """Return the ways in which examples may lie in a batch's tensors, the likeliest first."""
        leaves = tensors(batch)
        found = cuts(leaves, tensors(labels), n, self.shared.known(leaves, n))
        if self._cut is not None and fits(self._cut, tensors((batch, labels)), n):
            found.insert(0, self._cut)
        return found

    def use(self, cut: Cut) -> None:
        """Take examples out of batches by one of `cuts`."""
        if cut != self._cut:
            self._cut, self.vectorized = cut, True

    def alone(
        self, part: slice, cut: Cut, batch: Any, labels: list[Any], n: int, *, double: bool = False
    ) -> Tensor | None:
        """Return some examples' scalars without the rest, or None if the model cannot be run.

        Parameters
        ----------
        part : slice
        cut : Cut
        batch, labels, n
            As given to `rows`.
        double : bool, default=False
            Whether to compute in float64 throughout.
        """
        example = cut_out(part, cut, batch, labels, n)
        # With gradients, without which torch takes other ways; and whatever warnings lead to.
        with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"):
            if double:
                scalars = self._doubled(example)
            else:
                with self._autocast.restored():
                    scalars = self._program(*example)
            if len(scalars) == part.stop - part.start:
                return scalars.detach()
        return None

    def _doubled(self, example: Any) -> Tensor:
        state: dict[str, Tensor] = dict(self._program.named_parameters(remove_duplicate=False))
        if sum(tensor.numel() for tensor in state.values()) > _MOST_DOUBLED:
            raise ValueError("too many parameters")
        state.update(self._program.named_buffers(remove_duplicate=False))
        doubled = {name: _double(tensor) for name, tensor in state.items()}
        scalars: Tensor = functional_call(self._program, doubled, map_tensors(_double, example))
        return scalars

    def rows(
        self, names: Sequence[str], batch: Any, labels: list[Any], n: int
    ) -> dict[str, Tensor]:
        """Return the rows of each named parameter, shape ``(n, c, *shape)``."""
        cut = self._cut
        if cut is None or not fits(cut, tensors((batch, labels)), n):
            cut = self.cuts(batch, labels, n)[0]
        prefix = "model."
        parameters = dict(self._program.named_parameters(remove_duplicate=False))
        selected = {prefix + name: parameters[prefix + name].detach() for name in names}
        with self._autocast.restored():
            if self.vectorized:
                try:
                    rows = self._vectorized(selected, batch, labels, cut)
                except IFVPUsageError:
                    raise
                except Exception:  # vmap refuses with many types of error; the other way is exact
                    self.vectorized = False
            if not self.vectorized:
                of = [parameters[name] for name in selected]
                rows = self._one_by_one(of, batch, labels, cut, n)
        return dict(zip(names, rows, strict=True))

    def _vectorized(
        self, selected: dict[str, Tensor], batch: Any, labels: list[Any], cut: Cut
    ) -> list[Tensor]:
        def of_example(parameters: dict[str, Tensor], *values: Tensor) -> Tensor:
            restored = iter(
                value if dim is None else value.unsqueeze(dim)
                for value, dim in zip(values, cut, strict=True)
            )
            example = map_tensors(lambda _: next(restored), (batch, labels))
            scalars: Tensor = functional_call(self._program, parameters, example)
            return scalars[0]

        size = sum(p.numel() * p.element_size() for p in selected.values())
        if all(dim is None for dim in cut):
            raise ValueError("no tensor of the batch has the examples along it")
        vectorized = vmap(
            jacrev(of_example),
            in_dims=(None, *cut),
            chunk_size=max(1, _VMAP_BUDGET // max(1, 4 * size)),
        )
        with warnings.catch_warnings():
            # An operator without a batching rule runs example by example: slower, and as exact.
            warnings.filterwarnings("ignore", "There is a performance drop")
            gradients = vectorized(selected, *tensors((batch, labels)))
        return [rows.detach() for rows in gradients.values()]

    def _one_by_one(
        self, parameters: Sequence[Tensor], batch: Any, labels: list[Any], cut: Cut, n: int
    ) -> list[Tensor]:
        rows: list[list[Tensor]] = [[] for _ in parameters]
        for i in range(n):
            scalars = self._program(*cut_out(slice(i, i + 1), cut, batch, labels, n))
            if scalars.shape[0] != 1:
                raise IFVPUsageError(
                    "a single example cut out of the batch gave losses of shape "
                    f"({scalars.shape[0]},) instead of (1,): the examples must lie along the "
                    "first dimension of every tensor of the batch."
                )
            gradients = [
                torch.autograd.grad(scalar, parameters, retain_graph=True, allow_unused=True)
                for scalar in scalars[0]
            ]
            for j, (out, parameter) in enumerate(zip(rows, parameters, strict=True)):
                zero = torch.zeros_like(parameter)
                values = [per_scalar[j] for per_scalar in gradients]
                out.append(torch.stack([zero if g is None else g for g in values]))
        return [torch.stack(out) for out in rows]


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


class _Program(nn.Module):
    """Model and objective as one module, so that calls on either meet substituted parameters."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: Any, labels: list[Any]) -> Tensor:
        return self.objective.of(self.model, batch, labels)
