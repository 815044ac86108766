"""Batches of a data loader, and a model with its data as something scikit-learn can slice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    StackDataset,
    Subset,
    TensorDataset,
    default_collate,
)

from fimkit.exceptions import IFVPUsageError
from fimkit.loaders import Indices, refuse_samplers, tagged_batches, without_repeats
from fimkit.vectors import tensor_of

__all__ = [
    "ModelData",
    "check_batches",
    "check_model_data",
    "described",
    "indexed_batches",
]


class ModelData:
    """A model together with a dataset: n examples by p parameters, without the numbers.

    Stands for the matrix of per-example gradients wherever scikit-learn or fimkit takes data:
    ``fit(ModelData(model, dataset))`` is ``fit(model, loader)``, and as ``vectors`` it is the
    gradients of its examples. Slicing it slices the examples; the model is shared, never copied.

    Parameters
    ----------
    model : torch.nn.Module
        The trained model.
    dataset : Dataset, DataLoader, or tuple of tensors, arrays or datasets
        A map-style dataset, such as a list of examples; a loader of one, whose dataset, batch size
        and collate function are taken; or ``(inputs, targets)`` of equal length, each a tensor, an
        array or a dataset, such as skorch's ``SliceDataset(dataset, idx=0)`` and
        ``SliceDataset(dataset, idx=1)``.
    batch_size : int, default=256
        Examples per batch. A loader's own batch size is taken instead.
    collate_fn : callable, optional
        Turns a list of examples into a batch, as in `torch.utils.data.DataLoader`.
    indices : sequence of int, optional
        Which examples of the dataset, in order; all when not given.

    Attributes
    ----------
    shape : tuple of int
        Examples, and numbers in the model's trainable parameters.

    Examples
    --------
    >>> import torch
    >>> from fimkit import ModelData
    >>> x, y = torch.randn(10, 3), torch.arange(10) % 2
    >>> data = ModelData(torch.nn.Linear(3, 2), (x, y))
    >>> data.shape
    (10, 8)
    >>> len(data[:4]), data[[1, 3]].targets.tolist()
    (4, [1, 1])
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Any,
        *,
        batch_size: int = 256,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        indices: Sequence[int] | npt.NDArray[np.integer[Any]] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise IFVPUsageError(
                f"model must be a torch.nn.Module; got {described(model)}. Give "
                "ModelData(model, dataset)."
            )
        if isinstance(dataset, DataLoader):
            if getattr(dataset, "batch_sampler", None) is None:
                raise IFVPUsageError(
                    "the DataLoader has batch_size=None, so its dataset holds no examples to slice "
                    "but batches; give it to fit(model, dataloader) directly."
                )
            refuse_samplers(dataset)
            batch_size = dataset.batch_size or batch_size
            collate_fn = collate_fn or dataset.collate_fn
            dataset = dataset.dataset
        elif isinstance(dataset, tuple | list):
            dataset = _of_columns(dataset)
        self.model = model
        self.dataset = _map_style(dataset)
        if (
            isinstance(batch_size, bool)
            or not isinstance(batch_size, int | np.integer)
            or batch_size < 1
        ):
            raise IFVPUsageError(
                f"batch_size must be an integer of at least 1; got {batch_size!r}."
            )
        self.batch_size = int(batch_size)
        self.collate_fn = collate_fn
        n = len(self.dataset)
        self.indices = np.arange(n) if indices is None else _positions(indices, n)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def shape(self) -> tuple[int, int]:
        """Examples, and numbers in the model's trainable parameters."""
        return len(self), sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @property
    def ndim(self) -> int:
        """Two: examples by parameters."""
        return 2

    @property
    def targets(self) -> npt.NDArray[Any]:
        """Targets of the examples, ``(n,)`` or ``(n, ...)``: each one's last element or labels.

        Reads every example once.

        Raises
        ------
        IFVPUsageError
            If an example has no target, or targets differ in shape.
        """
        if type(self.dataset) is TensorDataset:  # others may make examples in another way
            return np.asarray(_target(self.dataset.tensors)[self.indices].cpu())
        targets = []
        for index in self.indices:
            target = _target(self.dataset[int(index)])
            targets.append(np.asarray(target.cpu() if isinstance(target, Tensor) else target))
        shapes = sorted({target.shape for target in targets})
        if len(shapes) > 1:
            raise IFVPUsageError(
                f"the targets are no one array: some have shape {shapes[0]}, some {shapes[-1]}. "
                "Give scikit-learn labels of your own for its splits."
            )
        return np.stack(targets) if targets else np.empty(0)

    def __getitem__(self, key: Any) -> ModelData:
        """Return the examples that an index, slice, mask or index array selects.

        A tuple's first element selects examples; the rest must select all parameters.
        """
        if isinstance(key, tuple):
            key, *rest = key or (...,)
            if not all(part is ... or _is_full_slice(part) for part in rest):
                raise IFVPUsageError(
                    "a ModelData is sliced by examples only, as data[indices]; choose parameters "
                    "with the estimator's parameters=."
                )
        if key is Ellipsis:
            key = slice(None)
        if isinstance(key, Tensor):
            key = key.cpu().numpy()
        if isinstance(key, list | tuple | range):
            key = np.asarray(key, dtype=np.intp if not len(key) else None)
        problem = f"cannot select examples of a ModelData of length {len(self)} with {key!r}"
        try:
            indices = np.atleast_1d(self.indices[key])
        except IndexError as error:
            raise IndexError(f"{problem}: {error}") from None
        if indices.ndim != 1:
            raise IndexError(f"{problem}; give an integer, slice, mask or 1-D array of integers")
        return ModelData(
            self.model,
            self.dataset,
            batch_size=self.batch_size,
            collate_fn=self.collate_fn,
            indices=indices,
        )

    def __array__(self, *args: Any, **kwargs: Any) -> npt.NDArray[Any]:
        raise IFVPUsageError(
            "a ModelData holds a model and examples, no numbers; an estimator's transform(data) "
            "makes an array of it, so begin a pipeline with one of fimkit's."
        )

    def __repr__(self) -> str:
        n, p = self.shape
        return f"ModelData({type(self.model).__name__}, n={n}, p={p})"

    def batches(self) -> DataLoader[Any]:
        """Return a loader of the examples, in order."""
        own = self.collate_fn not in (None, default_collate)
        return DataLoader(
            Subset(self.dataset, self.indices.tolist()),
            batch_size=self.batch_size,
            collate_fn=self.collate_fn if own else _collate,
        )


