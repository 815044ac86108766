"""Dense float64 references from the definitions: one backward pass per example, plain solves.

Nothing here imports fimkit, so that no mistake of it can be repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

ExampleLoss = Callable[[nn.Module, object], Tensor]


def take(batch, indices, dim=0):
    """Return the given examples of a batch whose tensors have them along ``dim``."""
    if isinstance(batch, Mapping):
        return {key: take(value, indices, dim) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(take(value, indices, dim) for value in batch)
    return batch.index_select(dim, torch.as_tensor(indices, device=batch.device))


def outputs(model: nn.Module, batch) -> Tensor:
    """Run a model on ``(*inputs, targets)`` or a mapping with ``labels``."""
    if isinstance(batch, Mapping):
        out = model(**{key: value for key, value in batch.items() if key != "labels"})
    else:
        out = model(*batch[:-1])
    return getattr(out, "logits", out)


def labels(batch) -> Tensor:
    return batch["labels"] if isinstance(batch, Mapping) else batch[-1]


def negative_log_likelihood(model: nn.Module, example) -> Tensor:
    """Minus the log-probability of one example's labels, classes along the last dimension."""
    log_probabilities = outputs(model, example).log_softmax(-1).flatten(0, -2)
    targets = labels(example).flatten()
    counted = [i for i, target in enumerate(targets.tolist()) if target != -100]
    return -log_probabilities[counted, targets[counted]].sum()


def negative_log_likelihood_of_maps(model: nn.Module, example) -> Tensor:
    """As `negative_log_likelihood`, with classes along dimension 1."""

    def moved(*inputs):
        return model(*inputs).movedim(1, -1)

    return negative_log_likelihood(moved, example)


def half_squared_error(model: nn.Module, example) -> Tensor:
    """Half the squared distance between one example's outputs and targets."""
    return 0.5 * (outputs(model, example).flatten() - labels(example).flatten()).pow(2).sum()


def gradients(
    model: nn.Module,
    loss: ExampleLoss,
    batch,
    n: int,
    *,
    dim: int = 0,
    names: Sequence[str] | None = None,
) -> Tensor:
    """Return the gradient of each example's loss on its own, shape ``(n, p)``.

    Parameters of ``names``, or all that require grad, in ``named_parameters()`` order.
    """
    parameters = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (names is None or name in names)
    ]
    flags = {module: module.training for module in model.modules()}
    model.eval()
    rows = []
    with torch.random.fork_rng():
        for i in range(n):
            value = loss(model, take(batch, [i], dim)).reshape(())
            found = torch.autograd.grad(value, parameters, allow_unused=True)
            rows.append(
                torch.cat(
                    [
                        (torch.zeros_like(p) if g is None else g).flatten()
                        for p, g in zip(parameters, found, strict=True)
                    ]
                )
            )
    for module, training in flags.items():
        module.training = training
    return torch.stack(rows)


def fisher(rows: Tensor, blocks: Sequence[Sequence[int]] | None = None) -> Tensor:
    """Return the mean outer product of the rows, only within blocks of columns if given."""
    full = rows.double().T @ rows.double() / rows.shape[0]
    if blocks is None:
        return full
    out = torch.zeros_like(full)
    for block in blocks:
        here = torch.as_tensor(block)
        out[here[:, None], here] = full[here[:, None], here]
    return out


def damped(rows: Tensor, regularization, blocks: Sequence[Sequence[int]] | None = None) -> Tensor:
    """Return ``F + λ I``, with one λ or one for each block of columns."""
    out = fisher(rows, blocks)
    if blocks is None:
        return out + regularization * torch.eye(out.shape[0], dtype=out.dtype)
    for block, value in zip(blocks, regularization, strict=True):
        here = torch.as_tensor(block)
        out[here, here] += value
    return out


def ifvp(
    rows: Tensor, vectors: Tensor, regularization, blocks: Sequence[Sequence[int]] | None = None
) -> Tensor:
    """Return ``(F + λ I)⁻¹ v`` of ``(k, p)`` vectors."""
    return torch.linalg.solve(damped(rows, regularization, blocks), vectors.double().T).T


def automatic(rows: Tensor, columns: Sequence[int] | slice = slice(None)) -> float:
    """Return a tenth of the mean squared gradient over examples and the given columns."""
    return 0.1 * float(rows.double()[:, columns].square().mean())


def largest_eigenvalue(rows: Tensor) -> float:
    return float(torch.linalg.matrix_norm(rows.double(), 2)) ** 2 / rows.shape[0]


def error(found, expected) -> float:
    """Return the largest relative error of any vector, norm against norm."""
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    assert found.shape == expected.shape, (found.shape, expected.shape)
    assert found.isfinite().all()
    difference = torch.linalg.vector_norm(found - expected, dim=-1)
    return float((difference / torch.linalg.vector_norm(expected, dim=-1)).max())
