"""Which kernel, panel and tile a layer runs fastest with, or whether it stays dense: measured, with cold caches."""

from __future__ import annotations

import functools
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur._cpu import cpu_name
from secateur._files import write_atomic
from secateur.errors import SecateurWarning
from secateur.sparse.arrays import as_matrix
from secateur.sparse.fallback import AFTERWARDS, LEAST_SPARSITY, Csr
from secateur.sparse.formats import BLOCKS, Bitmask, Panelled, Weight, parts_for
from secateur.sparse.image_layers import DepthwiseConv2d, MaxPool2d
from secateur.sparse.images import Convolution
from secateur.sparse.layers import SparseConv2d, SparseLinear
from secateur.sparse.library import engine, reason

VERSION = 3
LEAST_GAIN = 1.05
"""A sparse layer must be this much faster than the dense one to be chosen: less is within what a clock can tell."""

FILL = 0.9
"""Blocks are tried where at least this part of what they would store is not zero."""

FLUSH_BYTES = 16 * 2**20
"""Written between two measurements: more than a second-level cache holds. In a model the other layers do that."""


@dataclass(frozen=True)
class Option:
    """One way to run a layer.

    Attributes:
        kind: ``"dense"``, ``"panelled"``, ``"bitmask"``; where the kernels are missing, ``"csr"``; ``"kernel"`` for a
            layer that stores no sparse weight.
        block: Rows and columns of a block.
        panel: Columns of a panel.
        tile: Positions at a time.
    """

    kind: str = "dense"
    block: tuple[int, int] = (1, 1)
    panel: int = 0
    tile: int = 0

    def __str__(self) -> str:
        if self.kind != "panelled":
            return self.kind
        block = "" if self.block == (1, 1) else f" {self.block[0]}x{self.block[1]}"
        return f"panelled{block}, panel {self.panel}, tile {self.tile or 'auto'}"


@dataclass(frozen=True)
class Tuned:
    """What was chosen for a layer, beside what it was chosen over.

    Attributes:
        option: The fastest one.
        dense_ms: Median of the dense layer, bias and activation included.
        ms: Median of the fastest sparse option, chosen or not.
        cached: Whether the figures come from an earlier run.
    """

    option: Option
    dense_ms: float
    ms: float
    cached: bool = False


@dataclass(frozen=True)
class Problem:
    """A layer, and an input of the size that it will see.

    Attributes:
        weight: Dense float32, ``[outputs, inputs]`` or ``[outputs, channels of a group, height, width]``.
        bias: Of the outputs.
        activation: What comes behind it.
        convolution: Of a convolution.
        x: An example.
    """

    weight: Tensor
    bias: Tensor | None
    activation: str
    convolution: Convolution | None
    x: Tensor

    @property
    def depthwise(self) -> bool:
        """Whether every channel has kernels of its own."""
        return self.convolution is not None and self.weight.shape[1] == 1 < self.x.shape[1]

    @property
    def positions(self) -> int:
        """Vectors that pass through at a time."""
        if self.convolution is None:
            return math.prod(self.x.shape[:-1])
        return math.prod(self.convolution.output(self.x.shape[2], self.x.shape[3]))

    @functools.cached_property
    def density(self) -> float:
        """Part of the weights that is not zero."""
        return float(self.weight.count_nonzero()) / max(self.weight.numel(), 1)

    @functools.cached_property
    def fills(self) -> dict[tuple[int, int], float]:
        """By shape of blocks, which part of the blocks with a non-zero weight is not zero."""
        return {block: self._fill(block) for block in BLOCKS if block != (1, 1)}

    def _fill(self, block: tuple[int, int]) -> float:
        matrix = as_matrix(self.weight) != 0
        pad = (0, -matrix.shape[1] % block[1], 0, -matrix.shape[0] % block[0])
        whole = F.pad(matrix, pad)
        there = whole.unflatten(1, (-1, block[1])).any(2).unflatten(0, (-1, block[0])).any(1)  # type: ignore[no-untyped-call]
        stored = int(there.sum()) * block[0] * block[1]
        return int(matrix.sum()) / stored if stored else 1.0

    def key(self, threads: int) -> str:
        """What the choice depends on, in words."""
        shapes = [tuple(self.weight.shape), tuple(self.x.shape)]
        what: list[object] = [engine(), threads, *shapes, f"{self.density:.2f}", self.activation]
        if self.convolution is not None:
            what.append(self.convolution.flat())
        what.append([f"{fill:.1f}" for fill in self.fills.values()])
        return json.dumps(what)


