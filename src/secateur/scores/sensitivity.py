"""How far the outputs move when a unit goes: no labels, no loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Generator, Tensor

from secateur.errors import MissingStatsError, TargetError, check_choice, check_number, check_whole
from secateur.types import GroupView, Stats

Outputs = Literal["logits", "values"]


@dataclass(frozen=True)
class Sensitivity:
    r"""Expected change of the model's outputs, to second order, when a unit is replaced by its mean.

    With :math:`z_n` the outputs for sample :math:`n`, :math:`a` the unit's activations where a layer reads them, and
    :math:`v_n` a random direction:

    .. math:: S_u = \tfrac1N \sum_n \Bigl( \sum_{\text{readers, positions}}
              \frac{\partial (v_n \cdot z_n)}{\partial a} (a - c\,\bar a) \Bigr)^2

    Its expectation over the directions is :math:`\tfrac1N \sum_n \delta_n^\top \mathrm{Cov}(v_n)\, \delta_n`, with
    :math:`\delta_n` the first-order change of the outputs. For ``logits``, :math:`\mathrm{Cov}(v) = \mathrm{diag}(p) -
    p p^\top` with :math:`p = \mathrm{softmax}(z / T)`: the KL divergence from the unpruned model's own softmax, times
    :math:`2 T^2`. For other ``values`` it is the identity: the squared change. The unpruned model is at the minimum of
    both, where gradients vanish and first-order scores need labels; this one does not.

    With ``centred`` (:math:`c = 1`) the unit is replaced by its mean :math:`\bar a`, which folding constants or
    re-matching batch norms puts back, otherwise by zero. With ``per_mac`` the score is divided by the multiplications
    that the unit costs: what a budget of MACs should rank by.

    Several passes over the same batches draw new directions: give ``batches * 4`` for a quarter of the variance.
    Batches must be what the model is called with, or ``loss_fn(model, batch)`` must return the outputs that matter.

    Pitfalls:
        Directions are random: with few samples neighbouring units change places from seed to seed. Outputs that are no
        logits need ``outputs="values"``, or the softmax weighs them by chance. Groups that something else than a layer
        reads are left whole, and reported.

    Cost:
        One forward and backward pass per batch, a further forward pass where ``centred``, and the activations that the
        layers read, held until then.

    Args:
        outputs: ``"logits"``, or other ``"values"``.
        temperature: Of the softmax; above 1, classes other than the first count more.
        centred: Whether a unit is replaced by its mean or by zero.
        per_mac: Divide by the multiplications that the unit costs.
        class_dim: Dimension of the logits' classes.
        seed: Seed of the directions.

    Raises:
        TargetError: When the temperature is not above 0.

    Example:
        >>> squares, costs = torch.tensor([4.0, 6.0]), torch.tensor([8.0, 2.0])
        >>> stats = {"centred_product_square": {"fc": squares}, "unit_macs": {"fc": costs}}
        >>> Sensitivity(per_mac=True).units(GroupView("fc", 2, ()), stats).tolist()
        [0.5, 3.0]

    References:
        This library's own combination. The quadratic form is that of Yann LeCun, John S. Denker, Sara A. Solla, Optimal
        Brain Damage, 1989; the Fisher matrix of the model's own predictions: James Martens, New Insights and
        Perspectives on the Natural Gradient Method, 2014; summing a unit's first-order effects before squaring: Pavlo
        Molchanov, Arun Mallya, Stephen Tyree, Iuri Frosio, Jan Kautz, Importance Estimation for Neural Network Pruning,
        2019.
    """

    outputs: Outputs = "logits"
    temperature: float = 1.0
    centred: bool = True
    per_mac: bool = False
    class_dim: int = -1
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("sensitivity: outputs", self.outputs, get_args(Outputs))
        check_number("sensitivity: temperature", self.temperature, above=True, error=TargetError)
        check_whole("sensitivity: seed", self.seed, least=0, error=TargetError)

    @property
    def needs(self) -> frozenset[str]:
        """Squared products of activations and gradients per unit and sample; the units' cost where it counts."""
        return frozenset({self._statistic, *(["unit_macs"] if self.per_mac else [])})

    @property
    def _statistic(self) -> str:
        return "centred_product_square" if self.centred else "activation_product_square"

    def directions(self, outputs: Tensor, generator: Generator) -> Tensor:
        """Return one random direction per sample, of the covariance that the outputs call for.

        Raises:
            MissingStatsError: When logits have one class only.
        """
        wide = outputs.detach().to(torch.promote_types(outputs.dtype, torch.float32)).cpu()
        noise = torch.randn(wide.shape, generator=generator, dtype=wide.dtype)
        if self.outputs == "values":
            return noise
        if wide.shape[self.class_dim] < 2:
            raise MissingStatsError(
                f"{self}: outputs of shape {tuple(wide.shape)} have one class, whose softmax is always 1; use "
                'outputs="values", or name the dimension of the classes by class_dim'
            )
        p = (wide / self.temperature).softmax(self.class_dim)
        noise = p.sqrt() * noise
        return noise - p * noise.sum(self.class_dim, keepdim=True)

    def units(self, group: GroupView, stats: Stats) -> Tensor | None:
        """Return one score per unit, or ``None`` where nothing was seen of them."""
        values: Tensor | None = stats[self._statistic].get(group.name)
        if values is None:
            return None
        return values / stats["unit_macs"][group.name].clamp_min(1.0) if self.per_mac else values
