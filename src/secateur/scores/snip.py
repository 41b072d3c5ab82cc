"""How the loss reacts to a mask on each weight, before training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from secateur.scores._wide import wide
from secateur.stats.sensitivity import ConnectionSensitivity
from secateur.types import Need, Stats, Tensors


@dataclass(frozen=True)
class Snip:
    r"""Connection sensitivity: the size of the loss's derivative by a mask on the weight.

    .. math:: S_i = \frac{|w_i\, g_i|}{\sum_j |w_j\, g_j|}, \qquad g = \tfrac1B \sum_b \nabla_w L_b

    Products of several batches are added up with their signs first, :math:`|\sum_b w g_b|`: the derivative of the mean
    loss. (``weight_gradient`` with ``absolute`` adds up sizes.) Meant for one shot before training, on one batch of at
    least ten samples per class, ranked globally, after an initialisation that keeps variances. The model runs in
    evaluation mode, also its batch norms.

    Pitfalls:
        Beyond 99 % sparsity it empties layers; several rounds (``iterative``) help. On a trained network most gradients
        are near zero, and so is what it sees. What it finds may be shares of layers and not weights: masks of such
        scores were shuffled within their layers at no loss (Frankle and others, 2021), so compare with the ablation
        ``shuffle``.

    Cost:
        One forward and backward pass per batch, and one more number per weight.

    Example:
        >>> import torch
        >>> score = Snip()
        >>> (need,) = score.needs
        >>> score({"w": torch.ones(2)}, {need: {"w": torch.tensor([0.25, 0.75])}})["w"].tolist()
        [0.25, 0.75]

    References:
        Namhoon Lee, Thalaiyasingam Ajanthan, Philip H. S. Torr, SNIP: Single-shot Network Pruning based on Connection
        Sensitivity, 2019. Pau de Jorge et al., Progressive Skeletonization: Trimming more fat from a network at
        initialization, 2021 (in rounds). Jonathan Frankle, Gintare Karolina Dziugaite, Daniel M. Roy, Michael Carbin,
        Pruning Neural Networks at Initialization: Why are We Missing the Mark?, 2021 (shuffled masks).
    """

    @property
    def needs(self) -> frozenset[Need]:
        """The derivative of the loss by masks."""
        return frozenset({ConnectionSensitivity()})

    def __call__(self, weights: Tensors, stats: Stats) -> dict[str, Tensor]:
        """Return the shares."""
        return {name: wide(stats[ConnectionSensitivity()][name]) for name in weights}
