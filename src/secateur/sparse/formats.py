"""Sparse weights as flat arrays: panelled rows and bitmasks."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import SparseError, check_whole
from secateur.sparse.arrays import Packed, as_matrix
from secateur.sparse.fallback import Csr
from secateur.sparse.library import BitmaskStruct, PanelledStruct, check, library

BLOCKS = ((1, 1), (4, 1), (1, 4))
SLACK = 8  # SECATEUR_SLACK
BITMASK_SLACK = 16  # SECATEUR_BITMASK_SLACK
WIDEST_PANEL = 65536  # blocks of columns that two bytes can tell apart


PART_ROWS = 512
"""Rows of a part: fewer make runs of equal rows too short to be foreseen, more make more sums than stay near."""

LEAST_ROWS = 16
"""Rows of a part that is made for a thread of its own."""


def parts_for(rows: int, positions: int = 64, threads: int = 1) -> int:
    """Return how many parts a weight is cut into: an even number, or a single one, and a multiple of the threads.

    Sums of fewer positions take less room, so that parts may have more rows. Threads share the parts where there are
    few positions: each has the same number of them.

    Args:
        rows: Outputs.
        positions: Vectors at a time.
        threads: That the weight will be multiplied with.
    """
    most = PART_ROWS * 64 // min(max(positions, 16), 64)
    parts = 1 if rows <= most else 2 * -(-rows // (2 * most))
    if threads > 1 and positions <= 4 * 64 * threads and rows >= LEAST_ROWS * threads:
        parts = threads * -(-parts // threads)
    return parts


@dataclass(frozen=True, eq=False)
class Panelled(Packed):
    """Compressed rows, cut into panels of columns.

    The activations of one panel stay in the first-level cache while all rows pass over them. Within a panel rows are
    sorted by their number of blocks, so that loops are predicted; a block is one weight, four rows or four columns; its
    place takes one byte, or two where a panel has more than 256 blocks of columns. Rows are split into ``parts``: one
    part at a time passes over all panels, so that its sums stay close, and threads work on parts apart. The arrays are
    described in ``cpp/include/secateur_sparse.h``.

    Bytes: for b blocks of r x c weights, ``(4 r c + 1) b`` and 4 bytes per row group and panel, nearly: 0.13 of dense
    for single weights at 90 % sparsity.

    Example:
        >>> weight = torch.eye(6)
        >>> packed = Panelled.pack(weight)
        >>> packed.blocks, torch.equal(packed.to_dense(), weight)
        (6, True)
    """

    kind: ClassVar[str] = "panelled"
    NUMBERS: ClassVar = ("rows", "columns", "block_rows", "block_columns", "panel", "parts", "blocks", "run_count")
    DTYPES: ClassVar[dict[str, torch.dtype]] = {
        "values": torch.float32,
        "indices": torch.uint8,  # or uint16
        "order": torch.int32,
        "runs": torch.int32,
        "starts": torch.int64,
    }
    rows: int
    columns: int
    block_rows: int
    block_columns: int
    panel: int
    parts: int
    blocks: int
    run_count: int
    values: Tensor
    indices: Tensor
    order: Tensor
    runs: Tensor
    starts: Tensor

    @classmethod
    def pack(
        cls, weight: Tensor, *, block: tuple[int, int] = (1, 1), panel: int = 128, parts: int | None = None
    ) -> Panelled:
        """Pack a dense weight; a block with any non-zero in it is stored whole.

        Args:
            weight: Float32, ``[outputs, ...]``; further dimensions are flattened.
            block: Rows and columns of a block: (1, 1), (4, 1) or (1, 4).
            panel: Columns of a panel, a multiple of the block's.
            parts: Pieces of rows; by default an even number of pieces of at most 512, or a single one.

        Raises:
            WeightError: When the weight is of another kind.
            SparseError: When the kernels are not installed, or block, panel or parts are out of range.
        """
        matrix = as_matrix(weight)
        rows, columns = matrix.shape
        if tuple(block) not in BLOCKS:
            raise SparseError(f"block must be one of {', '.join(map(str, BLOCKS))}, got {block!r}")
        height, width = block
        check_whole("panel", panel, error=SparseError)
        if parts is None:
            parts = parts_for(rows)
        check_whole("parts", parts, error=SparseError)
        if panel % width or panel // width > WIDEST_PANEL or parts > WIDEST_PANEL:
            raise SparseError(
                f"panel must be a multiple of the block's {width} columns and at most {WIDEST_PANEL} blocks wide, and "
                f"parts at most {WIDEST_PANEL}; got panel={panel}, parts={parts}"
            )
        blocks, runs = ctypes.c_int64(), ctypes.c_int64()
        status = library().secateur_panelled_sizes(
            matrix.data_ptr(), rows, columns, height, width, panel, parts, ctypes.byref(blocks), ctypes.byref(runs)
        )
        check(status, "packing a weight")
        cells = parts * -(-columns // panel)
        packed = cls(
            rows,
            columns,
            height,
            width,
            panel,
            parts,
            blocks.value,
            runs.value,
            torch.empty(blocks.value * height * width),
            torch.empty(blocks.value + SLACK, dtype=_index_dtype(panel, width)),
            torch.empty(-(-rows // height) * -(-columns // panel), dtype=torch.int32),
            torch.empty(2 * runs.value, dtype=torch.int32),
            torch.empty(3 * (cells + 1), dtype=torch.int64),
        )
        pointers = (tensor.data_ptr() for tensor in packed.tensors().values())
        check(library().secateur_panelled_pack(matrix.data_ptr(), packed.struct, *pointers), "packing a weight")
        _ = packed.versions
        return packed

    @classmethod
    def dtypes_of(cls, numbers: Mapping[str, int]) -> dict[str, torch.dtype]:
        """Dtypes of the arrays: those of the indices depend on the panel."""
        height, width, panel = numbers["block_rows"], numbers["block_columns"], numbers["panel"]
        if (height, width) not in BLOCKS or panel < 1 or panel % width:
            raise SparseError(f"a panelled weight with blocks of {height}x{width} in panels of {panel} cannot be")
        return cls.DTYPES | {"indices": _index_dtype(panel, width)}

    def check_contents(self) -> None:
        """Refuse indices and counts that do not fit each other."""
        sizes = (tensor.numel() for tensor in self.tensors().values())
        check(library().secateur_panelled_check(self.struct, *sizes), "reading a panelled weight")

    @cached_property
    def struct(self) -> PanelledStruct:
        """What the library reads; it points into the tensors."""
        return PanelledStruct(
            self.rows,
            self.columns,
            self.block_rows,
            self.block_columns,
            self.panel,
            self.parts,
            self.indices.element_size(),
            self.blocks,
            self.run_count,
            *(tensor.data_ptr() for tensor in self.tensors().values()),
        )

    def to_dense(self) -> Tensor:
        """The matrix, float32 ``[rows, columns]``."""
        dense = torch.empty(self.rows, self.columns)
        check(library().secateur_panelled_unpack(self.struct, dense.data_ptr()), "unpacking a weight")
        return dense


@dataclass(frozen=True, eq=False)
class Bitmask(Packed):
    """One bit per weight, and the weights that are not zero, row after row.

    Bytes: ``1/8 + 4 d`` per weight of the matrix at density d, in words of 64 columns: less than any index up to about
    87 % sparsity. For single vectors: each row is spread out in registers and multiplied as a dense one.

    Example:
        >>> packed = Bitmask.pack(torch.eye(3))
        >>> packed.count, packed.bits.tolist()
        (3, [1, 2, 4])
    """

    kind: ClassVar[str] = "bitmask"
    NUMBERS: ClassVar = ("rows", "columns", "count")
    DTYPES: ClassVar[dict[str, torch.dtype]] = {
        "values": torch.float32,
        "bits": torch.int64,
        "offsets": torch.int64,
    }
    rows: int
    columns: int
    count: int
    values: Tensor
    bits: Tensor
    offsets: Tensor

    @classmethod
    def pack(cls, weight: Tensor) -> Bitmask:
        """Pack a dense float32 weight ``[outputs, ...]``.

        Raises:
            WeightError: When the weight is of another kind.
            SparseError: When the kernels are not installed.
        """
        matrix = as_matrix(weight)
        rows, columns = matrix.shape
        count = ctypes.c_int64()
        status = library().secateur_bitmask_count(matrix.data_ptr(), rows, columns, ctypes.byref(count))
        check(status, "packing a weight")
        packed = cls(
            rows,
            columns,
            count.value,
            torch.empty(count.value + BITMASK_SLACK),
            torch.empty(rows * -(-columns // 64), dtype=torch.int64),
            torch.empty(rows + 1, dtype=torch.int64),
        )
        pointers = (tensor.data_ptr() for tensor in packed.tensors().values())
        check(library().secateur_bitmask_pack(matrix.data_ptr(), packed.struct, *pointers), "packing a weight")
        _ = packed.versions
        return packed

    def check_contents(self) -> None:
        """Refuse offsets and bits that do not fit each other."""
        sizes = (tensor.numel() for tensor in self.tensors().values())
        check(library().secateur_bitmask_check(self.struct, *sizes), "reading a bitmask weight")

    @cached_property
    def struct(self) -> BitmaskStruct:
        """What the library reads; it points into the tensors."""
        pointers = (tensor.data_ptr() for tensor in self.tensors().values())
        return BitmaskStruct(self.rows, self.columns, self.count, *pointers)

    def to_dense(self) -> Tensor:
        """The matrix, float32 ``[rows, columns]``."""
        dense = torch.empty(self.rows, self.columns)
        check(library().secateur_bitmask_unpack(self.struct, dense.data_ptr()), "unpacking a weight")
        return dense


Weight = Panelled | Bitmask | Csr
"""A packed weight of any format."""


def nbytes(weight: Weight) -> int:
    """Return the bytes of all arrays of a packed matrix."""
    return sum(t.numel() * t.element_size() for t in weight.tensors().values())


FORMATS: dict[str, type[Panelled] | type[Bitmask] | type[Csr]] = {f.kind: f for f in (Panelled, Bitmask, Csr)}


def _index_dtype(panel: int, block_columns: int) -> torch.dtype:
    return torch.uint8 if panel // block_columns <= 256 else torch.uint16
