"""The methods without any library: as torch's own products, and as loops that others run.

The former, in float64, are the references that results are compared with.

ekfac       EK-FAC in as few lines and operations as it takes: one forward and backward pass, one
            product per layer, side and batch, eigendecompositions in float64 side by side, one
            thread each, and Λ by one product per batch, or per example where it has more positions.
            Inputs and gradients of all batches stay in memory, nothing is checked, and what is
            neither Linear nor Conv2d is not known.
dense       Per-example gradients by ``torch.func``, the dense F, Cholesky.
gram        The same gradients, and the exact inverse in the space of examples.
datainf     The same gradients, and the closed form: two products per layer.
vmap        DataInf as dattri 0.1.0 had it: one vector at a time, a ``vmap`` over examples.
loop        DataInf as the paper's reference code has it, from its formula: a backward pass per
            example; then for each vector and layer a Python loop over examples. It is spared
            finding lambda again for each vector.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn
from torch.func import vmap
from torch.nn.functional import cross_entropy, pad

from benchmarks.contender import Contender
from benchmarks.problems import flatten, forward_backward, vmapped_gradients

# Bytes of per-example gradients at a time.
CHUNK = 8 * 2**20


class KroneckerEigen(NamedTuple):
    """Eigenvectors of both sides and Λ, by layer."""

    outputs: dict[str, torch.Tensor]
    inputs: dict[str, torch.Tensor]
    eigenvalues: dict[str, torch.Tensor]


def positions(layer, x, g):
    """Return inputs (n, T, in + 1) and output gradients (n, T, out) of a layer."""
    if not isinstance(layer, nn.Conv2d):
        x, g = (t.reshape(len(t), -1, t.shape[-1]) for t in (x, g))
        return pad(x, (0, 1), value=1.0), g
    (h, w), (down, right) = layer.kernel_size, layer.stride
    (rows, columns), (across, along) = layer.padding, layer.dilation
    x = pad(x, (columns, columns, rows, rows))
    x = x.unfold(2, across * (h - 1) + 1, down).unfold(3, along * (w - 1) + 1, right)
    x = x[..., ::across, ::along].permute(0, 1, 4, 5, 2, 3)
    patches = x.new_ones(len(x), x[0, ..., 0, 0].numel() + 1, x[0, 0, 0, 0].numel())
    patches[:, :-1].view(x.shape).copy_(x)
    return patches.mT, g.flatten(2).mT


def positions_fastest(m):
    """Whether (n, T, k) lie in memory as (n, k, T), as a convolution's do."""
    return m.shape[1] > 1 and m.stride(1) == 1


def add_gram(total, m):
    """Add ``mᵀm`` over all positions."""
    if positions_fastest(m):
        total.addbmm_(m.mT, m)
    else:
        total.addmm_(m.flatten(0, 1).T, m.flatten(0, 1))


def rotate(m, basis):
    """Return ``m @ basis``, in the order of m's memory."""
    if positions_fastest(m):
        return torch.bmm(basis.T.expand(len(m), -1, -1), m.mT).mT
    return (m.flatten(0, 1) @ basis).view(m.shape)


def decompose(matrices):
    """Return eigenvectors of symmetric matrices, float64 inside, one thread each."""

    def one(matrix):
        return torch.linalg.eigh(matrix.double())[1].to(matrix)

    threads = torch.get_num_threads()
    order = sorted(matrices, key=lambda key: -len(matrices[key]))
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        found = dict(zip(order, pool.map(one, [matrices[key] for key in order]), strict=True))
    torch.set_num_threads(threads)
    return found


