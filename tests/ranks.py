"""What the processes of tests/test_distributed.py run, and how they are started."""

from __future__ import annotations

import datetime
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from fimkit import EKFAC, KFAC, DataInf, Diagonal, Explicit

N = 23


class Branching(nn.Module):
    """A layer that only examples with a positive first input meet, an embedding and a norm."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.some = nn.Linear(4, 4)
        self.last = nn.Linear(4, 3)

    def forward(self, tokens):
        h = self.norm(self.table(tokens)).sum(1)
        if bool((tokens[:, 0] > 2).all()):
            h = h + torch.tanh(self.some(h))
        return self.last(h)


def problem(name):
    """Return a model, and all inputs and targets."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        targets = torch.randint(3, (N,))
        if name == "branching":
            # Examples are in batches of one, and only those of the last rank meet the layer.
            tokens = torch.randint(3, (N, 4))
            tokens[-5:, 0] = 4
            return Branching().double(), tokens, targets
        if name == "convolution":
            model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
            return model.double(), torch.randn(N, 2, 3, 3, dtype=torch.float64), targets
        width = 2 if name == "narrow" else 5
        model = nn.Sequential(nn.Linear(width, 4), nn.Tanh(), nn.Linear(4, 3))
        if name == "narrow":
            model = nn.Linear(width, 3)
        return model.double(), torch.randn(N, width, dtype=torch.float64), targets


def shard(rank, size):
    """Return one rank's examples: uneven, and none the others have."""
    edges = [0, *(int(N * ((i + 1) / size) ** 1.5) for i in range(size - 1)), N]
    return range(edges[rank], edges[rank + 1])


def batches(x, y, examples, step):
    """Return some examples in batches of a size."""
    indices = list(examples)
    parts = [indices[i : i + step] for i in range(0, len(indices), step)]
    return [(x[part], y[part]) for part in parts]


CASES = {
    "explicit primal": ("narrow", lambda: Explicit()),
    "explicit turns primal": ("narrow", lambda: Explicit(solver="auto", blocks="parameter")),
    "explicit dual": ("mlp", lambda: Explicit(solver="dual")),
    "explicit dual blocks": ("convolution", lambda: Explicit(1e-2, blocks="layer")),
    "explicit dual, exact": ("mlp", lambda: Explicit(1e-2, solver="dual", fisher="exact")),
    "datainf": ("mlp", lambda: DataInf()),
    "datainf, convolution": ("convolution", lambda: DataInf(1e-2, blocks="parameter")),
    "datainf, exact": ("mlp", lambda: DataInf(fisher="exact")),
    "datainf, primal": ("narrow", lambda: DataInf()),
    "datainf, table": ("branching", lambda: DataInf(0.1)),
    "ekfac": ("mlp", lambda: EKFAC()),
    "ekfac, replayed": ("mlp", lambda: EKFAC(cache_budget=0)),
    "ekfac, convolution": ("convolution", lambda: EKFAC(fisher="predicted")),
    "ekfac, exact": ("mlp", lambda: EKFAC(1e-2, fisher="exact")),
    "ekfac, branching": ("branching", lambda: EKFAC(0.1)),
    "ekfac, reduce": ("convolution", lambda: EKFAC(0.1, weight_sharing="reduce")),
    "kfac": ("convolution", lambda: KFAC()),
    "diagonal": ("convolution", lambda: Diagonal()),
}


def results(estimator, model, x, y):
    """Return what a fitted estimator answers, at training gradients, as float64 tensors."""
    vectors = []
    for i in range(4):
        loss = nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        vectors.append(
            torch.cat(
                [
                    torch.zeros(p.numel(), dtype=p.dtype) if g is None else g.flatten()
                    for g, p in zip(found, model.parameters(), strict=True)
                ]
            )
        )
    vectors = torch.stack(vectors)
    damping = estimator._damping()
    numbers = {
        "transform": estimator.transform(vectors),
        "inverse_transform": estimator.inverse_transform(vectors),
        "score": estimator.score_samples(vectors),
        "path": estimator.score_path(vectors, [0.1, 1.0]),
        "mahalanobis": estimator.mahalanobis(vectors),
        "regularization": list(estimator.regularization_.values())
        if isinstance(estimator.regularization_, dict)
        else estimator.regularization_,
        "diagonal": estimator.fisher_.diagonal(damping),
        "trace": estimator.fisher_.trace(damping),
        "dense": estimator.fisher_.to_dense(damping),
        "n": estimator.n_samples_seen_,
    }
    numbers = {k: torch.as_tensor(v, dtype=torch.float64) for k, v in numbers.items()}
    return {**numbers, "coverage": estimator.coverage_}


def fit_cases(rank, size):
    """Fit every case on this rank's shard."""
    found = {}
    for name, (kind, make) in CASES.items():
        model, x, y = problem(kind)
        step = 1 if kind == "branching" else 2 + rank
        estimator = make().fit(model, batches(x, y, shard(rank, size), step))
        found[name] = results(estimator, model, x, y)
    return found


def start(function, size, *arguments, folder, timeout=60.0):
    """Run a function on ranks of a gloo group, and return what each returned or raised."""
    context = mp.spawn(
        _run,
        (function, size, arguments, str(folder), timeout),
        nprocs=size,
        join=False,
        start_method="spawn",
    )
    while not context.join():
        pass
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _run(rank, function, size, arguments, folder, timeout):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=timeout),
    )
    try:
        result = function(rank, size, *arguments)
    except Exception:
        result = traceback.format_exc()
    torch.save(result, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
