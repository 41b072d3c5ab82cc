"""Storage: the exact size of the safetensors file, its deflated size, and modelled sparse formats."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import MetricsError
from secateur.metrics.params import resolve_masks, tie_key

# In the order in which safetensors lays tensors out, last first: wide dtypes lie before narrow ones.
_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
_RANK = {dtype: rank for rank, dtype in enumerate(_DTYPES)}
_INDEX_BYTES = 4
"""Width of a row pointer or column index in the modelled CSR format."""


@dataclass(frozen=True)
class Storage:
    """Bytes on disk.

    Attributes:
        size_bytes: Exact size of the safetensors file of the state dict, ties once, no metadata.
        deflate_bytes: Measured size of that file after zlib at level 6.
        csr_bytes: Modelled: masked weights as CSR, everything else dense, no header.
        bitmask_bytes: Modelled: masked weights as kept values and one bit per element, everything else dense,
            no header.
    """

    size_bytes: int
    deflate_bytes: int
    csr_bytes: int
    bitmask_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON; modelled figures apart."""
        return {
            "size_bytes": self.size_bytes,
            "deflate_bytes": self.deflate_bytes,
            "modelled": {"csr_bytes": self.csr_bytes, "bitmask_bytes": self.bitmask_bytes},
        }


def measure_storage(
    model_or_state_dict: nn.Module | Mapping[str, Any], masks: Mapping[str, Tensor] | None = None
) -> Storage:
    """Size a state dict as it is, without writing it.

    The file is generated piece by piece, one tensor at a time, and never held as a whole. A view counts the
    bytes it shows, not those of its storage; tied tensors are stored once, under their first name.

    Args:
        model_or_state_dict: A module, or tensors by name. Values are taken as they are: a mask changes the
            modelled sizes only.
        masks: Bool masks by tensor name; ``True`` = keep.

    Returns:
        Exact, measured and modelled sizes.

    Raises:
        MetricsError: When a value is no tensor, has no bytes, or has a dtype that safetensors cannot store.
    """
    state = model_or_state_dict.state_dict() if isinstance(model_or_state_dict, nn.Module) else model_or_state_dict
    tensors, names = _unique(state)
    kept = {name: int(mask.sum()) for name, mask in resolve_masks(masks, tensors, names).items()}
    packer, size, deflated = zlib.compressobj(level=6), 0, 0
    for chunk in _file(tensors):
        size += len(chunk)
        deflated += len(packer.compress(chunk))
    deflated += len(packer.flush())
    dense = sum(_bytes(t) for name, t in tensors.items() if name not in kept)
    csr = sum(csr_bytes(tensors[name], nnz) for name, nnz in kept.items())
    bits = sum(bitmask_bytes(tensors[name], nnz) for name, nnz in kept.items())
    return Storage(size, deflated, dense + csr, dense + bits)


def csr_bytes(weight: Tensor, nnz: int) -> int:
    r"""Model the bytes of a weight in compressed sparse rows.

    .. math:: \text{nnz}\,(b + 4) + 4\,(\text{rows} + 1)

    with :math:`b` the bytes of one element, 32-bit indices, and one row per entry of the first dimension (one in
    all for vectors). At :math:`b = 4` it breaks even with dense storage near half of the elements.

    Args:
        weight: The dense weight.
        nnz: Elements kept.

    Returns:
        Bytes, modelled.
    """
    rows = weight.shape[0] if weight.dim() > 1 else 1
    return nnz * (weight.element_size() + _INDEX_BYTES) + _INDEX_BYTES * (rows + 1)


def bitmask_bytes(weight: Tensor, nnz: int) -> int:
    r"""Model the bytes of a weight as its kept values and one bit per element.

    .. math:: \text{nnz}\,b + \lceil n / 8 \rceil

    with :math:`b` the bytes of one element and :math:`n` the elements of the dense weight.

    Args:
        weight: The dense weight.
        nnz: Elements kept.

    Returns:
        Bytes, modelled.
    """
    return nnz * weight.element_size() + -(-weight.numel() // 8)


def _unique(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Check a state dict; return tensors by first name, and any name to first name."""
    first: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    seen: dict[tuple[object, ...], str] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise MetricsError(f"storage: {name!r} is a {type(tensor).__name__}; safetensors stores tensors only")
        if tensor.is_meta or tensor.layout != torch.strided or tensor.dtype not in _DTYPES:
            raise MetricsError(
                f"storage: {name!r} is {tensor.dtype} with layout {tensor.layout} on {tensor.device}; "
                "safetensors stores dense tensors with values, of a plain dtype"
            )
        names[name] = seen.setdefault(tie_key(tensor), name)
        if names[name] == name:
            first[name] = tensor
    return first, names


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _file(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield the pieces of the safetensors file: header length, header padded to 8 bytes, tensors."""
    order = sorted(tensors, key=lambda name: (-_RANK[tensors[name].dtype], name))
    header, end = {}, 0
    for name in order:
        start, end = end, end + _bytes(tensors[name])
        header[name] = {
            "dtype": _DTYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for name in order:
        if tensors[name].numel():
            flat = tensors[name].detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
            yield flat.view(torch.uint8).numpy().data
