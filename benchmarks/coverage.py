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
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import coverage_row
from coverage_models import NOT_RUNNABLE, ZOOS, cases
from coverage_page import write_page
from secateur.pipeline.environment import machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "coverage.json"
PAGE = ROOT / "docs" / "coverage.md"
PACKAGES = ("secateur", "torch", "numpy", "torchvision", "timm", "transformers", "onnx", "onnxruntime")
FORK = get_context("fork")  # models' libraries take seconds to import
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
        old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}
        self.rows: dict[tuple[str, str], Row] = {(row["zoo"], row["name"]): row for row in old["rows"]}

    def done(self, key: tuple[str, str], source: str, *, onnx: bool) -> bool:
        """Whether there is a row of the present source, with ONNX if that is asked for."""
        row = self.rows.get(key, {})
        return row.get("commit") == source and (not onnx or row["works"] != "pruned" or "onnx" in row)

    def put(self, row: Row) -> None:
        """Add or replace a row, and write the file."""
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


class Attempt:
    """One model in a process of its own.

    Args:
        key: Zoo and name.
        folder: For its files.
        args: Limits.
    """

    def __init__(self, key: tuple[str, str], folder: Path, args: argparse.Namespace) -> None:
        self.key, self._args = key, args
        self._path, self._log = folder / "row.json", folder / "log"
        self._stage, self._peak, self._why = "", 0, ""
        self._began = self._entered = time.monotonic()
        self._process = FORK.Process(target=work, args=(*key, folder, args.onnx))
        self._process.start()

    def ended(self) -> bool:
        """Look at it; end it when a stage lasts too long or it takes too much memory."""
        held = resident(self._process.pid or 0)
        self._peak = max(self._peak, held)
        stage = (read(self._path) or {}).get("stage", "")
        if stage != self._stage:
            self._stage, self._entered = stage, time.monotonic()
        if not self._process.is_alive():
            return True
        if time.monotonic() - self._entered > self._args.limit:
            self._why = f"no end within {self._args.limit:g} s"
        elif held > self._args.memory * 2**30:
            self._why = f"more than {self._args.memory:g} GiB of memory"
        else:
            return False
        self._process.kill()
        return True

    def row(self) -> Row:
        """Return what there is to say once it has ended."""
        self._process.join()
        code = self._process.exitcode or 0
        late = self._why.startswith("no end")
        row = read(self._path) or {"zoo": self.key[0], "name": self.key[1], "works": "", "why": "", "stage": "start"}
        row |= {"peak_bytes": self._peak, "total_seconds": time.monotonic() - self._began}
        stage = row.pop("stage")
        if stage == "done" or (not code and not self._why):
            return row
        said = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        why = self._why or (f"ended by signal {-code}" if code < 0 else "") or row["why"] or " ".join(said[-1:])
        if row["works"] == "pruned":
            return row | {stage: {"ok": False, "why": why}}
        kind = ("timed out" if late else "crashed") if stage == "shrink" else "not built"
        return row | {"works": kind, "why": f"{stage}: {why}"}


def work(zoo: str, name: str, folder: Path, onnx: bool) -> None:
    """Make one row, in a process that has been forked for it; what it prints goes to a file."""
    with (folder / "log").open("w") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")  # if memory runs out all the same, this one goes
    coverage_row.make(zoo, name, folder / "row.json", onnx=onnx)


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
    """Make the missing rows. No thread is used here: processes are forked from this one."""
    coverage_row.preload()
    waiting, running, done = list(todo), dict[str, Attempt](), 0
    with tempfile.TemporaryDirectory() as scratch:
        while waiting or running:
            if waiting and (not running or (len(running) < args.jobs and free_memory() > ROOM)):
                key = waiting.pop(0)
                folder = Path(tempfile.mkdtemp(dir=scratch))
                running[str(folder)] = Attempt(key, folder, args)
            for name in [name for name, attempt in running.items() if attempt.ended()]:
                row = running.pop(name).row() | {"commit": source}
                shutil.rmtree(name, ignore_errors=True)
                table.put(row)
                done += 1
                print(f"{done:3}/{len(todo)} {line(row)}", flush=True)
            time.sleep(POLL)


def line(row: Row) -> str:
    """A row in one line, for whoever waits."""
    left = f"{row['parameters'][1] / row['parameters'][0]:.2f} left" if "parameters" in row else row["why"][:200]
    failed = [f"{k}: {v['why'][:150]}" for k, v in row.items() if isinstance(v, dict) and v.get("ok", True) is False]
    start = f"{row['zoo']:17} {row['name']:34} {row['works']:9} {row['total_seconds']:5.0f} s"
    return f"{start}  {left}  {'; '.join(failed)}".rstrip()


def head(args: argparse.Namespace, source: str, order: list[tuple[str, str]]) -> Row:
    """What the rows depend on."""
    return {
        "schema": 1,
        "benchmark": "coverage",
        "command": shlex.join(["python", "benchmarks/coverage.py", *args.words]),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": source,
        "machine": machine() | {"threads": 1, "processes": args.jobs},
        "versions": {"python": platform.python_version()} | {p: metadata.version(p) for p in PACKAGES},
        "seeds": coverage_row.SEEDS | {"plain": list(coverage_row.PLAIN_SEEDS)},
        "channels_kept": coverage_row.CHANNELS_KEPT,
        "tolerances": {
            "float64": coverage_row.TOLERANCE,
            "float32": coverage_row.SINGLE,
            "export": coverage_row.EXPORT_TOLERANCE,
        },
        "limits": {"stage_seconds": args.limit, "memory_gib": args.memory},
        "models": dict(Counter(zoo for zoo, _ in order)),
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
        table = Table(args.out, order, head(args, source, order))
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
