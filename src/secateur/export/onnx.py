"""ONNX files, checked by ONNX's own checker and run by ONNX Runtime before they get their name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.errors import ExportError, MissingExtraError
from secateur.export._capture import capture
from secateur.export._cases import Case, Job, inputs_of
from secateur.export._checks import Export, check_zeros, compare, publish
from secateur.export._common import CAPTURE_ERRORS, first_line, quiet

MAX_BYTES = 2**31 - 1  # of one protobuf message; beyond it the weights would go to files of their own


def require() -> None:
    """Check that the packages are installed.

    Raises:
        MissingExtraError: Naming the one that is not.
    """
    try:
        with quiet():
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError((error.name or "onnx").partition(".")[0], "onnx") from error


def write(job: Job, path: Path) -> Export:
    """Export to one ONNX file.

    The outputs are named after the keys of the model's output, the open dimension is called ``batch``.

    Args:
        job: The model and its answers.
        path: The file.

    Returns:
        The checked export.

    Raises:
        ExportError: The model cannot be converted, or the file does not give the model's answers.
        MissingExtraError: A package is not installed.
    """
    require()
    size = sum(t.nbytes for t in job.model.state_dict().values() if isinstance(t, Tensor))
    if size > MAX_BYTES:
        raise ExportError(f"onnx: the weights take {size} bytes, and one ONNX file holds {MAX_BYTES}; export to pt2")
    return publish(job, path, "onnx", lambda tmp, dynamic: _write(job, tmp, dynamic=dynamic))


def _write(job: Job, path: Path, *, dynamic: bool) -> tuple[float, str, list[str]]:
    """Write, check and compare one file."""
    import onnx
    import onnxruntime

    proto = _convert(job, dynamic=dynamic)
    try:
        data = proto.SerializeToString()
        onnx.checker.check_model(data)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise ExportError(f"onnx: the checker refuses the file: {first_line(error)}") from error
    path.write_bytes(data)
    stored = onnx.load(path)
    notes = _check_initializers(job, {t.name: _array(t) for t in stored.graph.initializer})
    gap, cases = compare(job, _runner(path), dynamic=dynamic, what="onnx")
    return gap, f"onnx.checker {onnx.__version__}, onnxruntime {onnxruntime.__version__}: {cases} inputs", notes


def _convert(job: Job, *, dynamic: bool) -> Any:
    """Return the model as a protobuf message, without what tells of the machine it was made on."""
    program = capture(job, dynamic=dynamic, flat=True)
    taken = set(program.graph_signature.user_inputs)
    names = [f"output_{name}" if name in taken else name for name in job.names]
    try:
        with quiet():
            made = torch.onnx.export(program, dynamo=True, external_data=False, verbose=False, output_names=names)
    except CAPTURE_ERRORS as error:
        raise ExportError(f"onnx: the model cannot be converted: {_reason(error)}") from error
    if made is None:
        raise ExportError("onnx: torch.onnx.export returned nothing; is the installed torch older than 2.10?")
    proto = made.model_proto
    if dynamic:
        symbols = {str(symbol) for symbol in program.range_constraints}
        _rename_dimension(proto.graph, symbols)
    return proto


def _reason(error: BaseException) -> str:
    """Find the line that says what went wrong in the exporter's page of advice."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return first_line(cause)


def _rename_dimension(graph: Any, symbols: set[str]) -> None:
    """Call the one open dimension ``batch`` wherever its generated name occurs."""
    if len(symbols) != 1:
        return
    pattern = re.compile(rf"\b{re.escape(symbols.pop())}\b")
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param:
                dimension.dim_param = pattern.sub("batch", dimension.dim_param)


def _array(initializer: Any) -> Tensor:
    """Return the values of a weight in the file; of dtypes that NumPy lacks, as floats."""
    from onnx import numpy_helper

    array = numpy_helper.to_array(initializer)
    if array.dtype.kind not in "biufc":
        array = array.astype(np.float32)
    return torch.from_numpy(np.array(array))


def _check_initializers(job: Job, stored: dict[str, Tensor]) -> list[str]:
    """Check the zeros in the file: by name, or as values in another order where the exporter moved them.

    Transposed weights of ``nn.Linear`` and the reordered gates of ``nn.LSTM`` lose their names. The same values
    have the same zeros, and that each is in its place follows from the outputs, which are compared.
    """
    weights = dict(job.model.named_parameters(remove_duplicate=False))
    unmatched = []
    for name, mask in job.masks.items():
        weight = weights[name].detach().cpu()
        same = [n for n, p in weights.items() if p is weights[name] and n in stored and stored[n].shape == mask.shape]
        if same:
            check_zeros({n: stored[n] for n in same}, {n: mask.cpu() for n in same}, "onnx")
        elif not any(_same_values(tensor, weight) for tensor in stored.values()):
            unmatched.append(name)
    if not unmatched:
        return []
    return [
        "onnx: the zeros of these weights were not looked up in the file, because the exporter stored them in another "
        f"form: {', '.join(unmatched)}"
    ]


def _same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same values, of whatever dtype, in whatever order."""
    if a.numel() != b.numel():
        return False
    left, right = (t.to(torch.float64).flatten().sort().values for t in (a, b))
    return torch.equal(left, right)


def _runner(path: Path) -> Any:
    """Open the file in ONNX Runtime, on one thread, and return a function that runs a case."""
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    failures: tuple[type[Exception], ...]
    failures = (state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf, state.NotImplemented)
    failures += (state.RuntimeException, state.EPFail, state.NoSuchFile, state.NoModel, state.EngineError)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except failures as error:
        raise ExportError(f"onnx: ONNX Runtime does not open the file: {first_line(error)}") from error
    names = [value.name for value in session.get_inputs()]

    def run(case: Case) -> list[Tensor]:
        inputs = inputs_of(case)
        if len(inputs) != len(names):
            raise ExportError(f"onnx: the file takes {len(names)} inputs ({names}) and the model {len(inputs)}")
        feed = {name: tensor.cpu().numpy() for name, tensor in zip(names, inputs, strict=True)}
        try:
            return [torch.from_numpy(np.array(value)) for value in session.run(None, feed)]
        except failures as error:
            raise ExportError(f"onnx: ONNX Runtime fails on {case.label}: {first_line(error)}") from error

    return run
