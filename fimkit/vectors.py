"""Parameter names and shapes, and the containers in which vectors over them come and go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fimkit.exceptions import IFVPUsageError

__all__ = ["ParameterSpace", "all_finite", "some_names", "tensor_of"]

Restore = Callable[[Tensor], Any]


class ParameterSpace:
    """The selected parameters of a model, in ``named_parameters()`` order, as one flat vector.

    Parameters
    ----------
    shapes : mapping of str to tuple of int
        Shape of each selected parameter, by name.
    full_size : int, optional
        Numbers in all parameters of the model, for the error that a full-width vector gets.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], full_size: int | None = None) -> None:
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.full_size = full_size
        self.slices: dict[str, slice] = {}
        start = 0
        for name, shape in self.shapes.items():
            stop = start + int(np.prod(shape, dtype=np.int64))
            self.slices[name] = slice(start, stop)
            start = stop
        self.size = start

    def flatten(self, vectors: Any) -> tuple[Tensor, Restore]:
        """Return vectors as a ``(k, p)`` tensor, with the way back to their container.

        Parameters
        ----------
        vectors : array or tensor of shape (p,) or (k, p), mapping, or sequence
            A mapping takes parameter names to ``(*shape)`` or ``(k, *shape)``; a sequence holds
            one such array per parameter, in order.

        Returns
        -------
        flat : Tensor of shape (k, p)
            Shares memory with ``vectors`` where they are one flat array.
        restore : callable
            Turns a ``(k, p)`` tensor into the container, shapes, dtypes and devices given.

        Raises
        ------
        IFVPUsageError
            If the container, a name, a shape or a dtype does not fit.
        """
        if isinstance(vectors, Mapping):
            self._check_names(vectors)
            pieces = [vectors[name] for name in self.shapes]
            flat, restore = self._join(pieces)
            return flat, lambda result: dict(zip(self.shapes, restore(result), strict=True))
        if isinstance(vectors, Tensor | np.ndarray):
            return self._flatten_array(vectors)
        if isinstance(vectors, Sequence) and not isinstance(vectors, str | bytes):
            if len(vectors) != len(self.shapes):
                raise IFVPUsageError(
                    f"vectors is a sequence of {len(vectors)} arrays, but there are "
                    f"{len(self.shapes)} parameters ({some_names(self.shapes)}); give one array "
                    "per parameter, in that order."
                )
            kind = list if isinstance(vectors, list) else tuple
            flat, restore = self._join(list(vectors))
            return flat, lambda result: kind(restore(result))
        raise IFVPUsageError(
            f"vectors must be a numpy array or torch tensor of shape (p,) or (k, p), a mapping "
            f"from parameter names, a sequence of tensors, or a ModelData; got "
            f"{type(vectors).__name__}."
        )

    def _flatten_array(self, vectors: Tensor | np.ndarray) -> tuple[Tensor, Restore]:
        if vectors.ndim not in (1, 2) or vectors.shape[-1] != self.size:
            message = (
                f"vectors has shape {tuple(vectors.shape)}; expected ({self.size},) or "
                f"(k, {self.size}), the selected parameters in named_parameters() order"
            )
            if vectors.ndim and vectors.shape[-1] == self.full_size != self.size:
                message += (
                    f". A width of {self.full_size} is that of the full model, of which "
                    f"{self.size} numbers were selected for the fit; take their columns out first"
                )
            raise IFVPUsageError(message + ".")
        tensor, back = _as_tensor(vectors, "vectors")
        flat = tensor if tensor.ndim == 2 else tensor[None]
        shape = tuple(vectors.shape)
        return flat, lambda result: back(result.reshape(shape))

    def _join(self, pieces: list[Any]) -> tuple[Tensor, Callable[[Tensor], list[Any]]]:
        backs, flats = [], []
        batches: dict[str, int | None] = {}
        for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True):
            tensor, back = _as_tensor(piece, f"vectors[{name!r}]")
            if tuple(tensor.shape) == shape:
                batches[name] = None
            elif tuple(tensor.shape[1:]) == shape:
                batches[name] = tensor.shape[0]
            else:
                raise IFVPUsageError(
                    f"vectors[{name!r}] has shape {tuple(tensor.shape)}; expected {shape}, or "
                    f"(k, *{shape}) for k vectors."
                )
            backs.append(back)
            k = batches[name]
            width = self.slices[name].stop - self.slices[name].start
            flats.append(tensor.reshape(1 if k is None else k, width))
        if len(set(batches.values())) != 1:
            raise IFVPUsageError(
                "vectors differ in their leading size k between parameters: "
                f"{batches}; give every parameter the same k, or none of them a leading size."
            )
        devices = {flat.device for flat in flats}
        dtype = flats[0].dtype
        for flat in flats[1:]:
            dtype = torch.promote_types(dtype, flat.dtype)
        home = flats[0].device if len(devices) == 1 else torch.device("cpu")
        joined = torch.cat([flat.to(home, dtype) for flat in flats], 1)
        batched = next(iter(batches.values())) is not None

        def restore(result: Tensor) -> list[Any]:
            out = []
            for (name, shape), back in zip(self.shapes.items(), backs, strict=True):
                piece = result[:, self.slices[name]]
                out.append(back(piece.reshape((len(piece), *shape) if batched else shape)))
            return out

        return joined, restore

    def _check_names(self, vectors: Mapping[str, Any]) -> None:
        missing = [name for name in self.shapes if name not in vectors]
        unknown = [name for name in vectors if name not in self.shapes]
        if missing or unknown:
            problems = []
            if missing:
                problems.append(f"lacks {some_names(missing)}")
            if unknown:
                problems.append(f"has unknown {some_names(unknown)}")
            raise IFVPUsageError(
                f"vectors, a mapping of parameter names, {' and '.join(problems)}; expected "
                f"exactly the fitted parameters: {some_names(self.shapes)}."
            )


