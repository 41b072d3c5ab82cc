"""Gradients of the loss by each prunable weight, averaged over batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import MissingStatsError
from secateur.forward import evaluation_mode_of

LossFn = Callable[[nn.Module, Any], Tensor]
"""``loss_fn(model, batch) -> scalar`` mean loss over the batch."""


def collect_gradients(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    needs: Sequence[str] | frozenset[str],
) -> dict[str, dict[str, Tensor]]:
    r"""Average the loss gradient over batches.

    .. math:: \texttt{gradient} = \tfrac1B \sum_b g_b, \qquad \texttt{absolute\_gradient} = \tfrac1B \sum_b |g_b|

    The model runs in evaluation mode, so that dropout adds no noise and batch norm neither uses nor moves batch
    statistics; modes and ``.grad`` are as before afterwards. Sums are kept in float32 or wider.

    Args:
        model: The model.
        parameters: The parameters to differentiate by, by name.
        loss_fn: Returns the scalar loss of one batch.
        batches: The batches to average over.
        needs: Which of the two averages to return.

    Returns:
        The averages by statistic and parameter name; zero for a parameter that the loss does not depend on.

    Raises:
        MissingStatsError: When there are no batches, the loss is not a finite scalar, or it has no gradient.
    """
    sums: dict[str, dict[str, Tensor]] = {need: {} for need in needs}
    for name, parameter in parameters.items():
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        for need in needs:
            sums[need][name] = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
    frozen = [p for p in parameters.values() if not p.requires_grad]
    count = 0
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with evaluation_mode_of(model), torch.enable_grad():
            for batch in batches:
                _add(sums, parameters, loss_of(loss_fn, model, batch, count))
                count += 1
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    if count == 0:
        raise MissingStatsError("the score needs gradients, but there were no batches to compute them from")
    return {need: {name: total.div_(count) for name, total in by_name.items()} for need, by_name in sums.items()}


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


def _add(sums: Mapping[str, dict[str, Tensor]], parameters: Mapping[str, nn.Parameter], loss: Tensor) -> None:
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            continue
        if "gradient" in sums:
            sums["gradient"][name] += gradient
        if "absolute_gradient" in sums:
            sums["absolute_gradient"][name] += gradient.abs()
