"""Three made-up runs as `secateur run` would leave them: two masked, one physically cut; 12 epochs and more each."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

from secateur.report import RunRecord

LAYERS = {
    "conv1.weight": ((32, 3, 3, 3), 28 * 28),
    "conv2.weight": ((64, 32, 3, 3), 14 * 14),
    "conv3.weight": ((128, 64, 3, 3), 7 * 7),
    "fc1.weight": ((256, 1152), 1),
    "fc2.weight": ((10, 256), 1),
}
BIASES = 32 + 64 + 128 + 256 + 10
N = 1000


def numel(name: str) -> int:
    return math.prod(LAYERS[name][0])


TOTAL = sum(numel(name) for name in LAYERS)
MACS = sum(numel(name) * places for name, (_, places) in LAYERS.items())


def profile(
    kept: dict[str, int], *, cut: bool = False, latency_ms: float = 2.41, peak: int | None = None
) -> dict[str, Any]:
    nonzero = sum(kept.values()) + BIASES
    left = sum(kept.values()) if cut else TOTAL
    weighted = sum(kept[name] * places for name, (_, places) in LAYERS.items())
    return {
        "params": {"total": left + BIASES, "nonzero": nonzero, "prunable": left, "prunable_kept": sum(kept.values())},
        "macs": {
            "dense": weighted if cut else MACS,
            "density_weighted": weighted,
            "input": "float32[1, 3, 28, 28]",
            "uncounted": {"aten.relu": 4, "aten.max_pool2d_with_indices": 2},
        },
        "layers": [
            {
                "name": name,
                "shape": list(shape),
                "params": numel(name),
                "kept": kept[name],
                "macs": numel(name) * places,
                "density_weighted_macs": kept[name] * places,
            }
            for name, (shape, places) in LAYERS.items()
        ],
        "storage": {
            "size_bytes": 4 * (left + BIASES) + 904,
            "deflate_bytes": int(3.7 * nonzero) + 2_000,
            "modelled": {"csr_bytes": 8 * nonzero, "bitmask_bytes": 4 * nonzero + TOTAL // 8},
        },
        "latency": {
            "median_ms": latency_ms,
            "p10_ms": 0.96 * latency_ms,
            "p90_ms": 1.11 * latency_ms,
            "runs": 50,
            "warmup": 10,
            "threads": 1,
            "batch": 1,
            "device": "cpu",
            "dtype": "float32",
        },
        "memory": {
            "weight_bytes": 4 * (left + BIASES),
            "peak_rss_bytes": peak,
            "kind": "measured" if peak else "not measured: the kernel did not reset VmHWM",
        },
        "energy": {"joules": 2.9e-3 * weighted / MACS if cut else 2.9e-3, "kind": "modelled (Horowitz 2014, 45 nm)"},
    }


def histogram(name: str, kept: int, bins: int = 40) -> dict[str, list[float]]:
    """A bell before; what is left after the smallest values went, out of the middle."""
    total, width = numel(name), 1.8 / math.sqrt(math.prod(LAYERS[name][0][1:]))
    shares = [math.exp(-((i - bins / 2 + 0.5) ** 2) / (bins * 1.1)) for i in range(bins)]
    dense = [int(total * share / sum(shares)) for share in shares]
    dense[bins // 2] += total - sum(dense)
    pruned, left = [0] * bins, kept
    for i in sorted(range(bins), key=lambda i: -abs(i - bins / 2 + 0.5)):
        pruned[i] = min(dense[i], left)
        left -= pruned[i]
    return {"edges": [width * (2 * i / bins - 1) for i in range(bins + 1)], "dense": dense, "pruned": pruned}


def result(name: str, kept: dict[str, int], asked: float, recipe: dict[str, Any], **fields: Any) -> dict[str, Any]:
    removed = 1 - sum(kept.values()) / TOTAL
    layers = [
        {"name": n, "shape": list(LAYERS[n][0]), "total": numel(n), "kept": kept[n], "sparsity": 1 - kept[n] / numel(n)}
        for n in LAYERS
    ]
    base = {
        "schema": 1,
        "name": name,
        "task": "classification",
        "higher_is_better": {"accuracy": True, "loss": False},
        "recipe": recipe,
        "recipe_text": f'version = 1\nname = "{name}"\nseed = 7\n\n[prune.target]\nsparsity = {asked}\n',
        "seed": 7,
        "command": "secateur run recipe.toml --out runs/first",
        "started": "2025-03-01T09:30:00+00:00",
        "seconds": 83.4,
        "versions": {"secateur": "0.1.0", "python": "3.12.4", "torch": "2.13.0"},
        "machine": {"cpu": "Example CPU", "cores": 8, "threads": 1, "memory_bytes": 2**34, "os": "Linux", "gpu": None},
        "quality": {
            "dense": {"loss": 0.0712, "accuracy": 0.978, "n": N},
            "pruned": {"loss": 0.0801, "accuracy": 0.975, "n": N},
        },
        "prune": {
            "target": "sparsity",
            "asked": asked,
            "achieved": removed,
            "sparsity": removed,
            "layers": layers,
            "skipped": {},
        },
        "profile": {"dense": profile({n: numel(n) for n in LAYERS}, peak=312_000_000), "pruned": profile(kept)},
        "realised": "mask",
        "histograms": {n: histogram(n, kept[n]) for n in LAYERS},
        "exports": [
            {
                "format": "onnx",
                "path": "exports/model.onnx",
                "size_bytes": 1_584_211,
                "max_difference": 3.1e-7,
                "checked": "onnxruntime 1.22.0",
            }
        ],
        "notes": ["batch normalisation was recalibrated on 256 training samples"],
    }
    return base | fields


def recipe(pattern: dict[str, Any], allocate: str, schedule: str, retrain: dict[str, Any]) -> dict[str, Any]:
    return {
        "prune": {
            "score": {"name": "magnitude"},
            "pattern": pattern,
            "allocate": {"name": allocate},
            "schedule": {"name": schedule},
        },
        "recover": {"retrain": retrain},
    }


def events(dense_epochs: int, levels: list[float], each: int, seed: int, steps: int = 120) -> list[dict[str, Any]]:
    chance, out, epoch = random.Random(seed), [], 0

    def log(phase: str, number: int | None, sparsity: float, best: float) -> None:
        near = best - 0.12 * math.exp(-epoch / 2.2) + chance.uniform(-0.002, 0.002)
        out.append(
            {
                "event": "epoch",
                "phase": phase,
                "round": number,
                "epoch": epoch,
                "step": epoch * steps,
                "lr": 0.001,
                "train_loss": 0.9 * math.exp(-epoch / 2.5) + 0.01,
                "loss": 1.8 * (1 - near),
                "metrics": {"accuracy": near},
                "sparsity": sparsity,
                "seconds": 3.1,
                "time": 1.7e9 + epoch,
            }
        )

    for _ in range(dense_epochs):
        epoch += 1
        log("train", None, 0.0, 0.978)
    for number, level in enumerate(levels):
        place = {"phase": "retrain", "round": number, "epoch": epoch, "step": epoch * steps, "time": 1.7e9 + epoch}
        count = round((1 - level) * TOTAL)
        out.append(
            {"event": "prune", **place, "target": "sparsity", "asked": level, "achieved": 1 - count / TOTAL}
            | {"sparsity": 1 - count / TOTAL, "kept": count, "total": TOTAL}
        )
        out.append({"event": "recalibrate", **place, "kind": "rematch", "layers": 2, "moved": 0.1})
        for _ in range(each):
            epoch += 1
            log("retrain", number, level, 0.977 - 0.01 * level)
    return out


def masked_run() -> RunRecord:
    """90 % of the single weights in four rounds; the first layer keeps most."""
    kept = dict(zip(LAYERS, (700, 4_600, 11_000, 21_600, 1_000), strict=True))
    how = recipe({"name": "unstructured"}, "global", "iterative", {"name": "learning_rate_rewinding", "epochs": 2})
    return RunRecord(result("90 % of the weights", kept, 0.9, how), events(6, [0.44, 0.68, 0.82, 0.9], 2, 1))


def two_of_four_run() -> RunRecord:
    """2:4, latency not measured, the classifier left alone."""
    kept = {name: numel(name) // 2 for name in LAYERS}
    how = recipe({"name": "nm", "n": 2, "m": 4}, "layerwise", "one_shot", {"name": "fine_tune", "epochs": 4})
    made = result("2 of every 4 weights", kept, 0.5, how, exports=[], notes=[])
    made["profile"]["pruned"] |= {"latency": None, "energy": {"joules": None, "kind": "not measured: no RAPL counter"}}
    made["quality"]["pruned"] = {"loss": 0.069, "accuracy": 0.979, "n": N}
    return RunRecord(made, events(8, [0.5], 4, 2))


def sliced_run() -> RunRecord:
    """Half of the filters, cut out: here a speed-up was measured."""
    kept = {name: numel(name) // 2 for name in LAYERS}
    how = recipe({"name": "channel"}, "layerwise", "one_shot", {"name": "fine_tune", "epochs": 6})
    made = result("half of the filters", kept, 0.5, how, realised="slice")
    made["profile"]["pruned"] = profile(kept, cut=True, latency_ms=1.25, peak=298_000_000)
    made["quality"]["pruned"] = {"loss": 0.094, "accuracy": 0.969, "n": N}
    return RunRecord(made, events(6, [0.5], 6, 3))


def three_runs() -> list[RunRecord]:
    return [masked_run(), two_of_four_run(), sliced_run()]


def deep_run(layers: int = 53) -> RunRecord:
    """A network with more layers than fit on an open page."""
    run = masked_run()
    made = copy.deepcopy(dict(run.result))
    chance = random.Random(5)
    rows, histograms = [], {}
    for i in range(layers):
        name = f"features.denseblock{i // 16 + 1}.denselayer{i % 16 + 1}.conv2.weight"
        total = 9 * 32 * (64 + 4 * i)
        kept = int(total * chance.uniform(0.02, 0.6))
        shape = [32, 64 + 4 * i, 3, 3]
        rows.append({"name": name, "shape": shape, "total": total, "kept": kept, "sparsity": 1 - kept / total})
        histograms[name] = {"edges": [-1.0, 0.0, 1.0], "dense": [total // 2, total - total // 2], "pruned": [kept, 0]}
    made["prune"]["layers"] = rows
    made["histograms"] = histograms
    made["profile"]["dense"]["layers"] = made["profile"]["pruned"]["layers"] = []
    return RunRecord(made, run.events)
