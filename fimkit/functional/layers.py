"""Parameters grouped into layers, and the layouts in which vectors over them come and go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fimkit.exceptions import IFVPUsageError, SingularFisherError
from fimkit.functional.checks import check_finite, check_floating
from fimkit.operators import Columns

__all__ = ["LayerVectors", "Layers"]

Restore = Callable[[list[Tensor]], Any]


@dataclass(frozen=True)
class Layers:
    """Which parameters make up each layer.

    Parameters
    ----------
    members : dict of int to tuple of int
        Positions of each layer's parameters, ascending, by the layer's number, ascending.
    """

    members: dict[int, tuple[int, ...]]

    @classmethod
    def each(cls, n: int) -> Layers:
        """Return one layer for each of n parameters."""
        return cls({i: (i,) for i in range(n)})

    @classmethod
    def mapped(cls, layer_map: Any) -> Layers:
        """Return the layers that a ``param_layer_map`` says; its numbers may leave gaps.

        Raises
        ------
        IFVPUsageError
            If it is not a sequence of integers of at least 0.
        """
        numbers = layer_map.tolist() if isinstance(layer_map, Tensor | np.ndarray) else layer_map
        if not isinstance(numbers, list | tuple) or not all(map(_is_number, numbers)):
            raise IFVPUsageError(
                f"param_layer_map is {layer_map!r}; expected a list with the number of a layer, "
                "an integer of at least 0, for each parameter, such as [0, 0, 1, 1]."
            )
        members: dict[int, list[int]] = {int(number): [] for number in sorted(numbers)}
        for position, number in enumerate(numbers):
            members[int(number)].append(position)
        return cls({number: tuple(positions) for number, positions in members.items()})

    @property
    def n_parameters(self) -> int:
        """Number of parameters in all layers."""
        return sum(map(len, self.members.values()))

    def regularizations(self, numbers: Sequence[float]) -> list[float]:
        """Return one number per layer from one per layer, or from one per parameter.

        As many numbers as there are layers are one per layer.

        Raises
        ------
        IFVPUsageError
            If there are as many of neither, or parameters of one layer have different numbers.
        """
        if len(numbers) == len(self.members):
            return list(numbers)
        if len(numbers) != self.n_parameters:
            raise IFVPUsageError(
                f"regularization has {len(numbers)} numbers; expected one for all, or one per "
                f"layer: {len(self.members)}, or one per parameter: {self.n_parameters}."
            )
        for layer, members in self.members.items():
            for i in members:
                if numbers[i] != numbers[members[0]]:
                    raise IFVPUsageError(
                        f"regularization is {numbers[members[0]]} for parameter {members[0]} and "
                        f"{numbers[i]} for parameter {i}, which are both in layer {layer}; give "
                        "the parameters of one layer the same number, or one number per layer."
                    )
        return [numbers[members[0]] for members in self.members.values()]


@dataclass(frozen=True)
class LayerVectors:
    """The space of vectors over parameters in layers.

    Parameters
    ----------
    layers : Layers
    shapes : list of tuple of int
        Shape of every parameter.
    keys : list or None
        Keys of the parameters, where these are the items of one mapping.
    device : torch.device
        Where vectors are brought.
    """

    layers: Layers
    shapes: list[tuple[int, ...]]
    keys: list[Any] | None
    device: torch.device

    def columns(self) -> list[Columns]:
        """Return where each layer's parameters lie among all, flattened and concatenated."""
        sizes = [_size(shape) for shape in self.shapes]
        places = [
            slice(stop - size, stop) for stop, size in zip(accumulate(sizes), sizes, strict=True)
        ]
        return [Columns(tuple(places[i] for i in own)) for own in self.layers.members.values()]

    def flatten(self, v: Any) -> tuple[list[Tensor], Restore]:
        """Return vectors as one ``(k, p_b)`` tensor per layer, with the way back.

        Parameters
        ----------
        v : Tensor, tuple, list or mapping
            A sequence of one tensor per layer, if it is as long as there are layers, or else of
            one per parameter; one tensor, as a sequence of one; or a mapping with the keys of the
            parameters. The tensor of a parameter has its shape or is flat, that of a layer is
            flat; a k may lead. Of those shapes, none holds as many numbers in another order as
            another does, so that it does not matter which of them a tensor is taken to have.

        Returns
        -------
        flat : list of Tensor of shape (k, p_b)
        restore : callable
            Turns such a list into the container, shapes, dtypes and devices given. Raises
            SingularFisherError where a dtype overflows.

        Raises
        ------
        IFVPUsageError
            If the container, or the kind or shape of a tensor, does not fit, or it is not finite.
        """
        pieces, names, by_layer, rebuild = self._unpack(v)
        members = list(self.layers.members.values())
        # The parameters in each piece, and the pieces that make up each layer.
        contents = members if by_layer else [(i,) for i in range(len(self.shapes))]
        sources = [(j,) for j in range(len(members))] if by_layer else members
        rows = [
            self._rows(piece, [self.shapes[i] for i in content], name)
            for piece, content, name in zip(pieces, contents, names, strict=True)
        ]
        if len({len(some) for some in rows}) > 1:
            listed = ", ".join(f"{len(s)} in {name}" for s, name in zip(rows, names, strict=True))
            raise IFVPUsageError(f"v holds unlike numbers of vectors: {listed}; give the same k.")

        def restore(solved: list[Tensor]) -> Any:
            found: dict[int, Tensor] = {}
            for source, values in zip(sources, solved, strict=True):
                parts = torch.split(values, [rows[i].shape[1] for i in source], 1)
                for i, part in zip(source, parts, strict=True):
                    found[i] = part.reshape(pieces[i].shape).to(pieces[i].device, pieces[i].dtype)
                    if not found[i].isfinite().all():
                        raise SingularFisherError(
                            f"The IFVP of {names[i]} overflows {pieces[i].dtype}; give a larger "
                            "regularization, or vectors of a wider dtype."
                        )
            return rebuild([found[i] for i in range(len(pieces))])

        return [torch.cat([rows[i] for i in source], 1) for source in sources], restore

    def _unpack(self, v: Any) -> tuple[list[Any], list[str], bool, Callable[[list[Tensor]], Any]]:
        """Return the tensors in v, what errors call them, if they are per layer, the way back."""
        if isinstance(v, Mapping):
            keys = self.keys
            if keys is None or set(v) != set(keys):
                expected = "a tensor, or a tuple or list" if keys is None else f"the keys {keys}"
                raise IFVPUsageError(
                    f"v is a mapping with the keys {list(v)}; expected {expected}, as the "
                    "parameters come."
                )
            names = [f"v[{key!r}]" for key in keys]
            return (
                [v[key] for key in keys],
                names,
                False,
                lambda found: {key: found[keys.index(key)] for key in v},
            )
        if isinstance(v, Tensor):
            pieces, names, rebuild = [v], ["v"], lambda found: found[0]
        elif isinstance(v, tuple | list):
            pieces, names = list(v), [f"v[{i}]" for i in range(len(v))]
            rebuild = tuple if isinstance(v, tuple) else list
        else:
            raise IFVPUsageError(
                f"v is a {type(v).__name__}; expected a tuple or list of tensors, one per layer "
                "or one per parameter."
            )
        n_layers = len(self.layers.members)
        if len(pieces) not in (n_layers, len(self.shapes)):
            given = "one tensor" if isinstance(v, Tensor) else f"a {type(v).__name__} of {len(v)}"
            raise IFVPUsageError(
                f"v is {given}; expected a tuple or list of tensors, one per layer: {n_layers}, "
                f"or one per parameter: {len(self.shapes)}."
            )
        return pieces, names, len(pieces) == n_layers, rebuild

    def _rows(self, piece: Any, shapes: list[tuple[int, ...]], name: str) -> Tensor:
        """Return the k vectors in a tensor over parameters of given shapes, ``(k, width)``."""
        check_floating(piece, name)
        width = sum(map(_size, shapes))
        single = [(width,), *shapes] if len(shapes) == 1 else [(width,)]
        shape = tuple(piece.shape)
        if shape in single:
            k = 1
        elif shape and shape[1:] in single:
            k = shape[0]
        else:
            one = " or ".join(map(str, dict.fromkeys(single)))
            raise IFVPUsageError(
                f"{name} has shape {shape}; expected {one}, the shape of one vector there, with k "
                "in front for k vectors."
            )
        check_finite(piece, name)
        rows: Tensor = piece.detach().reshape(k, width).to(self.device)
        return rows


def _size(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _is_number(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0
