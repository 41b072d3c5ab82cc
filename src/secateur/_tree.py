"""Nested Python values with tensors in one safetensors file: no pickle, and back bit for bit.

The tensors are stored under the names ``t0``, ``t1``, ... and the structure as JSON in the header:
plain JSON values stand for themselves and lists for lists; everything else is an object with one key,
``{"u": [...]}`` a tuple, ``{"d": [[key, value], ...]}`` a dict, ``{"t": 0}`` tensor ``t0``, ``{"b": 0}``
the bytes in ``t0``, ``{"i": "0x..."}`` a long integer and ``{"f": "7ff8..."}`` a float that is not finite.
"""

from __future__ import annotations

import json
import math
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur._files import DTYPES, raw_bytes, read_tensors, write_tensors
from secateur.errors import CheckpointError

MAX_DEPTH = 100
_STRUCTURE_KEY = "secateur.tree"
# No safetensors name that torch reads back: stored as bytes, dtype and shape in the structure.
_RAW_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.complex128, torch.complex32, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2)
}


def save_tree(path: str | Path, tree: Any, *, metadata: Mapping[str, str] | None = None) -> None:
    """Save nested values in one file: all of it or, on any failure, the previous file untouched.

    Holds dict (any scalar or tuple keys), list, tuple, int, float, str, bool, None, bytes and
    :class:`torch.Tensor` of any dense dtype. A view is written as its elements, not as its storage. The
    same tensor, or two tensors of the same memory and geometry, are written once and load as one object;
    tensors that overlap in another way, and containers that appear twice, load as separate copies.
    Gradients, ``requires_grad``, devices and the class :class:`torch.nn.Parameter` are not kept.

    Args:
        path: The file to write.
        tree: The values.
        metadata: Text for :func:`secateur.checkpoint.read_metadata` and other programs.

    Raises:
        CheckpointError: A value that cannot be held, with its place in the tree, or a failed write.
    """
    encoder = _Encoder(path)
    structure = {"tree": encoder.encode(tree, "tree", 0), "count": len(encoder.tensors), "raw": encoder.raw}
    text = checked_metadata(path, metadata)
    text[_STRUCTURE_KEY] = json.dumps(structure, allow_nan=False, separators=(",", ":"))
    write_tensors(path, encoder.tensors, "tree", text)


def load_tree(path: str | Path) -> Any:
    """Load what :func:`save_tree` saved: equal values, equal bits, tensors on the CPU.

    Args:
        path: The file.

    Returns:
        The nested values.

    Raises:
        CheckpointError: The file is missing, damaged, hostile, or of another kind or version.
    """
    tensors, metadata = read_tensors(path, "tree")
    try:
        structure = json.loads(metadata[_STRUCTURE_KEY])
        count, raw = structure["count"], structure["raw"]
        names = {f"t{i}" for i in range(min(count, len(tensors) + 1))}
        if names != set(tensors):
            missing, extra = sorted(names - set(tensors)), sorted(set(tensors) - names)
            raise ValueError(f"{count} tensors expected; missing: {missing[:5]}, unexpected: {extra[:5]}")
        for name, (dtype, shape) in raw.items():
            tensors[name] = tensors[name].view(_RAW_DTYPES[dtype]).reshape(shape)
        return _decode(structure["tree"], tensors, 0)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path}: the structure of the tree is damaged: {error}") from error


def checked_metadata(path: str | Path, metadata: Mapping[str, str] | None) -> dict[str, str]:
    """Return the user's metadata, refusing what a header cannot hold or what is ours."""
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise CheckpointError(f"{path}: metadata {key!r}: {value!r}: keys and values must be text")
        if key.startswith("secateur."):
            raise CheckpointError(f"{path}: metadata {key!r}: names that start with 'secateur.' are reserved")
        try:
            (key + value).encode()
        except UnicodeEncodeError as error:
            raise CheckpointError(f"{path}: metadata {key!r}: not valid Unicode text: {error}") from error
    return dict(metadata or {})


def check_dense(path: str | Path, where: str, tensor: Tensor) -> None:
    """Refuse tensors whose elements are not plain memory in this process."""
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        reason = f"{type(tensor).__name__} is a special tensor; save a plain one, such as .full_tensor()"
    elif tensor.is_meta:
        reason = "a tensor on the meta device has no values; materialise the model first"
    elif tensor.layout != torch.strided or tensor.is_quantized:
        reason = f"{tensor.layout}, {tensor.dtype} is not a dense tensor; convert it with .to_dense() or .dequantize()"
    else:
        return
    raise CheckpointError(f"{path}: {where}: {reason}")


def geometry(tensor: Tensor) -> tuple[Any, ...]:
    """Return a key that two tensors share exactly when they are the same elements seen the same way."""
    if tensor.numel() == 0:
        return ("empty", id(tensor))  # nothing in memory tells two empty tensors apart
    pointer = tensor.untyped_storage().data_ptr()
    view = tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.is_conj(), tensor.is_neg()
    return (str(tensor.device), pointer, tensor.dtype, view)


