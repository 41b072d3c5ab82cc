"""The library's own overhead: ratios measured in one run, interleaved, medians.

    make bench-speed          (or: OMP_NUM_THREADS=1 python benchmarks/speed.py)

1. A training step with masks at 90 % against the same step without (4-block, 256-wide transformer, AdamW).
2. Selection of exactly k of 100 million scores against torch.kthvalue and torch.topk on the same data; memory.
3. Start-up: `import secateur.pruner` beside `import torch`, and `secateur --help`.

Writes benchmarks/results/speed.json and speed.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur import Method, Pruner, Target
from secateur.pipeline.environment import machine, versions
from secateur.select import keep_top_k

RESULTS = Path(__file__).parent / "results"


def interleaved(rivals: dict[str, Callable[[], object]], *, runs: int, warmup: int = 3) -> dict[str, list[float]]:
    """Time each rival once per round, the first one changing; return seconds per rival."""
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(warmup + runs):
        names = list(rivals) if turn % 2 else list(rivals)[::-1]
        for name in names:
            began = time.perf_counter()
            rivals[name]()
            if turn >= warmup:
                times[name].append(time.perf_counter() - began)
    return times


def ratio(times: dict[str, list[float]], ours: str, theirs: str) -> dict[str, Any]:
    """Return the ratio of medians, and the spread of the ratios of single rounds."""
    single = sorted(a / b for a, b in zip(times[ours], times[theirs], strict=True))
    return {
        "ratio_of_medians": statistics.median(times[ours]) / statistics.median(times[theirs]),
        "ratio_p10": single[len(single) // 10],
        "ratio_p90": single[len(single) * 9 // 10],
        f"{ours}_median_s": statistics.median(times[ours]),
        f"{theirs}_median_s": statistics.median(times[theirs]),
        "runs": len(single),
    }


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)


def masked_step(runs: int) -> dict[str, Any]:
    torch.manual_seed(0)
    inputs = torch.randn(8, 64, 256)
    steps: dict[str, Callable[[], object]] = {}
    kept = {}
    for name in ("unmasked", "masked"):
        torch.manual_seed(1)
        model = transformer()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        pruner = None
        if name == "masked":
            pruner = Pruner(model, Method(target=Target("sparsity", 0.9)), optimizer=optimizer)
            pruner.prune()
        kept[name] = (model, pruner)

        def step(model: nn.Module = model, optimizer: Any = optimizer, pruner: Any = pruner) -> None:
            model(inputs).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if pruner is not None:
                pruner.step()

        steps[name] = step
    out = ratio(interleaved(steps, runs=runs), "masked", "unmasked")
    model, pruner = kept["masked"]
    wrong = sum(int((p[~pruner.masks[n]] != 0).sum()) for n, p in model.named_parameters() if n in pruner.masks)
    return out | {"goal": 1.10, "pruned_weights_not_zero_after": wrong}


def selection(millions: int, runs: int) -> dict[str, Any]:
    n = millions * 1_000_000
    scores = torch.randn(n, generator=torch.Generator().manual_seed(0)).abs_()
    k = n // 10
    times = interleaved(
        {
            "keep_top_k": lambda: keep_top_k(scores, k),
            "kthvalue": lambda: torch.kthvalue(scores, n - k + 1),
            "topk": lambda: torch.topk(scores, k, sorted=False),
        },
        runs=runs,
        warmup=1,
    )
    kept = int(keep_top_k(scores, k).sum())
    return {
        "scores": n,
        "k": k,
        "kept": kept,
        "against_kthvalue": ratio(times, "keep_top_k", "kthvalue"),
        "against_topk": ratio(times, "keep_top_k", "topk"),
        "goal": 1.5,
        "memory": {name: _peak(name, n) for name in ("keep_top_k", "kthvalue", "topk")},
    }


_PEAK = """
import torch
from secateur.select import keep_top_k
torch.set_num_threads(1)
def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1]) * 1024
scores = torch.randn({n}, generator=torch.Generator().manual_seed(0)).abs_()
keep_top_k(scores[:1000000], 1000)
torch.kthvalue(scores[:1000000], 1000)
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
out = {call}
print(status("VmHWM") - before)
"""
_CALLS = {
    "keep_top_k": "keep_top_k(scores, {k})",
    "kthvalue": "torch.kthvalue(scores, {n} - {k} + 1)",
    "topk": "torch.topk(scores, {k}, sorted=False)",
}


def _peak(name: str, n: int) -> dict[str, float]:
    """Peak memory beyond the scores themselves, in a fresh process."""
    call = _CALLS[name].format(n=n, k=n // 10)
    code = _PEAK.format(n=n, call=call)
    text = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return {"extra_bytes": int(text), "times_the_scores": int(text) / (4 * n)}


_IMPORT = """
import time, torch
began = time.perf_counter()
import {module}
print(time.perf_counter() - began)
"""


def start_up(runs: int) -> dict[str, Any]:
    """Time imports inside fresh processes, after torch's, and the whole process of --help."""
    imports: dict[str, list[float]] = {"secateur": [], "secateur.pruner": []}
    helps = []
    for _ in range(runs):
        for module, times in imports.items():
            code = _IMPORT.format(module=module)
            text = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
            times.append(float(text))
        began = time.perf_counter()
        help_ = "import sys; from secateur.cli import main; sys.exit(main(['--help']))"
        subprocess.run([sys.executable, "-c", help_], check=True, capture_output=True)
        helps.append(time.perf_counter() - began)
    return {
        "import_secateur_over_torch_s": statistics.median(imports["secateur"]),
        "import_pruner_over_torch_s": statistics.median(imports["secateur.pruner"]),
        "help_s": statistics.median(helps),
        "goal_import_s": 0.1,
        "goal_help_s": 0.5,
        "runs": runs,
    }


