"""Watching a forward pass for calls on tracked parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from fimkit.gradients.rules import ENTERED, RULES, ParameterIndex, Use

__all__ = ["Capture"]


class Capture(TorchFunctionMode):
    """Records every call of a function with a rule on a tracked parameter while it is active.

    Functions are watched, not modules: subclasses, functional calls on a module's weight,
    repeated layers and shared parameters are all seen, and no hook is left on the model.

    Parameters
    ----------
    parameters : mapping of str to Tensor
        The tracked parameters.

    Attributes
    ----------
    uses : list of Use
        The calls seen, in order.
    detached : set of str
        Parameters met by a call whose output carries no gradient.
    rearranged : bool
        Whether a call may have put examples at places that depend on the data.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.uses: list[Use] = []
        self.detached: set[str] = set()
        self.rearranged = False
        self._index = ParameterIndex(parameters)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        self.rearranged = self.rearranged or _rearranges(func, args)
        if func in ENTERED:
            with self:
                return ENTERED[func](*args, **kwargs)
        rule = RULES.get(func)
        use = None if rule is None else rule.match(self._index, *args, **kwargs)
        output = func(*args, **kwargs)
        if use is None:
            return output
        if not output.requires_grad:
            self.detached.update(use.names)
            return output
        if output._is_view():
            # An activation in place on a view would cut the edge recorded here out of the graph.
            output = output.clone()
        use.observe(output)
        use.edge = get_gradient_edge(output)
        self.uses.append(use)
        return output


# Functions by which data decides what comes where.
_REARRANGING = {
    "argsort",
    "bincount",
    "gather",
    "index_add",
    "index_copy",
    "index_put",
    "index_select",
    "masked_scatter",
    "masked_select",
    "nonzero",
    "scatter",
    "scatter_add",
    "scatter_reduce",
    "sort",
    "take",
    "take_along_dim",
    "topk",
    "unique",
}


def _rearranges(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    name = getattr(func, "__name__", "").removesuffix("_")
    if name in ("__getitem__", "__setitem__"):
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(part, Tensor | list) for part in index)
    return name in _REARRANGING
