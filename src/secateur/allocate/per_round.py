"""The same rate per round in every layer, a lower one in some: how lottery tickets are drawn."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from secateur.allocate._apportion import apportion
from secateur.errors import TargetError, WeightError, nearest
from secateur.types import Units


@dataclass(frozen=True)
class PerRound:
    r"""Take the same part of what is left from every layer in each round, and a smaller part from some.

    .. math:: k_l = \mathrm{round}\bigl(n_l\,(1 - p_l)^t\bigr), \qquad
        p_l = f\,p \text{ where slower, otherwise } p

    with the round :math:`t` as late as the budget asks. With the schedule ``iterative`` and a target of
    ``PerRound.sparsity(sizes, rounds)``, round :math:`i` keeps :math:`(1 - p_l)^i` of every layer: the founding
    protocol takes 20 % of each layer per round and 10 % of the output layer, which has few weights to spare. Without
    slower layers this is ``layerwise``. The totals are exact, as everywhere: with slower layers the rounds before the
    last may so differ from :math:`(1 - p_l)^i` by a fraction of a percent of a layer.

    Cost:
        A bisection over one number per layer; of the scores it sees only which units are gone.

    Args:
        rate: :math:`p`, the part of what is left that a round takes from a layer.
        slower: Shell patterns on the names of weights or modules that lose less, such as the output layer.
        factor: :math:`f`, what their rate is multiplied by.

    Raises:
        TargetError: When the rate or the factor does not lie in (0, 1).

    Example:
        >>> import torch
        >>> units = {n: Units(torch.zeros(1000), 1) for n in ("fc1.weight", "fc2.weight")}
        >>> PerRound(slower=("fc2",))(units, 800 + 900)
        {'fc1.weight': 800, 'fc2.weight': 900}

    References:
        Jonathan Frankle, Michael Carbin, The Lottery Ticket Hypothesis, 2019.
    """

    rate: float = 0.2
    slower: tuple[str, ...] = ()
    factor: float = 0.5

    def __post_init__(self) -> None:
        for name in ("rate", "factor"):
            value = getattr(self, name)
            if not 0.0 < value < 1.0:
                raise TargetError(f"per_round: {name} must lie in (0, 1), got {value}")
        if isinstance(self.slower, str):
            raise TargetError(
                f"per_round: slower is a list of shell patterns, got {self.slower!r}; write [...] around it"
            )

    def __call__(self, units: Mapping[str, Units], kept: float) -> dict[str, int]:
        """Return the number of units that stay in each layer.

        Raises:
            WeightError: When a pattern matches none of the layers.
        """
        for pattern in self.slower:
            if not any(_matches(name, pattern) for name in units):
                known = {name.rpartition(".")[0] or name for name in units}
                raise WeightError(
                    f"per_round: slower {pattern!r} matches none of the layers; {nearest(pattern, known)}"
                )
        sizes = {name: Fraction(u.scores.numel()) for name, u in units.items()}
        return apportion(units, kept, sizes, {name: self._slowness(name) for name in units})

    def sparsity(self, sizes: Mapping[str, int], rounds: int) -> float:
        """Return what is gone of all layers together after some rounds, for the target.

        Args:
            sizes: Weights per layer, by parameter name.
            rounds: How many.

        Returns:
            The sparsity.

        Example:
            >>> round(PerRound(slower=("fc2",)).sparsity({"fc1.weight": 100, "fc2.weight": 100}, 1), 9)
            0.15
        """
        left = math.fsum(n * (1.0 - self.rate) ** (self._slowness(name) * rounds) for name, n in sizes.items())
        return 1.0 - left / sum(sizes.values())

    def _slowness(self, name: str) -> float:
        if not any(_matches(name, pattern) for pattern in self.slower):
            return 1.0
        return math.log1p(-self.factor * self.rate) / math.log1p(-self.rate)


def _matches(name: str, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(n, pattern) for n in (name, name.rpartition(".")[0]))
