"""Sensitivities read off the training itself: the loss's fall along each weight's own path."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from secateur.scores._wide import wide
from secateur.stats.trajectory import PathIntegral, Trajectory
from secateur.types import Need, Stats, Tensors


@dataclass(frozen=True)
class Karnin:
    r"""What the loss would rise if the weight went back to zero, from how it fell while the weight was learnt.

    .. math:: S_i = \Bigl[ \sum_t -g_{t,i}\, \Delta w_{t,i} \Bigr] \frac{w_i}{w_i - w_{0,i}}

    with :math:`w_0` the weight before training. For gradient descent the bracket is the paper's :math:`\sum_t
    \Delta w_{t,i}^2 / \eta`; this form holds for any optimizer. The paper stretches the path from :math:`w_0` to
    :math:`w` linearly to one from zero: exact for a weight that began at zero on a quadratic without interactions,
    :math:`\tfrac12 h w^2`.

    Pitfalls:
        Where the initial weight lies beyond the final one (same sign, larger) the estimate is negative though the
        weight matters, and such weights go first. A weight that has hardly moved (by less than 1e-6 of its size) says
        nothing: its score is 0.

    Cost:
        Two more numbers per weight during training, and a copy of weights and gradients during a step; none afterwards.

    Args:
        path: Who watched the training. Left out in a recipe: its run watches, and restarts when weights are rewound.

    Example:
        >>> score = Karnin()
        >>> stats = {Trajectory("fall"): {"w": torch.tensor([4.0])}, Trajectory("initial"): {"w": torch.tensor([1.0])}}
        >>> score({"w": torch.tensor([3.0])}, stats)["w"].tolist()  # 4 * 3 / (3 - 1)
        [6.0]

    References:
        Ehud D. Karnin, A simple procedure for pruning back-propagation trained neural networks, 1990.
    """

    path: PathIntegral | None = field(default=None, repr=False)

    @property
    def needs(self) -> frozenset[Need]:
        """The fall of the loss along each weight, and where the weights began."""
        return frozenset({Trajectory("fall", self.path), Trajectory("initial", self.path)})

    def __call__(self, weights: Tensors, stats: Stats) -> dict[str, Tensor]:
        """Return the score in float32 or better."""
        fall, initial = stats[Trajectory("fall", self.path)], stats[Trajectory("initial", self.path)]
        out = {}
        for name, weight in weights.items():
            now, began = wide(weight), wide(initial[name]).to(wide(weight).device)
            moved = now - began
            still = moved.abs() <= 1e-6 * torch.maximum(now.abs(), began.abs())
            stretch = torch.where(still, 0.0, now / torch.where(still, torch.ones_like(moved), moved))
            out[name] = fall[name] * stretch
        return out


@dataclass(frozen=True)
class Movement:
    r"""Whether training pushes the weight away from zero or towards it.

    .. math:: S_i = -\sum_t g_{t,i}\, w_{t,i}

    A step against the gradient makes a weight larger in size where :math:`g\,w < 0`: weights that grow are kept,
    whatever their size. This is the paper's learnt score up to its learning rate, of a dense training that is watched;
    the paper masks by the score while it trains.

    Pitfalls:
        Scores start at zero and know only what training did: after a few steps, or where hardly any gradient reached a
        weight, their sign is chance. A weight that was large from the start and stays as it is counts for nothing.

    Cost:
        Two more numbers per weight during training, and a copy of weights and gradients during a step; none afterwards.

    Args:
        path: Who watched the training. Left out in a recipe: its run watches, and restarts when weights are rewound.

    Example:
        >>> score = Movement()
        >>> score({"w": torch.zeros(2)}, {Trajectory("movement"): {"w": torch.tensor([1.0, -2.0])}})["w"].tolist()
        [1.0, -2.0]

    References:
        Victor Sanh, Thomas Wolf, Alexander M. Rush, Movement Pruning: Adaptive Sparsity by Fine-Tuning, 2020.
    """

    path: PathIntegral | None = field(default=None, repr=False)

    @property
    def needs(self) -> frozenset[Need]:
        """Sums of gradient times weight over training."""
        return frozenset({Trajectory("movement", self.path)})

    def __call__(self, weights: Tensors, stats: Stats) -> dict[str, Tensor]:
        """Return the sums."""
        movement = stats[Trajectory("movement", self.path)]
        return {name: wide(movement[name]) for name in weights}
