"""Memory of EK-FAC for one wide layer on sequences, on CPU.

``EKFAC`` of a Linear 4096 -> 4096 (16.8 million parameters, float32) on sequences of 128 positions,
where an example's gradient takes 64 MiB, fitted and used for one vector. The baseline is the
process's resident set with model, data and vector in memory, after one forward and backward pass;
the peak is the highest afterwards. The factors are A and S in float32; their eigenvectors,
Lambda, and all temporaries of the fit (float64 eigendecompositions side by side, inputs and
gradients kept between the passes) count as what is used above them.

Run from the repository root, one fresh process a run::

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.ekfac_memory
"""

import argparse
import sys
import time

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common import MIB, PeakMemory, machine

LIMIT = 2 * 2**30


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--positions", type=int, default=128)
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--cache-budget", type=int, default=None, help="default: EKFAC's own")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    from fimkit import EKFAC

    torch.manual_seed(0)
    width = args.width
    model = nn.Linear(width, width)
    x, y = torch.randn(2, args.examples, args.positions, width)
    vector = torch.randn(width * (width + 1))
    loader = DataLoader(TensorDataset(x, y), batch_size=args.batch_size)
    xb, yb = next(iter(loader))
    torch.autograd.grad((model(xb) - yb).square().sum(), list(model.parameters()))
    del xb, yb

    options = {} if args.cache_budget is None else {"cache_budget": args.cache_budget}
    memory = PeakMemory()
    start = time.perf_counter()
    estimator = EKFAC(regularization=1.0, loss="mse", **options).fit(model, loader)
    fit_seconds, fit_peak = time.perf_counter() - start, memory.peak()
    estimator.transform(vector)
    seconds, peak = time.perf_counter() - start, memory.peak()

    factors = 4 * (width**2 + (width + 1) ** 2)
    above = peak - memory.baseline - factors
    print(machine())
    print(f"n = {args.examples}  batch size = {args.batch_size}  positions = {args.positions}")
    print(f"seconds: fit {fit_seconds:.2f}, fit and first vector {seconds:.2f}")
    print("\nMiB" + ("" if memory.was_reset else " (peak of the process's whole life)"))
    for label, size in (
        ("baseline: model, data, vector", memory.baseline),
        ("factors A and S", factors),
        ("peak of fit above baseline", fit_peak - memory.baseline),
        ("peak above baseline", peak - memory.baseline),
        ("peak above baseline and factors", above),
        ("limit", LIMIT),
    ):
        print(f"  {label:34}{size / MIB:9.1f}")
    sys.exit(0 if above <= LIMIT else 1)


if __name__ == "__main__":
    main()
