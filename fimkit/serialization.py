"""Tensors and a JSON header in one file: the safetensors format, in which nothing is code.

A file is the length of its description (8 bytes, little-endian), the description as JSON, and the
tensors' bytes one after another. What fimkit writes has a version beside its header; a file of a
later version is refused.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

import fimkit
from fimkit.exceptions import IFVPUsageError

__all__ = ["read", "write"]

VERSION = 1

# What contents that nothing wrote may raise.
_DAMAGE = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
    RuntimeError,
)

_DTYPES = {
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

# No description is longer; a foreign file's first bytes may claim so.
_LONGEST = 100_000_000


def write(
    path: str | os.PathLike[str], header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write a file, which is there whole or not at all.

    Parameters
    ----------
    path : str or path
        A file of that name is replaced.
    header : mapping
        What JSON can hold.
    tensors : mapping of str to Tensor
        On any device.

    Raises
    ------
    FileNotFoundError
        If there is no such folder.
    """
    text = json.dumps(header)
    metadata = {
        "format": "fimkit",
        "format_version": str(VERSION),
        "fimkit_version": fimkit.__version__,
        "header": text,
        "header_sha256": _digest(text),
    }
    description: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        description[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(description).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the tensors' bytes are aligned
    target = Path(path).expanduser()
    if not target.parent.is_dir():
        raise FileNotFoundError(
            errno.ENOENT, "there is no such folder to write into; make it first", str(target.parent)
        )
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with partial.open("xb") as file:
            file.write(len(encoded).to_bytes(8, "little"))
            file.write(encoded)
            for tensor in tensors.values():
                file.write(_bytes_of(tensor.detach().cpu().contiguous()))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a file that `write` wrote.

    Returns
    -------
    header : dict
    tensors : dict of str to Tensor
        On the CPU.

    Raises
    ------
    IFVPUsageError
        If the file was not written by fimkit, or by a later format of it, or is damaged.
    """
    with Path(path).expanduser().open("rb") as file:
        try:
            description = _described(file)
            metadata = description.pop("__metadata__")
            known = metadata["format"] == "fimkit"
        except _DAMAGE:
            known = False
        if not known:
            raise IFVPUsageError(
                f"{str(path)!r} is no file of fimkit, or not a whole one; give one that was "
                "written by an estimator's save(path)."
            )
        try:
            version = int(metadata["format_version"])
            if version > VERSION:
                raise IFVPUsageError(
                    f"{str(path)!r} was written by fimkit {metadata['fimkit_version']} in version "
                    f"{version} of the format, and fimkit {fimkit.__version__} reads up to "
                    f"{VERSION}; install a later fimkit."
                )
            if version < 1:
                raise ValueError(f"there is no version {version} of the format")
            text = metadata["header"]
            if metadata.get("header_sha256", _digest(text)) != _digest(text):  # old files have none
                raise ValueError("its header is not the one that was written")
            header: dict[str, Any] = json.loads(text)
            return header, _tensors(file, description)
        except IFVPUsageError:
            raise
        except _DAMAGE as error:
            raise IFVPUsageError(f"{str(path)!r} is damaged: {error}.") from error


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _described(file: IO[bytes]) -> dict[str, Any]:
    """Return the description that a file starts with, having read all before the tensors."""
    length = int.from_bytes(file.read(8), "little")
    if length > _LONGEST:
        raise ValueError("the description is too long")
    description: dict[str, Any] = json.loads(file.read(length))
    return description


def _tensors(file: IO[bytes], description: Mapping[str, Any]) -> dict[str, Tensor]:
    start = file.tell()
    present = file.seek(0, os.SEEK_END) - start
    file.seek(start)
    # All is checked before memory is taken for any of it.
    expected = 0
    for name, entry in description.items():
        shape, itemsize = entry["shape"], _DTYPES[entry["dtype"]].itemsize
        if any(not isinstance(size, int) or size < 0 for size in shape):
            raise ValueError(f"{name!r} has the shape {shape}")
        begin, end = entry["data_offsets"]
        if begin != expected or end - begin != math.prod(shape) * itemsize:
            raise ValueError(f"{name!r} of shape {shape} is said to be bytes {begin} to {end}")
        expected = end
    if present != expected:
        raise ValueError(f"its tensors take {expected} bytes, and {present} are there")
    tensors = {}
    for name, entry in description.items():
        tensor = torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]])
        if tensor.numel():
            file.readinto(_bytes_of(tensor))  # type: ignore[attr-defined]
        tensors[name] = tensor
    return tensors


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    if not tensor.numel():
        return memoryview(b"")
    return tensor.view(-1).view(torch.uint8).numpy().data
