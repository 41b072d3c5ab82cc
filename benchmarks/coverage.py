"""Which real models structural pruning handles, with no configuration: torchvision, timm and transformers.

    pip install ...                        (see coverage_models.py)
    make bench-coverage                    (or: python benchmarks/coverage.py --jobs 2 --onnx)
    python benchmarks/coverage.py --zoo timm --only densenet121,vgg11 --again
    python benchmarks/coverage.py --list
    python benchmarks/coverage.py --render

Every model is pruned in a process of its own (`coverage_row.py`), with a time limit for each stage and a memory limit:
a crash or a hang is a row of the table, not its end. Rows made by the present source are kept, so that the command can
be interrupted and given again. Writes benchmarks/results/coverage.json and docs/coverage.md.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from coverage_models import NOT_RUNNABLE, ZOOS, cases
from coverage_page import write_page

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "coverage.json"
PAGE = ROOT / "docs" / "coverage.md"
PACKAGES = ("secateur", "torch", "numpy", "torchvision", "timm", "transformers", "onnx", "onnxruntime")
POLL = 0.2  # seconds between two looks at a running model
ROOM = 6 * 2**30  # bytes that must be free for a second model to start beside a running one

Row = dict[str, Any]


def commit() -> str:
    """The commit of the source, and a digest of it where it has been changed since."""
    name = git("rev-parse", "--short", "HEAD")
    if not git("status", "--porcelain", "--", "src/secateur", "benchmarks/coverage_models.py"):
        return name
    state = hashlib.sha256()
    for path in sorted((ROOT / "src" / "secateur").rglob("*.py")):
        state.update(path.read_bytes())
    return f"{name}+{state.hexdigest()[:8]}"


def git(*words: str) -> str:
    """What git prints."""
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


class Table:
    """The rows, on disk after each one.

    Args:
        path: The JSON file.
        order: Zoo and name of every case there is.
        head: What stands beside the rows.
    """

    def __init__(self, path: Path, order: list[tuple[str, str]], head: Row) -> None:
        self._path, self._order, self._head = path, order, head
        self._lock = threading.Lock()
        old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}
        self.rows: dict[tuple[str, str], Row] = {(row["zoo"], row["name"]): row for row in old["rows"]}

    def done(self, key: tuple[str, str], source: str, *, onnx: bool) -> bool:
        """Whether there is a row of the present source, with ONNX if that is asked for."""
        row = self.rows.get(key, {})
        return row.get("commit") == source and (not onnx or row["works"] != "pruned" or "onnx" in row)

    def put(self, row: Row) -> None:
        """Add or replace a row, and write the file."""
        with self._lock:
            self.rows[row["zoo"], row["name"]] = row
            self.write()

    def write(self) -> None:
        """Write the file, complete or not at all; one line for each row."""
        rows = [self.rows[key] for key in self._order if key in self.rows]
        head = json.dumps(self._head, indent=1)[:-2]
        lines = ",\n".join(json.dumps(row) for row in rows)
        part = self._path.with_suffix(".part")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(f'{head},\n "rows": [\n{lines}\n]\n}}\n', encoding="utf-8")
        part.replace(self._path)


def make_row(zoo: str, name: str, args: argparse.Namespace) -> Row:
    """Run one model in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.json"
        words = [sys.executable, str(Path(__file__).with_name("coverage_row.py")), zoo, name, str(path)]
        env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TMPDIR": folder}
        with (Path(folder) / "errors").open("w+", encoding="utf-8", errors="replace") as errors:
            options = ["--onnx"] if args.onnx else []
            process = subprocess.Popen([*words, *options], env=env, stdout=errors, stderr=errors, cwd=folder)
            ended, peak = watch(process, path, args)
            errors.seek(0)
            said = [line.strip() for line in errors if line.strip()]
        row: Row = read(path) or {"zoo": zoo, "name": name, "stage": "start", "works": "crashed", "why": ""}
    row["peak_bytes"] = peak
    stage = row.pop("stage")
    if stage == "done" or (ended == "" and row["works"] == "refused"):
        return row
    why = ended or row["why"] or (said[-1][:300] if said else f"exit status {process.returncode}")
    if row["works"] != "pruned":  # it ended before there was a pruned model
        kind = "timed out" if ended.startswith("no end") else "crashed"
        return row | {"works": kind if stage == "shrink" else "not built", "why": f"{stage}: {why}"}
    return row | {stage: {"ok": False, "why": why}}


