"""What a fit must leave as it found it."""

from __future__ import annotations

import random
from contextlib import contextmanager

import numpy as np
import torch


def of_model(model):
    """Return everything about a model that a fit could change."""
    state = {}
    for name, module in model.named_modules():
        state[name, "training"] = module.training
        state[name, "attributes"] = sorted(vars(module))
        for key, value in vars(module).items():
            if "hooks" in key and value is not None:
                state[name, key] = list(getattr(value, "items", value.copy)())
        # A method set on the instance would be a patch that was not undone.
        state[name, "forward"] = vars(module).get("forward")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        state[name, "identity"] = id(tensor)
        state[name, "values"] = tensor.detach().cpu().numpy().tobytes()
        state[name, "version"] = None if tensor.is_inference() else tensor._version
        state[name, "requires_grad"] = tensor.requires_grad
        state[name, "hooks"] = list((tensor._backward_hooks or {}).items())
        state[name, "accumulation hooks"] = list((tensor._post_accumulate_grad_hooks or {}).items())
        grad = tensor.grad
        state[name, "grad"] = None if grad is None else (id(grad), grad.tolist())
    return state


def of_torch():
    """Return random states and modes."""
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": str(np.random.get_state()),  # noqa: NPY002
        "python": random.getstate(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "modes": torch.overrides._get_current_function_mode_stack(),
    }


def differences(before, after):
    return [key for key in {**before, **after} if before.get(key) != after.get(key)]


@contextmanager
def unchanged(*models):
    """Check that models, random states and modes are afterwards what they were."""
    before = [of_model(model) for model in models], of_torch()
    try:
        yield
    finally:
        for model, earlier in zip(models, before[0], strict=True):
            assert differences(earlier, of_model(model)) == []
        assert differences(before[1], of_torch()) == []
