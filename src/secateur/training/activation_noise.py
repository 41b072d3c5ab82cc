"""Noise of weights, drawn on the outputs of the layers that they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from secateur.errors import PatternError
from secateur.training._tensors import wide
from secateur.types import Tensors

_CONVOLUTIONS = {nn.Conv1d: nn.Conv1d.forward, nn.Conv2d: nn.Conv2d.forward, nn.Conv3d: nn.Conv3d.forward}
_TINY = 1e-8  # the square root has no derivative at zero


def owner_of(model: nn.Module, name: str) -> nn.Module:
    """Return the module that a parameter belongs to."""
    return model.get_submodule(name.rpartition(".")[0])


def check_layer(model: nn.Module, name: str) -> None:
    """Refuse a weight whose layer is not a product with the input that noise can be put behind.

    Raises:
        PatternError: Names the weight, its layer and the ways out.
    """
    module = owner_of(model, name)
    forward = type(module).forward
    linear = isinstance(module, nn.Linear) and forward is nn.Linear.forward
    convolution = any(isinstance(module, kind) and forward is own for kind, own in _CONVOLUTIONS.items())
    if not name.endswith("weight") or not (linear or convolution):
        raise PatternError(
            f"{name}: noise can be drawn on the outputs of Linear and Conv1d to Conv3d with their own forward, not of "
            f"{type(module).__name__}; draw it on the weights (local=False), or leave it out with exclude=[{name!r}]"
        )


@contextmanager
def noisy_outputs(model: nn.Module, variances: Tensors, noise: Generator) -> Iterator[None]:
    """Add noise behind layers, as strong as independent noise on their weights would make it.

    Args:
        model: The model.
        variances: The variance of every weight, by name.
        noise: Where to draw from.

    Yields:
        Nothing; the hooks are gone afterwards.
    """
    handles = []
    try:
        for name, variance in variances.items():
            hook = _Noise(variance, noise)
            # Before the user's own hooks, which are to see what the layer puts out.
            module = owner_of(model, name)
            handles.append(module.register_forward_hook(hook, with_kwargs=True, prepend=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Noise:
    def __init__(self, variance: Tensor, noise: Generator) -> None:
        self._variance, self._noise = variance, noise

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Tensor:
        x: Tensor = wide(args[0] if args else kwargs["input"])
        # Squares leave the range of float16 early, so autocast stays out of this.
        with torch.autocast(x.device.type, enabled=False):
            variance = self._variance.to(x.dtype)
            if isinstance(module, _ConvNd):
                spread: Tensor = module._conv_forward(x.square(), variance, None)
            else:
                spread = functional.linear(x.square(), variance)
            epsilon = torch.randn(spread.shape, generator=self._noise, dtype=spread.dtype, device=spread.device)
            return output + ((spread.clamp_min(0.0) + _TINY).sqrt() * epsilon).to(output.dtype)
