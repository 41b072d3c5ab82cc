"""Where a constant goes that is added to a layer's outputs: its bias, or the batch norm right behind it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves, tree_map

from secateur.forward import attention_fast_path, evaluation_mode_of
from secateur.graph.state import preserved

Forward = Callable[[nn.Module, Any], object]


def destinations(
    small: nn.Module, shifts: Mapping[str, Tensor], batch: Any, forward: Forward
) -> dict[str, tuple[str, str]]:
    """Find what takes up a constant that is added to each layer's outputs.

    Args:
        small: The model.
        shifts: The constant, one number per output, by layer.
        batch: A batch to try it on.
        forward: How to run the model.

    Returns:
        By layer, the name of its bias or of a running mean, with an empty text; or why there is none.
    """
    out: dict[str, tuple[str, str]] = {}
    norms: dict[str, str] = {}
    followed = _followed_by(small, shifts, batch, forward)
    for name in shifts:
        if isinstance(getattr(small.get_submodule(name), "bias", None), Tensor):
            out[name] = f"{name}.bias", ""
        elif name in followed:
            norms[name] = f"{followed[name]}.running_mean"
        else:
            out[name] = "", "it has no bias, and no batch norm with running statistics follows at once"
    failing = _failing(small, {n: (norms[n], shifts[n]) for n in norms}, batch, forward)
    for name, target in norms.items():
        out[name] = target, failing.get(name, "")
    return out


def _followed_by(small: nn.Module, names: Iterable[str], batch: Any, forward: Forward) -> dict[str, str]:
    """Return the batch norm that gets each layer's very output, where both are called once."""
    made: dict[str, list[Tensor]] = {n: [] for n in names}
    taken: dict[str, list[Tensor]] = {}
    handles = []
    for name in made:
        handles.append(small.get_submodule(name).register_forward_hook(lambda m, a, out, n=name: made[n].append(out)))
    for name, norm in small.named_modules():
        if isinstance(norm, _BatchNorm) and norm.running_mean is not None:
            taken[name] = []
            handles.append(norm.register_forward_pre_hook(lambda m, args, n=name: taken[n].extend(args[:1])))
    try:
        with preserved(small), evaluation_mode_of(small), attention_fast_path(enabled=False):
            forward(small, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {
        layer: norm
        for layer, outs in made.items()
        for norm, ins in taken.items()
        if len(outs) == len(ins) == 1 and outs[0] is ins[0]
    }


def _failing(
    small: nn.Module, shifts: Mapping[str, tuple[str, Tensor]], batch: Any, forward: Forward
) -> dict[str, str]:
    """Return the layers whose shift is not the same taken off the running mean as added to the output."""
    if not shifts:
        return {}
    trial = copy.deepcopy(small).double()
    wide = tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, batch)
    try:
        plain = _outputs(trial, wide, forward)
        if not plain:
            return dict.fromkeys(shifts, "the forward returns no tensor to check the batch norm behind it by")
        if _agree(trial, shifts, plain, wide, forward):
            return {}
        return {
            name: "its output goes elsewhere, too, than into the batch norm that follows"
            for name, shift in shifts.items()
            if not _agree(trial, {name: shift}, plain, wide, forward)
        }
    except Exception as error:  # noqa: BLE001  # the user's forward may refuse float64 in any way it likes
        return dict.fromkeys(shifts, f"the batch norm behind it could not be checked in float64: {error}")


def _agree(
    trial: nn.Module, shifts: Mapping[str, tuple[str, Tensor]], plain: list[Tensor], batch: Any, forward: Forward
) -> bool:
    handles = [
        trial.get_submodule(name).register_forward_hook(lambda m, a, out, s=shift: out + _along(out, m, s))
        for name, (_, shift) in shifts.items()
    ]
    try:
        wanted = _outputs(trial, batch, forward)
    finally:
        for handle in handles:
            handle.remove()
    for target, shift in shifts.values():
        shift_(trial, target, shift)
    got = _outputs(trial, batch, forward)
    for target, shift in shifts.values():
        shift_(trial, target, -shift)
    for before, want, have in zip(plain, wanted, got, strict=True):
        # Relative to what the shift does at all: a small one must not pass for right by being small.
        allowed = 1e-6 * float((want - before).abs().max()) + 1e-12 * float(want.abs().max())
        if want.numel() and not float((want - have).abs().max()) <= allowed:
            return False
    return True


def _along(out: Tensor, layer: nn.Module, shift: Tensor) -> Tensor:
    """Lay a shift out along the channels of a layer's output."""
    shift = shift.to(out)
    return shift.reshape(-1, *[1] * len(layer.kernel_size)) if isinstance(layer, _ConvNd) else shift


def _outputs(model: nn.Module, batch: Any, forward: Forward) -> list[Tensor]:
    with evaluation_mode_of(model), attention_fast_path(enabled=False):
        return [t for t in tree_leaves(forward(model, batch)) if isinstance(t, Tensor) and t.is_floating_point()]


def shift_(model: nn.Module, target: str, shift: Tensor) -> None:
    """Add to a bias, or take off a running mean."""
    path, _, name = target.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(path), name)
    tensor.copy_(tensor.cpu().double() + (-shift if name == "running_mean" else shift))
