"""Weight times gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from secateur.errors import check_choice
from secateur.scores._wide import wide
from secateur.types import Stats, Tensors


@dataclass(frozen=True)
class WeightGradient:
    r"""First-order change of the loss when the weight is removed.

    With :math:`g_b = \partial L_b / \partial w` on batch :math:`b` of :math:`B`:

    .. math::
        \text{absolute:}\quad & S = \tfrac1B \sum_b |w\,g_b| \\
        \text{signed:}\quad & S = \bigl|\, w \cdot \tfrac1B \sum_b g_b \bigr|

    ``absolute`` adds up magnitudes; ``signed`` adds up signed products first, so that batches which pull in opposite
    directions cancel, and equals the derivative of the mean loss by a mask on the weight. On one batch they agree.
    A third form, ``descent``, keeps the sign of the sum, :math:`S = -w \cdot \tfrac1B\sum_b g_b`, the predicted rise of
    the loss on removal: weights whose removal is predicted to *lower* the loss go first.

    Pitfalls:
        At a minimum the mean gradient is zero, and ``signed`` says nothing; a tiny batch makes all three noisy. To
        first order a weight's removal is a small step, which that of a large weight is not.

    Cost:
        One forward and backward pass per batch, and one more number per weight.

    Args:
        sign: ``"absolute"``, ``"signed"`` or ``"descent"``.

    Example:
        >>> import torch
        >>> g = {"gradient": {"w": torch.tensor([0.5])}, "absolute_gradient": {"w": torch.tensor([2.0])}}
        >>> [float(WeightGradient(s)({"w": torch.tensor([-3.0])}, g)["w"]) for s in ("absolute", "signed", "descent")]
        [6.0, 1.5, 1.5]

    References:
        Michael C. Mozer, Paul Smolensky, Skeletonization, 1989 (the signed form, on units); Pavlo Molchanov et al.,
        Pruning Convolutional Neural Networks for Resource Efficient Inference, 2017; Namhoon Lee, Thalaiyasingam
        Ajanthan, Philip Torr, SNIP, 2019 (at initialisation).
    """

    sign: Literal["absolute", "signed", "descent"] = "absolute"

    def __post_init__(self) -> None:
        check_choice("weight_gradient: sign", self.sign, ("absolute", "signed", "descent"))

    @property
    def needs(self) -> frozenset[str]:
        """The mean absolute gradient, or the mean gradient."""
        return frozenset({"absolute_gradient" if self.sign == "absolute" else "gradient"})

    def __call__(self, weights: Tensors, stats: Stats) -> dict[str, Tensor]:
        """Return the score in float32 or better."""
        if self.sign == "absolute":
            gradients = stats["absolute_gradient"]
            return {name: wide(w).abs() * gradients[name] for name, w in weights.items()}
        products = {name: wide(w) * stats["gradient"][name] for name, w in weights.items()}
        return {name: p.abs() if self.sign == "signed" else -p for name, p in products.items()}
