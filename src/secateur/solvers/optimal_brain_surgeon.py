"""Optimal Brain Surgeon's update: the other weights move to where the loss is least without those that went."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from secateur.errors import check_whole
from secateur.stats.inverse_fisher import FisherInverse, InverseFisher
from secateur.stats.per_sample import Way
from secateur.stats.quadratic import remove
from secateur.types import Need, Stats, Tensors

_AT_ONCE = 2**22
"""Numbers of the systems that are solved at a time."""


@dataclass(frozen=True)
class OptimalBrainSurgeon:
    r"""Move the surviving weights of each block to the least of the quadratic model.

    With :math:`F` the damped Fisher matrix of a block of consecutive weights, standing for the Hessian at a minimum,
    and :math:`Q` all weights of the block that are gone:

    .. math:: \delta w = -F^{-1}_{:,Q} \bigl([F^{-1}]_{QQ}\bigr)^{-1} w_Q

    That is where removing them one at a time ends too, in any order. Weights that had gone before are zero, stay zero
    and take no part. A block that loses nothing is left bit for bit as it is. It goes with any score and any pattern
    over single weights; with the score of the same name and the same options, one matrix serves both. Biases stay as
    they are.

    Pitfalls:
        The formula holds near a minimum: a step towards one is not part of it, and many weights at a time go further
        than it sees, so several rounds are better than one. Where a network fits its data perfectly the gradients
        vanish, and the Fisher matrix says nothing of the Hessian. With fewer samples than weights in a block the
        damping decides what is moved.

    Cost:
        That of the score's matrix, and B² multiplications per weight for the systems of the blocks that lose something.

    Args:
        block: Weights per block of the matrix; 0 for one matrix over all weights.
        damping: Added to the diagonal, as a share of its mean.
        relative: Whether ``damping`` is such a share; else the number itself.
        gradients: Of the loss, or of the network's outputs (for squared error, the original's choice).
        per_sample: How gradients of single samples are had: ``"vmap"`` together, ``"loop"`` one by one, for any model.

    Example:
        >>> import torch
        >>> from secateur.stats.inverse_fisher import FisherInverse, Piece
        >>> inverse = torch.tensor([[[2.0, 1.0], [1.0, 1.0]]])
        >>> piece = Piece(("w",), ((2,),), inverse, torch.ones(1, 2), torch.ones(1, 2) > 0)
        >>> solver = OptimalBrainSurgeon()
        >>> stats = {next(iter(solver.needs)): FisherInverse((piece,), 0.0, 1)}
        >>> masks = {"w": torch.tensor([False, True])}
        >>> solver.solve({"w": torch.tensor([4.0, 5.0])}, masks, stats)["w"].tolist()
        [0.0, 3.0]

    References:
        Babak Hassibi, David G. Stork, Second Order Derivatives for Network Pruning: Optimal Brain Surgeon, 1993; Sidak
        Pal Singh, Dan Alistarh, WoodFisher: Efficient Second-Order Approximation for Neural Network Compression, 2020.
    """

    block: int = 64
    damping: float = 1e-2
    relative: bool = True
    gradients: Literal["loss", "output"] = "loss"
    per_sample: Way = "vmap"

    def __post_init__(self) -> None:
        check_whole("optimal_brain_surgeon: block", self.block, least=0)
        _ = self._statistic

    @property
    def _statistic(self) -> InverseFisher:
        return InverseFisher(self.block or None, self.damping, self.relative, self.gradients, self.per_sample)

    @property
    def needs(self) -> frozenset[Need]:
        """The inverse of the damped Fisher matrix."""
        return frozenset({self._statistic})

    def solve(self, weights: Tensors, masks: Tensors, stats: Stats) -> dict[str, Tensor]:
        """Return the new weights, in their own types."""
        inverse: FisherInverse = stats[self._statistic]
        out: dict[str, Tensor] = {}
        for piece in inverse.pieces:
            rows = piece.gather(weights)
            gone = ~(piece.gather(masks) > 0)
            touched = (rows.masked_fill(~gone, 0.0) != 0).any(-1)
            moved = rows.masked_fill(gone, 0.0)
            for part in torch.split(touched.nonzero().flatten(), max(1, _AT_ONCE // piece.block**2)):
                moved[part] = remove(piece.inverse[part], rows[part], gone[part])[0]
            out |= piece.scatter(moved)
        return {
            name: moved.to(weights[name].dtype)
            .masked_fill_(~masks[name].to(moved.device), 0.0)
            .to(weights[name].device)
            for name, moved in out.items()
        }
