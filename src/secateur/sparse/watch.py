"""One forward pass, watched: what modules are given, and who reads what they return."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from secateur.sparse.known import LAYERS, NORMS, activation_of
from secateur.sparse.layers import SparseLayer

LARGEST_DIFFERENCE = 1e-4
"""Of the answers from the dense model's, relative to the largest; sums in another order differ by less."""


def answers(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what a model makes of copies of its inputs, without gradients: it may work on them in place."""
    copies: dict[int, Tensor] = {}  # one tensor given twice is one tensor

    def copied(tensor: Tensor) -> Tensor:
        return copies.setdefault(id(tensor), tensor.detach().clone())

    args, kwargs = tree_map_only(Tensor, copied, (args, kwargs))
    with torch.no_grad():
        return model(*args, **kwargs)


def difference(expected: Any, got: Any) -> float:
    """Return the largest difference of two nested answers, relative to the largest expected value of each tensor."""
    worst = 0.0
    for a, b in zip(tree_leaves(expected), tree_leaves(got), strict=True):
        if isinstance(a, Tensor) and a.is_floating_point() and a.numel():
            worst = max(worst, float((a.double() - b.double()).abs().max() / a.double().abs().max().clamp_min(1e-30)))
        elif isinstance(a, Tensor) and not torch.equal(a, b):
            return math.inf
    return worst


def inputs_of(
    model: nn.Module, names: Collection[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Tensor]:
    """Return what each of the modules named is given in one forward; of several calls, the largest input."""
    found: dict[str, Tensor] = {}

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0] if inputs else None
            if isinstance(x, Tensor) and (name not in found or x.numel() > found[name].numel()):
                found[name] = x.detach().clone()

        return hook

    with ExitStack() as stack:
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_pre_hook(before(name)).remove)
        answers(model, args, kwargs)
    return found


@dataclass
class Calls:
    """What one forward pass did: which modules ran on which tensors, and how often each tensor was read."""

    outputs: dict[int, str] = field(default_factory=dict)  # of layers, by tensor
    inputs: list[tuple[str, int]] = field(default_factory=list)  # of layers, norms and activations
    dimensions: dict[str, int] = field(default_factory=dict)  # of the latest of these inputs
    count: Counter[str] = field(default_factory=Counter)
    reads: Counter[int] = field(default_factory=Counter)
    before: list[int] = field(default_factory=list)  # reads of the inputs of modules that are running
    alive: list[Tensor] = field(default_factory=list)  # so that no tensor's id is given to another

    def begins(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Note that a module is called."""
        self.count[name] += 1
        if inputs and isinstance(inputs[0], Tensor):
            self.inputs.append((name, id(inputs[0])))
            self.dimensions[name] = inputs[0].dim()
            self.alive.append(inputs[0])
            self.before.append(self.reads[id(inputs[0])])

    def ends(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """Note what a module returns, and return it under a name of its own."""
        if inputs and isinstance(inputs[0], Tensor):  # however often it looks at its input, it is one reader
            self.reads[id(inputs[0])] = self.before.pop() + 1
        if not isinstance(output, Tensor):
            return output
        if inputs and output is inputs[0]:  # it worked in place: what is read from now on is another tensor
            output = output.view_as(output)
        if isinstance(module, (*LAYERS, nn.Conv1d, SparseLayer)):
            self.outputs[id(output)] = name
            self.alive.append(output)
        return output

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Yield a layer and the one module that reads its output, where both ran once and nothing else reads it."""
        for consumer, tensor in self.inputs:
            producer = self.outputs.get(tensor)
            if producer and self.count[producer] == 1 and self.count[consumer] == 1 and self.reads[tensor] == 1:
                yield producer, consumer


class _Reads(TorchFunctionMode):
    """Counts how often each tensor is an argument of a torch function that returns tensors."""

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self.calls = calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(out)):  # others ask for a shape or a flag
            for value in tree_leaves((args, kwargs or {})):
                if isinstance(value, Tensor):
                    self.calls.reads[id(value)] += 1
                    self.calls.alive.append(value)
        return out


def watch(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Calls:
    """Run a model once and return who read what."""
    calls = Calls()
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, (*LAYERS, nn.Conv1d, *NORMS, SparseLayer)) or activation_of(module):
                stack.callback(module.register_forward_pre_hook(partial(calls.begins, name)).remove)
                stack.callback(module.register_forward_hook(partial(calls.ends, name)).remove)
        stack.enter_context(_Reads(calls))
        answers(model, args, kwargs)
    return calls
