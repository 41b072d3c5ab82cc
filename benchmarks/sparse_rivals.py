"""The same network as other engines run it, and a stopwatch that looks at all of them in turn."""

from __future__ import annotations

import gc
import io
import statistics
import time
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.pipeline.engines import in_onnxruntime, in_openvino

Call = Callable[[], object]


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


def in_turn(
    calls: Mapping[str, Call],
    inputs: tuple[Tensor, ...] = (),
    *,
    runs: int,
    flush: int = 0,
    warmup: int = 2,
    threads: int = 1,
) -> dict[str, float]:
    """Return the median milliseconds of each call; the order rotates from round to round.

    Args:
        calls: By name.
        inputs: Read just before every call, as if another layer had made them.
        runs: Rounds.
        flush: Bytes written before that, so that weights are not in the caches.
        warmup: Rounds that do not count.
        threads: Of every engine. Where there are several, torch is busy for a while before each call, until those of
            the engine before sleep: idle ones go on spinning, and would take a processor from the next engine.
    """
    buffer, busy = torch.zeros(max(flush // 4, 1)), torch.zeros(2**20)
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    gc.disable()
    try:
        with torch.inference_mode():
            for turn in range(-warmup, runs):
                for name in (names[(turn + i) % len(names)] for i in range(len(names))):
                    until = time.perf_counter() + 0.03 * (threads > 1)
                    while time.perf_counter() < until:
                        busy.add_(1.0)
                    buffer.add_(1.0)
                    for x in inputs:
                        x.sum()
                    start = time.perf_counter_ns()
                    calls[name]()
                    if turn >= 0:
                        times[name].append((time.perf_counter_ns() - start) / 1e6)
    finally:
        gc.enable()
    return {name: statistics.median(values) for name, values in times.items()}
