"""Batch-norm repair after pruning: match the dense model's outputs, or estimate the statistics again.

Removing weights shifts what reaches each batch norm, and with it everything after. Both repairs need inputs and no
labels. They differ in what they trust: re-estimation replaces the running statistics by those of the given inputs,
so inputs from another domain than the training's harm even a dense model; re-matching keeps them and only brings each
norm's output back to what the dense model shows on the same inputs, so it leaves a dense model bit for bit alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from secateur.errors import DataError, SecateurWarning, WeightError
from secateur.forward import call_model, check_batches, check_module, evaluation_mode_of, run_on

# Shapes: N samples, C channels, * positions

_CONSTANT = 1e-4
"""A pruned channel whose standard deviation is less than this part of the dense one's counts as constant."""

Forward = Callable[[nn.Module, Any], object]


@dataclass(frozen=True)
class Moved:
    """What a repair did.

    Attributes:
        layers: Batch norms that were changed or looked at.
        moved: Largest mean movement over the layers, in the layer's own standard deviations.
        skipped: Batch norms left alone, and why.
    """

    layers: int
    moved: float
    skipped: dict[str, str]


@torch.no_grad()
def rematch_bn_(model: nn.Module, dense: nn.Module, inputs: Any, *, forward: Forward = call_model) -> Moved:
    r"""Bring each batch norm's output mean and standard deviation back to the dense model's, in closed form.

    With :math:`z` a norm's output before scale and shift, and mean :math:`m` and standard deviation :math:`s` per
    channel over samples and positions, in the dense (d) and the pruned (p) model on the same inputs:

    .. math::
        \gamma' = \gamma_d\,\frac{s_d}{s_p}, \qquad \beta' = \beta_d + \gamma_d\,m_d - \gamma'\,m_p

    The pruned model's norms are set one after the other in the order of the forward pass, each seeing the repaired
    output of those before it, in a single pass. Equal inputs give :math:`s_d / s_p = 1` and so change no bit. A channel
    that is constant in the pruned model (:math:`s_p < 10^{-4} s_d`) becomes its dense mean.

    Args:
        model: The pruned model; its scales and shifts are changed in place.
        dense: The model before pruning, with the same module names.
        inputs: One batch of inputs without labels, some hundred samples; the statistics are over all of it.
        forward: How to run a model on the inputs.

    Returns:
        How far the pre-affine means had moved, and which norms were skipped.

    Raises:
        WeightError: When the models' batch norms differ in name or width.
        DataError: When fewer than two values per channel, or NaN, reach a norm, or a forward fails; the model is
            unchanged then.

    References:
        The matching of moments is this library's own choice; the problem is described by Hao Li et al., Pruning
        Filters for Efficient ConvNets, 2017, and Bailin Li et al., EagleEye, 2020 (re-estimation).
    """
    norms, reference = _norms(model), _norms(dense)
    if {n: m.num_features for n, m in norms.items()} != {n: m.num_features for n, m in reference.items()}:
        raise WeightError("the dense model's batch norms have other names or widths than the pruned model's")
    skipped = {name: _unfit(norm) for name, norm in norms.items() if _unfit(norm)}
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    calls = dict.fromkeys(norms, 0)

    def remember(name: str, norm: _BatchNorm, x: Tensor, out: Tensor) -> None:
        calls[name] += 1
        seen[name] = _moments(name, norm, x)

    with evaluation_mode_of(dense), _hooks(reference, skipped, remember):
        run_on(forward, dense, inputs, 0, what="the dense model's forward", error=DataError)
    skipped |= {n: f"called {c} times in one forward pass" for n, c in calls.items() if n not in skipped and c != 1}
    moved = [0.0]

    def repair(name: str, norm: _BatchNorm, x: Tensor, out: Tensor) -> Tensor:
        mean_d, std_d = seen[name]
        mean, std = _moments(name, norm, x)
        moved.append(float(((mean - mean_d).abs() / std_d.clamp_min(1e-12))[std_d > 0].mean()) if std_d.any() else 0.0)
        gamma_d, beta_d = reference[name].weight.double(), reference[name].bias.double()
        # Constant in both models: nothing to scale. Constant in the pruned one alone, or as good as: scaling would
        # only blow up rounding noise.
        scaled = gamma_d * (std_d / std.clamp_min(1e-300))
        gamma = torch.where(std > _CONSTANT * std_d, scaled, torch.where(std_d > 0, torch.zeros_like(scaled), gamma_d))
        beta = beta_d + (gamma_d * mean_d - gamma * mean)
        _refuse_infinite(name, gamma, beta)
        norm.weight.copy_(gamma)
        norm.bias.copy_(beta)
        return norm.forward(x)

    with _untouched_on_error(norms), evaluation_mode_of(model), _hooks(norms, skipped, repair):
        run_on(forward, model, inputs, 0, what="the model's forward", error=DataError)
    return Moved(len(norms) - len(skipped), max(moved), skipped)


