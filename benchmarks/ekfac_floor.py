"""The least work that any EK-FAC must do on this machine, as plain matrix products.

For the data of a case, in float32, empirical Fisher, as few operations as the method allows:

pass       one forward and one backward pass per batch, no gradient of any parameter
grams      per layer and batch, A += aᵀa of its inputs (patches; a last column of ones for the
           bias) and S += sᵀs of its output gradients
eigh       the eigendecomposition of every A and S in float64, side by side, one thread each
squares    Lambda: with one position per example one product (s²)ᵀ(a²) per layer; with more, one
           product sᵀa per example, squared and summed
rotations  the two products s Q_S and a Q_A per layer; no part of the floor's total, as it does
           not say which way of rotating is the cheapest
vector     multiplying one vector by the damped inverse; no part of the total either

Inputs (as patches) and gradients stay in memory between the two halves. Lambda's basis and scale
are left out and nothing is checked: this is a measure of time, not an implementation.

Run from the repository root, with nothing else running::

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.ekfac_floor
"""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.functional import cross_entropy, unfold

from benchmarks.common import machine, spread, table
from benchmarks.ekfac_peers import CASES, make_case

STAGES = ("pass", "grams", "eigh", "squares", "rotations", "vector")
COUNTED = STAGES[:4]
# Bytes of per-example gradients at a time.
CHUNK = 8 * 2**20


def forward_backward(problem, x, y):
    """Return, per layer, its input and its output's gradient of the summed loss."""
    inputs, edges, handles = {}, {}, []
    for name, layer in problem.layers.items():

        def keep(module, given, output, name=name):
            inputs[name], edges[name] = given[0].detach(), get_gradient_edge(output)

        handles.append(layer.register_forward_hook(keep))
    loss = cross_entropy(problem.model(x), y, reduction="sum")
    gradients = torch.autograd.grad(loss, list(edges.values()))
    for handle in handles:
        handle.remove()
    return {name: (inputs[name], g) for name, g in zip(edges, gradients, strict=True)}


def positions(layer, x, g):
    """Return inputs (n, T, in + 1) and output gradients (n, T, out) of a layer."""
    if isinstance(layer, nn.Conv2d):
        x = unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT
        g = g.flatten(2).mT
    else:
        x, g = x.view(len(x), -1, x.shape[-1]), g.view(len(g), -1, g.shape[-1])
    return nn.functional.pad(x, (0, 1), value=1.0), g


def decompose(matrices):
    """Return eigenvectors of symmetric matrices, float64 inside, one thread each."""

    def one(matrix):
        return torch.linalg.eigh(matrix.double())[1].float()

    threads = torch.get_num_threads()
    order = sorted(matrices, key=lambda key: -len(matrices[key]))
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        found = dict(zip(order, pool.map(one, [matrices[key] for key in order]), strict=True))
    torch.set_num_threads(threads)
    return found


def add_squares(total, a, s):
    """Add the squares of every example's ``sᵀa`` to ``total``."""
    if a.shape[1] == 1:
        total.addmm_(s[:, 0].square().T, a[:, 0].square())
        return
    step = max(1, CHUNK // (total.numel() * total.element_size()))
    for some_a, some_s in zip(a.split(step), s.split(step), strict=True):
        products = some_s.mT @ some_a
        total += products.square_().sum(0)


def floor(problem):
    """Return a function that does the work once.

    It returns the seconds of every stage, of wall clock and of CPU, as two dictionaries.
    """

    def run():
        clocks = time.perf_counter, time.process_time
        seconds = dict.fromkeys(STAGES, 0.0), dict.fromkeys(STAGES, 0.0)
        last = [clock() for clock in clocks]

        def lap(stage):
            for i, clock in enumerate(clocks):
                now = clock()
                seconds[i][stage] += now - last[i]
                last[i] = now

        layers = problem.layers
        kept, grams, squares = [], {}, {}
        for x, y in problem.loader:
            captured = forward_backward(problem, x, y)
            lap("pass")
            for name, (inputs, gradients) in captured.items():
                a, s = positions(layers[name], inputs, gradients)
                kept.append((name, a, s))
                for key, flat in (((name, "A"), a.flatten(0, 1)), ((name, "S"), s.flatten(0, 1))):
                    if key not in grams:
                        grams[key] = flat.new_zeros(flat.shape[1], flat.shape[1])
                    grams[key].addmm_(flat.T, flat)
            lap("grams")
        bases = decompose(grams)
        lap("eigh")
        for name, a, s in kept:
            if name not in squares:
                squares[name] = a.new_zeros(s.shape[2], a.shape[2])
            add_squares(squares[name], a, s)
            lap("squares")
            _ = a.flatten(0, 1) @ bases[name, "A"], s.flatten(0, 1) @ bases[name, "S"]
            lap("rotations")
        for name, matrix in problem.matrices(problem.vector).items():
            left, right = bases[name, "S"], bases[name, "A"]
            _ = left @ ((left.T @ matrix @ right) / (squares[name] + problem.damping)) @ right.T
        lap("vector")
        return seconds

    return run


def total(seconds):
    """Return the seconds of the stages that count."""
    return sum(seconds[stage] for stage in COUNTED)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(machine())
    print("seconds: median, minimum, maximum")
    for case in args.cases:
        run = floor(make_case(case))
        laps = [run() for _ in range(args.repeats + 1)][1:]
        print()
        rows = [(case, "wall", "CPU")]
        for stage in STAGES:
            rows.append((stage, *(spread([lap[i][stage] for lap in laps]) for i in (0, 1))))
        rows.append(("floor", *(spread([total(lap[i]) for lap in laps]) for i in (0, 1))))
        table(rows, spreads=2)


if __name__ == "__main__":
    main()
