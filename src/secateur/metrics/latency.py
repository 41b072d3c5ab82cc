"""Latency: measured on this machine, or not given at all."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur.errors import MetricsError
from secateur.forward import evaluation_mode_of

REALISED = ("mask", "slice", "sparse")
"""How a mask became physical: not at all, as smaller tensors, or as a sparse format that its runtime uses."""


@dataclass(frozen=True)
class Latency:
    """Measured wall-clock time of one call, and the conditions it holds under.

    Attributes:
        median_ms: Median.
        p10_ms: Tenth percentile.
        p90_ms: Ninetieth percentile.
        runs: Timed calls.
        warmup: Calls before the first timed one.
        threads: Threads of torch during the measurement.
        batch: First dimension of the first tensor input, if any.
        device: Device of the inputs.
        dtype: Dtype of the model's first parameter, or of the first input where the model shows none.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    runs: int
    warmup: int
    threads: int
    batch: int | None
    device: str
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Give torch another number of threads; go back to the one before, whatever happens.

    Args:
        count: Threads meanwhile.

    Yields:
        Nothing.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def inference(models: Sequence[object], threads: int | None = None) -> Iterator[None]:
    """Put modules in eval mode under ``inference_mode``; restore flags and threads afterwards, whatever happens.

    Args:
        models: Modules; other callables are left alone.
        threads: Threads for torch meanwhile; ``None`` leaves them.

    Yields:
        Nothing.
    """
    with ExitStack() as stack:
        for model in models:
            if isinstance(model, nn.Module):
                stack.enter_context(evaluation_mode_of(model))
        if threads is not None:
            stack.enter_context(torch_threads(threads))
        stack.enter_context(torch.inference_mode())
        yield


def input_tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> list[Tensor]:
    """Return the tensors among a call's arguments, in order.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.

    Returns:
        Tensors, nested ones included.

    Raises:
        MetricsError: When ``args`` is not a tuple.
    """
    if not isinstance(args, tuple):
        raise MetricsError(f"args must be a tuple of positional arguments, got {type(args).__name__}; pass (x,)")
    return [leaf for leaf in tree_leaves((args, dict(kwargs or {}))) if isinstance(leaf, Tensor)]


def measure_latency(
    models: Mapping[str, Callable[..., Any]],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    runs: int = 50,
    warmup: int = 10,
    threads: int | None = 1,
    min_seconds: float = 0.0,
) -> dict[str, Latency]:
    """Time several models side by side on the same input.

    One call of each model per round, the first one changing from round to round (A B, B A, ...), so that a
    clock that drifts or a machine that warms up touches all alike. Eval mode, ``inference_mode``, garbage
    collection off; CUDA is synchronised around every call when an input lies there.

    Args:
        models: Modules or callables by name.
        args: Positional inputs, already on the device.
        kwargs: Keyword inputs.
        runs: Timed rounds, at least 1; 50 or more for a figure worth printing.
        warmup: Rounds that are not timed.
        threads: Threads of torch meanwhile; ``None`` leaves them as they are.
        min_seconds: Go on past ``runs`` until this much time has passed.

    Returns:
        One :class:`Latency` per name, percentiles interpolated linearly.

    Raises:
        MetricsError: When there is no model, or a number is out of range.
    """
    if not models or runs < 1 or warmup < 0 or (threads is not None and threads < 1):
        raise MetricsError(
            f"latency needs models, runs >= 1, warmup >= 0 and threads >= 1; "
            f"got {len(models)} models, runs={runs}, warmup={warmup}, threads={threads}"
        )
    tensors = input_tensors(args, kwargs)
    named = dict(kwargs or {})
    cuda = sorted({t.device for t in tensors if t.is_cuda}, key=str)
    times: dict[str, list[float]] = {name: [] for name in models}
    collecting = gc.isenabled()
    try:
        with inference(list(models.values()), threads):
            gc.disable()
            used = torch.get_num_threads()
            for _ in range(warmup):
                for model in models.values():
                    _time_ms(model, args, named, cuda)
            end, done = time.perf_counter() + min_seconds, 0
            while done < runs or time.perf_counter() < end:
                for name in _order(list(models), done):
                    times[name].append(_time_ms(models[name], args, named, cuda))
                done += 1
    finally:
        if collecting:
            gc.enable()
    return {name: _summary(models[name], times[name], warmup, used, tensors) for name in models}


def speedup(dense: Latency, other: Latency, *, realised: str) -> float | None:
    """Return measured median over measured median, or nothing for a mask that is only a mask.

    A masked dense model runs the same kernels on the same shapes: a ratio other than 1 would be noise, so none
    is ever given.

    Args:
        dense: Latency of the original model.
        other: Latency of the pruned model, from the same :func:`measure_latency` call.
        realised: ``"mask"``, ``"slice"`` or ``"sparse"``.

    Returns:
        The ratio (above 1 = faster), or ``None`` when ``realised`` is ``"mask"``.

    Raises:
        MetricsError: When ``realised`` is unknown, or the two were measured under different conditions.
    """
    if realised not in REALISED:
        raise MetricsError(f"realised must be one of {', '.join(REALISED)}; got {realised!r}")
    if realised == "mask":
        return None
    ours, theirs = ((x.threads, x.batch, x.device) for x in (dense, other))
    if ours != theirs:
        raise MetricsError(
            f"latencies of (threads, batch, device) {ours} and {theirs} cannot be compared; "
            "measure both in one measure_latency call"
        )
    return dense.median_ms / other.median_ms if other.median_ms else None


def _order(names: list[str], turn: int) -> list[str]:
    """Rotate the names, so that each goes first equally often."""
    start = turn % len(names)
    return names[start:] + names[:start]


def _time_ms(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], cuda: Sequence[torch.device]
) -> float:
    for device in cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter_ns()
    model(*args, **kwargs)
    for device in cuda:
        torch.cuda.synchronize(device)
    return (time.perf_counter_ns() - start) / 1e6


def _summary(
    model: Callable[..., Any], times: Sequence[float], warmup: int, threads: int, tensors: Sequence[Tensor]
) -> Latency:
    p10, median, p90 = (float(v) for v in np.percentile(np.asarray(times), (10, 50, 90)))
    weights: Iterable[Tensor] = model.parameters() if isinstance(model, nn.Module) else ()
    shown = next(chain(weights, tensors), None)
    batch = tensors[0].shape[0] if tensors and tensors[0].dim() else None
    device = str(tensors[0].device) if tensors else "cpu"
    dtype = "none" if shown is None else str(shown.dtype).removeprefix("torch.")
    return Latency(median, p10, p90, len(times), warmup, threads, batch, device, dtype)
