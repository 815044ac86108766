"""Models that are divided over processes, made whole for a while.

What divides them, or averages over processes, does so in every forward and backward pass, of which
ranks that fit together may have different numbers. So parameters that `fully_shard` divided are
gathered once, and nothing that communicates runs until the model is given back.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fimkit.exceptions import IFVPUsageError

__all__ = ["divided", "whole"]

_PLAIN_COPY = (
    "Fit a plain copy of the model on each rank: plain.load_state_dict(get_model_state_dict(model, "
    "options=StateDictOptions(full_state_dict=True))), from "
    "torch.distributed.checkpoint.state_dict."
)

_LOCK = threading.RLock()

# Models that are whole now, how many use them so, and what gives them back.
_USED: WeakKeyDictionary[nn.Module, tuple[int, ExitStack]] = WeakKeyDictionary()


def divided(model: Any) -> list[str]:
    """Return the names of the modules whose parameters `fully_shard` divided."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # else nothing was divided by it
    if fsdp is None or not isinstance(model, nn.Module):
        return []
    return [name for name, part in model.named_modules() if isinstance(part, fsdp.FSDPModule)]


@contextmanager
def whole(model: Any) -> Iterator[None]:
    """Run with all parameters of a model on this process, and without communication in its passes.

    All ranks that share a divided model enter this together; they leave it on their own.
    Parameters that were gathered are divided again afterwards, also when the body raises.

    Raises
    ------
    IFVPUsageError
        If the model is divided in another way, or would compute in another dtype than its own.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    with _LOCK:
        uses, given_back = _USED.get(model) or (0, _made_whole(model))
        _USED[model] = uses + 1, given_back
    try:
        yield
    finally:
        with _LOCK:
            uses, given_back = _USED.pop(model)
            if uses > 1:
                _USED[model] = uses - 1, given_back
            else:
                given_back.close()


def _made_whole(model: nn.Module) -> ExitStack:
    """Make a model whole, and return what gives it back."""
    with ExitStack() as stack:
        modules = dict(model.named_modules())
        _refuse_flattened(modules)
        for module in modules.values():
            if isinstance(module, DistributedDataParallel):
                _without_wrapper(module, stack)
        for name in divided(model):
            _gathered(name, modules[name], stack)
        for name, parameter in model.named_parameters():
            if hasattr(parameter, "placements"):
                raise IFVPUsageError(
                    f"parameter {name!r} is a DTensor, of which each rank has a part (tensor "
                    f"parallelism), and its layers communicate in every batch. {_PLAIN_COPY}"
                )
        return stack.pop_all()


def _refuse_flattened(modules: MutableMapping[str, nn.Module]) -> None:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for name, module in modules.items() if fsdp is not None else ():
        if isinstance(module, fsdp.FullyShardedDataParallel):  # type: ignore[union-attr]
            raise IFVPUsageError(
                f"{f'layer {name!r}' if name else 'the model'} is a FullyShardedDataParallel, "
                "whose flattened parameters are no longer those of layers. Divide the model by "
                f"torch.distributed.fsdp.fully_shard, which is taken as it is. Or: {_PLAIN_COPY}"
            )


def _without_wrapper(wrapper: DistributedDataParallel, stack: ExitStack) -> None:
    """Let a wrapped module be called as if it were not wrapped."""
    attributes = vars(wrapper)
    if "forward" in attributes:
        stack.callback(attributes.__setitem__, "forward", attributes["forward"])
    else:
        stack.callback(attributes.pop, "forward")
    attributes["forward"] = wrapper.module.__call__


def _gathered(name: str, module: Any, stack: ExitStack) -> None:
    """Gather a module's parameters until the stack is closed, and let them stay so meanwhile."""
    before = {key: value for key, value in module.named_parameters() if _is_part(value)}
    with torch.inference_mode(False), torch.no_grad():
        module.unshard()
    now = dict(module.named_parameters())
    if any(not _is_part(now[key]) for key in before):  # else it was whole already
        stack.callback(module.reshard)
    for key, parameter in before.items():
        if now[key].dtype != parameter.dtype:
            raise IFVPUsageError(
                f"parameter {f'{name}.{key}' if name else key!r} is {parameter.dtype}, and "
                f"fully_shard(mp_policy=...) computes in {now[key].dtype}, of which gradients "
                f"would be too. {_PLAIN_COPY} torch.autocast around the fit takes effect there."
            )
    _without_hooks(module._forward_pre_hooks, stack)
    _without_hooks(module._forward_hooks, stack)


def _is_part(parameter: Any) -> bool:
    return hasattr(parameter, "placements")


def _without_hooks(hooks: MutableMapping[int, Callable[..., Any]], stack: ExitStack) -> None:
    """Take out hooks of `fully_shard`, which gather, divide and reduce, until a stack is closed."""
    before = dict(hooks)
    taken = {
        key
        for key, hook in before.items()
        if str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp")
    }

    def put_back() -> None:
        now = dict(hooks)
        hooks.clear()
        hooks.update({key: before[key] for key in before if key in taken or key in now})
        hooks.update(now)

    stack.callback(put_back)
    for key in taken:
        del hooks[key]
