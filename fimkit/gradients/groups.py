"""From captured calls to the rows of each group of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fimkit.gradients.layout import BatchLayout
from fimkit.gradients.rules import EmbeddingUse, Examples, MatrixUse, Use
from fimkit.operators import DenseRows, FactoredRows, LookupRows, MatrixLayout, Rows, join_rows
from fimkit.operators.memory import chunks
from fimkit.vectors import ParameterSpace

__all__ = ["Group", "Located", "captured_rows", "pair_parameters"]


@dataclass(frozen=True)
class Group:
    """A parameter on its own, or a weight with the bias that is folded into it."""

    weight: str
    bias: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters, in the order of the group's flat vector."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True)
class Located:
    """A use whose examples were found, with the gradients at its output."""

    use: Use
    signals: Tensor
    layout: BatchLayout


def pair_parameters(
    names: Iterable[str],
    uses: Sequence[Use],
    alone: set[str],
    blocks: Mapping[str, int] | None,
) -> list[Group]:
    """Group a bias with its weight wherever every use of the bias is with that weight.

    Parameters
    ----------
    names : iterable of str
        All parameters, in order.
    uses : sequence of Use
        Captured calls.
    alone : set of str
        Parameters that stay on their own.
    blocks : mapping of str to int, optional
        Block of each parameter; pairs lie within one block.
    """
    names = list(names)
    partners: dict[str, set[str | None]] = {name: set() for name in names}
    for use in uses:
        weight = use.weight if isinstance(use, MatrixUse) else None
        bias = use.bias if isinstance(use, MatrixUse) else None
        for name in use.names:
            is_bias = bias is not None and bias.name == name
            partners[name].add(weight.name if is_bias and weight is not None else None)
    bias_of: dict[str, str] = {}
    for name in names:
        weights = partners[name]
        weight_name = next(iter(weights)) if len(weights) == 1 else None
        if weight_name is None or weight_name in bias_of or {name, weight_name} & alone:
            continue
        if blocks is None or blocks[name] == blocks[weight_name]:
            bias_of[weight_name] = name
    biases = set(bias_of.values())
    return [Group(name, bias_of.get(name)) for name in names if name not in biases]


def captured_rows(
    group: Group,
    located: Sequence[Located],
    space: ParameterSpace,
    shape: tuple[int, int],
    like: Tensor,
) -> Rows:
    """Return the rows of one group from the calls on it, in the smaller of their forms.

    Parameters
    ----------
    group : Group
    located : sequence of Located
        All calls captured in the pass.
    space : ParameterSpace
    shape : (int, int)
        Examples and rows per example.
    like : Tensor
        Dtype and device of the rows.
    """
    mine = [item for item in located if set(item.use.names) & set(group.names)]
    if not mine:
        return _zero_rows(group, space, shape, like)
    n, _ = shape
    if all(isinstance(item.use, EmbeddingUse) for item in mine):
        return _lookups(mine, n, like).compact()
    layout = _common_layout(group, mine)
    if layout is None:
        return DenseRows(_dense(group.names, mine, n, like))
    sample = _factored(group, mine, layout, n, slice(0, min(n, 1)), like)
    per_example = sample.inputs.numel() + sample.signals.numel()
    parts = [
        _factored(group, mine, layout, n, part, like).compact()
        for part in chunks(n, per_example * like.element_size())
    ]
    return join_rows(parts)


def _lookups(mine: Sequence[Located], n: int, like: Tensor) -> LookupRows:
    """Join the positions of all lookups of a table."""
    parts = []
    for item in mine:
        assert isinstance(item.use, EmbeddingUse)
        whole = Examples(item.layout, n, slice(0, n))
        parts.append(item.use.lookup_rows(item.signals, whole))
    return LookupRows(
        torch.cat([part.indices for part in parts], 1).to(like.device),
        torch.cat([part.signals for part in parts], 2).to(like),
        parts[0].vocabulary,
    )


def _common_layout(group: Group, mine: Sequence[Located]) -> MatrixLayout | None:
    """Return the layout by which all calls act on the group's weight as one matrix, if any."""
    layouts = set()
    for item in mine:
        use = item.use
        if not isinstance(use, MatrixUse) or use.weight is None or use.weight.name != group.weight:
            return None
        layout = use.layout
        if not use.weight.whole:
            if layout.groups > 1 or layout.transposed:
                return None
            layout = replace(layout, out=use.weight.rows)
        bias = use.bias
        if bias is not None and bias.name == group.weight:
            return None
        if bias is not None and bias.name == group.bias:
            whole = bias.whole and use.weight.whole
            if not whole and (bias.start, bias.stop) != (use.weight.start, use.weight.stop):
                return None
        layouts.add(replace(layout, bias=group.bias is not None))
    return layouts.pop() if len(layouts) == 1 else None


def _factored(
    group: Group,
    mine: Sequence[Located],
    layout: MatrixLayout,
    n: int,
    part: slice,
    like: Tensor,
) -> FactoredRows:
    """Join the positions of all calls on a group for some examples."""
    inputs, signals = [], []
    for item in mine:
        assert isinstance(item.use, MatrixUse)
        assert item.use.weight is not None
        examples = Examples(item.layout, n, part)
        a = item.use.inputs(examples).to(like)
        if group.bias is not None:
            meets_bias = item.use.bias is not None and item.use.bias.name == group.bias
            a = torch.nn.functional.pad(a, (0, 1), value=float(meets_bias))
        inputs.append(a)
        s = item.use.signals(item.signals, examples).to(like)
        signals.append(s if item.use.weight.whole else item.use.weight.pad(s, -1))
    if len(mine) == 1:
        return FactoredRows(inputs[0], signals[0], layout)
    return FactoredRows(torch.cat(inputs, 1), torch.cat(signals, 2), layout)


def _dense(
    names: Iterable[str],
    mine: Sequence[Located],
    n: int,
    like: Tensor,
) -> Tensor:
    """Return the sums of all calls' rows for each parameter, side by side: ``(n, c, width)``."""
    columns = []
    for name in names:
        rows = [
            item.use.rows(name, item.signals, Examples(item.layout, n, slice(0, n))).to(like)
            for item in mine
            if name in item.use.names
        ]
        columns.append(torch.stack(rows).sum(0) if len(rows) > 1 else rows[0])
    return torch.cat([rows.flatten(2) for rows in columns], 2)


def _zero_rows(group: Group, space: ParameterSpace, shape: tuple[int, int], like: Tensor) -> Rows:
    """Return rows of a group that no call met, factored where that is smaller."""
    n, c = shape
    weight = space.shapes[group.weight]
    if len(weight) == 2:
        layout = MatrixLayout(1, weight[0], weight[1], group.bias is not None)
        return FactoredRows(
            like.new_zeros((n, 1, 1, layout.columns)),
            like.new_zeros((n, c, 1, 1, layout.out)),
            layout,
        ).compact()
    size = sum(space.slices[name].stop - space.slices[name].start for name in group.names)
    return DenseRows(like.new_zeros((n, c, size)))
