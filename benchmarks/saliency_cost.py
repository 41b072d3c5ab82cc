"""What a saliency costs, in backward passes: ratios measured in one run, interleaved, medians.

    make bench-saliency       (or: OMP_NUM_THREADS=1 python benchmarks/saliency_cost.py)

The time to collect a statistic over some batches, divided by that of one plain backward pass by the same weights over
the same batches. LeNet-300-100 and LeNet-5 (the Caffe variant), 512 random images in batches of 128, cross-entropy.

Writes benchmarks/results/saliency_cost.json and saliency_cost.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.pipeline.environment import machine, versions
from secateur.stats import FisherDiagonal, HessianGradient, HutchinsonDiagonal, collect_gradients
from secateur.types import Source, Statistic
from speed import interleaved, ratio

RESULTS = Path(__file__).parent / "results"
GOAL = 3.0

EXACT = {
    "fisher, layers": FisherDiagonal("layers"),
    "fisher, vmap": FisherDiagonal("vmap"),
    "fisher, loop": FisherDiagonal("loop"),
}
OTHERS: dict[str, Statistic] = {
    "Hessian times gradient": HessianGradient(),
    "Hutchinson, one product": HutchinsonDiagonal(samples=1, negatives="keep"),
}


def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "LeNet-300-100": nn.Sequential(
            nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
        ),
        "LeNet-5": nn.Sequential(
            nn.Conv2d(1, 20, 5),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(20, 50, 5),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(800, 500),
            nn.ReLU(),
            nn.Linear(500, 10),
        ),
    }


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def measure(model: nn.Module, images: int, runs: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(images, 1, 28, 28, generator=generator), torch.randint(0, 10, (images,), generator=generator)
    data = list(zip(x.split(128), y.split(128), strict=True))
    parameters = dict(model.named_parameters())
    source = Source(model, parameters, loss_fn, lambda: data)

    def plain() -> None:
        for batch in data:
            torch.autograd.grad(loss_fn(model, batch), list(parameters.values()))

    def collected(statistic: Statistic) -> Callable[[], object]:
        return lambda: statistic.collect(source)

    rivals: dict[str, Callable[[], object]] = {"backward": plain}
    rivals["mean gradient"] = lambda: collect_gradients(model, parameters, loss_fn, data, needs=["gradient"])
    rivals["fisher, layers"] = collected(EXACT["fisher, layers"])
    cheap = interleaved(rivals, runs=5 * runs, warmup=1)
    slow = {name: collected(statistic) for name, statistic in (EXACT | OTHERS).items() if name not in rivals}
    dear = interleaved({"backward": plain, **slow}, runs=runs, warmup=1)
    ratios = {name: ratio(cheap, name, "backward") for name in rivals if name != "backward"}
    ratios |= {name: ratio(dear, name, "backward") for name in slow}
    found = {name: statistic.collect(source) for name, statistic in EXACT.items()}
    want = found["fisher, loop"]
    apart = {
        name: max(float((own[n] - want[n]).abs().max() / want[n].abs().max()) for n in want)
        for name, own in found.items()
    }
    return {
        "weights": sum(p.numel() for p in parameters.values()),
        "rivals": ratios,
        "largest_difference_from_the_loop": apart,
    }


def page(result: dict[str, Any]) -> str:
    names = list(result["networks"])
    rivals = list(result["networks"][names[0]]["rivals"])
    head = "| collected | " + " | ".join(f"{n} ({result['networks'][n]['weights']:,} weights)" for n in names) + " |"
    lines = [head, "|---|" + "---|" * len(names)]
    for rival in rivals:
        cells = (result["networks"][n]["rivals"][rival] for n in names)
        spread = (f"{c['ratio_of_medians']:.2f} ({c['ratio_p10']:.2f} to {c['ratio_p90']:.2f})" for c in cells)
        lines.append(f"| {rival} | " + " | ".join(spread) + " |")
    backward = ", ".join(
        f"{n} {result['networks'][n]['rivals'][rivals[0]]['backward_median_s'] * 1e3:.0f} ms" for n in names
    )
    worst = max(max(v["largest_difference_from_the_loop"].values()) for v in result["networks"].values())
    return (
        "# What a saliency costs\n\n"
        f"Made by `{result['command']}` on {result['date']}: {result['machine']['cpu']}, "
        f"{result['machine']['cores']} cores, {result['threads']} thread, torch {result['versions']['torch']}. "
        f"{result['images']} random images in batches of 128. Rivals interleaved in one process, "
        f"{5 * result['runs']} rounds for the first two rows and {result['runs']} for the others, medians. "
        "Shared machine: read the ratios, not the seconds.\n\n"
        "Times one plain backward pass by the same weights over the same batches (in brackets the tenth and the "
        f"ninetieth percentile of single rounds; the backward itself: {backward}):\n\n"
        + "\n".join(lines)
        + "\n\nThe three ways to the Fisher diagonal compute the same: the largest difference from going sample "
        f"by sample is {worst:.1e} of a tensor's largest value. The goal is at most {GOAL:g} backward passes: "
        f'{"met" if result["met"] else "not met"} by `per_sample = "layers"`, the default.\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument(
        "--runs", type=int, default=5, help="rounds of the slow rivals; the others run five times as many"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {name: measure(model, arguments.images, arguments.runs) for name, model in networks().items()}
    result = {
        "command": "make bench-saliency",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": versions(),
        "threads": 1,
        "seeds": [0, 1],
        "images": arguments.images,
        "runs": arguments.runs,
        "goal": GOAL,
        "networks": found,
        "met": all(v["rivals"]["fisher, layers"]["ratio_of_medians"] <= GOAL for v in found.values()),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "saliency_cost.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / "saliency_cost.md").write_text(page(result))
    print(page(result))


if __name__ == "__main__":
    main()