def page(result: dict[str, Any]) -> str:
    step, select, start = result["masked_step"], result["selection"], result["start_up"]
    kth, top = select["against_kthvalue"], select["against_topk"]
    rows = [
        ("masked / unmasked training step", f"{step['ratio_of_medians']:.3f}", "<= 1.10"),
        ("exactly k of 100 M scores / torch.kthvalue", f"{kth['ratio_of_medians']:.2f}", "<= 1.5"),
        ("exactly k of 100 M scores / torch.topk", f"{top['ratio_of_medians']:.2f}", "<= 1.5"),
        ("its peak memory / the scores", f"{select['memory']['keep_top_k']['times_the_scores']:.2f}", "<= 2"),
        ("kthvalue's peak memory / the scores", f"{select['memory']['kthvalue']['times_the_scores']:.2f}", ""),
        ("import secateur, beyond import torch", f"{start['import_secateur_over_torch_s']:.3f} s", "<= 0.1 s"),
        ("import secateur.pruner, beyond import torch", f"{start['import_pruner_over_torch_s']:.3f} s", "<= 0.1 s"),
        ("secateur --help", f"{start['help_s']:.2f} s", "< 0.5 s"),
    ]
    table = "\n".join(f"| {name} | {value} | {goal} |" for name, value, goal in rows)
    return (
        "# Overhead of the library itself\n\n"
        f"Made by `{result['command']}` on {result['date']}: {result['machine']['cpu']}, "
        f"{result['machine']['cores']} cores, {result['threads']} thread, torch {result['versions']['torch']}. "
        "Rivals interleaved in one process, medians. Shared machine: read the ratios, not the seconds.\n\n"
        f"| what | measured | goal |\n|---|---|---|\n{table}\n\n"
        f"Pruned weights that were not zero after {step['runs']} masked steps: "
        f"{step['pruned_weights_not_zero_after']}. Units kept of {select['k']:,} asked: {select['kept']:,}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--millions", type=int, default=100, help="scores to select from")
    parser.add_argument("--runs", type=int, default=60, help="training steps per rival")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "command": "make bench-speed",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": versions(),
        "threads": 1,
        "seeds": [0, 1],
        "masked_step": masked_step(arguments.runs),
        "selection": selection(arguments.millions, 7),
        "start_up": start_up(9),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "speed.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / "speed.md").write_text(page(result))
    print(page(result))


if __name__ == "__main__":
    main()
