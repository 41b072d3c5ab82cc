"""Import torchvision beside a build of torch that its compiled extension does not fit.

torchvision's wheel on PyPI is linked against CUDA. Beside a CPU-only torch its extension does not load, and importing
the package then stops at the two operators it attaches shape functions to ("operator torchvision::nms does not exist").
Declaring these two is enough for every model that does not call them. Nothing is implemented: a model that needs a
compiled operator (`nms`, `roi_align`, ...) still stops at torchvision's own message.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


@cache
def declare() -> torch.library.Library | None:
    """Make `import torchvision` work; call it before that import, or any import that leads to it (timm, transformers).

    Returns:
        The library that holds the declarations, or None where torchvision is absent or brings its own operators.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or hasattr(torch.ops.torchvision, "nms"):
        return None
    for extension in Path(spec.origin).parent.glob("_C*"):
        try:
            torch.ops.load_library(extension)  # type: ignore[no-untyped-call]
        except (ImportError, OSError):
            continue
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema in SCHEMAS:
        library.define(schema)  # type: ignore[no-untyped-call]
    return library
