"""Gradients of the loss by each prunable weight, averaged over batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.stats._common import LossFn, counted, differentiable, loss_of, refuse_nothing, zeros_like

__all__ = ["LossFn", "collect_gradients", "loss_of"]

_WHY = "the loss is at a minimum, or nothing of it reaches the weights"


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
    who = "the score's gradient"
    sums = {need: zeros_like(parameters) for need in needs}
    with differentiable(who, model, parameters):
        for index, batch in counted(who, batches):
            _add(sums, parameters, loss_of(loss_fn, model, batch, index))
    out = {need: {name: total.div_(index + 1) for name, total in by_name.items()} for need, by_name in sums.items()}
    for values in out.values():
        refuse_nothing(who, values, _WHY)
    return out


def _add(sums: Mapping[str, dict[str, Tensor]], parameters: Mapping[str, nn.Parameter], loss: Tensor) -> None:
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            continue
        if "gradient" in sums:
            sums["gradient"][name] += gradient
        if "absolute_gradient" in sums:
            sums["absolute_gradient"][name] += gradient.abs()
