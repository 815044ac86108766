"""fimkit: Fisher information matrices of PyTorch models, and their inverses times vectors."""

from fimkit import functional, influence, losses
from fimkit.data import ModelData
from fimkit.estimators import EKFAC, KFAC, DataInf, Diagonal, Explicit, RegularizationCV, load
from fimkit.exceptions import IFVPUsageError, RankError, SingularFisherError

__all__ = [
    "EKFAC",
    "KFAC",
    "DataInf",
    "Diagonal",
    "Explicit",
    "IFVPUsageError",
    "ModelData",
    "RankError",
    "RegularizationCV",
    "SingularFisherError",
    "functional",
    "influence",
    "load",
    "losses",
]

__version__ = "0.1.0"
