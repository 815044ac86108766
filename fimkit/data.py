"""Batches of a data loader, and a model with its data as something scikit-learn can slice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate

from fimkit.exceptions import IFVPUsageError

__all__ = ["ModelData"]


class ModelData:
    """A model together with a dataset: n examples by p parameters, without the numbers.

    Stands for the matrix of per-example gradients wherever scikit-learn or fimkit takes data:
    ``fit(ModelData(model, dataset))`` is ``fit(model, loader)``, and as ``vectors`` it is the
    gradients of its examples. Slicing it slices the examples; the model is shared, never copied.

    Parameters
    ----------
    model : torch.nn.Module
        The trained model.
    dataset : Dataset, DataLoader, or tuple of tensors or arrays
        A map-style dataset; a loader of one, whose dataset, batch size and collate function are
        taken; or ``(inputs, targets)`` arrays of equal length.
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
                f"model must be a torch.nn.Module; got {type(model).__name__}. Give "
                "ModelData(model, dataset)."
            )
        if isinstance(dataset, DataLoader):
            batch_size = dataset.batch_size or batch_size
            collate_fn = collate_fn or dataset.collate_fn
            dataset = dataset.dataset
        self.model = model
        self.dataset = _map_style(dataset)
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise IFVPUsageError(f"batch_size must be an integer of at least 1; got {batch_size!r}.")
        self.batch_size = batch_size
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
        """Targets of the examples, shape ``(n,)`` or ``(n, ...)``: each one's last element or labels.

        Reads every example once.
        """
        if isinstance(self.dataset, TensorDataset):
            return np.asarray(self.dataset.tensors[-1][self.indices].cpu())
        targets = []
        for index in self.indices:
            example = self.dataset[int(index)]
            target = example["labels"] if hasattr(example, "keys") else example[-1]
            targets.append(np.asarray(target.cpu() if isinstance(target, Tensor) else target))
        return np.stack(targets)

    def __getitem__(self, key: Any) -> ModelData:
        """Return the examples that an index, slice, mask or index array selects.

        A tuple's first element selects examples; the rest must select all parameters.
        """
        if isinstance(key, tuple):
            key, *rest = key
            if any(part is not Ellipsis and part != slice(None) for part in rest):
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
        try:
            indices = np.atleast_1d(self.indices[key])
        except IndexError as error:
            raise IndexError(
                f"cannot select examples of a ModelData of length {len(self)} with {key!r}: "
                f"{error}"
            ) from None
        return ModelData(
            self.model,
            self.dataset,
            batch_size=self.batch_size,
            collate_fn=self.collate_fn,
            indices=indices,
        )

    def __repr__(self) -> str:
        n, p = self.shape
        return f"ModelData({type(self.model).__name__}, n={n}, p={p})"

    def __iter__(self) -> Iterator[Any]:
        raise TypeError("a ModelData is not iterated over; slice it, or use its batches().")

    def batches(self) -> DataLoader[Any]:
        """Return a loader of the examples, in order."""
        return DataLoader(
            Subset(self.dataset, self.indices.tolist()),
            batch_size=self.batch_size,
            collate_fn=self.collate_fn or default_collate,
        )


def _map_style(dataset: Any) -> Dataset[Any] & Sized:
    raise NotImplementedError
