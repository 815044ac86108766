"""LAPACK's divide-and-conquer eigensolver, in two squares of float64 and the matrix's memory.

NumPy, SciPy and PyTorch take three squares or more, and SciPy holds the interpreter's lock
meanwhile, so that matrices cannot be decomposed side by side. The routines are SciPy's, by the
pointers that ``scipy.linalg.cython_lapack`` publishes for other languages.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import cython_lapack

__all__ = ["LARGEST", "eigh_in_place"]

#: The most rows whose workspace a 32-bit integer can count.
LARGEST = 46_333

# Numbers in a line of a cache.
_LINE = 8


def eigh_in_place(matrix: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Eigendecompose a matrix in float64, and overwrite it by its eigenvectors, in columns.

    Other threads run meanwhile. The steps are those of LAPACK's ``dsyevd``, which keeps the
    reflectors of the first in a square of their own until the last needs them; here they wait in
    the memory of the matrix, where that is contiguous.

    Parameters
    ----------
    matrix : ndarray of shape (m, m)
        In float32 or float64, symmetric and positive semi-definite, of at least 3 and at most
        `LARGEST` rows; only its upper triangle is read.

    Returns
    -------
    eigenvalues : ndarray of shape (m,)
        Ascending.

    Raises
    ------
    numpy.linalg.LinAlgError
        If the iteration does not converge. The matrix is lost.
    """
    m = len(matrix)
    stride = _stride(m)
    work, vectors = np.empty(1 + 4 * m + m * stride), np.empty((m, stride))
    square = work[: m * stride].reshape(m, stride)
    values, beside, scales = np.empty((3, m))
    integers = np.empty(3 + 5 * m, np.intc)

    # Numbers around one neither overflow nor vanish when they are squared. The largest is on the
    # diagonal; dividing by a power of two is exact.
    unit = 2.0 ** (math.frexp(matrix.diagonal().max())[1] - 1)
    np.divide(matrix, unit, out=square[:, :m], dtype=np.float64)
    kept = _float64_within(matrix, m * (m - 1) // 2)

    # By columns, as LAPACK sees the square, its upper triangle is the lower one ("L"), and its
    # second number begins what is below the diagonal: the reflectors.
    reflectors = square.reshape(-1)[1:]
    _call("dsytrd", b"L", m, square, stride, values, beside, scales, vectors, vectors.size)
    _call("dtrttp", b"L", m - 1, reflectors, stride, kept)
    space = work, len(work), integers, len(integers)
    _call("dstedc", b"I", m, values, beside, vectors, stride, *space)
    _call("dtpttr", b"L", m - 1, kept, reflectors, stride)
    back = b"L", b"L", b"N", m, m, square, stride, scales, vectors, stride
    _call("dormtr", *back, kept, len(kept))
    matrix[...] = vectors[:, :m].T
    return values * unit


def _stride(m: int) -> int:
    """Return how far rows of m numbers lie apart: an odd number of lines of a cache.

    So they spread over all of it, where rows a power of two apart would push each other out.
    """
    return _LINE * (math.ceil(m / _LINE) | 1)


def _float64_within(matrix: npt.NDArray[np.floating], number: int) -> npt.NDArray[np.float64]:
    """Return so many numbers in the memory of a matrix, from an address that suits them."""
    memory = matrix.ravel().view(np.uint8)
    start = -memory.ctypes.data % np.dtype(np.float64).alignment
    return memory[start:][: 8 * number].view(np.float64)


def _call(name: str, *arguments: bytes | int | npt.NDArray[Any]) -> None:
    """Call a routine, which takes addresses only, the last of them to tell of failure."""
    info = ctypes.c_int()
    _routine(name, len(arguments) + 1)(*map(_address, arguments), ctypes.byref(info))
    if info.value:
        raise np.linalg.LinAlgError(f"LAPACK's {name} did not converge (info={info.value})")


def _address(argument: bytes | int | npt.NDArray[Any]) -> Any:
    if isinstance(argument, bytes):
        return argument
    if isinstance(argument, int):
        return ctypes.byref(ctypes.c_int(argument))
    return argument.ctypes.data


@cache
def _routine(name: str, arguments: int) -> Callable[..., Any]:
    capsule = cython_lapack.__pyx_capi__[name]
    name_of, pointer_of = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    pointer = pointer_of(capsule, name_of(capsule))
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * arguments)(pointer)