def _as_tensor(values: Any, what: str) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Return values as a detached tensor, with the way back to numpy or to dtype and device."""
    if isinstance(values, np.ndarray):
        dtype = values.dtype
        if dtype.kind != "f":
            raise _not_floating(what, dtype)
        if dtype.itemsize > 8:
            raise IFVPUsageError(f"{what} has dtype {dtype}, which torch lacks; use float64.")
        tensor = tensor_of(values)
        back = _way_back(tensor, what)
        return tensor, lambda out: back(out).numpy().astype(dtype, copy=False)
    if isinstance(values, Tensor):
        if not values.dtype.is_floating_point:
            raise _not_floating(what, values.dtype)
        if values.dtype.itemsize == 1:
            raise IFVPUsageError(f"{what} has dtype {values.dtype}; use bfloat16 or wider.")
        if values.layout != torch.strided or values.is_nested or values.is_meta:
            raise IFVPUsageError(
                f"{what} must be a dense tensor; got one of layout {values.layout} on "
                f"{values.device}, which .to_dense() may convert."
            )
        return values.detach(), _way_back(values, what)
    if values is None:
        raise IFVPUsageError(
            f"{what} is None, as .grad is before backward(), and as torch.autograd.grad(..., "
            "allow_unused=True) gives for a parameter that the loss does not depend on; call "
            "backward() first, or pass materialize_grads=True for zeros."
        )
    raise IFVPUsageError(
        f"{what} must be a numpy array or torch tensor; got {type(values).__name__}."
    )


def tensor_of(array: np.ndarray) -> Tensor:
    """Return an array as a tensor, copied where torch has no such memory."""
    native = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")).reshape(array.shape)
    return torch.from_numpy(native if native.flags.writeable else native.copy())


def all_finite(values: Tensor) -> bool:
    """Whether no number is NaN or infinite, told from the extremes without a mask of all."""
    return not values.numel() or bool(torch.stack(torch.aminmax(values)).isfinite().all())


def _way_back(tensor: Tensor, what: str) -> Callable[[Tensor], Tensor]:
    """Return what takes a result to a tensor's dtype and device."""
    device, dtype = tensor.device, tensor.dtype

    def back(result: Tensor) -> Tensor:
        result = result.to(device, dtype)
        if not all_finite(result):
            name = str(dtype).removeprefix("torch.")
            raise IFVPUsageError(
                f"the result exceeds the range of {name}, the dtype of {what}; give it in a "
                "wider one, or use a larger regularization."
            )
        return result

    return back


def _not_floating(what: str, dtype: Any) -> IFVPUsageError:
    return IFVPUsageError(
        f"{what} has dtype {dtype}; gradients are floating point, so convert it, for instance "
        "with .astype(float) or .float()."
    )


def some_names(names: Any, limit: int = 8) -> str:
    """Return the first names, and how many there are, as a message tells them."""
    names = list(names)
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown}, … ({len(names)} in all)"
