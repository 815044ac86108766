"""The state in which models are run, and its return to what it was."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fimkit.gradients.tables import tables_restored

__all__ = [
    "AmbientAutocast",
    "EvaluationTurns",
    "differentiating",
    "evaluating",
    "unwrap",
]

# Held while a model is in evaluation mode: its modules' flags, what torch.func changes in them,
# torch's random state, cuDNN's flags and the compiler's stance are the same for all threads.
_TURN = threading.RLock()


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside data-parallel and ``torch.compile`` wrappers."""
    while True:
        if isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


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
    when the body raises; an ambient ``no_grad`` or ``inference_mode`` has no effect inside. Other
    threads wait for their turn.
    """
    with differentiating(), EvaluationTurns(model).turn():
        yield


@contextmanager
def differentiating() -> Iterator[None]:
    """Run this thread with gradients on, and inference mode and autocasting off."""
    with torch.inference_mode(False), torch.enable_grad(), AmbientAutocast().disabled():
        yield


class EvaluationTurns:
    """A model's turns in evaluation mode, taken by one thread at a time in the whole process.

    Between turns everything is as it was, and other threads may have theirs. Random numbers go on
    from turn to turn, as if it were one.

    Parameters
    ----------
    model : Module
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
        self._random: list[Tensor] = []

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Run with the model in evaluation mode, eagerly; as it was afterwards."""
        indices = [device.index for device in self._devices]
        with _TURN, ExitStack() as stack:
            if indices:
                stack.enter_context(_exact_cudnn(self._model))
            stack.enter_context(torch.random.fork_rng(indices))
            if "torch._dynamo" in sys.modules:  # else nothing was compiled
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(tables_restored(self._model))
            if self._random:
                torch.set_rng_state(self._random[0])
                for index, state in zip(indices, self._random[1:], strict=True):
                    torch.cuda.set_rng_state(state, index)
            flags = [(module, module.training) for module in self._model.modules()]
            try:
                self._model.eval()
                yield
            finally:
                for module, training in flags:
                    module.training = training
                of_devices = [torch.cuda.get_rng_state(index) for index in indices]
                self._random = [torch.get_rng_state(), *of_devices]


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
