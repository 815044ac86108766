"""One library on one case, in a process of its own, told over its input what to do.

It prints one line of JSON for every line of JSON it reads, after a first one when it is ready:

{"do": "run"}                    takes all steps once: seconds of wall clock and CPU by stage; with
                                 the first time, the memory it took
{"do": "errors", "path": ...}    relative errors of the last results against those in the file
{"do": "reference", "path": ...} writes the reference's results, in float64 (the floor only)
{"do": "curve", "index": ...}    measures a growth curve of the case, and its floor (fimkit only)
"""

import json
import os
import statistics
import sys
import time

import torch
from torch.nn.functional import cross_entropy

from benchmarks import floor
from benchmarks.cases import CASES
from benchmarks.common import PeakMemory, timed, version
from benchmarks.peers import package_of

# Runs of one point of a growth curve, besides a first one that does not count.
CURVE_RUNS = 3


class Contending:
    """A library's contender, run as often as asked."""

    def __init__(self, case, library, sizes):
        self.problem = case.problem(**sizes)
        self.contender = case.libraries[library](self.problem)
        self.results = None
        self.first = True
        # What the first pass of the process allocates is no library's.
        x, y = next(iter(self.problem.loader))
        torch.autograd.grad(
            cross_entropy(self.problem.model(x), y), list(self.problem.model.parameters())
        )

    def run(self):
        self.results = None
        memory = PeakMemory() if self.first else None
        values, wall, cpu = [], {}, {}
        for stage, step in self.contender.steps.items():
            wall[stage], cpu[stage], value = timed(step, *values[-1:])
            values.append(value)
        reply = {"wall": wall, "cpu": cpu}
        if memory is not None:
            reply |= {"baseline": memory.baseline, "peak": memory.peak()}
            self.first = False
        self.results = self.contender.results(*values)
        return reply

    def errors(self, path):
        reference = torch.load(path)
        return {
            name: relative_error(self.results[name].detach(), right)
            for name, right in reference.items()
            if name in self.results
        }


class Floor:
    """The floor of a case in the place of a library."""

    def __init__(self, case, sizes):
        self.case = case
        self.problem = case.problem(**sizes)
        self.works = case.works(self.problem)

    def run(self):
        return {"parts": floor.parts(self.problem, self.works)}

    def reference(self, path):
        results = self.case.reference(self.problem.double()).run()
        torch.save({name: tensor.detach() for name, tensor in results.items()}, path)
        return {}

    def describe(self):
        """What is said of the problem and of its work."""
        p = self.problem
        return {
            "p": p.size,
            "n": len(p.x),
            "k": len(p.vectors),
            "damping": p.damping,
            "work": {
                stage: {"flops": dict(w.flops), "eigh": dict(w.eigh), "passes": w.passes}
                for stage, w in self.works.items()
            },
        }


def relative_error(result, right):
    """Return the largest ``||result - right|| / ||right||`` of a row, or of a vector."""
    difference = result.double() - right
    if right.ndim == 1:
        return (difference.norm() / right.norm()).item()
    return (difference.norm(dim=-1) / right.norm(dim=-1)).max().item()


def curve(case, index, quick):
    """Measure the points of a growth curve: median seconds of fimkit, and seconds of the floor."""
    wanted = case.curves[index]
    found = {"axis": [], "seconds": [], "floor": []}
    for point in wanted.points[: 2 if quick else None]:
        sizes = {**case.sizes_of(quick=quick), **point}
        contending = Contending(case, "fimkit", sizes)
        runs = [contending.run()["wall"][wanted.stage] for _ in range(CURVE_RUNS + 1)]
        problem = contending.problem
        works = {wanted.stage: case.works(problem)[wanted.stage]}
        parts = floor.parts(problem, works)[wanted.stage]
        found["axis"].append(problem.size if wanted.axis == "p" else point[wanted.axis])
        found["seconds"].append(statistics.median(runs[1:]))
        found["floor"].append(sum(parts.values()))
    return found


def main():
    # Libraries print; only what is meant for the parent goes to its end of the pipe.
    parent = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    name, library, sizes, threads, quick = sys.argv[1:]
    torch.set_num_threads(int(threads))
    case, sizes = CASES[name], json.loads(sizes)
    started = time.perf_counter()
    if library == "floor":
        served = Floor(case, sizes)
        reply = served.describe()
    elif library == "curve":
        served, reply = None, {}
    else:
        served = Contending(case, library, sizes)
        package = package_of(library)
        reply = {"version": version(package) if package else ""}
    print(json.dumps({**reply, "ready": time.perf_counter() - started}), file=parent)
    for line in sys.stdin:
        order = json.loads(line)
        match order.pop("do"):
            case "run":
                reply = served.run()
            case "errors":
                reply = served.errors(**order)
            case "reference":
                reply = served.reference(**order)
            case "curve":
                reply = curve(case, order["index"], quick == "quick")
        print(json.dumps(reply), file=parent)


if __name__ == "__main__":
    main()
