"""The gradients of a batch by groups of parameters: as calls with signals, factors, or rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fimkit.gradients.layout import BatchLayout, Places, TokenLayout
from fimkit.gradients.pairing import Group
from fimkit.gradients.rules import EmbeddingUse, Examples, MatrixUse, Use
from fimkit.operators import (
    Columns,
    DenseRows,
    FactoredRows,
    LookupRows,
    MatrixLayout,
    RowMatrix,
    Rows,
    ZeroRows,
    join_columns,
    join_rows,
)
from fimkit.operators.memory import chunks, working_set

__all__ = ["BatchGradients", "GroupGradients", "Located", "TokenGradients"]


@dataclass(frozen=True)
class Located:
    """A use whose examples were found, with the gradients at its output."""

    use: Use
    signals: Tensor
    layout: BatchLayout

    def tokens(self, n: int) -> int | None:
        """Return how many tokens each of n examples has here, None where positions are none."""
        return self.layout.tokens(self.use.lead, n)

    def by_token(self, n: int) -> Located:
        """Return the same with every token of n examples as an example of its own."""
        return replace(self, layout=TokenLayout(self.layout.axis, self.layout.inner, n))


class GroupGradients:
    """The gradients of one group in one batch: calls on it with their signals, or rows.

    Parameters
    ----------
    group : Group
    columns : Columns
        Where the group's parameters lie in the flat vector.
    shape : (int, int)
        Examples n and rows per example c.
    like : Tensor
        Dtype and device of what is computed.
    calls : sequence of Located
        The calls on the group; none if no call met it.
    rows : Tensor of shape (n, c, width), optional
        The rows themselves, where they do not come from calls.

    Attributes
    ----------
    layout : MatrixLayout or None
        How all calls act on the group as one linear map; None if they do not.
    table : MatrixLayout or None
        The table that calls look up, and perhaps multiply by; None if it is not looked up.
    """

    def __init__(
        self,
        group: Group,
        columns: Columns,
        shape: tuple[int, int],
        like: Tensor,
        calls: Sequence[Located],
        rows: Tensor | None = None,
    ) -> None:
        self.group = group
        self.columns = columns
        self.n, self.c = shape
        self.calls = list(calls)
        self._like = like
        self.given = rows
        self.layout = _common_layout(group, self.calls)
        self.table = _table_layout(group, self.calls)

    @property
    def key(self) -> str:
        """The group's name: its weight's."""
        return self.group.weight

    @property
    def dtype(self) -> torch.dtype:
        """What rows are in."""
        return self._like.dtype

    @property
    def empty(self) -> bool:
        """Whether no example met the group."""
        return not self.calls and self.given is None

    @property
    def form(self) -> str:
        """How the calls act: as a ``"map"``, a ``"table"``, a ``"tied table"``, or as neither."""
        if self.layout is not None:
            return "map"
        if self.table is None:
            return ""
        lookups = all(isinstance(call.use, EmbeddingUse) for call in self.calls)
        return "table" if lookups else "tied table"

    @property
    def kronecker(self) -> bool:
        """Whether all calls act by one matrix, whose gradients are Kronecker-factored."""
        return self.layout is not None or self.table is not None

    @property
    def nbytes(self) -> int:
        """Bytes that keeping these gradients takes."""
        if self.given is not None:
            return self.given.nbytes
        return sum(call.use.nbytes + call.signals.nbytes for call in self.calls)

    def rows(self) -> Rows:
        """Return the rows, in the smaller of their forms."""
        if self.given is not None:
            return DenseRows(self.given.to(self._like))
        if not self.calls:
            return ZeroRows((self.n, self.c, self.columns.size), self._like)
        lookups = self.lookups()
        if lookups is not None:
            return lookups.compact()
        if self.layout is None:
            return DenseRows(self.dense(slice(0, self.n)))
        return join_rows([self.factors(part).compact() for part in self.parts()])

    def parts(self, calls: Sequence[Located] | None = None) -> Iterator[slice]:
        """Cut the examples into parts whose factors are a working set."""
        inputs, signals = self.sides(slice(0, 1), calls)
        per_example = sum(columns.numel() for columns in inputs) + signals.numel()
        budget = working_set(self._like.device)
        return chunks(self.n, per_example * self._like.element_size(), budget=budget)

    def factors(self, part: slice) -> FactoredRows:
        """Return the rows of some examples as factors, the positions of all calls joined."""
        assert self.layout is not None
        inputs, signals = self.sides(part)
        return FactoredRows(join_columns(inputs), signals, self.layout)

    def sides(
        self, part: slice, calls: Sequence[Located] | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return the inputs and signals of some examples, the positions of all calls joined.

        Parameters
        ----------
        part : slice
            Which examples.
        calls : sequence of Located, optional
            Some of `calls`; all when not given.

        Returns
        -------
        inputs : tuple of Tensor of shape (m, T, groups, columns)
            As of `FactoredRows`; the last column may be a tensor of its own.
        signals : Tensor of shape (m, c, T, groups, out)
        """
        inputs, signals = [], []
        for call in self.calls if calls is None else calls:
            assert isinstance(call.use, MatrixUse)
            assert call.use.weight is not None
            examples = Examples(call.layout, self.n, part)
            constant = None
            if self.group.bias is not None:
                meets_bias = call.use.bias is not None and call.use.bias.name == self.group.bias
                constant = float(meets_bias)
            a = call.use.inputs(examples, constant)
            inputs.append(tuple(columns.to(self._like) for columns in a))
            s = call.use.signals(call.signals, examples).to(self._like)
            signals.append(s if call.use.weight.whole else call.use.weight.pad(s, -1))
        if len(inputs) == 1:
            return inputs[0], signals[0]
        joined = [torch.cat(columns, 1) for columns in zip(*inputs, strict=True)]
        return tuple(joined), torch.cat(signals, 2)

    def lookups(self, calls: Sequence[Located] | None = None) -> LookupRows | None:
        """Return the positions of lookups of a table, all or some; None if not all are lookups."""
        parts = []
        for call in self.calls if calls is None else calls:
            if not isinstance(call.use, EmbeddingUse):
                return None
            whole = Examples(call.layout, self.n, slice(0, self.n))
            parts.append(call.use.lookup_rows(call.signals, whole))
        if not parts:
            return None
        return LookupRows(
            torch.cat([part.indices for part in parts], 1).to(self._like.device),
            torch.cat([part.signals for part in parts], 2).to(self._like),
            parts[0].vocabulary,
        )

    def by_token(self, tokens: int) -> tuple[list[GroupGradients], list[GroupGradients]]:
        """Divide the gradients, call by call, into what tokens contribute and the rest.

        Parameters
        ----------
        tokens : int
            How many an example has.

        Returns
        -------
        split : list of GroupGradients
            Of calls that meet that many: ``n * tokens`` gradients each, example by example.
        whole : list of GroupGradients
            The rest, of n examples.
        """
        if self.given is not None:
            return [], [self]
        of_tokens = [call for call in self.calls if call.tokens(self.n) == tokens]
        others = [call for call in self.calls if call.tokens(self.n) != tokens]
        shape, like = (self.n * tokens, self.c), self._like
        split = [
            GroupGradients(self.group, self.columns, shape, like, [call.by_token(self.n)])
            for call in of_tokens  # one by one: of each, rows have a form of their own
        ]
        whole = GroupGradients(self.group, self.columns, (self.n, self.c), like, others)
        return split, [whole] if others else []

    def dense(self, part: slice) -> Tensor:
        """Return the rows of some examples from the calls, shape ``(m, c, width)``."""
        columns = []
        for name in self.group.names:
            rows = [
                call.use.rows(name, call.signals, Examples(call.layout, self.n, part)).to(
                    self._like
                )
                for call in self.calls
                if name in call.use.names
            ]
            columns.append(torch.stack(rows).sum(0) if len(rows) > 1 else rows[0])
        return torch.cat([rows[..., None].flatten(2) for rows in columns], 2)


