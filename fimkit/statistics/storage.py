"""Rows of every batch in files of a folder, mapped into memory."""

from __future__ import annotations

import math
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NoReturn, Self

import torch
from torch import Tensor

from fimkit.distributed import Ranks
from fimkit.exceptions import IFVPUsageError
from fimkit.operators import Columns, RowMatrix, Rows, ZeroRows, join_rows, join_weights
from fimkit.operators.memory import chunks
from fimkit.statistics.rows import divided

__all__ = ["RowFolder", "StoredRowAccumulator"]

# Names of what fits make in the user's folder, and of the lock in each fit's own.
_PREFIX = "fimkit-rows-"
_GUARD = "fimkit.lock"
_LOCK = "lock"


class RowFolder:
    """A subfolder of one fit, which is there for as long as this object, and then removed.

    A lock on a file in it says that its process lives. Subfolders whose lock is free are leftovers
    of a crash; making a new one removes them. As a context manager it is removed at once when the
    body fails.

    Parameters
    ----------
    parent : str or path
        The user's folder; made if absent.

    Raises
    ------
    IFVPUsageError
        If the folder cannot be made, written to or locked.
    """

    def __init__(self, parent: str | os.PathLike[str]) -> None:
        if not os.fspath(parent):
            raise IFVPUsageError("storage is empty; give a folder, or 'memory'.")
        parent = Path(parent).expanduser()
        try:
            parent.mkdir(parents=True, exist_ok=True)
            with _guarded(parent):
                _remove_leftovers(parent)
                self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent)).absolute()
                lock = (self.path / _LOCK).open("w")
                _lock(lock, wait=False)
        except OSError as error:
            raise IFVPUsageError(
                f"storage: the folder {str(parent)!r} cannot be used: {error.strerror or error}; "
                "give one that can be written to and locked, or storage='memory'."
            ) from error
        self._finalizer = weakref.finalize(self, _remove, self.path, lock, os.getpid())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.close()

    def __reduce__(self) -> NoReturn:
        raise IFVPUsageError(
            f"the rows of this fit are files in {self.path}, which are removed with it, so it can "
            "be neither pickled nor copied; fit with storage='memory' for that."
        )

    def close(self) -> None:
        """Remove the subfolder. Tensors that are mapped from it stay."""
        self._finalizer()


class StoredRowAccumulator:
    """Collects the rows of batches in files; a `RowAccumulator` for more than memory holds.

    Parameters
    ----------
    folder : RowFolder
    """

    def __init__(self, folder: RowFolder) -> None:
        self._folder = folder
        self._size = 0
        self._columns: list[Columns] = []
        self._groups: list[list[_Series]] = []
        self._weights: list[Tensor | None] = []

    def update(self, rows: RowMatrix) -> None:
        """Add the rows of one batch."""
        if not self._groups:
            self._size = rows.size
            self._columns = [columns for columns, _ in rows.groups]
            self._groups = [[] for _ in rows.groups]
        for i, (_, part) in enumerate(rows.groups):
            series = self._groups[i]
            if not series or not series[-1].continues(part):
                series.append(_Series(self._folder.path / f"{i}-{len(series)}", part))
            series[-1].append(part)
        self._weights.append(rows.weights)

    def result(self, ranks: Ranks | None = None) -> RowMatrix:
        """Return the rows of all batches, in order, mapped from the files of each rank."""
        groups = [
            (columns, _joined(series, self._folder.path / str(i)))
            for i, (columns, series) in enumerate(zip(self._columns, self._groups, strict=True))
        ]
        return divided(RowMatrix(groups, self._size, join_weights(self._weights)), ranks)


