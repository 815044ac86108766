"""The models and data that libraries are compared on, the same for the same sizes and seed."""

import copy
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.data import DataLoader, TensorDataset


@dataclass
class Problem:
    """A classifier, its training examples, queries, and what is asked for.

    ``vectors`` are the queries' gradients, flat, in the order of ``model.parameters()``, and
    ``damping`` is 0.1 trace(F) / p of the hardest examples; both are chosen unless given. Every
    parameter lies in a Linear or a Conv2d with a bias.
    """

    model: nn.Module
    x: torch.Tensor
    y: torch.Tensor
    queries: tuple[torch.Tensor, torch.Tensor]
    batch_size: int
    vectors: torch.Tensor | None = None
    damping: float | None = None
    fisher: str = "empirical"

    def __post_init__(self):
        self.model.eval()
        if self.vectors is None:
            self.vectors = gradients(self.model, *self.queries)
        if self.damping is None:
            with torch.no_grad():
                losses = cross_entropy(self.model(self.x), self.y, reduction="none")
            hardest = losses.topk(min(16, len(losses))).indices
            some = gradients(self.model, self.x[hardest], self.y[hardest])
            self.damping = 0.1 * some.square().mean().item()

    @property
    def size(self):
        """The number of parameters."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def data(self):
        """The training examples as a dataset."""
        return TensorDataset(self.x, self.y)

    @property
    def loader(self):
        """The batches, in the same order every time."""
        return DataLoader(self.data, batch_size=self.batch_size)

    @property
    def layers(self):
        """The layers with parameters, by name."""
        modules = self.model.named_modules()
        return {name: m for name, m in modules if isinstance(m, nn.Linear | nn.Conv2d)}

    def matrices(self, vectors):
        """Return ``(k, p)`` vectors as ``(k, out, in + 1)`` matrices, by layer."""
        sizes = [p.numel() for p in self.model.parameters()]
        pieces = iter(vectors.split(sizes, 1))
        return {
            name: torch.cat(
                [next(pieces).reshape(len(vectors), len(m.bias), -1), next(pieces)[:, :, None]], 2
            )
            for name, m in self.layers.items()
        }

    def double(self):
        """Return the same in float64."""
        queries = self.queries[0].double(), self.queries[1]
        model, x = copy.deepcopy(self.model).double(), self.x.double()
        return replace(self, model=model, x=x, queries=queries, vectors=self.vectors.double())


def flatten(matrices):
    """Return matrices by layer, as `Problem.matrices` gives them, as ``(k, p)`` vectors."""
    pieces = []
    for matrix in matrices.values():
        pieces += [matrix[:, :, :-1].flatten(1), matrix[:, :, -1]]
    return torch.cat(pieces, 1)


def gradients(model, x, y):
    """Return each example's gradient, by one backward pass after another, ``(n, p)``."""
    rows = []
    for xi, yi in zip(x.split(1), y.split(1), strict=True):
        found = torch.autograd.grad(cross_entropy(model(xi), yi), list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


def vmapped_gradients(model, x, y):
    """Return each example's gradient, by ``torch.func``, ``(n, p)``."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params, xi, yi):
        return cross_entropy(functional_call(model, params, (xi[None],)), yi[None])

    found = vmap(grad(loss), in_dims=(None, 0, 0))(params, x, y)
    return torch.cat([g.flatten(1) for g in found.values()], dim=1)


def forward_backward(problem, x, y):
    """Return, per layer, its input and the gradient of the summed loss at its output.

    One forward and one backward pass, without the gradient of any parameter.
    """
    inputs, edges, handles = {}, {}, []
    for name, layer in problem.layers.items():

        def keep(module, given, output, name=name):
            inputs[name], edges[name] = given[0].detach(), get_gradient_edge(output)

        handles.append(layer.register_forward_hook(keep))
    loss = cross_entropy(problem.model(x), y, reduction="sum")
    found = torch.autograd.grad(loss, list(edges.values()))
    for handle in handles:
        handle.remove()
    return {name: (inputs[name], g) for name, g in zip(edges, found, strict=True)}


class Block(nn.Module):
    """A transformer encoder's block of Linears; its LayerNorms have no parameters."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))

    def forward(self, x):
        """Return the block's outputs for (n, positions, width) inputs."""
        normed = self.norms[0](x)
        q, k, v = (
            layer(normed).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        x = x + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


class MeanPool(nn.Module):
    """The mean over positions."""

    def forward(self, x):
        """Return (n, width) means of (n, positions, width)."""
        return x.mean(1)


def mlp(n, k, widths, batch_size=256, noise=5.0, seed=0):
    """A perceptron with ReLU, trained for a few steps on ten noisy clusters."""
    torch.manual_seed(seed)
    y = torch.randint(widths[-1], (n + k,))
    x = torch.randn(widths[-1], widths[0])[y] + noise * torch.randn(n + k, widths[0])
    return trained_mlp(x, y, n, widths, batch_size)


def trained_mlp(x, y, n, widths, batch_size):
    """A perceptron with ReLU on n given examples; the others are queries."""
    layers = []
    for i, o in pairwise(widths):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return _trained(nn.Sequential(*layers[:-1]), x, y, n, batch_size)


def transformer(n, k, width=256, positions=64, blocks=4, batch_size=32, seed=0):
    """Encoder blocks on vectors, mean pooling, a linear classifier."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(Block(width, 4) for _ in range(blocks)), MeanPool(), nn.Linear(width, 10)
    )
    x, y = torch.randn(n + k, positions, width), torch.randint(10, (n + k,))
    return _trained(model, x, y, n, batch_size)


def cnn(n, k, channels=(32, 64, 64), batch_size=128, seed=0):
    """Three 3x3 convolutions with pooling on 3x32x32 images, a linear classifier."""
    torch.manual_seed(seed)
    layers, before = [], 3
    for after in channels:
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        before = after
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * before, 10))
    x, y = torch.randn(n + k, 3, 32, 32), torch.randint(10, (n + k,))
    return _trained(model, x, y, n, batch_size)


def _trained(model, x, y, n, batch_size, steps=5):
    """Take a few steps on some examples; the last ones become queries."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(x[: min(n, 64)]), y[: min(n, 64)]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return Problem(model, x[:n], y[:n], (x[n:], y[n:]), batch_size)
