"""What packed weights of every format are made of: flat arrays and a few numbers, checked before use."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from secateur.errors import SparseError, WeightError, check_whole

MOST = 2**40  # rows, columns, weights, blocks: as the library has it


def as_matrix(weight: Tensor) -> Tensor:
    """Return a dense weight as a contiguous float32 matrix on the CPU, one row per output.

    Raises:
        WeightError: When it has another dtype, device or layout, or fewer than two dimensions.
    """
    if weight.layout != torch.strided or weight.device.type != "cpu" or weight.dtype != torch.float32:
        raise WeightError(
            f"sparse kernels take dense float32 weights on the CPU, got {weight.dtype} on {weight.device} with layout "
            f"{weight.layout}; convert with weight.detach().float().cpu()"
        )
    if weight.dim() < 2:
        raise WeightError(f"a sparse weight has at least two dimensions, got shape {tuple(weight.shape)}")
    return weight.detach().resolve_neg().reshape(weight.shape[0], math.prod(weight.shape[1:])).contiguous()


def check_arrays(kind: str, tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> None:
    """Refuse arrays that are missing, or of another kind than a format has.

    Raises:
        SparseError: Names the array, and what it should be.
    """
    for name in dtypes:
        tensor = tensors.get(name)
        if tensor is None:
            raise SparseError(f"a {kind} weight needs the arrays {', '.join(dtypes)}; {name!r} is missing")
        fits = tensor.dtype == dtypes[name] and tensor.dim() == 1 and tensor.device.type == "cpu"
        if not (fits and tensor.layout == torch.strided and tensor.is_contiguous()):
            raise SparseError(
                f"{name!r} of a {kind} weight must be a contiguous one-dimensional {dtypes[name]} tensor on the CPU, "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
            )


def versions_of(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Return how often tensors were changed in place; nothing where inference mode does not count."""
    try:
        return tuple([tensor._version for tensor in tensors])
    except RuntimeError:
        return ()


class Packed:
    """What all formats share. Copies and pickles leave out what was derived from the arrays."""

    kind: ClassVar[str]
    DTYPES: ClassVar[dict[str, torch.dtype]]
    NUMBERS: ClassVar[tuple[str, ...]]

    @classmethod
    def from_tensors(cls, header: Mapping[str, int], tensors: Mapping[str, Tensor]) -> Self:
        """Put a packed weight together again, every index of it checked first.

        Raises:
            SparseError: When an array is missing or of another kind, or contents do not fit each other.
        """
        numbers = check_numbers(cls.kind, cls.NUMBERS, header)
        dtypes = cls.dtypes_of(numbers)
        check_arrays(cls.kind, tensors, dtypes)
        fields: dict[str, Any] = {**numbers, **{name: aligned(tensors[name]) for name in dtypes}}
        packed = cls(**fields)
        packed.check_contents()
        _ = packed.versions
        return packed

    @classmethod
    def dtypes_of(cls, numbers: Mapping[str, int]) -> dict[str, torch.dtype]:
        """Dtypes of the arrays under a header.

        Raises:
            SparseError: When there can be no such header.
        """
        return cls.DTYPES

    def check_contents(self) -> None:
        """Refuse indices and counts that do not fit each other, before anyone follows them.

        Raises:
            SparseError: When the packed weight is damaged.
        """
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """Its arrays, by name."""
        return {name: getattr(self, name) for name in self.DTYPES}

    def header(self) -> dict[str, int]:
        """Its numbers, by name."""
        return {name: getattr(self, name) for name in self.NUMBERS}

    @cached_property
    def versions(self) -> tuple[int, ...]:
        """Of its arrays, when they were written or checked."""
        return versions_of(self.tensors().values())

    def holds(self, tensors: Iterable[Tensor | None]) -> bool:
        """Whether these are its arrays, as they were when their indices were checked."""
        ours = [self.__dict__[name] for name in self.DTYPES]
        same = all(map(operator.is_, ours, tensors))
        return same and self.__dict__.get("versions") == versions_of(ours)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name in self.NUMBERS or name in self.DTYPES}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def check_numbers(kind: str, names: tuple[str, ...], header: Mapping[str, Any]) -> dict[str, int]:
    """Return a header's numbers, all of them there, whole and in range.

    Raises:
        SparseError: Names the number, and what it should be.
    """
    missing = [name for name in names if name not in header]
    if missing:
        raise SparseError(f"a {kind} weight needs the numbers {', '.join(names)}; {missing[0]!r} is missing")
    for name in names:
        check_whole(f"a {kind} weight: {name}", header[name], least=0, error=SparseError)
        most = MOST if name in ("rows", "columns", "blocks", "run_count", "count") else 2**31 - 1
        if header[name] > most:  # it would be cut off on its way into the library
            raise SparseError(f"a {kind} weight: {name} is {header[name]}, and cannot be more than {most}")
    return {name: int(header[name]) for name in names}


def aligned(tensor: Tensor) -> Tensor:
    """Return an array that begins where its numbers may begin."""
    return tensor if tensor.data_ptr() % tensor.element_size() == 0 else tensor.clone()
