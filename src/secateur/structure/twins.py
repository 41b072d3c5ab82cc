"""What readers get from each unit, and which units follow another one or nothing at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from secateur.errors import MissingStatsError
from secateur.graph.coupling import Coupling
from secateur.graph.groups import Group
from secateur.graph.model import owned_tensors
from secateur.graph.record import Leaf
from secateur.inputs import split_inputs
from secateur.stats.activations import channels_first
from secateur.structure.fold import shift_of
from secateur.structure.fold_into import destinations
from secateur.structure.readers import Reader, readers_of
from secateur.structure.views import role_of
from secateur.structure.wide import run_wide, watched_wide

# Shapes: U units, K channels of a unit, M samples and positions

Act = Callable[[str, tuple[str, int], Tensor], None]
"""Gets the reader's name, its group and place there, and what it reads, (channels, M)."""


@dataclass(frozen=True)
class Reading:
    """A layer that reads a group's units.

    Attributes:
        module: Its name.
        dim: The dimension of its weight that its inputs are.
        channels: The channels of its input that each unit is, (U, K).
        sizes: Shapes of its inputs.
        into: The tensor that takes up constants, or nothing.
    """

    module: str
    dim: int
    channels: NDArray[np.int64]
    sizes: tuple[tuple[int, ...], ...]
    into: str


@dataclass(frozen=True)
class Relation:
    """What a unit is made of: ``scale * twin + shift``, for each reader of its group in turn.

    Attributes:
        group: The group.
        unit: The unit.
        twin: Another one, or ``None`` for constants.
        scales: One number per reader.
        shifts: One number per reader, or for constants one per channel.
    """

    group: str
    unit: int
    twin: int | None
    scales: tuple[float, ...]
    shifts: tuple[Tensor, ...]


def readings_of(
    model: nn.Module, coupling: Coupling, batches: Sequence[Any]
) -> tuple[dict[str, list[Reading]], dict[str, str]]:
    """Find the readers of every group of several units.

    Args:
        model: The model.
        coupling: Its groups.
        batches: Inputs.

    Returns:
        Readers by group, and why groups are left alone or readers take up no constants.
    """
    readers, refused = readers_of(model, coupling)
    sizes: dict[str, dict[tuple[int, ...], None]] = {}
    counts: dict[str, int] = {}

    def note(name: str, x: Tensor) -> None:
        if x.numel():
            sizes.setdefault(name, {})[tuple(x.shape)] = None
            counts.setdefault(name, channels_first(model.get_submodule(name), x).shape[0])

    modules = {reader.module for found in readers.values() for reader in found}
    with watched_wide(model, modules, note):
        for batch in batches:
            run_wide(model, batch)
    out: dict[str, list[Reading]] = {}
    for group in coupling.groups:
        if group.name not in readers or group.units < 2:
            continue
        why = _refusal(model, coupling, group, readers[group.name], counts)
        if why:
            refused[group.name] = why
            continue
        out[group.name] = [_reading(reader, group, tuple(sizes[reader.module])) for reader in readers[group.name]]
    into, why_not = _takers(model, [r for found in out.values() for r in found], batches[0])
    refused |= why_not
    return {
        name: [Reading(r.module, r.dim, r.channels, r.sizes, into.get(r.module, "")) for r in found]
        for name, found in out.items()
    }, refused


def _refusal(
    model: nn.Module, coupling: Coupling, group: Group, readers: Sequence[Reader], counts: Mapping[str, int]
) -> str:
    leaves = {leaf.name: leaf for leaf in coupling.trace.leaves}
    for member in group.members:
        path = member.name.rpartition(".")[0]
        if role_of(model, member.name, member.dim, leaves[member.name].axes.shape) == "norm":
            norm = model.get_submodule(path)
            if not isinstance(norm, _NormBase):
                return f"{path} ({type(norm).__name__}) takes statistics over the units, which would lose some"
    reasons = (_unreadable(model, leaves[r.member.rpartition("@")[0]], r, group.units, counts) for r in readers)
    return next((why for why in reasons if why), "")


def _unreadable(model: nn.Module, leaf: Leaf, reader: Reader, units: int, counts: Mapping[str, int]) -> str:
    layer = model.get_submodule(reader.module)
    if isinstance(layer, _ConvNd) and layer.groups > 1:
        return f"{reader.module} reads it by a grouped convolution"
    if len(leaf.names) > 1:
        return f"{reader.module} shares its weight with {', '.join(sorted(leaf.names))}"
    if reader.module not in counts:
        return f"no batch reaches {reader.module}, which reads it"
    if counts[reader.module] != len(reader.unit):
        return f"{reader.module} gets {counts[reader.module]} channels for {len(reader.unit)} columns"
    if len(set(np.bincount(reader.unit[reader.unit >= 0], minlength=units).tolist())) > 1:
        return f"{reader.module} reads more of some units than of others"
    return ""


