"""Slow, obvious answers to compare the fast ones with: brute force in pure Python, and one weight at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

Numbers = Sequence[float]
LossFn = Callable[[nn.Module, Any], Tensor]


def rank(scores: Mapping[str, Numbers]) -> list[tuple[str, int]]:
    """List all units from the first to be removed to the last: sorted by (score, name, index).

    Args:
        scores: One score per unit, per name; no NaN.

    Returns:
        (name, index) of every unit. ``-0.0`` and ``0.0`` are the same score.
    """
    units = [(value, name, index) for name, values in scores.items() for index, value in enumerate(values)]
    if any(math.isnan(value) for value, _, _ in units):
        raise ValueError("NaN has no rank")
    return [(name, index) for _, name, index in sorted(units)]


def select_k(scores: Mapping[str, Numbers], k: int) -> dict[str, list[bool]]:
    """Keep the last ``k`` units of :func:`rank`.

    Args:
        scores: Scores per name.
        k: Number to keep over all names.

    Returns:
        One flag per unit, ``True`` = keep.
    """
    keep = {name: [True] * len(values) for name, values in scores.items()}
    order = rank(scores)
    for name, index in order[: len(order) - k]:
        keep[name][index] = False
    return keep


def remove_to_budget(scores: Mapping[str, Numbers], costs: Mapping[str, Numbers], kept: float) -> dict[str, list[bool]]:
    """Remove units in the order of :func:`rank` until what is left costs at most ``kept``; sums are exact.

    Args:
        scores: Scores per name.
        costs: Cost of every unit, per name.
        kept: Cost that may stay.

    Returns:
        One flag per unit, ``True`` = keep.
    """
    keep = {name: [True] * len(values) for name, values in scores.items()}
    left = sum((Fraction(c) for values in costs.values() for c in values), Fraction(0))
    for name, index in rank(scores):
        if left <= Fraction(kept):
            break
        keep[name][index] = False
        left -= Fraction(costs[name][index])
    return keep


def loss_changes(model: nn.Module, names: Sequence[str], loss_fn: LossFn, batch: Any) -> dict[str, Tensor]:
    r"""Measure what removing each weight alone does to the loss: the universal oracle of saliencies.

    .. math:: S_i = L(w \text{ with } w_i = 0) - L(w)

    One forward per weight, so for tiny models only.

    Args:
        model: The model, best in float64; unchanged afterwards.
        names: Parameters to go through.
        loss_fn: ``loss_fn(model, batch)``, the scalar loss.
        batch: The one batch.

    Returns:
        The change per element, of the parameters' shapes.

    References:
        Russell Reed, Pruning algorithms: a survey, 1993 (the brute-force baseline).
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    out = {}
    with torch.no_grad():
        base = float(loss_fn(model, batch))
        for name in names:
            flat = parameters[name].data.reshape(-1) if parameters[name].is_contiguous() else None
            if flat is None:
                raise ValueError(f"{name}: make the weight contiguous first")
            changes = torch.zeros(flat.numel(), dtype=torch.float64)
            for index in range(flat.numel()):
                value = flat[index].clone()
                flat[index] = 0.0
                changes[index] = float(loss_fn(model, batch)) - base
                flat[index] = value
            out[name] = changes.view(parameters[name].shape)
    return out


class _Masked(nn.Module):
    """A model called with every named weight multiplied by a mask."""

    def __init__(self, model: nn.Module, factors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.inner = model
        self.factors = factors

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        known = dict(self.inner.named_parameters(remove_duplicate=False))
        weights = {name: known[name].detach() * factor for name, factor in self.factors.items()}
        return functional_call(self.inner, weights, args, kwargs)


def mask_derivatives(model: nn.Module, names: Sequence[str], loss_fn: LossFn, batch: Any) -> dict[str, Tensor]:
    r"""Differentiate the loss by a multiplicative mask on each weight, at the mask of ones, by autograd.

    .. math:: \frac{\partial}{\partial c_i} L(c \odot w) \Big|_{c = 1}

    Args:
        model: The model.
        names: Parameters to mask.
        loss_fn: ``loss_fn(model, batch)``, the scalar loss.
        batch: The one batch.

    Returns:
        The derivative per element.

    References:
        Namhoon Lee, Thalaiyasingam Ajanthan, Philip Torr, SNIP: Single-shot Network Pruning, 2019.
    """
    known = dict(model.named_parameters(remove_duplicate=False))
    factors = {name: torch.ones_like(known[name], requires_grad=True) for name in names}
    loss = loss_fn(_Masked(model, factors), batch)
    gradients = torch.autograd.grad(loss, list(factors.values()))
    return dict(zip(names, gradients, strict=True))


def mask_differences(
    model: nn.Module, names: Sequence[str], loss_fn: LossFn, batch: Any, *, step: float = 1e-5
) -> dict[str, Tensor]:
    """Approximate :func:`mask_derivatives` by central differences, without any automatic differentiation.

    Args:
        model: The model, in float64.
        names: Parameters to mask.
        loss_fn: ``loss_fn(model, batch)``, the scalar loss.
        batch: The one batch.
        step: Half the distance between the two evaluations.

    Returns:
        The difference quotient per element, accurate to about ``step`` squared.
    """
    known = dict(model.named_parameters(remove_duplicate=False))
    out = {}
    with torch.no_grad():
        for name in names:
            quotients = torch.zeros(known[name].numel(), dtype=torch.float64)
            for index in range(quotients.numel()):
                factor = torch.ones(known[name].numel(), dtype=known[name].dtype)
                losses = []
                for value in (1.0 + step, 1.0 - step):
                    factor[index] = value
                    masked = _Masked(model, {name: factor.view(known[name].shape)})
                    losses.append(float(loss_fn(masked, batch)))
                quotients[index] = (losses[0] - losses[1]) / (2.0 * step)
            out[name] = quotients.view(known[name].shape)
    return out
