"""What a model is made of, seen from pruning: every parameter, whether it may be pruned, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from secateur.checkpoint import nonzero_pruned
from secateur.masks import check_masks
from secateur.metrics import MacCount, ParamCount, ParamRow, count, count_macs
from secateur.prunable import Found, find_prunable

VECTOR = "a bias, or the scale or shift of a norm"


@dataclass(frozen=True)
class InspectedWeight:
    """One parameter, counted once however many names it has.

    Attributes:
        name: Its qualified name, as masks use it.
        type: Class of the module that owns it.
        shape: Its shape.
        dtype: Its dtype.
        params: Elements.
        share: Fraction of all elements of the model.
        prunable: Whether it may be pruned, after the filters.
        reason: Why not, if not.
        nonzero: Elements that are not zero, after the mask.
        kept: Elements that stay: by the mask, or without masks those of a prunable weight that are not zero.
        macs: Multiply-accumulates that its elements take part in; ``None`` when no input was given.
        density_weighted_macs: Theoretical: those that remain when an element that is not kept costs nothing.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    dtype: str
    params: int
    share: float
    prunable: bool
    reason: str
    nonzero: int
    kept: int
    macs: int | None = None
    density_weighted_macs: int | float | None = None

    @property
    def sparsity(self) -> float:
        """Fraction that does not stay."""
        return 1.0 - self.kept / self.params if self.params else 0.0


@dataclass(frozen=True)
class Inspection:
    """A model's parameters, its ties, and what was not counted.

    Attributes:
        model: Class name of the model.
        rows: One row per parameter, in the model's order.
        ties: Other names of parameters that are stored once, to the name of the row.
        masked: Whether masks were given; if not, ``kept`` counts what is not zero.
        macs: Multiply-accumulates of one forward pass, if an input was given.
        buffers: Elements of the buffers, which are no parameters and are in no row.
        unmasked: Elements that a mask prunes and that are not zero, by name: the masks were not applied.
    """

    model: str
    rows: tuple[InspectedWeight, ...]
    ties: Mapping[str, str]
    masked: bool = False
    macs: MacCount | None = None
    buffers: int = 0
    unmasked: Mapping[str, int] = field(default_factory=dict)

    @property
    def params(self) -> int:
        """Elements of all rows."""
        return sum(row.params for row in self.rows)

    @property
    def kept(self) -> int:
        """Elements that stay, of all rows."""
        return sum(row.kept for row in self.rows)

    @property
    def prunable(self) -> int:
        """Elements that may be pruned."""
        return sum(row.params for row in self.rows if row.prunable)

    @property
    def prunable_kept(self) -> int:
        """Those of them that stay."""
        return sum(row.kept for row in self.rows if row.prunable)

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable elements that does not stay."""
        return 1.0 - self.prunable_kept / self.prunable if self.prunable else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        rows = [{**asdict(row), "shape": list(row.shape), "sparsity": row.sparsity} for row in self.rows]
        return {
            "model": self.model,
            "params": {
                "total": self.params,
                "kept": self.kept,
                "nonzero": sum(row.nonzero for row in self.rows),
                "prunable": self.prunable,
                "prunable_kept": self.prunable_kept,
                "sparsity": self.sparsity,
                "kept_means": "by the masks" if self.masked else "not zero",
            },
            "macs": None if self.macs is None else {**self.macs.to_dict(), "without_a_weight": self.macs.unattributed},
            "layers": rows,
            "ties": dict(self.ties),
            "not_counted": {
                "buffer_elements": self.buffers,
                "operators": None if self.macs is None else dict(self.macs.uncounted),
            },
            "unmasked": dict(self.unmasked),
        }


def inspect_model(
    model: nn.Module,
    *,
    inputs: tuple[Any, ...] | None = None,
    masks: Mapping[str, Tensor] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    types: Sequence[str] = (),
) -> Inspection:
    """List every parameter of a model with what pruning would make of it. Changes nothing.

    Args:
        model: The model.
        inputs: Positional inputs of one forward pass, to count MACs; only shapes and dtypes matter.
        masks: Bool masks by parameter name; without them, zeros in the prunable weights are counted.
        include: As in :func:`~secateur.prunable.find_prunable`.
        exclude: As there.
        types: As there.

    Returns:
        The parameters, one row each; the totals are sums over the rows.

    Raises:
        WeightError: When nothing is prunable, or a mask does not fit.
        MetricsError: When the MACs cannot be counted.

    Example:
        >>> import torch
        >>> seen = inspect_model(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), inputs=(torch.zeros(1, 4),))
        >>> [(row.name, row.params, row.macs) for row in seen.rows if row.prunable]
        [('0.weight', 32, 32), ('1.weight', 16, 16)]
    """
    if masks is not None:
        check_masks(model, masks)
    found = find_prunable(model, include=include, exclude=exclude, types=types)
    params = count(model, masks, found.weights)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    stay = masks if masks is not None else _zeros(parameters, found)
    macs = None if inputs is None else count_macs(model, inputs, masks=stay)
    rows = tuple(_row(model, row, found, params, masks, macs) for row in params.rows)
    return Inspection(
        type(model).__name__,
        rows,
        {n: row.name for row, counted in zip(rows, params.rows, strict=True) for n in _names(counted) - {row.name}},
        masks is not None,
        macs,
        sum(buffer.numel() for buffer in model.buffers()),
        {} if masks is None else nonzero_pruned({n: p.detach() for n, p in parameters.items()}, masks),
    )


def _zeros(parameters: Mapping[str, Tensor], found: Found) -> dict[str, Tensor]:
    """Read masks off the weights that have zeros."""
    masks = {name: parameters[name].detach() != 0 for name in found.weights}
    return {name: mask for name, mask in masks.items() if not bool(mask.all())}


def _names(row: ParamRow) -> set[str]:
    return {row.name, *row.aliases}


def _row(
    model: nn.Module,
    row: ParamRow,
    found: Found,
    params: ParamCount,
    masks: Mapping[str, Tensor] | None,
    macs: MacCount | None,
) -> InspectedWeight:
    # A tied weight goes by the name that pruning uses, which need not be the first.
    name = next((n for n in (row.name, *row.aliases) if n in found.weights), row.name)
    parameter = model.get_parameter(name)
    owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
    prunable = name in found.weights
    cost = macs.per_weight.get(row.name) if macs is not None else None
    return InspectedWeight(
        name=name,
        type=owner,
        shape=row.shape,
        dtype=str(parameter.dtype).removeprefix("torch."),
        params=row.params,
        share=row.params / params.total if params.total else 0.0,
        prunable=prunable,
        reason="" if prunable else _reason(row, owner, found),
        nonzero=row.nonzero,
        kept=row.nonzero if prunable and masks is None else row.kept,
        macs=None if macs is None else cost.macs if cost else 0,
        density_weighted_macs=None if macs is None else cost.density_weighted if cost else 0,
    )


def _reason(row: ParamRow, owner: str, found: Found) -> str:
    for name in _names(row):
        if name in found.skipped:
            return found.skipped[name]
    if ".parametrizations." in f".{row.name}":
        return "parametrised: call torch.nn.utils.parametrize.remove_parametrizations first"
    if len(row.shape) < 2:
        return VECTOR
    return f"{owner} is left alone unless it is named in types"