class _Series:
    """Rows of one form, one file per tensor that stores them.

    Parameters
    ----------
    prefix : Path
        Beginning of the files' paths.
    like : Rows
        Rows of that form.

    Attributes
    ----------
    n : int
        Number of examples.
    form : Rows
        Such rows of no example.
    """

    def __init__(self, prefix: Path, like: Rows) -> None:
        self.n = 0
        # No example, and no view of one, which would keep its whole batch.
        empty = like.examples(slice(0, 0))
        self.form = empty.with_tensors(*(tensor.clone() for tensor in empty.tensors))
        self._paths = [prefix.with_name(f"{prefix.name}-{j}.bin") for j in range(len(like.tensors))]

    def continues(self, rows: Rows) -> bool:
        """Whether rows are of this form, with as many rows and positions per example."""
        return _form(rows) == _form(self.form)

    def append(self, rows: Rows) -> None:
        """Add the rows of more examples."""
        self.n += rows.n
        for path, tensor in zip(self._paths, rows.tensors, strict=True):
            with path.open("ab") as file:
                file.write(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)

    def rows(self) -> Rows:
        """Return all rows, mapped from the files."""
        if isinstance(self.form, ZeroRows):
            return self.form.zeros(self.n, self.form.c)
        mapped = []
        for path, like in zip(self._paths, self.form.tensors, strict=True):
            shape = (self.n, *like.shape[1:])
            flat, size = like, math.prod(shape)
            if size:  # an empty file cannot be mapped
                flat = torch.from_file(str(path), shared=True, size=size, dtype=like.dtype)
            mapped.append(flat.view(shape))
        return self.form.with_tensors(*mapped)

    def remove(self) -> None:
        """Remove the files."""
        for path in self._paths:
            path.unlink()


def _form(rows: Rows) -> tuple[Any, ...]:
    """Return what rows that follow each other in a file have in common."""
    shapes = [tensor.shape[1:] for tensor in rows.tensors]
    return type(rows), rows.c, getattr(rows, "layout", None), shapes


def _joined(series: Sequence[_Series], prefix: Path) -> Rows:
    """Return the rows of several series as `join_rows` does, in files again."""
    if len(series) == 1:
        return series[0].rows()
    # Joined with no example of the others, some examples take the form that all have in common.
    forms = [part.form for part in series]
    joined = _Series(prefix, join_rows(forms))
    for part in series:
        rows = part.rows()
        first = join_rows([rows.examples(slice(0, 1)), *forms])
        for some in chunks(rows.n, sum(tensor.nbytes for tensor in first.tensors)):
            joined.append(join_rows([rows.examples(some), *forms]))
        part.remove()
    return joined.rows()


# -- locks -----------------------------------------------------------------------------------------


@contextmanager
def _guarded(parent: Path) -> Iterator[None]:
    """Keep others from making or removing subfolders meanwhile."""
    with (parent / _GUARD).open("w") as file:
        _lock(file, wait=True)
        yield


def _lock(file: IO[str], *, wait: bool) -> None:
    """Lock a file until it is closed, or raise BlockingIOError if it is locked and none waits."""
    if sys.platform == "win32":
        raise IFVPUsageError(
            "storage: a folder takes file locks that Windows does not have; use storage='memory'."
        )
    import fcntl

    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def _remove_leftovers(parent: Path) -> None:
    """Remove the subfolders of fits whose process has ended."""
    for path in parent.glob(f"{_PREFIX}*"):
        try:
            with (path / _LOCK).open("r+") as file:
                _lock(file, wait=False)
        except FileNotFoundError:  # a crash came before the lock, or it is no folder of a fit
            with suppress(OSError):
                path.rmdir()
        except OSError:  # in use, or another user's
            continue
        else:
            _remove_rows(path)


def _remove(path: Path, lock: IO[str], owner: int) -> None:
    """Remove a subfolder, unless this is a process that was forked from its owner."""
    if os.getpid() == owner:
        _remove_rows(path)
    lock.close()


def _remove_rows(path: Path) -> None:
    """Remove a subfolder, its lock last, which tells what a crash leaves of it from others'."""
    for file in path.glob("*"):
        if file.name != _LOCK:
            with suppress(OSError):
                file.unlink()
    shutil.rmtree(path, ignore_errors=True)
