"""Derivative of the loss by a mask on each weight."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from secateur.stats._common import OfWeights, data_of, refuse_nothing
from secateur.stats.gradients import collect_gradients
from secateur.types import Source


@dataclass(frozen=True)
class ConnectionSensitivity(OfWeights):
    r"""Share of each weight in the derivative of the mean loss by masks on all weights.

    .. math:: s_i = \frac{|w_i\, g_i|}{\sum_j |w_j\, g_j|}, \qquad g = \tfrac1B \sum_b \nabla_w L_b

    The sum runs over all parameters that statistics are collected of.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = net.weight.copy_(torch.tensor([[1.0, -3.0]]))
        >>> source = Source(net, dict(net.named_parameters()), lambda m, x: m(x).sum(), lambda: [torch.ones(1, 2)])
        >>> ConnectionSensitivity().collect(source)["weight"].tolist()
        [[0.25, 0.75]]
    """

    def collect(self, source: Source) -> dict[str, Tensor]:
        """Average the gradient, multiply, and divide by the sum.

        Raises:
            MissingStatsError: When all products are zero.
        """
        loss_fn, batches = data_of(self, source)
        found = collect_gradients(source.model, source.parameters, loss_fn, batches(), needs=["gradient"])
        out = {n: (p.detach() * found["gradient"][n]).abs() for n, p in source.parameters.items()}
        refuse_nothing(self, out, "the gradient is zero wherever a weight is not")
        total = sum(float(value.double().sum()) for value in out.values())
        return {name: value / total for name, value in out.items()}
