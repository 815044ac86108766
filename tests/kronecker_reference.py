"""Kronecker factors, eigenvalues and dense blocks from their definitions, one example at a time.

Layers are watched with plain forward hooks and factors are summed outer product by outer product;
nothing here imports fimkit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import reference

# Takes a model and one example to scalars (c,) and their weights (c,).
Scalars = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]


class Conv1D(nn.Module):
    """GPT-2's linear layer: the weight is stored (in, out)."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return x @ self.weight
        flat = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return flat.view(*x.shape[:-1], -1)


# -- the rows of each kind of Fisher ---------------------------------------------------------------


def empirical(loss: Callable[[nn.Module, Any], Tensor]) -> Scalars:
    """The loss at the labels there are."""

    def scalars(model, example):
        value = loss(model, example).reshape(1)
        return value, torch.ones_like(value)

    return scalars


def at_labels(loss: Callable[[nn.Module, Any], Tensor], labels: Sequence[Sequence[Any]]) -> Scalars:
    """The losses at other labels, ``labels[i]`` those of the i-th example met, equally weighted."""
    left = iter(labels)

    def scalars(model, example):
        sets = next(left)
        values = torch.stack([loss(model, _relabelled(example, y)).reshape(()) for y in sets])
        return values, torch.full_like(values, 1 / len(sets), requires_grad=False)

    return scalars


def _relabelled(example, labels):
    if isinstance(example, dict):
        return {**example, "labels": labels[None]}
    return (*example[:-1], labels[None])


def predicted(loss: Callable[[nn.Module, Any], Tensor], classes: int = -1) -> Scalars:
    """The loss at the most probable classes."""

    def scalars(model, example):
        labels = reference.labels(example)
        best = reference.outputs(model, example).argmax(classes)
        best = torch.where(labels == -100, labels, best)
        return empirical(loss)(model, _relabelled(example, best[0]))

    return scalars


def exact_softmax(classes: int = -1) -> Scalars:
    """Minus the log-probability of every class at every position that counts, by probability."""

    def scalars(model, example):
        logs = reference.outputs(model, example).movedim(classes, -1).log_softmax(-1).flatten(0, -2)
        counted = reference.labels(example).flatten() != -100
        logs = logs[counted].flatten()
        return -logs, logs.detach().exp()

    return scalars


def exact_outputs(model: nn.Module, example: Any) -> tuple[Tensor, Tensor]:
    """Every output of a Gaussian mean, each of weight one."""
    outputs = reference.outputs(model, example).flatten()
    return outputs, torch.ones_like(outputs, requires_grad=False)


def exact_logits(model: nn.Module, example: Any) -> tuple[Tensor, Tensor]:
    """Every logit of independent Bernoulli outputs, by the variance of its label."""
    logits = reference.outputs(model, example).flatten()
    p = logits.detach().sigmoid()
    return logits, p * (1 - p)


# -- layers ----------------------------------------------------------------------------------------

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, Conv1D)


