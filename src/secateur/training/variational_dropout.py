"""Noise on every weight, as strong as the data bear; weights that are only noise go."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from secateur.errors import RecipeError, check_number, check_whole
from secateur.training._tensors import total, wide
from secateur.types import Masks, Moment, Tensors, Weight

_K1, _K2, _K3 = 0.63576, 1.87320, 1.48695
_TINY = 1e-8  # so that a weight of zero has a logarithm


def kl(log_alpha: Tensor) -> Tensor:
    """Return the divergence from the log-uniform prior, by the authors' approximation; zero for endless noise."""
    return _K1 - _K1 * torch.sigmoid(_K2 + _K3 * log_alpha) + 0.5 * (-log_alpha).exp().log1p()


@dataclass(frozen=True)
class VariationalDropout:
    r"""Gaussian noise of a learned strength on every weight; weights that drown in it are pruned.

    .. math:: q(w) = \mathrm{normal}(\theta, \alpha \theta^2), \qquad \log\alpha = \log\sigma^2 - \log\theta^2

    with :math:`\theta` the trained weight and :math:`\log\sigma^2` a latent of its shape. The penalty is ``strength``
    times the sum over all weights of

    .. math::
        \mathrm{KL} \approx k_1 - k_1\,\mathrm{sigmoid}(k_2 + k_3 \log\alpha) + \tfrac12 \log(1 + \alpha^{-1})

    with :math:`k_1 = 0.63576`, :math:`k_2 = 1.8732` and :math:`k_3 = 1.48695`. For a loss that is a mean over samples,
    ``strength`` is one over the number of training samples. It grows from zero over the first ``warm_up`` steps, or
    weights drown before they have learned anything.

    With ``local`` the noise is drawn where it has less variance, on the outputs of linear layers and convolutions, for
    every sample: :math:`y = \theta x + \sqrt{\sigma^2 x^2} \odot \varepsilon`. Otherwise one sample of every weight is
    drawn per forward pass.

    The finished network has the weights :math:`\theta` with :math:`\log\alpha` up to ``threshold`` (3: dropout at a
    rate of 0.95), and zeros.

    Pitfalls:
        Without ``warm_up`` weights drown before they have learned anything. How much goes is found and not set. On
        large tasks results were inconsistent (Gale, Elsen, Hooker, The State of Sparsity in Deep Neural Networks,
        2019).

    Args:
        strength: Of the divergence.
        threshold: Largest :math:`\log\alpha` that stays.
        warm_up: Steps over which the strength grows to its value.
        start_log_variance: :math:`\log\sigma^2` before the first step.
        limit: :math:`\log\alpha` is cut off at plus and minus this.
        local: Whether the noise is drawn on outputs.

    Raises:
        RecipeError: When a number is out of range.

    Example:
        >>> [round(float(v), 4) for v in kl(torch.tensor([-5.0, 0.0, 3.0, 8.0]))]
        [3.1367, 0.4312, 0.0254, 0.0002]

    References:
        Dmitry Molchanov, Arsenii Ashukha, Dmitry Vetrov, Variational Dropout Sparsifies Deep Neural Networks, 2017.
    """

    strength: float = 1e-4
    threshold: float = 3.0
    warm_up: int = 0
    start_log_variance: float = -10.0
    limit: float = 8.0
    local: bool = True

    def __post_init__(self) -> None:
        check_number("variational_dropout: strength", self.strength)
        check_whole("variational_dropout: warm_up", self.warm_up, least=0)
        check_number("variational_dropout: start_log_variance", self.start_log_variance, least=-math.inf)
        check_number("variational_dropout: limit", self.limit, above=True, most=20.0)
        check_number("variational_dropout: threshold", self.threshold, least=-math.inf)
        if not abs(self.threshold) < self.limit:
            raise RecipeError(
                f"variational_dropout: threshold = {self.threshold!r} must lie within plus and minus limit = "
                f"{self.limit!r}: log alpha is cut off there, and nothing or everything would go"
            )

    def check(self, weight: Weight) -> None:
        """Accept every shape."""

    def asked(self, step: int | None) -> float | None:
        """Return nothing: the sparsity follows from the data."""
        return None

    def start(self, weights: Tensors, layouts: Mapping[str, Weight], noise: Generator) -> dict[str, Tensor]:
        """Return the logarithms of the variances."""
        return {n: torch.full_like(wide(weights[n]), self.start_log_variance) for n in layouts}

    def log_alpha(self, at: Moment) -> dict[str, Tensor]:
        """Return the logarithm of noise over signal of every weight."""
        return {
            n: (at.latents[n] - (wide(at.weights[n]).square() + _TINY).log()).clamp(-self.limit, self.limit)
            for n in at.layouts
        }

    def weights(self, at: Moment, noise: Generator | None) -> dict[str, Tensor]:
        """Return the means, with noise on top where it is drawn on the weights."""
        out = {n: at.weights[n] for n in at.layouts}
        if self.local or noise is None:
            return out
        for name, value in self.log_alpha(at).items():
            epsilon = torch.randn(value.shape, generator=noise, dtype=value.dtype, device=value.device)
            drawn = wide(out[name]) * (1 + (0.5 * value).exp() * epsilon)
            out[name] = drawn.to(out[name].dtype)
        return out

    def variances(self, at: Moment) -> dict[str, Tensor]:
        """Return the variance of every weight, where the noise is drawn on outputs."""
        if not self.local:
            return {}
        return {n: a.exp() * wide(at.weights[n]).square() for n, a in self.log_alpha(at).items()}

    def final(self, at: Moment) -> tuple[dict[str, Tensor], Masks]:
        """Return the weights that do not drown."""
        # What is not a number is not above the threshold: a training that has diverged must not pass for a sparse one.
        masks = {n: ~(a > self.threshold) for n, a in self.log_alpha(at).items()}
        return {n: torch.where(m, at.weights[n], 0.0) for n, m in masks.items()}, masks

    def penalty(self, at: Moment) -> Tensor:
        """Return the divergence, as strong as it is by now."""
        grown = min(1.0, at.step / self.warm_up) if self.warm_up else 1.0
        return self.strength * grown * total([kl(a).sum() for a in self.log_alpha(at).values()])

    def advance(self, at: Moment) -> dict[str, Tensor]:
        """Return nothing."""
        return {}
