"""Per-example gradients of any parameter, by torch.func or one backward pass per example."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from fimkit.exceptions import IFVPUsageError
from fimkit.gradients.modes import AmbientAutocast
from fimkit.gradients.objective import Objective
from fimkit.gradients.tree import map_tensors, tensors

__all__ = ["FallbackGradients"]

# Bytes of per-example gradients that one vmapped call may produce.
_VMAP_BUDGET = 64 * 2**20


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
    """

    def __init__(self, model: nn.Module, objective: Objective, autocast: AmbientAutocast) -> None:
        self._program = _Program(model, objective)
        self._autocast = autocast
        self.vectorized = True
        #: Dimension of the batch's tensors that holds the examples, where it fits.
        self.batch_dim = 0

    def try_dim(self, batch_dim: int) -> None:
        """Look for the examples along another dimension of the batch's tensors."""
        if batch_dim != self.batch_dim:
            self.batch_dim, self.vectorized = batch_dim, True

    @property
    def description(self) -> str:
        """How gradients are obtained."""
        return "torch.func" if self.vectorized else "one backward pass per example"

    def first_alone(self, batch: Any, labels: list[Any], n: int) -> list[Tensor]:
        """Return the first example's scalars without the rest, by each way to cut it out."""
        found = []
        dim = self.batch_dim
        for self.batch_dim in dict.fromkeys((dim, 0, 1)):
            with contextlib.suppress(Exception), torch.no_grad(), self._autocast.restored():
                cut = map_tensors(partial(self._example, 0, n), (batch, labels))
                found.append(self._program(*cut))
        self.batch_dim = dim
        return found

    def _example(self, i: int, n: int, tensor: Tensor) -> Tensor:
        """Return what a tensor of the batch holds of one example, or all that examples share."""
        dim = self._dim(tensor, n)
        return tensor if dim is None else tensor.narrow(dim, i, 1)

    def rows(
        self, names: Sequence[str], batch: Any, labels: list[Any], n: int
    ) -> dict[str, Tensor]:
        """Return the rows of each named parameter, shape ``(n, c, *shape)``."""
        prefix = "model."
        parameters = dict(self._program.named_parameters(remove_duplicate=False))
        selected = {prefix + name: parameters[prefix + name].detach() for name in names}
        with self._autocast.restored():
            if self.vectorized:
                try:
                    rows = self._vectorized(selected, batch, labels, n)
                except IFVPUsageError:
                    raise
                except Exception:  # vmap refuses with many types of error; the other way is exact
                    self.vectorized = False
            if not self.vectorized:
                rows = self._one_by_one([parameters[name] for name in selected], batch, labels, n)
        return dict(zip(names, rows, strict=True))

    def _vectorized(
        self, selected: dict[str, Tensor], batch: Any, labels: list[Any], n: int
    ) -> list[Tensor]:
        leaves = tensors((batch, labels))
        dims = [self._dim(leaf, n) for leaf in leaves]

        def of_example(parameters: dict[str, Tensor], *values: Tensor) -> Tensor:
            restored = iter(
                value if dim is None else value.unsqueeze(dim)
                for value, dim in zip(values, dims, strict=True)
            )
            example = map_tensors(lambda _: next(restored), (batch, labels))
            scalars: Tensor = functional_call(self._program, parameters, example)
            return scalars[0]

        size = sum(p.numel() * p.element_size() for p in selected.values())
        if all(dim is None for dim in dims):
            raise ValueError("no tensor of the batch has the examples along it")
        vectorized = vmap(
            jacrev(of_example),
            in_dims=(None, *dims),
            chunk_size=max(1, _VMAP_BUDGET // max(1, 4 * size)),
        )
        with warnings.catch_warnings():
            # An operator without a batching rule runs example by example: slower, and as exact.
            warnings.filterwarnings("ignore", "There is a performance drop")
            gradients = vectorized(selected, *leaves)
        return [rows.detach() for rows in gradients.values()]

    def _one_by_one(
        self, parameters: list[Tensor], batch: Any, labels: list[Any], n: int
    ) -> list[Tensor]:
        rows: list[list[Tensor]] = [[] for _ in parameters]
        for i in range(n):
            cut = map_tensors(partial(self._example, i, n), (batch, labels))
            scalars = self._program(*cut)
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

    def _dim(self, tensor: Tensor, n: int) -> int | None:
        """Return the dimension along which a tensor holds the examples, or None."""
        if tensor.ndim > self.batch_dim and tensor.shape[self.batch_dim] == n:
            return self.batch_dim
        return 0 if tensor.ndim and tensor.shape[0] == n else None


class _Program(nn.Module):
    """Model and objective as one module, so that calls on either meet substituted parameters."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: Any, labels: list[Any]) -> Tensor:
        return self.objective.of(self.model, batch, labels)
