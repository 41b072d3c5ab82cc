"""How much a residual block turns its stream."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from secateur.types import GroupView, Stats


@dataclass(frozen=True)
class BlockInfluence:
    r"""Mean angle by which a block turns the stream that passes through it. For the pattern ``Layer``.

    With :math:`x_t` the stream at position :math:`t` before the block and :math:`y_t` after it:

    .. math:: S = 1 - \tfrac1T \sum_t \frac{x_t \cdot y_t}{\|x_t\| \, \|y_t\|}

    Channels are the last dimension of the stream, or the second where it has four (images). Needs batches, not labels.

    Pitfalls:
        How far a block turns the stream says nothing of what later blocks make of the turn, and once one block is gone
        the others turn other streams: score anew, or check the loss. Only blocks of one stack whose parameters have the
        same shapes are compared.

    Cost:
        One forward pass per batch, and a cosine per block.

    Example:
        >>> import torch
        >>> stats = {"stream_turn": {"layers": torch.tensor([0.5, 0.25])}}
        >>> BlockInfluence().units(GroupView("layers", 2, ()), stats).tolist()
        [0.5, 0.25]

    References:
        Xin Men, Mingyu Xu, Qingyu Zhang, Bingning Wang, Hongyu Lin, Yaojie Lu, Xianpei Han, Weipeng Chen, ShortGPT:
        Layers in Large Language Models are More Redundant Than You Expect, 2024.
    """

    @property
    def needs(self) -> frozenset[str]:
        """How far each block turns its stream."""
        return frozenset({"stream_turn"})

    def units(self, group: GroupView, stats: Stats) -> Tensor | None:
        """Return one score per block, or ``None`` for units that are no blocks."""
        turns: Tensor | None = stats["stream_turn"].get(group.name)
        return turns
