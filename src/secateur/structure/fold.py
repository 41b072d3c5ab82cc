"""Fold what removed units leave behind into the layers that read them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from secateur.errors import MissingStatsError, PlanError
from secateur.forward import call_model
from secateur.graph.changes import class_name, slice_tensor
from secateur.graph.model import owned_tensors
from secateur.graph.plan import Plan
from secateur.stats.activations import collect_inputs, watched
from secateur.structure.fold_into import Forward, destinations, shift_
from secateur.structure.readers import is_layer
from secateur.structure.report import ShrinkReport
from secateur.structure.views import role_of

# Shapes: O outputs, P positions

_ROUNDING = 8.0
"""How many units in the last place a constant may move by, through sums in another order."""


@dataclass(frozen=True)
class FoldedLayer:
    """What was done about the removed inputs of one layer.

    Attributes:
        name: The layer.
        removed: Input channels that it lost.
        constant: How many of these had one value on all batches; of the others the mean was folded.
        into: The tensor that took them up, ``"conv2.bias"`` or ``"bn2.running_mean"``; empty where none could.
        uneven: Share of the output positions where constants in the removed inputs add another value than was folded:
            the borders of a zero-padded convolution.
        why: Why nothing was folded.
    """

    name: str
    removed: int
    constant: int
    into: str = ""
    uneven: float = 0.0
    why: str = ""

    @property
    def exact(self) -> bool:
        """Whether the layer's outputs lose nothing by the removal, on the batches that were seen."""
        return bool(self.into) and self.constant == self.removed and not self.uneven


@dataclass(frozen=True)
class FoldReport:
    """What folding did, layer by layer. ``print`` it.

    Attributes:
        layers: Every layer that lost inputs.
        normalised: Normalisations (layer, group, RMS) whose statistics lost removed channels: what passes through them
            changes, whatever is folded.
    """

    layers: tuple[FoldedLayer, ...]
    normalised: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether every removed unit was constant and is made up for at every position."""
        return not self.normalised and all(layer.exact for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "exact": self.exact,
            "layers": [{**vars(layer), "exact": layer.exact} for layer in self.layers],
            "normalised": list(self.normalised),
        }

    def __str__(self) -> str:
        done = [layer for layer in self.layers if layer.into]
        removed, constant = (sum(getattr(x, what) for x in self.layers) for what in ("removed", "constant"))
        lines = [
            f"folded into {len(done)} of {len(self.layers)} layers; {constant} of {removed} removed inputs were "
            f"constant on the batches" + ("" if constant == removed else ", of the others the mean was taken")
        ]
        borders = [layer for layer in done if layer.uneven]
        if borders:
            worst = max(borders, key=lambda layer: layer.uneven)
            lines.append(
                f"not exact where {len(borders)} convolutions meet their padding (at most {worst.uneven:.0%} of the "
                f"positions, {worst.name})"
            )
        if self.normalised:
            lines.append(f"not exact behind {len(self.normalised)} normalisations over removed channels")
        lines += [f"not folded: {layer.name}: {layer.why}" for layer in self.layers if layer.why]
        return "\n".join(lines)


@dataclass
class _Fold:
    """A layer's removed inputs, and what they added to its outputs."""

    row: FoldedLayer
    shift_O: Tensor


