"""Which real models the sparse runtime compiles, with the answers that they had: torchvision, timm and transformers.

    make bench-sparse-coverage             (or: python benchmarks/sparse_coverage.py --jobs 2)
    python benchmarks/sparse_coverage.py --only densenet121,vit_b_16
    python benchmarks/sparse_coverage.py --render

writes ``sparse_coverage.json`` and ``sparse_coverage.md``. Every model of ``coverage_models.py`` is pruned to 90 % of
every layer, compiled with every layer in the kernels that they can run, and compared with itself on two batches; then
it is saved, loaded, and compared again. Each runs in a process of its own: a crash is a row of the table. Rows that are
there are kept, unless they are named.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from coverage_models import cases
from results_file import write_json
from secateur.pipeline.environment import machine
from secateur.sparse import isa

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("secateur", "torch", "torchvision", "timm", "transformers")
LIMIT = 300  # seconds for one model
CLOSE = 1e-5  # of the largest value

Row = dict[str, Any]


def main(words: list[str]) -> None:
    """Measure what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names of models, with commas; measured again")
    parser.add_argument("--jobs", type=int, default=2, help="models at a time (default 2)")
    parser.add_argument("--render", action="store_true", help="only write the page again, from the JSON file")
    args = parser.parse_args(words)
    path = RESULTS / "sparse_coverage.json"
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": {}}
    if not args.render:
        measure(result, path, set(filter(None, args.only.split(","))), args.jobs)
    page = RESULTS / "sparse_coverage.md"
    page.write_text(page_of(result), encoding="utf-8")
    print(f"wrote {path} and {page}")


def measure(result: dict[str, Any], path: Path, only: set[str], jobs: int) -> None:
    """Compile the models that are named, or those that are missing."""
    todo = [(c.zoo, c.name) for c in cases() if (c.name in only if only else f"{c.zoo}/{c.name}" not in result["rows"])]
    with ThreadPoolExecutor(jobs) as pool:
        for row in pool.map(lambda names: row_of(*names), todo):
            result["rows"][f"{row['zoo']}/{row['name']}"] = row
            result |= {
                "schema": 1,
                "benchmark": "sparse_coverage",
                "command": "python benchmarks/sparse_coverage.py",
                "finished": datetime.now(UTC).isoformat(timespec="seconds"),
                "machine": machine() | {"isa": isa()},
                "versions": {"python": platform.python_version()} | {p: metadata.version(p) for p in PACKAGES},
            }
            write_json(path, result)
            print(f"{row['zoo']}/{row['name']}: {row.get('error') or row['difference']}", flush=True)


def row_of(zoo: str, name: str) -> Row:
    """Compile one model in a process of its own."""
    script = Path(__file__).parent / "sparse_coverage_row.py"
    try:
        done = subprocess.run(
            [sys.executable, str(script), zoo, name], capture_output=True, text=True, timeout=LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        return {"zoo": zoo, "name": name, "error": f"took more than {LIMIT} seconds"}
    try:
        row: Row = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return {"zoo": zoo, "name": name, "error": f"ended with {done.returncode}: {done.stderr.strip()[-300:]}"}
    return row


def page_of(result: dict[str, Any]) -> str:
    """Return the page."""
    rows: list[Row] = list(result["rows"].values())
    good = [row for row in rows if "error" not in row]
    lines = [
        "# Real models compiled for the sparse runtime",
        "",
        f"{len(rows)} models of torchvision, timm and transformers with random weights, pruned to 90 % of every layer, "
        "compiled with every layer in the kernels that they can run, faster or not, and compared with themselves on "
        "two batches; saved, loaded and compared bit for bit. "
        f"`{result['command']}`, {result['finished'][:10]}, {result['machine']['isa']}, "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        + ".",
        "",
        "| | models | compiled | answers within 1e-5 | all pruned weights in the kernels | layers in the kernels |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for zoo in sorted({row["zoo"] for row in rows}):
        some = [row for row in good if row["zoo"] == zoo]
        lines.append(
            f"| {zoo} | {sum(row['zoo'] == zoo for row in rows)} | {len(some)} | "
            f"{sum(row['difference'] <= CLOSE for row in some)} | {sum(not row['left'] for row in some)} | "
            f"{sum(row['packed'] for row in some):,} of {sum(row['layers'] for row in some):,} |"
        )
    lines += ["", *_left(good), *_others(rows)]
    return "\n".join(lines) + "\n"


def _left(good: list[Row]) -> list[str]:
    models: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for row in good:
        reasons = {re.sub(r"in \d+ groups", "in groups", reason): 0 for reason in row["left"]}
        for reason, count in row["left"].items():
            reasons[re.sub(r"in \d+ groups", "in groups", reason)] += count
        models.update(reasons.keys())
        weights.update(reasons)
    lines = ["## Weights that stay dense, and why", "", "| what | models | weights |", "|---|---:|---:|"]
    lines += [f"| {reason} | {models[reason]} | {count:,} |" for reason, count in weights.most_common()]
    return [*lines, ""]


def _others(rows: list[Row]) -> list[str]:
    lines = ["## Models that differ by more, or do not compile", ""]
    found = [row for row in rows if "error" in row or row["difference"] > CLOSE or not row["loaded_is_equal"]]
    if not found:
        return [*lines, "None."]
    lines += ["| model | |", "|---|---|"]
    for row in found:
        what = row.get("error") or f"differs by {row['difference']:.0e} of the largest value"
        if row.get("loaded_is_equal") is False:
            what += "; other answers when loaded"
        lines.append(f"| {row['zoo']} {row['name']} | {' '.join(what.split()).replace('|', '/')} |")
    return lines


if __name__ == "__main__":
    main(sys.argv[1:])
