"""What a fit that was interrupted goes on from: its statistics, and where in the data they end."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fimkit import serialization
from fimkit.data import described
from fimkit.distributed import Ranks
from fimkit.estimators.description import DAMAGE, Restorer, describe
from fimkit.exceptions import IFVPUsageError
from fimkit.statistics import GrowingList

__all__ = ["Checkpoint"]


class Checkpoint:
    """The files of one fit in a folder, each there whole or not at all.

    A rank has one file for the pass it is in, and files of rows, which are written once. The file
    of a pass is removed when all ranks have one of the next, so that they can always go on in the
    same pass.

    Parameters
    ----------
    folder : str or path
        Made if absent.
    every : int
        Batches from one writing to the next.
    ranks : Ranks
    identity : mapping of str to object
        What the fit is of, by name, as JSON can hold it.
    device : torch.device
        Where tensors that are read go.

    Raises
    ------
    IFVPUsageError
        If the folder holds files of another fit, naming the difference, or is no folder that files
        can be written into.
    """

    def __init__(
        self,
        folder: Any,
        every: int,
        ranks: Ranks,
        identity: Mapping[str, Any],
        device: torch.device,
    ) -> None:
        self.every = every
        self._folder = _made(folder)
        self._ranks = ranks
        self._identity = json.loads(json.dumps(identity))
        self._device = device
        self._prefix = f"rank-{ranks.rank}-of-{ranks.size}."
        self._growing: dict[str, tuple[int, list[int]]] = {}
        self._n_files = 0
        for path in self._folder.glob(f".{self._prefix}*"):  # killed while writing
            path.unlink()
        for path in self._folder.glob("rank-*-of-*"):
            if f"-of-{ranks.size}." not in path.name:
                raise self._foreign(f"it was made by another number of processes than {ranks.size}")

    def read(self) -> dict[str, Any] | None:
        """Return the state from which all ranks can go on; None if they are to begin.

        The ranks meet in this.
        """
        passes = [i for i in range(2) if self._path(i).exists()]
        common = min(self._ranks.gather(max(passes, default=-1)))
        state = None
        with self._ranks.together():
            if common >= 0 and self._path(common).exists():
                state = self._read(common)
            elif passes:  # of another fit it is refused, of this one it is left behind
                self._checked(passes[-1])
        if common < 0:
            self.remove()
        return state

    def write(self, state: Mapping[str, Any]) -> None:
        """Write the state of a fit, whose ``"pass"`` tells the pass it is in."""
        new: dict[str, list[Any]] = {}
        fixed = self._without_rows(state, "state", new)
        if new:
            tensors: dict[str, Tensor] = {}
            header = {"rows": describe(new, "rows", tensors)}
            serialization.write(self._rows_path(self._n_files), header, tensors)
            self._n_files += 1
        tensors = {}
        header = {
            "identity": self._identity,
            "state": describe(fixed, "state", tensors),
            "growing": self._growing,
            "n_files": self._n_files,
        }
        serialization.write(self._path(state["pass"]), header, tensors)

    def forget(self, number: int) -> None:
        """Remove the file of a pass that all ranks have ended."""
        self._path(number).unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove all files of this rank, those first that need the others."""
        for number in range(2):
            self.forget(number)
        for path in self._folder.glob(f"{self._prefix}*"):
            path.unlink()

    def _path(self, number: int) -> Path:
        return self._folder / f"{self._prefix}pass-{number}.fimkit"

    def _rows_path(self, number: int) -> Path:
        return self._folder / f"{self._prefix}rows-{number}.fimkit"

    def _read(self, number: int) -> dict[str, Any]:
        header, tensors = self._checked(number)
        with self._reading(self._path(number)):
            self._n_files = header["n_files"]
            self._growing = {name: (n, files) for name, (n, files) in header["growing"].items()}
            state = Restorer(tensors, self._device).restore(header["state"])
        rows: dict[str, GrowingList] = {name: GrowingList() for name in self._growing}
        for i in sorted({i for _, files in self._growing.values() for i in files}):
            with self._reading(self._rows_path(i)):
                parts = serialization.read(self._rows_path(i))
                found = Restorer(parts[1], self._device).restore(parts[0]["rows"])
                for name, items in found.items():
                    if i in self._growing[name][1]:
                        rows[name].extend(items)
        with_rows: dict[str, Any] = _with_rows(state, rows)
        return with_rows

    def _checked(self, number: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the contents of a pass's file, or raise if they are of another fit."""
        with self._reading(self._path(number)):
            header, tensors = serialization.read(self._path(number))
            theirs: dict[str, Any] = header["identity"]
        for name in {**theirs, **self._identity}:
            if theirs.get(name) != self._identity.get(name):
                raise self._foreign(
                    f"{name} was {theirs.get(name, 'absent')!s:.200}, and is now "
                    f"{self._identity.get(name, 'absent')!s:.200}"
                )
        return header, tensors

    @contextmanager
    def _reading(self, path: Path) -> Iterator[None]:
        """Raise what to do where a file is gone, was cut off, or holds something else."""
        try:
            yield
        except (OSError, *DAMAGE) as error:
            why = "is not there" if isinstance(error, FileNotFoundError) else "cannot be read"
            raise IFVPUsageError(
                f"checkpoint={str(self._folder)!r}: {path.name!r}, of the interrupted fit, {why} "
                f"({type(error).__name__}: {error}). Remove the folder's files to begin anew."
            ) from error

    def _without_rows(self, value: Any, name: str, new: dict[str, list[Any]]) -> Any:
        """Return a state without lists of rows, putting those not written yet into ``new``."""
        if isinstance(value, GrowingList):
            count, files = self._growing.get(name, (0, []))
            if len(value) < count:  # they became a matrix
                count, files = 0, []
            if len(value) > count:
                new[name] = list(value[count:])
                files = [*files, self._n_files]
            self._growing[name] = len(value), files
            return {"rows of": name}
        if isinstance(value, Mapping):
            return {k: self._without_rows(v, f"{name}.{k}", new) for k, v in value.items()}
        return value

    def _foreign(self, difference: str) -> IFVPUsageError:
        return IFVPUsageError(
            f"checkpoint={str(self._folder)!r} holds the state of another fit: {difference}. Go on "
            "with that fit, give another folder, or remove its files."
        )


def _made(folder: Any) -> Path:
    """Return a folder, made if absent, or raise why nothing can be written into it."""
    if not isinstance(folder, str | os.PathLike):
        raise IFVPUsageError(
            f"checkpoint is {described(folder)}; expected the path of a folder, or None."
        )
    path = Path(os.fsdecode(folder)).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _useless(folder, str(error)) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise _useless(folder, "no permission to write into it")
    return path


def _useless(folder: Any, why: str) -> IFVPUsageError:
    return IFVPUsageError(
        f"checkpoint={os.fsdecode(folder)!r} is no folder that files can be written into: {why}. "
        "Give the path of another, which is made if absent."
    )


def _with_rows(value: Any, rows: Mapping[str, GrowingList]) -> Any:
    if isinstance(value, dict):
        if set(value) == {"rows of"}:
            return rows[value["rows of"]]
        return {key: _with_rows(item, rows) for key, item in value.items()}
    return value
