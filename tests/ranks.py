"""What the processes of tests/test_distributed.py run, and how they are started."""

from __future__ import annotations

import copy
import datetime
import os
import pickle
import signal
import time
import traceback
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import fimkit
from fimkit import EKFAC, KFAC, DataInf, Diagonal, Explicit, influence

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


class Free(nn.Module):
    """A parameter that no layer's rule covers."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4))

    def forward(self, x):
        return x * self.scale.exp()


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
        if name == "scaled":
            model = nn.Sequential(nn.Linear(5, 4), Free(), nn.Linear(4, 3))
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


# Models that are divided over the ranks; of "scaled" one parameter is met by no layer.
SHARDED_CASES = {
    **{name: CASES[name] for name in ("explicit primal", "explicit dual", "datainf")},
    **{name: CASES[name] for name in ("ekfac, replayed", "ekfac, branching", "kfac", "diagonal")},
    "scaled": ("scaled", lambda: EKFAC(0.1)),
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
    if function not in (one_dies, one_fails_early):
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


class Inner(nn.Module):
    """A part with buffers, which training in parallel would keep the same on all ranks."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.first = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh())
            self.last = nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.first(x))


# How examples at some positions are split, by positions among them.
FOLDS = [
    lambda held, k=k: tuple(
        [i for i, position in enumerate(held) if (position % 3 == k) == test]
        for test in (False, True)
    )
    for k in range(3)
]


