"""Inputs and outputs of linear maps, recorded by a module's own forward."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor, nn

from fimkit.exceptions import IFVPUsageError
from fimkit.gradients.ownership import version

__all__ = ["EKFAC_CACHE_KEY", "MLPCache", "RecordedPair", "manual_cache_forward"]

#: Name of the attribute by which a module finds its `MLPCache`.
EKFAC_CACHE_KEY = "_ekfac_cache"


class RecordedPair(tuple[Tensor, Tensor]):
    """An input and its hidden vectors, stamped with the versions that the tensors had.

    Parameters
    ----------
    pair : tuple of (Tensor, Tensor)
    """

    versions: tuple[int, ...]

    def __new__(cls, pair: Any) -> RecordedPair:
        """Check and stamp a pair."""
        if not (
            isinstance(pair, tuple | list)
            and len(pair) == 2
            and all(isinstance(tensor, Tensor) for tensor in pair)
        ):
            given = type(pair).__name__
            if isinstance(pair, tuple | list):
                given += f" of {', '.join(type(item).__name__ for item in pair) or 'nothing'}"
            raise IFVPUsageError(
                f"input_hidden_pairs was given a {given}; expected a pair of tensors, the input "
                "of a linear map and its output."
            )
        recorded = super().__new__(cls, pair)
        recorded.versions = recorded._versions_now()
        return recorded

    def modified(self) -> bool:
        """Whether either tensor was changed in place since."""
        return self.versions != self._versions_now()

    def _versions_now(self) -> tuple[int, ...]:
        return tuple(version(tensor) for tensor in self)


class _RecordedPairs(list[tuple[Tensor, Tensor]]):
    """A list whose pairs are checked and stamped as they are appended."""

    def append(self, pair: tuple[Tensor, Tensor]) -> None:
        super().append(RecordedPair(pair))


class MLPCache:
    """The inputs and hidden vectors that one module's forward records for `ifvp_at_x_ekfac`.

    The module is given its cache as the attribute `EKFAC_CACHE_KEY`, and a forward decorated with
    `manual_cache_forward`, which appends one pair per linear map.

    Attributes
    ----------
    input_hidden_pairs : list of (Tensor, Tensor)
        Per layer the input, of shape ``(B, ..., in)``, and the hidden vectors that the layer makes
        of it, ``(B, ..., out)``: the very tensor that the forward goes on with, so that the loss
        depends on it. To fold in a bias, append the input with a last column of ones.

    See Also
    --------
    manual_cache_forward : Has an example.
    """

    input_hidden_pairs: list[tuple[Tensor, Tensor]]

    def __init__(self) -> None:
        self.stop()

    def clear(self) -> None:
        """Forget the pairs of the last forward."""
        self.input_hidden_pairs = _RecordedPairs()

    def start(self) -> None:
        """From here on, keep the pairs of every forward, not only of the last."""
        self.stop()
        self._recording = True

    def stop(self) -> None:
        """Forget all pairs, and keep only those of the last forward again."""
        self._recording = False
        self._earlier: list[list[tuple[Tensor, Tensor]]] = []
        self._module: nn.Module | None = None
        self.clear()

    def begin_forward(self, module: nn.Module) -> None:
        """Expect the pairs of another forward of ``module``.

        Raises
        ------
        IFVPUsageError
            If forwards of two modules are to be kept, as their layers cannot be told apart.
        """
        if self._recording:
            if self._module is not None and self._module is not module:
                raise IFVPUsageError(
                    f"a {type(self._module).__name__} and a {type(module).__name__} record in the "
                    "same MLPCache; give each module a cache of its own, and pass the list of "
                    "them as mlp_cache."
                )
            self._module = module
            if self.input_hidden_pairs:
                self._earlier.append(self.input_hidden_pairs)
        self.clear()

    def layers(self) -> list[list[RecordedPair]]:
        """Return, for every layer, its pair in each of the forwards kept.

        Raises
        ------
        IFVPUsageError
            If the forwards recorded different numbers of layers.
        """
        forwards = [*self._earlier, self.input_hidden_pairs]
        counts = [len(pairs) for pairs in forwards]
        if len(set(counts)) != 1:
            raise IFVPUsageError(
                f"the forwards of a {type(self._module).__name__} in one call of func recorded "
                f"{counts} pairs; each must append one pair per layer, in the same order."
            )
        return [
            [pair if isinstance(pair, RecordedPair) else RecordedPair(pair) for pair in calls]
            for calls in zip(*forwards, strict=True)
        ]


def manual_cache_forward(forward_func: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a module's forward that appends to the module's `MLPCache` by hand.

    While the module has no cache, the forward runs as it is. Otherwise it starts with the cache
    empty; only `ifvp_at_x_ekfac` keeps the pairs of every forward that its ``func`` runs, as
    further positions of the same layers.

    Parameters
    ----------
    forward_func : callable
        Forward of a module, with the module as first argument.

    Returns
    -------
    callable
        With the same arguments and result.

    Raises
    ------
    IFVPUsageError
        By the callable returned, if the attribute `EKFAC_CACHE_KEY` is no `MLPCache`, or what is
        appended is no pair of tensors.

    Examples
    --------
    >>> import types
    >>> import torch
    >>> from fimkit.functional import EKFAC_CACHE_KEY, MLPCache, manual_cache_forward
    >>> @manual_cache_forward
    ... def forward(self, x):
    ...     hidden = torch.nn.functional.linear(x, self.weight, self.bias)
    ...     if hasattr(self, EKFAC_CACHE_KEY):
    ...         ones = torch.ones_like(x[:, :1])  # the input of the bias
    ...         pair = torch.cat([x, ones], 1), hidden
    ...         getattr(self, EKFAC_CACHE_KEY).input_hidden_pairs.append(pair)
    ...     return hidden
    >>> layer, cache = torch.nn.Linear(3, 2), MLPCache()
    >>> layer.forward = types.MethodType(forward, layer)
    >>> setattr(layer, EKFAC_CACHE_KEY, cache)
    >>> layer(torch.zeros(5, 3)).shape
    torch.Size([5, 2])
    >>> [(a.shape, s.shape) for a, s in cache.input_hidden_pairs]
    [(torch.Size([5, 4]), torch.Size([5, 2]))]
    """

    @wraps(forward_func)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        cache = getattr(self, EKFAC_CACHE_KEY, None)
        if isinstance(cache, MLPCache):
            cache.begin_forward(self)
        elif cache is not None:
            raise IFVPUsageError(
                f"attribute {EKFAC_CACHE_KEY!r} of {type(self).__name__} is a "
                f"{type(cache).__name__}; expected an MLPCache."
            )
        return forward_func(self, *args, **kwargs)

    return forward
