"""The state in which models are run, and its return to what it was."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

__all__ = ["AmbientAutocast", "evaluating", "held_tensors", "unwrap"]


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside data-parallel and ``torch.compile`` wrappers."""
    while True:
        if isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def held_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors that a model may write to: its buffers and its modules' attributes."""
    yield from model.buffers()
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, Tensor))


class AmbientAutocast:
    """The autocasting in force where this was made, for running the model only.

    Statistics and linear algebra are computed in the precision they ask for, outside it.
    """

    def __init__(self) -> None:
        kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        self._enabled = [
            (kind, torch.get_autocast_dtype(kind))
            for kind in kinds
            if torch.is_autocast_enabled(kind)
        ]

    @property
    def precision(self) -> torch.dtype | None:
        """The dtype that the model's products are computed in, None without autocasting."""
        return self._enabled[-1][1] if self._enabled else None

    def restored(self) -> ExitStack:
        """Return a context with the autocasting that was in force."""
        stack = ExitStack()
        for kind, dtype in self._enabled:
            stack.enter_context(torch.autocast(kind, dtype))
        return stack

    def disabled(self) -> ExitStack:
        """Return a context without it."""
        stack = ExitStack()
        for kind, _ in self._enabled:
            stack.enter_context(torch.autocast(kind, enabled=False))
        return stack


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run with the model in evaluation mode, eagerly, with gradients on and autocasting off.

    Every module's own training flag and torch's random state are as before afterwards, also
    when the body raises; an ambient ``no_grad`` or ``inference_mode`` has no effect inside.
    """
    flags = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with ExitStack() as stack:
        if devices:
            stack.enter_context(_exact_cudnn(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(AmbientAutocast().disabled())
        stack.enter_context(torch.random.fork_rng([d.index for d in devices]))
        if "torch._dynamo" in sys.modules:  # else nothing was compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            model.eval()
            yield
        finally:
            for module, training in flags:
                module.training = training


def _exact_cudnn(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which convolutions are float32 where they are asked for in float32.

    Recurrent layers run without cuDNN, which has their backward pass in training mode only.
    """
    cudnn = torch.backends.cudnn
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    context: AbstractContextManager[None] = cudnn.flags(
        enabled=cudnn.enabled and not recurrent,
        benchmark=cudnn.benchmark,
        deterministic=cudnn.deterministic,
        allow_tf32=False,
    )
    return context
