"""What comes behind a layer, found and taken into it: batch norms, activations, residual sums.

Where a model can be traced symbolically, on its graph; elsewhere between modules, by watching one forward pass.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from secateur.sparse.attention import Attention, Encoder, plain_attention
from secateur.sparse.image_layers import ImageLayer
from secateur.sparse.known import IDLE, LAYERS, NORMS, PaddedConv2d, activation_of, hooked
from secateur.sparse.layers import SparseLinear
from secateur.sparse.lines import LineConv1d, as_images_, keep_images_
from secateur.sparse.plain import is_layer, plain_layers_, replace_
from secateur.sparse.watch import Calls, Example, watch

_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    "relu": "relu",
    "relu_": "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.gelu: "gelu",
}
_DIMENSIONS: dict[type[nn.Module], int] = {nn.Linear: 2, nn.Conv1d: 3, nn.Conv2d: 4, PaddedConv2d: 4}
_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")


@dataclass
class Fused:
    """A model whose layers have taken in what came behind them.

    Attributes:
        model: It; a traced graph where ``traced``.
        traced: Whether residual sums could be fused too.
        activations: What each layer, by name, does behind its sum.
        residuals: Layers that take a second argument, which is added before the activation.
        folded: Batch norms that went into weights.
    """

    model: nn.Module
    traced: bool
    activations: dict[str, str] = field(default_factory=dict)
    residuals: set[str] = field(default_factory=set)
    folded: int = 0


def fold_norms_(model: nn.Module, calls: Calls) -> int:
    """Fold every batch norm that alone reads a layer's output into that layer; return how many.

    Norms work along the second dimension, which is the one of the outputs for vectors, or images and lines in batches.
    """
    count = 0
    for producer, consumer in calls.pairs():
        layer, norm = model.get_submodule(producer), model.get_submodule(consumer)
        if type(norm) not in NORMS or norm.training or hooked(layer) or hooked(norm):  # subclasses do more
            continue
        assert isinstance(norm, NORMS)
        if norm.running_mean is None:
            continue
        if calls.dimensions[consumer] != _DIMENSIONS.get(type(layer)):
            continue
        if type(layer) in (nn.Conv1d, nn.Conv2d, PaddedConv2d):
            assert isinstance(layer, nn.Conv1d | nn.Conv2d)
            replace_(model, producer, fuse_conv_bn_eval(layer, norm))
        else:
            assert isinstance(layer, nn.Linear)
            replace_(model, producer, fuse_linear_bn_eval(layer, norm))
        replace_(model, consumer, nn.Identity())
        count += 1
    return count


class _Tracer(fx.Tracer):
    """Leaves layers, norms and activations of other libraries whole, as torch's own, and what stands in for theirs.

    They are tried on numbers before, since a module that is called while a model is traced is itself traced.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        whole = (*LAYERS, *NORMS, Attention, Encoder)
        self.whole = {m for m in model.modules() if isinstance(m, whole) or activation_of(m) is not None}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) or m in self.whole


def traced(model: nn.Module) -> fx.GraphModule | None:
    """Return a model as a graph of its modules, or nothing where Python decides what it does.

    Stand-ins for tensors are never None. What arguments decide by being left out is seen by tracing the model without
    them too, without all and with each alone: the graph must be the same.

    Args:
        model: In evaluation mode.
    """
    try:
        graph = _Tracer(model).trace(model)
        graph._tracer_cls = None  # a pickle is traced again, by one that needs no model
        optional = {node.target: node.args[0] for node in graph.find_nodes(op="placeholder") if node.args}
        for there in (None, *optional) if optional else ():
            absent = {name: default for name, default in optional.items() if name != there}
            if _steps(_Tracer(model).trace(model, concrete_args=absent), {}) != _steps(graph, absent):
                return None
        return fx.GraphModule(model, graph)
    except Exception:  # noqa: BLE001  # a model may raise anything when its tensors are stand-ins
        return None


def _steps(graph: fx.Graph, absent: Mapping[Any, Any]) -> list[tuple[Any, ...]]:
    """Return what a graph calls on what, some of its inputs replaced; without what tracing itself asks of them."""
    asked = (operator.eq, torch._assert, fx._symbolic_trace._assert_is_none)
    values: dict[fx.Node, Any] = {}
    steps: list[tuple[Any, ...]] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = absent.get(node.target, f"input {node.target}")
        elif node.target not in asked:
            values[node] = f"value {len(steps)}"
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            steps.append((node.op, node.target, args, kwargs))
    return steps


