"""Per-example gradients of any parameter, by torch.func or one backward pass per example."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from fimkit.exceptions import IFVPUsageError
from fimkit.gradients.modes import AmbientAutocast
from fimkit.gradients.objective import Objective
from fimkit.gradients.tree import map_tensors, tensors

__all__ = ["FallbackGradients"]

#: For each tensor of a batch and its labels the dimension that holds the examples, None where all
#: examples share it.
Cut = tuple[int | None, ...]

# What the targets of a mapping are called; `Loss.targets` takes only the first.
_TARGETS = ("labels", "label", "targets", "target", "y")

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
        self._cut: Cut | None = None
        self._shared: dict[int, Tensor] = {}

    @property
    def description(self) -> str:
        """How gradients are obtained."""
        return "torch.func" if self.vectorized else "one backward pass per example"

    def cuts(self, batch: Any, labels: list[Any], n: int) -> list[Cut]:
        """Return the ways in which examples may lie in a batch's tensors, the likeliest first.

        Parameters
        ----------
        batch, labels
            As given to `rows`.
        n : int
            Number of examples.
        """
        leaves = tensors((batch, labels))
        targets = {id(leaf) for leaf in tensors((_targets(batch), labels))}
        options = [[dim for dim in (0, 1) if _holds(leaf, dim, n)] for leaf in leaves]
        first, last = ([dims[end] if dims else None for dims in options] for end in (0, -1))
        found = [] if self._cut is None or not _fits(self._cut, leaves, n) else [self._cut]
        for cut in (first, last):
            found.append(tuple(cut))
            # A tensor that all examples share may happen to be as long as the batch.
            for i, leaf in enumerate(leaves):
                if id(leaf) not in targets:
                    found.append((*cut[:i], None, *cut[i + 1 :]))
        return list(dict.fromkeys(found))

    def use(self, cut: Cut) -> None:
        """Take examples out of batches by one of `cuts`."""
        if cut != self._cut:
            self._cut, self.vectorized = cut, True

    def share(self, cut: Cut, batch: Any, n: int) -> None:
        """Take what a cut leaves whole, and might have cut, for the same in every batch."""
        for i, (dim, leaf) in enumerate(zip(cut, tensors(batch), strict=False)):
            if dim is None and _holds(leaf, 0, n):
                self._shared.setdefault(i, leaf.clone())

    def shares(self, batch: Any) -> bool:
        """Whether all that was taken for shared is the same in this batch."""
        leaves = tensors(batch) if self._shared else []
        return all(
            i < len(leaves) and torch.equal(leaves[i], shared) for i, shared in self._shared.items()
        )

    def alone(
        self, part: slice, batch: Any, labels: list[Any], n: int
    ) -> Iterator[tuple[Cut, Tensor]]:
        """Yield some examples' scalars without the rest, with each way to cut them out.

        There is none if the model cannot be run on them.
        """
        for cut in self.cuts(batch, labels, n):
            scalars: Tensor | None = None
            with contextlib.suppress(Exception), torch.no_grad(), self._autocast.restored():
                scalars = self._program(*_examples(part, cut, (batch, labels)))
            if scalars is not None and len(scalars) == part.stop - part.start:
                yield cut, scalars

    def rows(
        self, names: Sequence[str], batch: Any, labels: list[Any], n: int
    ) -> dict[str, Tensor]:
        """Return the rows of each named parameter, shape ``(n, c, *shape)``."""
        cut = self._cut
        if cut is None or not _fits(cut, tensors((batch, labels)), n):
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
            scalars = self._program(*_examples(slice(i, i + 1), cut, (batch, labels)))
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


def _targets(batch: Any) -> Any:
    """Return what stands where a batch has its targets, of which each example has its own."""
    if isinstance(batch, Mapping):
        return [value for key, value in batch.items() if key in _TARGETS]
    return batch[-1] if isinstance(batch, tuple | list) and len(batch) > 1 else None


def _examples(part: slice, cut: Cut, batch: Any) -> Any:
    """Return what a batch holds of some examples, and all that examples share."""
    dims = iter(cut)

    def of_tensor(tensor: Tensor) -> Tensor:
        dim = next(dims)
        return tensor if dim is None else tensor.narrow(dim, part.start, part.stop - part.start)

    return map_tensors(of_tensor, batch)


def _holds(tensor: Tensor, dim: int, n: int) -> bool:
    return tensor.ndim > dim and tensor.shape[dim] == n


def _fits(cut: Cut, leaves: Sequence[Tensor], n: int) -> bool:
    """Whether a cut, perhaps of another batch, can take n examples out of these tensors."""
    return len(cut) == len(leaves) and all(
        dim is None or _holds(leaf, dim, n) for leaf, dim in zip(leaves, cut, strict=True)
    )


class _Program(nn.Module):
    """Model and objective as one module, so that calls on either meet substituted parameters."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: Any, labels: list[Any]) -> Tensor:
        return self.objective.of(self.model, batch, labels)
