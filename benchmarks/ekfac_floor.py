"""The least work that any EK-FAC must do on this machine, as plain matrix products.

EK-FAC of a case's data in float32, empirical Fisher, in as few lines and operations as it takes:

pass       one forward and one backward pass per batch, no gradient of any parameter
grams      per layer and batch, A += aᵀa of its inputs (patches; a last column of ones for the
           bias) and S += sᵀs of its output gradients
eigh       the eigendecomposition of every A and S in float64, side by side, one thread each
squares    Lambda: with one position per example one product (s²)ᵀ(a²) per layer and batch; with
           more, one product sᵀa per example, squared and summed
rotations  into the eigenvectors' basis: of a and s, or of sᵀa where that is less work
vector     multiplying one vector by the damped inverse

The floor is the sum of the first four. Inputs and gradients of all batches stay in memory; nothing
is checked, and what is neither Linear nor Conv2d is not known. Products are those of torch as
anyone would write them: a library that uses the symmetry of A and S, or lays out memory better, may
go below the floor in a stage.

Run from the repository root, with nothing else running::

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.ekfac_floor
"""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.functional import cross_entropy, pad

from benchmarks.common import machine, spread, table
from benchmarks.ekfac_peers import CASES, Result, make_case

STAGES = ("pass", "grams", "eigh", "squares", "rotations", "vector")
COUNTED = STAGES[:4]
# Bytes of per-example gradients at a time.
CHUNK = 8 * 2**20


class Laps:
    """Seconds of wall clock and of CPU per stage, each from the end of the one before."""

    def __init__(self):
        self.wall, self.cpu = dict.fromkeys(STAGES, 0.0), dict.fromkeys(STAGES, 0.0)
        self._last = time.perf_counter(), time.process_time()

    def end(self, stage):
        """End a stage."""
        now = time.perf_counter(), time.process_time()
        self.wall[stage] += now[0] - self._last[0]
        self.cpu[stage] += now[1] - self._last[1]
        self._last = now

    @property
    def floor(self):
        """Seconds of wall clock and of CPU of the stages that count."""
        return tuple(sum(clock[stage] for stage in COUNTED) for clock in (self.wall, self.cpu))


def forward_backward(problem, x, y):
    """Return, per layer, its input and the gradient of the summed loss at its output."""
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
    if not isinstance(layer, nn.Conv2d):
        x, g = (t.view(len(t), -1, t.shape[-1]) for t in (x, g))
        return pad(x, (0, 1), value=1.0), g
    (h, w), (down, right) = layer.kernel_size, layer.stride
    rows, columns = layer.padding
    x = pad(x, (columns, columns, rows, rows)).unfold(2, h, down).unfold(3, w, right)
    x = x.permute(0, 1, 4, 5, 2, 3)
    patches = x.new_ones(len(x), x[0, ..., 0, 0].numel() + 1, x[0, 0, 0, 0].numel())
    patches[:, :-1].view(x.shape).copy_(x)
    return patches.mT, g.flatten(2).mT


def positions_fastest(m):
    """Whether (n, T, k) lie in memory as (n, k, T), as a convolution's do."""
    return m.shape[1] > 1 and m.stride(1) == 1


def add_gram(total, m):
    """Add ``mᵀm`` over all positions."""
    if positions_fastest(m):
        total.addbmm_(m.mT, m)
    else:
        total.addmm_(m.flatten(0, 1).T, m.flatten(0, 1))


def rotate(m, basis):
    """Return ``m @ basis``, in the order of m's memory."""
    if positions_fastest(m):
        return torch.bmm(basis.T.expand(len(m), -1, -1), m.mT).mT
    return (m.flatten(0, 1) @ basis).view(m.shape)


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


def add_squares(total, a, s, q_a, q_s, laps):
    """Add the squares of every example's ``Q_Sᵀ sᵀa Q_A``."""
    count, (out, size) = a.shape[1], total.shape
    factors_first = count * (size**2 + out**2) <= size * out * (size + out)
    if factors_first or count == 1:
        a, s = rotate(a, q_a), rotate(s, q_s)
        laps.end("rotations")
    if count == 1:
        total.addmm_(s[:, 0].square_().T, a[:, 0].square_())
        laps.end("squares")
        return
    step = max(1, CHUNK // (total.numel() * total.element_size()))
    for some_a, some_s in zip(a.split(step), s.split(step), strict=True):
        products = some_s.mT @ some_a
        laps.end("squares")
        if not factors_first:
            products = torch.bmm(q_s.T.expand(len(products), -1, -1), products) @ q_a
            laps.end("rotations")
        total += products.square_().sum(0)
    laps.end("squares")


def floor(problem):
    """Return a function that computes EK-FAC once; its result's ``native`` are the `Laps`."""

    def run():
        laps = Laps()
        layers, kept, grams, squares = problem.layers, [], {}, {}
        for x, y in problem.loader:
            captured = forward_backward(problem, x, y)
            laps.end("pass")
            for name, (inputs, gradients) in captured.items():
                a, s = positions(layers[name], inputs, gradients)
                kept.append((name, a, s))
                for key, m in (((name, "A"), a), ((name, "S"), s)):
                    if key not in grams:
                        grams[key] = m.new_zeros(m.shape[2], m.shape[2])
                    add_gram(grams[key], m)
            laps.end("grams")
        bases = decompose(grams)
        laps.end("eigh")
        for name, a, s in kept:
            if name not in squares:
                squares[name] = a.new_zeros(s.shape[2], a.shape[2])
            add_squares(squares[name], a, s, bases[name, "A"], bases[name, "S"], laps)
        eigenvalues = {name: total / len(problem.x) for name, total in squares.items()}
        laps.end("squares")
        pieces = []
        for name, v in problem.matrices(problem.vector).items():
            q_s, q_a = bases[name, "S"], bases[name, "A"]
            scaled = (q_s.T @ v @ q_a) / (eigenvalues[name] + problem.damping)
            product = q_s @ scaled @ q_a.T
            pieces += [product[:, :-1].flatten(), product[:, -1]]
        ifvp = torch.cat(pieces)
        laps.end("vector")
        return Result({name: v.sum().item() for name, v in eigenvalues.items()}, ifvp, laps)

    return run


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
        runs = [run().native for _ in range(args.repeats + 1)][1:]
        rows = [(case, "wall", "CPU")]
        for stage in STAGES:
            clocks = zip(*((laps.wall[stage], laps.cpu[stage]) for laps in runs), strict=True)
            rows.append((stage, *map(spread, clocks)))
        rows.append(("floor", *map(spread, zip(*(laps.floor for laps in runs), strict=True))))
        print()
        table(rows, spreads=2)


if __name__ == "__main__":
    main()
