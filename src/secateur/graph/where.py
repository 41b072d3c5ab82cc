"""Where a pruned model first parts from the masked dense one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from secateur.graph.axes import Axes
from secateur.graph.changes import Undo
from secateur.graph.examples import Example
from secateur.graph.model import module_stack, quiet_forward
from secateur.graph.plan import Plan
from secateur.graph.record import Leaf
from secateur.graph.rules import Rules
from secateur.graph.state import preserved
from secateur.graph.values import Probe, in_float64
from secateur.graph.verify import Reference, Small

Print = tuple[str, list[tuple[float, float]]]


def first_difference(
    model: nn.Module,
    examples: Sequence[Example],
    leaves: list[Leaf],
    removed: NDArray[np.bool_],
    plan: Plan,
    probe: Probe,
    rules: Rules,
    undo: Undo,
) -> str:
    """Return the first module, in order of completion, whose result differs.

    The model is sliced on entry and on exit.
    """
    left = {id(m) for m in model.modules()}
    undo.revert()
    names = {id(m): n for n, m in model.named_modules()}
    gone = {name for key, name in names.items() if key not in left}
    undo.add(plan.apply_(model).revert)
    for example in examples:
        small: list[Print] = []
        with preserved(model), quiet_forward(model, training=example.training), in_float64(leaves) as held:
            handle = register_module_forward_hook(_printer(names, small, None))
            try:
                with Small(leaves, plan.kept, probe, held, example.spread):
                    example.double().run(model)
            except Exception:  # noqa: BLE001 - the place it stopped is the answer
                pass
            finally:
                handle.remove()
        undo.revert()
        dense: list[Print] = []
        with preserved(model), quiet_forward(model, training=example.training), in_float64(leaves):
            mode = Reference(leaves, removed, probe, rules)
            mode.spread = example.spread
            handle = register_module_forward_hook(_printer(names, dense, _gatherer(mode, removed)))
            try:
                with module_stack(model, mode.stack), mode:
                    example.double().run(model)
            finally:
                handle.remove()
        again = plan.apply_(model)
        undo.add(again.revert)
        dense = [print_ for print_ in dense if print_[0] not in gone]
        for ours, theirs in zip(small, dense, strict=False):
            if ours[0] != theirs[0]:
                return theirs[0]
            if len(ours[1]) != len(theirs[1]) or any(not _close(a, b) for a, b in zip(ours[1], theirs[1], strict=True)):
                return theirs[0]
        if len(small) < len(dense):
            return dense[len(small)][0]
    return ""


def _gatherer(mode: Reference, removed: NDArray[np.bool_]) -> Callable[[Tensor], Tensor]:
    """Return a function that picks the kept indices of a tensor of the masked dense model."""

    def gather(tensor: Tensor) -> Tensor:
        axes: Axes = mode.axes(tensor)
        for part in axes.parts:
            if len(part.dims) == 1:
                gone = removed[np.minimum(part.labels, len(removed) - 1)] & (part.labels < len(removed))
                if gone.any():
                    index = torch.from_numpy(np.flatnonzero(~gone)).to(tensor.device)
                    tensor = tensor.index_select(part.dims[0], index)
        return tensor

    return gather


def _close(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return all(abs(x - y) <= 1e-8 * max(1.0, abs(x), abs(y)) for x, y in zip(a, b, strict=True))


def _printer(names: dict[int, str], into: list[Print], gather: Callable[[Tensor], Tensor] | None) -> Any:
    """Note a fingerprint of every module's result: its sum and an order-sensitive one."""

    def hook(module: nn.Module, _args: Any, out: Any) -> None:
        with _disable_current_modes():  # what is computed here is no part of the forward
            prints = [fingerprint(t) for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()]
        into.append((names.get(id(module), ""), prints))

    def fingerprint(tensor: Tensor) -> tuple[float, float]:
        kept = gather(tensor) if gather is not None else tensor
        flat = kept.detach().double().flatten()
        ramp = torch.linspace(0.5, 1.5, flat.numel(), dtype=torch.float64, device=flat.device)
        return float(flat.abs().sum()), float((flat * ramp).sum())

    return hook
