"""What the benchmark of the sparse CPU runtime measures: one function for each kind of row."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur import Method, Target, prune_
from secateur.allocate import Layerwise
from secateur.metrics.latency import torch_threads
from secateur.patterns import Block, Unstructured
from secateur.sparse import compile, isa, use_isa
from secateur.sparse.formats import nbytes
from secateur.sparse.layers import SparseLayer
from secateur.sparse.tune import Problem, Tuner, build
from secateur.types import Pattern
from sparse_page import SPARSITIES
from sparse_rivals import ONE_THREAD, Turns, in_turn, rivals, with_one_thread

L2, DRAM = 16 * 2**20, 512 * 2**20
"""Bytes written between two calls: the weights then come from the last cache, or from memory."""

Row = dict[str, Any]


@dataclass(frozen=True)
class LinearCase:
    """A linear layer.

    Attributes:
        name: Of the row.
        rows: Outputs.
        columns: Inputs.
        tokens: Vectors at a time.
        block: Of the pruning.
        flush: Bytes written between two calls.
    """

    name: str
    rows: int
    columns: int
    tokens: int
    block: tuple[int, int] = (1, 1)
    flush: int = L2


LINEAR = (
    LinearCase("768 -> 3072, 128 tokens", 3072, 768, 128),
    LinearCase("4096 -> 4096, 128 tokens", 4096, 4096, 128),
    LinearCase("768 -> 3072, 128 tokens, 4x1 blocks", 3072, 768, 128, (4, 1)),
    LinearCase("4096 -> 4096, 128 tokens, 4x1 blocks", 4096, 4096, 128, (4, 1)),
    LinearCase("768 -> 3072, 8 tokens", 3072, 768, 8),
    LinearCase("4096 -> 4096, 8 tokens", 4096, 4096, 8),
    LinearCase("4096 -> 4096, 1 token, weights in memory", 4096, 4096, 1, flush=DRAM),
)


def method(sparsity: float, block: tuple[int, int] = (1, 1)) -> Method:
    """Return magnitude pruning, every layer alike."""
    pattern: Pattern = Unstructured() if block == (1, 1) else Block(*block)
    return Method(target=Target("sparsity", sparsity), pattern=pattern, allocate=Layerwise())


def pruned_layer(case: LinearCase, sparsity: float) -> tuple[nn.Linear, Problem]:
    """Return a pruned layer, and what the tuner is asked about it."""
    torch.manual_seed(0)
    layer = nn.Linear(case.columns, case.rows).eval()
    prune_(layer, method(sparsity, case.block))
    x = torch.randn(case.tokens, case.columns)
    return layer, Problem(layer.weight.detach(), layer.bias.detach(), "none", None, x)


def linear(case: LinearCase, sparsity: float, threads: int, runs: int) -> Row:
    """Measure one layer against every dense engine."""
    layer, problem = pruned_layer(case, sparsity)
    x = problem.x
    started = time.perf_counter()
    tuned = Tuner(threads, None).tune(problem)
    seconds = time.perf_counter() - started
    packed = build(problem, tuned.option, threads)
    calls = rivals(layer, (x,), threads=threads, whole=False) | {"secateur": lambda: packed(x)}
    if threads > 1:
        with torch_threads(1):
            one = build(problem, Tuner(1, None).tune(problem).option)
            calls |= with_one_thread(rivals(layer, (x,), threads=1, whole=False) | {"secateur": lambda: one(x)})
    turns = in_turn(calls, (x,), runs=runs, flush=case.flush, threads=threads)
    dense = layer.weight.numel() * 4
    kept = nbytes(packed.packed) if isinstance(packed, SparseLayer) else dense
    return row(case.name, sparsity, turns, threads) | {
        "option": str(tuned.option),
        "bytes": kept / dense,
        "tuning_s": seconds,
        "tokens": case.tokens,
        "gb_per_s": kept / turns.ms["secateur"] / 1e6,
        "gmac_per_s": float(layer.weight.count_nonzero()) * case.tokens / turns.ms["secateur"] / 1e6,
    }


def row(name: str, sparsity: float, turns: Turns, threads: int) -> Row:
    """Put times beside the fastest dense one, and where there are two threads also beside those with one."""
    times = {engine: t for engine, t in turns.ms.items() if not engine.endswith(ONE_THREAD)}
    dense = {engine: t for engine, t in times.items() if engine != "secateur"}
    best = min(dense, key=lambda engine: dense[engine])
    alone = {engine.removesuffix(ONE_THREAD): t for engine, t in turns.ms.items() if engine not in times}
    return {
        "workload": name,
        "sparsity": sparsity,
        "threads": threads,
        "isa": isa(),
        "ms": times,
        "fastest_dense": best,
        "speedup": dense[best] / times["secateur"],
    } | ({"ms, one thread": alone, "disturbed": turns.disturbed} if alone else {})


def _declare_operators() -> None:
    """Before torchvision is imported, by us or by transformers: beside a CPU build of torch it lacks its own."""
    from _torchvision_ops import declare

    declare()


def resnet50() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """ResNet-50 and one image."""
    _declare_operators()
    import torchvision

    torch.manual_seed(0)
    return torchvision.models.resnet50(weights=None).eval(), (torch.randn(1, 3, 224, 224),)


class Hidden(nn.Module):
    """A language model that returns its last hidden values, from token ids alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """Return ``[batch, tokens, features]``."""
        out: Tensor = self.model(input_ids=ids).last_hidden_state
        return out


