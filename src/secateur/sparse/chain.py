"""Layers on images that follow each other, run by one call of the library.

Between two calls Python, torch's dispatcher and the allocator take some ten microseconds, and more where the kernels
have just driven them out of the caches: in a network of fifty small layers as much as the layers themselves.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from secateur.errors import SparseError
from secateur.sparse.arrays import versions_of
from secateur.sparse.convolutions import are_images, shape_for
from secateur.sparse.image_layers import ImageLayer
from secateur.sparse.images import Blocked, laid_out
from secateur.sparse.known import hooked
from secateur.sparse.library import StepStruct, check, library

LEAST = 2
"""Layers that are worth a chain."""

SIZES = 4
"""Sizes of images that a chain keeps its plans for."""

_ALIGNED = 16  # floats, of a cache line


class Step(NamedTuple):
    """One layer of a chain. Values are counted: the chain's inputs first, then what each step returns.

    Attributes:
        layer: What runs.
        x: The value that it is given.
        residual: The value that it adds, if any.
    """

    layer: ImageLayer
    x: int
    residual: int | None


class _Value(NamedTuple):
    """Images that a chain works with."""

    batch: int
    channels: int
    height: int
    width: int
    blocked: bool
    shape: tuple[int, ...]


@dataclass
class _Plan:
    """What follows from the sizes of the inputs.

    Attributes:
        values: Of the chain, the inputs' first.
        steps: For the library.
        places: Of the values that live in the working memory, in floats; ``None`` for inputs and outputs.
        floats: Of the working memory.
        alive: What the steps point to.
        idle: Working memories that nobody uses at the moment: one for every thread that was ever in the chain.
    """

    values: list[_Value]
    steps: Any
    places: list[int | None]
    floats: int
    alive: list[Any]
    idle: list[tuple[Tensor, Any]] = field(default_factory=list)

    def memory(self) -> tuple[Tensor, Any]:
        """Return working memory, and the addresses of all values in it."""
        try:
            return self.idle.pop()
        except IndexError:
            memory = torch.empty(self.floats + _ALIGNED)
            begin = -(-memory.data_ptr() // (4 * _ALIGNED)) * 4 * _ALIGNED
            places = (None if place is None else begin + 4 * place for place in self.places)
            return memory, (ctypes.c_void_p * len(self.places))(*places)


class _Plans(NamedTuple):
    """Plans, and the buffers that they were made for.

    Attributes:
        seen: Buffers of all layers: whose, by which name, and what was there.
        versions: Of these, when their contents were checked.
        by_size: Plans by sizes of the inputs; ``None`` where layers must be called one by one.
    """

    seen: list[tuple[dict[str, Tensor | None], str, Tensor | None]]
    versions: tuple[int, ...]
    by_size: dict[Any, _Plan | None]

    @classmethod
    def of(cls, layers: Iterable[dict[str, Tensor | None]]) -> _Plans:
        """Return no plans yet, for the buffers of some layers."""
        seen = [(own, name, tensor) for own in layers for name, tensor in own.items()]
        return cls(seen, versions_of(tensor for _, _, tensor in seen if tensor is not None), {})

    def valid(self) -> bool:
        """Whether the layers' buffers are still those, with the contents that were checked."""
        same = bool(self.seen) and all(own[name] is tensor for own, name, tensor in self.seen)
        return same and self.versions == versions_of(tensor for _, _, tensor in self.seen if tensor is not None)


