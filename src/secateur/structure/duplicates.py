"""Units that say nothing of their own: constants, and copies of others. Found on data, folded, cut out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.errors import GraphError, MissingStatsError, check_number
from secateur.graph.changes import slice_tensor
from secateur.graph.coupling import Coupling
from secateur.graph.examples import Example
from secateur.graph.trace import trace
from secateur.graph.trees import tensors
from secateur.graph.unsupported import refuse_unsupported
from secateur.graph.valueless import outside_fake_mode
from secateur.inputs import split_inputs
from secateur.structure.fold import shift_of
from secateur.structure.report import ShrinkReport
from secateur.structure.shrink import shrink_
from secateur.structure.twins import Reading, Relation, find_relations, readings_of
from secateur.structure.wide import apart, copy_of, holding


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
        difference: Largest difference of any output on the batches, before and after, in float64, relative to the
            largest value of that output. What is left of the relations, and the rounding of the changed weights to
            their dtype.
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

    Relations are looked for in float64, whatever the model's dtype. The network with the changes is first compared
    with the old one in float64, on all batches, as a copy; a group without whose units the outputs move, because
    something else than its readers looks at them, is left alone. Then the model is changed, and cut by
    :func:`~secateur.structure.shrink_` with its proof. On any failure it is what it was. A relation that is seen on
    the batches may not hold elsewhere: give all the data there is. Duplicates by construction (equal incoming weights)
    hold everywhere.

    Args:
        model: The model; changed in place.
        batches: Batches of the model's inputs (a tensor, a tuple, a dict), without labels. They are kept in memory;
            those without a sample are passed over.
        tolerance: Largest deviation from the relation, in standard deviations of the unit.
        optimizer: Its state is cut along.

    Returns:
        What went, what stands for it, and the proof.

    Raises:
        MissingStatsError: When there are no batches, a layer gets what is not finite, or the tolerance is not in
            [0, 1).
        GraphError: When the model cannot be recorded, or refuses a batch.

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
    check_number(
        "tolerance, in standard deviations of a unit,", tolerance, most=1.0, below=True, error=MissingStatsError
    )
    seen = _listed(batches)
    refuse_unsupported(model)
    with outside_fake_mode():
        coupling = Coupling(trace(model, [Example(*split_inputs(seen[0]))]))
        readings, refused = readings_of(model, coupling, seen)
        relations = find_relations(model, readings, seen, tolerance)
    if not relations:
        return DuplicateReport((), refused)
    old = copy_of(model)
    relations, moving = _that_hold(old, readings, relations, seen, 1e-9 + 100.0 * tolerance)
    refused |= moving
    if not relations:
        return DuplicateReport((), refused)
    values, masks = _folded(model, readings, relations)
    before = _write_(model, values)
    try:
        report = shrink_(model, masks, seen[0], optimizer=optimizer)
    except BaseException:
        _write_(model, before)
        raise
    return DuplicateReport(tuple(_shown(r) for r in relations), refused, report, apart(old, model, seen))


def _listed(batches: Iterable[Any]) -> list[Any]:
    if isinstance(batches, Tensor | Mapping | str):
        raise MissingStatsError(f"batches must be a list of batches, got one {type(batches).__name__}; give [batch]")
    given = list(batches)
    seen = [batch for batch in given if any(t.numel() for t in tensors(batch)) or not tensors(batch)]
    if not seen:
        what = "all batches were empty" if given else "there were no batches to run"
        raise MissingStatsError(f"constant and equal units are found on data, but {what}")
    return seen


def _shown(relation: Relation) -> FoldedUnit:
    scale, shift = relation.scales[0], float(relation.shifts[0].flatten()[0])
    return FoldedUnit(relation.group, relation.unit, relation.twin, scale, shift)


def _folded(
    model: nn.Module, readings: Mapping[str, list[Reading]], relations: list[Relation]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what readers hold when they make up for units that go, in float64, and masks of what is unread then."""
    values: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}

    def of(name: str) -> Tensor:
        if name not in values:
            values[name] = _tensor(model, name).detach().cpu().double().clone()
        return values[name]

    for group in dict.fromkeys(relation.group for relation in relations):
        own = [relation for relation in relations if relation.group == group]
        for i, reading in enumerate(readings[group]):
            weight = of(f"{reading.module}.weight")
            columns = weight.movedim(reading.dim, 0)
            places = {r.unit: torch.from_numpy(reading.channels[r.unit]) for r in own}
            gone = torch.cat(list(places.values()))
            shifts = torch.cat([r.shifts[i].expand(len(places[r.unit])) for r in own])
            if bool(shifts.count_nonzero()):
                # The layer's weights are as they were: what other groups changed is in none of these columns.
                shift = shift_of(model.get_submodule(reading.module), reading.sizes[0], gone, shifts)[0]
                of(reading.into).add_(-shift if reading.into.endswith("running_mean") else shift)
            for r in own:
                if r.twin is not None and r.scales[i]:
                    columns[torch.from_numpy(reading.channels[r.twin])] += r.scales[i] * columns[places[r.unit]]
            columns[gone] = 0.0
            mask = masks.setdefault(f"{reading.module}.weight", torch.ones(weight.shape, dtype=torch.bool))
            mask.index_fill_(reading.dim, gone, value=False)
    return values, masks


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(path), last)
    return tensor


