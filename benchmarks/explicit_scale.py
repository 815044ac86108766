"""Memory and time of exact damped inverse-Fisher-vector products at two million parameters, on CPU.

A 784-1024-1024-10 MLP (1,863,690 parameters), briefly trained on synthetic data, and k float32
vectors, half random and half training gradients; ``Explicit(regularization=lambda)`` computes
(F + lambda I)^-1 v for the empirical Fisher of all n examples. A dense F would be 12.6 TiB.

Times: ``fit``, ``fit`` and the first vector (which pays for the factorisation), and ``transform``
of all k afterwards.

Memory: the process's resident set. The baseline is read immediately before ``fit``, when model,
data and vectors exist, torch has run this model forward and backward, and freed memory has been
handed back to the system; so it counts the vectors once. The kernel's peak is then reset, and read
again after ``fit`` and after ``transform``. As the result is as large as the vectors, "above twice
the vectors' own size" is the peak less the baseline less the result: what the computation needs
beyond its inputs and its output. Where the kernel cannot reset the peak, the process's highest
resident set is used, and the output says so.

Check: for a few vectors v and their results u, ||(F + lambda I) u - v|| / ||v|| with
F u = (1/n) sum_i g_i (g_i^T u), computed without the library in float64 on a float64 copy of the
model: a forward-mode derivative of the per-example losses along u, then one backward of the losses
weighted by it. Two roundings that are not the solver's enter it: of the float32 model's gradients
(``--model-dtype float64`` removes it) and of u to v's dtype (so it is also given for the same
vectors passed as float64).

Run from the repository root, one fresh process a run, with nothing else running::

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.explicit_scale
"""

import argparse
import copy
import time

import torch
from torch import nn
from torch.func import functional_call, jvp
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common import MIB, PeakMemory, machine


def make_problem(n_examples, width, seed):
    """Return a briefly trained MLP and its training inputs and labels."""
    torch.manual_seed(seed)
    y = torch.randint(10, (n_examples,))
    x = torch.randn(10, 784)[y] + 3.0 * torch.randn(n_examples, 784)
    model = nn.Sequential(
        nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(10):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval(), x, y


def make_vectors(model, x, y, k):
    """Return (k, p) float32 vectors: random ones, then training gradients."""
    params = list(model.parameters())
    vectors = torch.empty(k, sum(p.numel() for p in params))
    n_random = k // 2
    vectors[:n_random].normal_()
    for i, row in enumerate(vectors[n_random:]):
        gradients = torch.autograd.grad(cross_entropy(model(x[i : i + 1]), y[i : i + 1]), params)
        torch.cat([g.flatten() for g in gradients], out=row)
    return vectors


def fisher_product(model, x, y, u, batch_size=250):
    """Return F u for the empirical Fisher, streaming over examples, without forming any g_i."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    pieces = u.split([p.numel() for p in params.values()])
    tangents = {
        name: piece.view_as(p) for (name, p), piece in zip(params.items(), pieces, strict=True)
    }
    total = torch.zeros_like(u)
    for xb, yb in zip(x.split(batch_size), y.split(batch_size), strict=True):

        def losses(params, xb=xb, yb=yb):
            return cross_entropy(functional_call(model, params, (xb,)), yb, reduction="none")

        _, slopes = jvp(losses, (params,), (tangents,))
        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        weighted = (slopes.detach() * losses(leaves)).sum()
        gradients = torch.autograd.grad(weighted, list(leaves.values()))
        total += torch.cat([g.flatten() for g in gradients])
    return total / len(x)


def residuals(model, x, y, results, vectors, damping):
    """Return ||(F + damping I) u - v|| / ||v|| of each pair, in float64."""
    model, x = copy.deepcopy(model).double(), x.double()
    found = []
    for u, v in zip(results.double(), vectors.double(), strict=True):
        product = fisher_product(model, x, y, u) + damping * u
        found.append(((product - v).norm() / v.norm()).item())
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vectors", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--model-dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--threads", type=int, default=None, help="default: torch's own choice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checks", type=int, default=4, help="vectors whose residual is checked")
    parser.add_argument(
        "--damping",
        type=float,
        default=None,
        help="default: 0.1 * trace(F) / p, the trace estimated from the training-gradient vectors",
    )
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    from fimkit import Explicit

    model, x, y = make_problem(args.examples, args.width, args.seed)
    vectors = make_vectors(model, x, y, args.vectors)
    if args.model_dtype == "float64":
        model, x = model.double(), x.double()
    loader = DataLoader(TensorDataset(x, y), batch_size=args.batch_size)
    k, p = vectors.shape
    n_random = k // 2
    damping = args.damping or 0.1 * sum(v.dot(v).item() for v in vectors[n_random:]) / (
        (k - n_random) * p
    )
    own = vectors.nbytes

    memory = PeakMemory()
    start = time.perf_counter()
    estimator = Explicit(regularization=damping).fit(model, loader)
    fit_seconds = time.perf_counter() - start
    fit_peak = memory.peak()
    estimator.transform(vectors[:1])
    first_seconds = time.perf_counter() - start
    start = time.perf_counter()
    results = estimator.transform(vectors)
    transform_seconds = time.perf_counter() - start
    peak = memory.peak()

    print(machine())
    print(
        f"p = {p:,}  n = {len(x):,}  k = {k} ({n_random} random, {k - n_random} training gradients)"
        f"  batch size = {args.batch_size}  lambda = {damping:.3g}  {args.model_dtype} model"
    )
    print("\nseconds")
    print(f"  fit                                  {fit_seconds:9.2f}")
    print(f"  fit and the first vector             {first_seconds:9.2f}")
    print(f"  transform of all {k:<4} afterwards     {transform_seconds:9.2f}")
    print("\nMiB" + ("" if memory.was_reset else " (peak of the process's whole life)"))
    for label, size in (
        ("the vectors' own size", own),
        ("baseline: model, data, vectors", memory.baseline),
        ("peak of fit above baseline", fit_peak - memory.baseline),
        ("peak above baseline", peak - memory.baseline),
        ("peak above twice the vectors' own size", peak - memory.baseline - results.nbytes),
    ):
        print(f"  {label:40}{size / MIB:9.1f}")

    half = min(args.checks // 2, n_random)
    picked = [*range(half), *range(n_random, min(n_random + args.checks - half, k))]
    chosen = vectors[picked]
    single = residuals(model, x, y, results[picked], chosen, damping)
    double = residuals(model, x, y, estimator.transform(chosen.double()), chosen, damping)
    print("\nresidual ||(F + lambda I) u - v|| / ||v||")
    print(f"  {'':22}{'float32 in, out':>16}{'float64 in, out':>18}")
    for i, a, b in zip(picked, single, double, strict=True):
        kind = "random" if i < n_random else "training gradient"
        print(f"  {kind:22}{a:16.1e}{b:18.1e}")


if __name__ == "__main__":
    main()
