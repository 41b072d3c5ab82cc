"""What statistics share: loss and data as promised, parameters that can be differentiated, averages over batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur.errors import MissingStatsError, TargetError
from secateur.forward import attention_fast_path, check_batches, requiring_gradients, run_on, undisturbed
from secateur.types import Source

LossFn = Callable[[nn.Module, Any], Tensor]
"""``loss_fn(model, batch) -> scalar`` mean loss over the batch."""

LOSS_AND_BATCHES = frozenset({"loss", "batches"})

Add = Callable[[dict[str, Tensor], LossFn, Any, int], int]
"""``add(sums, loss_fn, batch, number of the batch)`` adds to the sums, by weight; returns how many things it added."""


class OfWeights:
    """What a statistic is that has one number for each weight, taken from a loss on batches."""

    @property
    def uses(self) -> frozenset[str]:
        """Loss and batches."""
        return LOSS_AND_BATCHES

    @property
    def elementwise(self) -> bool:
        """Each weight has a number of its own."""
        return True


def data_of(who: object, source: Source) -> tuple[LossFn, Callable[[], Iterable[Any]]]:
    """Return loss and batches.

    Args:
        who: The statistic, for the message.
        source: What it is collected from.

    Raises:
        MissingStatsError: When there are none.
    """
    if source.loss_fn is None or source.batches is None:
        raise MissingStatsError(f"{who} needs loss_fn=lambda model, batch: ... and batches=[...]")
    return source.loss_fn, source.batches


def check_data(loss_fn: object, batches: object) -> None:
    """Refuse, before anything is built, a loss that cannot be called and batches that cannot be gone through again.

    Args:
        loss_fn: What a user gave for the loss, or nothing.
        batches: What a user gave for the batches, or nothing.

    Raises:
        MissingStatsError: Says what came, and what to pass.
    """
    if loss_fn is not None and not callable(loss_fn):
        raise MissingStatsError(
            f"loss_fn must be a function of model and batch that returns the loss, got {loss_fn!r:.80}"
        )
    if isinstance(batches, Iterator):
        raise MissingStatsError(
            "batches is an iterator, which is empty after the first update; pass a list, a data loader, or a "
            "function that returns a new iterator"
        )
    if batches is not None and not callable(batches):
        check_batches("batches", batches, error=MissingStatsError)


def call_loss(loss_fn: LossFn, model: nn.Module, batch: Any, index: int) -> Any:
    """Call the user's function; a failure of it is reported as such.

    Args:
        loss_fn: The function.
        model: The model.
        batch: One batch.
        index: Its number, for the message.

    Raises:
        MissingStatsError: When it raises; says on what.
    """
    return run_on(loss_fn, model, batch, index, what="loss_fn(model, batch)", error=MissingStatsError)


def check_loss(loss: object, batch: Any, index: int) -> Tensor:
    """Refuse what is not one finite number.

    Args:
        loss: What a loss function returned.
        batch: For which batch.
        index: Its number, for the message.

    Returns:
        The loss.

    Raises:
        MissingStatsError: Says what it is instead.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        what = "take its mean" if isinstance(loss, Tensor) else "return a tensor with one number in it"
        raise MissingStatsError(f"the loss must be one number per batch, got {got} on batch {index}; {what}")
    if not bool(torch.isfinite(loss)):
        empty = any(isinstance(t, Tensor) and t.dim() and not t.shape[0] for t in tree_leaves(batch))
        why = ", which has no samples" if empty else ""
        raise MissingStatsError(
            f"the loss is {loss.item()} on batch {index}{why}; such a loss ranks nothing. Leave the batch out, or "
            "look at the data and the weights"
        )
    return loss


def loss_of(loss_fn: LossFn, model: nn.Module, batch: Any, index: int) -> Tensor:
    """Compute the loss of one batch.

    Args:
        loss_fn: Returns the scalar loss.
        model: The model.
        batch: One batch.
        index: Its number, for the message.

    Raises:
        MissingStatsError: When the function fails, or its value is not one finite number with a gradient.
    """
    loss = check_loss(call_loss(loss_fn, model, batch, index), batch, index)
    if not loss.requires_grad:
        raise MissingStatsError("the loss has no gradient: it was computed without grad or from detached tensors")
    return loss


