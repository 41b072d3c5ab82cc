"""Memory: exact bytes of the weights, and the measured peak of a real forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from secateur.metrics.latency import inference, input_tensors

_PROC = Path("/proc/self")
_SLACK_BYTES = 1 << 20
"""The kernel batches its counters per thread, so that peak and current size differ by some pages even after a reset."""


@dataclass(frozen=True)
class Memory:
    """Memory of a model and of one forward.

    Attributes:
        weight_bytes: Bytes of all parameters and buffers, counted; shared memory once.
        peak_rss_bytes: Measured peak: resident set of the whole process (interpreter and libraries included),
            or bytes from torch's allocator on CUDA. ``None`` where it cannot be measured.
        kind: ``"measured"``, ``"measured (CUDA allocator)"`` or ``"not measured: reason"``.
    """

    weight_bytes: int
    peak_rss_bytes: int | None
    kind: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {"weight_bytes": self.weight_bytes, "peak_rss_bytes": self.peak_rss_bytes, "kind": self.kind}


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of memory that parameters and buffers hold.

    A parameter that is a view holds all of its storage; several views of one storage hold it once. Buffers
    that are not saved count too.

    Args:
        model: Any module.

    Returns:
        Bytes.
    """
    sizes: dict[object, int] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.layout != torch.strided or is_traceable_wrapper_subclass(tensor):
            sizes[id(tensor)] = tensor.numel() * tensor.element_size()
            continue
        storage = tensor.untyped_storage()
        place = storage.data_ptr() or ("storage", storage._cdata)
        sizes[tensor.device, place] = storage.nbytes()
    return sum(sizes.values())


def measure_memory(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None, *, proc: Path = _PROC
) -> Memory:
    """Run one forward and read its peak.

    On CUDA ``torch.cuda.max_memory_allocated`` after a reset of the peak. Elsewhere the kernel's high-water mark
    (``VmHWM`` of ``/proc/self/status``), which writing ``5`` to ``/proc/self/clear_refs`` sets back to the
    current size first. The mark covers the whole process, so compare peaks of one process only.

    Args:
        model: The model; its training flags are restored.
        args: Positional inputs.
        kwargs: Keyword inputs.
        proc: Folder of the process's files.

    Returns:
        Weight bytes and the peak.
    """
    tensors = input_tensors(args, kwargs)
    size = weight_bytes(model)
    cuda = next((t.device for t in tensors if t.is_cuda), None)
    if cuda is not None:
        torch.cuda.synchronize(cuda)
        torch.cuda.reset_peak_memory_stats(cuda)
        _forward(model, args, kwargs)
        torch.cuda.synchronize(cuda)
        return Memory(size, torch.cuda.max_memory_allocated(cuda), "measured (CUDA allocator)")
    reason = _reset_peak(proc)
    if reason:
        return Memory(size, None, f"not measured: {reason}")
    _forward(model, args, kwargs)
    return Memory(size, _status_bytes(proc, "VmHWM"), "measured")


def _forward(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> None:
    with inference([model]):
        output: Tensor | object = model(*args, **dict(kwargs or {}))
    del output


def _reset_peak(proc: Path) -> str:
    """Set the high-water mark back; return why not, or nothing."""
    try:
        (proc / "clear_refs").write_text("5")
        excess = _status_bytes(proc, "VmHWM") - _status_bytes(proc, "VmRSS")
    except OSError as error:
        return f"{error.filename or proc}: {error.strerror or error}"
    except KeyError as error:
        return f"{proc / 'status'} has no line {error}"
    # Some sandboxes accept the write and ignore it: then the old peak still stands.
    return f"the kernel did not reset VmHWM ({excess} bytes above VmRSS)" if excess > _SLACK_BYTES else ""


def _status_bytes(proc: Path, field: str) -> int:
    for line in (proc / "status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024  # the kernel writes "kB" and means KiB
    raise KeyError(field)
