"""Time of an EK-FAC fit on one rank and on two, one thread each, over gloo on this machine.

The model is 784-1024-1024-10 in float32 and n = 16,384 examples, half of them on each of two ranks;
the time is that of the slower rank, from a barrier on. Ranks and a single process take turns. The
relative difference of the products with the damped inverse is printed too.

Run from the repository root, with nothing else running::

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.distributed --repeats 3
"""

import argparse
import os
import statistics
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from benchmarks.common import machine, spread
from fimkit import EKFAC


def fit(rank, size, n, store, out):
    """Fit one rank's part, and write how long it took and what it answers."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(784, 1024), nn.Tanh(), nn.Linear(1024, 1024), nn.Tanh(), nn.Linear(1024, 10)
    )
    x, y = torch.randn(n, 784), torch.randint(10, (n,))
    dataset = torch.utils.data.TensorDataset(x, y)
    sampler = torch.utils.data.DistributedSampler(dataset, shuffle=False)
    loader = torch.utils.data.DataLoader(dataset, batch_size=256, sampler=sampler)
    EKFAC(1e-3).fit(model[4:], [(torch.randn(4, 1024), y[:4])])  # what a first fit loads
    dist.barrier()
    began = time.perf_counter()
    ekfac = EKFAC(1e-3).fit(model, loader)
    seconds = time.perf_counter() - began
    torch.save((seconds, ekfac.transform(torch.ones(ekfac.n_features_in_))), f"{out}-{rank}")
    dist.destroy_process_group()


def run(size, n):
    """Return the seconds of the slowest of a number of ranks, and rank 0's answer."""
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "out")
        mp.spawn(fit, (size, n, os.path.join(folder, "store"), out), nprocs=size)
        found = [torch.load(f"{out}-{rank}") for rank in range(size)]
    return max(seconds for seconds, _ in found), found[0][1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    seconds = {1: [], 2: []}
    answers = {}
    for _ in range(args.repeats):
        for size, taken in seconds.items():
            elapsed, answers[size] = run(size, args.n)
            taken.append(elapsed)
    for size, taken in seconds.items():
        print(f"{size} rank{'s' * (size > 1)}: median, min, max {spread(taken)} s")
    one, two = (statistics.median(taken) for taken in seconds.values())
    print(f"two ranks are {one / two:.2f} times as fast")
    difference = (answers[2] - answers[1]).norm() / answers[1].norm()
    print(f"relative difference of the products: {difference:.1e}")


if __name__ == "__main__":
    main()
