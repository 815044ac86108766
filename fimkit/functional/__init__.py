"""Inverse-Fisher-vector products of plain functions, without an estimator."""

from fimkit.exceptions import IFVPUsageError
from fimkit.functional.cache import EKFAC_CACHE_KEY, MLPCache, manual_cache_forward
from fimkit.functional.datainf import ifvp_at_x_datainf, ifvp_datainf
from fimkit.functional.ekfac import ifvp_at_x_ekfac
from fimkit.functional.examples import per_example, single_example
from fimkit.functional.explicit import ifvp_at_x_explicit, ifvp_explicit

__all__ = [
    "EKFAC_CACHE_KEY",
    "IFVPUsageError",
    "MLPCache",
    "ifvp_at_x_datainf",
    "ifvp_at_x_ekfac",
    "ifvp_at_x_explicit",
    "ifvp_datainf",
    "ifvp_explicit",
    "manual_cache_forward",
    "per_example",
    "single_example",
]
