"""What a second pass over the same data needs: the random states of the first."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

__all__ = ["RandomStates", "loader_generators"]


class RandomStates:
    """The random states now: of torch on all devices in use, of Python, NumPy and of generators.

    As a context, it restores them when it is left.

    Parameters
    ----------
    generators : iterable of torch.Generator
        Those besides the global ones.
    """

    def __init__(self, generators: Iterable[torch.Generator] = ()) -> None:
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if _cuda_in_use() else []
        self._python = random.getstate()
        self._numpy: Any = np.random.get_state()  # noqa: NPY002  (what datasets draw from)
        self._generators = [(generator, generator.get_state()) for generator in generators]

    def state_dict(self) -> dict[str, Any]:
        """Return the states as tensors and numbers."""
        return {
            "torch": self._torch,
            "cuda": self._cuda,
            "python": self._python,
            "numpy": self._numpy,
            "generators": [state for _, state in self._generators],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take states of before, for the same generators."""
        self._torch = state["torch"].cpu()
        self._cuda = [each.cpu() for each in state["cuda"]]
        self._python, self._numpy = state["python"], state["numpy"]
        generators = [generator for generator, _ in self._generators]
        self._generators = [
            (generator, each.cpu())
            for generator, each in zip(generators, state["generators"], strict=True)
        ]

    def restore(self) -> None:
        """Return to these states, so that the same numbers are drawn again."""
        torch.set_rng_state(self._torch)
        torch.cuda.set_rng_state_all(self._cuda)
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        for generator, state in self._generators:
            generator.set_state(state)

    def passed(self) -> bool:
        """Whether random numbers have been drawn since."""
        now = RandomStates(generator for generator, _ in self._generators)
        return not (
            torch.equal(self._torch, now._torch)
            and self._python == now._python
            and all(map(np.array_equal, self._numpy, now._numpy))
            and len(self._cuda) == len(now._cuda)
            and all(map(torch.equal, self._cuda, now._cuda))
            and all(torch.equal(s, g.get_state()) for g, s in self._generators)
        )

    def __enter__(self) -> RandomStates:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()


def _cuda_in_use() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]


def loader_generators(data: Any, depth: int = 4) -> list[torch.Generator]:
    """Return the generators of a data loader, of its samplers and of its dataset.

    Those that are found as ``generator``, by attributes named as `torch.utils.data` names them.

    Parameters
    ----------
    data : object
    depth : int, default=4
        How many such attributes in a row to follow.
    """
    generator = getattr(data, "generator", None)
    found = [generator] if isinstance(generator, torch.Generator) else []
    for name in ("sampler", "batch_sampler", "dataset") if depth else ():
        part = getattr(data, name, None)
        if part is not None:
            found += loader_generators(part, depth - 1)
    return list({id(one): one for one in found}.values())
