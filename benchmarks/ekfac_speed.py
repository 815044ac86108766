"""Time and memory of EK-FAC, fit and first product with the damped inverse, beside its peers.

Float32, empirical Fisher, two CPU threads, the same model, batches and vector for all; the models,
the contenders and what each is told are in ``ekfac_peers``, the floor is ``ekfac_floor``:

mlp          784-1024-1024-10, n = 4,096, batches of 256
transformer  4 encoder blocks (six Linears each) of width 256 on 64 positions, mean pooling and a
             linear classifier, n = 256, batches of 32; nngeometry has no Linear on sequences
cnn          three 3x3 convolutions (32, 64, 64 channels) with pooling and a linear classifier on
             3x32x32 inputs, n = 1,024, batches of 128

In each, the contenders that take part cover every parameter (LayerNorms have none), and data are
random: what is computed does not depend on it.

"lean" is fimkit with ``cache_budget=0``: nothing is kept between the passes, so that the model runs
twice, as in curvlinops and kronfluence.

Contenders take turns, one warm-up round and then ``--repeats`` rounds in rotating order; a slow
one takes part in the first ``--slow-repeats`` rounds only, without warm-up. Printed are wall-clock
and CPU seconds, the ratio of median wall-clock to fimkit's, the highest resident set of a fresh
process that does it once, whole and above what it is with model, data and libraries in memory; and
two relative errors, the largest of a layer's trace (which no choice of eigenvectors changes) and
that of the inverse times the vector. They are against the same computation in float64, which
``ekfac_agreement`` compares with the peers. curvlinops and nngeometry decompose in float32.

Run from the repository root, with nothing else running::

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.ekfac_speed --repeats 5

(Threads that spin while they wait slow down whatever runs next.)
"""

import argparse
import copy
import json
import statistics
from dataclasses import replace
from functools import partial

import torch
from torch.nn.functional import cross_entropy

from benchmarks import ekfac_floor
from benchmarks.common import (
    MIB,
    PeakMemory,
    fresh_process,
    installed,
    machine,
    spread,
    table,
    timed,
    turns,
)
from benchmarks.ekfac_peers import CASES, CONTENDERS, make_case

OWN = {"lean": partial(CONTENDERS["fimkit"], cache_budget=0), "floor": ekfac_floor.floor}
ALL = {**CONTENDERS, **OWN}
# What takes no part, and why.
EXCLUDED = {("transformer", "nngeometry"): "its Linear takes one position per example only"}
SLOW = {("mlp", "kronfluence")}
HEADER = ("", "wall: median, min, max", "CPU", "runs", "/ fimkit", "peak MiB", "above base")
HEADER += ("trace", "product")


def peak_memory(case, name):
    """Print the memory one contender takes in this process, as JSON."""
    problem = make_case(case)
    run = ALL[name](problem)
    x, y = next(iter(problem.loader))
    loss = cross_entropy(problem.model(x), y)
    torch.autograd.grad(loss, [p for p in problem.model.parameters() if p.requires_grad])
    del x, y, loss
    memory = PeakMemory()
    result = run()
    print(json.dumps({"baseline": memory.baseline, "peak": memory.peak()}))
    del result


def reference(problem):
    """Return the same in float64, which the agreement benchmark holds against the peers."""
    model = copy.deepcopy(problem.model).double()
    vector = problem.vector.double()
    exact = replace(problem, model=model, x=problem.x.double(), vector=vector)
    return CONTENDERS["fimkit"](exact)()


def errors(result, exact):
    """Return the largest relative error of a layer's trace, and that of the product."""
    traces = max(abs(result.traces[name] / t - 1) for name, t in exact.traces.items())
    product = (result.ifvp - exact.ifvp).norm() / exact.ifvp.norm()
    return traces, product.item()


def compare(case, names, args):
    """Run one case and print its table."""
    problem = make_case(case)
    size = sum(p.numel() for p in problem.model.parameters())
    print(
        f"\n{case}: p = {size:,}  n = {len(problem.x):,}  batch size = {problem.batch_size}  "
        f"{len(problem.layers)} layers  lambda = {problem.damping:.3g}"
    )
    for name in names:
        if (case, name) in EXCLUDED:
            print(f"left out {name}: {EXCLUDED[case, name]}")
    runs = {name: ALL[name](problem) for name in names if (case, name) not in EXCLUDED}
    seconds = {name: [] for name in runs}  # of each run: wall clock, CPU
    results, laps = {}, []
    for round_, name in turns(runs, args.repeats):
        if (case, name) in SLOW and not 1 <= round_ <= args.slow_repeats:
            continue
        *times, results[name] = timed(runs[name])
        if round_ and name == "floor":
            laps.append(results[name].native)
            times = laps[-1].floor
        if round_:
            seconds[name].append(times)
    exact = reference(problem)
    rows = [HEADER]
    for name in filter(seconds.get, seconds):
        wall, cpu = zip(*seconds[name], strict=True)
        row = [name, spread(wall), f"{statistics.median(cpu):.3f}", str(len(wall)), ""]
        if seconds.get("fimkit"):
            ours = statistics.median(wall for wall, _ in seconds["fimkit"])
            row[-1] = f"{statistics.median(wall) / ours:.2f}"
        used = fresh_process("benchmarks.ekfac_speed", "--memory", case, name)
        row += [f"{used['peak'] / MIB:.0f}", f"{(used['peak'] - used['baseline']) / MIB:.0f}"]
        row += [f"{error:.1e}" for error in errors(results[name], exact)]
        rows.append(row)
    table(rows)
    if laps:
        medians = [(s, statistics.median(lap.wall[s] for lap in laps)) for s in ekfac_floor.STAGES]
        print("the floor's stages: " + "  ".join(f"{stage} {t:.3f}" for stage, t in medians))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--only", nargs="+", choices=ALL, default=list(ALL), help="contenders")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--slow-repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", nargs=2, metavar=("CASE", "CONTENDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory:
        peak_memory(*args.memory)
        return
    print(machine())
    names = installed(name for name in args.only if name in CONTENDERS)
    names += [name for name in OWN if name in args.only]
    for case in args.cases:
        compare(case, names, args)


if __name__ == "__main__":
    main()
