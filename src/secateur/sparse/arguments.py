"""What products and convolutions are given, checked, and as the library takes it."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.errors import SparseError, check_choice
from secateur.sparse.library import ACTIVATIONS, EpilogueStruct, PlanStruct


def check_all(x: Tensor, rows: int, bias: Tensor | None, residual: Tensor | None, activation: str) -> None:
    """Refuse what no product can be carried out with; shapes of inputs and residuals are checked by each of them.

    Raises:
        SparseError: Says what came, and what was expected.
        UnknownNameError: When there is no such activation.
    """
    check_floats("the input", x)
    if bias is not None:
        check_bias(bias, rows)
    if residual is not None:
        check_floats("the residual", residual)
    if activation not in ACTIVATIONS:
        check_choice("activation", activation, ACTIVATIONS)


def check_floats(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that is not dense float32 on the CPU, or that wants a gradient.

    Raises:
        SparseError: Says what it is, and what to do.
    """
    if not (tensor.dtype is torch.float32 and tensor.is_cpu and tensor.layout is torch.strided):
        raise SparseError(
            f"sparse kernels take dense float32 on the CPU, and {name} is {tensor.dtype} on {tensor.device} with "
            f"layout {tensor.layout}; convert it with .float().cpu()"
        )
    if tensor.requires_grad and torch.is_grad_enabled():
        raise SparseError(
            f"sparse kernels have no backward pass, and {name} wants a gradient; wrap the call in "
            "torch.inference_mode() or torch.no_grad()"
        )


def check_bias(bias: Tensor, rows: int) -> None:
    """Refuse a bias that is not one float32 for each output.

    Raises:
        SparseError: Says what came, and what was expected.
    """
    check_floats("the bias", bias)
    if tuple(bias.shape) != (rows,):
        raise SparseError(f"expected a bias of shape ({rows},), got {tuple(bias.shape)}")


def plan_of(tile: int, threads: int | None) -> PlanStruct:
    """Return a plan; on as many threads as torch has by default.

    Raises:
        SparseError: When a number is out of range.
    """
    if type(tile) is not int or not 0 <= tile <= 256 or tile & (tile - 1):
        raise SparseError(f"tile must be a power of two up to 256, or 0 to leave it to the kernels; got {tile!r}")
    if threads is None:
        threads = torch.get_num_threads()
    elif type(threads) is not int or not 1 <= threads < 2**31:
        raise SparseError(
            f"threads must be a whole number of at least 1, or None for as many as torch's; got {threads!r}"
        )
    return PlanStruct(threads, tile)


def epilogue_of(bias: Tensor | None, residual: Tensor | None, activation: str) -> EpilogueStruct:
    """Return what is done behind a sum; both tensors are contiguous, and kept alive by the caller."""
    return EpilogueStruct(
        None if bias is None else bias.data_ptr(),
        None if residual is None else residual.data_ptr(),
        ACTIVATIONS.index(activation),
    )
