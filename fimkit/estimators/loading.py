"""Fitted estimators out of the files that they were saved in."""

from __future__ import annotations

import os
from typing import Any

import torch

from fimkit import serialization
from fimkit.estimators.base import FisherEstimator
from fimkit.estimators.datainf import DataInf
from fimkit.estimators.description import DAMAGE, Restorer
from fimkit.estimators.ekfac import EKFAC, KFAC, Diagonal
from fimkit.estimators.explicit import Explicit
from fimkit.estimators.settings import Settings, usable_device
from fimkit.exceptions import IFVPUsageError
from fimkit.operators import Operator
from fimkit.vectors import ParameterSpace

__all__ = ["load"]

_METHODS = {cls.__name__: cls for cls in (EKFAC, KFAC, DataInf, Diagonal, Explicit)}

# What every fit has, and of what type it is.
_FITTED: dict[str, type] = {
    "_blocks": dict,
    "_settings": Settings,
    "_space": ParameterSpace,
    "_traces": list,
    "coverage_": dict,
    "dtype_": torch.dtype,
    "fisher_": Operator,
    "n_features_in_": int,
    "n_samples_seen_": int,
    "parameter_names_": list,
    "parameter_shapes_": dict,
}


def load(
    path: str | os.PathLike[str], *, device: str | torch.device = "cpu", loss: Any = None
) -> FisherEstimator:
    """Return the fitted estimator that was saved in a file.

    The file is data: no code in it is run, so it may come from anyone.

    Parameters
    ----------
    path : str or path
        As given to ``save`` of an estimator.
    device : str or torch.device, default="cpu"
        Where the estimator's tensors go, wherever they were.
    loss : callable, optional
        Needed where the fit had a function or a module for its ``loss``, and then that one: it is
        code. Ignored otherwise.

    Returns
    -------
    estimator : estimator
        Which answers as the one that was saved.

    Raises
    ------
    IFVPUsageError
        If the file was not written by fimkit, or by a later version of the format, or is damaged;
        or if ``loss`` is needed, or ``device`` is of no use.

    Examples
    --------
    >>> import tempfile, torch, fimkit
    >>> x, y = torch.randn(20, 3), torch.arange(20) % 2
    >>> ekfac = fimkit.EKFAC(0.1).fit(torch.nn.Linear(3, 2), [(x, y)])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ekfac.save(f"{folder}/linear.fimkit")
    ...     loaded = fimkit.load(f"{folder}/linear.fimkit")
    >>> v = torch.ones(8)
    >>> torch.equal(loaded.transform(v), ekfac.transform(v))
    True
    """
    header, tensors = serialization.read(path)
    restorer = Restorer(tensors, usable_device(device), loss)
    try:
        estimator = _METHODS[header["class"]](**restorer.restore(header["parameters"]))
        fitted = restorer.restore(header["fitted"])
        for name, kind in _FITTED.items():
            if not isinstance(fitted[name], kind):
                raise TypeError(f"{name} is of type {type(fitted[name]).__name__}")
        widths = {fitted["fisher_"].size, fitted["_space"].size, fitted["n_features_in_"]}
        blocks = sum(columns.size for columns in fitted["_blocks"].values())
        if widths != {blocks} or len(fitted["_traces"]) != len(fitted["_blocks"]):
            raise ValueError(f"parts of it have {sorted({*widths, blocks})} parameters")
    except IFVPUsageError:
        raise
    except DAMAGE as error:
        raise IFVPUsageError(
            f"{str(path)!r} is damaged: {type(error).__name__}: {error}."
        ) from error
    estimator.__dict__.update(fitted, device_=restorer.device)
    return estimator
