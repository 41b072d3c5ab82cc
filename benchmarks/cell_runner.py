"""Cells of a benchmark on Fashion-MNIST: each is computed once, kept, and never twice after an interruption."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import time
import zlib
from collections.abc import Collection, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch
from data import Data, load
from safetensors.torch import load_file, save_file

from fashion_mnist_cells import Protocol, Run
from secateur.pipeline.environment import machine


def cache_of(folder: Path, net: str, protocol: Protocol, data: Data) -> Path:
    """Return the folder of the cells that may stand side by side: same settings, library versions and data."""
    labels = zlib.crc32(data.train_labels.numpy().tobytes() + data.test_labels.numpy().tobytes())
    what = [asdict(protocol), torch.__version__, version("secateur"), labels, len(data.train_labels)]
    return folder / f"{net}-{zlib.crc32(json.dumps(what, sort_keys=True).encode()):08x}"


def limited(data: Data, images: int | None) -> Data:
    """Return the first ``images`` of both sets, for --quick."""
    if images is None:
        return data
    return replace(
        data,
        train_images=data.train_images[:images],
        train_labels=data.train_labels[:images],
        test_images=data.test_images[:images],
        test_labels=data.test_labels[:images],
    )


def read_cells(path: Path) -> dict[str, dict[str, Any]]:
    """Read the finished cells of one job; a last line that a crash left unfinished is cut off and done again."""
    if not path.exists():
        return {}
    whole, _, rest = path.read_text(encoding="utf-8").rpartition("\n")
    if rest:
        path.write_text(whole + "\n" if whole else "", encoding="utf-8")
    records = [json.loads(line) for line in whole.splitlines()]
    return {record["key"]: record for record in records}


def job(net: str, seed: int, protocol: Protocol, cache: Path, folder: str | None, cells: str) -> str:
    """Compute the missing cells of one network and seed. Only this process writes this pair's cache files.

    Args:
        net: The network.
        seed: The seed.
        protocol: What its measurements take.
        cache: Folder of its finished cells.
        folder: Folder of the data.
        cells: Module with ``run_dense`` and ``cells_of``.
    """
    module = import_module(cells)
    torch.set_num_threads(1)
    data = limited(load(folder), protocol.images)
    run = Run(net, seed, protocol, data)
    log, checkpoint = cache / f"{seed}.jsonl", cache / f"{seed}.safetensors"
    done = read_cells(log)
    if "dense" not in done or not checkpoint.exists():
        start = time.perf_counter()
        record, state = module.run_dense(run)
        part = checkpoint.with_suffix(".part")
        save_file(state, part)
        part.replace(checkpoint)
        append(log, {"key": "dense", "net": net, "seed": seed} | record | {"seconds": time.perf_counter() - start})
    state = load_file(checkpoint)
    for key, compute in module.cells_of(run, state):
        if key in done:
            continue
        parent = parent_process()
        if parent is not None and not parent.is_alive():
            raise SystemExit(f"{net} seed {seed}: the benchmark was killed; another one may write to these files now")
        start = time.perf_counter()
        record = compute()
        append(log, {"key": key, "net": net, "seed": seed} | record | {"seconds": time.perf_counter() - start})
    return f"{net} seed {seed}"


def append(log: Path, record: dict[str, Any]) -> None:
    """Add one line in one write, on disk before the next cell starts."""
    record["finished"] = time.time()
    with log.open("ab", buffering=0) as file:
        file.write(json.dumps(record).encode() + b"\n")
        os.fsync(file.fileno())
    now = datetime.now().strftime("%H:%M:%S")
    shown = "" if record["accuracy"] is None else f": {record['accuracy']:.2f} %"
    print(f"{now} {record['net']} seed {record['seed']} {record['key']}{shown}", flush=True)


def add_arguments(parser: argparse.ArgumentParser, benchmark: str, *, quick: str) -> None:
    """Add what every benchmark of cells understands.

    Args:
        parser: Of its command line.
        benchmark: Its name.
        quick: What ``--quick`` does.
    """
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each (default 2)")
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--render", action="store_true", help="only write the page again, from the JSON file")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the results")
    parser.add_argument("--cache", type=Path, default=Path(f"runs/{benchmark}"), help="folder for finished cells")
    parser.add_argument("--data", help="folder with the four data files (default: see examples/fashion_mnist)")


def run_all(
    benchmark: str,
    cells_from: str,
    args: argparse.Namespace,
    protocols: Mapping[str, Protocol],
    compute: Collection[str] | None = None,
) -> dict[str, Any]:
    """Compute every missing cell in worker processes, and return the result.

    Args:
        benchmark: Its name, which is that of its file.
        cells_from: Module with ``run_dense`` and ``cells_of``.
        args: ``data``, ``cache``, ``jobs``, ``quick``, and ``words`` of the command line.
        protocols: What each network's measurements take.
        compute: Networks whose missing cells are computed; of the others the finished ones are collected. All if left
            out.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    data = load(args.data)
    caches = {net: cache_of(args.cache, net, p, data) for net, p in protocols.items()}
    for cache in caches.values():
        cache.mkdir(parents=True, exist_ok=True)
    jobs = [(net, seed, p, caches[net], args.data, cells_from) for net, p in protocols.items() for seed in p.seeds]
    wanted = [arguments for arguments in jobs if compute is None or arguments[0] in compute]
    resumed = sum(len(read_cells(caches[net] / f"{seed}.jsonl")) for net, seed, *_ in jobs)
    if args.jobs == 1:
        for arguments in wanted:
            print(f"finished {job(*arguments)}", flush=True)
    else:
        with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
            for future in as_completed([pool.submit(job, *arguments) for arguments in wanted]):
                print(f"finished {future.result()}", flush=True)
    found = [r for net, seed, *_ in jobs for r in read_cells(caches[net] / f"{seed}.jsonl").values()]
    return {
        "schema": 1,
        "benchmark": benchmark,
        "quick": args.quick,
        "command": shlex.join(["python", f"benchmarks/{benchmark}.py", *args.words]),
        "started": started.isoformat(timespec="seconds"),
        "wall_seconds": round(time.perf_counter() - clock, 1),
        "cell_seconds": round(sum(r["seconds"] for r in found), 1),
        "processes": args.jobs,
        "cells_from_cache": resumed,
        "machine": machine() | {"threads_per_process": 1},
        "versions": {"python": platform.python_version()} | {p: version(p) for p in ("secateur", "torch", "numpy")},
        "data": {
            "name": "Fashion-MNIST",
            "train": len(limited(data, next(iter(protocols.values())).images).train_labels),
            "test": len(limited(data, next(iter(protocols.values())).images).test_labels),
            "augmentation": "none",
        },
        "higher_is_better": {"accuracy": True},
        "protocol": {net: asdict(p) for net, p in protocols.items()},
        "cells": found,
    }
