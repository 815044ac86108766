"""``F.conv1d``, ``F.conv2d`` and ``F.conv3d``, strided, dilated, grouped and padded.

Padding modes other than zeros need nothing here: modules pad their input before the call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from fimkit.gradients.rules.base import Examples, MatrixUse, ParameterIndex, Slot
from fimkit.operators import MatrixLayout

__all__ = ["ConvolutionUse"]


class ConvolutionUse(MatrixUse):
    """A convolution as a linear map of patches: positions are the output's spatial positions."""

    functions = (F.conv1d, F.conv2d, F.conv3d)
    description = "captured (convolution)"

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        slots: tuple[Slot | None, Slot | None],
        stride: int | Sequence[int],
        padding: str | int | Sequence[int],
        dilation: int | Sequence[int],
        groups: int,
    ) -> None:
        super().__init__(x, weight, slots)
        self._kernel = tuple(weight.shape[2:])
        dims = len(self._kernel)
        self._stride = _per_dim(stride, dims)
        self._dilation = _per_dim(dilation, dims)
        self._padding = _padding(padding, self._kernel, self._dilation)
        self._batched = x.ndim == dims + 2
        out, size = weight.shape[0] // groups, math.prod(weight.shape[1:])
        self.layout = MatrixLayout(groups, out, size)

    @classmethod
    def match(
        cls,
        index: ParameterIndex,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> ConvolutionUse | None:
        """Return the use that a call with these arguments is, or None if it uses no parameter."""
        slots = index.slot(weight), index.slot(bias)
        if slots == (None, None):
            return None
        return cls(input, weight, slots, stride, padding, dilation, groups)

    def observe(self, output: Tensor) -> None:
        """Set `lead` from the call's output."""
        self.lead = tuple(output.shape[:1]) if self._batched else ()

    def inputs(self, examples: Examples, constant: float | None = None) -> tuple[Tensor, ...]:
        """Return the patches, shape ``(m, T, groups, in)``, positions of all fastest in memory."""
        x = examples.split(self.x, self.lead)
        m, calls = x.shape[:2]
        windows = self._windows(F.pad(x.flatten(0, 1), self._padding))
        groups, size = self.layout.groups, self.layout.in_
        positions = math.prod(windows.shape[-len(self._kernel) :])
        # One copy, constant included: several times faster than torch's unfold.
        patches = x.new_empty((groups, size + (constant is not None), m * calls, positions))
        if constant is not None:
            patches[:, -1] = constant
        windows = windows.movedim(0, -1 - len(self._kernel))
        patches[:, :size].view(windows.shape).copy_(windows)
        return (patches.view(*patches.shape[:2], m, calls * positions).permute(2, 3, 0, 1),)

    def _windows(self, x: Tensor) -> Tensor:
        """View padded inputs as ``(N, groups, channels, *kernel, *positions)``."""
        dims = len(self._kernel)
        x = x.view(len(x), self.layout.groups, -1, *x.shape[2:])
        for dim in range(dims):
            window = (self._kernel[dim] - 1) * self._dilation[dim] + 1
            x = x.unfold(3 + dim, window, self._stride[dim])[..., :: self._dilation[dim]]
        return x.permute(0, 1, 2, *range(3 + dims, 3 + 2 * dims), *range(3, 3 + dims))

    def signals(self, signals: Tensor, examples: Examples) -> Tensor:
        """Return the gradients at the outputs, shape ``(m, c, T, groups, out)``."""
        s = examples.split_signals(signals, self.lead).flatten(4)
        m, c, calls, _, positions = s.shape
        s = s.transpose(3, 4).reshape(m, c, calls * positions, self.layout.groups, self.layout.out)
        return s


def _per_dim(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def _padding(
    padding: str | int | Sequence[int], kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> list[int]:
    """Return the padding as `torch.nn.functional.pad` takes it: last dimension first."""
    if padding == "valid":
        padding = 0
    pairs = []
    for dim, size in enumerate(kernel):
        if padding == "same":
            total = dilation[dim] * (size - 1)
            pairs.append((total // 2, total - total // 2))
        else:
            assert not isinstance(padding, str)
            pairs.append((_per_dim(padding, len(kernel))[dim],) * 2)
    return [amount for pair in reversed(pairs) for amount in pair]
