"""One forward pass, watched: what modules are given, and who reads what they return."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
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


def copied(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return inputs whose tensors are copies; one tensor given twice stays one tensor."""
    copies: dict[int, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        return copies.setdefault(id(tensor), tensor.detach().clone())

    return tree_map_only(Tensor, copy, (args, kwargs))  # type: ignore[no-any-return]


def answers(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what a model makes of copies of its inputs, without gradients: it may work on them in place."""
    args, kwargs = copied(args, kwargs)
    with torch.no_grad():
        return model(*args, **kwargs)


def difference(expected: Any, got: Any) -> float:
    """Return the largest difference of two nested answers, relative to the largest expected number of each tensor.

    Infinite where shapes differ, or other numbers are not finite, or whole numbers differ.
    """
    worst = 0.0
    for a, b in zip(tree_leaves(expected), tree_leaves(got), strict=True):
        if isinstance(a, Tensor):
            worst = max(worst, _difference(a, b))
    return worst


def _difference(a: Tensor, b: Any) -> float:
    if not isinstance(b, Tensor) or a.shape != b.shape:
        return math.inf
    if not a.is_floating_point():
        return 0.0 if torch.equal(a, b) else math.inf
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return math.inf
    if not torch.equal(a[~finite].nan_to_num(0.0, 1.0, -1.0), b[~finite].nan_to_num(0.0, 1.0, -1.0)):
        return math.inf
    x, y = a[finite].double(), b[finite].double()
    return float((x - y).abs().max() / x.abs().max().clamp_min(1e-30)) if x.numel() else 0.0


@dataclass(frozen=True)
class Example:
    """Inputs of one forward pass, and what the dense model makes of them.

    Attributes:
        args: Positional inputs.
        kwargs: Keyword inputs.
        expected: The answers.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    expected: Any

    @classmethod
    def of(cls, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Example:
        """Run a model once."""
        return cls(args, kwargs, answers(model, args, kwargs))

    def agrees(self, model: Callable[..., Any]) -> bool:
        """Whether a model runs, and its answers differ by no more than rounding explains."""
        try:
            return difference(self.expected, answers(model, self.args, self.kwargs)) <= LARGEST_DIFFERENCE
        except Exception:  # noqa: BLE001  # whatever a model misses in what was replaced
            return False

    def kept(self, model: nn.Module, change: Callable[[list[Callable[[], None]]], nn.Module]) -> tuple[nn.Module, bool]:
        """Return a changed model, where it still gives the same answers, or the model as it was; and which of the two.

        Args:
            model: It.
            change: Changes it, notes how to go back, step by step, and returns it.
        """
        undo: list[Callable[[], None]] = []
        try:
            new = change(undo)
        except Exception:  # noqa: BLE001  # modules that are not as torch's
            new = None
        if new is not None and self.agrees(new):
            return new, True
        for back in reversed(undo):
            back()
        return model, False


def inputs_of(
    model: nn.Module, names: Collection[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Tensor]:
    """Return what each of the modules named is given in one forward; of several calls, the largest input."""
    found: dict[str, Tensor] = {}

    def before(name: str, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = inputs[0] if inputs else named.get("input")
        if isinstance(x, Tensor) and (name not in found or x.numel() > found[name].numel()):
            found[name] = x.detach().clone()

    with ExitStack() as stack:
        for name in names:
            hook = partial(before, name)
            stack.callback(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True).remove)
        answers(model, args, kwargs)
    return found


_LOOKS: set[Any] = {Tensor.to, Tensor.type_as, Tensor.new_tensor, Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty}
_LOOKS |= {Tensor.new_full, torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, torch.randn_like}
"""What only asks a tensor for its shape, its dtype or where it is."""


class _Uses(TorchFunctionMode):
    """Is told of every tensor that is an argument of a torch function which returns tensors."""

    def used(self, func: Any, tensor: Tensor) -> None:
        raise NotImplementedError

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(out)):  # others ask for a shape or a flag
            for value in tree_leaves((args, kwargs or {})):
                if isinstance(value, Tensor):
                    self.used(func, value)
        return out


class _Elsewhere(_Uses):
    """Notes which weights are computed with while no module that has them is running."""

    def __init__(self, owners: Mapping[int, Collection[nn.Module]]) -> None:
        super().__init__()
        self.owners = owners
        self.running: list[nn.Module] = []
        self.found: set[int] = set()

    def begins(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.running.append(module)

    def ends(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self.running.pop()

    def used(self, func: Any, tensor: Tensor) -> None:
        owners = self.owners.get(id(tensor), ())
        if owners and func not in _LOOKS and not any(module in owners for module in self.running):
            self.found.add(id(tensor))


def weights_used_elsewhere(
    model: nn.Module, names: Collection[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> set[str]:
    """Return which of the layers named have a weight or a bias that the model also computes with by itself."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(module)
    elsewhere = _Elsewhere(owners)
    with ExitStack() as stack:
        for module in {module for modules in owners.values() for module in modules}:
            stack.callback(module.register_forward_pre_hook(elsewhere.begins).remove)
            stack.callback(module.register_forward_hook(elsewhere.ends, always_call=True).remove)
        stack.enter_context(elsewhere)
        answers(model, args, kwargs)
    own = {name: model.get_submodule(name)._parameters.values() for name in names}
    return {name for name, parameters in own.items() if any(id(p) in elsewhere.found for p in parameters)}


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


class _Reads(_Uses):
    """Counts how often each tensor is used."""

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self.calls = calls

    def used(self, func: Any, tensor: Tensor) -> None:
        self.calls.reads[id(tensor)] += 1
        self.calls.alive.append(tensor)


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
