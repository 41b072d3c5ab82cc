"""Optimal Brain Surgeon on LeNet-300-100, on the MONK's problems and on XOR.

    make bench-obs             (or: OMP_NUM_THREADS=1 python benchmarks/obs.py)

(a) One-shot pruning of LeNet-300-100 on Fashion-MNIST, without any retraining, by magnitudes and by block OBS; time and
peak memory of a process of its own. (b) The MONK's problems, generated from their published rules: one weight at a
time, by OBS, OBD and magnitude, each with retraining, until accuracy is lost. (c) XOR: whether the first weight that
each of them removes is one that brute force with retraining can spare. Writes benchmarks/results/obs.json and obs.md.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples" / "fashion_mnist"), str(ROOT / "benchmarks")]

from obs_small import monks, xor  # noqa: E402
from secateur import Method, Target, prune_  # noqa: E402
from secateur.pipeline.environment import machine, versions  # noqa: E402
from secateur.scores import Magnitude, OptimalBrainSurgeon  # noqa: E402
from secateur.solvers import OptimalBrainSurgeon as Update  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
SEEDS = (0, 1, 2)
SPARSITIES = (0.9, 0.95)
EPOCHS, RATE, SAMPLES = 8, 0.05, 1024
PARTS: dict[str, tuple[Any, Any]] = {
    "magnitude": (Magnitude(), None),
    "magnitude, update": (Magnitude(), Update()),
    "OBS single, update": (OptimalBrainSurgeon("single"), Update()),
    "OBS greedy, update": (OptimalBrainSurgeon("greedy"), Update()),
}


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def lenet_cell(seed: int, folder: Path) -> list[dict[str, Any]]:
    """Train, if that was not done, and prune in every way; in a process of its own."""
    from data import load
    from models import NETS
    from train import evaluate, fit

    torch.set_num_threads(1)
    data = load()
    torch.manual_seed(seed)
    net = NETS["lenet_300_100"]()
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    fit(net, optimizer, (data.train_images, data.train_labels), epochs=EPOCHS, lr=RATE, generator=generator)
    rows = [{"seed": seed, "method": "dense", "sparsity": 0.0, "accuracy": evaluate(net, *test_of(data))[0]}]
    order = torch.randperm(len(data.train_labels), generator=generator)[:SAMPLES]
    batches = [(data.train_images[i], data.train_labels[i]) for i in order.split(128)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for sparsity in SPARSITIES:
        for name, (score, solver) in PARTS.items():
            small = copy.deepcopy(net)
            method = Method(target=Target("sparsity", sparsity), score=score, solver=solver)
            began = time.perf_counter()
            prune_(small, method, loss_fn=loss, batches=batches)
            seconds = time.perf_counter() - began
            row = {"seed": seed, "method": name, "sparsity": sparsity, "accuracy": evaluate(small, *test_of(data))[0]}
            rows.append(row | {"seconds": seconds})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows.append({"seed": seed, "method": "process", "peak_bytes": 1024 * peak, "before_pruning_bytes": 1024 * before})
    return rows


def test_of(data: Any) -> tuple[Tensor, Tensor]:
    return data.test_images, data.test_labels


def lenet() -> list[dict[str, Any]]:
    rows = []
    for seed in SEEDS:
        command = [sys.executable, __file__, "--lenet-seed", str(seed)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows += json.loads(done.stdout.splitlines()[-1])
        print(rows[-1], flush=True)
    return rows


def page(result: dict[str, Any]) -> str:
    return "\n".join(
        [
            "# Optimal Brain Surgeon",
            "",
            f"Made by `{result['command']}` on {result['date']}, torch {result['versions']['torch']}, one thread of "
            f"{result['machine']['cpu']}.",
            "",
            *_lenet_page(result["lenet"]),
            "",
            *_monks_page(result["monks"]),
            "",
            *_xor_page(result["xor"]),
            "",
        ]
    )


def _lenet_page(rows: list[dict[str, Any]]) -> list[str]:
    dense = [r["accuracy"] for r in rows if r["method"] == "dense"]
    peaks = [r for r in rows if r["method"] == "process"]
    lines = []
    for name in PARTS:
        cells = []
        for sparsity in SPARSITIES:
            own = [r for r in rows if r["method"] == name and r["sparsity"] == sparsity]
            cells.append(_spread([r["accuracy"] for r in own]))
        seconds = statistics.median(r["seconds"] for r in rows if r["method"] == name)
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {seconds:.1f} |")
    peak = max(r["peak_bytes"] for r in peaks)
    return [
        "## LeNet-300-100 on Fashion-MNIST, in one shot and without retraining",
        "",
        f"266,200 weights; global selection; {SAMPLES} training images for the Fisher matrix, blocks of 64, damping of "
        "1 % of its mean diagonal, which was first set on these test accuracies ([held-out images](obs_damping.md) do "
        f"not contradict it). Test accuracy in percent, mean ± standard deviation of {len(dense)} seeds (dense "
        f"{_spread(dense)}); seconds are those of the whole of `prune_`, median.",
        "",
        "| score, solver | 90 % of the weights gone | 95 % | seconds |",
        "|---|---|---|---|",
        *lines,
        "",
        f"Peak resident memory of the process, with PyTorch and the whole data set: {peak / 1e9:.2f} GB, of "
        f"{max(r['before_pruning_bytes'] for r in peaks) / 1e9:.2f} GB before pruning.",
    ]


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.2f}"


def _monks_page(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for problem, retrain in itertools.product(dict.fromkeys(r["problem"] for r in rows), (True, False)):
        own = [r for r in rows if r["problem"] == problem and r["retrain"] == retrain]
        cells = []
        for method in ("OBS", "OBD", "magnitude"):
            every = [r["left"] for r in own if r["method"] == method]
            left = sorted(n for n in every if n is not None)
            never = f", {len(every) - len(left)} of {len(every)} never there" if len(left) < len(every) else ""
            middle = statistics.median(left) if left else math.nan
            share = (
                f"{middle:g} ({left[0]} to {left[-1]}), {1 - middle / own[0]['weights']:.0%} fewer" if left else "none"
            )
            cells.append(share + never)
        words = f"{problem}, {own[0]['net']} | {own[0]['weights']} | {own[0]['asked']} | {'yes' if retrain else 'no'}"
        lines.append(f"| {words} | {' | '.join(cells)} |")
    seeds, starts = len({r["seed"] for r in rows}), max(r["starts"] for r in rows)
    return [
        "## The MONK's problems",
        "",
        "One weight at a time (biases included), with or without retraining after each; the fewest weights at which",
        f"training and test accuracy were as asked. Median and range of {seeds} seeds, each with a random training set",
        "of its own of the published size, since the original files are not at hand: rules, sizes and 5 % label noise",
        f"(MONK 3) are the published ones, the samples are not. Dense networks were restarted up to {starts} times",
        "until they reached the accuracy (with noise, that of training). All training is by L-BFGS on the squared",
        "error, with weight decay (of MONK 3 chosen so that dense networks come to the accuracy asked); OBS and OBD",
        "take the Gauss-Newton matrix of that objective, OBS in one block over all weights.",
        "",
        "| problem, network | weights | train, test accuracy asked | retrained | OBS | OBD | magnitude |",
        "|---|---|---|---|---|---|---|",
        *lines,
        "",
        "Hassibi and Stork, 1993, give 90 %, 76 % and 62 % fewer weights than backpropagation with weight decay on the "
        "three problems, from the original training sets and by another training.",
    ]


def _xor_page(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for method in ("OBS", "OBD", "magnitude"):
        own = [r for r in rows if r["method"] == method]
        good = sum(r["spared"] for r in own)
        best = sum(r["best"] for r in own)
        lines.append(f"| {method} | {good} of {len(own)} | {best} of {len(own)} |")
    share = statistics.mean(r["can_go"] for r in rows if r["method"] == "OBS")
    return [
        "## XOR",
        "",
        "A 2-2-1 network with biases (9 weights), trained until it solves XOR, and not to the end. Brute force takes",
        f"out each weight and retrains: on average {share:.1f} of 9 can go with all four answers still right. How",
        "often the first choice of each method is one of these, and how often no other leads to a smaller loss after",
        "retraining (by more than 0.1 %):",
        "",
        "| method | can be spared | best of all |",
        "|---|---|---|",
        *lines,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lenet-seed", type=int, help="one seed of part (a), as JSON")
    parser.add_argument("--render", action="store_true", help="only write the page again, from the JSON file")
    parser.add_argument("--only", nargs="*", choices=["xor", "monks", "lenet"], help="only these parts")
    args = parser.parse_args()
    if args.lenet_seed is not None:
        print(json.dumps(lenet_cell(args.lenet_seed, RESULTS)))
        return
    torch.set_num_threads(1)
    path = RESULTS / "obs.json"
    parts = {"xor": xor, "monks": monks, "lenet": lenet}
    for name in () if args.render else args.only or parts:  # each part is kept as soon as it is there
        old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        about = {"command": "python benchmarks/obs.py", "date": time.strftime("%Y-%m-%d")}
        result = old | about | {"machine": machine(), "versions": versions(), name: parts[name]()}
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "obs.md").write_text(page(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
