"""Time and memory of structural pruning: record, couple, choose, slice, repair, prove.

Every model is measured in fresh processes, one for times and two for memory, on one thread. Times are CPU seconds
(user and system), since other processes may share the machine; one dense forward of the same input is timed beside
each repeat, and so are the forwards in float64 that the proof consists of. Memory is the resident set's peak while
pruning, beyond what the process held with the model loaded, and beyond what it held after one forward (the allocator
keeps activations that are gone). ``python benchmarks/structural_speed.py`` writes
``benchmarks/results/structural_speed.{json,md}``.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
GOALS = {"resnet50": 1.0, "bert-base": 2.0, "densenet201": 2.0, "vit_b_16": 3.0, "llama-1.1b (meta)": 20.0}
MEMORY_GOAL = 1.2
SEEDS = {"weights": 0, "inputs": 0}


def build(name: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Return a model and its inputs."""
    import torch

    torch.manual_seed(SEEDS["weights"])
    sys.path.insert(0, str(Path(__file__).parent))
    from _torchvision_ops import declare

    declare()
    if name == "bert-base":
        from transformers import BertConfig, BertForSequenceClassification

        model = BertForSequenceClassification(BertConfig()).eval()
        torch.manual_seed(SEEDS["inputs"])
        return model, (), {"input_ids": torch.randint(0, 30000, (1, 128))}
    if name.startswith("llama"):
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=22,
            num_attention_heads=32,
            num_key_value_heads=4,
            vocab_size=32000,
            use_cache=False,
            attn_implementation="eager",
        )
        with torch.device("meta"):
            model = LlamaForCausalLM(config).eval()
        ids = torch.zeros(1, 64, dtype=torch.int64, device="meta")
        return model, (), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    import torchvision

    model = torchvision.models.get_model(name, weights=None).eval()
    torch.manual_seed(SEEDS["inputs"])
    return model, (torch.randn(1, 3, 224, 224),), {}


def half() -> Any:
    """Return the method that is timed: half of the MACs, layerwise, by mean magnitude."""
    from secateur.allocate import Layerwise
    from secateur.method import Method
    from secateur.patterns import Channel
    from secateur.targets import Target

    return Method(target=Target("macs", 0.5), pattern=Channel(), allocate=Layerwise())


def warm_up() -> None:
    """Pay for imports and for what torch caches at first use."""
    import torch
    from torch import nn

    from secateur.structure import make_plan

    torch.set_num_threads(1)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten(), nn.Linear(4608, 9)
    )
    make_plan(net, half(), torch.randn(1, 3, 16, 16))


def timed(act: Callable[[], Any]) -> tuple[Any, float]:
    """Run and return the result and CPU seconds of the process."""
    start = time.process_time()
    out = act()
    return out, time.process_time() - start


# -- times


def times(name: str, repeats: int) -> dict[str, Any]:
    """Measure one model's times: medians over repeats, each with a dense forward beside it."""
    import torch

    from secateur.structure import make_plan

    warm_up()
    model, args, kwargs = build(name)
    meta = next(model.parameters()).device.type == "meta"
    rows: list[dict[str, float]] = []
    report = None
    for number in range(repeats + 1):
        gc.collect()
        with torch.no_grad():
            _, forward = timed(lambda: model(*args, **kwargs))
        row = {"forward": forward, **_phases(model, args, kwargs)}
        report, row["total"] = timed(lambda: make_plan(model, half(), (args, kwargs)))
        row["total / forward"] = row["total"] / forward
        if number:  # the first one warms up
            rows.append(row)
    assert report is not None
    out: dict[str, Any] = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    out["spread of total"] = [min(row["total"] for row in rows), max(row["total"] for row in rows)]
    out["runs"] = len(rows)
    out["report"] = {
        "macs": report.macs,
        "parameters": report.parameters,
        "groups": len(report.groups),
        "proof": report.proof.to_dict(),
    }
    out["float64 forwards"] = None if meta else float64_forwards(model, report.plan, args, kwargs)
    return out