@torch.no_grad()
def reestimate_bn_(
    model: nn.Module, batches: Iterable[Any], *, forward: Forward = call_model, warn_beyond: float = 0.25
) -> Moved:
    r"""Replace the running statistics by the plain average over batches.

    .. math:: \mu = \tfrac1B \sum_b \mu_b, \qquad \sigma^2 = \tfrac1B \sum_b \sigma_b^2

    The inputs must come from the distribution that the model will see: this forgets the training's statistics. When
    some layer's mean moves by more than ``warn_beyond`` of its standard deviation, or its variance by more than a
    factor of four, a warning says so; re-matching is the repair that survives other inputs.

    Args:
        model: The pruned model; its running statistics are changed in place.
        batches: Batches of inputs without labels.
        forward: How to run the model on one batch.
        warn_beyond: Largest mean movement, in standard deviations, that passes without a warning.

    Returns:
        How far the statistics moved.

    Raises:
        DataError: When there are no batches, one is empty or makes the forward fail, or NaN reaches a norm; the model
            is unchanged then.

    References:
        Bailin Li, Bowen Wu, Jiang Su, Guangrun Wang, EagleEye: Fast Sub-net Evaluation for Efficient Neural Network
        Pruning, 2020.
    """
    check_batches("batches", batches, error=DataError)
    norms = {n: m for n, m in _norms(model).items() if m.track_running_stats and m.running_mean is not None}
    skipped = {n: "keeps no running statistics" for n in _norms(model) if n not in norms}
    if not norms:
        return Moved(0, 0.0, skipped)
    before = {n: (_buffer(m.running_mean).clone(), _buffer(m.running_var).clone()) for n, m in norms.items()}
    momenta = {n: m.momentum for n, m in norms.items()}
    count = 0
    try:
        with _untouched_on_error(norms), evaluation_mode_of(model):
            for norm in norms.values():
                norm.reset_running_stats()
                norm.momentum = None  # the cumulative average
                norm.train()
            for batch in batches:
                if next((not len(t) for t in tree_leaves(batch) if isinstance(t, Tensor) and t.dim()), False):
                    raise DataError(f"batch {count} has no samples, and would count like any other; leave it out")
                run_on(forward, model, batch, count, what="the model's forward", error=DataError)
                count += 1
            if count == 0:
                raise DataError("re-estimating batch-norm statistics needs at least one batch of inputs; got none")
            for name, norm in norms.items():
                _refuse_infinite(name, _buffer(norm.running_mean), _buffer(norm.running_var))
    finally:
        for name, norm in norms.items():
            norm.momentum = momenta[name]
    moved, ratio = _distance(norms, before)
    if moved > warn_beyond or ratio > 4.0:
        warnings.warn(
            f"re-estimated batch-norm statistics moved by {moved:.2f} standard deviations (variance by a factor of "
            f"{ratio:.1f}): these inputs may not be like the training's. recover.batch_norm = 'rematch' does not "
            f"depend on that",
            SecateurWarning,
            stacklevel=3,  # past the no_grad decorator
        )
    return Moved(len(norms), moved, skipped)


def _distance(norms: dict[str, _BatchNorm], before: dict[str, tuple[Tensor, Tensor]]) -> tuple[float, float]:
    moved, ratio = 0.0, 1.0
    for name, norm in norms.items():
        mean, var = before[name]
        now = _buffer(norm.running_var)
        moved = max(moved, float(((_buffer(norm.running_mean) - mean).abs() / (var + norm.eps).sqrt()).mean()))
        change = float(((now + norm.eps) / (var + norm.eps)).log().abs().mean().exp())
        ratio = max(ratio, change)
    return moved, ratio


@contextmanager
def _untouched_on_error(norms: dict[str, _BatchNorm]) -> Iterator[None]:
    """Put scales, shifts and statistics back, step counts included, when a repair ends half-way."""
    kept = [(t, t.clone()) for norm in norms.values() for t in (*norm.parameters(), *norm.buffers())]
    try:
        yield
    except BaseException:
        for tensor, value in kept:
            tensor.copy_(value)
        raise


def _refuse_infinite(name: str, *values: Tensor) -> None:
    if not all(bool(torch.isfinite(value).all()) for value in values):
        raise DataError(
            f"{name}: NaN or infinite values reach it, or none at all (an empty batch); leave such inputs out, or look "
            "at the weights"
        )


def _norms(model: nn.Module) -> dict[str, _BatchNorm]:
    check_module(model)
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def _buffer(value: Tensor | None) -> Tensor:
    if value is None:
        raise AssertionError("filtered before")
    return value


def _unfit(norm: _BatchNorm) -> str:
    if norm.weight is None or norm.bias is None:
        return "has no scale and shift to set"
    if norm.running_mean is None:
        return "normalises by the batch itself"
    return ""


def _moments(name: str, norm: _BatchNorm, x_NCx: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation per channel of the output before scale and shift."""
    mean = _buffer(norm.running_mean).double()
    scale = (_buffer(norm.running_var).double() + norm.eps).rsqrt()
    if x_NCx.numel() // max(x_NCx.shape[1], 1) < 2:
        raise DataError(f"{name}: one value per channel has no standard deviation; give a larger batch of inputs")
    # In the activations' own precision (Welford's sums lose nothing that matters here): a float64 copy of a large
    # batch would be the largest tensor of the whole pass.
    var, mu = torch.var_mean(x_NCx.float(), dim=[d for d in range(x_NCx.dim()) if d != 1], correction=0)
    return (mu.double() - mean) * scale, var.double().sqrt() * scale


@contextmanager
def _hooks(norms: dict[str, _BatchNorm], skipped: dict[str, str], action: Callable[..., Any]) -> Iterator[None]:
    handles = []
    for name, norm in norms.items():
        if name in skipped:
            continue

        def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor, *, name: str = name) -> Any:
            return action(name, module, args[0], out)

        handles.append(norm.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
