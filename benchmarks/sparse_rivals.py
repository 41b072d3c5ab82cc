"""The same network as other engines run it, and a stopwatch that looks at all of them in turn."""

from __future__ import annotations

import gc
import io
import math
import random
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.metrics.latency import torch_threads
from secateur.pipeline.engines import in_onnxruntime, in_openvino

Call = Callable[[], object]

ONE_THREAD = ", one thread"
"""What is added to an engine's name where it runs beside itself with more threads."""


def rivals(model: nn.Module, inputs: tuple[Tensor, ...], *, threads: int, whole: bool) -> dict[str, Call]:
    """Return every dense engine at hand, ready to run on these inputs.

    Args:
        model: Dense, its pruned weights at zero.
        inputs: Positional inputs.
        threads: Of every engine.
        whole: Also in channels-last order, for networks of images.
    """
    found: dict[str, Call] = {"torch eager": lambda: model(*inputs)}
    if whole and inputs[0].dim() == 4:
        last = _channels_last(model)
        images = tuple(x.to(memory_format=torch.channels_last) for x in inputs)
        found["torch eager, channels last"] = lambda: last(*images)
    found |= {"torch inductor": _inductor(model, inputs)}
    data = _onnx(model, inputs)
    for engine, opened in {"ONNX Runtime": in_onnxruntime, "OpenVINO": in_openvino}.items():
        call = opened(data, inputs, threads)
        if call is None:
            raise SecateurError(f"{engine} cannot run this network: is it installed?")
        found[engine] = call
    return found


def _channels_last(model: nn.Module) -> nn.Module:
    import copy

    out: nn.Module = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return out


def _inductor(model: nn.Module, inputs: tuple[Tensor, ...]) -> Call:
    import torch._inductor.config as config

    config.freezing = True  # weights are constants: laid out once, batch norms folded
    torch._dynamo.reset()
    compiled = torch.compile(model)
    with torch.inference_mode():
        compiled(*inputs)
    return lambda: compiled(*inputs)


def _onnx(model: nn.Module, inputs: tuple[Tensor, ...]) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, inputs, dynamo=True, verbose=False)
    buffer = io.BytesIO()
    assert program is not None
    program.save(buffer)
    return buffer.getvalue()


class Turns(NamedTuple):
    """What a stopwatch found.

    Attributes:
        ms: Median of every call.
        disturbed: Rounds that do not count.
    """

    ms: dict[str, float]
    disturbed: int


def with_one_thread(calls: Mapping[str, Call]) -> dict[str, Call]:
    """Return calls that run with one of torch's threads, named after it."""

    def one(call: Call) -> object:
        with torch_threads(1):
            return call()

    return {f"{name}{ONE_THREAD}": partial(one, call) for name, call in calls.items()}


def cores(threads: int) -> float:
    """Return how many times as fast torch multiplies two dense matrices with several threads as with one.

    Virtual processors may share one core for a while; then no program is much faster on two of them.
    """
    a = torch.ones(512, 512)
    best = dict.fromkeys((1, threads), math.inf)
    for count in (1, threads) * 4:
        with torch_threads(count):
            start = time.perf_counter()
            a @ a
            best[count] = min(best[count], time.perf_counter() - start)
    return best[1] / best[threads]


def until_idle(limit: float = 1.0) -> None:
    """Wait until none of this process's threads runs, for so many seconds at most."""
    end = time.perf_counter() + limit
    while time.perf_counter() < end:
        start, used = time.perf_counter(), time.process_time()
        time.sleep(0.005)
        if time.process_time() - used < 0.1 * (time.perf_counter() - start):
            return


def in_turn(
    calls: Mapping[str, Call],
    inputs: tuple[Tensor, ...] = (),
    *,
    runs: int,
    flush: int = 0,
    warmup: int = 2,
    threads: int = 1,
) -> Turns:
    """Return the median milliseconds of each call; the order is another one in every round.

    Args:
        calls: By name.
        inputs: Read just before every call, as if another layer had made them.
        runs: Rounds.
        flush: Bytes written before that, so that weights are not in the caches.
        warmup: Rounds that do not count.
        threads: Of every engine. Where there are several, a call waits until all threads sleep: idle ones go on
            spinning after their engine's call, and would take a processor from the next engine. Rounds that begin or
            end while torch's own dense product gains less than four fifths of the other threads do not count.

    Raises:
        SecateurError: When ten times as many rounds as asked for were disturbed.
    """
    buffer = torch.zeros(max(flush // 4, 1))
    rounds: list[dict[str, float]] = []
    disturbed: list[dict[str, float]] = []
    names = list(calls)

    def undisturbed() -> bool:
        return threads == 1 or cores(threads) >= 1 + 0.8 * (threads - 1)

    gc.disable()
    try:
        with torch.inference_mode():
            while len(rounds) < warmup + runs:
                if len(disturbed) == 10 * runs:
                    raise SecateurError("other programs need the processors: measure again when they do not")
                turn = len(rounds) + len(disturbed)
                quiet = undisturbed()
                times = {}
                for name in random.Random(turn).sample(names, len(names)):  # none always runs behind the same other
                    if threads > 1:
                        until_idle()
                    with torch_threads(1):  # torch's own threads sleep too
                        buffer.add_(1.0)
                        for x in inputs:
                            x.sum()
                    start = time.perf_counter_ns()
                    calls[name]()
                    times[name] = (time.perf_counter_ns() - start) / 1e6
                quiet = quiet and undisturbed()
                (rounds if quiet or turn < warmup else disturbed).append(times)
    finally:
        gc.enable()
    kept = rounds[warmup:]
    return Turns({name: statistics.median(times[name] for times in kept) for name in names}, len(disturbed))
