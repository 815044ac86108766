"""The loss of causal language models, whose labels are the tokens themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fimkit.exceptions import IFVPUsageError
from fimkit.losses.base import Loss, described
from fimkit.losses.likelihoods import CrossEntropy
from fimkit.losses.tokens import counts_padding, is_mask

__all__ = ["CausalLanguageModel"]


class CausalLanguageModel(CrossEntropy):
    """Softmax cross-entropy of each next token, summed over the tokens of a sequence that count.

    Logits ``(B, T, V)`` at a position are of the label at the position after it: labels ``(B, T)``
    are the token ids themselves, as Hugging Face's causal models take them, with -100 where a token
    does not count (padding, a prompt). The loss of a sequence is minus its log-probability, a sum
    over tokens, where those models' own ``loss`` is a mean over all tokens of the batch.
    """

    name = "loss='causal_lm'"

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the logits ``(B, V, T-1)`` of the positions that a token follows."""
        logits = Loss.outputs(self, model, batch)
        if not isinstance(logits, Tensor) or logits.ndim != 3:
            raise IFVPUsageError(
                f"{self.name} needs the logits of every position, (B, T, V), as the model's output "
                f"or its .logits; got {described(logits)}. For one label per sequence use "
                "loss='cross_entropy'; for other outputs pass a callable loss(model, batch)."
            )
        return logits[:, :-1].movedim(-1, 1)

    def targets(self, batch: Any) -> Tensor:
        """Return the labels of all positions but the first, which follows no token."""
        if isinstance(batch, Mapping) and "labels" not in batch:
            raise IFVPUsageError(
                f"the batch is a mapping with keys {sorted(map(str, batch))}, without 'labels'; "
                "add the token ids as labels, with -100 where a token does not count: "
                "batch['labels'] = input_ids.masked_fill(attention_mask == 0, -100)."
            )
        if is_mask(batch):
            raise IFVPUsageError(
                f"{self.name} got labels of only 0 and 1 beside other tokens: an attention mask, "
                "it seems. Give a mapping with input_ids, attention_mask and labels, the token ids "
                "with -100 where one does not count, or (input_ids, labels)."
            )
        targets = super().targets(batch)
        if not isinstance(targets, Tensor) or targets.ndim != 2:
            raise IFVPUsageError(
                f"{self.name} needs labels that are token ids, an integer tensor (B, T) with -100 "
                f"where a token does not count; got {described(targets)}."
            )
        return targets[:, 1:]

    def doubt(self, batch: Any) -> str | None:
        """Return that padding counts, which the model was not to see."""
        if not counts_padding(batch):
            return None
        return (
            f"{self.name}: labels of padding count as tokens, being the input_ids where "
            "attention_mask is 0; set them to -100: "
            "batch['labels'] = input_ids.masked_fill(attention_mask == 0, -100)."
        )

    def _aligned(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Return logits with classes along dimension 1, and targets checked against them."""
        (b, _, t), (n, u) = outputs.shape, targets.shape
        if (b, t) != (n, u):
            raise IFVPUsageError(
                f"{self.name} got logits of {t + 1} positions of {b} sequences, and labels of "
                f"shape {(n, u + 1)}; expected a label for each position."
            )
        return super()._aligned(outputs, targets)
