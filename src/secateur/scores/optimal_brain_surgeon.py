"""Optimal Brain Surgeon: the loss of removal when all other weights make up for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from secateur.errors import PatternError, check_choice, check_whole
from secateur.stats.inverse_fisher import FisherInverse, InverseFisher, Piece
from secateur.stats.per_sample import Way
from secateur.stats.quadratic import eliminate, group_losses
from secateur.types import Need, Stats, Tensors

# Shapes: Z blocks, B weights of a block


@dataclass(frozen=True)
class OptimalBrainSurgeon:
    r"""Rise of the loss when a weight goes and the others of its block make up for it.

    With :math:`F` the damped Fisher matrix of a block of consecutive weights, standing for the Hessian at a minimum:

    .. math:: S_q = \frac{w_q^2}{2 [F^{-1}]_{qq}}

    ``single`` rates every weight as if it were the only one to go. ``greedy`` removes one weight after the other from
    each block, each time the one that costs least, moves the others and takes the weight out of :math:`F^{-1}`; a
    weight's score is what its own removal added, or what an earlier one of its block did if that was more. Keeping the
    k highest scores is then the greedy choice over all blocks, for every k at once.

    With ``group`` (of the single order), consecutive weights are rated together and share what that costs equally, so
    that the pattern ``block`` with rows = 1 and cols = ``group`` adds up to the exact loss of its unit:

    .. math:: S_Q = \tfrac12 w_Q^T \bigl([F^{-1}]_{QQ}\bigr)^{-1} w_Q

    Any other pattern adds up scores of single weights, which leaves out how those of one unit belong together; greedy
    scores know nothing of patterns either. The weights themselves are moved by the solver of the same name; both with
    the same options share one matrix.

    Pitfalls:
        Of two equal inputs ``single`` finds both free; only ``greedy`` keeps one. Gradients of a few samples say little
        of a large block: give at least as many samples as ``block``, or damp. The quadratic model holds at a minimum:
        off one the gradient's part is missing.

    Cost:
        For N samples and blocks of B weights: N gradients of single samples; N B multiplications per weight to add up
        the matrix, B² to invert it and, greedy, B² to remove weights; 8 B bytes per weight.

    Args:
        order: Each by itself, or one after the other.
        group: Consecutive weights that are rated together.
        block: Weights per block of the matrix; 0 for one matrix over all weights.
        damping: Added to the diagonal, as a share of its mean.
        relative: Whether ``damping`` is such a share; else the number itself.
        gradients: Of the loss, or of the network's outputs (for squared error, the original's choice).
        per_sample: How gradients of single samples are had: ``"vmap"`` together, ``"loop"`` one by one, for any model.

    Raises:
        PatternError: When ``group`` does not divide ``block`` or a weight's last dimension, or goes with ``greedy``.

    Example:
        >>> from secateur.stats.inverse_fisher import InverseFisher, Piece, FisherInverse
        >>> piece = Piece(
        ...     ("w",), ((2,),), torch.tensor([[[2.0, 0.0], [0.0, 4.0]]]), torch.ones(1, 2), torch.ones(1, 2) > 0
        ... )
        >>> score = OptimalBrainSurgeon()
        >>> stats = {next(iter(score.needs)): FisherInverse((piece,), 0.0, 1)}
        >>> score({"w": torch.tensor([2.0, 2.0])}, stats)["w"].tolist()
        [1.0, 0.5]

    References:
        Babak Hassibi, David G. Stork, Second Order Derivatives for Network Pruning: Optimal Brain Surgeon, 1993; Sidak
        Pal Singh, Dan Alistarh, WoodFisher: Efficient Second-Order Approximation for Neural Network Compression, 2020
        (blocks); Eldar Kurtic et al., The Optimal BERT Surgeon, 2022 (groups); Denis Kuznedelev, Eldar Kurtic, Elias
        Frantar, Dan Alistarh, CAP: Correlation-Aware Pruning for Highly-Accurate Sparse Vision Models, 2023 (greedy).
    """

    order: Literal["single", "greedy"] = "greedy"
    group: int = 1
    block: int = 64
    damping: float = 1e-2
    relative: bool = True
    gradients: Literal["loss", "output"] = "loss"
    per_sample: Way = "vmap"

    def __post_init__(self) -> None:
        check_choice("optimal_brain_surgeon: order", self.order, ("single", "greedy"))
        check_whole("optimal_brain_surgeon: block", self.block, least=0)
        _ = self._statistic
        check_whole("optimal_brain_surgeon: group", self.group, error=PatternError)
        if self.group < 1 or (self.block and self.block % self.group):
            raise PatternError(
                f"optimal_brain_surgeon: group={self.group} must divide block={self.block}, so that no group is cut"
            )
        if self.group > 1 and self.order == "greedy":
            raise PatternError(
                "optimal_brain_surgeon: group rates weights that go together, so it needs order='single'"
            )

    @property
    def _statistic(self) -> InverseFisher:
        return InverseFisher(self.block or None, self.damping, self.relative, self.gradients, self.per_sample)

    @property
    def needs(self) -> frozenset[Need]:
        """The inverse of the damped Fisher matrix."""
        return frozenset({self._statistic})

    def __call__(self, weights: Tensors, stats: Stats) -> dict[str, Tensor]:
        """Return the score in float64."""
        inverse: FisherInverse = stats[self._statistic]
        if self.group > 1:
            for name, w in weights.items():
                if w.shape[-1] % self.group:
                    raise PatternError(
                        f"optimal_brain_surgeon: group={self.group} does not divide the last dimension of {name}, of "
                        f"shape {tuple(w.shape)}"
                    )
        out: dict[str, Tensor] = {}
        for piece in inverse.pieces:
            out |= piece.scatter(self._of(piece, piece.gather(weights)))
        return out

    def _of(self, piece: Piece, w_ZB: Tensor) -> Tensor:
        if self.order == "greedy":
            return _ranked(piece, w_ZB)
        if piece.block % self.group:  # a weight of fewer elements than a block, or one matrix over all
            pad = -piece.block % self.group
            inverse = torch.nn.functional.pad(piece.inverse, (0, pad, 0, pad))
            inverse.diagonal(dim1=-2, dim2=-1)[:, piece.block :] = 1.0
            losses = group_losses(inverse, torch.nn.functional.pad(w_ZB, (0, pad)), self.group)
            return (losses / self.group).repeat_interleave(self.group, -1)[:, : piece.block]
        return (group_losses(piece.inverse, w_ZB, self.group) / self.group).repeat_interleave(self.group, -1)


def _ranked(piece: Piece, w_ZB: Tensor) -> Tensor:
    """Return losses on removal that rise along each block's own order, so that ranking follows it."""
    trace = eliminate(piece.inverse, w_ZB, piece.curvature)
    rising = trace.losses.cummax(-1).values
    for step in range(1, rising.shape[-1]):  # equal ones would be ranked by index, not by turn
        before = rising[:, step - 1]
        rising[:, step] = torch.maximum(rising[:, step], torch.nextafter(before, torch.full_like(before, torch.inf)))
    return torch.empty_like(rising).scatter_(-1, trace.order, rising)
