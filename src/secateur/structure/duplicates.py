"""Units that say nothing of their own: constants, and copies of others. Found on data, folded, cut out."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from secateur.errors import GraphError, MissingStatsError
from secateur.forward import attention_fast_path, call_model, evaluation_mode_of
from secateur.graph.coupling import Coupling
from secateur.graph.examples import Example
from secateur.graph.trace import trace
from secateur.graph.unsupported import refuse_unsupported
from secateur.graph.valueless import outside_fake_mode
from secateur.inputs import split_inputs
from secateur.structure.fold import shift_of
from secateur.structure.fold_into import shift_
from secateur.structure.report import ShrinkReport
from secateur.structure.shrink import shrink_
from secateur.structure.twins import Reading, Relation, find_relations, readings_of


@dataclass(frozen=True)
class FoldedUnit:
    """A unit that went, and what stands for it.

    Attributes:
        group: Its group.
        unit: Its number there.
        twin: The unit that its readers now read in its place; ``None`` for a constant.
        scale: What the twin is multiplied by, in the first of the readers.
        shift: What is added to that, in the first of the readers; of a constant its value there.
    """

    group: str
    unit: int
    twin: int | None
    scale: float
    shift: float

    @property
    def kind(self) -> str:
        """``"constant"``, ``"duplicate"``, ``"opposite"``, or ``"scaled"``."""
        if self.twin is None:
            return "constant"
        return {1.0: "duplicate", -1.0: "opposite"}.get(self.scale, "scaled") if not self.shift else "scaled"


@dataclass(frozen=True)
class DuplicateReport:
    """What was folded, and what was not looked at. ``print`` it.

    Attributes:
        units: The units that went.
        refused: Groups that were left alone, and readers that cannot take up a constant, with the reason.
        shrunk: The report of the cut, with its proof; ``None`` where nothing was found.
        difference: Largest difference of the outputs on the batches, before and after, in float64, relative to the
            largest output.
    """

    units: tuple[FoldedUnit, ...]
    refused: Mapping[str, str] = field(default_factory=dict)
    shrunk: ShrinkReport | None = None
    difference: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "units": [{**vars(unit), "kind": unit.kind} for unit in self.units],
            "refused": dict(self.refused),
            "difference": self.difference,
            "shrunk": None if self.shrunk is None else self.shrunk.to_dict(),
        }

    def __str__(self) -> str:
        kinds = [unit.kind for unit in self.units]
        counts = [f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)]
        lines = [f"{len(kinds)} units folded" + (f": {', '.join(counts)}" if counts else "")]
        if self.shrunk is not None:
            lines.append(f"outputs on the batches moved by {self.difference:.1e}, relative, in float64")
            lines.append(str(self.shrunk))
        lines += [f"left alone: {name}: {why}" for name, why in self.refused.items()]
        return "\n".join(lines)


@torch.no_grad()
def fold_duplicates_(
    model: nn.Module, batches: Iterable[Any], *, tolerance: float = 1e-5, optimizer: Optimizer | None = None
) -> DuplicateReport:
    r"""Cut out units that are constant or follow another one, and let their readers make up for them exactly.

    With :math:`a_i` what unit :math:`i` gives a reader with weights :math:`W` and bias :math:`b`, over all batches and
    positions:

    .. math::
        a_i = c &\;\Rightarrow\; b' = b + c\,W_i \\
        a_i = s\,a_j + c &\;\Rightarrow\; W_j' = W_j + s\,W_i, \quad b' = b + c\,W_i

    :math:`s = 1, c = 0` is a duplicate, :math:`s = -1` its opposite. Linear layers and convolutions read; what lies
    between makers and readers (batch norms, activations, pooling) may be anything, since the relation is looked for
    where it is used. It must hold for every reader of the unit; each may have an s and c of its own. Where a reader
    cannot take up a constant (neither a bias nor a batch norm right behind it, or zero padding), units that need one
    are left.

    The network with the changes is first compared with the old one in float64, on all batches, as a copy. Then the
    model is changed, and cut by :func:`~secateur.structure.shrink_` with its proof. On any failure it is what it was.
    A relation that is seen on the batches may not hold elsewhere: give all the data there is. Duplicates by
    construction (equal incoming weights) hold everywhere.

    Args:
        model: The model; changed in place.
        batches: Batches of the model's inputs (a tensor, a tuple, a dict), without labels. They are kept in memory.
        tolerance: Largest deviation from the relation, in standard deviations of the unit.
        optimizer: Its state is cut along.

    Returns:
        What went, what stands for it, and the proof.

    Raises:
        MissingStatsError: When there are no batches, or the tolerance is not in [0, 1).
        GraphError: When the model cannot be recorded, or its outputs would move by more than the tolerance allows.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
        >>> _ = net[0].weight.data[2].copy_(2 * net[0].weight[0]), net[0].bias.data[2].copy_(2 * net[0].bias[0])
        >>> x = torch.randn(64, 3).double()
        >>> before = net(x)
        >>> [(u.unit, u.twin, u.kind, round(u.scale, 9)) for u in fold_duplicates_(net, [x]).units]
        [(2, 0, 'scaled', 2.0)]
        >>> net[0].out_features, torch.allclose(net(x), before, rtol=1e-12)
        (3, True)

    References:
        Jocelyn Sietsma, Robert J. F. Dow, Neural Net Pruning: Why and How, 1988; Russell Reed, Pruning Algorithms: a
        Survey, 1993.
    """
    if not 0.0 <= tolerance < 1.0:
        raise MissingStatsError(f"tolerance is in standard deviations of a unit, in [0, 1), got {tolerance!r}")
    seen = list(batches)
    if not seen:
        raise MissingStatsError("constant and equal units are found on data, but there were no batches to run")
    refuse_unsupported(model)
    with outside_fake_mode(), evaluation_mode_of(model):
        coupling = Coupling(trace(model, [Example(*split_inputs(seen[0]))]))
        readings, refused = readings_of(model, coupling, seen)
        relations = find_relations(model, readings, seen, tolerance)
    if not relations:
        return DuplicateReport((), refused)
    units = tuple(_shown(relation) for relation in relations)
    difference = _tried(model, readings, relations, seen, tolerance)
    changed = _touched(model, readings, relations)
    before = {name: tensor.clone() for name, tensor in changed.items()}
    try:
        masks = _fold_(model, readings, relations)
        report = shrink_(model, masks, seen[0], optimizer=optimizer)
    except BaseException:
        for name, tensor in changed.items():
            tensor.copy_(before[name])
        raise
    return DuplicateReport(units, refused, report, difference)


def _shown(relation: Relation) -> FoldedUnit:
    scale, shift = relation.scales[0], float(relation.shifts[0].flatten()[0])
    return FoldedUnit(relation.group, relation.unit, relation.twin, scale, shift)


def _touched(model: nn.Module, readings: Mapping[str, list[Reading]], relations: list[Relation]) -> dict[str, Tensor]:
    """Return the tensors that folding writes to."""
    names = set()
    for group in {relation.group for relation in relations}:
        for reading in readings[group]:
            names |= {f"{reading.module}.weight"} | ({reading.into} if reading.into else set())
    known = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {name: known[name].data for name in names}


def _fold_(model: nn.Module, readings: Mapping[str, list[Reading]], relations: list[Relation]) -> dict[str, Tensor]:
    """Let the readers make up for the units that go; return masks of what they then read no more."""
    masks: dict[str, Tensor] = {}
    for group in dict.fromkeys(relation.group for relation in relations):
        own = [relation for relation in relations if relation.group == group]
        for i, reading in enumerate(readings[group]):
            layer = model.get_submodule(reading.module)
            weight = layer.get_parameter("weight")
            wide = weight.detach().cpu().double().movedim(reading.dim, 0).clone()
            places = {r.unit: torch.from_numpy(reading.channels[r.unit]) for r in own}
            gone = torch.cat(list(places.values()))
            shifts = torch.cat([r.shifts[i].expand(len(places[r.unit])) for r in own])
            if bool(shifts.count_nonzero()):
                shift_(model, reading.into, shift_of(layer, reading.size, gone, shifts)[0])
            for r in own:
                if r.twin is not None and r.scales[i]:
                    wide[torch.from_numpy(reading.channels[r.twin])] += r.scales[i] * wide[places[r.unit]]
            wide[gone] = 0.0
            weight.copy_(wide.movedim(0, reading.dim))
            mask = masks.setdefault(f"{reading.module}.weight", torch.ones(weight.shape, dtype=torch.bool))
            mask.index_fill_(reading.dim, gone, value=False)
    return masks


def _tried(
    model: nn.Module,
    readings: Mapping[str, list[Reading]],
    relations: list[Relation],
    batches: list[Any],
    tolerance: float,
) -> float:
    """Do it all on a copy, in float64, and return how far the outputs move."""
    old, new = copy.deepcopy(model).double(), copy.deepcopy(model).double()
    wide = [tree_map(_double, batch) for batch in batches]
    shrink_(new, _fold_(new, readings, relations), wide[0])
    moved, largest = 0.0, 0.0
    for batch in wide:
        for want, got in zip(_outputs(old, batch), _outputs(new, batch), strict=True):
            if want.numel():
                moved = max(moved, float((want - got).abs().max()))
                largest = max(largest, float(want.abs().max()))
    difference = moved / largest if largest else float(moved > 0.0)
    allowed = 1e-9 + 100.0 * tolerance
    if not difference <= allowed:
        groups = ", ".join(dict.fromkeys(relation.group for relation in relations))
        raise GraphError(
            f"without the constant and equal units of {groups} the outputs move by {difference:.1e}, relative; at most "
            f"{allowed:.1e} was expected. Something else than their readers looks at these units; lower the tolerance"
        )
    return difference


def _double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    with evaluation_mode_of(model), attention_fast_path(enabled=False):
        return [t for t in tree_leaves(call_model(model, batch)) if isinstance(t, Tensor) and t.is_floating_point()]


__all__ = ["DuplicateReport", "FoldedUnit", "fold_duplicates_"]
