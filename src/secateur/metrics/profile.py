"""All figures of one model, and two models side by side. Computes; showing is somebody else's work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import MetricsError
from secateur.metrics.energy import Energy, measure_energy
from secateur.metrics.latency import REALISED, Latency, inference, input_tensors, speedup
from secateur.metrics.macs import MacCount, count_macs
from secateur.metrics.memory import Memory, measure_memory
from secateur.metrics.params import ParamCount, count
from secateur.metrics.storage import Storage, measure_storage

COUNTED, MEASURED, MODELLED, NOT_MEASURED = "counted", "measured", "modelled", "not measured"
NOT_REALISED = "no ratio: the mask is not realised, the dense model runs"


@dataclass(frozen=True)
class LayerProfile:
    """One weight: what it holds and what it costs; MACs are ``None`` where they could not be counted."""

    name: str
    shape: tuple[int, ...]
    params: int
    kept: int
    macs: int | None
    density_weighted_macs: int | float | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {**asdict(self), "shape": list(self.shape)}


@dataclass(frozen=True)
class Profile:
    """All figures of one model on one input.

    Attributes:
        params: Parameter counts.
        macs: MAC counts, or the reason why there are none.
        layers: One row per weight: prunable, used by a product, or of two dimensions or more.
        storage: Bytes on disk.
        latency: Measured elsewhere, side by side with its rival; ``None`` where it was not.
        memory: Weight bytes and peak.
        energy: Per call; ``None`` where it was not asked for.
    """

    params: ParamCount
    macs: MacCount | str
    layers: tuple[LayerProfile, ...]
    storage: Storage
    latency: Latency | None
    memory: Memory
    energy: Energy | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "params": self.params.to_dict(),
            "macs": {"not_measured": self.macs} if isinstance(self.macs, str) else self.macs.to_dict(),
            "layers": [row.to_dict() for row in self.layers],
            "storage": self.storage.to_dict(),
            "latency": self.latency and self.latency.to_dict(),
            "memory": self.memory.to_dict(),
            "energy": self.energy and self.energy.to_dict(),
        }


@dataclass(frozen=True)
class Row:
    """One line of a comparison.

    Attributes:
        name: What is compared.
        dense: Figure of the original model, ``None`` where there is none.
        pruned: Figure of the pruned model, ``None`` where there is none.
        ratio: ``dense / pruned``: above 1, the pruned model needs less. ``None`` where the two must not or cannot
            be compared.
        unit: Unit of both figures.
        kind: ``"counted"``, ``"measured"``, ``"modelled"`` or ``"not measured"``.
        note: Why something is missing, or what the figure holds for.
    """

    name: str
    dense: float | None
    pruned: float | None
    ratio: float | None
    unit: str
    kind: str
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)


def profile(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    masks: Mapping[str, Tensor] | None = None,
    prunable: Iterable[str] | None = None,
    latency: Latency | None = None,
    energy: bool = True,
) -> Profile:
    """Gather every figure of a model.

    Latency is passed in, since only a measurement side by side with the rival means anything. Energy is that of
    the model as it runs: dense MACs, all weight bytes, whatever a mask says.

    Args:
        model: The model; flags, values and hooks stay as they are.
        args: Positional inputs.
        kwargs: Keyword inputs.
        masks: Bool masks by parameter name; ``True`` = keep.
        prunable: Names in the scope of pruning.
        latency: From :func:`~secateur.metrics.latency.measure_latency`.
        energy: Whether to measure or model energy.

    Returns:
        The profile. Where MACs cannot be counted it says why instead.
    """
    tensors = input_tensors(args, kwargs)
    params = count(model, masks, prunable)
    macs: MacCount | str
    try:
        macs = count_macs(model, args, kwargs, masks=masks)
    except MetricsError as error:
        macs = str(error)
    memory = measure_memory(model, args, kwargs)
    joules = None
    if energy:
        device = tensors[0].device if tensors else torch.device("cpu")
        dense = None if isinstance(macs, str) else macs.dense
        named = dict(kwargs or {})
        with inference([model]):
            joules = measure_energy(
                lambda: model(*args, **named), device=device, macs=dense, weight_bytes=memory.weight_bytes
            )
    storage = measure_storage(model, _saved(model, masks))
    return Profile(params, macs, _layers(params, macs), storage, latency, memory, joules)


def compare(dense: Profile, pruned: Profile, *, realised: str) -> list[Row]:
    """Put two profiles side by side.

    Ratios are dense over pruned. Latency and energy get none while the mask is only a mask: such a model runs the
    dense kernels, and a ratio other than 1 would be noise. Nor do figures of different kinds.

    Args:
        dense: Profile of the original model.
        pruned: Profile of the pruned model.
        realised: ``"mask"``, ``"slice"`` or ``"sparse"``.

    Returns:
        One row per figure, in a fixed order.

    Raises:
        MetricsError: When ``realised`` is unknown.
    """
    if realised not in REALISED:
        raise MetricsError(f"realised must be one of {', '.join(REALISED)}; got {realised!r}")
    total, remaining = dense.params.total, pruned.params.remaining
    compression = _ratio(total, remaining)
    one, other = dense.storage, pruned.storage
    return [
        _row("parameters", total, pruned.params.total, "parameters", COUNTED),
        _row("nonzero parameters", dense.params.nonzero, pruned.params.nonzero, "parameters", COUNTED),
        Row("compression_ratio", 1.0, compression, compression, "x", COUNTED, "original / remaining parameters"),
        *_mac_rows(dense.macs, pruned.macs),
        _row("storage", one.size_bytes, other.size_bytes, "bytes", COUNTED, "safetensors file"),
        _row("storage deflated", one.deflate_bytes, other.deflate_bytes, "bytes", MEASURED, "zlib level 6"),
        _row("storage as CSR", one.csr_bytes, other.csr_bytes, "bytes", MODELLED),
        _row("storage as bitmask", one.bitmask_bytes, other.bitmask_bytes, "bytes", MODELLED),
        _latency_row(dense.latency, pruned.latency, realised),
        _row("weight memory", dense.memory.weight_bytes, pruned.memory.weight_bytes, "bytes", COUNTED),
        _peak_row(dense.memory, pruned.memory),
        _energy_row(dense.energy, pruned.energy, realised),
    ]


def _saved(model: nn.Module, masks: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Drop masks of parameters that the state dict does not hold."""
    saved = model.state_dict()
    return {name: mask for name, mask in (masks or {}).items() if name in saved}