class _Encoder:
    """Turns values into JSON and collects the tensors on the way."""

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self.tensors: dict[str, Tensor] = {}
        self.raw: dict[str, tuple[str, list[int]]] = {}
        self._seen: dict[tuple[Any, ...], int] = {}

    def encode(self, value: Any, where: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise CheckpointError(
                f"{self.path}: {where[:60]}...: nested deeper than {MAX_DEPTH}; flatten it (does it hold itself?)"
            )
        kind = type(value)
        if value is None or kind in (bool, str):
            return value
        if kind is int:
            return value if abs(value) < 1 << 63 else {"i": hex(value)}
        if kind is float:
            return value if math.isfinite(value) else {"f": struct.pack(">d", value).hex()}
        if kind in (list, tuple):
            items = [self.encode(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
            return items if kind is list else {"u": items}
        if kind in (dict, OrderedDict):
            return {"d": [self._pair(key, item, where, depth + 1) for key, item in value.items()]}
        if kind is bytes:
            data = torch.frombuffer(bytearray(value), dtype=torch.uint8) if value else torch.empty(0, dtype=torch.uint8)
            return {"b": self._add(data)}
        if isinstance(value, Tensor):
            return {"t": self._tensor(value, where)}
        raise CheckpointError(
            f"{self.path}: {where}: cannot save a {kind.__module__}.{kind.__qualname__}; use dict, list, tuple, int, "
            "float, str, bool, None, bytes or a tensor (a NumPy scalar: .item(); an array: torch.from_numpy)"
        )

    def _pair(self, key: Any, item: Any, where: str, depth: int) -> list[Any]:
        place = f"{where}[{key!r}]"
        if not _hashable(key):
            raise CheckpointError(f"{self.path}: {place}: a {type(key).__name__} cannot be saved as a key; use text")
        return [self.encode(key, place, depth), self.encode(item, place, depth)]

    def _tensor(self, tensor: Tensor, where: str) -> int:
        check_dense(self.path, where, tensor)
        key = geometry(tensor)
        if key not in self._seen:
            self._seen[key] = self._add(tensor, where)
        return self._seen[key]

    def _add(self, tensor: Tensor, where: str = "") -> int:
        index = len(self.tensors)
        if tensor.dtype not in DTYPES.values():
            dtype = str(tensor.dtype).removeprefix("torch.")
            if dtype not in _RAW_DTYPES:
                raise CheckpointError(f"{self.path}: {where}: {tensor.dtype} cannot be saved; convert the tensor first")
            self.raw[f"t{index}"] = (dtype, list(tensor.shape))
            tensor = raw_bytes(tensor.cpu().resolve_conj().contiguous())
        self.tensors[f"t{index}"] = tensor
        return index


def _hashable(key: Any) -> bool:
    """Whether a dict key is a scalar or a tuple of scalars."""
    if type(key) is tuple:
        return all(_hashable(item) for item in key)
    return key is None or type(key) in (bool, int, float, str, bytes)


def _decode(node: Any, tensors: Mapping[str, Tensor], depth: int) -> Any:
    """Turn JSON back into values."""
    if depth > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    if isinstance(node, list):
        return [_decode(item, tensors, depth + 1) for item in node]
    if not isinstance(node, dict):
        return node
    if len(node) != 1:
        raise ValueError(f"expected an object with one key, got {sorted(node)[:5]}")
    ((tag, value),) = node.items()
    if tag == "t":
        return tensors[f"t{value}"]
    if tag == "b":
        return tensors[f"t{value}"].numpy().tobytes()
    if tag == "u":
        return tuple(_decode(value, tensors, depth))
    if tag == "d":
        return _decode_dict(value, tensors, depth + 1)
    if tag in _SCALARS:
        return _SCALARS[tag](value)
    raise ValueError(f"unknown tag {tag!r}")


_SCALARS: dict[str, Callable[[str], Any]] = {
    "i": lambda text: int(text, 16),
    "f": lambda text: _double(bytes.fromhex(text)),
}


def _double(data: bytes) -> float:
    """Return the float of eight bytes."""
    if len(data) != 8:
        raise ValueError(f"a float takes 8 bytes, got {len(data)}")
    value: float = struct.unpack(">d", data)[0]
    return value


def _decode_dict(pairs: list[tuple[Any, Any]], tensors: Mapping[str, Tensor], depth: int) -> dict[Any, Any]:
    """Build a dict, refusing keys that come twice."""
    result = {_decode(key, tensors, depth): _decode(value, tensors, depth) for key, value in pairs}
    if len(result) != len(pairs):
        raise ValueError("a key comes twice")
    return result
