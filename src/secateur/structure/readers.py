"""Which layers read a group's units, and which channels of their inputs the units are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from secateur.graph.axes import Axes
from secateur.graph.coupling import Coupling
from secateur.graph.record import Op
from secateur.structure.views import role_of

_CONVOLUTIONS = frozenset(
    {"aten::convolution", "aten::_convolution", "aten::convolution_overrideable", "aten::mkldnn_convolution"}
)
_PRODUCTS = frozenset({"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::_addmm_activation"})
_LINEAR = frozenset({"aten::linear", "aten::mkldnn_linear"})


@dataclass(frozen=True)
class Reader:
    """A layer that reads a group's units, and whose input can be watched.

    Attributes:
        module: Qualified name of the layer.
        member: The columns that it reads them by, ``"conv2.weight@1"``, as in a :class:`~secateur.types.GroupView`.
        unit: For every channel of the layer's input, the group's unit that it belongs to, or -1.
    """

    module: str
    member: str
    unit: NDArray[np.int64]


def readers_of(model: nn.Module, coupling: Coupling) -> tuple[dict[str, tuple[Reader, ...]], dict[str, str]]:
    """Find the layers that read each group's units.

    Every product in the recorded forward that sums over units counts as a reader. Where one of them is not a layer
    whose input can be watched (a product of activations, attention computed by functions, a recurrent layer), nothing
    can be said about what the units are worth to it, and the group gets a reason instead. Means over units, as
    normalisations take them, are not readers. Layers that the recorded forward does not run (of another branch, of
    training alone) are among the readers, and count where a batch reaches them.

    Args:
        model: The model.
        coupling: Its groups.

    Returns:
        Readers by group, and for each group without, why there are none.
    """
    known = _layers(model, coupling)
    found: set[int] = set()
    unread: dict[str, str] = {}
    for op in coupling.trace.ops:
        for position in _read_by(coupling, op):
            group = coupling.groups[position]
            if (position, op.module) not in known:
                where = op.module or "the model itself"
                unread.setdefault(
                    group.name, f"{where} reads it through {op.name.removeprefix('aten::')}, not through a layer"
                )
            found.add(position)
    for position, group in enumerate(coupling.groups):
        if position not in found:
            unread.setdefault(group.name, "no layer reads it in evaluation mode")
    readers: dict[str, tuple[Reader, ...]] = {}
    for (position, _), reader in known.items():  # other branches' too, that the first example does not take
        name = coupling.groups[position].name
        if name not in unread:
            readers[name] = (*readers.get(name, ()), reader)
    return readers, unread


def _layers(model: nn.Module, coupling: Coupling) -> dict[tuple[int, str], Reader]:
    """Return what reads a group by columns of a weight, by group and module."""
    leaves = {leaf.name: leaf for leaf in coupling.trace.leaves}
    out: dict[tuple[int, str], Reader] = {}
    for position, group in enumerate(coupling.groups):
        for member in group.members:
            leaf = leaves[member.name]
            for name in leaf.names if leaf.kind == "parameter" else ():  # each tied name may be another layer
                if role_of(model, name, member.dim, leaf.axes.shape) != "in":
                    continue
                path = name.rpartition(".")[0]
                module = model.get_submodule(path)
                if is_layer(module):
                    # A grouped convolution's columns are the same places of every group.
                    times = module.groups if isinstance(module, _ConvNd) and not _is_transposed(module) else 1
                    unit = np.tile(member.unit, times)
                    out[position, path] = Reader(path, f"{member.name}@{member.dim}", unit)
    return out


def is_layer(module: nn.Module) -> bool:
    """Whether a module's one input is what its weight multiplies: linear layers and convolutions."""
    return isinstance(module, nn.Linear | _ConvNd) or type(module).__name__ == "Conv1D"


def _is_transposed(module: nn.Module) -> bool:
    return isinstance(module, _ConvTransposeNd)


def _read_by(coupling: Coupling, op: Op) -> set[int]:
    """Return the groups (by position) whose units an operator sums over."""
    dims = list(_contracted(op))
    if dims:
        return _groups_of(coupling, dims)
    if op.name in _CONVOLUTIONS:
        return set()  # depthwise: passes channels on
    if op.macs and "scaled_dot_product" not in op.name:  # a product of a kind that is not known here
        return _groups_of(coupling, [(axes, d) for axes in op.inputs for d in range(len(axes.shape))])
    return set()


def _contracted(op: Op) -> Iterator[tuple[Axes, int]]:
    """Yield the dimension that a product of a known kind sums over."""
    if op.name in _CONVOLUTIONS:
        x = op.inputs[0]
        if op.groups == 1 or x.shape[1] > op.groups:
            yield x, 1
    elif op.name in _PRODUCTS:
        left = op.inputs[-2]
        yield left, len(left.shape) - 1
    elif op.name in _LINEAR:
        yield op.inputs[0], len(op.inputs[0].shape) - 1


def _groups_of(coupling: Coupling, dims: list[tuple[Axes, int]]) -> set[int]:
    out: set[int] = set()
    for axes, dim in dims:
        part = axes.part(dim)
        if part is not None:
            out |= set(np.unique(coupling.group_of_unit[coupling.unit_of[part.labels]]).tolist())
    return out - {-1}
