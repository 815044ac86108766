"""Watching a forward pass for calls on tracked parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from fimkit.gradients.ownership import version
from fimkit.gradients.rules import ENTERED, RULES, EmbeddingUse, ParameterIndex, Use
from fimkit.gradients.steady import is_steady
from fimkit.gradients.tables import refuse_bounding

__all__ = ["Capture"]


class Capture(TorchFunctionMode):
    """Records every call of a function with a rule on a tracked parameter while it is active.

    Functions are watched, not modules: subclasses, functional calls on a module's weight,
    repeated layers and shared parameters are all seen, and no hook is left on the model.

    Parameters
    ----------
    parameters : mapping of str to Tensor
        The tracked parameters.
    restored : collection of int
        The ``id`` of tables that looking up may change, as they are restored.

    Attributes
    ----------
    uses : list of Use
        The calls seen, in order.
    detached : set of str
        Parameters met by a call whose output carries no gradient.
    dtypes : set of torch.dtype
        What was computed in, of all that carries gradient: casts of the model's own (norms in
        float32, as many language models have them) and autocasting show here.
    steady : bool
        Whether no call seen can move examples as the numbers in the batch say.
    """

    def __init__(self, parameters: Mapping[str, Tensor], restored: Collection[int] = ()) -> None:
        super().__init__()
        self._restored = restored
        self.uses: list[Use] = []
        self.detached: set[str] = set()
        self.dtypes: set[torch.dtype] = set()
        self.steady = True
        self._index = ParameterIndex(parameters)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        refuse_bounding(func, args, kwargs, self._restored)
        if func in ENTERED:
            with self:
                return ENTERED[func](*args, **kwargs)
        self.steady = self.steady and is_steady(func, args, kwargs)
        rule = RULES.get(func)
        use = None if rule is None else rule.match(self._index, *args, **kwargs)
        output = func(*args, **kwargs)
        if isinstance(output, Tensor) and output.requires_grad:
            self.dtypes.add(output.dtype)
        if use is None:
            return output
        if not output.requires_grad:
            self.detached.update(use.names)
            return output
        if output._is_view():
            if args and output is args[0]:  # in place, so that not only what is returned is used
                return output
            # An activation in place on a view would cut the edge recorded here out of the graph.
            output = output.clone()
        use.observe(output)
        use.version = version(use.x)
        use.edge = get_gradient_edge(output)
        if use.replaces in self.uses:
            self.uses.remove(use.replaces)
        self.uses.append(use)
        if isinstance(use, EmbeddingUse) and use.replaces is None:
            self._index.remember_lookup(output, use)
        return output
