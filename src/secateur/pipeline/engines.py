"""The run's networks in every engine at hand, timed in turn: what the zeros are worth on this machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur.metrics import measure_latency
from secateur.metrics.latency import input_tensors

Call = Callable[..., object]


def engines(
    directory: Path,
    exports: Sequence[Mapping[str, Any]],
    models: Mapping[str, nn.Module],
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    *,
    runs: int,
    warmup: int,
    threads: int,
) -> list[dict[str, Any]]:
    """Time the compiled sparse network beside the dense and the pruned one, and beside other engines.

    Only where a run was exported as ``"sparse"``. ONNX Runtime and OpenVINO run the exported ONNX file, if there is one
    and they are installed: the pruned network, whose zeros they multiply by.

    Args:
        directory: Of the run.
        exports: Rows of its result.
        models: ``"dense"`` and ``"pruned"``.
        inputs: Positional and keyword.
        runs: Timed rounds, all engines in turn.
        warmup: Rounds that are not timed.
        threads: Of every engine.

    Returns:
        One row per engine: its name, what it ran, and the measured latency.
    """
    files = {str(row["format"]): directory / str(row["path"]) for row in exports}
    if "sparse" not in files:
        return []
    from secateur.sparse import load

    args, kwargs = inputs
    calls: dict[tuple[str, str], Call] = {
        ("PyTorch", "dense"): models["dense"],
        ("PyTorch", "pruned"): models["pruned"],
        ("secateur", "pruned, sparse kernels"): load(files["sparse"], models["pruned"], inputs, mapped=False),
    }
    if "onnx" in files:
        tensors = input_tensors(args, kwargs)
        others = {"ONNX Runtime": in_onnxruntime, "OpenVINO": in_openvino}
        for engine, opened in others.items():
            call = opened(files["onnx"], tensors, threads)
            if call is not None:
                calls[engine, "pruned"] = call
    names = {f"{engine}, {what}": call for (engine, what), call in calls.items()}
    found = measure_latency(names, args, kwargs, runs=runs, warmup=warmup, threads=threads)
    return [{"engine": engine, "network": what} | found[f"{engine}, {what}"].to_dict() for engine, what in calls]


def in_onnxruntime(model: Path | bytes, tensors: Sequence[Tensor], threads: int) -> Call | None:
    """Open an ONNX file or its bytes in ONNX Runtime.

    Args:
        model: The file.
        tensors: Its inputs, in order.
        threads: To run with.

    Returns:
        What runs it on these inputs, whatever it is called with; ``None`` where the file takes another number of
        inputs, since a constant went into it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    source = model if isinstance(model, bytes) else str(model)
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    wanted = session.get_inputs()
    if len(wanted) != len(tensors):
        return None
    feeds = {value.name: tensor.numpy() for value, tensor in zip(wanted, tensors, strict=True)}
    return lambda *_, **__: session.run(None, feeds)


def in_openvino(model: Path | bytes, tensors: Sequence[Tensor], threads: int) -> Call | None:
    """Open an ONNX file or its bytes in OpenVINO, as :func:`in_onnxruntime`; ``None`` also where it is missing."""
    if importlib.util.find_spec("openvino") is None:
        return None
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": str(threads),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # as all others; it would take bfloat16 where the processor has it
    }
    source = model if isinstance(model, bytes) else str(model)
    compiled = core.compile_model(core.read_model(model=source), "CPU", settings)
    if len(compiled.inputs) != len(tensors):
        return None
    request = compiled.create_infer_request()
    feeds = [tensor.numpy() for tensor in tensors]
    return lambda *_, **__: request.infer(feeds)
