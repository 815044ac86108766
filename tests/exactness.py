"""One check of all three methods against dense references, for any model and any data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fimkit import EKFAC, DataInf, Explicit
from fimkit.estimators.ekfac import KFAC
from fimkit.operators import BlockDiagonalOperator
from tests import dense, reference
from tests import kronecker_reference as kronecker
from tests.cases import split
from tests.state import unchanged


def check(
    model: nn.Module,
    batch: Any,
    example_loss: Callable[[nn.Module, Any], Tensor],
    *,
    loss: Any = "cross_entropy",
    fitted_to: nn.Module | None = None,
    tolerance: float = 1e-9,
) -> dict[str, str]:
    """Check `Explicit`, `DataInf` and `EKFAC` of a model, and return how parameters are covered.

    Parameters
    ----------
    model : Module
        In float64 or with a tolerance that allows for its rounding.
    batch
        All examples; of a mapping, ``attention_mask`` tells which positions are padding.
    example_loss : callable
        The loss of a batch of one.
    loss
        The same, as fimkit is given it.
    fitted_to : Module, optional
        A wrapper of the model, or the like, that the estimators are given in its place.
    """
    n = len(reference.labels(batch))
    rows = reference.gradients(model, example_loss, batch, n)
    assert rows.abs().max() > 1e-6
    generator = torch.Generator().manual_seed(1)
    vectors = torch.cat(
        [rows[rows.any(1)], torch.randn(2, rows.shape[1], generator=generator).to(rows)]
    )
    given = model if fitted_to is None else fitted_to
    batches = split(batch, n, 3)

    def fit(method):
        with unchanged(model):
            return method(loss=loss).fit(given, batches)

    # Explicit, at any batch size
    damping = 0.1 * float(rows.square().mean())
    explicit = fit(Explicit)
    for fitted in (explicit, Explicit(loss=loss).fit(given, split(batch, n, 1))):
        assert dense.distance(fitted.fisher_.to_dense(), reference.fisher(rows)) <= tolerance
    expected = reference.ifvp(rows, vectors, damping)
    found = explicit.set_params(regularization=damping).transform(vectors)
    assert reference.error(found, expected) <= tolerance
    # DataInf, layer by layer
    datainf = fit(DataInf)
    places = blocks(model)
    matrix = torch.zeros_like(reference.fisher(rows))
    for here in places.values():
        block = rows[:, None, here]
        matrix[here[:, None], here] = dense.mean_of_inverses(
            block, torch.ones(block.shape[:2]), n, damping, together=False
        )
    found = datainf.set_params(regularization=damping).transform(vectors)
    assert reference.error(found, vectors @ matrix) <= tolerance
    # EK-FAC
    _check_ekfac(fit(EKFAC), fit(KFAC), model, rows, batch, example_loss, tolerance)
    return explicit.coverage_


def blocks(model: nn.Module) -> dict[str, Tensor]:
    """Return the places of each module's own parameters in the flat vector."""
    found: dict[str, list[int]] = {}
    start = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = found.setdefault(name.rpartition(".")[0], [])
            own.extend(range(start, start + parameter.numel()))
            start += parameter.numel()
    return {name: torch.tensor(here) for name, here in found.items()}


def _check_ekfac(ekfac, kfac, model, rows, batch, example_loss, tolerance):
    """Compare sides, eigenvectors and eigenvalues with their definitions, in any basis.

    The sides are those of the Kronecker product; the eigenvectors, which equal eigenvalues leave
    open, are orthogonal and make the sides diagonal; the eigenvalues are the mean squares in them.
    Whatever is no Kronecker layer is its exact block.
    """
    n, F = len(rows), reference.fisher(rows)
    examples = [reference.take(batch, [i]) for i in range(n)]
    flags = {module: module.training for module in model.modules()}
    model.eval()
    masks = None
    if isinstance(batch, dict) and "attention_mask" in batch:
        masks = list(batch["attention_mask"].bool())
    layers = kronecker.layers(model, kronecker.empirical(example_loss), examples, masks=masks)
    for module, training in flags.items():
        module.training = training
    left = torch.ones(len(F), dtype=torch.bool)
    kinds, dense_fisher = {}, torch.zeros_like(F)
    (fine, coarse) = (blocks_of(fitted) for fitted in (ekfac, kfac))
    for name, (here, operator) in fine.items():
        left[here] = False
        block, exact = operator.to_dense(), F[here[:, None], here]
        dense_fisher[here[:, None], here] = block
        size = exact.norm() + 1e-6 * F.norm()
        if name not in ekfac.eigenvalues_:
            assert float((block - exact).norm() / size) <= tolerance, name
            continue
        kinds[name] = layer = layers[f"{name}.weight"]
        assert float((coarse[name][1].to_dense() - layer.kfac()).norm() / size) <= tolerance, name
        Q = []
        for basis, side in zip(ekfac.eigenvectors_[name], layer.factors(), strict=True):
            eye = torch.eye(side.shape[-1]).to(side).expand_as(side)
            basis = eye if basis is None else basis
            rotated = basis.mT @ side @ basis
            assert float((basis.mT @ basis - eye).norm()) <= tolerance
            apart = rotated - rotated.diagonal(0, 1, 2).diag_embed()
            assert float(apart.norm()) <= tolerance * float(side.norm()), name
            Q.append(basis)
        expected = layer.dense(layer.eigenvalues(tuple(Q)), tuple(Q))
        assert float((block - expected).norm() / size) <= tolerance, name
        assert abs(float(block.trace() - exact.trace())) <= tolerance * float(exact.trace())
    assert not left.any()
    assert kinds, "no layer was Kronecker-factored"
    damping = 0.1 * float(F.diagonal().mean())
    damped = dense_fisher + damping * torch.eye(len(F)).to(F)
    found = ekfac.set_params(regularization=damping).transform(rows)
    given = rows.any(1)
    assert reference.error(found[given], torch.linalg.solve(damped, rows.T).T[given]) <= tolerance


def blocks_of(fitted):
    """Return where each block's parameters lie in the flat vector, and its operator, by name."""
    fisher = fitted.fisher_
    if not isinstance(fisher, BlockDiagonalOperator):
        return {next(iter(fitted.eigenvalues_)): (torch.arange(fisher.size), fisher)}
    return {
        name: (torch.cat([torch.arange(s.start, s.stop) for s in columns.parts]), operator)
        for name, (columns, operator) in fisher.blocks.items()
    }
