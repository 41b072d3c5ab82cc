"""The shared library of sparse kernels: found, checked, and called through ctypes."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

from secateur.errors import SparseError, nearest

ABI = 3
"""Version of the interface in ``cpp/include/secateur_sparse.h`` that this package was written for."""

VARIABLE = "SECATEUR_SPARSE_LIBRARY"
ISA_VARIABLE = "SECATEUR_ISA"
NAMES = ("libsecateur_sparse.so", "libsecateur_sparse.dylib", "secateur_sparse.dll")

ACTIVATIONS = ("none", "relu", "relu6", "gelu", "gelu_tanh", "silu")
"""In the library's own order."""


class PanelledStruct(ctypes.Structure):
    """``secateur_panelled``."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("block_rows", ctypes.c_int32),
        ("block_columns", ctypes.c_int32),
        ("panel", ctypes.c_int32),
        ("parts", ctypes.c_int32),
        ("index_bytes", ctypes.c_int32),
        ("blocks", ctypes.c_int64),
        ("run_count", ctypes.c_int64),
        ("values", ctypes.c_void_p),
        ("indices", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("runs", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
    )


class BitmaskStruct(ctypes.Structure):
    """``secateur_bitmask``."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("values", ctypes.c_void_p),
        ("bits", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
    )


class EpilogueStruct(ctypes.Structure):
    """``secateur_epilogue``."""

    _fields_ = (("bias", ctypes.c_void_p), ("residual", ctypes.c_void_p), ("activation", ctypes.c_int32))


class PlanStruct(ctypes.Structure):
    """``secateur_plan``."""

    _fields_ = (("threads", ctypes.c_int32), ("tile", ctypes.c_int32))


class ConvolutionStruct(ctypes.Structure):
    """``secateur_convolution``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "channels", "height", "width")),
        *((name, ctypes.c_int32) for name in ("kernel_height", "kernel_width", "stride_height", "stride_width")),
        *((name, ctypes.c_int32) for name in ("pad_top", "pad_left", "pad_bottom", "pad_right")),
        *((name, ctypes.c_int32) for name in ("dilation_height", "dilation_width", "x_block", "y_block")),
    )


class StepStruct(ctypes.Structure):
    """``secateur_step``."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("kind", "x", "residual", "y", "activation", "tile")),
        ("weight", ctypes.POINTER(PanelledStruct)),
        ("kernels", ctypes.c_void_p),
        ("multiplier", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("shape", ConvolutionStruct),
    )


CONV2D, DEPTHWISE2D, MAX_POOL2D = range(3)
"""Kinds of steps."""

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_PANELLED, _BITMASK = ctypes.POINTER(PanelledStruct), ctypes.POINTER(BitmaskStruct)
_AFTER, _PLAN = ctypes.POINTER(EpilogueStruct), ctypes.POINTER(PlanStruct)

_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "abi": (_INT, ()),
    "error": (ctypes.c_char_p, (_INT,)),
    "isas": (ctypes.c_char_p, ()),
    "usable_isas": (ctypes.c_char_p, ()),
    "isa": (ctypes.c_char_p, ()),
    "use_isa": (_INT, (ctypes.c_char_p,)),
    "image_block": (_INT, ()),
    "use_parallel": (None, (_POINTER,)),
    "panelled_sizes": (_INT, (_POINTER, _LONG, _LONG, _INT, _INT, _INT, _INT, _POINTER, _POINTER)),
    "panelled_pack": (_INT, (_POINTER, _PANELLED, *(_POINTER,) * 5)),
    "panelled_check": (_INT, (_PANELLED, *(_LONG,) * 5)),
    "panelled_unpack": (_INT, (_PANELLED, _POINTER)),
    "bitmask_count": (_INT, (_POINTER, _LONG, _LONG, _POINTER)),
    "bitmask_pack": (_INT, (_POINTER, _BITMASK, *(_POINTER,) * 3)),
    "bitmask_check": (_INT, (_BITMASK, *(_LONG,) * 3)),
    "bitmask_unpack": (_INT, (_BITMASK, _POINTER)),
    "spmm": (_INT, (_PANELLED, _POINTER, _LONG, _LONG, _POINTER, _LONG, _LONG, _LONG, _AFTER, _PLAN)),
    "gemv": (_INT, (_PANELLED, _POINTER, _POINTER, _AFTER, _PLAN)),
    "gemv_bitmask": (_INT, (_BITMASK, _POINTER, _POINTER, _AFTER, _PLAN)),
    "conv2d": (_INT, (_PANELLED, ctypes.POINTER(ConvolutionStruct), _POINTER, _POINTER, _AFTER, _PLAN)),
    "depthwise2d": (
        _INT,
        (_POINTER, _LONG, ctypes.POINTER(ConvolutionStruct), _POINTER, _POINTER, _AFTER, _PLAN),
    ),
    "run": (_INT, (ctypes.POINTER(StepStruct), _LONG, ctypes.POINTER(_POINTER), _LONG, _INT)),
    "max_pool2d": (_INT, (ctypes.POINTER(ConvolutionStruct), _POINTER, _POINTER, _PLAN)),
}


