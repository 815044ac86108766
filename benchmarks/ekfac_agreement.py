"""EK-FAC of fimkit against curvlinops 3.0.1 and kronfluence 1.0.1, in float64.

Small tanh networks (so that eigenvalues are distinct): Linears, Linears on sequences, ungrouped
Conv2d; bias and weight jointly; batches of unequal size. Relative differences are printed, and the
exit status is 1 if one is above 1e-8, 2 if no peer is installed.

What is comparable:

curvlinops   Everything: the empirical and the type-2 Fisher (fimkit's ``exact``) of cross-entropy
             have the same factors, Lambda and matrix, so dense matrices are compared, and the
             product with the damped inverse. It takes models with one output per example, as here,
             and its squared error has no factor 1/2, so that is left out.
kronfluence  Empirical Fisher only (its other kind samples labels). Its S is a mean over positions,
             fimkit's (as curvlinops's) the mean over examples of the sum over positions, so the
             traces of its S are multiplied by the number of positions first. Eigenvectors and
             Lambda do not depend on the scale of S, but eigenvectors are compared nowhere, as
             their signs are free. Compared are the trace of EK-FAC and the sorted Lambda per
             layer; trace(S) trace(A) and all products of their eigenvalues, which fimkit's `KFAC`
             has; and the product with the damped inverse.

Fitting with ``mc`` draws different labels in each library and is left out.

Run from the repository root::

    python -m benchmarks.ekfac_agreement
"""

import argparse
import sys
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.common import installed, machine
from benchmarks.peers import EKFAC
from benchmarks.problems import Block, MeanPool, Problem
from benchmarks.work import layers_of

TOLERANCE = 1e-8


class Found(NamedTuple):
    """A library's own object, and what is compared of it."""

    native: Any
    traces: torch.Tensor
    ifvp: torch.Tensor


def linears():
    """Three Linears on vectors."""
    model = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    return model, torch.randn(40, 7)


def sequences():
    """A transformer's block on 6 positions, and a classifier."""
    return nn.Sequential(Block(4, 2), MeanPool(), nn.Linear(4, 4)), torch.randn(40, 6, 4)


def convolutions():
    """Convolutions with stride, padding and dilation, and a classifier."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 3, (3, 2), stride=2, dilation=(1, 2)),
        nn.Tanh(),
        nn.Flatten(),
        nn.LazyLinear(4),
    )
    x = torch.randn(40, 2, 8, 7)
    model(x)
    return model, x


MODELS = {"linears": linears, "sequences": sequences, "convolutions": convolutions}


def make_problem(name, fisher):
    """Return the model in float64 with 40 examples in batches of 12."""
    torch.manual_seed(0)
    model, x = MODELS[name]()
    x, y = x.double(), torch.randint(4, (40,))
    return Problem(model.double(), x, y, (x[:1], y[:1]), 12, fisher=fisher)


def found_by(library, problem):
    """Return what a library finds."""
    contender = EKFAC[library](problem)
    fit, apply = contender.steps.values()
    native = fit()
    results = contender.results(native, apply(native))
    return Found(native, results["trace"], results["product"])


def difference(ours, theirs):
    """Return ``||ours - theirs|| / ||theirs||``."""
    return ((ours - theirs).norm() / theirs.norm()).item()


def sorted_difference(ours, theirs):
    """Return the same of the entries in ascending order."""
    return difference(*(tensor.flatten().sort()[0] for tensor in (ours, theirs)))


def curvlinops_differences(problem, ours, theirs):
    """Yield what is compared with curvlinops, and its relative difference."""
    eye = torch.eye(problem.size, dtype=torch.float64)
    yield "dense matrix", difference(ours.native.fisher_.to_dense(), theirs.native @ eye)


def kronfluence_differences(problem, ours, theirs):
    """Yield what is compared with kronfluence, and the largest relative difference of a layer."""
    from fimkit import KFAC

    kfac = KFAC(fisher=problem.fisher).fit(problem.model, problem.loader)
    factors, layers = theirs.native, layers_of(problem)
    found = {"sorted Lambda": [], "trace(S) trace(A)": [], "eigenvalues of S x A": []}
    for name in problem.layers:
        squares = factors["lambda_matrix"][name] / factors["num_lambda_processed"][name]
        found["sorted Lambda"].append(sorted_difference(ours.native.eigenvalues_[name], squares))
        sides = [
            factors[f"{side}_covariance"][name] / factors[f"num_{side}_covariance_processed"][name]
            for side in ("gradient", "activation")
        ]
        product = sides[0].trace() * layers[name].positions * sides[1].trace()
        found["trace(S) trace(A)"].append(difference(kfac.eigenvalues_[name].sum(), product))
        values = [factors[f"{side}_eigenvalues"][name] for side in ("gradient", "activation")]
        products = torch.outer(values[0] * layers[name].positions, values[1])
        found["eigenvalues of S x A"].append(sorted_difference(kfac.eigenvalues_[name], products))
    for label, values in found.items():
        yield label, max(values)


COMPARED = {
    ("curvlinops", "empirical"): curvlinops_differences,
    ("curvlinops", "exact"): curvlinops_differences,
    ("kronfluence", "empirical"): kronfluence_differences,
}


def compare(name, peer, fisher):
    """Yield what is compared of one model and one peer, and its relative difference."""
    problem = make_problem(name, fisher)
    ours, theirs = (found_by(library, problem) for library in ("fimkit", peer))
    yield "trace of a layer", (ours.traces / theirs.traces - 1).abs().max().item()
    yield "inverse times vector", difference(ours.ifvp, theirs.ifvp)
    yield from COMPARED[peer, fisher](problem, ours, theirs)
    weak = replace(problem, damping=problem.damping / 100)
    ours, theirs = (found_by(library, weak) for library in ("fimkit", peer))
    yield "the same, lambda / 100", difference(ours.ifvp, theirs.ifvp)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tolerance", type=float, default=TOLERANCE)
    args = parser.parse_args()
    print(machine())
    peers = installed(("curvlinops", "kronfluence"))
    worst = 0.0
    for peer, fisher in COMPARED:
        if peer not in peers:
            continue
        for name in MODELS:
            print(f"\n{name}, {fisher} Fisher, {peer}")
            for label, value in compare(name, peer, fisher):
                worst = max(worst, value)
                note = "" if value <= args.tolerance else f"   above {args.tolerance:.0e}"
                print(f"  {label:26}{value:9.1e}{note}")
    if not peers:
        sys.exit(2)
    print(f"\nlargest relative difference {worst:.1e}, tolerance {args.tolerance:.0e}")
    sys.exit(0 if worst <= args.tolerance else 1)


if __name__ == "__main__":
    main()