def bert(tokens: int = 128) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """BERT-base and one sentence."""
    _declare_operators()
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(BertConfig(attn_implementation="eager")).eval()
    return Hidden(model).eval(), (torch.randint(0, 30000, (1, tokens)),)


def efficientnet() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """EfficientNet-Lite0 with its real weights, and one image."""
    from batch_norm import network

    torch.manual_seed(0)
    return network().eval(), (torch.randn(1, 3, 224, 224),)


def minilm(tokens: int = 128) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """MiniLM-L6 with its real weights, and one sentence."""
    _declare_operators()
    from sentences.model import load_model

    torch.manual_seed(0)
    return Hidden(load_model().encoder).eval(), (torch.randint(0, 30000, (1, tokens)),)


MODELS: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "ResNet-50, batch 1": resnet50,
    "BERT-base, 128 tokens": bert,
    "EfficientNet-Lite0, real weights, batch 1": efficientnet,
    "MiniLM-L6, real weights, 128 tokens": minilm,
}


def whole(name: str, sparsity: float, threads: int, runs: int) -> Row:
    """Measure a whole network against every dense engine."""
    model, inputs = MODELS[name]()
    prune_(model, method(sparsity))
    started = time.perf_counter()
    compiled = compile(model, inputs, threads=threads, cache=False, measure=False)
    seconds = time.perf_counter() - started
    calls = rivals(model, inputs, threads=threads, whole=True) | {"secateur": lambda: compiled(*inputs)}
    if threads > 1:
        with torch_threads(1):
            one = compile(model, inputs, threads=1, cache=False, measure=False)
            calls |= with_one_thread(rivals(model, inputs, threads=1, whole=True) | {"secateur": lambda: one(*inputs)})
    turns = in_turn(calls, runs=runs, threads=threads)
    layers = compiled.report.layers
    return row(name, sparsity, turns, threads) | {
        "difference": compiled.report.difference,
        "bytes": sum(layer.bytes for layer in layers) / max(sum(layer.dense_bytes for layer in layers), 1),
        "packed": sum(layer.choice not in ("dense", "kernel") for layer in layers),
        "kernels": sum(layer.choice == "kernel" for layer in layers),
        "layers": len(layers),
        "tuning_s": seconds,
    }


def gemm_peak() -> Row:
    """Multiply-adds per second of the fastest dense product: what a kernel could reach at best."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    ms = in_turn({"gemm": lambda: F.linear(a, b)}, runs=15).ms["gemm"]
    return {"workload": "dense 2048^3 product", "gmac_per_s": 2048**3 / ms / 1e6}


def bandwidth() -> Row:
    """Bytes per second that one thread reads from memory: what a product with one vector could reach at best."""
    memory = torch.ones(DRAM // 4)
    ms = in_turn({"sum": memory.sum}, runs=9).ms["sum"]
    return {"workload": "reading 512 MiB", "gb_per_s": DRAM / ms / 1e6}


def cells(runs: int) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Yield the key of every row, and what measures it."""
    yield "peak", gemm_peak
    yield "bandwidth", bandwidth
    for case in LINEAR:
        for sparsity in SPARSITIES:
            yield f"linear/{case.name}/{sparsity:g}/1", partial(linear, case, sparsity, 1, runs)
    for name in MODELS:
        for sparsity in SPARSITIES:
            yield f"model/{name}/{sparsity:g}/1", partial(whole, name, sparsity, 1, runs)
    for case in LINEAR[:2]:
        yield f"linear/{case.name}/0.9/2", partial(linear, case, 0.9, 2, runs)
    for name in list(MODELS)[:2]:
        yield f"model/{name}/0.9/2", partial(whole, name, 0.9, 2, runs)
    for case in LINEAR:
        yield f"narrower/{case.name}/0.9", partial(narrower, case, 0.9, runs)


def narrower(case: LinearCase, sparsity: float, runs: int) -> Row:
    """Measure the widest instruction set beside the next one, each with what its tuner chose."""
    _, problem = pruned_layer(case, sparsity)
    x = problem.x
    before, calls = isa(), {}
    for name in ("x86-64-v4", "x86-64-v3"):
        use_isa(name)
        packed = build(problem, Tuner(1, None).tune(problem).option)
        calls[name] = partial(_under, name, packed, x)
    times = in_turn(calls, (x,), runs=runs, flush=case.flush).ms
    use_isa(before)
    return {"workload": case.name, "sparsity": sparsity, "ms": times, "ratio": times["x86-64-v4"] / times["x86-64-v3"]}


def _under(name: str, packed: nn.Module, x: Tensor) -> Tensor:
    use_isa(name)
    out: Tensor = packed(x)
    return out
