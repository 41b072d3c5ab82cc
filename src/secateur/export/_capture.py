"""Capturing a model's graph with ``torch.export``."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.errors import ExportError
from secateur.export._cases import Job, inputs_of
from secateur.export._common import CAPTURE_ERRORS, first_line, plain, quiet, tensors_of


@contextlib.contextmanager
def _plain_forward(model: nn.Module, *, flat: bool) -> Iterator[None]:
    """Let the model return plain values for a while: parameter names stay, as they would not in a wrapper."""
    original = model.forward
    patched = model.__dict__.get("forward")

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        output = plain(original(*args, **kwargs))
        if not flat:
            return output
        given = {id(tensor) for tensor in tensors_of((args, kwargs))}
        # An input that is an output as well would lose its name in ONNX.
        return tuple(t.clone() if id(t) in given else t for t in tensors_of(output))

    model.__dict__["forward"] = forward
    try:
        yield
    finally:
        del model.__dict__["forward"]
        if patched is not None:
            model.__dict__["forward"] = patched


def capture(job: Job, *, dynamic: bool, flat: bool) -> torch.export.ExportedProgram:
    """Capture the model's graph, without the places in the user's files and without the user's inputs.

    Args:
        job: The model.
        dynamic: Leave the batch size open.
        flat: Return the output tensors as one tuple, instead of in the model's own structure.

    Returns:
        The program.

    Raises:
        ExportError: The model cannot be captured.
    """
    example = job.cases[0]
    if dynamic and inputs_of(example)[0].shape[0] == 1:
        example = job.resized[-1]  # a batch of one in the example would be taken for a constant
    # Copies, because one tensor given twice would become one input of the graph.
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (example.args, example.kwargs))
    shapes = None
    if dynamic:
        collection = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
        for tensor in tensors_of((args, kwargs)):
            collection[tensor] = {0: torch.export.Dim("batch")}
        shapes = collection.dynamic_shapes(job.model, args, kwargs)  # type: ignore[no-untyped-call]
    try:
        with quiet(), _plain_forward(job.model, flat=flat):
            program = torch.export.export(job.model, args, kwargs, dynamic_shapes=shapes)
    except CAPTURE_ERRORS as error:
        raise ExportError(f"torch.export cannot capture the model: {first_line(error)}") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    program.example_inputs = None
    return program