def add_squares(total, a, s, q_a, q_s):
    """Add the squares of every example's ``Q_Sᵀ sᵀa Q_A``."""
    count, (out, size) = a.shape[1], total.shape
    factors_first = count * (size**2 + out**2) <= size * out * (size + out)
    if factors_first or count == 1:
        a, s = rotate(a, q_a), rotate(s, q_s)
    if count == 1:
        total.addmm_(s[:, 0].square_().T, a[:, 0].square_())
        return
    step = max(1, CHUNK // (total.numel() * total.element_size()))
    for some_a, some_s in zip(a.split(step), s.split(step), strict=True):
        products = some_s.mT @ some_a
        if not factors_first:
            products = torch.bmm(q_s.T.expand(len(products), -1, -1), products) @ q_a
        total += products.square_().sum(0)


def fit_ekfac(problem):
    """Return EK-FAC of the empirical Fisher."""
    layers, kept, outputs, inputs, squares = problem.layers, [], {}, {}, {}
    for x, y in problem.loader:
        for name, (given, gradients) in forward_backward(problem, x, y).items():
            a, s = positions(layers[name], given, gradients)
            kept.append((name, a, s))
            for grams, m in ((inputs, a), (outputs, s)):
                if name not in grams:
                    grams[name] = m.new_zeros(m.shape[2], m.shape[2])
                add_gram(grams[name], m)
    bases = decompose(
        {
            (side, name): m
            for side, grams in enumerate((outputs, inputs))
            for name, m in grams.items()
        }
    )
    for name, a, s in kept:
        if name not in squares:
            squares[name] = a.new_zeros(s.shape[2], a.shape[2])
        add_squares(squares[name], a, s, bases[1, name], bases[0, name])
    return KroneckerEigen(
        {name: bases[0, name] for name in layers},
        {name: bases[1, name] for name in layers},
        {name: total / len(problem.x) for name, total in squares.items()},
    )


def apply_ekfac(problem, fitted):
    """Return the inverse times the problem's vectors."""
    out = {}
    for name, v in problem.matrices(problem.vectors).items():
        q_s, q_a = fitted.outputs[name], fitted.inputs[name]
        scaled = (q_s.T @ v @ q_a) / (fitted.eigenvalues[name] + problem.damping)
        out[name] = q_s @ scaled @ q_a.T
    return flatten(out)


def ekfac(problem):
    def results(fitted, ifvps):
        traces = torch.stack([fitted.eigenvalues[name].sum() for name in problem.layers])
        return {"product": ifvps, "trace": traces}

    return Contender(
        {
            "fit": lambda: fit_ekfac(problem),
            "apply": lambda fitted: apply_ekfac(problem, fitted),
        },
        results,
    )


def ekfac_influence(problem):
    """Scores of training examples on queries by EK-FAC."""

    def scores(fitted):
        ifvps = problem.matrices(apply_ekfac(problem, fitted))
        out = []
        for x, y in problem.loader:
            block = 0
            for name, (given, gradients) in forward_backward(problem, x, y).items():
                a, s = positions(problem.layers[name], given, gradients)
                block = block + torch.einsum("nto,koc,ntc->kn", s, ifvps[name], a)
            out.append(block)
        return torch.cat(out, 1)

    return Contender(
        {"fit": lambda: fit_ekfac(problem), "scores": scores},
        lambda fitted, found: {"scores": found},
    )


def ekfac_scores(problem, train, test, dampings):
    """Return the mean log-likelihood of held-out gradients for each damping, ``(L,)``."""
    fitted = fit_ekfac(replace(problem, x=problem.x[train], y=problem.y[train]))
    rows = vmapped_gradients(problem.model, problem.x[test], problem.y[test])
    squares = {
        name: (fitted.outputs[name].T @ g @ fitted.inputs[name]).square_()
        for name, g in problem.matrices(rows).items()
    }
    scores = []
    for damping in dampings:
        forms, logdet = 0, 0
        for name, found in squares.items():
            damped = fitted.eigenvalues[name] + damping
            forms = forms + (found / damped).sum((1, 2))
            logdet = logdet + damped.double().log().sum()
        constant = rows.shape[1] * math.log(2 * math.pi)
        scores.append(-0.5 * (forms.double().mean() + logdet + constant))
    return torch.stack(scores)


def batch_gradients(problem):
    """Return all training gradients, batch by batch, ``(n, p)``."""
    return torch.cat([vmapped_gradients(problem.model, x, y) for x, y in problem.loader])


def dense(problem):
    def fit():
        rows = batch_gradients(problem)
        return rows.T @ rows / len(rows)

    def solve(fisher):
        damped = fisher.clone()
        damped.diagonal().add_(problem.damping)
        return torch.cholesky_solve(problem.vectors.T, torch.linalg.cholesky(damped)).T

    return Contender({"fit": fit, "solve": solve}, lambda fisher, ifvps: {"product": ifvps})


def gram(problem):
    def fit():
        rows = batch_gradients(problem)
        return rows, rows @ rows.T

    def solve(fitted):
        rows, products = fitted
        damped = products.clone()
        damped.diagonal().add_(problem.damping * len(rows))
        coefficients = torch.cholesky_solve(rows @ problem.vectors.T, torch.linalg.cholesky(damped))
        return (problem.vectors - coefficients.T @ rows) / problem.damping

    return Contender({"fit": fit, "solve": solve}, lambda fitted, ifvps: {"product": ifvps})


def layer_sizes(problem):
    """Return how many parameters each layer has."""
    return [sum(p.numel() for p in layer.parameters()) for layer in problem.layers.values()]


def datainf(problem):
    def transform(rows):
        damping, sizes, out = problem.damping, layer_sizes(problem), []
        pairs = zip(rows.split(sizes, 1), problem.vectors.split(sizes, 1), strict=True)
        for g, v in pairs:
            coefficients = (v @ g.T) / (damping + g.square().sum(1))
            out.append((v - coefficients @ g / len(g)) / damping)
        return torch.cat(out, 1)

    return Contender(
        {"fit": lambda: batch_gradients(problem), "transform": transform},
        lambda rows, ifvps: {"product": ifvps},
    )


def datainf_vmap(problem):
    damping, sizes = problem.damping, layer_sizes(problem)

    def apply(v, g):
        return (v - (v @ g) / (damping + g.square().sum()) * g) / damping

    def transform(rows):
        rows = rows.split(sizes, 1)
        return torch.stack(
            [
                torch.cat(
                    [
                        vmap(apply, in_dims=(None, 0))(part, g).mean(0)
                        for part, g in zip(v.split(sizes), rows, strict=True)
                    ]
                )
                for v in problem.vectors
            ]
        )

    return Contender(
        {"fit": lambda: batch_gradients(problem), "transform": transform},
        lambda rows, ifvps: {"product": ifvps},
    )


def datainf_loop(problem):
    layers, sizes = list(problem.layers.values()), layer_sizes(problem)

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
            for v, gradients in zip(vector.split(sizes), rows, strict=True):
                total = torch.zeros_like(v)
                for g in gradients:
                    coefficient = torch.sum(v * g) / (damping + torch.sum(g**2))
                    total += (v - coefficient * g) / (len(gradients) * damping)
                parts.append(total)
            out.append(torch.cat(parts))
        return torch.stack(out)

    return Contender({"fit": fit, "transform": transform}, lambda rows, ifvps: {"product": ifvps})
