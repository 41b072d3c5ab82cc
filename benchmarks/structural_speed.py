"""Time and memory of structural pruning itself: record, couple, choose, slice; and the proof, apart.

Each model runs in a process of its own, one thread, CPU seconds. One dense forward of the same input stands beside for
scale. ``python benchmarks/structural_speed.py`` writes ``benchmarks/results/structural_speed.{json,md}``.
"""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
GOALS = {"resnet50": 1.0, "bert-base": 2.0, "densenet201": 2.0, "vit_b_16": 3.0, "llama-1.1b (meta)": 20.0}
MEMORY_GOAL = 1.2


def build(name: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Return a model and its inputs."""
    import torch

    torch.manual_seed(0)
    sys.path.insert(0, str(Path(__file__).parent))
    from _torchvision_ops import declare

    declare()
    if name == "bert-base":
        from transformers import BertConfig, BertForSequenceClassification

        return BertForSequenceClassification(BertConfig()).eval(), (), {"input_ids": torch.randint(0, 30000, (1, 128))}
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

    return torchvision.models.get_model(name, weights=None).eval(), (torch.randn(1, 3, 224, 224),), {}


def timed(act: Callable[[], Any]) -> tuple[Any, float]:
    """Run and return the result and CPU seconds."""
    start = time.process_time()
    out = act()
    return out, time.process_time() - start


def peak() -> float:
    """Return the largest resident memory so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str) -> dict[str, Any]:
    """Measure one model."""
    import numpy as np
    import torch

    from secateur.allocate import Layerwise
    from secateur.graph.choose import bundles, meet
    from secateur.graph.coupling import Coupling, trace
    from secateur.graph.examples import Example
    from secateur.graph.plan import slice_
    from secateur.method import Method
    from secateur.patterns import Channel
    from secateur.scores import Coupled
    from secateur.structure import make_plan
    from secateur.structure.scoring import unit_scores
    from secateur.targets import Target

    torch.set_num_threads(1)
    model, args, kwargs = build(name)
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    meta = next(model.parameters()).device.type == "meta"
    with torch.no_grad():
        model(*args, **kwargs)
        _, forward = timed(lambda: model(*args, **kwargs))
    trace(model, [Example(args, kwargs)])  # the first recording pays for imports and caches of torch
    before = peak()
    recorded, t_trace = timed(lambda: trace(model, [Example(args, kwargs)]))
    coupling, t_couple = timed(lambda: Coupling(recorded))

    def choose() -> Any:
        scores, _ = unit_scores(model, coupling, Coupled(), loss_fn=None, batches=None)
        everything = coupling.alive(np.zeros(coupling.units, dtype=bool))
        goal = 0.5 * coupling.macs(everything)
        return meet(coupling, scores, bundles(coupling, 8), Layerwise(), lambda a: float(coupling.macs(a)), goal)

    removed, t_choose = timed(choose)
    undo, t_slice = timed(lambda: slice_(model, coupling.kept(coupling.alive(removed))))
    undo.revert()
    extra = peak() - before
    row = {
        "model": name,
        "megabytes": size,
        "forward": forward,
        "record": t_trace,
        "couple": t_couple,
        "choose": t_choose,
        "slice": t_slice,
        "total": t_trace + t_couple + t_choose + t_slice,
        "goal": GOALS[name],
        "extra_megabytes": extra,
        "extra_over_model": None if meta else extra / size,
    }
    method = Method(target=Target("macs", 0.5), pattern=Channel(), allocate=Layerwise())
    report, row["with_repair_and_proof"] = timed(lambda: make_plan(model, method, (args, kwargs)))
    row["proof"] = report.proof.to_dict()
    return row


def page(document: dict[str, Any]) -> str:
    """Render the table."""
    lines = [
        "# Structural pruning: time and memory",
        "",
        f"CPU seconds, one thread, {document['machine']}; torch {document['torch']}. `{document['command']}`.",
        "Half of the MACs by mean magnitude, layerwise, widths multiples of 8; one image of 224 pixels or 128 tokens.",
        "The last column is the whole verb: trial and repair of attributes, then the proof in float64 on two inputs",
        "(shapes only on the meta device).",
        "",
        "| model | MB | one forward | record | couple | choose | slice | together | goal | extra memory / model "
        "| repaired and proven |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        extra = "-" if row["extra_over_model"] is None else f"{row['extra_over_model']:.2f}"
        times = " | ".join(f"{row[k]:.2f}" for k in ("forward", "record", "couple", "choose", "slice", "total"))
        lines.append(
            f"| {row['model']} | {row['megabytes']:.0f} | {times} | {row['goal']:g} | {extra} "
            f"| {row['with_repair_and_proof']:.1f} |"
        )
    lines += ["", f"Goal for memory: at most {MEMORY_GOAL} times the model beside it."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every model in its own process, write JSON and page."""
    if len(sys.argv) > 2 and sys.argv[1] == "--one":
        print(json.dumps(measure(sys.argv[2])))
        return
    import torch

    rows = []
    for name in GOALS:
        done = subprocess.run([sys.executable, __file__, "--one", name], capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{name}: {rows[-1]['total']:.2f} s", flush=True)
    document = {
        "machine": f"{platform.machine()}, {platform.python_implementation()} {platform.python_version()}",
        "torch": torch.__version__,
        "command": "make bench-structural-speed",
        "rows": rows,
    }
    (RESULTS / "structural_speed.json").write_text(json.dumps(document, indent=1) + "\n")
    (RESULTS / "structural_speed.md").write_text(page(document))


if __name__ == "__main__":
    main()