def _phases(model: Any, args: Any, kwargs: Any) -> dict[str, float]:
    """Time the steps of pruning one by one, and then everything but the proof."""
    import numpy as np

    from secateur.allocate import Layerwise
    from secateur.graph.changes import slice_
    from secateur.graph.choose import bundles, meet
    from secateur.graph.coupling import Coupling
    from secateur.graph.examples import Example
    from secateur.graph.shrink import shrink
    from secateur.graph.trace import trace
    from secateur.scores import Coupled
    from secateur.structure.scoring import unit_scores

    def choose(coupling: Coupling) -> Any:
        scores, _ = unit_scores(model, coupling, Coupled(), loss_fn=None, batches=None)
        goal = 0.5 * coupling.macs(coupling.alive(np.zeros(coupling.units, dtype=bool)))
        return meet(coupling, scores, bundles(coupling, 8), Layerwise(), lambda a: float(coupling.macs(a)), goal)

    row = {}
    recorded, row["record"] = timed(lambda: trace(model, [Example(args, kwargs)]))
    coupling, row["couple"] = timed(lambda: Coupling(recorded))
    removed, row["choose"] = timed(lambda: choose(coupling))
    undo, row["slice"] = timed(lambda: slice_(model, coupling.kept(coupling.alive(removed))))
    undo.revert()
    shrunk, row["without proof"] = timed(lambda: shrink(model, args, kwargs, choose, verify=False))
    shrunk.undo.revert()
    proven, everything = timed(lambda: shrink(model, args, kwargs, choose))
    proven.undo.revert()
    row["proof"] = max(everything - row["without proof"], 0.0) if proven.proof.level == "values" else 0.0
    steps = sum(row[key] for key in ("record", "couple", "choose", "slice"))
    row["repair and rest"] = max(row["without proof"] - steps, 0.0)
    return row


def float64_forwards(model: Any, plan: Any, args: Any, kwargs: Any) -> dict[str, float]:
    """Time the forwards that the proof consists of, plainly: both models in float64, one sample, two, and training."""
    import torch

    dense = copy.deepcopy(model)
    small = copy.deepcopy(model)
    plan.apply_(small)

    def cast(value: Any, times: int) -> Any:
        value = torch.cat([value] * times)
        return value.double() if value.is_floating_point() else value

    out = {}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for label, net in (("dense", dense.double()), ("small", small.double())):
            for batch, training in ((1, False), (2, False), (1, True)):
                inputs = tuple(cast(v, batch) for v in args), {k: cast(v, batch) for k, v in kwargs.items()}
                net.train(training)
                with torch.no_grad():
                    runs = [timed(lambda net=net, i=inputs: net(*i[0], **i[1]))[1] for _ in range(4)][1:]
                out[f"{label}, {'training' if training else batch}"] = statistics.median(runs)
    finally:
        torch.set_default_dtype(before)
    out["together"] = sum(out.values())
    return out


# -- memory


def resident() -> tuple[float, float]:
    """Return the peak and the present resident set, in MB."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) / 1024, int(fields["VmRSS"].split()[0]) / 1024


def extra_memory(act: Callable[[], Any]) -> tuple[float, float]:
    """Return what the process holds before something runs, and the peak while it does, in MB."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    _, before = resident()
    act()
    return before, resident()[0]


def memory(name: str) -> dict[str, Any]:
    """Measure what pruning needs beside one model; meant for a process of its own."""
    import torch

    from secateur.structure import make_plan

    warm_up()
    model, args, kwargs = build(name)
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20

    def forward() -> None:
        with torch.no_grad():
            model(*args, **kwargs)

    loaded, _ = extra_memory(forward)
    warm, peak = extra_memory(lambda: make_plan(model, half(), (args, kwargs)))
    return {"megabytes": size, "extra": peak - warm, "extra over loaded": peak - loaded}


def float64_memory(name: str) -> dict[str, Any]:
    """Measure what one plain float64 forward of two samples needs beside one float64 model."""
    import torch

    torch.set_num_threads(1)
    model, args, kwargs = build(name)
    if next(model.parameters()).device.type == "meta":
        return {"float64 forward": None}
    torch.set_default_dtype(torch.float64)
    model.double()
    twice = [torch.cat([v, v]) for v in (*args, *kwargs.values())]
    twice = [v.double() if v.is_floating_point() else v for v in twice]
    inputs = tuple(twice[: len(args)]), dict(zip(kwargs, twice[len(args) :], strict=True))

    def forward() -> None:
        with torch.no_grad():
            model(*inputs[0], **inputs[1])

    before, peak = extra_memory(forward)
    return {"float64 forward": peak - before}


# -- the page


