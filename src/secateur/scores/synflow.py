"""Synaptic flow: no data, no labels, and no layer emptied before its time."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from secateur.scores._wide import wide
from secateur.stats.synaptic_flow import SynapticFlow
from secateur.types import Need, Stats, Tensors


@dataclass(frozen=True)
class Synflow:
    r"""Share of an all-ones signal through absolute weights that passes through the weight.

    .. math:: S_i = \frac1R \left| \frac{\partial R}{\partial |w_i|} \right| |w_i|, \qquad
              R = \sum_k f_k(1, \dots, 1; |w|)

    Scores of layers that all paths cross add up to the same, so small layers have large scores, and in many small
    rounds, each scored anew, no layer is emptied while another has weights to give: use the schedule
    ``iterative(rounds=100)`` and rank globally.

    Needs ``example_inputs`` for their shape alone.

    Pitfalls:
        In one shot nothing keeps a layer from being emptied: use many rounds. Layer norms and attention have no such
        flow. It sees sizes of weights alone, and so says nothing of the data. What it finds may be shares of layers and
        not weights: masks of such scores were shuffled within their layers at no loss (Frankle and others, 2021), so
        compare with the ablation ``shuffle``.

    Cost:
        One forward and backward pass of a batch of one in float64 for each round, and a copy of the weights in float64.

    Example:
        >>> import torch
        >>> score = Synflow()
        >>> (need,) = score.needs
        >>> score({"w": torch.ones(2)}, {need: {"w": torch.tensor([0.25, 0.75])}})["w"].tolist()
        [0.25, 0.75]

    References:
        Hidenori Tanaka, Daniel Kunin, Daniel L. K. Yamins, Surya Ganguli, Pruning neural networks without any data by
        iteratively conserving synaptic flow, 2020. Jonathan Frankle, Gintare Karolina Dziugaite, Daniel M. Roy, Michael
        Carbin, Pruning Neural Networks at Initialization: Why are We Missing the Mark?, 2021 (shuffled masks).
    """

    @property
    def needs(self) -> frozenset[Need]:
        """The flow through each weight."""
        return frozenset({SynapticFlow()})

    def __call__(self, weights: Tensors, stats: Stats) -> dict[str, Tensor]:
        """Return the shares."""
        return {name: wide(stats[SynapticFlow()][name]) for name in weights}
