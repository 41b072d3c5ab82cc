"""Optimizers by name, and learning rates as pure functions of the epoch."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from secateur.errors import RecipeError, nearest
from secateur.registry import Registry

OPTIMIZERS = Registry(
    "optimizer",
    {
        "sgd": torch.optim.SGD,
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "rmsprop": torch.optim.RMSprop,
        "adagrad": torch.optim.Adagrad,
        "nadam": torch.optim.NAdam,
        "radam": torch.optim.RAdam,
    },
)


def check_optimizer(name: str, options: dict[str, Any]) -> None:
    """Refuse an option that the optimizer does not have, or has no place in a recipe.

    Raises:
        UnknownNameError: When the optimizer is unknown.
        RecipeError: When an option is; names the nearest.
    """
    known = set(inspect.signature(OPTIMIZERS[name]).parameters) - {"params", "self"}
    for option, value in options.items():
        if option not in known:
            raise RecipeError(f"train.optimizer.{option}: {name} has no such option; {nearest(option, known)}")
        numbers = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(v, bool | int | float) and math.isfinite(v) for v in numbers):
            raise RecipeError(f"train.optimizer.{option}: expected a finite number, true or false, got {value!r}")
    try:
        build_optimizer(nn.Linear(1, 1), name, options)
    except (ValueError, TypeError, RuntimeError) as error:
        raise RecipeError(f"train.optimizer: {name} refuses {options}: {error}") from None


def build_optimizer(
    model: nn.Module, name: str, options: dict[str, Any], *, latents: Sequence[nn.Parameter] = (), **of_latents: float
) -> Optimizer:
    """Return the optimizer over the model's trainable parameters.

    Args:
        model: The model.
        name: Of the optimizer.
        options: Its options.
        latents: What else is trained, as a group of its own.
        **of_latents: Options of that group. Its ``initial_lr`` is the learning rate that schedules multiply.
    """
    optimizer: Optimizer = OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad], **options)
    if latents:
        optimizer.add_param_group({"params": list(latents), **of_latents})
        group = optimizer.param_groups[-1]
        group["initial_lr"] = group["lr"]
    return optimizer


class LearningRate(Protocol):
    """A factor on the optimizer's learning rate."""

    def __call__(self, epoch: float, epochs: int) -> float:
        """Return the factor at ``epoch`` (fractional) of ``epochs``."""
        ...


@dataclass(frozen=True)
class Constant:
    """The same learning rate throughout, after a linear warm-up.

    Args:
        warmup: Epochs of warm-up.
    """

    warmup: float = 0.0

    def __call__(self, epoch: float, epochs: int) -> float:
        """Return 1, or less during the warm-up."""
        return _warm(epoch, self.warmup)


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from 1 to ``end``.

    Args:
        warmup: Epochs of linear warm-up.
        end: Factor at the end of training.
    """

    warmup: float = 0.0
    end: float = 0.0

    def __call__(self, epoch: float, epochs: int) -> float:
        """Return the factor."""
        u = min(max((epoch - self.warmup) / max(epochs - self.warmup, 1e-9), 0.0), 1.0)
        return _warm(epoch, self.warmup) * (self.end + (1.0 - self.end) * (1.0 + math.cos(math.pi * u)) / 2.0)


@dataclass(frozen=True)
class Linear:
    """A straight line from 1 to ``end``.

    Args:
        warmup: Epochs of linear warm-up.
        end: Factor at the end of training.
    """

    warmup: float = 0.0
    end: float = 0.0

    def __call__(self, epoch: float, epochs: int) -> float:
        """Return the factor."""
        u = min(max((epoch - self.warmup) / max(epochs - self.warmup, 1e-9), 0.0), 1.0)
        return _warm(epoch, self.warmup) * (1.0 + (self.end - 1.0) * u)


@dataclass(frozen=True)
class Steps:
    """Multiplied by ``factor`` at each milestone.

    Args:
        milestones: Epochs at which the learning rate falls.
        factor: What it is multiplied by.
        warmup: Epochs of linear warm-up.
    """

    milestones: tuple[float, ...]
    factor: float = 0.1
    warmup: float = 0.0

    def __call__(self, epoch: float, epochs: int) -> float:
        """Return the factor."""
        passed = sum(epoch >= m for m in self.milestones)
        return float(_warm(epoch, self.warmup) * self.factor**passed)


def _warm(epoch: float, warmup: float) -> float:
    # Starts above zero: a first step of zero would be a step lost.
    return min(1.0, (epoch + 0.1) / warmup) if warmup > 0 and epoch < warmup else 1.0


LEARNING_RATES = Registry(
    "learning-rate schedule", {"constant": Constant, "cosine": Cosine, "linear": Linear, "steps": Steps}
)
