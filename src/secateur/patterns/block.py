"""Rectangles of r output units by c input units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.errors import PatternError, check_choice
from secateur.patterns._layout import from_oki, oki_shape, to_oki
from secateur.select import keep_top_k
from secateur.types import Masks, Weight

# Shapes: O output units, K kernel positions, I input units, R×C block, P = ⌈O/R⌉ and Q = ⌈I/C⌉ blocks per axis

Reduce = Literal["mean", "sum", "l2", "max"]


def aggregate(values: Tensor, counts: Tensor | int, how: Reduce) -> Tensor:
    """Reduce the last axis of unit × element scores to one score per unit.

    Args:
        values: Shape (units, elements), with 0 in places that do not exist.
        counts: Elements that exist per unit.
        how: ``mean`` and ``l2`` (root of the mean square) compare units of different size fairly; ``sum`` and
            ``max`` are the raw ones.

    Returns:
        Shape (units,).
    """
    if how == "max":
        return values.amax(-1)
    if how == "l2":
        # Scaled by the largest: squares of float32 scores beyond 1e±19 would all tie at infinity or zero.
        largest = values.abs().amax(-1)
        scaled = values / largest.clamp_min(torch.finfo(values.dtype).tiny).unsqueeze(-1)
        return largest * (scaled.square().sum(-1) / counts).sqrt()
    if how == "mean":
        return (values / (counts.unsqueeze(-1) if isinstance(counts, Tensor) else counts)).sum(-1)
    return values.sum(-1)


@dataclass(frozen=True)
class Block:
    """Blocks of ``rows`` output units × ``cols`` input units, at each kernel position.

    4×1 blocks share one column index between four rows, which a sparse kernel turns into speed at lower sparsity.
    Where a dimension is not a multiple of the block, the last block is smaller; it is still one unit.

    Args:
        rows: Output units per block.
        cols: Input units per block.
        reduce_by: How element scores become the block's: ``mean``, ``sum``, ``l2`` or ``max``.

    Raises:
        PatternError: When a side is below 1.

    Example:
        >>> b = Block(2, 1)
        >>> w = Weight("fc.weight", (3, 2))
        >>> b.reduce(w, torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])).tolist()
        [2.0, 3.0, 5.0, 6.0]

    References:
        Sharan Narang, Eric Undersander, Gregory Diamos, Block-Sparse Recurrent Neural Networks, 2017.
    """

    rows: int = 4
    cols: int = 1
    reduce_by: Reduce = "mean"

    def __post_init__(self) -> None:
        check_choice("block: reduce_by", self.reduce_by, get_args(Reduce))
        if self.rows < 1 or self.cols < 1:
            raise PatternError(f"a block of {self.rows}×{self.cols} is empty; both sides must be at least 1")

    @property
    def density(self) -> float | None:
        """Free: any number of blocks may stay."""
        return None

    def check(self, weight: Weight) -> None:
        """Accept every shape; edge blocks are smaller."""

    def reduce(self, weight: Weight, values: Tensor) -> Tensor:
        """Aggregate every block, in the order (block row, kernel position, block column)."""
        if values.dtype == torch.bool:
            return self._tiles(weight, values.to(torch.uint8)).amax(-1).bool()
        maximum = self.reduce_by == "max"
        tiles = self._tiles(weight, values, fill=-torch.inf if maximum else 0.0)
        return aggregate(tiles, self._counts(weight, values.device), self.reduce_by)

    def sizes(self, weight: Weight) -> int | Tensor:
        """``rows × cols``, fewer at the edges."""
        outputs, _, inputs = oki_shape(weight)
        if outputs % self.rows == 0 and inputs % self.cols == 0:
            return self.rows * self.cols
        return self._counts(weight, torch.device("cpu"))

    def select(self, weight: Weight, scores: Tensor, keep: int) -> Tensor:
        """Keep the ``keep`` highest."""
        return keep_top_k(scores, keep)

    def expand(self, weight: Weight, kept: Tensor) -> Masks:
        """Repeat every flag over its block and cut the overhang."""
        outputs, kernel, inputs = oki_shape(weight)
        p, q = -(-outputs // self.rows), -(-inputs // self.cols)
        mask = kept.reshape(p, kernel, q).repeat_interleave(self.rows, 0).repeat_interleave(self.cols, 2)
        return {weight.name: from_oki(weight, mask[:outputs, :, :inputs])}

    def _tiles(self, weight: Weight, values: Tensor, fill: float = 0.0) -> Tensor:
        """Return (units, rows·cols), padded with ``fill``."""
        oki = to_oki(weight, values)
        outputs, kernel, inputs = oki.shape
        padded = F.pad(oki, (0, -inputs % self.cols, 0, 0, 0, -outputs % self.rows), value=fill)
        tiles = padded.reshape(-1, self.rows, kernel, padded.shape[2] // self.cols, self.cols)  # P R K Q C
        return tiles.permute(0, 2, 3, 1, 4).reshape(-1, self.rows * self.cols)

    def _counts(self, weight: Weight, device: torch.device) -> Tensor:
        outputs, kernel, inputs = oki_shape(weight)
        high = torch.full((-(-outputs // self.rows),), self.rows)
        high[-1] = outputs - self.rows * (len(high) - 1)
        wide = torch.full((-(-inputs // self.cols),), self.cols)
        wide[-1] = inputs - self.cols * (len(wide) - 1)
        return (high[:, None, None] * wide).expand(-1, kernel, -1).reshape(-1).to(device)
