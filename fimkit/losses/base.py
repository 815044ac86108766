"""What a loss is asked for, and losses that are plain functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fimkit.exceptions import IFVPUsageError

__all__ = [
    "SQUEEZED",
    "CallableLoss",
    "Loss",
    "Uniforms",
    "arguments_of",
    "described",
    "logits_of",
    "run",
]

#: Numbers in [0, 1) of a shape with the examples first, by random state, example and sample.
Uniforms = Callable[[Sequence[int]], Tensor]


#: What to do about a model that drops the dimension of the only example of a batch.
SQUEEZED = (
    " A .squeeze() drops the dimension of examples of a batch of one, too; name the dimensions to "
    "drop, such as .squeeze(-1)."
)


class Loss:
    """A negative log-likelihood per example; subclass it for a loss of your own.

    Every tensor has the examples of the batch along its first dimension.
    """

    #: How messages name this loss.
    name = "loss"

    def outputs(self, model: nn.Module, batch: Any) -> Any:
        """Run the model on a batch and return what the other methods take as ``outputs``.

        A tuple or list is ``(*inputs, targets)``; of a mapping, ``labels`` are the targets and
        the rest keyword arguments. An output object's ``logits`` are taken when it has them.
        """
        out = run(model, batch)
        logits = logits_of(out)
        return out if logits is None else logits

    def targets(self, batch: Any) -> Any:
        """Return the targets of a batch: its ``labels``, or its last element."""
        if isinstance(batch, Mapping):
            if "labels" not in batch:
                raise IFVPUsageError(
                    f"the batch is a mapping with keys {sorted(map(str, batch))}, without "
                    "'labels'; rename its targets to 'labels', or pass a callable "
                    "loss(model, batch)."
                )
            return batch["labels"]
        return _sequence(batch)[-1]

    def doubt(self, batch: Any) -> str | None:
        """Return what is likely wrong about a batch that can be computed, as a warning tells it.

        Asked of every batch as the loader gives it, until one is answered by more than None.
        """
        return None

    def doubt_outputs(self, outputs: Any) -> str | None:
        """Return what is likely wrong about outputs that a loss can be computed of, as a warning.

        Asked of the first batch's.
        """
        return None

    def losses(self, outputs: Any, targets: Any) -> Tensor | tuple[Tensor, Tensor]:
        """Return the loss of each example, shape ``(B,)``, or ``(losses, mask)``."""
        raise NotImplementedError

    def sample(self, outputs: Any, targets: Any, uniforms: Uniforms) -> Any:
        """Return targets drawn from the predictive distribution.

        Parameters
        ----------
        outputs, targets
            As returned by the methods of those names; ``targets`` for their shape and for
            positions that do not count.
        uniforms : callable
            ``uniforms(shape)``, with B first in ``shape``, returns a float64 tensor of numbers in
            [0, 1) that depend on the random state, the example and the sample, not on the batch.
        """
        raise self._refusal("'mc'", "sample")

    def mode(self, outputs: Any, targets: Any) -> Any:
        """Return the model's own most probable targets."""
        raise self._refusal("'predicted'", "mode")

    def exact(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Return scalars ``(B, c)`` and weights ``(B, c)`` of the exact Fisher's rows.

        The Fisher of an example is the sum over its c scalars of weight times the outer product
        of the scalar's gradient. Weights carry no gradient.
        """
        raise self._refusal("'exact'", "exact")

    def measure(self, measurement: str, outputs: Any, targets: Any) -> Tensor:
        """Return what a classifier's logits say for the targets of each example, shape ``(B,)``.

        Parameters
        ----------
        measurement : {"logit", "log_odds", "margin"}
            The target's logit; the logarithm of its probability over that of all other classes;
            or its logit less the highest other. Summed over an example's targets that count.
        outputs, targets
            As for `losses`.
        """
        raise IFVPUsageError(
            f"measurement={measurement!r} needs the logits of classes, which {self.name} does not "
            "give; use a callable measurement(model, batch) returning (B,) numbers."
        )

    def _refusal(self, fisher: str, method: str) -> IFVPUsageError:
        return IFVPUsageError(
            f"fisher={fisher} needs a likelihood, which {self.name} does not give; use "
            f"fisher='empirical', or a subclass of fimkit.losses.Loss with a {method}() method."
        )


class CallableLoss(Loss):
    """A function ``loss(model, batch)`` returning ``(B,)`` losses, or ``(losses, mask)``."""

    def __init__(self, function: Callable[[nn.Module, Any], Any]) -> None:
        self.function = function
        self.name = f"loss={getattr(function, '__name__', type(function).__name__)}"

    def outputs(self, model: nn.Module, batch: Any) -> Any:
        """Return what the function returns."""
        return self.function(model, batch)

    def targets(self, batch: Any) -> None:
        """Return None: the function has met its targets."""
        return

    def losses(self, outputs: Any, targets: Any) -> Tensor | tuple[Tensor, Tensor]:
        """Return the function's result."""
        return outputs  # type: ignore[no-any-return]


def arguments_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what a model is called with on a batch, by the rule of `Loss.outputs`."""
    if isinstance(batch, Mapping):
        return (), {key: value for key, value in batch.items() if key != "labels"}
    return tuple(_sequence(batch)[:-1]), {}


def run(model: nn.Module, batch: Any) -> Any:
    """Return what the model returns for the inputs of a batch."""
    _refuse_missing_decoder_inputs(model, batch)
    args, kwargs = arguments_of(batch)
    out = model(*args, **kwargs)
    _refuse_squeezed(model, out, (*args, *kwargs.values()))
    return out


def _refuse_squeezed(model: nn.Module, out: Any, inputs: Sequence[Any]) -> None:
    """Refuse a number where a batch of one example was given: its dimension was dropped."""
    alone = any(isinstance(x, Tensor) and x.shape[:1] == (1,) for x in inputs)
    if alone and isinstance(out, Tensor) and not out.ndim:
        raise IFVPUsageError(
            f"{type(model).__name__} returned a tensor without dimensions for a batch of one "
            f"example.{SQUEEZED}"
        )


def _refuse_missing_decoder_inputs(model: nn.Module, batch: Any) -> None:
    """Refuse labels that a decoder would not be given: it would run on other tokens, or not run."""
    two_sided = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if not two_sided or not isinstance(batch, Mapping):
        return
    labels = batch.get("labels")
    given = {"decoder_input_ids", "decoder_inputs_embeds"} & batch.keys()
    taken = inspect.signature(model.forward).parameters
    if "decoder_input_ids" in taken and not given and getattr(labels, "ndim", 0) == 2:
        raise IFVPUsageError(
            "the batch has labels and no decoder_input_ids, which the model makes of labels, and "
            "labels are kept from it; add batch['decoder_input_ids'] = "
            "model.prepare_decoder_input_ids_from_labels(labels=batch['labels'])."
        )


def logits_of(out: Any) -> Any:
    """Return the ``logits`` of an output object or mapping, None where it has none."""
    return out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", None)


def described(value: Any) -> str:
    """Return how a message tells what outputs or targets are."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        told = ", ".join(described(item) for item in value[:3]) or "nothing"
        more = f" and {len(value) - 3} more" if len(value) > 3 else ""
        return f"a {type(value).__name__} of {told}{more}"
    return type(value).__name__


def _sequence(batch: Any) -> Sequence[Any]:
    if isinstance(batch, tuple | list) and len(batch) >= 2:
        return batch
    found = type(batch).__name__
    if isinstance(batch, tuple | list):
        found += f" of length {len(batch)}"
    if isinstance(batch, Tensor):
        found += (
            ", as from [x, y] in place of a list of batches such as [(x, y)], or from data without "
            "targets"
        )
    raise IFVPUsageError(
        f"a batch must be a tuple or list (*inputs, targets), or a mapping with 'labels'; got "
        f"{found}. Give the targets as well, for instance as ModelData(model, (inputs, targets)), "
        "or pass a callable loss(model, batch) for other batches."
    )
