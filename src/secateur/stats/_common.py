"""What statistics share: loss and data as promised, parameters that can be differentiated, averages over batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import MissingStatsError, TargetError
from secateur.forward import attention_fast_path, evaluation_mode_of, requiring_gradients
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


def loss_of(loss_fn: LossFn, model: nn.Module, batch: Any, index: int) -> Tensor:
    """Compute the loss of one batch.

    Args:
        loss_fn: Returns the scalar loss.
        model: The model.
        batch: One batch.
        index: Its number, for the message.

    Raises:
        MissingStatsError: When it is not one finite number with a gradient.
    """
    loss = loss_fn(model, batch)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise MissingStatsError(f"the loss must be one number per batch, got {got} on batch {index}; take its mean")
    if not bool(torch.isfinite(loss)):
        raise MissingStatsError(f"the loss is {loss.item()} on batch {index}; gradients of it rank nothing")
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
        MissingStatsError: When a parameter holds integers, by which nothing can be differentiated.
    """
    for name, parameter in parameters.items():
        if not parameter.is_floating_point():
            raise MissingStatsError(f"{who}: {name} has dtype {parameter.dtype}, which has no gradient; exclude it")
    gradients = requiring_gradients(parameters.values())
    with gradients, evaluation_mode_of(model), attention_fast_path(enabled=False), torch.enable_grad():
        yield


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