def _write_(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Write values into a model's tensors; return what these held."""
    before = {}
    for name, value in values.items():
        tensor = _tensor(model, name)
        before[name] = tensor.detach().clone()
        tensor.copy_(value)
    return before


def _that_hold(
    model: nn.Module,
    readings: Mapping[str, list[Reading]],
    relations: list[Relation],
    batches: list[Any],
    allowed: float,
) -> tuple[list[Relation], dict[str, str]]:
    """Return the relations of groups without whose units the outputs stay, and why other groups are left alone."""
    together = _moved(model, readings, relations, batches, allowed)
    if not together:
        return relations, {}
    groups = list(dict.fromkeys(relation.group for relation in relations))
    if len(groups) == 1:
        return [], {groups[0]: together}
    refused = {}
    for group in groups:
        why = _moved(model, readings, [r for r in relations if r.group == group], batches, allowed)
        if why:
            refused[group] = why
    rest = [relation for relation in relations if relation.group not in refused]
    left = [group for group in groups if group not in refused]
    if len(left) < 2:  # it was tried alone
        return rest, refused
    why = _moved(model, readings, rest, batches, allowed) if refused else together
    if why:
        raise GraphError(f"the groups {', '.join(left)} can each be folded, and not together: {why}")
    return rest, refused


def _moved(
    model: nn.Module,
    readings: Mapping[str, list[Reading]],
    relations: list[Relation],
    batches: list[Any],
    allowed: float,
) -> str:
    """Do it all on a copy, and say by how much the outputs move in float64 if that is more than allowed."""
    trial = copy_of(model)
    values, masks = _folded(trial, readings, relations)
    _write_(trial, values)
    for name in values:
        tensor = _tensor(trial, name)
        if not bool(torch.isfinite(tensor).all()):
            return f"{name} would not be finite in {tensor.dtype} once it makes up for its constant and equal units"
    try:
        plan = shrink_(trial, masks, batches[0]).plan
    except GraphError as error:
        return f"what is left without its constant and equal units is refused: {error}"
    with holding(trial, {name: slice_tensor(value, plan.kept.get(name, {})) for name, value in values.items()}):
        difference = apart(model, trial, batches)
    if difference <= allowed:
        return ""
    return (
        f"without its constant and equal units the outputs move by {difference:.1e}, relative; at most {allowed:.1e} "
        "was expected. Something else than its readers looks at these units, or the tolerance is too large"
    )


__all__ = ["DuplicateReport", "FoldedUnit", "fold_duplicates_"]
