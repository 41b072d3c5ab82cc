"""The sparse CPU runtime against every dense engine at hand: layers, whole networks, bytes, two threads.

    make bench-sparse                      (or, with what it installs: python benchmarks/sparse.py)
    python benchmarks/sparse.py --only linear
    python benchmarks/sparse.py --render

writes ``sparse_cpu.json``, ``sparse_cpu.md`` and a plot. Every row times all engines in turn, in one process, and puts
the sparse runtime beside the fastest dense one: torch eager (in both memory orders), torch inductor, ONNX Runtime and
OpenVINO, all in float32. An interrupted run continues where it stopped. Masks are those of magnitude pruning, every
layer alike; weights are random where the row does not say otherwise.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[1] / "examples")]

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("secateur", "torch", "onnxruntime", "openvino", "numpy")


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="measure only rows whose key begins like this")
    parser.add_argument("--runs", type=int, default=20, help="rounds of every row (default 20)")
    parser.add_argument("--again", action="store_true", help="measure rows that are there already")
    parser.add_argument("--render", action="store_true", help="only write the page again, from the JSON file")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    args = parser.parse_args(words)
    path = args.out / "sparse_cpu.json"
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": {}}
    if not args.render:
        measure(result, path, args)
    from sparse_page import write_page

    print(f"wrote {path} and {write_page(result, args.out / 'sparse_cpu.md')}")


def measure(result: dict[str, Any], path: Path, args: argparse.Namespace) -> None:
    """Measure what is missing, and keep every row as soon as it is there."""
    import torch

    from results_file import write_json
    from secateur.pipeline.environment import machine
    from secateur.sparse import isa
    from sparse_cells import cells

    for key, compute in cells(args.runs):
        if not key.startswith(args.only) or (key in result["rows"] and not args.again):
            continue
        torch.set_num_threads(int(key.rsplit("/", 1)[-1]) if key.endswith(("/1", "/2")) else 1)
        start = time.perf_counter()
        row = compute()
        again = {"again": True} if key in result["rows"] else {}
        result["rows"][key] = row | again | {"seconds": round(time.perf_counter() - start, 1)}
        result |= {
            "schema": 1,
            "benchmark": "sparse_cpu",
            "command": "python benchmarks/sparse.py",
            "runs": args.runs,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine() | {"isa": isa()},
            "versions": {"python": platform.python_version()} | {p: metadata.version(p) for p in PACKAGES},
        }
        write_json(path, result)
        shown = {k: row[k] for k in ("speedup", "ratio", "gmac_per_s", "fastest_dense") if k in row}
        print(f"{key}: {shown} ({result['rows'][key]['seconds']} s)", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