def _layers(params: ParamCount, macs: MacCount | str) -> tuple[LayerProfile, ...]:
    costs = None if isinstance(macs, str) else macs.per_weight
    rows = []
    for row in params.rows:
        cost = costs.get(row.name) if costs is not None else None
        if not (row.prunable or cost or len(row.shape) > 1):
            continue
        unused = None if costs is None else 0
        rows.append(
            LayerProfile(
                row.name,
                row.shape,
                row.params,
                row.kept,
                cost.macs if cost else unused,
                cost.density_weighted if cost else unused,
            )
        )
    return tuple(rows)


def _ratio(dense: float | None, pruned: float | None) -> float | None:
    return dense / pruned if dense is not None and pruned else None


def _row(name: str, dense: float | None, pruned: float | None, unit: str, kind: str, note: str = "") -> Row:
    return Row(name, dense, pruned, _ratio(dense, pruned), unit, kind, note)


def _mac_rows(dense: MacCount | str, pruned: MacCount | str) -> list[Row]:
    names = ("macs (dense)", "macs (theoretical, density-weighted)")
    reasons = [x for x in (dense, pruned) if isinstance(x, str)]
    if isinstance(dense, str) or isinstance(pruned, str):
        ours = (None, None) if isinstance(dense, str) else (dense.dense, dense.density_weighted)
        theirs = (None, None) if isinstance(pruned, str) else (pruned.dense, pruned.density_weighted)
        return [
            Row(name, a, b, None, "macs", NOT_MEASURED, reasons[0])
            for name, a, b in zip(names, ours, theirs, strict=True)
        ]
    if dense.input != pruned.input:
        note = f"no ratio: counted on {dense.input} and on {pruned.input}"
        return [
            Row(names[0], dense.dense, pruned.dense, None, "macs", COUNTED, note),
            Row(names[1], dense.density_weighted, pruned.density_weighted, None, "macs", COUNTED, note),
        ]
    note = f"input {dense.input}"
    return [
        _row(names[0], dense.dense, pruned.dense, "macs", COUNTED, note),
        _row(
            names[1], dense.density_weighted, pruned.density_weighted, "macs", COUNTED, f"{note}; no promise of speed"
        ),
    ]


def _latency_row(dense: Latency | None, pruned: Latency | None, realised: str) -> Row:
    name, unit = "latency", "ms"
    if dense is None or pruned is None:
        ours, theirs = (None if x is None else x.median_ms for x in (dense, pruned))
        return Row(name, ours, theirs, None, unit, NOT_MEASURED, "latency of both models was not measured")
    note = f"median of {pruned.runs}, {pruned.threads} thread(s), batch {pruned.batch}, {pruned.device}, {pruned.dtype}"
    ratio = speedup(dense, pruned, realised=realised)
    if realised == "mask":
        note = f"{NOT_REALISED}; {note}"
    return Row(name, dense.median_ms, pruned.median_ms, ratio, unit, MEASURED, note)


def _peak_row(dense: Memory, pruned: Memory) -> Row:
    ours, theirs = dense.peak_rss_bytes, pruned.peak_rss_bytes
    if ours is None or theirs is None or dense.kind != pruned.kind:
        note = "; ".join(sorted({dense.kind, pruned.kind}))
        return Row("peak memory", ours, theirs, None, "bytes", NOT_MEASURED, note)
    note = "whole process" if dense.kind == MEASURED else dense.kind
    return _row("peak memory", ours, theirs, "bytes", MEASURED, note)


def _energy_row(dense: Energy | None, pruned: Energy | None, realised: str) -> Row:
    name, unit = "energy", "J"
    if dense is None or pruned is None or dense.joules is None or pruned.joules is None or dense.kind != pruned.kind:
        kinds = {"not asked for" if x is None else x.kind for x in (dense, pruned)}
        ours, theirs = (None if x is None else x.joules for x in (dense, pruned))
        return Row(name, ours, theirs, None, unit, NOT_MEASURED, "no ratio: " + "; ".join(sorted(kinds)))
    kind = MODELLED if dense.kind.startswith(MODELLED) else MEASURED
    if realised == "mask":
        return Row(name, dense.joules, pruned.joules, None, unit, kind, f"{NOT_REALISED}; {dense.kind}")
    return _row(name, dense.joules, pruned.joules, unit, kind, dense.kind)
