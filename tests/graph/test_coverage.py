"""Real models that the coverage table says are pruned still are, and are left no larger.

About two minutes' worth of the table of docs/coverage.md; runs where torchvision, timm and transformers are installed,
which no other test needs.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
RECORD = BENCHMARKS / "results" / "coverage.json"
SLACK = 0.005  # of the parameters before: near-ties between scores fall differently on other processors
MODELS = {
    "torchvision": (
        "googlenet",
        "mnasnet0_5",
        "mobilenet_v2",
        "mobilenet_v3_small",
        "regnet_x_400mf",
        "resnet18",
        "shufflenet_v2_x0_5",
        "squeezenet1_1",
    ),
    "torchvision-tasks": ("lraspp_mobilenet_v3_large",),
    "timm": ("deit_tiny_patch16_224", "lcnet_035", "levit_128s", "repghostnet_050", "resnet10t", "starnet_s050"),
    "transformers": (
        "albert",
        "bert",
        "bloom",
        "clip",
        "gpt2",
        "llama",
        "mamba",
        "mixtral",
        "qwen3",
        "t5",
        "whisper",
    ),
}
NAMES = [(zoo, name) for zoo, names in MODELS.items() for name in names]


def recorded() -> dict[tuple[str, str], dict[str, Any]]:
    """The rows of the table, by zoo and name."""
    if not RECORD.exists():
        return {}
    rows = json.loads(RECORD.read_text(encoding="utf-8"))["rows"]
    return {(row["zoo"], row["name"]): row for row in rows}


ROWS = recorded()


@pytest.fixture(scope="module")
def harness() -> Iterator[Any]:
    """The modules of the benchmark.

    Yields:
        What makes a row of the table.
    """
    sys.path.insert(0, str(BENCHMARKS))
    import coverage_row

    yield coverage_row
    sys.path.remove(str(BENCHMARKS))


@pytest.mark.slow
@pytest.mark.skipif(not ROWS, reason="the table has not been made")
@pytest.mark.parametrize(("zoo", "name"), NAMES, ids=[f"{zoo}-{name}" for zoo, name in NAMES])
def test_what_was_pruned_is_pruned(zoo: str, name: str, harness: Any) -> None:
    package = zoo.partition("-")[0]
    for needed in {package, "torchvision"}:
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed")
    row = ROWS.get((zoo, name), {"works": "nothing"})
    if row["works"] != "pruned":
        pytest.skip(f"the table says {row['works']}")
    (case,) = (c for c in harness.cases(zoo) if c.name == name)
    model = case.build()
    dense = copy.deepcopy(model)
    report = harness.shrink_(model, harness.METHOD, case.inputs(0))
    assert report.proof.equal
    before, after = sum(p.numel() for p in dense.parameters()), sum(p.numel() for p in model.parameters())
    assert before == row["parameters"][0], "another model than the table's"
    assert after / before <= row["parameters"][1] / before + SLACK
    assert harness.sliced(dense, model, report.plan.kept)["ok"]
    opinion = harness.plain(dense, model, report, [case.inputs(seed) for seed in harness.PLAIN_SEEDS])
    assert opinion["ok"], opinion["why"]
    assert opinion["how"] == row["plain"].get("how", opinion["how"])
    assert torch.get_default_dtype() == torch.float32
