"""Real photographs without a download: Debian's Tux Paint stamps, 113 of them labelled with ImageNet classes by hand.

Install the package ``tuxpaint-stamps-default`` (GPL-2; read where the package puts it, not shipped here). The splits:

* ``test``: the 113 labelled photographs; a hit is any of a photograph's acceptable classes. One photograph is 0.9
  points, the standard error about 4.
* ``agreement``: every third of the others, for comparison with the dense model only.
* ``calibration``: the rest; the only images that scoring, batch-norm repair and distillation may see.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from secateur.errors import DataError

FOLDER = Path("/usr/share/tuxpaint/stamps")
LABELS = Path(__file__).parent / "stamps_imagenet.json"
# Drawn figures that the package tuxpaint-data adds to the same folder.
_FOREIGN = {f"cartoon/tux/tux-{n}" for n in ("drat", "kiss1", "kiss2", "yay2", "yes1", "yes2")}


def names(folder: Path = FOLDER) -> dict[str, list[str]]:
    """Return the names in each split, in a fixed order.

    Raises:
        DataError: When the package is not installed.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist; install Debian's package tuxpaint-stamps-default")
    labelled = json.loads(LABELS.read_text())
    found = {str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.png")} - _FOREIGN
    others = sorted(found - labelled.keys())
    return {
        "test": sorted(labelled),
        "agreement": [name for i, name in enumerate(others) if i % 3 == 0],
        "calibration": [name for i, name in enumerate(others) if i % 3],
    }


def load_images(wanted: list[str], folder: Path = FOLDER, *, size: int = 224) -> Tensor:
    """Return images as EfficientNet-Lite wants them: on white, padded to a square, bicubic, (x - 127) / 128.

    Args:
        wanted: Names from :func:`names`.
        folder: Where the stamps are.
        size: Side in pixels.

    Returns:
        Shape (N, 3, size, size), float32.
    """
    from PIL import Image

    out = []
    for name in wanted:
        image = Image.open(folder / f"{name}.png").convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        flat = Image.alpha_composite(white, image).convert("RGB")
        side = max(flat.size)
        square = Image.new("RGB", (side, side), (255, 255, 255))
        square.paste(flat, ((side - flat.width) // 2, (side - flat.height) // 2))
        pixels = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
        out.append(torch.from_numpy((pixels - 127.0) / 128.0).permute(2, 0, 1))
    return torch.stack(out)


def hits(logits: Tensor, wanted: list[str]) -> dict[str, float]:
    """Return top-1 and top-5 accuracy on labelled photographs.

    Args:
        logits: Shape (N, 1000).
        wanted: The photographs' names.

    Returns:
        Fractions of photographs with an acceptable class first, or among the first five.
    """
    labels = json.loads(LABELS.read_text())
    ranked = logits.topk(5, 1).indices.tolist()
    top1 = [row[0] in labels[name] for row, name in zip(ranked, wanted, strict=True)]
    top5 = [bool(set(row) & set(labels[name])) for row, name in zip(ranked, wanted, strict=True)]
    return {"top1": sum(top1) / len(top1), "top5": sum(top5) / len(top5)}
