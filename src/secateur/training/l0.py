"""Stochastic gates: a network learns which of its units to switch off."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Generator, Tensor

from secateur.errors import PatternError, check_choice, check_number
from secateur.patterns import Channel, Unstructured
from secateur.patterns._layout import from_oki, oki_shape
from secateur.training._tensors import total, wide
from secateur.types import Masks, Moment, Tensors, Weight

Group = Literal["unit", "input", "output", "weight"]

TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1  # beta, gamma, and zeta = gamma + delta
_LIMIT = math.log(100.0)
_EDGE = 1e-6  # the logarithms of 0 and 1 are not finite


def hard_concrete(log_alpha: Tensor, u: Tensor) -> Tensor:
    """Return gates for uniform noise: a binary concrete variable, stretched, and cut off at 0 and 1."""
    concrete = torch.sigmoid((u.log() - (-u).log1p() + log_alpha) / TEMPERATURE)
    return (concrete * (HIGH - LOW) + LOW).clamp(0.0, 1.0)


def chance_open(log_alpha: Tensor) -> Tensor:
    """Return the probability that a gate is not zero."""
    return torch.sigmoid(log_alpha - TEMPERATURE * math.log(-LOW / HIGH))


def final_gate(log_alpha: Tensor) -> Tensor:
    """Return the gate of the finished network, without noise and without temperature."""
    return (torch.sigmoid(log_alpha) * (HIGH - LOW) + LOW).clamp(0.0, 1.0)


@dataclass(frozen=True)
class L0:
    r"""Gates with a chance of being exactly zero, and the expected number of weights behind open gates as a penalty.

    .. math::
        W = w \odot z, \qquad
        z = \min(1, \max(0, \delta\,\mathrm{sigmoid}((\log u - \log(1 - u) + \log\alpha) / \beta) + \gamma))

    with :math:`u` uniform, :math:`\beta = 2/3`, :math:`\gamma = -0.1` and :math:`\delta = 1.2`. One gate is drawn per
    group and forward pass. The penalty is

    .. math::
        \sum_g P_g\,(\lambda |g| + \tfrac12 \lambda_2 \|w_g\|^2), \qquad
        P_g = P(z_g \neq 0) = \mathrm{sigmoid}(\log\alpha_g - \beta \log(-\gamma / (\delta + \gamma)))

    for a loss that is a mean over samples: a :math:`\lambda` quoted for the sum over N samples is divided by N. The
    finished network has the gates

    .. math:: \hat z = \min(1, \max(0, \delta\,\mathrm{sigmoid}(\log\alpha) + \gamma))

    without :math:`\beta`: exactly zero from :math:`\log\alpha = -\log 11 = -2.398` down. After each step
    :math:`\log\alpha` is held between minus and plus :math:`\log 100`, so that a closed gate can open again.

    A group is an input unit of a layer without a kernel and an output map of a convolution (``unit``, as in the
    authors' networks), an ``input`` unit, an ``output`` unit with its bias, or a single ``weight``. With outputs, leave
    out the last layer, or the answers themselves are gated.

    A batch norm divides a gate in front of it out again, and puts out a constant when the gate is closed. Given example
    inputs, ``Reparametrised`` finds the norms; the gate then goes on their scale and shift, and their statistics see no
    noise. Without, and where the outputs of several layers are added up, gates that are closed for good still cut out,
    and the constant is what :func:`~secateur.structure.fold_constants_` is for.

    Pitfalls:
        Nothing closes while :math:`\lambda` is small, and everything does when it is large: the useful range is narrow,
        and the training longer than usual. How much goes is found and not set. On large tasks results were inconsistent
        (Gale, Elsen, Hooker, The State of Sparsity in Deep Neural Networks, 2019).

    Args:
        strength: :math:`\lambda`, of one weight.
        group: What one gate closes.
        l2: :math:`\lambda_2`.
        dropped: Share of the gates' mass that is closed at first: :math:`\log\alpha` starts around
            :math:`\log((1-p)/p)` with a deviation of 0.01; the authors take 0.5, and 0.2 for inputs of the network.

    Raises:
        RecipeError: When a strength is negative or not finite, or ``dropped`` is not inside (0, 1).

    Example:
        >>> at = torch.tensor([-2.398, 0.0, 2.398])
        >>> final_gate(at).tolist(), [round(float(p), 3) for p in chance_open(at)]
        ([0.0, 0.5, 1.0], [0.31, 0.832, 0.982])

    References:
        Christos Louizos, Max Welling, Diederik P. Kingma, Learning Sparse Neural Networks through L0 Regularization,
        2018.
    """

    strength: float = 1e-5
    group: Group = "unit"
    l2: float = 0.0
    dropped: float = 0.5

    def __post_init__(self) -> None:
        check_number("l0: strength", self.strength)
        check_number("l0: l2", self.l2)
        check_choice("l0: group", self.group, get_args(Group))
        check_number("l0: dropped", self.dropped, above=True, most=1.0, below=True)

    @property
    def pattern(self) -> Channel | Unstructured:
        """Whole units, unless each weight has its gate."""
        return Unstructured() if self.group == "weight" else Channel()

    def _side(self, weight: Weight) -> Group:
        if self.group != "unit":
            return self.group
        return "output" if len(weight.shape) > 2 else "input"

    def check(self, weight: Weight) -> None:
        """Refuse gates on the inputs of a grouped convolution: its columns are several units.

        Raises:
            PatternError: Names the weight and the way out.
        """
        if self._side(weight) == "input" and weight.groups > 1:
            raise PatternError(
                f"{weight.name}: a column of a convolution in {weight.groups} groups belongs to as many input units; "
                f"gate its outputs (group = 'output'), or leave it out with exclude = [{weight.name!r}]"
            )

    def asked(self, step: int | None) -> float | None:
        """Return nothing: the sparsity follows from the strength."""
        return None

    def start(self, weights: Tensors, layouts: Mapping[str, Weight], noise: Generator) -> dict[str, Tensor]:
        """Return the gates' log alpha."""
        mean = math.log((1 - self.dropped) / self.dropped)
        out: dict[str, Tensor] = {}
        for name, layout in layouts.items():
            like = wide(weights[name])
            outputs, _, inputs = oki_shape(layout)
            shapes = {"output": (outputs,), "input": (inputs,), "weight": layout.shape}
            shape = shapes[self._side(layout)]
            drawn = torch.randn(shape, generator=noise, dtype=like.dtype, device=noise.device)
            out[name] = (mean + 0.01 * drawn).to(like.device)
        return out

    def weights(self, at: Moment, noise: Generator | None) -> dict[str, Tensor]:
        """Return what the gates, one sample of them, let through; without noise, those of the median u = 1/2."""
        out: dict[str, Tensor] = {}
        for name, layout in at.layouts.items():
            log_alpha = at.latents[name]
            u = torch.full_like(log_alpha, 0.5)
            if noise is not None:
                u = torch.rand(u.shape, generator=noise, dtype=u.dtype, device=u.device) * (1 - 2 * _EDGE) + _EDGE
            factors = self._spread(layout, hard_concrete(log_alpha, u))
            norms = self._norms(layout)
            if norms:  # in front of a norm a gate would only disturb its statistics
                factors = {n: factors[n] for n in norms}
            out |= {n: at.weights[n] * z.to(at.weights[n].dtype) for n, z in factors.items()}
        return out

    def final(self, at: Moment) -> tuple[dict[str, Tensor], Masks]:
        """Return what the gates let through in the end."""
        out: dict[str, Tensor] = {}
        masks: Masks = {}
        for name, layout in at.layouts.items():
            gates = final_gate(at.latents[name])
            # What is not a number is not shut: a training that has diverged must not pass for a sparse one.
            own = self._spread(layout, ~(gates <= 0))
            masks |= own
            factors = self._spread(layout, gates)
            norms = self._norms(layout)
            if norms:
                factors |= {n: m.to(gates.dtype) for n, m in own.items() if n not in norms}
            out |= {n: torch.where(own[n], at.weights[n] * z.to(at.weights[n].dtype), 0.0) for n, z in factors.items()}
        return out, masks

    def penalty(self, at: Moment) -> Tensor:
        """Return the expected number of weights behind open gates, times the strength, and the expected L2 norm."""
        terms = []
        for name, layout in at.layouts.items():
            chance = chance_open(at.latents[name])
            spread = self._spread(layout, chance)
            sizes = sum(p.numel() for p in spread.values()) / max(chance.numel(), 1)
            terms.append(self.strength * sizes * chance.sum())
            if self.l2:
                terms += [0.5 * self.l2 * (p * wide(at.weights[n]).square()).sum() for n, p in spread.items()]
        return total(terms)

    def advance(self, at: Moment) -> dict[str, Tensor]:
        """Return log alpha, held within the log of 100."""
        return {n: a.clamp(-_LIMIT, _LIMIT) for n, a in at.latents.items()}

    def _norms(self, layout: Weight) -> tuple[str, ...]:
        """Return scale and shift of the norm that takes the gates in the layer's place: where they are on outputs."""
        return layout.companions if self._side(layout) == "output" else ()

    def _spread(self, layout: Weight, gates: Tensor) -> dict[str, Tensor]:
        """Repeat one value per gate over every parameter that it acts on."""
        side = self._side(layout)
        if side == "output":
            return Channel().expand(layout, gates)
        if side == "input":
            return {layout.name: from_oki(layout, gates.expand(oki_shape(layout)))}
        return {layout.name: gates}
