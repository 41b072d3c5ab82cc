"""Layers of other libraries that do what torch's own do, found by trying them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.sparse.known import LAYERS
from secateur.sparse.watch import inputs_of


def plain_layers_(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Put torch's own layers in the place of subclasses that do the same; libraries pad in forwards of their own.

    They are tried on the input of one forward pass, and on one that is larger by a pixel: what they pad may depend on
    sizes.
    """
    others = {n: m for n, m in model.named_modules() if isinstance(m, LAYERS) and type(m) not in LAYERS}
    if not others:
        return
    for name, x in inputs_of(model, others, args, kwargs).items():
        plain = _plain(others[name])
        grown = F.pad(x, (0, 1, 0, 1)) if isinstance(plain, nn.Conv2d) else x
        if plain is not None and all(_same(others[name], plain, probe) for probe in (x, torch.rand_like(grown))):
            replace_(model, name, plain)


def _plain(module: nn.Module) -> nn.Module | None:
    """Return torch's own layer with the weights and settings of a subclass of it."""
    if set(module._parameters) != {"weight", "bias"} or module._forward_hooks or module._forward_pre_hooks:
        return None
    plain: nn.Module
    if isinstance(module, nn.Linear):
        plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
    elif isinstance(module, nn.Conv2d):
        plain = nn.Conv2d(
            module.in_channels,
            module.out_channels,
            module.kernel_size,  # type: ignore[arg-type]
            module.stride,  # type: ignore[arg-type]
            module.padding,  # type: ignore[arg-type]
            module.dilation,  # type: ignore[arg-type]
            module.groups,
            module.bias is not None,
            module.padding_mode,
            device="meta",
        )
    else:
        return None
    plain._parameters.update(module._parameters)
    return plain.eval()


def _same(one: nn.Module, other: nn.Module, x: Tensor) -> bool:
    with torch.no_grad():
        try:
            a, b = one(x), other(x)
        except Exception:  # noqa: BLE001  # made for other sizes, or for other inputs
            return False
    return isinstance(a, Tensor) and a.shape == b.shape and torch.equal(a, b)


def replace_(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put another module in the place of one, by its dotted name."""
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, new)
