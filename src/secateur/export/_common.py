"""What the exporters share and what knows no model: silence, errors, and outputs taken apart."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

CAPTURE_ERRORS = (
    RuntimeError,  # everything that torch.compile, torch.export and torch.onnx raise derives from it ...
    ValueError,  # ... or is one of what a model's own code raises when it is traced
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    OSError,
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what the exporters print, warn and log away from the user: every failure becomes an error or a note."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def plain(output: Any) -> Any:
    """Turn dataclasses that PyTorch cannot take apart into dicts of their fields."""
    if dataclasses.is_dataclass(output) and not isinstance(output, type) and type(output) not in pytree.SUPPORTED_NODES:
        return {field.name: plain(getattr(output, field.name)) for field in dataclasses.fields(output)}
    if type(output) in (list, tuple):
        return type(output)(plain(item) for item in output)
    return {key: plain(item) for key, item in output.items()} if type(output) is dict else output


def tensors_of(tree: Any) -> list[Tensor]:
    """Return the tensors of nested values, in PyTorch's order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def difference(expected: Tensor, found: Tensor) -> float:
    r"""Measure how far two outputs are apart.

    .. math:: d = \max_i |y_i - y'_i| \,/\, \max(1, \max_i |y_i|)

    over the finite entries of ``expected`` :math:`y` and ``found`` :math:`y'`.

    Args:
        expected: The model's output.
        found: The exported file's.

    Returns:
        The difference; infinite when shape, dtype or the places of NaN and infinities disagree.

    Example:
        >>> difference(torch.tensor([4.0, 0.0]), torch.tensor([4.0, 1.0]))
        0.25
    """
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return float("inf")
    wide = torch.complex128 if expected.is_complex() else torch.float64
    y, z = expected.detach().cpu().to(wide), found.detach().cpu().to(wide)
    same = (y == z) | (y.isnan() & z.isnan())
    if bool(same.all()):
        return 0.0
    gap = (y - z)[~same].abs()
    if not bool(gap.isfinite().all()):
        return float("inf")
    size = y[y.isfinite()].abs()
    return float(gap.max()) / max(1.0, float(size.max()) if size.numel() else 0.0)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, with its type."""
    text = str(error).strip().split("\n")[0][:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