def page(document: dict[str, Any]) -> str:
    """Render the tables."""
    rows, machine, versions = document["rows"], document["machine"], document["versions"]
    lines = [
        "# Structural pruning: time and memory",
        "",
        f"Made by `{document['command']}` on {document['date']}: {machine['cpu']}, {machine['cores']} cores, one "
        f"thread, torch {versions['torch']}. CPU seconds (user and system), medians of {document['repeats']} runs, on "
        "a machine that other processes share; memory from fresh processes.",
        "",
        "Half of the MACs by mean magnitude, layerwise, widths multiples of 8; random weights; one image of 224 "
        "pixels, or 128 tokens (64 for the LLaMA). The whole verb also looks for a configuration that builds the "
        "pruned model, where the model has one, and counts for the report.",
        "",
        "| model | one forward | record | couple | score, choose | slice | repair, rest | without the proof | goal | "
        "proof | whole verb | / forward |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["forward"], row["record"], row["couple"], row["choose"], row["slice"], row["repair and rest"]]
        lines.append(
            f"| {row['model']} | "
            + " | ".join(f"{cell:.2f}" for cell in cells)
            + f" | {row['without proof']:.2f} | {row['goal']:g} | {row['proof']:.2f} | {row['total']:.2f} "
            f"| {row['total / forward']:.0f} |"
        )
    lines += [
        "",
        "The proof compares the dense model with zeros in the removed places and the pruned model, in float64, on the "
        "example, on two samples of other values, and on the example in training mode. The same six forwards, run "
        "plainly on models that are float64 already, are what it is measured against; it also runs the dense model on "
        "the two samples as it is, so that nothing is cached in float64:",
        "",
        "| model | dense, 1 | dense, 2 | training | pruned, 1 | pruned, 2 | training | together | proof "
        "| proof / together |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        plain = row["float64 forwards"]
        if plain is not None:
            lines.append(
                f"| {row['model']} | "
                + " | ".join(f"{value:.2f}" for value in plain.values())
                + f" | {row['proof']:.2f} | {row['proof'] / plain['together']:.2f} |"
            )
    lines += [
        "",
        f"Peak memory beside the model (goal: at most {MEMORY_GOAL} times the model), and what one plain float64 "
        "forward of two samples needs beside a float64 model, which depends on the input and not on the model's size. "
        "Pruning holds the pruned tensors too. The first figure is beyond what the process held after one dense "
        "forward, the second beyond what it held before it. On the meta device tensors have no values, and the proof "
        "is of shapes only.",
        "",
        "| model | MB | pruning, proof included, MB | / model | from before any forward, MB | / model "
        "| one float64 forward, MB | / model |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        size, forward = row["megabytes"], row["float64 forward"]
        plain = "- | -" if forward is None else f"{forward:.0f} | {forward / size:.2f}"
        both = " | ".join(f"{row[key]:.0f} | {row[key] / size:.2f}" for key in ("extra", "extra over loaded"))
        lines.append(f"| {row['model']} | {size:.0f} | {both} | {plain} |")
    missed = [r["model"] for r in rows if r["total"] > r["goal"]]
    above = [r["model"] for r in rows if r["extra"] > MEMORY_GOAL * r["megabytes"]]
    lines += [
        "",
        "Without the proof, over the goal: "
        + (", ".join(r["model"] for r in rows if r["without proof"] > r["goal"]) or "none")
        + f". With it: {', '.join(missed) or 'none'}. Over the goal for memory: {', '.join(above) or 'none'}.",
    ]
    return "\n".join(lines) + "\n"


def child(kind: str, name: str, repeats: int) -> dict[str, Any]:
    """Run one measurement in a process of its own."""
    command = [sys.executable, __file__, "--one", kind, name, "--repeats", str(repeats)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    out: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return out


def main() -> None:
    """Measure every model in processes of its own, write JSON and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--models", nargs="*", default=list(GOALS), choices=list(GOALS), metavar="MODEL")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "MODEL"), help="one measurement, as JSON")
    arguments = parser.parse_args()
    if arguments.one:
        kind, name = arguments.one
        measure = {"times": lambda: times(name, arguments.repeats), "memory": lambda: memory(name),
                   "float64": lambda: float64_memory(name)}  # fmt: skip
        print(json.dumps(measure[kind]()))
        return
    from secateur.pipeline.environment import machine, versions

    rows = []
    for name in arguments.models:
        row = {"model": name, "goal": GOALS[name]}
        for kind in ("memory", "float64", "times"):
            row |= child(kind, name, arguments.repeats)
        rows.append(row)
        print(f"{name}: {row['without proof']:.2f} s, with the proof {row['total']:.2f} s", flush=True)
    document = {
        "command": "make bench-structural-speed",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": versions() | {name: metadata.version(name) for name in ("torchvision", "transformers")},
        "threads": 1,
        "seeds": SEEDS,
        "repeats": arguments.repeats,
        "load_average": list(os.getloadavg()),
        "memory_goal": MEMORY_GOAL,
        "rows": rows,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "structural_speed.json").write_text(json.dumps(document, indent=1) + "\n")
    (arguments.out / "structural_speed.md").write_text(page(document))
    print(page(document))


if __name__ == "__main__":
    main()
