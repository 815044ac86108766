"""What a user holds: one estimator per method."""

from fimkit.estimators.datainf import DataInf
from fimkit.estimators.ekfac import EKFAC, KFAC, Diagonal
from fimkit.estimators.explicit import Explicit
from fimkit.estimators.loading import load
from fimkit.estimators.regularization_cv import RegularizationCV

__all__ = ["EKFAC", "KFAC", "DataInf", "Diagonal", "Explicit", "RegularizationCV", "load"]
