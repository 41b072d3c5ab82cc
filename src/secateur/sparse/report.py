"""What compiling chose for each layer, with the measurements behind it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Attributes:
        name: Of the module.
        shape: Of its weight; empty where it has none.
        sparsity: Part of its weights that is zero.
        choice: What it runs as.
        dense_ms: Measured with cold caches, dense; NaN where it was not measured because it has too few zeros.
        sparse_ms: The fastest sparse way, chosen or not.
        dense_bytes: Of the dense weight.
        bytes: Of the weight as it is kept now.
        activation: What was taken into the call.
        residual: Whether a residual sum was.
        cached: Whether the times are those of an earlier run.
    """

    name: str
    shape: tuple[int, ...]
    sparsity: float
    choice: str
    dense_ms: float
    sparse_ms: float
    dense_bytes: int
    bytes: int
    activation: str
    residual: bool
    cached: bool


@dataclass
class CompileReport:
    """A whole compiled model.

    Attributes:
        layers: In the model's order.
        threads: That everything was measured with.
        isa: Instruction set of the kernels, or ``torch`` where they are missing.
        traced: Whether the model's graph could be traced, so that residual sums were taken in too.
        folded: Batch norms that were folded into weights.
        difference: Of the answers, relative to the largest.
        dense_ms: Median of the whole dense model; ``None`` where it was not measured.
        sparse_ms: Median of the whole compiled model, measured side by side.
        gave_up: Whether the dense model was returned because it was faster.
        left: Weights with many zeros that no kernel runs, with the reason.
    """

    layers: list[LayerReport]
    threads: int
    isa: str
    traced: bool
    folded: int
    difference: float = 0.0
    dense_ms: float | None = None
    sparse_ms: float | None = None
    gave_up: bool = False
    left: dict[str, str] = field(default_factory=dict)

    @property
    def speedup(self) -> float | None:
        """Dense over compiled, above 1 is faster; ``None`` where it was not measured."""
        return self.dense_ms / self.sparse_ms if self.dense_ms and self.sparse_ms else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self) | {"layers": [_plain(asdict(layer)) for layer in self.layers], "speedup": self.speedup}

    def __str__(self) -> str:
        lines = [f"{'layer':<28} {'zeros':>5} {'dense ms':>8} {'sparse':>8} {'gain':>5}  runs as"]
        for layer in self.layers:
            name = layer.name if len(layer.name) <= 28 else "…" + layer.name[-27:]
            times = f"{'':>8} {'':>8} {'':>5}"
            if not math.isnan(layer.dense_ms):
                times = f"{layer.dense_ms:8.3f} {layer.sparse_ms:8.3f} {layer.dense_ms / layer.sparse_ms:5.2f}"
            zeros = f"{layer.sparsity:.0%}" if layer.shape else ""
            lines.append(f"{name:<28} {zeros:>5} {times}  {layer.choice}")
        lines += [f"{name}: dense, {reason}" for name, reason in self.left.items()]
        return "\n".join([*lines, *self.summary()])

    def summary(self) -> list[str]:
        """Return the whole model in one or two sentences."""
        dense, now = (sum(getattr(layer, what) for layer in self.layers) for what in ("dense_bytes", "bytes"))
        weighted = [layer for layer in self.layers if layer.shape]
        packed = sum(layer.choice not in ("dense", "kernel") for layer in weighted)
        lines = [
            f"{packed} of {len(weighted)} layers packed, weights {dense / 2**20:.1f} -> {now / 2**20:.1f} MiB; "
            f"{self.folded} batch norms folded; answers differ by {self.difference:.0e}; measured with "
            f"{self.threads} thread{'s' * (self.threads > 1)}, {self.isa}"
        ]
        if self.speedup is not None:
            end = ": slower, so the dense model is returned" if self.gave_up else ""
            lines.append(f"whole model {self.dense_ms:.2f} -> {self.sparse_ms:.2f} ms, {self.speedup:.2f}x{end}")
        return lines


def _plain(layer: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in layer.items()
    }
