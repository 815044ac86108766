"""Time and memory of DataInf, fit and products with k vectors, beside the loops it replaces.

An MLP 784-256-10 (203,530 parameters), briefly trained on synthetic data, n examples and the
gradients v of k others as vectors, float32, on CPU. Every contender multiplies by the mean over
examples of the damped inverse, layer by layer (weight and bias jointly), with one lambda for all
layers (dattri takes one), 0.1 * trace(F) / p of some examples:

fimkit   ``DataInf(regularization=lambda).fit(model, loader).transform(V)``. Gradients are kept as
         float32 factors.
torch    The same closed form by hand: dense per-example gradients by ``torch.func`` and two
         matrix products per layer, float32.
dattri   ``IFAttributorDataInf``: ``cache`` and ``transform_test_rep``, a ``vmap`` over training
         examples, k of them at a time, each making k products of p numbers.
vmap     What ``ifvp_at_x_datainf`` of dattri 0.1.0 does, which later versions lack, by hand: one
         vector at a time, a ``vmap`` over all training examples.
loop     The paper's reference code, written from its formula: a backward pass per example; then
         for each vector, for each layer, a Python loop over training examples. Unlike the paper's
         it is spared finding lambda again for each vector.

Fit (per-example gradients) and transform are timed apart. Contenders take turns: a warm-up round
that is not counted, then ``--repeats`` rounds in rotating order; slow ones take part in the first
``--slow-repeats`` rounds only, without warm-up. The error of a result u is
||u - u_ref|| / ||u_ref||, where u_ref is the closed form in float64 from the gradients of a
float64 copy of the model; the largest and the median over vectors are printed. "floor" is the same
in float64 from the gradients of the float32 model. Memory is the highest resident set of a fresh
process, whole and above what it is with model, data, vectors and libraries in memory.

Growth: seconds of fimkit's ``transform`` (the fastest of ``--repeats``) over n and k, with
exponents b and c of the fit t = a * n^b * k^c over the whole table, and a picture of it in
``--output``. The k vectors are read and written whatever n is, so b nears 1 only for large n.

Run from the repository root, with the extras ``benchmarks`` and ``plots`` installed and nothing
else running; the slow contenders take most of the time (``--only``, ``--parts`` leave some out)::

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.datainf_speed --repeats 5

(Threads that spin while they wait slow down whatever runs next.)
"""

import argparse
import copy
import json
import statistics
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

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
from benchmarks.explicit_speed import per_example_gradients, relative_errors, summary

LAYERS = (256 * 785, 10 * 257)  # numbers in each, weight and bias
BATCH = 250
SLOW = {"dattri", "vmap", "loop"}
COUNTS = {"n": (250, 500, 1000, 2000, 4000), "k": (10, 20, 50, 100, 200)}


class Problem(NamedTuple):
    """A model, its data, and the vectors and damping of the products."""

    model: nn.Module
    x: torch.Tensor
    y: torch.Tensor
    vectors: torch.Tensor
    damping: float

    @property
    def loader(self):
        """The batches, in the same order every time."""
        return DataLoader(TensorDataset(self.x, self.y), batch_size=BATCH)


