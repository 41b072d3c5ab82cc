"""Pruning two classic networks on Fashion-MNIST, against the baselines that every method has to beat.

    python benchmarks/fashion_mnist.py --jobs 2

measures three things, three seeds each, and writes ``fashion_mnist.json``, ``fashion_mnist.md`` and plots:

(a) iterative magnitude pruning to 12 times fewer parameters, against the dense network and against the dense network
    trained for as many epochs more (Han et al., Learning both Weights and Connections, 2015);
(b) random, magnitude and weight-times-gradient scores, layerwise and global, at 2 to 32 times fewer parameters, from
    the same dense weights and with the same retraining (Blalock et al., What is the State of Neural Network Pruning?,
    2020);
(c) gradual cubic pruning against pruning at once, to 90 % sparsity in the same number of epochs (Zhu and Gupta, To
    prune, or not to prune, 2017).

An interrupted run continues where it stopped: every finished cell is a line in the cache. Settings were chosen with
``--tune`` on 5,000 images held out of the training set; the test set is only used for the final figures.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples" / "fashion_mnist"), str(ROOT / "benchmarks")]

from data import hold_out, load  # noqa: E402

from cell_runner import add_arguments, limited, run_all  # noqa: E402
from fashion_mnist_cells import Protocol, Run, run_cell, run_dense  # noqa: E402
from results_file import write_json  # noqa: E402
from secateur import SecateurError  # noqa: E402

# For LeNet-5 the held-out images favour a rate of 0.05 by 0.3 points, but some seeds diverge at it.
PROTOCOLS = {
    "lenet_5_caffe": Protocol(6, 1, 4, 2, 3, lr=0.03, retrain_lr=0.03),
    "lenet_300_100": Protocol(15, 4, 5, 4, 10, lr=0.1, retrain_lr=0.05),
}
GRID = {
    "lenet_5_caffe": {"lr": (0.01, 0.02, 0.03, 0.05), "retrain_lr": (0.01, 0.03, 0.05)},
    "lenet_300_100": {"lr": (0.02, 0.05, 0.1), "retrain_lr": (0.01, 0.02, 0.05, 0.1)},
}
CELLS = "fashion_mnist_cells"
TUNING: dict[str, Any] = {"held_out": 5000, "retrain_ratio": 8.0, "retrain_method": "magnitude_global", "seed": 0}


def quick(protocol: Protocol) -> Protocol:
    """Return a protocol that shows in seconds whether everything runs; its figures mean nothing."""
    return replace(
        protocol,
        dense_epochs=1,
        cell_epochs=1,
        rounds=2,
        round_epochs=1,
        gradual_epochs=1,
        ratios=(2, 32),
        seeds=(0,),
        images=2000,
    )


def tune(net: str, protocol: Protocol, folder: str | None) -> dict[str, Any]:
    """Try learning rates on images held out of the training set; never on the test set."""
    torch.set_num_threads(1)
    data = load(folder)
    held_out = min(TUNING["held_out"], len(data.train_labels) // 4)
    run = Run(net, TUNING["seed"], protocol, hold_out(limited(data, protocol.images), held_out))
    dense: dict[float, float] = {}
    states = {}
    for lr in GRID[net]["lr"]:
        record, states[lr] = run_dense(replace(run, protocol=replace(protocol, lr=lr)))
        dense[lr] = record["accuracy"]
        print(f"{net} lr {lr:g}: {dense[lr]:.2f} % (validation)", flush=True)
    state = states[max(dense, key=lambda lr: dense[lr])]
    retrained = {}
    for lr in GRID[net]["retrain_lr"]:
        again = replace(run, protocol=replace(protocol, retrain_lr=lr))
        retrained[lr] = run_cell(again, state, TUNING["retrain_method"], TUNING["retrain_ratio"])["accuracy"]
        print(f"{net} retrain lr {lr:g}: {retrained[lr]:.2f} % (validation)", flush=True)
    return {"lr": {f"{k:g}": v for k, v in dense.items()}, "retrain_lr": {f"{k:g}": v for k, v in retrained.items()}}


def run_tuning(args: argparse.Namespace, protocols: dict[str, Protocol]) -> dict[str, Any]:
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        futures = {net: pool.submit(tune, net, p, args.data) for net, p in protocols.items()}
        return {"settings": TUNING, "accuracy": {net: future.result() for net, future in futures.items()}}


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=sorted(PROTOCOLS), help="only this network")
    parser.add_argument("--tune", action="store_true", help="only choose learning rates, on held-out training images")
    add_arguments(parser, "fashion_mnist", quick="seconds instead of an hour; the figures mean nothing")
    args = parser.parse_args(words)
    args.words = words
    protocols = {net: quick(p) for net, p in PROTOCOLS.items()} if args.quick else PROTOCOLS
    if args.net:
        protocols = {args.net: protocols[args.net]}
    name = "fashion_mnist_quick" if args.quick else "fashion_mnist"  # a smoke test never replaces the real results
    results, tuning = args.out / f"{name}.json", args.out / f"{name}_tuning.json"
    if args.tune:
        write_json(tuning, run_tuning(args, protocols))
        return
    if not args.render:
        write_json(results, run_all("fashion_mnist", CELLS, args, protocols))
    from fashion_mnist_page import write_page  # brings matplotlib, which the workers do not need

    chosen = json.loads(tuning.read_text(encoding="utf-8")) if tuning.exists() else None
    page = write_page(json.loads(results.read_text(encoding="utf-8")), chosen, args.out / f"{name}.md")
    print(f"wrote {results} and {page}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except SecateurError as error:
        sys.exit(f"error: {error}")