def build(problem: Problem, option: Option, threads: int = 1) -> nn.Module:
    """Return a layer that runs a problem in one way; for ``"dense"``, one of torch's."""
    return _layer(problem, option, _pack(problem, option, threads))


def _pack(problem: Problem, option: Option, threads: int) -> Weight | None:
    if option.kind in ("dense", "kernel"):
        return None
    if option.kind == "bitmask":
        return Bitmask.pack(problem.weight)
    if option.kind == "csr":
        return Csr.pack(problem.weight)
    parts = parts_for(problem.weight.shape[0], problem.positions if problem.positions > 1 else 64, threads)
    return Panelled.pack(problem.weight, block=option.block, panel=option.panel, parts=parts)


def _layer(problem: Problem, option: Option, weight: Weight | None) -> nn.Module:
    p = problem
    if option.kind == "kernel":
        assert p.convolution is not None
        return DepthwiseConv2d(p.weight, p.convolution, p.x.shape[1], p.bias, activation=p.activation)
    if weight is None:
        return Dense(p)
    if p.convolution is None or isinstance(weight, Bitmask):
        return SparseLinear(weight, p.bias, activation=p.activation, tile=option.tile)
    return SparseConv2d(weight, p.convolution, p.bias, activation=p.activation, tile=option.tile)