def _collate(examples: list[Any]) -> Any:
    """Put examples together as PyTorch does by default, or raise what to do about them."""
    try:
        return default_collate(examples)
    except (RuntimeError, TypeError) as error:
        raise IFVPUsageError(
            f"examples cannot be put together by PyTorch's default_collate ({error}); give "
            "ModelData(model, dataset, collate_fn=...), which makes a batch of a list of examples, "
            "such as by torch.nn.utils.rnn.pad_sequence where lengths differ."
        ) from error


def indexed_batches(data: Any, *, indexed: bool = True) -> Iterator[tuple[Indices | None, Any]]:
    """Yield batches, with the positions of their examples in the dataset.

    Parameters
    ----------
    data : ModelData, DataLoader or iterable of batches
    indexed : bool, default=True
        Whether positions are wanted; a loader is iterated over as it is when not.

    Yields
    ------
    indices : ndarray of int, or None
        Positions of the batch's examples, whatever the order of the loader; None where they are
        not wanted, or cannot be known (an iterable that is no plain map-style loader).
    batch
        As the loader gives it.
    """
    if isinstance(data, ModelData):
        for i, batch in enumerate(data.batches()):
            yield data.indices[i * data.batch_size : (i + 1) * data.batch_size], batch
    elif (
        indexed
        and type(data) is DataLoader
        and data.batch_sampler is not None
        and not isinstance(data.dataset, IterableDataset)
    ):
        yield from tagged_batches(data)
    else:
        for batch in data:
            yield None, batch


