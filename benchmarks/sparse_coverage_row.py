"""One model of the table of what the sparse runtime compiles: ``python sparse_coverage_row.py ZOO NAME``."""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from coverage_models import Case, cases, outputs
from secateur import Method, Target, prune_
from secateur.allocate import Layerwise
from secateur.sparse import compile, load, save
from secateur.sparse.tune import Option, Problem, Tuned, Tuner, options
from secateur.sparse.watch import difference

SPARSITY = 0.9


def pack_everything() -> None:
    """Choose the first way in which the kernels can run a layer: which is the fastest depends on the machine."""

    def tune(self: Tuner, problem: Problem) -> Tuned:
        return Tuned(next(iter(options(problem))), 2.0, 1.0)

    Tuner.tune = tune  # type: ignore[method-assign]
    Tuner.tune_pool = lambda *_: Tuned(Option("kernel"), 2.0, 1.0)  # type: ignore[method-assign]


def measure(case: Case) -> dict[str, Any]:
    """Prune a model, compile it, and compare its answers; save it, load it, and compare these."""
    model = case.build()
    prune_(model, Method(target=Target("sparsity", SPARSITY), allocate=Layerwise()))
    given, other = case.inputs(0), case.inputs(1)
    begin = time.perf_counter()
    compiled = compile(model, given, threads=1, cache=False, measure=False)
    seconds = time.perf_counter() - begin
    report = compiled.report
    found: dict[str, Any] = {
        "layers": len(report.layers),
        "packed": sum(layer.choice != "dense" for layer in report.layers),
        "left": dict(Counter(reason for reason in report.left.values())),
        "traced": report.traced,
        "folded": report.folded,
        "seconds": round(seconds, 1),
    }
    with torch.inference_mode():
        expected = [outputs(model(*args, **kwargs)) for args, kwargs in (given, other)]
        answers = [outputs(compiled(*args, **kwargs)) for args, kwargs in (given, other)]
        found["difference"] = max(map(difference, expected, answers))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.sparse.safetensors"
            save(compiled, path)
            again = load(path, case.build(), given)
            args, kwargs = other
            found["loaded_is_equal"] = all(map(torch.equal, outputs(again(*args, **kwargs)), answers[1]))
    return found


def main(zoo: str, name: str) -> None:
    """Print what became of one model."""
    torch.set_num_threads(1)
    pack_everything()
    warnings.simplefilter("ignore")
    try:
        row = measure(next(case for case in cases(zoo) if case.name == name))
    except Exception as error:  # noqa: BLE001  # a row of the table
        row = {"error": f"{type(error).__name__}: {error}"[:400]}
    print(json.dumps({"zoo": zoo, "name": name} | row))


if __name__ == "__main__":
    main(*sys.argv[1:])