class Applied(nn.Module):
    """A function that is no part of what a module shows of itself."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Scaled(nn.Module):
    """A buffer that is in no state dict."""

    def __init__(self, scale):
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale).double(), persistent=False)

    def forward(self, x):
        return torch.tanh(self.scale * x)


class Tempered(fimkit.losses.Loss):
    """Cross-entropy at a temperature."""

    def __init__(self, temperature):
        self.temperature = temperature

    def losses(self, outputs, targets):
        return nn.functional.cross_entropy(outputs / self.temperature, targets, reduction="none")


def loss_at(model, batch, t):
    """Cross-entropy at a temperature, as a function."""
    return Tempered(t).losses(model(batch[0]), batch[1])


def _with(model, activation):
    return nn.Sequential(model[0], activation, model[2])


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

    # A part of a model that is wrapped, whose buffers are not sent about in each batch.
    inner = Inner().double().eval()
    found["inner"] = results(EKFAC(0.1).fit(inner, own), inner, x, y)
    inner.first = nn.parallel.DistributedDataParallel(inner.first)
    found["wrapped inside"] = results(EKFAC(0.1).fit(inner, own), inner, x, y)
    found["wrapped inside, unchanged"] = "forward" not in vars(inner.first)
    inner.train()
    nn.functional.cross_entropy(inner(x + rank), y).backward()
    everyone = [None] * size
    dist.all_gather_object(everyone, inner.first.module[0].weight.grad.tolist())
    found["wrapped inside, trains"] = everyone[0] == everyone[1]

    # One regularization for all ranks.
    grid = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]
    part = fimkit.ModelData(model, dataset, indices=positions)
    folds = [split(positions) for split in FOLDS]
    for method in (EKFAC, Diagonal, lambda: Explicit(solver="primal")):
        search = fimkit.RegularizationCV(method(), grid, cv=folds).fit(part)
        found["search", type(search.estimator).__name__] = (
            search.regularization_,
            torch.from_numpy(search.cv_results_["mean_test_score"]),
            search.transform(v),
        )
    refusals = {
        "search, rows": lambda: fimkit.RegularizationCV(DataInf(), grid, cv=folds).fit(part),
        "search, folds": lambda: fimkit.RegularizationCV(EKFAC(), cv=2 + rank).fit(part),
        "search, grid": lambda: fimkit.RegularizationCV(EKFAC(), [0.1 + rank]).fit(part),
        "search, fault": lambda: fimkit.RegularizationCV(EKFAC(), cv=9).fit(part),
    }
    for name, search in refusals.items():
        found[name] = _raised(search)

    # Faults of rank 1 alone.
    def fault(data=own, given=model, otherwise="cross_entropy", **parameters):
        parameters = parameters if rank == 1 else {"loss": otherwise}
        estimator = EKFAC(**{"regularization": 0.1, **parameters})
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
    found["activation"] = fault(given=_with(model, nn.ReLU()) if rank == 1 else model)
    found["slope"] = fault(given=_with(model, nn.LeakyReLU(0.1 + 0.1 * rank)))
    found["function"] = fault(given=_with(model, Applied([torch.tanh, torch.sin][rank])))
    found["buffer"] = fault(given=_with(model, Scaled(1.0 + rank)))
    smoothing = nn.CrossEntropyLoss(label_smoothing=0.1)
    found["loss option"] = fault(loss=smoothing, otherwise=nn.CrossEntropyLoss())
    weighted = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 1.0]).double())
    found["loss weights"] = fault(loss=weighted, otherwise=nn.CrossEntropyLoss())
    found["loss attribute"] = fault(loss=Tempered(2.0), otherwise=Tempered(1.0))
    found["loss argument"] = fault(loss=partial(loss_at, t=2.0), otherwise=partial(loss_at, t=1.0))
    found["one shard"] = fault(_sampled(dataset, num_replicas=size, rank=0))
    found["other seeds"] = fault(_sampled(dataset, seed=rank))
    found["one shuffles"] = fault(_sampled(dataset, shuffle=rank == 0))
    found["more replicas"] = fault(_sampled(dataset, num_replicas=4, rank=rank))
    found["other lengths"] = fault(_sampled(torch.utils.data.Subset(dataset, range(20 + rank))))
    found["one drops"] = fault(_sampled(dataset, drop_last=rank == 0))
    found["one samples"] = fault(own if rank else _sampled(dataset))
    later = _sampled(dataset)
    later.sampler.set_epoch(rank)
    found["other epochs"] = fault(later)
    unshuffled = _sampled(dataset, shuffle=False, seed=rank)
    found["seed unused"] = EKFAC(0.1).fit(model, unshuffled).transform(v)
    found["afterwards"] = EKFAC(0.1).fit(model, own).transform(v)
    return found


def fully_sharded(rank, size):
    """Fit models whose parameters are divided; return numbers, messages and states by name."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import (
        FullyShardedDataParallel,
        MixedPrecisionPolicy,
        fully_shard,
    )
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = dist.device_mesh.init_device_mesh("cpu", (size,))

    def divide(model, **options):
        for layer in model.children():
            if any(True for _ in layer.parameters(recurse=False)):
                fully_shard(layer, mesh=mesh, **options)
        return fully_shard(model, mesh=mesh, **options)

    found = {}
    for name, (kind, make) in SHARDED_CASES.items():
        model, x, y = problem(kind)
        step = 1 if kind == "branching" else 2 + rank
        own = batches(x, y, shard(rank, size), step)
        model_of_all = divide(problem(kind)[0])
        before = _shown_state(model_of_all)
        estimator = make().fit(model_of_all, own)
        found[name] = results(estimator, model, x, y)
        found[name, "unchanged"] = before == _shown_state(model_of_all)
        # It is divided as before, and trains as before.
        loss = nn.functional.cross_entropy(model_of_all(x), y)
        loss.backward()
        nn.functional.cross_entropy(model(x), y).backward()
        found[name, "trains"] = all(
            p.grad is q.grad is None or torch.allclose(p.grad.full_tensor(), q.grad)
            for p, q in zip(model_of_all.parameters(), model.parameters(), strict=True)
        )

    model, x, y = problem("mlp")
    own = batches(x, y, shard(rank, size), 3)
    v = torch.ones(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    sharded = divide(problem("mlp")[0])
    ekfac = EKFAC(0.1).fit(sharded, own)

    # As data, of which ranks have different numbers of batches; two of them at a time.
    data = fimkit.ModelData(sharded, (x, y), indices=list(shard(rank, size)), batch_size=3)
    before = _shown_state(sharded)
    found["transform"] = torch.from_numpy(ekfac.transform(data))
    found["influence"] = torch.from_numpy(influence.pairwise_scores(ekfac, data, data))
    first, second = ekfac.gradients(data), ekfac.gradients(data)
    next(first), next(second)
    first.close()
    found["held"] = [hasattr(p, "placements") for p in sharded.parameters()]
    rest = sum(rows.n for rows in second)
    found["rest"] = rest, before == _shown_state(sharded)
    found["data, fitted"] = KFAC(0.1).fit(data).transform(v)

    # What its user gathered stays so.
    for module in (sharded, sharded[0], sharded[2]):
        module.unshard()
    found["gathered"] = EKFAC(0.1).fit(sharded, own).transform(v)
    found["stays"] = not any(hasattr(p, "placements") for p in sharded.parameters())
    for module in (sharded, sharded[0], sharded[2]):
        module.reshard()

    # Faults leave it as it was.
    bad = [(own[0][0] * torch.nan, own[0][1]), *own[1:]] if rank == 1 else own
    found["nan"] = _raised(lambda: EKFAC(0.1).fit(sharded, bad))
    found["raises"] = _raised(lambda: EKFAC(0.1).fit(sharded, [(x[:, :2], y)]))
    found["one divides"] = _raised(lambda: EKFAC(0.1).fit(model if rank else sharded, own))
    found["as before"] = before == _shown_state(sharded)

    # Other divisions.
    half = divide(problem("mlp")[0], mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    before = _shown_state(half)
    found["mixed"] = _raised(lambda: EKFAC(0.1).fit(half, own))
    found["mixed, as before"] = before == _shown_state(half)
    flattened = FullyShardedDataParallel(problem("mlp")[0], device_id=torch.device("cpu"))
    found["flattened"] = _raised(lambda: EKFAC(0.1).fit(flattened, own))
    parallel = parallelize_module(problem("mlp")[0], mesh, {"0": ColwiseParallel()})
    found["parallel"] = _raised(lambda: EKFAC(0.1).fit(parallel, own))
    for name, refused in {"mixed": half, "parallel": parallel}.items():
        plain = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.zero_()
        options = StateDictOptions(full_state_dict=True)
        plain.load_state_dict(get_model_state_dict(refused, options=options))
        found[name, "copied"] = EKFAC(0.1).fit(plain, own).transform(v)
    return found


def _shown_state(model):
    """Return what `fully_shard` keeps of a model, its hooks, and its parameters themselves."""
    state = []
    for name, module in model.named_modules():
        hooks = [*module._forward_pre_hooks.items(), *module._forward_hooks.items()]
        state.append((name, module.training, [(key, str(hook)) for key, hook in hooks]))
        if hasattr(module, "unshard"):
            groups = module._get_fsdp_state()._fsdp_param_groups
            state.append([(g._sharded_state, g._training_state, g.reduce_grads) for g in groups])
            state.append([(g.reshard_after_backward, g._reshard_after_forward) for g in groups])
    return state, [(id(p), type(p.data).__name__, p.grad is None) for p in model.parameters()]


def one_fails_early(rank, size):
    """Fail on a rank that gives up waiting before the other comes."""
    model, x, y = problem("mlp")
    own = batches(x, y, shard(rank, size), 3)
    if rank == 1:
        own = [(own[0][0] * torch.nan, own[0][1])]

    def slow():
        time.sleep(5)
        yield from own

    return _raised(lambda: Diagonal(0.1).fit(model, own if rank == 1 else slow()))


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
