"""Network slimming's penalty: batch-norm scales that are not needed go to zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.errors import WeightError, check_number
from secateur.penalties._shrink import softened
from secateur.penalties._weights import pressed_on, settle
from secateur.types import Tensors


@dataclass(frozen=True)
class ScaleL1:
    r"""The sum of the absolute batch-norm scales.

    .. math:: R = \lambda \sum_l \sum_c |\gamma_{l,c}|

    with :math:`\lambda` = ``strength``. As in the paper the subgradient :math:`\lambda\,\mathrm{sign}(\gamma)` is added
    to the gradient before each step: scales of useless channels end up around zero, within a step of it. With
    ``proximal_step`` the step is followed by

    .. math:: \gamma \leftarrow \mathrm{sign}(\gamma) \max(0, |\gamma| - \eta \lambda)

    instead, with :math:`\eta` how far the optimizer's step goes for a gradient of one (the learning rate of SGD; Adam
    rescales it element by element), so that both forms have one minimum, and they become exactly zero.

    The paper starts scales at 0.5 (``nn.init.constant_(norm.weight, 0.5)``) and takes 1e-4 for VGG, 1e-5 for ResNets.
    Prune by :class:`~secateur.scores.NormScale` afterwards, and fold the shifts that are left behind
    (:func:`~secateur.structure.fold_constants_`).

    Pitfalls:
        Weight decay on the scales is a second penalty on them. A channel whose scale is zero still puts out its shift,
        which the layers that follow have learned to expect: fold it, or outputs move when it is cut out.

    Args:
        strength: :math:`\lambda`.
        proximal_step: Whether to act after the step, with exact zeros.
        exclude: Shell patterns of the norms to leave alone.

    Raises:
        RecipeError: When the strength is negative or not finite.

    Example:
        >>> penalty, w = ScaleL1(0.1), {"bn.weight": torch.tensor([0.5, -2.0, 0.0])}
        >>> float(penalty.value(w, {})), penalty.gradient(w, {})["bn.weight"].tolist()
        (0.25, [0.10000000149011612, -0.10000000149011612, 0.0])

    References:
        Zhuang Liu, Jianguo Li, Zhiqiang Shen, Gao Huang, Shoumeng Yan, Changshui Zhang, Learning Efficient
        Convolutional Networks through Network Slimming, 2017.
    """

    strength: float = 1e-4
    proximal_step: bool = False
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_number("scale_l1: strength", self.strength)
        settle(self, "exclude")

    def parameters(self, model: Module) -> tuple[str, ...]:
        """Return the scales of the batch norms.

        Raises:
            WeightError: When there are none, or a pattern matches nothing.
        """
        norms = {path: m for path, m in model.named_modules() if isinstance(m, _BatchNorm) and m.weight is not None}
        if not norms:
            raise WeightError(f"{self} presses on the scales of batch norms, and {type(model).__name__} has none")
        scales = {f"{path}.weight" if path else "weight" for path in norms}
        return pressed_on(model, (), self.exclude, only=scales)

    def start(self, weights: Tensors) -> dict[str, Tensor]:
        """Return nothing: no step differs from another."""
        return {}

    def value(self, weights: Tensors, state: Tensors) -> Tensor:
        """Return the penalty."""
        return self.strength * torch.stack([w.abs().sum() for w in weights.values()]).sum()

    def gradient(self, weights: Tensors, state: Tensors) -> dict[str, Tensor]:
        """Return the subgradient, zero at zero."""
        return {} if self.proximal_step else {n: self.strength * w.sign() for n, w in weights.items()}

    def proximal(self, weights: Tensors, state: Tensors, rates: Tensors) -> dict[str, Tensor]:
        """Return the scales, nearer to zero by rate times strength."""
        return softened(weights, rates, self.strength) if self.proximal_step else {}

    def advance(self, weights: Tensors, state: Tensors, step: int, loss: float | None) -> dict[str, Tensor]:
        """Return nothing."""
        return {}