def watch(process: subprocess.Popen[Any], path: Path, args: argparse.Namespace) -> tuple[str, int]:
    """Wait for a process; end it when a stage lasts too long or it takes too much memory.

    Returns:
        Why it was ended, or nothing; the most memory it has held, in bytes.
    """
    stage, began, peak = "", time.monotonic(), 0
    while process.poll() is None:
        time.sleep(POLL)
        held = resident(process.pid)
        peak = max(peak, held)
        now = (read(path) or {}).get("stage", "")
        if now != stage:
            stage, began = now, time.monotonic()
        why = ""
        if time.monotonic() - began > args.limit:
            why = f"no end within {args.limit:g} s"
        elif held > args.memory * 2**30:
            why = f"more than {args.memory:g} GiB of memory"
        if why:
            process.kill()
            process.wait()
            return why, peak
    return (f"ended by signal {-process.returncode}" if process.returncode < 0 else ""), peak


def resident(pid: int) -> int:
    """Memory that a process holds, in bytes; 0 where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def free_memory() -> float:
    """Memory that could be had, in bytes; infinite where the system does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return 1024.0 * int(line.split()[1])
    return float("inf")


def read(path: Path) -> Row | None:
    """A row, as far as it has been written."""
    try:
        found: Row = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def run_all(todo: list[tuple[str, str]], table: Table, source: str, args: argparse.Namespace) -> None:
    """Make the missing rows."""
    running, lock = [0], threading.Lock()

    def one(number: int, key: tuple[str, str]) -> None:
        while True:
            with lock:
                if not running[0] or free_memory() > ROOM:
                    running[0] += 1
                    break
            time.sleep(POLL)
        began = time.monotonic()
        try:
            row = make_row(*key, args)
        finally:
            with lock:
                running[0] -= 1
        row |= {"commit": source, "total_seconds": time.monotonic() - began}
        table.put(row)
        left = f"{row['parameters'][1] / row['parameters'][0]:.2f} left" if "parameters" in row else row["why"][:150]
        bad = [f"{k}: {v['why'][:100]}" for k, v in row.items() if isinstance(v, dict) and v.get("ok", True) is False]
        seconds = f"{row['total_seconds']:5.0f} s"
        print(
            f"{number:3}/{len(todo)} {key[0]:17} {key[1]:34} {row['works']:9} {seconds} {left} {bad or ''}", flush=True
        )

    with ThreadPoolExecutor(args.jobs) as pool:
        for future in [pool.submit(one, number, key) for number, key in enumerate(todo, 1)]:
            future.result()


def head(args: argparse.Namespace, source: str) -> Row:
    """What the rows depend on."""
    from coverage_row import CHANNELS_KEPT, EXPORT_TOLERANCE, SEEDS, SINGLE, TOLERANCE

    from secateur.pipeline.environment import machine

    return {
        "schema": 1,
        "benchmark": "coverage",
        "command": shlex.join(["python", "benchmarks/coverage.py", *args.words]),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": source,
        "machine": machine() | {"threads": 1, "processes": args.jobs},
        "versions": {"python": platform.python_version()} | {p: metadata.version(p) for p in PACKAGES},
        "seeds": SEEDS,
        "channels_kept": CHANNELS_KEPT,
        "tolerances": {"float64": TOLERANCE, "float32": SINGLE, "export": EXPORT_TOLERANCE},
        "limits": {"stage_seconds": args.limit, "memory_gib": args.memory},
        "not_runnable": NOT_RUNNABLE,
    }


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", choices=ZOOS, action="append", help="only this zoo; may be given again")
    parser.add_argument("--only", help="only these models: names with commas between them")
    parser.add_argument("--onnx", action="store_true", help="export to ONNX too; takes longer than the rest together")
    parser.add_argument("--again", action="store_true", help="also models that the present source has a row for")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time, of one thread each (default 1)")
    parser.add_argument("--limit", type=float, default=300, help="seconds for each stage of a model (default 300)")
    parser.add_argument("--memory", type=float, default=14, help="GiB of memory for one model (default 14)")
    parser.add_argument("--list", action="store_true", help="only list the models, and what is known of them")
    parser.add_argument("--render", action="store_true", help="only write the page again, from the JSON file")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file")
    parser.add_argument("--page", type=Path, default=PAGE, help="the Markdown page")
    args = parser.parse_args(words)
    args.words = words
    if not args.render:
        order = [(case.zoo, case.name) for case in cases()]
        source = commit()
        table = Table(args.out, order, head(args, source))
        names = args.only.split(",") if args.only else None
        chosen = [k for k in order if (not args.zoo or k[0] in args.zoo) and (names is None or k[1] in names)]
        todo = [key for key in chosen if args.again or not table.done(key, source, onnx=args.onnx)]
        if args.list:
            for key in chosen:
                row = table.rows.get(key, {})
                print(f"{key[0]:17} {key[1]:40} {row.get('works', '-'):10} {row.get('commit', '')}")
            return
        print(f"{len(chosen)} models, {len(todo)} to do, source {source}", flush=True)
        run_all(todo, table, source, args)
        table.write()
    page = write_page(json.loads(args.out.read_text(encoding="utf-8")), args.page)
    print(f"wrote {args.out} and {page}")


if __name__ == "__main__":
    main(sys.argv[1:])