@dataclass
class Layer:
    """What was gathered of one weight and the bias folded into it, over all examples.

    Factors are ``(groups, m, m)``, gradients ``(groups, out, in)`` with the weight of their row.
    """

    weight: str
    bias: str | None
    index: Tensor
    tables: bool
    products: bool
    n: int = 0
    inputs: list[Tensor] = field(default_factory=list)
    signals: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    @property
    def names(self) -> tuple[str, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def rows(self) -> Tensor:
        """Return the gradients as rows in flat order, times the root of their weights."""
        order = self.index.flatten().argsort()
        stacked = torch.stack(self.gradients).flatten(1)[:, order]
        weights = torch.tensor(self.weights, dtype=stacked.dtype)
        return weights.sqrt()[:, None] * stacked

    def fisher(self) -> Tensor:
        rows = self.rows()
        return rows.T @ rows / self.n

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the output and the input side, whose Kronecker product is the Fisher of K-FAC.

        S is a mean over examples and A one over positions. The rows of a table belong to its
        one-hot inputs, so there they change sides, and A is diagonal. A table that is multiplied by
        besides has the sides of the sum of both uses.
        """
        if self.tables and self.products:
            G = torch.cat(self.gradients)
            w = torch.tensor(self.weights, dtype=G.dtype)
            rows = torch.einsum("r,roi,roi->o", w, G, G) / self.n
            columns = torch.einsum("r,roi,roj->ij", w, G, G) / self.n
            return torch.diag(rows)[None], (columns / columns.trace())[None]
        a, s = torch.cat(self.inputs), torch.cat(self.signals)  # (positions, groups, m)
        A = torch.einsum("tgi,tgj->gij", a, a) / len(a)
        S = torch.einsum("tgo,tgp->gop", s, s) / self.n
        return (A.diagonal(0, 1, 2).diag_embed(), S) if self.tables else (S, A)

    def eigenbases(self, *, largest: int | None = None) -> tuple[Tensor, Tensor]:
        """Return eigenvectors of the two sides in columns, the identity above the largest size.

        Fails where they are not determined, so that a comparison would be up to chance.
        """
        G = torch.stack(self.gradients)
        bases = []
        for side, matrices in zip(self.factors(), (G.mT, G), strict=True):
            if (largest is not None and side.shape[-1] > largest) or _diagonal(side):
                bases.append(torch.eye(side.shape[-1]).double().expand_as(side))
                continue
            values, vectors = (torch.from_numpy(part) for part in np.linalg.eigh(side.numpy()))
            for g in range(len(side)):
                zero = values[g] < 1e-12 * values[g, -1]
                gaps = values[g, ~zero].diff()
                assert not len(gaps) or gaps.min() > 1e-6 * values[g, -1], "equal eigenvalues"
                inside = (matrices[:, g] @ vectors[g][:, zero]).norm()
                assert zero.sum() < 2 or inside < 1e-9 * matrices[:, g].norm(), "a null space"
            bases.append(vectors)
        return tuple(bases)

    def eigenvalues(self, bases: tuple[Tensor, Tensor]) -> Tensor:
        """Return Λ, the mean over examples of ``(Q_Sᵀ G Q_A)²``."""
        Q_S, Q_A = bases
        total = torch.zeros_like(self.gradients[0])
        for weight, G in zip(self.weights, self.gradients, strict=True):
            total += weight * (Q_S.mT @ G @ Q_A) ** 2
        return total / self.n

    def dense(self, eigenvalues: Tensor, bases: tuple[Tensor, Tensor]) -> Tensor:
        """Return ``(Q_S ⊗ Q_A) Λ (Q_S ⊗ Q_A)ᵀ`` of every group, in flat order."""
        out = torch.zeros(self.index.numel(), self.index.numel(), dtype=eigenvalues.dtype)
        for Q_S, Q_A, values, index in zip(*bases, eigenvalues, self.index, strict=True):
            U = torch.kron(Q_S.contiguous(), Q_A.contiguous())
            here = index.flatten()
            out[here[:, None], here] = U @ torch.diag(values.flatten()) @ U.T
        return out

    def ekfac(self, *, largest: int | None = None) -> Tensor:
        bases = self.eigenbases(largest=largest)
        return self.dense(self.eigenvalues(bases), bases)

    def kfac(self, *, largest: int | None = None) -> Tensor:
        """Return the Kronecker product of every group's sides, in flat order.

        No eigenvectors are needed for it; of a side above the largest only the diagonal counts.
        """
        out = torch.zeros(self.index.numel(), self.index.numel(), dtype=torch.float64)
        sides = [
            side.diagonal(0, 1, 2).diag_embed()
            if largest is not None and side.shape[-1] > largest
            else side
            for side in self.factors()
        ]
        for index, output, input in zip(self.index, *sides, strict=True):
            here = index.flatten()
            out[here[:, None], here] = torch.kron(output.contiguous(), input.contiguous())
        return out


def _diagonal(matrices: Tensor) -> bool:
    return torch.equal(matrices, matrices.diagonal(0, 1, 2).diag_embed())


def layers(
    model: nn.Module,
    scalars: Scalars,
    examples: Sequence[Any],
    *,
    masks: Sequence[Tensor] | None = None,
    weight_sharing: str = "expand",
) -> dict[str, Layer]:
    """Gather the layers of a model over examples, by the names of their weights.

    A mask, ``(T,)`` for each example, selects positions of calls with T positions for the factors.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    modules = [m for m in model.modules() if isinstance(m, KINDS) and m.weight.requires_grad]
    found = {layer.weight: layer for layer in _empty_layers(modules, names)}
    parameters = dict(model.named_parameters())
    for i, example in enumerate(examples):
        calls, values, weights = _watched(modules, partial(scalars, model, example))
        wanted = [name for layer in found.values() for name in layer.names]
        ends = [out for _, _, out in calls] + [parameters[name] for name in wanted]
        pieces = [
            torch.autograd.grad(value, ends, retain_graph=True, allow_unused=True)
            for value in values
        ]
        signals = [[_or_zero(piece[k], calls[k][2]) for piece in pieces] for k in range(len(calls))]
        mask = None if masks is None else masks[i]
        for k, ((module, x, _), per_scalar) in enumerate(zip(calls, signals, strict=True)):
            if all(piece[k] is None for piece in pieces):
                continue  # what no scalar depends on has no positions
            layer = found[names[id(module.weight)]]
            folded = layer.bias is not None and names.get(id(module.bias)) == layer.bias
            a, s = _call(module, x.detach(), per_scalar)
            if layer.bias is not None:
                a = torch.cat([a, torch.full_like(a[..., :1], float(folded))], 2)
            _gather(layer, a, s, weights, mask, weight_sharing)
        for layer in found.values():
            layer.n += 1
            places = [wanted.index(name) for name in layer.names]
            module = next(m for m in modules if names[id(m.weight)] == layer.weight)
            for weight, piece in zip(weights.tolist(), pieces, strict=True):
                grads = [_or_zero(piece[len(calls) + p], parameters[wanted[p]]) for p in places]
                layer.gradients.append(_matrices(module, *grads))
                layer.weights.append(weight)
    return found


def _empty_layers(modules: Sequence[nn.Module], names: dict[int, str]) -> Iterator[Layer]:
    """Yield the layers of modules; a bias is folded into the one weight that all its uses have."""
    weights_of: dict[int, set[int]] = {}
    biases_of: dict[int, dict[int, Tensor]] = {}
    for module in modules:
        bias = getattr(module, "bias", None)
        biases_of.setdefault(id(module.weight), {})
        if bias is not None:
            weights_of.setdefault(id(bias), set()).add(id(module.weight))
            biases_of[id(module.weight)][id(bias)] = bias
    for weight, biases in biases_of.items():
        users = [module for module in modules if id(module.weight) == weight]
        tables = any(isinstance(module, nn.Embedding) for module in users)
        own = [bias for key, bias in biases.items() if weights_of[key] == {weight}]
        bias = None if tables or not own else own[0]
        yield Layer(
            names[weight],
            None if bias is None else names[id(bias)],
            _matrices(users[0], *_indices(users[0].weight, bias)),
            tables,
            any(not isinstance(module, nn.Embedding) for module in users),
        )


def _watched(
    modules: Sequence[nn.Module], run: Callable[[], tuple[Tensor, Tensor]]
) -> tuple[list[tuple[nn.Module, Tensor, Tensor]], Tensor, Tensor]:
    """Return the calls of modules with their inputs and outputs, and the scalars of a run."""
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def watch(module, arguments, output):
        calls.append((module, arguments[0], output))

    hooks = [module.register_forward_hook(watch) for module in modules]
    try:
        values, weights = run()
    finally:
        for hook in hooks:
            hook.remove()
    return calls, values, weights


def _or_zero(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient.detach()


def _indices(weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """Return where the entries lie in the flat vector of a weight and its bias."""
    out = [torch.arange(weight.numel()).view(weight.shape)]
    if bias is not None:
        out.append(weight.numel() + torch.arange(bias.numel()))
    return out


def _matrices(module: nn.Module, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``(groups, out, in)`` matrices, the bias in the last column."""
    groups = getattr(module, "groups", 1)
    matrices = weight.T if isinstance(module, Conv1D) else weight
    matrices = matrices.reshape(groups, matrices.shape[0] // groups, -1)
    if bias is None:
        return matrices
    return torch.cat([matrices, bias.view(groups, -1, 1)], 2)


def _call(module: nn.Module, x: Tensor, signals: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the inputs ``(T, groups, in)`` of one call and its signals ``(c, T, groups, out)``."""
    stacked = torch.stack(list(signals))
    groups = getattr(module, "groups", 1)
    if isinstance(module, nn.Embedding):
        a = F.one_hot(x, module.num_embeddings).double().flatten(0, -2)
        if module.padding_idx is not None:
            stacked = stacked * (x != module.padding_idx)[..., None]
        return a[:, None], stacked.flatten(1, -2)[:, :, None]
    if isinstance(module, nn.Linear | Conv1D):
        a, s = (
            x.reshape(-1, 1, x.shape[-1]),
            stacked.reshape(len(stacked), -1, 1, stacked.shape[-1]),
        )
    else:
        a = _patches(module, x)
        s = stacked.flatten(3)[:, 0].movedim(2, 1)  # one example: (c, T, channels)
        s = s.unflatten(2, (groups, -1))
    return a, s


def _patches(module: nn.Module, x: Tensor) -> Tensor:
    """Return what each output position of a convolution sees, ``(T, groups, in)``."""
    padding = module.padding
    if module.padding_mode != "zeros":
        x = F.pad(x, module._reversed_padding_repeated_twice, module.padding_mode)
        padding = 0
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(module.kernel_size)]
    each = module.in_channels // module.groups
    size = each * int(np.prod(module.kernel_size))
    eye = torch.eye(size, dtype=x.dtype).view(size, each, *module.kernel_size)
    seen = [
        convolve(part, eye, None, module.stride, padding, module.dilation).flatten(2)[0].T
        for part in x.split(each, 1)
    ]
    return torch.stack(seen, 1)


def _gather(
    layer: Layer,
    a: Tensor,
    s: Tensor,
    weights: Tensor,
    mask: Tensor | None,
    weight_sharing: str,
) -> None:
    """Add one call's inputs ``(T, groups, in)`` and signals ``(c, T, groups, out)``."""
    if mask is not None and len(mask) == len(a):
        a, s = a[mask], s[:, mask]
    if weight_sharing == "reduce":
        a, s = a.mean(0, keepdim=True), s.sum(1, keepdim=True)
    layer.inputs.append(a)
    layer.signals.append((s * weights.sqrt()[:, None, None, None]).flatten(0, 1))


def rows(model: nn.Module, scalars: Scalars, examples: Sequence[Any]) -> Tensor:
    """Return gradients of all scalars times the root of their weights, shape ``(r, p)``."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    out = []
    for example in examples:
        values, weights = scalars(model, example)
        for value, weight in zip(values, weights.tolist(), strict=True):
            found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            pieces = [_or_zero(g, p).flatten() for g, p in zip(found, parameters, strict=True)]
            out.append(weight**0.5 * torch.cat(pieces))
    return torch.stack(out)
