"""Energy per call: measured by the machine's own counters, or modelled, and always labelled as which."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur.errors import MetricsError

POWERCAP = Path("/sys/class/powercap")
MODELLED = "modelled (Horowitz 2014, 45 nm)"
ADD_JOULES = 0.9e-12
MUL_JOULES = 3.7e-12
DRAM_JOULES_PER_WORD = 640e-12
"""Of one 32-bit word."""

_IDLE_SECONDS = 0.5
_SAMPLE_SECONDS = 0.1
"""Between counter readings: far below the minute or more in which a RAPL counter wraps."""


@dataclass(frozen=True)
class Energy:
    """Energy of one call.

    Attributes:
        joules: Per call, idle power included. ``None`` where it can be neither measured nor modelled.
        kind: ``"measured (RAPL)"``, ``"measured (NVML)"``, ``"modelled (...)"`` or ``"not measured: reason"``.
        calls: Calls measured.
        seconds: Time they took.
        idle_watts: Power of the idle machine just before, where measured.
        net_joules: Per call, idle power taken off, never below 0, where measured.
        note: Why it is not measured, where it is not.
    """

    joules: float | None
    kind: str
    calls: int = 0
    seconds: float = 0.0
    idle_watts: float | None = None
    net_joules: float | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {"joules": self.joules, "kind": self.kind}


@dataclass(frozen=True)
class _Meter:
    """Counters in microjoules; ``wraps`` is where each starts again from 0."""

    kind: str
    read: Callable[[], tuple[int, ...]]
    wraps: tuple[int, ...]


def measure_energy(
    fn: Callable[[], object],
    *,
    device: torch.device | str = "cpu",
    macs: float | None = None,
    weight_bytes: int = 0,
    seconds: float = 1.0,
    root: Path = POWERCAP,
) -> Energy:
    """Measure the energy of one call, or model it where the machine has no readable counter.

    CPU: RAPL, packages and memory, for the whole machine. CUDA: NVML's energy counter of that GPU. The calls
    repeat for ``seconds``; half a second of idling before gives the idle power. Where there is no counter nothing
    runs, and the energy is that of :func:`modelled_joules`.

    Args:
        fn: The call.
        device: Where its work is done.
        macs: Multiply-accumulates per call that the hardware really does (dense ones for a mere mask).
        weight_bytes: Bytes of weights read per call.
        seconds: How long to repeat, at least 1.
        root: Folder of the power capping zones.

    Returns:
        Energy per call, and its kind.

    Raises:
        MetricsError: When ``seconds`` is below 1.
    """
    if seconds < 1:
        raise MetricsError(f"energy needs seconds >= 1 (counters tick slowly), got {seconds}")
    where = torch.device(device)
    meter = _nvml(where) if where.type == "cuda" else _rapl(root)
    if isinstance(meter, _Meter):
        result = _measure(fn, meter, seconds, _IDLE_SECONDS, where)
        if result is not None:
            return result
        meter = f"the {meter.kind.split('(')[-1].rstrip(')')} counter did not move in {seconds} s"
    if macs is None:
        return Energy(None, f"not measured: {meter}, and no MACs to model it from", note=meter)
    return Energy(modelled_joules(macs, weight_bytes), MODELLED, note=meter)


def modelled_joules(macs: float, weight_bytes: int) -> float:
    r"""Model the energy of one forward in float32 on a 45 nm chip.

    .. math:: E = \text{macs}\,(e_\text{mul} + e_\text{add}) + \frac{\text{weight bytes}}{4}\, e_\text{DRAM}

    with 3.7 pJ per multiplication, 0.9 pJ per addition and 640 pJ per 32-bit word read from DRAM, each weight read
    once. Activations, caches and control are left out: it ranks models, it does not predict a meter.

    Args:
        macs: Multiply-accumulates.
        weight_bytes: Bytes of weights.

    Returns:
        Joules, modelled.

    References:
        Horowitz, Computing's energy problem (and what we can do about it), 2014.
    """
    return macs * (MUL_JOULES + ADD_JOULES) + weight_bytes / 4 * DRAM_JOULES_PER_WORD


def _measure(
    fn: Callable[[], object], meter: _Meter, seconds: float, idle_seconds: float, device: torch.device
) -> Energy | None:
    """Measure idle power, then repeat the call; nothing when the counter stood still."""
    fn()
    _sync(device)
    idle_uj, idle_time, _ = _watch(lambda: time.sleep(idle_seconds), meter, 0.0, device)
    total_uj, elapsed, calls = _watch(fn, meter, seconds, device)
    if total_uj == 0:
        return None
    watts = idle_uj / 1e6 / idle_time
    joules = total_uj / 1e6 / calls
    net = max(0.0, joules - watts * elapsed / calls)
    return Energy(joules, meter.kind, calls, elapsed, watts, net)


def _watch(fn: Callable[[], object], meter: _Meter, seconds: float, device: torch.device) -> tuple[int, float, int]:
    """Call until the time is up; return microjoules, seconds and calls."""
    total, calls, before = 0, 0, meter.read()
    start = last = time.perf_counter()
    while True:
        fn()
        calls += 1
        now = time.perf_counter()
        done = now - start >= seconds
        if done or now - last >= _SAMPLE_SECONDS:
            _sync(device)  # queued kernels belong to the calls counted so far
            after = meter.read()
            total += sum(_delta(a, b, wrap) for a, b, wrap in zip(before, after, meter.wraps, strict=True))
            before, last = after, now
        if done:
            return total, time.perf_counter() - start, calls


def _delta(before: int, after: int, wrap: int) -> int:
    """Return what a counter has grown by, over at most one wrap."""
    return after - before if after >= before else after - before + wrap


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rapl(root: Path) -> _Meter | str:
    """Find the package and memory zones; return a reason where none can be read.

    Cores and graphics lie within a package, ``psys`` around it, and the mmio zones repeat it: not added.
    """
    zones: list[tuple[Path, int]] = []
    for zone in sorted(root.glob("*/energy_uj")) if root.is_dir() else []:
        if zone.parent.name.startswith("intel-rapl-mmio"):
            continue
        try:
            name = (zone.parent / "name").read_text().strip()
            if not name.startswith(("package", "dram")):
                continue
            int(zone.read_text())  # readable by root only since 2020
            zones.append((zone, int((zone.parent / "max_energy_range_uj").read_text())))
        except (OSError, ValueError) as error:
            return f"RAPL cannot be read ({error})"
    if not zones:
        return f"no RAPL counter under {root}"
    files = tuple(zone for zone, _ in zones)
    # A counter runs from 0 up to and including its range.
    return _Meter(
        "measured (RAPL)", lambda: tuple(int(f.read_text()) for f in files), tuple(top + 1 for _, top in zones)
    )


def _nvml(device: torch.device) -> _Meter | str:
    """Open the GPU's energy counter; return a reason where there is none."""
    try:
        import pynvml
    except ImportError:
        return "NVML needs the package 'nvidia-ml-py': pip install 'secateur[energy]'"
    try:
        pynvml.nvmlInit()
        # By UUID: CUDA_VISIBLE_DEVICES renumbers what torch sees, not what NVML sees.
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except (pynvml.NVMLError, RuntimeError, AssertionError) as error:
        return f"NVML has no energy counter here ({error})"
    return _Meter(
        "measured (NVML)", lambda: (int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) * 1000,), (2**64 * 1000,)
    )
