"""The inverse of the damped Fisher matrix, whole or in blocks along each weight."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from secateur.errors import MissingStatsError, check_choice, check_number, check_whole
from secateur.stats._common import data_of
from secateur.stats.per_sample import Way, per_sample_gradients
from secateur.stats.quadratic import SingularMatrix, invert
from secateur.types import Source, Tensors

# Shapes: N samples, Z blocks, B weights of a block

MOST_WEIGHTS = 8192
"""Weights of one matrix at most: beyond it takes half a gigabyte, and its inversion minutes."""

_AT_ONCE = 2**24
"""Numbers that are inverted at a time."""


@dataclass(frozen=True)
class Piece:
    """Some weights, laid out one after the other and cut into blocks.

    Attributes:
        names: The weights; all of them where there is one matrix for all, else one.
        shapes: Their shapes.
        inverse: Inverse of each block of the damped Fisher matrix, (Z, B, B), float64. Weights that had gone before
            are left out: their rows are zero but for a one on the diagonal. So is what fills up the last block.
        curvature: The diagonal of the damped Fisher matrix itself, (Z, B); one where a weight is left out.
        alive: Whether there is a weight, and it had not gone before; (Z, B).
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    inverse: Tensor
    curvature: Tensor
    alive: Tensor

    @property
    def block(self) -> int:
        """Weights of a block."""
        return self.inverse.shape[-1]

    def gather(self, tensors: Tensors) -> Tensor:
        """Lay tensors of the weights' shapes out as (Z, B), float64; zero where a weight is left out."""
        for name, shape in zip(self.names, self.shapes, strict=True):
            if name not in tensors or tuple(tensors[name].shape) != shape:
                got = tuple(tensors[name].shape) if name in tensors else "nothing"
                raise MissingStatsError(f"the Fisher matrix is of {name} with shape {shape}, got {got}")
        flat = torch.cat([tensors[name].detach().reshape(-1).to(self.inverse) for name in self.names])
        rows = torch.nn.functional.pad(flat, (0, self.alive.numel() - len(flat))).reshape(self.alive.shape)
        return rows.masked_fill(~self.alive, 0.0)

    def scatter(self, rows: Tensor) -> dict[str, Tensor]:
        """Undo :meth:`gather`."""
        sizes = [math.prod(shape) for shape in self.shapes]
        parts = torch.split(rows.reshape(-1)[: sum(sizes)], sizes)
        return {n: part.reshape(shape) for n, shape, part in zip(self.names, self.shapes, parts, strict=True)}


class FisherInverse(Mapping[str, Tensor]):
    r"""Inverses of the blocks of a damped Fisher matrix: what :class:`InverseFisher` returns.

    As a mapping: blocks (Z, B, B) by the name of their weight (or ``"*"`` where one matrix is over all). Block z covers
    the flat indices from ``z * B`` on.

    Attributes:
        pieces: The blocks, and which weights they are of.
        damping: The number :math:`\lambda` that was added to the diagonal.
        gradients: How many gradients the matrix was made of.
    """

    def __init__(self, pieces: tuple[Piece, ...], damping: float, gradients: int) -> None:
        self.pieces = pieces
        self.damping = damping
        self.gradients = gradients
        self._by_name = {piece.names[0] if len(pieces) > 1 or len(piece.names) == 1 else "*": piece for piece in pieces}

    def __getitem__(self, name: str) -> Tensor:
        return self._by_name[name].inverse

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self.pieces)

    @property
    def nbytes(self) -> int:
        """Bytes that the blocks take."""
        return sum(piece.inverse.nbytes for piece in self.pieces)

    def diagonal(self) -> dict[str, Tensor]:
        """Return the diagonal of the inverse, by weight; one where a weight had gone before."""
        out: dict[str, Tensor] = {}
        for piece in self.pieces:
            out |= piece.scatter(piece.inverse.diagonal(dim1=-2, dim2=-1))
        return out

    def curvature(self) -> dict[str, Tensor]:
        """Return the diagonal of the damped Fisher matrix, by weight; one where a weight had gone before."""
        out: dict[str, Tensor] = {}
        for piece in self.pieces:
            out |= piece.scatter(piece.curvature)
        return out

    def solve(self, vectors: Tensors) -> dict[str, Tensor]:
        """Multiply the inverse by a vector, given and returned by weight; zero where a weight had gone before."""
        out: dict[str, Tensor] = {}
        for piece in self.pieces:
            out |= piece.scatter(torch.einsum("zij,zj->zi", piece.inverse, piece.gather(vectors)))
        return out