def described(value: Any) -> str:
    """Return how a message tells what a value is that it has no use for."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def check_batches(data: Any) -> Any:
    """Return data that can be iterated over in batches, or raise what it is instead.

    What a `DistributedSampler` repeats, so that all ranks have as many examples, is left out.

    Raises
    ------
    IFVPUsageError
        If it is a dataset, a batch, or nothing iterable; or if examples are repeated in a way that
        cannot be undone.
    """
    if isinstance(data, DataLoader):
        return without_repeats(data)
    if isinstance(data, ModelData):
        return data
    remedy = "give a DataLoader, another iterable of batches, or ModelData(model, dataset)"
    if isinstance(data, Dataset):
        raise IFVPUsageError(f"dataloader is a dataset ({type(data).__name__}); {remedy}.")
    if isinstance(data, Tensor | np.ndarray) or (
        isinstance(data, tuple) and any(isinstance(item, Tensor) for item in data)
    ):
        raise IFVPUsageError(f"dataloader is a single batch; {remedy}, such as [(x, y)].")
    if not isinstance(data, Iterable) or isinstance(data, str | bytes | Mapping):
        raise IFVPUsageError(f"dataloader is {described(data)}; {remedy}.")
    return data


def check_model_data(data: Any, name: str) -> None:
    """Raise if an argument, by its name, is no `ModelData`."""
    if not isinstance(data, ModelData):
        raise IFVPUsageError(f"{name} must be a ModelData(model, dataset); got {described(data)}.")


def _target(example: Any) -> Any:
    """Return the target of an example, by the rule for batches."""
    if hasattr(example, "keys") and "labels" in example:
        return example["labels"]
    if isinstance(example, tuple | list) and len(example) > 1:
        return example[-1]
    raise IFVPUsageError(
        "an example has no target: expected a tuple or list (*inputs, target), or a mapping with "
        f"'labels'; got {described(example)}. Give scikit-learn labels of your own for its splits."
    )


def _is_full_slice(part: Any) -> bool:
    return isinstance(part, slice) and part == slice(None)


def _map_style(dataset: Any) -> Any:
    foreign = isinstance(dataset, ModelData | IterableDataset | nn.Module | Mapping | str | type)
    table = bool(_to_numpy(dataset)) and not isinstance(dataset, Dataset)
    indexable = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if foreign or table or not indexable:
        raise IFVPUsageError(
            "dataset must have a length and be indexable by integers; got "
            f"{described(dataset)}{_to_numpy(dataset)}. "
            "Give a map-style Dataset, a DataLoader of one, or a tuple of tensors; a stream of "
            "batches goes to fit(model, dataloader) directly."
        )
    return dataset


def _of_columns(listed: tuple[Any, ...] | list[Any]) -> Any:
    """Return the dataset that a tuple of inputs and targets is, or a list of examples as it is."""
    if any(map(_is_column, listed)):
        return _paired(listed)
    unknown = [item for item in listed if not isinstance(item, tuple | list | Mapping)]
    if isinstance(listed, tuple) and unknown:
        kinds = ", ".join(type(item).__name__ for item in listed)
        raise IFVPUsageError(
            f"dataset is a tuple of {kinds}; give (inputs, targets) as tensors or arrays"
            f"{_to_numpy(unknown[0])}, or datasets of equal length, or a list of examples."
        )
    if isinstance(listed, tuple) and {type(item) for item in listed} == {list}:
        raise IFVPUsageError(
            "dataset is a tuple of lists, which may be inputs and targets, or examples; give "
            "(inputs, targets) as tensors or arrays, or a list of examples, such as "
            "list(zip(inputs, targets))."
        )
    return listed


def _to_numpy(table: Any) -> str:
    """Return how a table becomes an array, where it is one."""
    ways = [way for way in ("to_numpy", "toarray") if hasattr(table, way)]
    return f", such as table.{ways[0]}()" if ways else ""


def _is_column(item: Any) -> bool:
    """Whether something has one entry per example, and cannot be an example itself."""
    return isinstance(item, Tensor | np.ndarray | Dataset | Sequence) and not isinstance(
        item, tuple | list | str | bytes
    )


def _paired(columns: Sequence[Any]) -> Dataset[Any]:
    """Return the dataset whose examples are tuples of one entry of each column."""
    sized = [_is_column(item) and hasattr(item, "__len__") for item in columns]
    if not all(sized) or any(isinstance(item, IterableDataset) for item in columns):
        kinds = ", ".join(type(item).__name__ for item in columns)
        raise IFVPUsageError(
            f"dataset holds {kinds}; give (inputs, targets) as tensors, arrays, or datasets that "
            "have a length."
        )
    for item in columns:
        if isinstance(item, np.ndarray) and item.dtype.kind not in "biuf":
            raise IFVPUsageError(
                f"dataset holds an array of dtype {item.dtype}; give numbers, and classes as "
                "integers, for instance by sklearn.preprocessing.LabelEncoder."
            )
    parts = [tensor_of(item) if isinstance(item, np.ndarray) else item for item in columns]
    lengths = [0 if isinstance(part, Tensor) and not part.ndim else len(part) for part in parts]
    if len(set(lengths)) != 1:
        raise IFVPUsageError(
            f"dataset holds inputs and targets of lengths {lengths}; they must be equal, one entry "
            "per example."
        )
    together = all(isinstance(part, Tensor) for part in parts)
    return TensorDataset(*parts) if together else StackDataset(*parts)  # type: ignore[arg-type]


def _positions(indices: Any, n: int) -> npt.NDArray[np.integer[Any]]:
    positions = np.asarray(indices)
    if positions.ndim != 1 or (positions.dtype.kind not in "iu" and positions.size):
        raise IFVPUsageError(
            f"indices must be a 1-D sequence of integers; got shape {positions.shape} of dtype "
            f"{positions.dtype}."
        )
    positions = positions.astype(np.intp)
    if positions.size and not (-n <= positions.min() and positions.max() < n):
        raise IFVPUsageError(
            f"indices run from {positions.min()} to {positions.max()}, outside a dataset of {n} "
            "examples."
        )
    return positions % n if n else positions