class Dense(nn.Module):
    """The dense rival: torch's own layer and activation."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.problem = problem

    def forward(self, x: Tensor) -> Tensor:
        """Return the same as the sparse layer."""
        p = self.problem
        if p.convolution is None:
            return AFTERWARDS[p.activation](F.linear(x, p.weight, p.bias))
        c = p.convolution
        top, left, bottom, right = c.padding
        groups = x.shape[1] // p.weight.shape[1]
        if (top, left) != (bottom, right):
            x = F.pad(x, (left, right, top, bottom))
            top = left = 0
        return AFTERWARDS[p.activation](F.conv2d(x, p.weight, p.bias, c.stride, (top, left), c.dilation, groups))


def options(problem: Problem) -> Iterator[Option]:
    """Yield the sparse ways that are worth a measurement."""
    if reason():
        if problem.convolution is None and 1 - problem.density >= LEAST_SPARSITY:
            yield Option("csr")
    elif problem.depthwise:
        yield Option("kernel")
    else:
        yield from _packed(problem)


def _packed(problem: Problem) -> Iterator[Option]:
    columns = problem.weight.numel() // max(problem.weight.shape[0], 1)
    blocks = [(1, 1), *(block for block, fill in problem.fills.items() if problem.density and fill >= FILL)]
    if problem.convolution is None and problem.positions == 1:
        yield Option("bitmask")
        for block in blocks:
            for panel in sorted({256 * block[1], min(-(-columns // block[1]) * block[1], 65536)}):
                yield Option("panelled", block, panel)
        return
    widest = next((t for t in (16, 32, 64) if t >= problem.positions), 64)
    for block in blocks:
        for panel in (64, 128, 256):
            if panel >= 2 * columns and panel > 64:
                continue
            for tile in (widest // 2, widest):
                yield Option("panelled", block, panel, tile)


class Tuner:
    """Measures layers, and remembers what it found in a file by processor, instruction set and shape.

    Args:
        threads: Threads of the kernels and of torch.
        cache: The file; ``None`` remembers nothing beyond this object.
    """

    def __init__(self, threads: int, cache: Path | None) -> None:
        self.threads = threads
        self._path = cache
        self._found: dict[str, dict[str, object]] = {}
        self._dirty = False
        self._flush = torch.zeros(FLUSH_BYTES // 4)
        if cache is not None:
            self._read(cache)

    def tune(self, problem: Problem) -> Tuned:
        """Return the fastest way to run a layer."""

        def layers() -> dict[Option, nn.Module]:
            ways = [Option(), *options(problem)]
            packed = {replace(way, tile=0) for way in ways}  # tiles share them
            weights = {one: _pack(problem, one, self.threads) for one in packed}
            return {way: _layer(problem, way, weights[replace(way, tile=0)]) for way in ways}

        return self._fastest(problem.key(self.threads), layers, problem.x)

    def tune_pool(self, dense: nn.Module, ours: MaxPool2d, x: Tensor) -> Tuned:
        """Return whether a maximum over images is faster in torch or in the kernels."""
        key = json.dumps(["max_pool2d", engine(), self.threads, tuple(x.shape), ours.convolution.flat()])
        return self._fastest(key, lambda: {Option(): dense, Option("kernel"): ours}, x)

    def _fastest(self, key: str, layers: Callable[[], dict[Option, nn.Module]], x: Tensor) -> Tuned:
        key = f"{cpu_name('model name', 'CPU part')}|{torch.__version__}|{key}"
        known = self._known(key)
        if known is not None:
            return known
        running = layers()
        ways = list(running)
        times: dict[Option, list[float]] = {way: [] for way in ways}
        with torch.inference_mode():
            for way in ways:  # nothing is timed the first time: code and pages are touched
                running[way](x)
            for rounds, keep in ((2, 1.3), (5, math.inf)):
                for _ in range(rounds):
                    for way in ways:
                        times[way].append(self._cold(running[way], x))
                best = min(median(times[way]) for way in ways)
                ways = [way for way in ways if way.kind == "dense" or median(times[way]) <= keep * best]
        left = [way for way in ways if way.kind != "dense"]
        # What fell behind at once is only reported.
        tried = left or [way for way in times if way.kind != "dense"]
        fastest = min(tried, key=lambda way: median(times[way]), default=Option())
        dense_ms, ms = median(times[Option()]), median(times[fastest])
        chosen = fastest if left and ms * LEAST_GAIN <= dense_ms else Option()
        tuned = Tuned(chosen, dense_ms, ms)
        self._found[key] = asdict(tuned) | {"option": asdict(chosen)}
        self._dirty = True
        return tuned

    def _cold(self, layer: nn.Module, x: Tensor) -> float:
        self._flush.add_(1.0)
        x.sum()  # the layer before has just made it
        start = time.perf_counter_ns()
        layer(x)
        return (time.perf_counter_ns() - start) / 1e6

    def _known(self, key: str) -> Tuned | None:
        entry: Any = self._found.get(key)
        if entry is None:
            return None
        try:
            option = entry["option"]
            block = tuple(int(n) for n in option["block"])
            found = Option(str(option["kind"]), (block[0], block[1]), int(option["panel"]), int(option["tile"]))
            return Tuned(found, float(str(entry["dense_ms"])), float(str(entry["ms"])), cached=True)
        except (KeyError, TypeError, ValueError, IndexError):
            return None  # measured again, and written over

    def _read(self, path: Path) -> None:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["version"] == VERSION:
                self._found = {str(k): v for k, v in content["layers"].items() if isinstance(v, dict)}
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warnings.warn(
                f"the file of tuned layers {path} cannot be read ({error}); layers are measured again",
                SecateurWarning,
                stacklevel=2,
            )

    def save(self) -> None:
        """Write what was measured, if there is a file for it and anything new."""
        if self._path is None or not self._dirty:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        content = {"version": VERSION, "layers": self._found}
        write_atomic(self._path, json.dumps(content, indent=1).encode())
        self._dirty = False


def default_cache() -> Path:
    """Return the file of tuned layers: ``$XDG_CACHE_HOME/secateur/sparse.json``, or under ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    return Path(base) / "secateur" / "sparse.json"


__all__ = ["LEAST_GAIN", "Option", "Problem", "Tuned", "Tuner", "build", "default_cache", "options"]