def fuse(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Fused:
    """Fold batch norms, and find the activations and residual sums that layers can take in.

    The model is changed in place where norms are folded. What is found is only taken in by
    :func:`take_in_`, for the layers that become sparse.

    Args:
        model: In evaluation mode.
        args: Positional inputs of one forward pass.
        kwargs: Keyword inputs.
    """
    if is_layer(model) and (len(args), list(kwargs)) in ((1, []), (0, ["input"])):
        model = nn.Sequential(model)  # what has no parent cannot be replaced
    example = Example.of(model, args, kwargs)
    model = plain_attention(model, example)
    plain_layers_(model, example)
    folded = fold_norms_(model, watch(model, args, kwargs))
    as_images_(model)
    graph = traced(model) if not kwargs else None
    if graph is not None:
        _drop_idle(graph)
        lines = {f"{name}.conv" for name, module in model.named_modules() if isinstance(module, LineConv1d)}
        keep_images_(graph.graph, lines, partial(_on_single_values, graph))
        graph.recompile()
        # What was traced is not always what runs: to tracing, `x += y` makes a new x.
        if example.agrees(fx.passes.shape_prop.ShapeProp(graph).propagate):
            return Fused(graph, traced=True, folded=folded)
    return Fused(model, traced=False, folded=folded)


def _drop_idle(model: fx.GraphModule) -> None:
    """Take modules out of the graph that do nothing in evaluation mode: folded norms, dropout."""
    for node in list(model.graph.nodes):
        module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if type(module) in IDLE and not hooked(module) and len(node.args) == 1:
            node.replace_all_uses_with(node.args[0])
            model.graph.erase_node(node)
    model.recompile()


def take_in_(fused: Fused, names: set[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Take activations and residual sums into the layers named; the model computes the same only once they act on them.

    ``fused.activations`` and ``fused.residuals`` say what each of them must do.
    """
    for producer, consumer, activation in _between_modules(fused, names, args, kwargs):
        fused.activations[producer] = activation
        replace_(fused.model, consumer, nn.Identity())
    if fused.traced:
        _take_in_graph(fused, names)


def activations_behind(fused: Fused, names: set[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, str]:
    """Return the activations that :func:`take_in_` would take into the layers named, with the model left as it is."""
    between = {producer: activation for producer, _, activation in _between_modules(fused, names, args, kwargs)}
    if not isinstance(fused.model, fx.GraphModule):
        return between
    trial = Fused(fx.GraphModule(fused.model, copy.deepcopy(fused.model.graph)), traced=True)  # the weights are shared
    _take_in_graph(trial, names)
    return between | trial.activations


def _between_modules(
    fused: Fused, names: set[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[str, str, str]]:
    """Yield layers, the modules that alone read their outputs, and the activations that these are; outside a graph."""
    known = _calls_of(fused.model)
    if not names - set(known):
        return
    for producer, consumer in watch(fused.model, args, kwargs).pairs():
        activation = activation_of(fused.model.get_submodule(consumer))
        if producer in names and producer not in known and consumer not in known and activation:
            yield producer, consumer, activation


def _calls_of(model: nn.Module) -> dict[str, int]:
    """Return how often a graph calls each of its modules, by every name that it calls it by."""
    nodes = model.graph.nodes if isinstance(model, fx.GraphModule) else ()
    called = {str(node.target): model.get_submodule(str(node.target)) for node in nodes if node.op == "call_module"}
    count = Counter(called[str(node.target)] for node in nodes if node.op == "call_module")
    return {name: count[module] for name, module in called.items()}


def keep_feature_major_(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Let linear layers hand vectors in the kernels' own layout to one another."""
    for producer, consumer in watch(model, args, kwargs).pairs():
        first, second = model.get_submodule(producer), model.get_submodule(consumer)
        if isinstance(first, SparseLinear) and isinstance(second, SparseLinear) and first.kind == second.kind:
            first.feature_major = first.kind == "panelled"


def keep_blocked_(model: nn.Module) -> None:
    """Let convolutions and maxima over images hand images in the kernels' own layout to one another.

    They read blocks where they are, as their input or as their residual. Anything else, and the model's output, gets
    images as torch has them.
    """
    if not isinstance(model, fx.GraphModule):
        return
    modules = dict(model.named_modules())

    def layer(node: fx.Node) -> ImageLayer | None:
        module = modules[str(node.target)] if node.op == "call_module" else None
        return module if isinstance(module, ImageLayer) else None

    calls = _calls_of(model)
    for node in model.graph.nodes:
        own, readers = layer(node), [layer(user) for user in node.users]
        if own is None or calls[node.target] > 1 or not readers:
            continue
        own.blocked = all(reader is not None for reader in readers)


def _take_in_graph(fused: Fused, names: set[str]) -> None:
    assert isinstance(fused.model, fx.GraphModule)
    calls = _calls_of(fused.model)
    for node in list(fused.model.graph.nodes):
        # One layer called several times must do the same each time.
        if node.op == "call_module" and node.target in names and calls[node.target] == 1:
            _take_in_behind(fused, node)
    fused.model.recompile()  # with what nobody reads: it may work in place


def _take_in_behind(fused: Fused, node: fx.Node) -> None:
    graph = node.graph
    name, last = str(node.target), node
    reader = _only_reader(last)
    if reader is not None and _is_sum(reader):
        other = next((a for a in reader.args if a is not last), None)
        if isinstance(other, fx.Node) and _shape(other) == _shape(last) is not None and not _changes(reader, other):
            with graph.inserting_before(reader):
                moved = graph.call_module(name, (*node.args, other))
            moved.meta = dict(reader.meta)
            reader.replace_all_uses_with(moved)
            graph.erase_node(reader)
            graph.erase_node(node)
            fused.residuals.add(name)
            last = moved
            reader = _only_reader(last)
    activation = _activation(fused.model, reader) if reader is not None else None
    if reader is not None and activation:
        reader.replace_all_uses_with(last)
        graph.erase_node(reader)
        fused.activations[name] = activation


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _shape(node: fx.Node) -> Any:
    meta = node.meta.get("tensor_meta")
    return getattr(meta, "shape", None)


def _on_single_values(model: nn.Module, node: fx.Node) -> bool:
    return _is_sum(node) or _activation(model, node) is not None


def _is_sum(node: fx.Node) -> bool:
    return (
        node.op in ("call_function", "call_method") and node.target in _SUMS and len(node.args) == 2 and not node.kwargs
    )


def _changes(node: fx.Node, other: fx.Node) -> bool:
    """Whether a sum works in place on a tensor that may be read again later, by its old name or as part of another."""
    return node.target in (operator.iadd, "add_") and node.args[0] is other


def _activation(model: nn.Module, node: fx.Node) -> str | None:
    if node.op == "call_module":
        return activation_of(model.get_submodule(str(node.target)))
    name = _FUNCTIONS.get(node.target) if node.op in ("call_function", "call_method") else None
    if name == "gelu":
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(node.kwargs.get("approximate", "none")))
    return name