def find() -> Path | None:
    """Return the library that the environment names, or that lies beside this package, or in an installed copy of it.

    Raises:
        SparseError: When the environment variable ``SECATEUR_SPARSE_LIBRARY`` names a file that is not there.
    """
    named = os.environ.get(VARIABLE)
    if named:
        path = Path(named)
        if not path.is_file():
            raise SparseError(f"{VARIABLE} is {named!r}, and there is no such file")
        return path
    here = Path(__file__).resolve().parent
    # An editable install keeps sources and built files apart.
    folders = [here, *(Path(entry) / "secateur" / "sparse" for entry in sys.path if entry)]
    return next((folder / name for folder in folders for name in NAMES if (folder / name).is_file()), None)


@cache
def _opened() -> ctypes.CDLL | str:
    """Open the library once; return why not where it cannot be had."""
    try:
        path = find()
    except SparseError as error:
        return str(error)
    if path is None:
        return (
            "the library of sparse kernels is not installed: this secateur was installed without a C++ compiler, or "
            "for a processor that they are not written for (x86-64 and aarch64 are)"
        )
    try:
        library = ctypes.CDLL(str(path))
        abi = library.secateur_abi
    except (OSError, AttributeError) as error:
        return f"{path.name} cannot be used ({error}); install secateur again"
    abi.restype = ctypes.c_int32
    if abi() != ABI:
        return (
            f"{path.name} has version {abi()} of the kernels' interface, and this secateur needs {ABI}: it is left "
            "over from another version; install secateur again"
        )
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, f"secateur_{name}", None)
        if function is None:
            return f"{path.name} has no function secateur_{name}; install secateur again"
        function.restype, function.argtypes = result, arguments
    if not library.secateur_isa():
        wanted, has = os.environ.get(ISA_VARIABLE, ""), library.secateur_usable_isas().decode()
        what = f"{ISA_VARIABLE} asks for {wanted!r}" if wanted else "it was built for other instruction sets"
        return f"{path.name} cannot run here: {what}, and this processor can use {has or 'none of them'}"
    library.secateur_use_parallel(_torchs_threads())
    return library


def _torchs_threads() -> int | None:
    """Return the address of ``GOMP_parallel`` in the OpenMP library that torch runs on, where it is GNU's.

    Its idle threads spin for a while after every operator of torch, and would keep others from running.
    """
    if not torch.backends.openmp.is_available():  # type: ignore[no-untyped-call]
        return None
    try:
        with Path("/proc/self/maps").open(encoding="utf-8") as lines:
            loaded = {line.split(maxsplit=5)[-1].strip() for line in lines if "/libgomp" in line}
        if len(loaded) != 1:  # which of them torch has is not known
            return None
        return ctypes.cast(ctypes.CDLL(loaded.pop()).GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


def reason() -> str:
    """Return why there are no sparse kernels here, or an empty string where there are."""
    opened = _opened()
    return opened if isinstance(opened, str) else ""


def library() -> ctypes.CDLL:
    """Return the library.

    Raises:
        SparseError: When it cannot be had; see :func:`reason`.
    """
    opened = _opened()
    if isinstance(opened, str):
        raise SparseError(opened)
    return opened


def check(status: int, what: str) -> None:
    """Turn a status into an error.

    Raises:
        SparseError: When it is not 0.
    """
    if status:
        raise SparseError(f"{what}: {library().secateur_error(status).decode()}")


def isas() -> tuple[str, ...]:
    """Return the instruction sets that the kernels can use here, best first."""
    return tuple(library().secateur_usable_isas().decode().split())


def isa() -> str:
    """Return the instruction set in use."""
    return str(library().secateur_isa().decode())


def engine() -> str:
    """Return the instruction set in use, or ``torch`` where the kernels are missing."""
    return "torch" if reason() else isa()


def use_isa(name: str) -> None:
    """Use another instruction set from now on, in the whole process; for tests and measurements.

    Raises:
        SparseError: When the library was not built for it, or the processor does not have it.
    """
    if library().secateur_use_isa(name.encode()):
        built = library().secateur_isas().decode().split()
        what = "this processor does not have it" if name in built else nearest(name, built)
        raise SparseError(f"cannot use the instruction set {name!r}: {what}; usable here: {', '.join(isas())}")