@dataclass(frozen=True)
class BatchGradients:
    """The gradients of a batch, group by group.

    Attributes
    ----------
    groups : list of GroupGradients
    size : int
        Number of parameters p.
    scalars : Tensor of shape (n, c)
        The scalars differentiated, detached.
    weights : Tensor of shape (n, c), or None
        Weight of each row in the Fisher; None where all are one.
    mask : Tensor of shape (n, T), or None
        Positions that are not padding, where the batch or the loss tells.
    places : Places
        Where the examples of the calls were found.
    """

    groups: list[GroupGradients]
    size: int
    scalars: Tensor
    weights: Tensor | None
    mask: Tensor | None
    places: Places

    @property
    def n(self) -> int:
        """Number of examples."""
        return self.scalars.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that keeping these gradients takes."""
        return sum(group.nbytes for group in self.groups)

    def layers(self) -> BatchGradients:
        """Return the gradients of the groups that are Kronecker layers."""
        return replace(self, groups=[group for group in self.groups if group.kronecker])

    def rows(self) -> RowMatrix:
        """Return the rows over all parameters."""
        groups = [(group.columns, group.rows()) for group in self.groups]
        return RowMatrix(groups, self.size, self.weights)

    def by_token(self) -> TokenGradients:
        """Return the rows divided into what each token contributes to them, and the rest.

        Layers that do not meet the same number of tokens have the rest: the number is that of most
        parameters, among those that meet several.
        """
        sizes: Counter[int] = Counter()
        for group in self.groups:
            for count in {call.tokens(self.n) for call in group.calls}:
                if count is not None:
                    sizes[count] += group.columns.size
        several = [count for count in sizes if count > 1]
        tokens = max(several, key=lambda count: (sizes[count], count), default=1)
        split: list[tuple[Columns, Rows]] = []
        whole: list[tuple[Columns, Rows]] = []
        divided: dict[str, bool | None] = {}
        for group in self.groups:
            if group.empty:
                continue
            of_tokens, rest = group.by_token(tokens)
            split += [(group.columns, part.rows()) for part in of_tokens]
            whole += [(group.columns, part.rows()) for part in rest]
            known = group.given is None
            divided.update(dict.fromkeys(group.group.names, not rest if known else None))
        n, c = self.scalars.shape
        every = Columns((slice(0, self.size),))
        split = split or [(every, ZeroRows((n * tokens, c, self.size), self.scalars))]
        whole = whole or [(every, ZeroRows((n, c, self.size), self.scalars))]
        return TokenGradients(
            tokens, RowMatrix(split, self.size), RowMatrix(whole, self.size), divided
        )

    def is_finite(self) -> Tensor:
        """Whether losses and gradients are finite, as a tensor, so that nothing waits for it."""
        checked = [call.signals for group in self.groups for call in group.calls]
        checked += [group.given for group in self.groups if group.given is not None]
        # One NaN or infinity makes its sum NaN or infinite, in one pass without temporaries.
        sums = [tensor.sum().to(self.scalars.device) for tensor in (self.scalars, *checked)]
        return torch.stack([total.isfinite() for total in sums]).all()


@dataclass(frozen=True)
class TokenGradients:
    """The gradients of a batch, divided into what each token contributes and the rest.

    Attributes
    ----------
    count : int
        Tokens of each example, T.
    split : RowMatrix
        Rows of ``n * T`` tokens, example by example; several may be of the same parameters.
    whole : RowMatrix
        Rows of n examples: what cannot be divided.
    divided : dict of str to bool or None
        Whether the tokens' rows make up all of a parameter's, that was met. None where its
        gradient was not taken from its calls.
    """

    count: int
    split: RowMatrix
    whole: RowMatrix
    divided: dict[str, bool | None]


def _common_layout(group: Group, calls: Sequence[Located]) -> MatrixLayout | None:
    """Return the layout by which all calls act on the group's weight as one matrix, if any."""
    layouts: set[MatrixLayout] = set()
    for call in calls:
        use = call.use
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


def _table_layout(group: Group, calls: Sequence[Located]) -> MatrixLayout | None:
    """Return the layout of a table that is looked up, and at most multiplied by besides."""
    tables = [call.use.table for call in calls if isinstance(call.use, EmbeddingUse)]
    if not tables or group.bias is not None:
        return None
    for call in calls:
        use = call.use
        if isinstance(use, EmbeddingUse):
            continue
        if not isinstance(use, MatrixUse) or use.layout != tables[0] or use.weight is None:
            return None
        if not use.weight.whole or use.weight.name != group.weight:
            return None
    return tables[0]
