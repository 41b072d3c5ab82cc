"""Whole residual blocks: which entries of a stack can go, how they go, and the proof.

A block is an entry of an ``nn.ModuleList`` or ``nn.Sequential`` that adds something to the stream it gets and returns
it in the same shape. Without the block the stream passes through, so the dense model with the block bypassed is what
the smaller model must equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from secateur.graph.calls import op_name
from secateur.graph.composite import Decomposing
from secateur.graph.examples import Example
from secateur.graph.model import quiet_forward
from secateur.graph.outputs import fixed_outputs
from secateur.graph.state import preserved
from secateur.graph.trees import tensors

Pass = tuple[str | int, ...]
"""Where each output of a block comes from when it is bypassed: an argument, by position or name; or ``"none"``."""


@dataclass(frozen=True)
class Block:
    """A block that can go.

    Attributes:
        name: Qualified module name, ``"encoder.layers.3"``.
        place: Its place among the entries of its stack.
        single: Whether it returns its stream alone, not a tuple that starts with it.
        passes: For the stream and, in a tuple, whatever comes with it: the argument that stands for it.
    """

    name: str
    place: int
    single: bool
    passes: Pass


@dataclass(frozen=True)
class Stack:
    """Blocks of one container.

    Attributes:
        name: Qualified name of the ``nn.ModuleList`` or ``nn.Sequential``.
        entries: How many entries it has, blocks or not.
        blocks: Those that can go.
    """

    name: str
    entries: int
    blocks: tuple[Block, ...]


@dataclass
class _Entry:
    """What calls of one container entry showed."""

    container: str
    place: int
    calls: int = 0
    single: bool = True
    passes: Pass | None = None
    why: str = ""


class Streams(Decomposing):
    """Follows tensors through additions: whether a block's result is its input plus something.

    Attributes:
        marks: For a tensor, the calls whose input it carries on, and whether something has been added since.
        extras: Tensors that a block returned beside its stream, with the block's entry.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.marks: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.extras: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def of(self, tensor: Tensor) -> dict[int, bool]:
        """Return the marks of a tensor."""
        return self.marks.get(tensor) or {}  # type: ignore[no-untyped-call]

    def act(self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute, and pass the marks on."""
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        before = [(t, self.of(t)) for t in inputs]
        for tensor in inputs:
            entry = self.extras.get(tensor)  # type: ignore[no-untyped-call]
            if entry is not None:
                entry.why = "what it returns beside its stream is used"
        out = func(*args, **kwargs)
        result = out[0] if isinstance(out, tuple | list) and len(out) else out
        if isinstance(result, Tensor):
            marks = self._after(func, before, result)
            if marks:
                self.marks[result] = marks
        return out

    def _after(
        self, func: torch._ops.OpOverload, before: Sequence[tuple[Tensor, dict[int, bool]]], result: Tensor
    ) -> dict[int, bool]:
        name = op_name(func)
        alike = [(t, marks) for t, marks in before if t.numel() == result.numel() and t.is_floating_point()]
        if name in ("aten::add", "aten::sub") and len(alike) == 2:
            return {call: True for _, marks in alike for call in marks}
        if not before or not alike or alike[0][0] is not before[0][0]:
            return {}
        passes = name in _PASSES or (torch.Tag.pointwise in func.tags and len(alike) == 1)
        return dict(alike[0][1]) if passes else {}


_PASSES = frozenset(
    f"aten::{name}"
    for name in (
        "view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze", "transpose", "permute", "t",
        "clone", "_to_copy", "contiguous", "alias", "detach", "lift_fresh", "expand", "native_layer_norm",
        "native_group_norm", "native_batch_norm", "_native_batch_norm_legit_no_training", "_fused_rms_norm", "rms_norm",
        "native_dropout",
    )
)  # fmt: skip


def find_stacks(model: nn.Module, example: Example) -> tuple[tuple[Stack, ...], dict[str, str]]:
    """Run the forward once and return the stacks of blocks that can go.

    Args:
        model: Left as it was.
        example: Inputs.

    Returns:
        The stacks: containers with several entries of one class, the innermost where they are nested; and why other
        entries with parameters cannot go, by module name.

    Raises:
        GraphError: When the forward fails.
    """
    entries = _entries(model)
    streams = Streams()
    with preserved(model), quiet_forward(model), _watched(model, entries, streams), streams:
        out = example.run(model)
    for tensor in tensors(fixed_outputs(out)):
        if tensor in streams.extras:
            streams.extras[tensor].why = "what it returns beside its stream is an output of the model"
    found: dict[str, list[Block]] = {}
    refused = {}
    for name, entry in entries.items():
        if entry.passes is None or entry.why:
            refused[name] = entry.why or "the recorded forward does not run it"
        else:
            found.setdefault(entry.container, []).append(Block(name, entry.place, entry.single, entry.passes))
    stacks = []
    for name, blocks in found.items():
        kinds = [type(entry) for entry in model.get_submodule(name).children()]
        repeated = tuple(b for b in blocks if kinds.count(kinds[b.place]) > 1)
        refused |= {b.name: "there is no other block of its kind beside it" for b in blocks if b not in repeated}
        if repeated:
            stacks.append(Stack(name, len(kinds), repeated))
    inner = {s.name for s in stacks}
    out = []
    for stack in stacks:
        holders = [b for b in stack.blocks if any(f"{name}.".startswith(f"{b.name}.") for name in inner)]
        refused |= {b.name: "it holds blocks of its own" for b in holders}
        if len(holders) < len(stack.blocks):
            out.append(replace(stack, blocks=tuple(b for b in stack.blocks if b not in holders)))
    return tuple(out), refused


def _entries(model: nn.Module) -> dict[str, _Entry]:
    """Return the entries with parameters of every list of modules."""
    out: dict[str, _Entry] = {}
    for path, container in model.named_modules():
        if isinstance(container, nn.ModuleList | nn.Sequential) and len(container) > 1:
            for place, (key, entry) in enumerate(container._modules.items()):
                if isinstance(entry, nn.Module) and next(entry.parameters(), None) is not None:
                    out[f"{path}.{key}" if path else key] = _Entry(path, place)
    return out


@contextmanager
def _watched(model: nn.Module, entries: Mapping[str, _Entry], streams: Streams) -> Iterator[None]:
    """Note, for each call of an entry, whether its result is its stream plus something."""
    names = {id(model.get_submodule(name)): name for name in entries}
    open_calls: list[tuple[int, Tensor | None, dict[str | int, Any]]] = []
    counter = iter(range(10**9))

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if id(module) in names:
            given: dict[str | int, Any] = {**dict(enumerate(args)), **kwargs}  # type: ignore[dict-item]
            stream = next((v for v in given.values() if isinstance(v, Tensor)), None)
            call = next(counter)
            open_calls.append((call, stream, given))
            if stream is not None:
                streams.marks[stream] = {**streams.of(stream), call: False}

    def leave(module: nn.Module, _args: Any, _kwargs: Any, out: Any) -> None:
        if id(module) in names:
            _judge(entries[names[id(module)]], streams, *open_calls.pop(), out)

    handles = []
    for name in entries:
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _judge(
    entry: _Entry, streams: Streams, call: int, stream: Tensor | None, given: Mapping[str | int, Any], out: Any
) -> None:
    """Say whether a call could have been left out, and what would have come back instead."""
    results = list(out) if isinstance(out, tuple | list) else [out]
    first = results[0] if results else None
    if stream is None or not isinstance(first, Tensor):
        entry.why = "it takes or returns no tensor first"
    elif first.shape != stream.shape or first.dtype != stream.dtype:
        entry.why = f"it turns {tuple(stream.shape)} into {tuple(first.shape)}"
    elif not streams.of(first).get(call, False):
        entry.why = "its result is not its input with something added"
    else:
        passes: list[str | int] = []
        for result in results:
            source = stream if result is first else result
            key = None if source is None else next((k for k, v in given.items() if v is source), None)
            if key is None and isinstance(source, Tensor):
                streams.extras[source] = entry
            passes.append("none" if key is None else key)
        entry.calls += 1
        entry.single = not isinstance(out, tuple | list)
        if entry.passes not in (None, tuple(passes)):
            entry.why = "it is called in more than one way"
        entry.passes = tuple(passes)


@contextmanager
def bypassed(model: nn.Module, blocks: Sequence[Block]) -> Iterator[None]:
    """Let the stream pass by some blocks, as if they were not there."""
    modules = [model.get_submodule(block.name) for block in blocks]
    had = [vars(module).get("forward") for module in modules]
    try:
        for module, block in zip(modules, blocks, strict=True):
            module.forward = _around(block)
        yield
    finally:
        for module, own in zip(modules, had, strict=True):
            if own is None:
                del module.forward
            else:
                module.forward = own


def _around(block: Block) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        given: dict[str | int, Any] = {**dict(enumerate(args)), **kwargs}  # type: ignore[dict-item]
        out = tuple(None if key == "none" else given[key] for key in block.passes)
        return out[0] if block.single else out

    return forward
