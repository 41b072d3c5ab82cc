"""Every layer learns the size under which its weights are zero."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from secateur.errors import check_number
from secateur.training._tensors import total, wide
from secateur.types import Masks, Moment, Tensors, Weight


@dataclass(frozen=True)
class SoftThreshold:
    r"""Soft-thresholded weights, with one trained threshold per layer.

    .. math:: W = \mathrm{sign}(w)\,\max(0, |w| - \mathrm{sigmoid}(s))

    with :math:`s` a latent number per layer that starts at ``start_threshold`` and is pressed on by
    :math:`\tfrac12 \lambda s^2`, :math:`\lambda` = ``decay``: towards zero, where the threshold is 0.5 and nearly all
    weights are zero. With plain SGD this penalty is the weight decay that the authors put on :math:`s`; leave the
    optimizer's own at zero for the latents then.

    The weights of the finished network are the shrunk ones.

    The authors' own starts go down to -3200, where the threshold is zero in float32 and only the decay moves it; the
    default starts at a threshold of 0.0067, where gradients reach it.

    Pitfalls:
        **The sparsity is not set, it is found**: it follows from ``decay``, the start, the learning rate and the length
        of training, and a target is met by trying several. Where a sparsity must be met, take ``Movement``, or a
        ``Pruner``. A weight under its threshold gets no gradient: it comes back only where the threshold falls below it
        again.

    Args:
        start_threshold: :math:`s` before the first step.
        decay: :math:`\lambda`.

    Raises:
        RecipeError: When the start is not finite, or the decay negative or not finite.

    Example:
        >>> at = Moment({"w": torch.tensor([0.2, -0.6, 1.0])}, {"w": torch.zeros(())}, {"w": Weight("w", (3,))})
        >>> [round(float(v), 1) for v in SoftThreshold().final(at)[0]["w"]]
        [0.0, -0.1, 0.5]

    References:
        Aditya Kusupati, Vivek Ramanujan, Raghav Somani, Mitchell Wortsman, Prateek Jain, Sham Kakade, Ali Farhadi, Soft
        Threshold Weight Reparameterization for Learnable Sparsity, 2020.
    """

    start_threshold: float = -5.0
    decay: float = 1e-4

    def __post_init__(self) -> None:
        check_number("soft_threshold: start_threshold", self.start_threshold, least=-math.inf)
        check_number("soft_threshold: decay", self.decay)

    def check(self, weight: Weight) -> None:
        """Accept every shape."""

    def asked(self, step: int | None) -> float | None:
        """Return nothing: the sparsity follows from the decay."""
        return None

    def start(self, weights: Tensors, layouts: Mapping[str, Weight], noise: Generator) -> dict[str, Tensor]:
        """Return one number per layer."""
        return {n: torch.full_like(wide(weights[n][(0,) * weights[n].dim()]), self.start_threshold) for n in layouts}

    def weights(self, at: Moment, noise: Generator | None) -> dict[str, Tensor]:
        """Return the shrunk weights."""
        out = {}
        for name in at.layouts:
            w = wide(at.weights[name])
            shrunk = w.sign() * (w.abs() - torch.sigmoid(at.latents[name])).relu()
            out[name] = shrunk.to(at.weights[name].dtype)
        return out

    def final(self, at: Moment) -> tuple[dict[str, Tensor], Masks]:
        """Return the shrunk weights, and where they are not zero."""
        shrunk = self.weights(at, None)
        masks = {n: w != 0 for n, w in shrunk.items()}
        return {n: torch.where(masks[n], w, 0.0) for n, w in shrunk.items()}, masks

    def penalty(self, at: Moment) -> Tensor:
        """Return the decay of the latents."""
        return 0.5 * self.decay * total([s.square() for s in at.latents.values()])

    def advance(self, at: Moment) -> dict[str, Tensor]:
        """Return nothing."""
        return {}