@torch.no_grad()
def fold_constants_(
    small: nn.Module,
    dense: nn.Module,
    plan: Plan | ShrinkReport,
    batches: Iterable[Any],
    *,
    forward: Forward = call_model,
) -> FoldReport:
    r"""Add to each layer's bias what the inputs that it lost used to contribute.

    A removed unit leaves a constant behind: a channel whose batch-norm scale is zero still puts out
    :math:`\mathrm{relu}(\beta)`. With :math:`P` a layer's removed inputs and :math:`\bar a_i` the mean of input
    :math:`i` in the dense model, over all batches and positions:

    .. math:: b'_o = b_o + \sum_{i \in P} \bar a_i \sum_k W_{o,i,k}

    A layer without a bias whose output goes into a batch norm alone has the same taken off the norm's running mean;
    that is compared, in float64, with adding it to the layer's output before anything is changed.

    Where every removed unit was constant the result equals the dense model, but for the borders of zero-padded
    convolutions, where the constant meets padding (where most of a map is border, or a transposed convolution gives
    every position another part, the mean over positions is folded); other units' means are kept and their variation is
    lost. The report says which. What cannot take up a constant (a layer with neither bias nor batch norm, a recurrent
    layer) is listed, never guessed.

    Call it right after :func:`~secateur.structure.shrink_`, before any training or batch-norm repair. The result no
    longer equals the dense model with zeros, which :func:`~secateur.structure.verify` compares with: prove first.

    Args:
        small: The shrunk model, as ``shrink_`` left it; biases and running means are changed in place.
        dense: The model as it was before.
        plan: What was removed.
        batches: Batches of inputs without labels; they decide what counts as constant.
        forward: How to run a model on one batch.

    Returns:
        What was folded where, what is exact, and what could not be folded.

    Raises:
        PlanError: When the plan fits neither model, or the small one is not as it was shrunk.
        MissingStatsError: When there are no batches.

    Example:
        >>> from secateur.targets import Target
        >>> from secateur.structure import shrink_
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> with torch.no_grad():
        ...     _ = net[0].weight[:8].zero_()  # eight units that put out relu(bias), whatever comes in
        >>> dense, x = copy.deepcopy(net), torch.randn(32, 4)
        >>> report = shrink_(net, Target("channels", 0.5), x)
        >>> fold_constants_(net, dense, report, [x]).exact, torch.allclose(net(x), dense(x), atol=1e-6)
        (True, True)

    References:
        Jocelyn Sietsma, Robert J. F. Dow, Neural Net Pruning: Why and How, 1988; Zhuang Liu, Jianguo Li, Zhiqiang Shen,
        Gao Huang, Shoumeng Yan, Changshui Zhang, Learning Efficient Convolutional Networks through Network Slimming,
        2017 (the shift of a pruned channel); Yongqi An, Xu Zhao, Tao Yu, Ming Tang, Jinqiao Wang, Fluctuation-based
        Adaptive Structured Pruning for Large Language Models, 2024 (the mean as a bias).
    """
    plan = plan.plan if isinstance(plan, ShrinkReport) else plan
    _check(small, dense, plan)
    layers, rows = _losing(dense, plan)
    if not layers:
        return FoldReport(tuple(rows), _normalised(dense, plan))
    kept_back = iter(batches)
    first = next(kept_back, None)
    if first is None:
        raise MissingStatsError("folding needs to see activations, but there were no batches to run")
    sizes: dict[str, tuple[int, ...]] = {}
    with _sizes_into(dense, layers, sizes):
        seen = collect_inputs(
            dense,
            layers,
            lambda model, batch, _: forward(model, batch),
            chain([first], kept_back),
            needs=["input_mean", "input_lowest", "input_highest"],
        )
    folds: dict[str, _Fold] = {}
    for name in layers:
        fold = _fold_of(name, dense.get_submodule(name), layers[name], seen, sizes)
        rows += [fold.row] if fold.row.why else []
        if not fold.row.why:
            folds[name] = fold
    into = destinations(small, {name: fold.shift_O for name, fold in folds.items()}, first, forward)
    for name, fold in folds.items():
        target, why = into[name]
        if not why:
            shift_(small, target, fold.shift_O)
        rows.append(replace(fold.row, into=target if not why else "", why=why))
    order = {name: i for i, name in enumerate(dict(dense.named_modules()))}
    rows.sort(key=lambda row: order.get(row.name, len(order)))
    return FoldReport(tuple(rows), _normalised(dense, plan))


def _check(small: nn.Module, dense: nn.Module, plan: Plan) -> None:
    """Refuse a small model that is not the dense one cut by the plan and nothing else."""
    plan.check(dense)
    if plan.drops:
        raise PlanError("the plan takes whole modules out, which leave no constant behind in those that stay")
    if class_name(small) != class_name(dense):
        raise PlanError(f"the shrunk model is a {class_name(small)}, the dense one a {class_name(dense)}")
    own = {n: t for names, t, _ in owned_tensors(small) for n in names}
    for names, tensor, kind in owned_tensors(dense):
        if kind == "tensor":
            continue  # what a forward caches
        name = next((n for n in names if n in plan.kept), names[0])
        wanted = slice_tensor(tensor, plan.kept.get(name, {}))
        if name not in own or own[name].shape != wanted.shape:
            raise PlanError(f"{name} of the shrunk model is not what the plan leaves of the dense one")
        if not torch.equal(own[name], wanted):
            raise PlanError(
                f"{name} has changed since the model was shrunk, by training, a batch-norm repair or folding; fold "
                "once, right after shrink_"
            )


def _normalised(dense: nn.Module, plan: Plan) -> tuple[str, ...]:
    """Return the norms whose statistics run over removed channels."""
    found = []
    for name, shape in plan.shapes.items():
        path = name.rpartition(".")[0]
        norm = len(shape) == 1 and role_of(dense, name, 0, shape) == "norm"
        if norm and not isinstance(dense.get_submodule(path), _NormBase):  # those take each channel by itself
            found.append(path)
    return tuple(found)


@dataclass(frozen=True)
class _Lost:
    """Indices of a layer's weight: outputs that stayed, and inputs that went, of how many."""

    outputs: NDArray[np.int64]
    inputs: NDArray[np.int64]
    columns: int


