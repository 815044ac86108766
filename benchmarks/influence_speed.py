"""Seconds and memory of influence scores: training examples by test examples, on CPU.

``influence.pairwise_scores`` of training on 100 test examples for a 256-512-650-10 network (471,544
parameters, float32), after the fit, for every method and two sizes of the training set. Memory is
the highest resident set during the call, above that before it; the result itself takes 8 bytes a
pair. DataInf and Explicit are fitted on 2,000 examples in both cases, the others on all, so that
nothing but the training set that is scored grows.

Run from the repository root, where each line has a process of its own::

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.influence_speed
"""

import argparse
import json
import time

import torch
from torch import nn

from benchmarks.common import MIB, PeakMemory, fresh_process, machine, table

METHODS = ("EKFAC", "KFAC", "Diagonal", "DataInf", "Explicit")
FITTED = 2000


def measure(method, n, k, fitted, threads):
    """Score once, and print seconds and bytes as JSON."""
    torch.set_num_threads(threads)
    import fimkit
    from fimkit import ModelData, influence

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 650), nn.ReLU(), nn.Linear(650, 10)
    )
    x, y = torch.randn(n + k, 256), torch.randint(10, (n + k,))
    train, queries = ModelData(model, (x[:n], y[:n])), ModelData(model, (x[n:], y[n:]))

    estimator = getattr(fimkit, method)()
    start = time.perf_counter()
    estimator.fit(train[:fitted])
    seconds = {"fit": time.perf_counter() - start}
    influence.pairwise_scores(estimator, train[:256], queries[:2])  # a warm-up
    memory = PeakMemory()
    start = time.perf_counter()
    influence.pairwise_scores(estimator, train, queries)
    seconds["scores"] = time.perf_counter() - start
    print(json.dumps({**seconds, "bytes": memory.peak() - memory.baseline}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=int, nargs="+", default=[5000, 10000])
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--fitted", type=int, default=FITTED, help="examples of DataInf, Explicit")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        measure(args.one, args.train[0], args.queries, args.fitted, args.threads)
        return
    torch.set_num_threads(args.threads)
    print(machine())
    rows = [("", "training", "fitted on", "fit, s", "scores, s", "MiB")]
    for method in args.methods:
        for n in args.train:
            fitted = min(n, args.fitted) if method in ("DataInf", "Explicit") else n
            options = ["--one", method, "--train", n, "--queries", args.queries]
            options += ["--fitted", fitted, "--threads", args.threads]
            found = fresh_process("benchmarks.influence_speed", *options)
            seconds = (f"{found[key]:.2f}" for key in ("fit", "scores"))
            rows.append((method, f"{n:,}", f"{fitted:,}", *seconds, f"{found['bytes'] / MIB:.0f}"))
    print(f"{args.queries} test examples\n")
    table(rows, spreads=0)


if __name__ == "__main__":
    main()
