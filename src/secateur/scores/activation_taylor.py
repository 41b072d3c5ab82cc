"""First-order change of the loss when a unit's activation is set to zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from secateur.errors import RecipeError, check_choice
from secateur.scores._normalise import Normalise, normalised
from secateur.types import GroupView, Stats

Form = Literal["absolute", "square", "signed", "descent"]
Average = Literal["mean", "recent"]


@dataclass(frozen=True)
class ActivationTaylor:
    r"""Change of the loss along the removal of what a unit hands to the layers that read it.

    With :math:`a` the unit's activations where a layer reads them, and :math:`p_n = \sum \frac{\partial L_n}{\partial
    a}\,a` over all readers and positions, on sample :math:`n` of :math:`N`:

    .. math::
        \text{absolute:}\quad & S_u = \tfrac1N \sum_n |p_n| \\
        \text{square:}\quad & S_u = \tfrac1N \sum_n p_n^2 \\
        \text{signed:}\quad & S_u = \bigl|\tfrac1N \sum_n p_n\bigr| \\
        \text{descent:}\quad & S_u = -\tfrac1N \sum_n p_n

    :math:`p_n` is the derivative of the loss by a gate on the unit. The absolute value is taken sample by sample, so
    that samples that pull in opposite directions do not cancel, and a group's scores are divided by their L2 norm;
    both as in the paper, whose mean over the positions of a feature map differs by a factor that the norm takes out.
    ``descent`` keeps the sign, the predicted rise of the loss on removal, as Skeletonization does. With the average
    ``recent`` the mean of a batch counts 0.2, and what was known before it 0.8.

    Pitfalls:
        The loss must be a mean over the samples of a batch. At a minimum the ``signed`` and ``descent`` forms vanish.
        Groups that something else than a layer reads (a product of activations, a recurrent layer) are left whole, and
        reported.

    Cost:
        One forward and backward pass per batch, and the activations that the layers read, held until then.

    Args:
        form: ``"absolute"``, ``"square"``, ``"signed"`` or ``"descent"``.
        normalise: Divide each group's scores by their own ``mean``, ``max`` or ``l2`` norm, or not at all. With
            ``descent``, whose scores have signs, only ``l2`` and ``none`` mean something.
        average: ``"mean"`` over all samples, or ``"recent"``, for ``signed`` and ``descent``.

    Example:
        >>> import torch
        >>> stats = {"activation_product_absolute": {"conv": torch.tensor([3.0, 4.0])}}
        >>> [round(s, 2) for s in ActivationTaylor().units(GroupView("conv", 2, ()), stats).tolist()]
        [0.6, 0.8]

    References:
        Pavlo Molchanov, Stephen Tyree, Tero Karras, Timo Aila, Jan Kautz, Pruning Convolutional Neural Networks for
        Resource Efficient Inference, 2017. Michael C. Mozer, Paul Smolensky, Skeletonization, 1989 (``descent``).
    """

    form: Form = "absolute"
    normalise: Normalise = "l2"
    average: Average = "mean"

    def __post_init__(self) -> None:
        check_choice("activation_taylor: form", self.form, get_args(Form))
        check_choice("activation_taylor: normalise", self.normalise, get_args(Normalise))
        check_choice("activation_taylor: average", self.average, get_args(Average))
        if self.average == "recent" and self.form not in ("signed", "descent"):
            raise RecipeError(
                f"activation_taylor: form {self.form!r} averages over single samples, and average = 'recent' over "
                "batches: use form 'signed' or 'descent'"
            )

    @property
    def needs(self) -> frozenset[str]:
        """Products of activations and gradients, added up per unit and sample."""
        return frozenset({self._statistic})

    @property
    def _statistic(self) -> str:
        if self.average == "recent":
            return "activation_product_recent"
        return {"absolute": "activation_product_absolute", "square": "activation_product_square"}.get(
            self.form, "activation_product"
        )

    def units(self, group: GroupView, stats: Stats) -> Tensor | None:
        """Return one score per unit, or ``None`` where nothing was seen of them."""
        values = stats[self._statistic].get(group.name)
        if values is None:
            return None
        values = {"signed": values.abs(), "descent": -values}.get(self.form, values)
        return normalised(values, self.normalise)


def skeletonization() -> ActivationTaylor:
    r"""Relevance of a unit: the derivative of the loss by a gate on it, averaged with an eye on the latest batches.

    .. math:: S_u = -\hat p_u, \qquad \hat p_u \leftarrow 0.8\,\hat p_u + 0.2\, \frac{\partial L_b}{\partial
              \alpha_u} \Big|_{\alpha = 1}

    with :math:`\alpha_u` a factor on what the unit hands on. The sign is kept: units whose removal lowers the loss go
    first. This is ``ActivationTaylor(form="descent", average="recent", normalise="none")``.

    Pitfalls:
        The derivative of the squared error vanishes as training succeeds, so the paper's relevance is that of the
        linear error :math:`\sum |t - o|`. The loss is yours: return the absolute error from ``loss_fn``, whatever was
        trained on. The latest batches count most: the order of the batches changes the ranking.

    Cost:
        One forward and backward pass per batch, and the activations that the layers read, held until then.

    Returns:
        The score.

    Example:
        >>> import torch
        >>> stats = {"activation_product_recent": {"fc": torch.tensor([-2.0, 1.0])}}
        >>> skeletonization().units(GroupView("fc", 2, ()), stats).tolist()
        [2.0, -1.0]

    References:
        Michael C. Mozer, Paul Smolensky, Skeletonization: A Technique for Trimming the Fat from a Network via
        Relevance Assessment, 1989.
    """
    return ActivationTaylor(form="descent", normalise="none", average="recent")
