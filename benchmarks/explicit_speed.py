"""Time of exact damped inverse-Fisher-vector products for a small dense model, on CPU.

A 64-64-10 MLP (4,810 parameters), briefly trained on synthetic digits-shaped data, and k training
gradients v as vectors. Every contender computes (F + lambda I)^-1 v for the empirical Fisher
F = mean over examples of g g^T, from the same float32 model, loader and float32 vectors:

fimkit      ``Explicit(regularization=lambda).fit(model, loader).transform(V)``. The model is
            float32; the library does its linear algebra in float64.
nngeometry  ``FIM(..., PMatDense)`` of the log-probability of the true label, whose gradients are
            those of the empirical Fisher, then ``solve`` with the k vectors as one ``PFMapDense``,
            its batched route (one LDL factorisation). float32.
torch       ``torch.func.vmap(grad)``, the dense F, Cholesky. Written by hand, float32.

Build (or fit) and solve (or transform) are timed apart. Contenders take turns: one warm-up round
that is not counted, then ``--repeats`` rounds in rotating order. The error of a result u is
||u - u_ref|| / ||u_ref||, where u_ref comes from a float64 copy of the model, a dense F and a
Cholesky factorisation; the largest and the median over vectors and rounds are printed. A float32
model's gradients are rounded before any solver sees them: the line "floor" is the same float64
solve with the gradients of the float32 model. A contender that cannot be imported is skipped with
a note.

Run from the repository root, with nothing else running::

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.explicit_speed --repeats 5

(Threads that spin while they wait slow down whatever runs next.)
"""

import argparse
import copy
import statistics

import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common import installed, machine, spread, table, timed, turns


def make_problem(n_examples, seed):
    """Return a briefly trained 64-64-10 MLP and its training inputs and labels."""
    torch.manual_seed(seed)
    y = torch.randint(10, (n_examples,))
    x = torch.randn(10, 64)[y] + 3.0 * torch.randn(n_examples, 64)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval(), x, y


def per_example_gradients(model, x, y):
    """Rows g_i, flat in ``named_parameters()`` order, by ``torch.func``."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params, xi, yi):
        return cross_entropy(functional_call(model, params, (xi[None],)), yi[None])

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))(params, x, y)
    return torch.cat([g.flatten(1) for g in gradients.values()], dim=1)


def dense_fisher(gradients):
    """Return the mean over rows g of g g^T."""
    return gradients.T @ gradients / len(gradients)


def cholesky_solve(fisher, vectors, damping):
    """Return (F + damping I)^-1 of each row of ``vectors``."""
    damped = fisher.clone()
    damped.diagonal().add_(damping)
    return torch.cholesky_solve(vectors.T, torch.linalg.cholesky(damped)).T


def fimkit_contender():
    from fimkit import Explicit

    def build(model, loader, damping):
        return Explicit(regularization=damping).fit(model, loader)

    def solve(estimator, vectors, damping):
        return estimator.transform(vectors)

    return build, solve


def nngeometry_contender():
    from nngeometry import FIM
    from nngeometry.object import PFMapDense, PMatDense

    def build(model, loader, damping):
        def log_probability(x, y):
            return -cross_entropy(model(x), y, reduction="none")[:, None]

        # "regression" takes the function's outputs as they are: F = mean of their gradients'
        # outer products, whatever the outputs mean.
        return FIM(model, loader, PMatDense, variant="regression", function=log_probability)

    def solve(fisher, vectors, damping):
        rows = PFMapDense(fisher.generator, data=vectors[None])
        return fisher.solve(rows, regul=damping).to_torch()[0]

    return build, solve


def torch_contender():
    def build(model, loader, damping):
        return dense_fisher(torch.cat([per_example_gradients(model, x, y) for x, y in loader]))

    return build, cholesky_solve


CONTENDERS = {
    "fimkit": fimkit_contender,
    "nngeometry": nngeometry_contender,
    "torch": torch_contender,
}


def relative_errors(result, reference):
    """Return the relative error of each row."""
    return (result.double() - reference).norm(dim=1) / reference.norm(dim=1)


def summary(errors):
    """Return the largest and the median of a list of tensors of errors as text."""
    errors = torch.cat(errors)
    return f"{errors.max().item():9.1e} {errors.median().item():9.1e}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--vectors", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=500)
    parser.add_argument("--threads", type=int, default=None, help="default: torch's own choice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--damping", type=float, default=None, help="default: 0.1 * trace(F) / p, as measured"
    )
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    model, x, y = make_problem(args.examples, args.seed)
    loader = DataLoader(TensorDataset(x, y), batch_size=args.batch_size)
    exact = per_example_gradients(copy.deepcopy(model).double(), x.double(), y)
    p = exact.shape[1]
    damping = args.damping or 0.1 * exact.square().sum(1).mean().item() / p
    vectors = exact[: args.vectors].float()
    reference = cholesky_solve(dense_fisher(exact), vectors.double(), damping)
    del exact
    rounded = per_example_gradients(model, x, y).double()
    from_rounded = cholesky_solve(dense_fisher(rounded), vectors.double(), damping)
    floor = [relative_errors(from_rounded, reference)]
    del rounded, from_rounded

    print(machine())
    names = installed(CONTENDERS)
    print(
        f"p = {p:,}  n = {len(x):,}  k = {len(vectors)} training gradients  "
        f"batch size = {args.batch_size}  lambda = {damping:.3g}  repeats = {args.repeats}"
    )

    seconds = {name: [] for name in names}  # of each run: build, solve, both
    errors = {name: [] for name in names}
    contenders = {name: CONTENDERS[name]() for name in names}
    for round_, name in turns(names, args.repeats):
        build, solve = contenders[name]
        building, _, built = timed(build, model, loader, damping)
        solving, _, result = timed(solve, built, vectors, damping)
        if round_:
            seconds[name].append((building, solving, building + solving))
            errors[name].append(relative_errors(result, reference))

    print("\nseconds: median, minimum, maximum; relative error: largest, median")
    rows = [("", "build", "solve", "total", "error")]
    for name in names:
        rows.append((name, *map(spread, zip(*seconds[name], strict=True)), summary(errors[name])))
    table([*rows, ("floor", "", "", "", summary(floor))], spreads=3, width=24)
    if "fimkit" in names:
        totals = {name: statistics.median(run[2] for run in seconds[name]) for name in names}
        print("\nratio of median totals to fimkit's (above 1: fimkit is faster)")
        for name in names:
            if name != "fimkit":
                print(f"{name:12}{totals[name] / totals['fimkit']:7.2f}")


if __name__ == "__main__":
    main()