def averaged(who: object, source: Source, add: Add) -> dict[str, Tensor]:
    """Average something over batches, in evaluation mode and with gradients by all parameters.

    Args:
        who: The statistic, for messages.
        source: What it is collected from.
        add: Adds what one batch gives.

    Returns:
        The sums over the number of things added, in float32 or wider.

    Raises:
        MissingStatsError: When there is no loss or no batch, or a parameter holds integers.
    """
    loss_fn, batches = data_of(who, source)
    sums, count = zeros_like(source.parameters), 0
    with differentiable(who, source.model, source.parameters):
        for index, batch in counted(who, batches()):
            count += add(sums, loss_fn, batch, index)
    return {name: value.div_(count) for name, value in sums.items()}


def counted(who: object, batches: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """Number the batches, and refuse to end without one.

    Args:
        who: The statistic, for the message.
        batches: The batches.

    Yields:
        Number and batch.

    Raises:
        MissingStatsError: When there was none.
    """
    check_batches("what batches() returns", batches, error=MissingStatsError)
    index = -1
    for index, batch in enumerate(batches):
        yield index, batch
    if index < 0:
        raise MissingStatsError(f"{who} looks at batches, and there were no batches")


@contextmanager
def differentiable(who: object, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Evaluate with gradients by all parameters, frozen ones included; everything is put back.

    Args:
        who: The statistic, for the message.
        model: The model.
        parameters: What to differentiate by.

    Raises:
        MissingStatsError: When a parameter holds integers, by which nothing can be differentiated, or under
            ``torch.inference_mode``.
    """
    refuse_inference(who)
    for name, parameter in parameters.items():
        if not parameter.is_floating_point():
            raise MissingStatsError(f"{who}: {name} has dtype {parameter.dtype}, which has no gradient; exclude it")
    gradients = requiring_gradients(parameters.values())
    with gradients, undisturbed(model), attention_fast_path(enabled=False), torch.enable_grad():
        yield


def refuse_inference(who: object) -> None:
    """Refuse to differentiate where PyTorch does not.

    Args:
        who: The statistic, for the message.

    Raises:
        MissingStatsError: Under ``torch.inference_mode``.
    """
    if torch.is_inference_mode_enabled():
        raise MissingStatsError(f"{who} needs gradients, and torch.inference_mode() computes none: leave that context")


def zeros_like(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return sums to add to, in float32 or wider."""
    return {n: torch.zeros_like(p, dtype=wide(p.dtype), requires_grad=False) for n, p in parameters.items()}


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to add up in."""
    return torch.promote_types(dtype, torch.float32)


def refuse_nothing(who: object, values: Mapping[str, Tensor], why: str) -> None:
    """Refuse a statistic that is zero everywhere, or not finite somewhere: it ranks nothing.

    Args:
        who: The statistic, for the message.
        values: What was collected.
        why: What makes it zero, and what to do.

    Raises:
        MissingStatsError: Says which.
    """
    for name, value in values.items():
        refuse_infinite(f"{who} of {name}", value)
    refuse_zeros(who, values.values(), why)


def refuse_zeros(who: object, values: Iterable[Tensor], why: str, *, each: str = "weight") -> None:
    """Refuse what is zero everywhere: it would be ranked by the order of its indices.

    Args:
        who: What it was collected for, for the message.
        values: What was collected.
        why: What makes it zero, and what to do.
        each: What has one value.

    Raises:
        MissingStatsError: When all values are zero.
    """
    if not any(bool(value.any()) for value in values):
        raise MissingStatsError(f"{who} is zero for every {each}, which ranks nothing: {why}")


def refuse_infinite(what: str, value: Tensor) -> None:
    """Refuse what is not finite somewhere.

    Args:
        what: What it is, for the message.
        value: The tensor.

    Raises:
        MissingStatsError: Says which.
    """
    if not bool(torch.isfinite(value).all()):
        raise MissingStatsError(
            f"{what} is NaN or infinite: the loss has no derivative there (a root or logarithm of zero), or loss or "
            "weights are too large"
        )


def check_count(what: str, value: int) -> None:
    """Refuse anything but a whole number of at least one.

    Raises:
        TargetError: Names the option.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise TargetError(f"{what} must be a whole number of at least 1, got {value!r}")


def slack_of(dtype: torch.dtype) -> float:
    """Return how far two sums of one thing may be apart, relative: sixteen bits have two or three digits."""
    return {2: 3e-2, 4: 1e-3}.get(dtype.itemsize, 1e-6)
