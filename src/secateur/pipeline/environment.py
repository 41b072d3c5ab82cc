"""What a figure depends on besides the code: versions and the machine."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import torch

from secateur import __version__
from secateur._cpu import cpu_name


def versions() -> dict[str, str]:
    """Return the versions of what the figures depend on."""
    out = {"secateur": __version__, "python": platform.python_version()}
    for package in ("torch", "numpy", "safetensors", "onnx", "onnxruntime"):
        try:
            out[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return out


def machine() -> dict[str, Any]:
    """Describe the machine, as far as it says."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None
    return {
        "cpu": cpu_name("model name"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": pages,
        "os": f"{platform.system()} {platform.machine()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
