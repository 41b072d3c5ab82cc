"""Learning from the dense network while retraining: its answers beside the labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.errors import DataError, check_number, check_whole
from secateur.registry import Registry

# Shapes: N samples, C classes, * positions


@runtime_checkable
class Distillation(Protocol):
    """A loss between the outputs of the pruned network and those of the dense one."""

    @property
    def weight(self) -> float:
        """Part of the loss that it makes up; the task's own loss is the rest."""
        ...

    @property
    def tasks(self) -> frozenset[str]:
        """Tasks whose outputs it can compare."""
        ...

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the mean loss over a batch."""
        ...


@dataclass(frozen=True)
class SoftTargets:
    r"""Match the dense network's class probabilities, softened by a temperature.

    .. math:: L = (1 - a)\,L_{task} + a\,T^2\,
        \mathrm{KL}\bigl(\mathrm{softmax}(z_d / T)\,\|\,\mathrm{softmax}(z / T)\bigr)

    with the logits :math:`z` of the pruned and :math:`z_d` of the dense network. The factor :math:`T^2` keeps the size
    of the gradient where it is while :math:`T` changes. Works where outputs are logits of classes, in dimension 1.

    Args:
        weight: :math:`a`, from 0 (the labels alone) to 1 (the dense network alone).
        temperature: :math:`T`; higher ones show more of how the dense network ranks the wrong classes.

    Raises:
        RecipeError: When the weight lies outside [0, 1] or the temperature is not above 0.

    Example:
        >>> import torch
        >>> z = torch.tensor([[1.0, 2.0, 0.5]])
        >>> float(SoftTargets()(z, z))
        0.0

    References:
        Geoffrey Hinton, Oriol Vinyals, Jeff Dean, Distilling the Knowledge in a Neural Network, 2015.
    """

    weight: float = 0.5
    temperature: float = 2.0

    def __post_init__(self) -> None:
        check_number("distill: weight", self.weight, most=1.0)
        check_number("distill: temperature", self.temperature, above=True)

    @property
    def tasks(self) -> frozenset[str]:
        """Classification."""
        return frozenset({"classification"})

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the mean loss over a batch, without the weight."""
        return distillation_loss(student, teacher, self.temperature)


@dataclass(frozen=True)
class Outputs:
    r"""Match the dense network's outputs themselves: its logits, or its answers in a regression.

    .. math:: L = (1 - a)\,L_{task} + a\,\mathrm{mean}\,(z - z_d)^2

    Args:
        weight: :math:`a`, from 0 (the labels alone) to 1 (the dense network alone).

    Raises:
        RecipeError: When the weight lies outside [0, 1].

    Example:
        >>> import torch
        >>> float(Outputs()(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]])))
        2.0

    References:
        Jimmy Ba, Rich Caruana, Do Deep Nets Really Need to be Deep?, 2014 (regression on logits).
    """

    weight: float = 0.5

    def __post_init__(self) -> None:
        check_number("distill: weight", self.weight, most=1.0)

    @property
    def tasks(self) -> frozenset[str]:
        """Any that has one tensor of outputs."""
        return frozenset({"classification", "regression"})

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the mean loss over a batch, without the weight."""
        _check_outputs(student, teacher)
        return F.mse_loss(student, teacher.detach())


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0, *, dim: int = 1) -> Tensor:
    r"""Return how far class probabilities are from those of a teacher, both softened by a temperature.

    .. math:: L = T^2\,\mathrm{KL}(p_d\,\|\,p), \qquad p = \mathrm{softmax}(z / T), \quad
        \frac{\partial L}{\partial z} = \frac{T}{N}\,(p - p_d)

    the mean over samples and positions. No gradient reaches the teacher.

    Args:
        student: Logits :math:`z`, shape N×C×*.
        teacher: Logits of the same shape.
        temperature: :math:`T`.
        dim: Dimension of the classes; -1 where they come last, as in language models.

    Returns:
        One number; zero where the probabilities agree.

    Raises:
        DataError: When the shapes differ, or the classes have no dimension of their own.
        RecipeError: When the temperature is not above 0.

    Example:
        >>> import math, torch
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.log(3.0)]])
        >>> round(float(distillation_loss(student, teacher)), 4)  # 1/4 log(1/2) + 3/4 log(3/2)
        0.1308

    References:
        Geoffrey Hinton, Oriol Vinyals, Jeff Dean, Distilling the Knowledge in a Neural Network, 2015.
    """
    check_number("distill: temperature", temperature, above=True)
    _check_outputs(student, teacher)
    check_whole("distill: dim", dim, least=-student.dim(), error=DataError)
    if student.dim() < 2 or not -student.dim() <= dim < student.dim():
        raise DataError(
            f"outputs of shape {tuple(student.shape)} have no classes in dimension {dim}: expected logits of shape "
            "(samples, classes, ...), or say dim"
        )
    # In sixteen bits the two terms of a divergence near zero would be rounded past each other.
    wide = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    log_p = F.log_softmax(student.to(wide) / temperature, dim)
    log_q = F.log_softmax(teacher.detach().to(wide) / temperature, dim)
    rows = max(student.numel() // max(student.shape[dim], 1), 1)
    return F.kl_div(log_p, log_q, reduction="sum", log_target=True) * (temperature**2 / rows)


def _check_outputs(student: Tensor, teacher: Tensor) -> None:
    for who, outputs in (("network", student), ("teacher", teacher)):
        if not isinstance(outputs, Tensor):
            raise DataError(
                f"the {who}'s outputs are a {type(outputs).__name__}, and distillation compares tensors; take the one "
                "that matters, out.logits for example"
            )
    if student.shape != teacher.shape:
        raise DataError(
            f"the network's outputs have shape {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}: "
            "distillation compares them one by one, so both must answer the same question on the same batch"
        )
    if not student.is_floating_point():
        raise DataError(f"distillation needs floating-point outputs, got {student.dtype}")


DISTILLATIONS = Registry("distill", {"soft_targets": SoftTargets, "outputs": Outputs})