def _losing(dense: nn.Module, plan: Plan) -> tuple[dict[str, _Lost], list[FoldedLayer]]:
    """Return the layers that lost inputs, and what else did, with why that cannot be folded."""
    layers: dict[str, _Lost] = {}
    others = []
    for names, tensor, kind in owned_tensors(dense):
        dims = next((plan.kept[n] for n in names if n in plan.kept), None)
        if dims is None or kind != "parameter":
            continue
        for name in names:
            path = name.rpartition(".")[0]
            module = dense.get_submodule(path)
            for dim, kept in dims.items():
                if role_of(dense, name, dim, tuple(tensor.shape)) != "in":
                    continue
                gone = np.setdiff1d(np.arange(tensor.shape[dim]), kept)
                if is_layer(module) and name == f"{path}.weight":
                    layers[path] = _Lost(dims.get(1 - dim, np.arange(tensor.shape[1 - dim])), gone, tensor.shape[dim])
                else:
                    why = f"what a {type(module).__name__} reads by it cannot be watched"
                    others.append(FoldedLayer(name, len(gone), 0, why=why))
    return layers, others


def _sizes_into(
    dense: nn.Module, layers: Iterable[str], sizes: dict[str, tuple[int, ...]]
) -> AbstractContextManager[None]:
    """Note the positions of each layer's first input."""

    def note(name: str, x: Tensor) -> None:
        sizes.setdefault(name, tuple(x.shape))

    return watched(dense, list(layers), note)


def _fold_of(
    name: str, layer: nn.Module, lost: _Lost, seen: Mapping[str, Mapping[str, Tensor]], sizes: Mapping[str, Any]
) -> _Fold:
    removed = _places(layer, lost.inputs, of_inputs=True)
    row = FoldedLayer(name, removed.numel(), 0)
    if name not in seen["input_mean"]:
        why = "no batch reaches it as a layer of its own: its weight is used by the code around it"
        return _Fold(replace(row, why=why), torch.zeros(()))
    channels, columns = len(seen["input_mean"][name]), _places(layer, np.arange(lost.columns), of_inputs=True).numel()
    if channels != columns:
        why = f"it gets {channels} channels for {columns} columns, so which is which is not known"
        return _Fold(replace(row, why=why), torch.zeros(()))
    mean, low, high = (seen[f"input_{what}"][name][removed] for what in ("mean", "lowest", "highest"))
    eps = torch.finfo(layer.get_parameter("weight").dtype).eps
    constant = high - low <= _ROUNDING * eps * torch.maximum(low.abs(), high.abs())
    shift, uneven = shift_of(layer, sizes[name], removed, torch.where(constant, (low + high) / 2, mean))
    kept = _places(layer, lost.outputs, of_inputs=False)
    return _Fold(replace(row, constant=int(constant.sum()), uneven=uneven), shift[kept])


def _places(layer: nn.Module, indices: NDArray[np.int64], *, of_inputs: bool) -> Tensor:
    """Return the channels that indices of a weight's dimension stand for: a grouped convolution's, in every group."""
    found = torch.from_numpy(indices)
    # One of the two dimensions counts per group: inputs, or in a transposed convolution outputs.
    if isinstance(layer, _ConvNd) and layer.groups > 1 and of_inputs != isinstance(layer, _ConvTransposeNd):
        channels = layer.in_channels if of_inputs else layer.out_channels
        return (torch.arange(layer.groups)[:, None] * (channels // layer.groups) + found).flatten()
    return found


def shift_of(layer: nn.Module, size: tuple[int, ...], removed: Tensor, values: Tensor) -> tuple[Tensor, float]:
    """Ask the layer itself what constants in some of its inputs add to its outputs.

    Returns:
        One number per output: that of the middle position, or where most others differ (tiny padded maps, transposed
        convolutions) the mean over all; and the share of positions where it is another.
    """
    wide = copy.deepcopy(layer).cpu().double()
    if isinstance(layer, _ConvNd):
        x = torch.zeros(1, layer.in_channels, *size[-len(layer.kernel_size) :], dtype=torch.float64)
    else:
        x = torch.zeros(1, size[-1], dtype=torch.float64)
    nothing = wide(x)
    x[:, removed] = values.reshape(-1, *[1] * (x.dim() - 2))
    added_OP = (wide(x) - nothing)[0].reshape(nothing.shape[1], -1)
    shift = added_OP[:, _middle(tuple(nothing.shape[2:]))]
    slack = 1e-9 * added_OP.abs().amax()
    uneven = ((added_OP - shift[:, None]).abs() > slack).any(0).double().mean()
    if uneven > 0.5:
        shift = added_OP.mean(1)
        uneven = ((added_OP - shift[:, None]).abs() > slack).any(0).double().mean()
    return shift, float(uneven)


def _middle(size: tuple[int, ...]) -> int:
    """Return the flat index of the middle position."""
    index = 0
    for n in size:
        index = index * n + n // 2
    return index
