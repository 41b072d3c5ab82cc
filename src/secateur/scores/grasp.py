"""What keeps gradients flowing, before training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from secateur.scores._wide import wide
from secateur.stats.curvature import HessianGradient
from secateur.types import Need, Stats, Tensors


@dataclass(frozen=True)
class Grasp:
    r"""Gradient signal preservation: what the removal takes from the squared norm of the gradient.

    .. math:: S_i = w_i\, (H g)_i, \qquad \|g\|^2 \text{ without } w_i \approx \|g\|^2 - 2\, S_i

    The paper scores :math:`-w \odot Hg` and removes the highest; here as everywhere a high score is kept, so the sign
    is the other one. Weights whose removal *raises* the gradient's norm go first. Meant for one shot before training,
    on about ten samples per class, classes balanced.

    Pitfalls:
        Where the network is piecewise linear and the loss nearly so, :math:`H` is close to zero and the score is noise.
        The authors' code scores with the fully connected layers drawn anew; here the weights are scored as they are.
        What it finds may be shares of layers and not weights: masks of such scores were shuffled within their layers at
        no loss (Frankle and others, 2021), so compare with the ablation ``shuffle``.

    Cost:
        Two passes over the batches, the second differentiated twice; two more numbers per weight, and the graph of the
        first derivative.

    Args:
        temperature: The loss sees the model's outputs divided by it. 200 is what the authors' own code does, so that
            the softmax is nearly uniform and all classes count alike. Give 1 where the outputs are no logits (a
            regression), or where the model returns its loss itself.

    Example:
        >>> import torch
        >>> score = Grasp()
        >>> (need,) = score.needs
        >>> score({"w": torch.tensor([2.0])}, {need: {"w": torch.tensor([-3.0])}})["w"].tolist()
        [-6.0]

    References:
        Chaoqi Wang, Guodong Zhang, Roger Grosse, Picking Winning Tickets Before Training by Preserving Gradient Flow,
        2020. Jonathan Frankle, Gintare Karolina Dziugaite, Daniel M. Roy, Michael Carbin, Pruning Neural Networks at
        Initialization: Why are We Missing the Mark?, 2021 (shuffled masks).
    """

    temperature: float = 200.0

    def __post_init__(self) -> None:
        HessianGradient(self.temperature)

    @property
    def needs(self) -> frozenset[Need]:
        """The Hessian times the gradient."""
        return frozenset({HessianGradient(self.temperature)})

    def __call__(self, weights: Tensors, stats: Stats) -> dict[str, Tensor]:
        """Return the score in float32 or better."""
        products = stats[HessianGradient(self.temperature)]
        return {name: wide(w) * products[name] for name, w in weights.items()}
