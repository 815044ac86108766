"""LAPACK's divide-and-conquer eigensolver, in the memory of the matrix.

NumPy, SciPy and PyTorch copy the matrix once or twice on the way to it, and SciPy holds the
interpreter's lock meanwhile, so that matrices cannot be decomposed side by side. The routine is
SciPy's, by the pointer that ``scipy.linalg.cython_lapack`` publishes for other languages.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import cython_lapack

__all__ = ["LARGEST", "eigh_in_place"]

#: The most rows whose workspace a 32-bit integer can count.
LARGEST = 32_766


def eigh_in_place(matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Eigendecompose a symmetric matrix, and overwrite it by its eigenvectors, in rows.

    Other threads run meanwhile. It takes a workspace of twice the matrix.

    Parameters
    ----------
    matrix : ndarray of shape (m, m)
        Contiguous, of at most `LARGEST` rows; only its lower triangle is read.

    Returns
    -------
    eigenvalues : ndarray of shape (m,)
        Ascending.

    Raises
    ------
    numpy.linalg.LinAlgError
        If the iteration does not converge.
    """
    m = len(matrix)
    eigenvalues = np.empty(m)
    work = np.empty(1 + 6 * m + 2 * m * m)
    integers = np.empty(3 + 5 * m, np.intc)
    info = ctypes.c_int()
    _dsyevd()(
        b"V",
        b"U",  # by columns, as LAPACK sees the matrix, its lower triangle is the upper one
        ctypes.byref(ctypes.c_int(m)),
        matrix.ctypes.data,
        ctypes.byref(ctypes.c_int(m)),
        eigenvalues.ctypes.data,
        work.ctypes.data,
        ctypes.byref(ctypes.c_int(len(work))),
        integers.ctypes.data,
        ctypes.byref(ctypes.c_int(len(integers))),
        ctypes.byref(info),
    )
    if info.value:
        raise np.linalg.LinAlgError(f"LAPACK's dsyevd did not converge (info={info.value})")
    return eigenvalues


@cache
def _dsyevd() -> Callable[..., Any]:
    """Return the routine, which takes addresses only."""
    capsule = cython_lapack.__pyx_capi__["dsyevd"]
    name_of, pointer_of = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    pointer = pointer_of(capsule, name_of(capsule))
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 11)(pointer)
