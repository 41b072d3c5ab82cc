"""How much: one number in one of five currencies, turned into a budget over the prunable weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from fractions import Fraction
from typing import Literal, get_args

from secateur.errors import TargetError, nearest
from secateur.types import Budget

_ROUNDING = 1 + Fraction(1, 10**13)
"""A ratio that was computed from whole numbers must give them back, although a float is a little off."""

Kind = Literal["sparsity", "kept_parameters", "compression_ratio", "macs", "channels"]


@dataclass(frozen=True)
class ModelFacts:
    """What a target needs to know of a model.

    Attributes:
        numel: Elements of each prunable weight.
        parameters: All parameters of the model, prunable or not, tied ones once.
        macs: Multiply-accumulates of each prunable weight in one forward pass, where they were counted.
        other_macs: Those of everything else.
    """

    numel: Mapping[str, int]
    parameters: int
    macs: Mapping[str, int] | None = None
    other_macs: int = 0

    @property
    def prunable(self) -> int:
        """Number of prunable elements."""
        return sum(self.numel.values())


@dataclass(frozen=True)
class Target:
    r"""How much to remove.

    With :math:`n` prunable weights, :math:`P` parameters in the model, and :math:`r` weights removed:

    ===================== ========================= ==========================================
    ``kind``              the value means           weights removed
    ===================== ========================= ==========================================
    ``sparsity``          :math:`r / n`             :math:`\mathrm{round}(s\,n)`, half to even
    ``compression_ratio`` :math:`P / (P - r)`       :math:`\lceil P - P/c \rceil`
    ``kept_parameters``   :math:`P - r`             :math:`P - v`
    ``macs``              fraction of the MACs left as many as the score's order needs
    ``channels``          fraction of units left    whole units, counted over coupled groups
    ===================== ========================= ==========================================

    ``channels`` counts units (channels, heads, neurons) of coupled groups, for physical pruning and coupled channels.
    ``sparsity`` counts prunable weights only; the other three count the whole model, so a bias or an embedding that
    cannot be pruned limits them. MACs are weighted by density: a masked model still executes the dense ones.

    Args:
        kind: Which quantity.
        value: Its value.

    Raises:
        TargetError: When the value is out of the kind's range.

    Example:
        >>> facts = ModelFacts({"w": 900}, parameters=1000)
        >>> Target("sparsity", 0.5).budget(facts).kept, Target("compression_ratio", 4).budget(facts).kept
        (450, 150)

    References:
        Davis Blalock, Jose Javier Gonzalez Ortiz, Jonathan Frankle, John Guttag, What is the State of Neural Network
        Pruning?, 2020 (the definitions of compression ratio and theoretical speed-up).
    """

    kind: Kind
    value: float

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise TargetError(f"unknown target {self.kind!r}; {nearest(str(self.kind), get_args(Kind))}")
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            raise TargetError(f"target {self.kind} must be a number, got {self.value!r}")
        ranges = {
            "sparsity": (0.0, 1.0),
            "kept_parameters": (0.0, math.inf),
            "compression_ratio": (1.0, math.inf),
            "macs": (0.0, 1.0),
            "channels": (0.0, 1.0),
        }
        low, high = ranges[self.kind]
        if not (math.isfinite(self.value) and low <= self.value <= high):
            raise TargetError(f"target {self.kind} must lie in [{low:g}, {high:g}], got {self.value!r}")

    def budget(self, facts: ModelFacts) -> Budget:
        """Return what may stay of the prunable weights.

        Args:
            facts: Sizes, and for ``macs`` the counted MACs.

        Returns:
            The budget, in weights or in MACs.

        Raises:
            TargetError: When even removing every prunable weight would not reach the target (the message gives the
                reachable maximum), or MACs were not counted.
        """
        if self.kind == "macs":
            return self._macs_budget(facts)
        if self.kind == "channels":
            raise TargetError(
                "a target in channels counts coupled units, which this pattern does not know: use "
                "Channel(coupled=True), secateur.make_plan or secateur.shrink_, or another target"
            )
        n, total = facts.prunable, facts.parameters
        removed = {
            "sparsity": lambda: round(self.value * n),
            "compression_ratio": lambda: total - math.floor(total / Fraction(self.value) * _ROUNDING),
            "kept_parameters": lambda: total - math.floor(self.value),
        }[self.kind]()
        if removed < 0:
            raise TargetError(f"target kept_parameters={self.value:g}: the model has only {total} parameters")
        if removed > n:
            raise unreachable(self, self.measure(facts, 0))
        return Budget(n - removed, n, dict.fromkeys(facts.numel, 1.0))

    def measure(self, facts: ModelFacts, kept: float) -> float:
        """Return this target's quantity when ``kept`` of the budget's currency stays.

        Args:
            facts: Sizes and MACs.
            kept: Prunable weights left, or for ``macs`` their density-weighted MACs.

        Returns:
            A value comparable with :attr:`value`.
        """
        if self.kind == "macs":
            dense = sum((facts.macs or {}).values()) + facts.other_macs
            return (kept + facts.other_macs) / dense
        left = facts.parameters - facts.prunable + kept
        if self.kind == "sparsity":
            return 1.0 - kept / facts.prunable
        if self.kind == "kept_parameters":
            return left
        return facts.parameters / left if left else math.inf

    def _macs_budget(self, facts: ModelFacts) -> Budget:
        if facts.macs is None:
            raise TargetError("a target in MACs needs example_inputs, to count them on one forward pass")
        total = sum(facts.macs.values())
        if not total:
            raise TargetError("a target in MACs: one forward pass multiplies by none of the prunable weights")
        # Whole MACs, and a fraction that was divided by them once gives them back.
        kept = math.floor(Fraction(self.value) * (total + facts.other_macs) * _ROUNDING) - facts.other_macs
        if kept < 0:
            raise unreachable(self, self.measure(facts, 0))
        cost = {name: facts.macs[name] / numel for name, numel in facts.numel.items()}
        return Budget(kept, total, cost, "macs")


def unreachable(target: Target, limit: float) -> TargetError:
    """Build the refusal of a target that cannot be met, naming how far one can go."""
    words = {
        "sparsity": "the highest sparsity",
        "compression_ratio": "the highest compression ratio",
        "kept_parameters": "the fewest parameters",
        "macs": "the smallest fraction of MACs",
        "channels": "the smallest fraction of channels",
    }[target.kind]
    # Rounded towards what is allowed: the number in the message can be asked for.
    rounding = ROUND_CEILING if target.kind in ("macs", "kept_parameters", "channels") else ROUND_FLOOR
    shown = f"{Context(prec=12, rounding=rounding).create_decimal(Decimal(limit)).normalize():f}"
    return TargetError(
        f"target {target.kind}={target.value:g} cannot be reached: {words} that these weights, filters and floors "
        f"allow is {shown}. Ask for less, prune more layers (include/exclude/types), or set allow_empty"
    )
