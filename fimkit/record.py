"""Whether a second pass over the data meets the batches of the first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["PassRecord"]

# Relative difference at which two computations of the same numbers count as different. Kernels
# that add up in any order differ by rounding errors, which a model in a coarse dtype makes larger.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_COARSE_TOLERANCE = 2e-2

# Random sums by which a tensor is known again: so many that not all are small by chance. They are
# of single numbers, which rounding changes by more than it changes losses.
_SUMS = 4
_SUMS_TOLERANCE = 5


class PassRecord:
    """What there was in each batch of a pass, to be compared with that of another pass.

    Losses do not always tell batches apart: a head of zeros gives all inputs the same. So the
    inputs of layers, and the gradients at their outputs, can be recorded besides, as random sums.
    """

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        # Of each batch (layers, sums); None where nothing was recorded but losses.
        self._inputs: list[Tensor | None] = []
        self._signals: list[Tensor | None] = []
        self._tolerance = 0.0
        self._scale: float | None = None
        self._random: dict[tuple[Any, ...], Tensor] = {}

    def __len__(self) -> int:
        return len(self._losses)

    def state_dict(self) -> dict[str, Any]:
        """Return what has been recorded."""
        return {
            "losses": self._losses,
            "inputs": self._inputs,
            "signals": self._signals,
            "tolerance": self._tolerance,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what was recorded before."""
        self._losses, self._tolerance = state["losses"], state["tolerance"]
        self._inputs, self._signals = state["inputs"], state["signals"]

    def append(
        self, losses: Tensor, inputs: Sequence[Tensor] = (), signals: Sequence[Tensor] = ()
    ) -> None:
        """Record the next batch.

        Parameters
        ----------
        losses : Tensor
        inputs, signals : sequence of Tensor
            Inputs of layers, and gradients at their outputs.
        """
        self._losses.append(losses)
        self._inputs.append(self._sums(inputs))
        self._signals.append(self._sums(signals))
        self._scale = None
        for tensor in (*inputs, *signals):
            if tensor.is_floating_point():
                self._tolerance = max(self._tolerance, _tolerance(tensor))

    def difference(
        self, i: int, losses: Tensor, inputs: Sequence[Tensor] = (), signals: Sequence[Tensor] = ()
    ) -> str | None:
        """Return what of batch i is another than it was, None if nothing is.

        Parameters
        ----------
        i : int
        losses, inputs, signals
            As for `append`; inputs and signals are looked at where some were recorded.
        """
        known = self._losses[i]
        if not _close(losses, known, _tolerance(known), known.abs().mean()):
            return "losses"
        known_inputs, known_signals = self._inputs[i], self._signals[i]
        if known_inputs is None or known_signals is None:
            return None
        if len(inputs) != len(known_inputs) or len(signals) != len(known_signals):
            return "layers"
        if not self._same(inputs, known_inputs, known_inputs.abs().mean(1, keepdim=True)):
            return "inputs of layers"
        if not self._same(signals, known_signals, self._signal_scale()):
            return "gradients at layers"
        return None

    def _same(self, tensors: Sequence[Tensor], known: Tensor, scale: Tensor | float) -> bool:
        tolerance = _SUMS_TOLERANCE * max(self._tolerance, _tolerance(known))
        return _close(self._sums(tensors), known, tolerance, scale)

    def _signal_scale(self) -> float:
        """Return the mean size of the sums of signals, of all batches and layers.

        Where examples are fitted perfectly, gradients are rounding errors: others tell that.
        """
        if self._scale is None:
            means = [signals.abs().mean(1) for signals in self._signals if signals is not None]
            self._scale = float(torch.cat(means).mean())
        return self._scale

    def _sums(self, tensors: Sequence[Tensor]) -> Tensor | None:
        """Return random sums of each tensor's numbers, on one device; None if there is none."""
        if not tensors:
            return None
        sums = [self._sums_of(tensor) for tensor in tensors]
        finest = max(sums, key=lambda each: each.dtype.itemsize)
        return torch.stack([each.to(finest) for each in sums])

    def _sums_of(self, tensor: Tensor) -> Tensor:
        """Return random sums of a tensor's numbers, about as large as its norm."""
        wide = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
        matrix = wide.reshape(-1, tensor.shape[-1])
        rows, columns = matrix.shape
        return self._numbers((_SUMS, rows), wide) @ (matrix @ self._numbers((columns,), wide))

    def _numbers(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return random numbers, always the same."""
        key = shape, like.dtype, like.device
        if key not in self._random:
            generator = torch.Generator(like.device).manual_seed(len(shape))
            self._random[key] = torch.randn(
                shape, generator=generator, dtype=like.dtype, device=like.device
            )
        return self._random[key]


def _close(second: Tensor | None, first: Tensor, tolerance: float, scale: Tensor | float) -> bool:
    """Whether numbers agree, up to a part of their size and of the scale given."""
    if second is None or second.shape != first.shape:
        return False
    return bool(((second - first).abs() <= tolerance * (first.abs() + scale)).all())


def _tolerance(tensor: Tensor) -> float:
    return _TOLERANCE.get(tensor.dtype, _COARSE_TOLERANCE)
