"""The damping of Optimal Brain Surgeon, on images that neither training nor the choice of anything else has seen.

    make bench-obs-damping     (or: OMP_NUM_THREADS=1 python benchmarks/obs_damping.py)

LeNet-300-100 on the first 50,000 training images of Fashion-MNIST, pruned in one shot as in benchmarks/obs.py; accuracy
on the last 10,000 training images. No test image is looked at. Writes benchmarks/results/obs_damping.json and .md.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples" / "fashion_mnist"), str(ROOT / "benchmarks")]

from obs import EPOCHS, RATE, SAMPLES, SPARSITIES, loss  # noqa: E402
from secateur import Method, Target, prune_  # noqa: E402
from secateur.pipeline.environment import machine, versions  # noqa: E402
from secateur.scores import OptimalBrainSurgeon  # noqa: E402
from secateur.solvers import OptimalBrainSurgeon as Update  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
SEEDS = (10, 11)
HELD_OUT = 10_000
DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0)


def cells(seed: int) -> list[dict[str, Any]]:
    """Train once, and prune with every damping."""
    from data import load
    from models import NETS
    from train import evaluate, fit

    data = load()
    images, labels = data.train_images[:-HELD_OUT], data.train_labels[:-HELD_OUT]
    torch.manual_seed(seed)
    net = NETS["lenet_300_100"]()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE, momentum=0.9)
    fit(net, optimizer, (images, labels), epochs=EPOCHS, lr=RATE, generator=generator)
    order = torch.randperm(len(labels), generator=generator)[:SAMPLES]
    batches = [(images[i], labels[i]) for i in order.split(128)]
    rows = []
    for damping in DAMPINGS:
        for sparsity in SPARSITIES:
            small = copy.deepcopy(net)
            parts = OptimalBrainSurgeon(damping=damping), Update(damping=damping)
            method = Method(target=Target("sparsity", sparsity), score=parts[0], solver=parts[1])
            prune_(small, method, loss_fn=loss, batches=batches)
            accuracy = evaluate(small, data.train_images[-HELD_OUT:], data.train_labels[-HELD_OUT:])[0]
            rows.append({"seed": seed, "damping": damping, "sparsity": sparsity, "accuracy": accuracy})
            print(rows[-1], flush=True)
    return rows


def page(result: dict[str, Any]) -> str:
    """Return the results in Markdown."""
    lines = []
    for damping in DAMPINGS:
        own = [[r for r in result["rows"] if (r["damping"], r["sparsity"]) == (damping, s)] for s in SPARSITIES]
        values = [[r["accuracy"] for r in rows] for rows in own]
        shown = [f"{statistics.mean(v):.2f} ({', '.join(f'{x:.2f}' for x in v)})" for v in values]
        lines.append(f"| {damping:g} | {' | '.join(shown)} |")
    return "\n".join(
        [
            "# The damping of Optimal Brain Surgeon",
            "",
            f"Made by `{result['command']}` on {result['date']}, torch {result['versions']['torch']}, one thread of "
            f"{result['machine']['cpu']}.",
            "",
            f"LeNet-300-100 trained on 50,000 images, greedy score and update with {SAMPLES} of them, in one shot and",
            f"without retraining; accuracy in percent on the {HELD_OUT:,} training images that were held out, mean and",
            "both seeds. The damping is a share of the mean diagonal.",
            "",
            "| damping | 90 % of the weights gone | 95 % |",
            "|---|---|---|",
            *lines,
            "",
        ]
    )


def main() -> None:
    """Run and write."""
    torch.set_num_threads(1)
    rows = [row for seed in SEEDS for row in cells(seed)]
    result = {
        "command": "python benchmarks/obs_damping.py",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": versions(),
        "rows": rows,
    }
    (RESULTS / "obs_damping.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "obs_damping.md").write_text(page(result))


if __name__ == "__main__":
    main()