@dataclass(frozen=True)
class InverseFisher:
    r"""The inverse of the damped Fisher matrix of the prunable weights, from gradients of single samples.

    .. math:: F = \frac1N \sum_n g_n g_n^T + \lambda I

    ``loss``: :math:`g_n` is the gradient of the loss of sample n (the empirical Fisher matrix). ``output``: the
    gradients of the network's outputs, one for each output of each sample, which for squared error is the Gauss-Newton
    matrix of half the squared error; ``loss_fn`` must then return the outputs.

    Only the blocks on the diagonal are kept, ``block`` consecutive weights of a flattened tensor each: memory of
    8 · ``block`` bytes per weight, and time of N · ``block`` multiplications per weight. Sums are in float64. Each
    block is added up over all samples and inverted once, by its Cholesky factors;
    :func:`~secateur.stats.quadratic.woodbury` is the recursion over samples, which gives the same inverse and goes over
    the whole of it for every sample.

    Weights that masks have removed before are left out, so that the inverse is that of what is left.

    Args:
        block: Weights per block; ``None`` for one matrix over all weights.
        damping: The number :math:`\lambda`, or with ``relative`` its ratio to the mean of the diagonal of F.
        relative: See there.
        gradients: Of what.
        per_sample: ``"vmap"``: torch.func differentiates a handful of samples together; ``"loop"``: one after the
            other, for models that it cannot run (decisions on values, recurrent layers). The numbers are the same.

    Raises:
        MissingStatsError: When an option is out of range; when a block is singular; or when there are too many weights
            for one matrix.
    """

    block: int | None = 64
    damping: float = 1e-2
    relative: bool = True
    gradients: Literal["loss", "output"] = "loss"
    per_sample: Way = "vmap"

    def __post_init__(self) -> None:
        check_choice("inverse_fisher: gradients", self.gradients, ("loss", "output"))
        check_choice("inverse_fisher: per_sample", self.per_sample, get_args(Way))
        if self.block is not None:
            check_whole("inverse_fisher: block, weights per matrix,", self.block, error=MissingStatsError)
        check_number("inverse_fisher: damping", self.damping, error=MissingStatsError)

    @property
    def uses(self) -> frozenset[str]:
        """A loss, and batches."""
        return frozenset({"loss", "batches"})

    @property
    def elementwise(self) -> bool:
        """It is a matrix."""
        return False

    def collect(self, source: Source) -> FisherInverse:
        """Add up, damp, invert.

        Raises:
            MissingStatsError: As the class, and as
                :func:`~secateur.stats.per_sample.per_sample_gradients`.
        """
        loss_fn, batches = data_of(self, source)
        found = per_sample_gradients(
            self, source, loss_fn, batches(), way=self.per_sample, outputs=self.gradients == "output"
        )
        sums = [_Sum(self.block, names, source) for names in self._layout(source)]
        samples = gradients = 0
        for count, rows in found:
            for total in sums:
                total.add(rows)
            samples += count
            gradients += len(next(iter(rows.values())))
        for total in sums:
            total.matrices.div_(samples)
        damping = self._damping(sums)
        return FisherInverse(tuple(total.inverted(damping, gradients) for total in sums), damping, gradients)

    def _layout(self, source: Source) -> list[tuple[str, ...]]:
        """Return the weights that share blocks."""
        if self.block is not None:
            return [(name,) for name in source.parameters]
        total = sum(p.numel() for p in source.parameters.values())
        if total > MOST_WEIGHTS:
            raise MissingStatsError(
                f"one Fisher matrix over all {total} prunable weights takes {8 * total**2 / 1e9:.3g} GB; up to "
                f"{MOST_WEIGHTS} weights are accepted. Give block=64, say: so many consecutive weights per matrix"
            )
        return [tuple(source.parameters)]

    def _damping(self, sums: list[_Sum]) -> float:
        trace = sum(float(total.matrices.diagonal(dim1=-2, dim2=-1).sum()) for total in sums)
        alive = sum(int(total.alive.sum()) for total in sums)
        if alive and not trace > 0.0:
            raise MissingStatsError(
                "every gradient is zero, so the Fisher matrix is, and no damping makes it say anything about the "
                "weights. Check the loss and the batches"
            )
        return self.damping * trace / max(alive, 1) if self.relative else self.damping


class _Sum:
    """A Fisher matrix that is being added up, in blocks."""

    def __init__(self, block: int | None, names: tuple[str, ...], source: Source) -> None:
        self.names = names
        self.shapes = tuple(tuple(source.parameters[name].shape) for name in names)
        self.numel = sum(math.prod(shape) for shape in self.shapes)
        self.size = self.numel if block is None else min(block, self.numel)
        self.blocks = -(-self.numel // self.size)
        device = source.parameters[names[0]].device
        self.matrices = torch.zeros(self.blocks, self.size, self.size, dtype=torch.float64, device=device)
        masks = source.masks or {}
        parts = [
            masks[n].reshape(-1).to(device)
            if n in masks
            else torch.ones(math.prod(shape), dtype=torch.bool, device=device)
            for n, shape in zip(names, self.shapes, strict=True)
        ]
        self.alive = self._padded(torch.cat(parts)).reshape(self.blocks, self.size)

    def _padded(self, rows: Tensor) -> Tensor:
        return torch.nn.functional.pad(rows, (0, self.blocks * self.size - self.numel))

    def add(self, rows: Mapping[str, Tensor]) -> None:
        """Add the products of some gradients, without those of weights that had gone before."""
        flat = torch.cat([rows[name].flatten(1).to(self.matrices) for name in self.names], 1)
        cut = self._padded(flat).reshape(len(flat), self.blocks, self.size).masked_fill_(~self.alive, 0.0)
        by_block = cut.transpose(0, 1)
        self.matrices.baddbmm_(by_block.transpose(1, 2), by_block)

    def inverted(self, damping: float, gradients: int) -> Piece:
        """Damp and invert, in place."""
        diagonal = self.matrices.diagonal(dim1=-2, dim2=-1)
        diagonal += damping
        diagonal.masked_fill_(~self.alive, 1.0)
        curvature = diagonal.clone()
        step = max(1, _AT_ONCE // self.size**2)
        for low in range(0, self.blocks, step):
            part = self.matrices[low : low + step]
            try:
                part.copy_(invert(part))
            except SingularMatrix as error:
                raise self._singular(low + error.index, damping, gradients) from None
        return Piece(self.names, self.shapes, self.matrices, curvature, self.alive)

    def _singular(self, block: int, damping: float, gradients: int) -> MissingStatsError:
        where = f"block {block} of {self.names[0]}" if len(self.names) == 1 else "the matrix over all weights"
        return MissingStatsError(
            f"the Fisher matrix is singular in {where}: {gradients} gradients, {int(self.alive[block].sum())} weights, "
            f"{damping:.3g} added to the diagonal. Raise damping, or give more batches"
        )
