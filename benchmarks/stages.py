"""What the stages of fimkit's own fits take, in time and memory, for one problem.

It prints one line of JSON: seconds by stage, and the bytes that fit, and all, took above what there
was before. `benchmarks.capacity` runs it in a process of its own.
"""

import json
import sys
import time
from contextlib import contextmanager

import torch
from torch.nn.functional import cross_entropy

from benchmarks import floor
from benchmarks.cases.ekfac import square_mlp
from benchmarks.common import PeakMemory
from benchmarks.peers import fimkit_datainf, fimkit_ekfac, fimkit_explicit
from benchmarks.problems import transformer

PROBLEMS = {"mlp": square_mlp, "transformer": transformer}
METHODS = {
    "ekfac": fimkit_ekfac,
    "datainf": fimkit_datainf,
    "dual": lambda problem: fimkit_explicit(problem, "dual"),
}


@contextmanager
def clocks():
    """Give the seconds spent in the parts of EK-FAC's fit, while inside."""
    from fimkit.estimators import ekfac
    from fimkit.statistics import LinearStatistics

    spent = {"factors": 0.0, "eigh": 0.0, "eigenvalues": 0.0}
    places = (
        ("factors", LinearStatistics, "add_factors"),
        ("eigh", ekfac, "set_eigenbases"),
        ("eigenvalues", LinearStatistics, "add_eigenvalues"),
    )
    originals = [getattr(owner, name) for _, owner, name in places]

    def watched(stage, function):
        def call(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[stage] += time.perf_counter() - start

        return call

    for (stage, owner, name), original in zip(places, originals, strict=True):
        setattr(owner, name, watched(stage, original))
    try:
        yield spent
    finally:
        for (_, owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, original)


def measure(method, problem):
    """Return seconds by stage, and bytes."""
    contender = METHODS[method](problem)
    (_, fit), (_, use) = contender.steps.items()
    x, y = next(iter(problem.loader))
    torch.autograd.grad(cross_entropy(problem.model(x), y), list(problem.model.parameters()))
    floor.pass_seconds(problem)
    one_pass = floor.pass_seconds(problem)
    memory = PeakMemory()
    use(fit())
    taken = memory.peak() - memory.baseline
    with clocks() as spent:
        start = time.perf_counter()
        fitted = fit()
        whole = time.perf_counter() - start
    start = time.perf_counter()
    use(fitted)
    seconds = {"use": time.perf_counter() - start}
    seconds["pass"] = whole - sum(spent.values())
    if method == "ekfac":
        seconds |= spent
    return {"seconds": seconds, "bytes": taken, "one pass": one_pass}


def main():
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    print(json.dumps(measure(spec["method"], PROBLEMS[spec["model"]](**spec["sizes"]))))


if __name__ == "__main__":
    main()