def _reading(reader: Reader, group: Group, sizes: tuple[tuple[int, ...], ...]) -> Reading:
    own = np.flatnonzero(reader.unit >= 0)
    order = own[np.argsort(reader.unit[own], kind="stable")]
    return Reading(reader.module, int(reader.member.rpartition("@")[2]), order.reshape(group.units, -1), sizes, "")


def _takers(model: nn.Module, readings: Sequence[Reading], batch: Any) -> tuple[dict[str, str], dict[str, str]]:
    """Return what takes up a constant in a reader's inputs, by reader, or why nothing does."""
    shifts: dict[str, Tensor] = {}
    refused: dict[str, str] = {}
    for reading in readings:
        layer = model.get_submodule(reading.module)
        channels = torch.from_numpy(reading.channels).flatten()
        # No two alike: what one unit adds at a border must not be taken back by another.
        values = torch.rand(len(channels), generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
        found = [shift_of(layer, size, channels, values) for size in reading.sizes]
        if any(uneven or not torch.allclose(shift, found[0][0], rtol=1e-9) for shift, uneven in found):
            refused[reading.module] = "takes up no constants: zero padding gives them other values at the border"
        else:
            shifts[reading.module] = torch.ones_like(found[0][0])
    into = {}
    shared = {name: names for names, _, _ in owned_tensors(model) for name in names if len(names) > 1}
    for name, (target, why) in destinations(model, shifts, batch, _call).items():
        if target in shared:
            why = f"{' and '.join(shared[target])} are one tensor"
        if why:
            refused[name] = f"takes up no constants: {why}"
        else:
            into[name] = target
    return into, refused


def _call(model: nn.Module, batch: Any) -> Any:
    args, kwargs = split_inputs(batch)
    return model(*args, **kwargs)


class _Moments:
    """Streaming moments of what a reader gets from each unit: about the first batch's means, in float64."""

    def __init__(self, channels: NDArray[np.int64]) -> None:
        self.channels = torch.from_numpy(channels)
        units, width = channels.shape
        self.count = 0
        self.about = torch.zeros(units, dtype=torch.float64)
        self.total = torch.zeros(units, dtype=torch.float64)
        self.products = torch.zeros(units, units, dtype=torch.float64)
        self.low = torch.full((units, width), torch.inf, dtype=torch.float64)
        self.high = -self.low

    def take(self, x_CM: Tensor) -> Tensor:
        """Return (U, K, M)."""
        return x_CM.detach().cpu().double()[self.channels]

    def add(self, name: str, x_CM: Tensor) -> None:
        """Add what one call of the reader gets."""
        values = self.take(x_CM)
        if not bool(torch.isfinite(values).all()):
            raise MissingStatsError(
                f"{name} gets inputs that are NaN or infinite, of which nothing can be said; leave the samples out "
                "that do this, or repair the weights"
            )
        if not values.shape[2]:
            return
        self.low = torch.minimum(self.low, values.amin(2))
        self.high = torch.maximum(self.high, values.amax(2))
        flat = values.flatten(1)
        if not self.count:
            self.about = flat.mean(1)
        flat = flat - self.about[:, None]
        self.total += flat.sum(1)
        self.products += flat @ flat.T
        self.count += flat.shape[1]

    @property
    def mean(self) -> Tensor:
        """(U,)."""
        return self.about + self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """(U, U)."""
        mean = self.total / self.count
        return self.products / self.count - mean[:, None] * mean[None, :]


def find_relations(
    model: nn.Module, readings: Mapping[str, list[Reading]], batches: Sequence[Any], tolerance: float
) -> list[Relation]:
    """Find the units that are constant, or that another unit determines, for all their readers.

    Candidates come from correlations; each is then held against every single value.

    Args:
        model: The model.
        readings: The readers of each group.
        batches: Inputs, run twice or more often.
        tolerance: Largest deviation, in standard deviations of the unit.

    Returns:
        The relations. At least one unit of every group is in none, and no unit is both one that goes and a twin.
    """
    moments = {(g, i): _Moments(r.channels) for g, found in readings.items() for i, r in enumerate(found)}
    by_module: dict[str, list[tuple[str, int]]] = {}
    for g, found in readings.items():
        for i, reading in enumerate(found):
            by_module.setdefault(reading.module, []).append((g, i))

    def run(act: Act) -> None:
        def each(name: str, x: Tensor) -> None:
            rows = channels_first(model.get_submodule(name), x)
            for key in by_module[name]:
                act(name, key, rows)

        with watched_wide(model, by_module, each):
            for batch in batches:
                run_wide(model, batch)

    run(lambda name, key, rows: moments[key].add(name, rows))
    snap = 64.0 * torch.finfo(torch.float64).eps  # in bfloat16, 64 units in the last place are half of the value
    refuted: set[tuple[str, int, int | None]] = set()
    while True:
        relations = [
            relation
            for group, own in readings.items()
            for relation in _candidates(
                group, own, [moments[group, i] for i in range(len(own))], refuted, tolerance, snap
            )
        ]
        held = _holding(relations, moments, run, tolerance, snap)
        if all(held):
            return relations
        # A unit that stays after all may be the twin of another.
        refuted |= {(r.group, r.unit, r.twin) for r, holds in zip(relations, held, strict=True) if not holds}


def _holding(
    relations: Sequence[Relation],
    moments: Mapping[tuple[str, int], _Moments],
    run: Callable[[Act], None],
    tolerance: float,
    snap: float,
) -> list[bool]:
    """Hold relations between two units against every value that their readers get."""
    held = [True] * len(relations)

    def check(_name: str, key: tuple[str, int], rows: Tensor) -> None:
        values = moments[key].take(rows)
        if not values.shape[2]:
            return
        spread = moments[key].covariance.diagonal().clamp_min(0.0).sqrt()
        for n, relation in enumerate(relations):
            if relation.group == key[0] and relation.twin is not None:
                scale, shift = relation.scales[key[1]], relation.shifts[key[1]]
                apart = values[relation.unit] - scale * values[relation.twin] - shift[:, None]
                rounding = snap * float(values[relation.unit].abs().max())
                held[n] &= float(apart.abs().max()) <= tolerance * float(spread[relation.unit]) + rounding

    run(check)
    return held


def _candidates(
    group: str,
    readings: Sequence[Reading],
    moments: Sequence[_Moments],
    refuted: Set[tuple[str, int, int | None]],
    tolerance: float,
    snap: float,
) -> list[Relation]:
    units = len(readings[0].channels)
    fixed = [_constant(m, tolerance, snap) for m in moments]
    out: list[Relation] = []
    stay: list[int] = []
    for unit in range(units):
        relation = _as_constant(group, unit, readings, moments, fixed, snap)
        best = 0.0
        for twin in stay if relation is None else ():
            likeness, other = _as_twin(group, unit, twin, readings, moments, fixed, tolerance, snap)
            if other is not None and likeness > best and (group, unit, twin) not in refuted:
                best, relation = likeness, other
        if relation is None or (unit == units - 1 and not stay):
            stay.append(unit)
        else:
            out.append(relation)
    return out


def _constant(moments: _Moments, tolerance: float, snap: float) -> Tensor:
    """Return which units have one value per channel, whatever comes in."""
    size = torch.maximum(moments.low.abs(), moments.high.abs())
    spread = moments.covariance.diagonal().clamp_min(0.0).max().sqrt()
    # One unit in the last place of its own, or next to nothing beside what the others vary by.
    return (moments.high - moments.low <= torch.maximum(snap * size, tolerance * 1e-3 * spread)).all(1)


def _as_constant(
    group: str,
    unit: int,
    readings: Sequence[Reading],
    moments: Sequence[_Moments],
    fixed: Sequence[Tensor],
    snap: float,
) -> Relation | None:
    shifts = []
    for reading, m, constant in zip(readings, moments, fixed, strict=True):
        value = (m.low[unit] + m.high[unit]) / 2
        if not bool(constant[unit]) or (bool(value.count_nonzero()) and not reading.into):
            return None
        shifts.append(value)
    return Relation(group, unit, None, tuple(0.0 for _ in shifts), tuple(shifts))


def _as_twin(  # what is known of two units, and how exact it must be
    group: str,
    unit: int,
    twin: int,
    readings: Sequence[Reading],
    moments: Sequence[_Moments],
    fixed: Sequence[Tensor],
    tolerance: float,
    snap: float,
) -> tuple[float, Relation | None]:
    """Return the least squared correlation over the readers, and the relation, if there can be one."""
    scales, shifts, likeness = [], [], 1.0
    for reading, m, constant in zip(readings, moments, fixed, strict=True):
        width = reading.channels.shape[1]
        if bool(constant[unit]):
            scale, shift = 0.0, (m.low[unit] + m.high[unit]) / 2
        else:
            covariance = m.covariance
            own, other, both = (float(covariance[a, b]) for a, b in ((unit, unit), (twin, twin), (unit, twin)))
            alike = min(own, other) > 0.0 and both**2 >= (1.0 - max(tolerance, 1e-9)) * own * other
            if bool(constant[twin]) or not alike:
                return 0.0, None
            likeness = min(likeness, both**2 / (own * other))
            scale = _snapped(both / other, snap)
            offset = float(m.mean[unit]) - scale * float(m.mean[twin])
            size = max(float(m.low[unit].abs().max()), float(m.high[unit].abs().max()))
            shift = torch.full((width,), 0.0 if abs(offset) <= snap * size else offset, dtype=torch.float64)
        if bool(shift.count_nonzero()) and not reading.into:
            return 0.0, None
        scales.append(scale)
        shifts.append(shift)
    return likeness, Relation(group, unit, twin, tuple(scales), tuple(shifts))


def _snapped(value: float, snap: float) -> float:
    return next((whole for whole in (1.0, -1.0) if abs(value - whole) <= snap), value)
