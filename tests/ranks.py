"""What the processes of tests/test_distributed.py run, and how they are started."""

from __future__ import annotations

import copy
import datetime
import os
import pickle
import signal
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import fimkit
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
    for process in context.processes:
        process.join()
    paths = [Path(folder) / f"{rank}.pt" for rank in range(size)]
    return [torch.load(p, weights_only=False) if p.exists() else None for p in paths]


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
    if function is not one_dies:
        dist.destroy_process_group()


# -- what each rank gives, and what must come of it ------------------------------------------------


def _sampled(dataset, **options):
    sampler = torch.utils.data.DistributedSampler(dataset, **options)
    return torch.utils.data.DataLoader(dataset, batch_size=3, sampler=sampler)


def _raised(function):
    try:
        function()
    except Exception as error:
        notes = " ".join(getattr(error, "__notes__", ()))
        return f"{type(error).__name__}: {error} {notes}"
    return None


class Failing:
    """A loader that fails after two batches."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        yield from self.batches[:2]
        raise OSError("the disk is gone")


def shards_and_faults(rank, size, folder):
    """Fit what ranks may pass, right and wrong; return numbers and messages by name."""
    model, x, y = problem("mlp")
    dataset = torch.utils.data.TensorDataset(x, y)
    own = batches(x, y, shard(rank, size), 3)
    v = torch.linspace(-1, 1, sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    found = {}

    # Samplers, positions and sampled labels.
    for name, options in {"sampler": {}, "shuffled": {"seed": 3}}.items():
        loader = _sampled(dataset, shuffle=name == "shuffled", **options)
        for method in (EKFAC, DataInf):
            estimator = method(0.1, cache_budget=0) if method is EKFAC else method(0.1)
            estimator.fit(model, loader)
            found[name, method.__name__] = estimator.n_samples_seen_, estimator.transform(v)
    dropped = EKFAC(0.1).fit(model, _sampled(dataset, shuffle=False, drop_last=True))
    found["drop_last"] = dropped.n_samples_seen_
    mc = Diagonal(0.1, fisher="mc", random_state=5)
    found["mc, sampler"] = mc.fit(model, _sampled(dataset, shuffle=True)).transform(v)
    positions = list(shard(rank, size))
    data = fimkit.ModelData(model, dataset, indices=positions, batch_size=4)
    found["mc, ModelData"] = mc.fit(data).transform(v)
    same = [(x[:4], y[:4])]  # the same examples on all ranks: only random numbers differ
    found["mc, lists"] = mc.fit(model, same).transform(v)
    fresh = Diagonal(0.1, fisher="mc").fit(model, own)
    found["mc, no seed"] = fresh.transform(v)

    # What stays on its ranks, and what is written.
    datainf = DataInf(0.1, blocks="parameter").fit(model, own)
    found["datainf"] = datainf.transform(v)
    datainf.save(f"{folder}/datainf.fimkit")
    dual = Explicit(0.1, solver="dual", fisher="exact").fit(model, own)
    found["dual"] = dual.transform(v)
    dual.save(f"{folder}/dual.fimkit")
    stored = DataInf(0.1, storage=f"{folder}/rows").fit(model, own)
    found["stored"] = stored.transform(v)
    some = torch.stack([v, v.flip(0), torch.ones_like(v)])
    for name, given in {
        "longer": v * (1 + rank),
        "turned": -v if rank else v,
        "permuted": v.flip(0) if rank else v,
        "one of three": some.roll(rank, 1) if rank else some,
        "one number": v + rank * 1e-7 * torch.eye(len(v), dtype=v.dtype)[3],
        "more": some[: 1 + rank],
    }.items():
        found["other vectors", name] = _raised(lambda given=given: datainf.transform(given))
        found["other vectors, dual", name] = _raised(lambda given=given: dual.transform(given))
    found["rounded"] = datainf.transform(v * (1 + rank * 1e-15))
    whole = fimkit.ModelData(model, dataset, batch_size=8)
    found["same data"] = datainf.transform(whole)
    other = fimkit.ModelData(model, dataset, batch_size=8, indices=list(range(N))[:: 1 - 2 * rank])
    found["other data"] = _raised(lambda: datainf.transform(other))
    found["own data"] = _raised(lambda: DataInf(0.1).fit_transform(data))
    found["pickled"] = _raised(lambda: pickle.dumps(datainf))

    # A wrapped model, whose gradients are not touched.
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
    fired = []
    for parameter in wrapped.parameters():
        parameter.register_post_accumulate_grad_hook(fired.append)
    found["ddp"] = EKFAC(0.1).fit(wrapped, own).transform(v)
    found["ddp, gradients"] = len(fired), [p.grad for p in wrapped.parameters()]

    # Faults of rank 1 alone.
    def fault(data=own, given=model, **parameters):
        estimator = EKFAC(**{"regularization": 0.1, **(parameters if rank == 1 else {})})
        return _raised(lambda: estimator.fit(given, data))

    bad = own[0][0].clone()
    bad[0, 0] = torch.nan
    found["empty"] = fault([] if rank == 1 else own)
    found["nan"] = fault([(bad, own[0][1]), *own[1:]] if rank == 1 else own)
    found["loader"] = fault(Failing(own) if rank == 1 else own)
    found["settings"] = fault(fisher="exact")
    found["invalid"] = fault(regularization=-1)
    found["swapped"] = fault(given=3 if rank == 1 else model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].bias[2] += 1e-12
    found["weights"] = fault(given=other if rank == 1 else model)
    wide = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    found["shapes"] = fault(given=wide if rank == 1 else model)
    twice = torch.utils.data.DistributedSampler(dataset, num_replicas=size, rank=0)
    found["one shard"] = fault(torch.utils.data.DataLoader(dataset, sampler=twice, batch_size=4))
    found["afterwards"] = EKFAC(0.1).fit(model, own).transform(v)
    return found


def fully_sharded(rank, size):
    """Fit a model whose parameters are divided, as it is and as a plain copy of it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    model, x, y = problem("mlp")
    own = batches(x, y, shard(rank, size), 3)
    divided = copy.deepcopy(model)
    mesh = dist.device_mesh.init_device_mesh("cpu", (size,))
    fully_shard(divided[0], mesh=mesh)
    fully_shard(divided, mesh=mesh)
    refused = _raised(lambda: EKFAC(0.1).fit(divided, own))
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    options = StateDictOptions(full_state_dict=True)
    plain.load_state_dict(get_model_state_dict(divided, options=options))
    v = torch.ones(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    return refused, EKFAC(0.1).fit(plain, own).transform(v)


def one_dies(rank, size):
    """Lose a rank in the middle of its pass."""
    model, x, y = problem("mlp")
    own = batches(x, y, shard(rank, size), 3)

    def dying():
        yield own[0]
        os.kill(os.getpid(), signal.SIGKILL)

    began = time.monotonic()
    message = _raised(lambda: Diagonal(0.1).fit(model, dying() if rank == 1 else own))
    return message, time.monotonic() - began
