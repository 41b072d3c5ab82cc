"""The founding works of pruning, each measured by one command against the others.

    make bench-founding        (or: python benchmarks/founding.py --jobs 2)

three seeds each, into ``founding.json``, ``founding.md`` and plots:

(a) the rank correlation of every saliency with what really happens when a weight goes, on small networks trained on
    breast cancer and diabetes data;
(b) LeNet-300-100 and LeNet-5 on Fashion-MNIST: accuracy against compression for pruning before, during and after
    training, lottery tickets, sparse training and gates;
(c) where each score made before training puts the last weights: layer collapse;
(d) networks that training itself makes narrow, cut out for real, with their measured latency.

Optimal Brain Surgeon on XOR and the MONK's problems is ``make bench-obs``, its damping on held-out images
``make bench-obs-damping``. An interrupted run continues where it stopped: every finished cell is a line in the cache.
``--net`` computes the cells of one part only, and the page says which are missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples" / "fashion_mnist"), str(ROOT / "benchmarks")]

from cell_runner import add_arguments, run_all  # noqa: E402
from founding_cells import Founding  # noqa: E402
from results_file import write_json  # noqa: E402
from secateur import SecateurError  # noqa: E402

RATIOS = (2, 4, 8, 16, 32, 64, 128)

PROTOCOLS = {
    "lenet_300_100": Founding(6, 3, 0, 0, 0, lr=0.1, retrain_lr=0.05, ratios=RATIOS),
    "lenet_5_caffe": Founding(3, 1, 0, 0, 0, lr=0.03, retrain_lr=0.03, ratios=(4, 16, 64)),
    "norm_net": Founding(4, 1, 0, 0, 0, lr=0.1, retrain_lr=0.05, ratios=(0.5, 0.25)),
    "ranks": Founding(0, 0, 0, 0, 0, lr=0.0, retrain_lr=0.0, ratios=()),
    "collapse": Founding(0, 0, 0, 0, 0, lr=0.0, retrain_lr=0.0, ratios=()),
}
"""Epochs of whole trainings and of retraining, learning rates, compression ratios (of MACs for ``norm_net``)."""


def quick(protocol: Founding) -> Founding:
    """Return a protocol that shows in a minute whether everything runs; its figures mean nothing."""
    return replace(protocol, dense_epochs=1, cell_epochs=1, ratios=protocol.ratios[:1], seeds=(0,), images=1500)


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=sorted(PROTOCOLS), help="compute only this network or part")
    parser.add_argument("--collect", action="store_true", help="compute nothing: gather the cells that are finished")
    add_arguments(parser, "founding", quick="a minute instead of hours; the figures mean nothing")
    args = parser.parse_args(words)
    args.words = [word for word in words if word != "--collect"]  # what computes the cells that were gathered
    protocols = {net: quick(p) for net, p in PROTOCOLS.items()} if args.quick else PROTOCOLS
    compute = () if args.collect else (args.net,) if args.net else None
    name = "founding_quick" if args.quick else "founding"  # a smoke test never replaces the real results
    results = args.out / f"{name}.json"
    if not args.render:
        result: dict[str, Any] = run_all("founding", "founding_cells", args, protocols, compute)
        write_json(results, result)
    from founding_page import write_page  # brings matplotlib, which the workers do not need

    page = write_page(json.loads(results.read_text(encoding="utf-8")), args.out / f"{name}.md")
    print(f"wrote {results} and {page}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except SecateurError as error:
        sys.exit(f"error: {error}")
