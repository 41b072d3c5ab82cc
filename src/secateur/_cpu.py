"""The processor's name, as far as the machine says."""

from __future__ import annotations

import functools
import platform
from pathlib import Path


@functools.cache
def cpu_name(*fields: str) -> str:
    """Return the first of some fields of ``/proc/cpuinfo``, or what Python knows where there is none.

    Args:
        fields: Their names: ``"model name"`` on x86, ``"CPU part"`` on Arm.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    found = (line.partition(":")[2].strip() for line in lines if line.startswith(fields))
    return next(found, "") or platform.processor() or platform.machine()