class Chain(nn.Module):
    """Some layers that follow each other, in one call of the library.

    They belong to the model, and are not this module's children. Where one has a hook, or the inputs are anything but
    images as the kernels take them, they are called one by one.

    Attributes:
        steps: In the order in which they run.
        outputs: Values that are returned.
    """

    def __init__(self, inputs: int, steps: Sequence[Step], outputs: Sequence[int]) -> None:
        super().__init__()
        self.inputs = inputs
        self.steps = tuple(steps)
        self.outputs = tuple(outputs)
        self._added = {step.residual: step.layer.blocked for step in steps if step.residual is not None}
        self._plans = _Plans([], (), {})

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_plans": _Plans([], (), {})}

    def forward(self, *inputs: Tensor | Blocked) -> tuple[Any, ...]:
        """Return the outputs, each as its layer returns it."""
        plan = self._plan_for(inputs)
        if plan is None:
            return self._one_by_one(inputs)
        memory, addresses = plan.memory()
        alive = []
        for i, x in enumerate(inputs):
            data = _as_added(x, self._added.get(i))
            alive.append(data)
            addresses[i] = data.data_ptr()
        found = []
        for value in self.outputs:
            out = torch.empty(plan.values[value].shape)
            found.append(out)
            addresses[value] = out.data_ptr()
        status = library().secateur_run(plan.steps, len(plan.steps), addresses, len(addresses), torch.get_num_threads())
        check(status, "a chain of layers")
        plan.idle.append((memory, addresses))
        return tuple(_wrapped(out, plan.values[value]) for out, value in zip(found, self.outputs, strict=True))

    def _one_by_one(self, inputs: Sequence[Tensor | Blocked]) -> tuple[Any, ...]:
        values: list[Any] = list(inputs)
        for layer, x, residual in self.steps:
            values.append(layer(values[x]) if residual is None else layer(values[x], values[residual]))
        return tuple(values[i] for i in self.outputs)

    def _plan_for(self, inputs: Sequence[Tensor | Blocked]) -> _Plan | None:
        """Return how to run at once; nothing where layers must be called one by one, which also explains mistakes."""
        called = any(hooked(step.layer) for step in self.steps)
        if called or len(inputs) != self.inputs or not all(are_images(x) for x in inputs):
            return None
        plans = self._plans
        if not plans.valid():  # other threads may be here too: what they look at is replaced, and not changed
            plans = self._plans = _Plans.of(step.layer._buffers for step in self.steps)
        key = tuple((tuple(x.data.shape), *x[1:]) if isinstance(x, Blocked) else tuple(x.shape) for x in inputs)
        if key not in plans.by_size:
            latest = list(plans.by_size.items())[1 - SIZES :]
            plans = self._plans = plans._replace(by_size=dict(latest) | {key: self._plan(inputs)})
        return plans.by_size[key]

    def _plan(self, inputs: Sequence[Tensor | Blocked]) -> _Plan | None:
        values = []
        for i, images in enumerate(inputs):
            blocked = self._added.get(i, isinstance(images, Blocked))
            if isinstance(images, Blocked):
                batch, _, channels, _ = images.data.shape
                values.append(_Value(batch, channels, images.height, images.width, blocked, ()))
            else:
                batch, channels, height, width = images.shape
                values.append(_Value(batch, channels, height, width, blocked, ()))
        steps: Any = (StepStruct * len(self.steps))()
        alive: list[Any] = []
        for place, (layer, x, residual) in enumerate(self.steps):
            value, step = values[x], steps[place]
            try:
                call = layer.call()
                if call is None or call.channels not in (None, value.channels):
                    return None
                size = (value.batch, value.channels, call.rows, value.height, value.width)
                shape = shape_for(*size, layer.convolution, value.blocked, layer.blocked)
            except SparseError:
                return None  # the layer itself says why
            rows = value.channels if call.rows is None else call.rows
            values.append(_Value(value.batch, rows, *shape.size, layer.blocked, shape.out))
            if residual is not None and values[residual][:5] != values[-1][:5]:
                return None
            call.fill(step)
            step.x, step.residual, step.y = x, -1 if residual is None else residual, self.inputs + place
            step.shape = shape.struct
            alive.append(call)
        places, floats = self._places(values)
        return _Plan(values, steps, places, floats, alive)

    def _places(self, values: Sequence[_Value]) -> tuple[list[int | None], int]:
        """Give every value that is only used inside a place, so that those which are alive together do not overlap."""
        last = {self.inputs + i: i for i in range(len(self.steps))}
        for i, (_, x, residual) in enumerate(self.steps):
            last |= {value: i for value in (x, residual) if value is not None}
        places: list[int | None] = [None] * len(values)
        taken: list[tuple[int, int, int, int]] = []  # from, to, and from which step to which
        for value in range(self.inputs, len(values)):
            if value in self.outputs:
                continue
            size = -(-torch.Size(values[value].shape).numel() // _ALIGNED) * _ALIGNED
            born, dies = value - self.inputs, last[value]
            begin = 0
            for low, high, first, final in sorted(taken):
                if first <= dies and final >= born and low < begin + size and high > begin:
                    begin = high
            places[value] = begin
            taken.append((begin, begin + size, born, dies))
        return places, max((high for _, high, _, _ in taken), default=0)


def _as_added(x: Tensor | Blocked, blocked: bool | None) -> Tensor:
    """Return the tensor that holds images, laid out as it will be added; as it is where it will not."""
    return laid_out(x, isinstance(x, Blocked) if blocked is None else blocked).resolve_neg().contiguous()


def _wrapped(out: Tensor, value: _Value) -> Any:
    return Blocked(out, value.height, value.width) if value.blocked else out


class Chained(NamedTuple):
    """A model that runs layers which follow each other at once.

    Attributes:
        model: It; the one that it was made from, where there is nothing to put together.
        made_from: Whose layers it shares.
        forward: Of that one: another graph has another.
        modules: Of that one: whose, by which name, and what was there.
    """

    model: nn.Module
    made_from: nn.Module
    forward: Any
    modules: list[tuple[dict[str, nn.Module | None], str, nn.Module | None]]

    @classmethod
    def of(cls, model: nn.Module) -> Chained:
        """Put the layers of a model together."""
        owners = [module._modules for module in model.modules()]
        modules = [(own, name, module) for own in owners for name, module in own.items()]
        return cls(chained(model), model, type(model).forward, modules)

    def valid(self, model: nn.Module) -> bool:
        """Whether it does what the model does: the same graph and modules, and no hook on the model itself."""
        same = model is self.made_from and type(model).forward is self.forward
        return same and not hooked(model) and all(own.get(name) is module for own, name, module in self.modules)


def chained(model: nn.Module) -> nn.Module:
    """Return a model that runs layers which follow each other at once, and shares them with the one given.

    Without a graph, or with nothing to put together, that is the model itself.
    """
    if not isinstance(model, fx.GraphModule) or hooked(model):
        return model
    graph = fx.Graph()
    graph.output(graph.graph_copy(model.graph, {}))
    modules: dict[str, Any] = dict(model.named_modules())
    runs = list(_runs(graph, modules))
    if not runs:
        return model
    holder = nn.Module()
    holder.__dict__ = model.__dict__ | {"_modules": dict(model._modules)}
    for count, run in enumerate(runs):
        name = f"secateur_chain_{count}"
        while name in modules:
            name += "_"
        holder._modules[name] = _put_together(graph, run, modules, name)
    return fx.GraphModule(holder, graph).eval()


def _runs(graph: fx.Graph, modules: dict[str, Any]) -> Iterator[list[fx.Node]]:
    """Yield nodes that follow each other and may be put together: whatever they need comes before the first of them."""
    run: list[fx.Node] = []
    for node in graph.nodes:
        layer = _layer_of(node, modules)
        if layer is not None and all(_fits(arg, run, layer, modules) for arg in node.args[1:]):
            run.append(node)
            continue
        if len(run) >= LEAST:
            yield run
        run = [node] if layer is not None else []
    if len(run) >= LEAST:
        yield run


def _layer_of(node: fx.Node, modules: dict[str, Any]) -> ImageLayer | None:
    """Return the layer that a node calls, if the library runs it."""
    layer = modules.get(str(node.target)) if node.op == "call_module" and not node.kwargs else None
    return layer if isinstance(layer, ImageLayer) and layer.call() is not None else None


def _fits(added: object, run: list[fx.Node], layer: ImageLayer, modules: dict[str, Any]) -> bool:
    """Whether a residual is laid out as the output is, if it comes from the same chain; others may be laid out anew."""
    before = _layer_of(added, modules) if isinstance(added, fx.Node) and added in run else None
    return before is None or before.blocked == layer.blocked


def _put_together(graph: fx.Graph, run: list[fx.Node], modules: dict[str, Any], name: str) -> Chain:
    needed = {node: [arg for arg in node.args if isinstance(arg, fx.Node)] for node in run}
    inputs = list(dict.fromkeys(arg for args in needed.values() for arg in args if arg not in run))
    places = {node: i for i, node in enumerate([*inputs, *run])}
    steps = []
    for node, (x, *added) in needed.items():
        layer = _layer_of(node, modules)
        assert layer is not None
        steps.append(Step(layer, places[x], places[added[0]] if added else None))
    outputs = [node for node in run if any(user not in run for user in node.users)]
    with graph.inserting_after(run[-1]):
        whole = graph.call_module(name, tuple(inputs))
    with graph.inserting_after(whole):
        for place, node in enumerate(outputs):
            one = graph.call_function(operator.getitem, (whole, place))
            node.replace_all_uses_with(one, delete_user_cb=lambda user: user not in run)
    for node in reversed(run):
        graph.erase_node(node)
    return Chain(len(inputs), steps, [places[node] for node in outputs])