def make_problem(n, k, seed):
    """Return a briefly trained MLP, n examples and the gradients of k others."""
    torch.manual_seed(seed)
    y = torch.randint(10, (n + k,))
    x = torch.randn(10, 784)[y] + 5.0 * torch.randn(n + k, 784)
    model = nn.Sequential(nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(10):
        optimizer.zero_grad()
        cross_entropy(model(x[:n]), y[:n]).backward()
        optimizer.step()
    optimizer.zero_grad()
    model.eval()
    some = per_example_gradients(model, x[:64], y[:64])
    vectors = per_example_gradients(model, x[n:], y[n:])
    return Problem(model, x[:n], y[:n], vectors, 0.1 * some.square().mean().item())


def closed_form(gradients, vectors, damping):
    """Return the mean of damped inverses times vectors, by the definition's closed form."""
    out = []
    for g, v in zip(gradients.split(LAYERS, 1), vectors.split(LAYERS, 1), strict=True):
        coefficients = (v @ g.T) / (damping + g.square().sum(1))
        out.append((v - coefficients @ g / len(g)) / damping)
    return torch.cat(out, 1)


def fimkit_contender(problem):
    from fimkit import DataInf

    def fit():
        return DataInf(problem.damping).fit(problem.model, problem.loader)

    return fit, lambda estimator: estimator.transform(problem.vectors)


def torch_contender(problem):
    def fit():
        return torch.cat([per_example_gradients(problem.model, x, y) for x, y in problem.loader])

    return fit, lambda gradients: closed_form(gradients, problem.vectors, problem.damping)


def dattri_contender(problem):
    from dattri.algorithm import IFAttributorDataInf
    from dattri.task import AttributionTask

    def loss(params, data):
        x, y = data
        return cross_entropy(functional_call(problem.model, params, (x,)), y)

    task = AttributionTask(loss, problem.model, problem.model.state_dict())

    def fit():
        attributor = IFAttributorDataInf(task, regularization=problem.damping)
        attributor.cache(problem.loader)
        return attributor

    return fit, lambda attributor: attributor.transform_test_rep(0, problem.vectors)


def vmap_contender(problem):
    fit, _ = torch_contender(problem)
    damping = problem.damping

    def transform(gradients):
        def apply(v, g):
            return (v - (v @ g) / (damping + g.square().sum()) * g) / damping

        rows = gradients.split(LAYERS, 1)
        return torch.stack(
            [
                torch.cat(
                    [
                        vmap(apply, in_dims=(None, 0))(part, g).mean(0)
                        for part, g in zip(v.split(LAYERS), rows, strict=True)
                    ]
                )
                for v in problem.vectors
            ]
        )

    return fit, transform


def loop_contender(problem):
    layers = [layer for layer in problem.model if isinstance(layer, nn.Linear)]

    def fit():
        rows = [[] for _ in layers]
        for x, y in zip(problem.x.split(1), problem.y.split(1), strict=True):
            problem.model.zero_grad()
            cross_entropy(problem.model(x), y).backward()
            for gradients, layer in zip(rows, layers, strict=True):
                gradients.append(torch.cat([p.grad.flatten() for p in layer.parameters()]))
        problem.model.zero_grad()
        return rows

    def transform(rows):
        damping, out = problem.damping, []
        for vector in problem.vectors:
            parts = []
            for v, gradients in zip(vector.split(LAYERS), rows, strict=True):
                total = torch.zeros_like(v)
                for g in gradients:
                    coefficient = torch.sum(v * g) / (damping + torch.sum(g**2))
                    total += (v - coefficient * g) / (len(gradients) * damping)
                parts.append(total)
            out.append(torch.cat(parts))
        return torch.stack(out)

    return fit, transform


CONTENDERS = {
    "fimkit": fimkit_contender,
    "torch": torch_contender,
    "dattri": dattri_contender,
    "vmap": vmap_contender,
    "loop": loop_contender,
}
BY_HAND = ("vmap", "loop")


def peak_memory(name, problem):
    """Print the memory one contender takes in this process, as JSON."""
    fit, transform = CONTENDERS[name](problem)
    cross_entropy(problem.model(problem.x[:1]), problem.y[:1]).backward()
    problem.model.zero_grad()
    memory = PeakMemory()
    result = transform(fit())
    print(json.dumps({"baseline": memory.baseline, "peak": memory.peak()}))
    del result


def references(problem):
    """Return the products in float64, and those from the float32 model's gradients."""
    exact = copy.deepcopy(problem.model).double()
    return [
        closed_form(
            per_example_gradients(model, x, problem.y).double(),
            problem.vectors.double(),
            problem.damping,
        )
        for model, x in ((exact, problem.x.double()), (problem.model, problem.x))
    ]


def compare(problem, names, args):
    """Time the contenders by turns and print their table."""
    contenders = {name: CONTENDERS[name](problem) for name in names}
    seconds = {name: [] for name in names}  # of each run: fit, transform
    results = {}
    for round_, name in turns(names, args.repeats):
        if name in SLOW and not 1 <= round_ <= args.slow_repeats:
            continue
        fit, transform = contenders[name]
        fitting, _, fitted = timed(fit)
        transforming, _, results[name] = timed(transform, fitted)
        del fitted
        if round_:
            seconds[name].append((fitting, transforming))
    reference, floor = references(problem)
    medians = {
        name: [statistics.median(times) for times in zip(*runs, strict=True)]
        for name, runs in seconds.items()
    }
    print("\nseconds: median, minimum, maximum; relative error: largest, median")
    rows = [("", "fit", "transform", "runs", "/ fimkit", "error")]
    for name, runs in seconds.items():
        ratio = f"{medians[name][1] / medians['fimkit'][1]:.1f}" if "fimkit" in medians else ""
        errors = summary([relative_errors(results[name], reference)])
        rows.append((name, *map(spread, zip(*runs, strict=True)), str(len(runs)), ratio, errors))
    table(
        [*rows, ("floor", "", "", "", "", summary([relative_errors(floor, reference)]))], spreads=2
    )


def compare_memory(names, args):
    """Print the highest resident set of a fresh process for each contender."""
    print("\nhighest resident set, MiB: whole, above the baseline, and that over fimkit's")
    ours = None
    for name in names:
        used = fresh_process("benchmarks.datainf_speed", "--memory", name, *problem_arguments(args))
        above = used["peak"] - used["baseline"]
        ours = above if name == "fimkit" else ours
        ratio = f"{above / ours:11.1f}" if ours else ""
        print(f"{name:12}{used['peak'] / MIB:11.0f}{above / MIB:11.0f}{ratio}")


def problem_arguments(args):
    """Return the arguments that make the same problem in another process."""
    options = ("examples", "vectors", "seed", "threads")
    return [word for option in options for word in (f"--{option}", getattr(args, option))]


def growth(args):
    """Time fimkit's transform over n and k; return seconds, ``(len(n), len(k))``."""
    problem = make_problem(max(COUNTS["n"]), max(COUNTS["k"]), args.seed)
    seconds = np.empty((len(COUNTS["n"]), len(COUNTS["k"])))
    for i, n in enumerate(COUNTS["n"]):
        some = problem._replace(x=problem.x[:n], y=problem.y[:n])
        fitted = fimkit_contender(some)[0]()
        for j, k in enumerate(COUNTS["k"]):
            vectors = problem.vectors[:k]
            fitted.transform(vectors)
            seconds[i, j] = min(timed(fitted.transform, vectors)[0] for _ in range(args.repeats))
    return seconds


def exponents(seconds):
    """Return b and c of the least-squares fit of log t to log a + b log n + c log k."""
    n, k = np.meshgrid(COUNTS["n"], COUNTS["k"], indexing="ij")
    design = np.stack([np.ones(n.size), np.log(n).ravel(), np.log(k).ravel()], 1)
    return np.linalg.lstsq(design, np.log(seconds).ravel(), rcond=None)[0][1:]


def report_growth(seconds, folder):
    """Print the table of growth and its exponents, and draw it where matplotlib is there."""
    print("\ngrowth: seconds of fimkit's transform")
    print(f"{'':12}" + "".join(f"{f'k = {k}':>11}" for k in COUNTS["k"]))
    for n, row in zip(COUNTS["n"], seconds, strict=True):
        print(f"{f'n = {n}':12}" + "".join(f"{value:11.4f}" for value in row))
    b, c = exponents(seconds)
    print(f"fit: t ~ n^{b:.2f} k^{c:.2f}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        print(f"no picture: {error}")
        return
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for k, column in zip(COUNTS["k"], seconds.T, strict=True):
        left.loglog(COUNTS["n"], column, "o-", label=f"k = {k}")
    for n, row in zip(COUNTS["n"], seconds, strict=True):
        right.loglog(COUNTS["k"], row, "o-", label=f"n = {n}")
    left.set(xlabel="training examples n", ylabel="seconds", title=f"transform ~ n^{b:.2f}")
    right.set(xlabel="vectors k", title=f"transform ~ k^{c:.2f}")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "datainf-growth.png"
    figure.savefig(path, dpi=150)
    print(f"picture: {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("time", "memory", "growth")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument(
        "--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="contenders"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--slow-repeats", type=int, default=1)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--vectors", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--output", type=Path, default=Path("fimkit-output"), help="for the picture"
    )
    parser.add_argument("--memory", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    problem = make_problem(args.examples, args.vectors, args.seed)
    if args.memory:
        peak_memory(args.memory, problem)
        return
    print(machine())
    here = installed(name for name in args.only if name not in BY_HAND)
    names = [name for name in args.only if name in BY_HAND or name in here]
    print(
        f"p = {sum(LAYERS):,}  n = {args.examples:,}  k = {args.vectors}  batch size = {BATCH}  "
        f"lambda = {problem.damping:.3g}"
    )
    if "time" in args.parts:
        compare(problem, names, args)
    if "memory" in args.parts:
        compare_memory(names, args)
    if "growth" in args.parts and "fimkit" in names:
        report_growth(growth(args), args.output)


if __name__ == "__main__":
    main()
