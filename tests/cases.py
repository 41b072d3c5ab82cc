"""One row per registered part: what to build it with, and what its laws must know. Family tests share this table.

Adding a part means adding a row here; ``tests/laws/test_laws.py`` fails until both sides name it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """A way to build a registered part.

    Attributes:
        name: Registered name.
        kwargs: Arguments of the factory.
        notes: What the laws must know of it, such as ``equivariant``.
    """

    name: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        arguments = ",".join(f"{key}={value}" for key, value in self.kwargs.items())
        return f"{self.name}({arguments})"


SCORES = (
    Case("random", {"seed": 0}, {"equivariant": False}),  # noise by position, whatever the element is
    Case("random", {"seed": 2**40}, {"equivariant": False}),
    Case("magnitude"),
    Case("magnitude", {"p": 2}),
    Case("weight_gradient"),
    Case("weight_gradient", {"sign": "signed"}),
    Case("weight_gradient", {"sign": "descent"}),
    Case("optimal_brain_surgeon", {}, {"equivariant": False}),  # it depends on the others of the block
    Case("optimal_brain_surgeon", {"order": "single", "block": 0}, {"equivariant": False}),
    Case("optimal_brain_surgeon", {"order": "single", "block": 5, "gradients": "output"}, {"equivariant": False}),
)

PATTERNS = (
    Case("unstructured"),
    Case("nm"),
    Case("nm", {"n": 1, "m": 4}),
    Case("nm", {"n": 3, "m": 4}),
    Case("nm", {"n": 4, "m": 8}),
    Case("nm", {"n": 1, "m": 1}),
    Case("block"),
    Case("block", {"rows": 1, "cols": 4, "reduce_by": "sum"}),
    Case("block", {"rows": 2, "cols": 3, "reduce_by": "max"}),
    Case("block", {"rows": 3, "cols": 2, "reduce_by": "l2"}),
    Case("block", {"rows": 100, "cols": 100}),  # larger than every layer
    Case("channel"),
    Case("channel", {"reduce_by": "sum"}),
    Case("channel", {"reduce_by": "max"}),
    Case("channel", {"reduce_by": "l2"}),
)

GROUP_SCORES = (
    Case("coupled"),
    Case("coupled", {"reduce_by": "sum", "over": "out"}),
    Case("coupled", {"reduce_by": "l2", "over": "in", "normalise": "mean"}),
    Case("coupled", {"reduce_by": "max", "normalise": "max"}),
    Case("coupled", {"over": "norm", "normalise": "l2"}),
    Case("norm_scale"),
    Case("geometric_median"),
    Case("taylor"),
    Case("taylor", {"form": "absolute"}),
    Case("taylor", {"form": "signed"}),
    Case("lamp"),
    Case("activation_taylor"),
    Case("activation_taylor", {"form": "square", "normalise": "mean"}),
    Case("activation_taylor", {"form": "signed", "normalise": "max"}),
    Case("activation_taylor", {"form": "descent", "normalise": "none"}),
    Case("activation"),
    Case("activation", {"statistic": "rms", "normalise": "l2"}),
    Case("activation", {"statistic": "deviation", "normalise": "mean"}),
    Case("activation", {"statistic": "nonzero"}),
    Case("sensitivity"),
    Case("sensitivity", {"outputs": "values", "centred": False, "per_mac": True}),
    Case("block_influence"),
)

PENALTIES = (
    Case("scale_l1"),
    Case("scale_l1", {"strength": 0.7, "proximal_step": True, "exclude": ("bn1",)}),
)

SOLVERS = (
    Case("optimal_brain_surgeon"),
    Case("optimal_brain_surgeon", {"block": 0, "damping": 0.1, "relative": False}),
    Case("optimal_brain_surgeon", {"block": 5, "gradients": "output"}),
)

UNIT_PATTERNS = (Case("expert"), Case("layer"))

ALLOCATIONS = (Case("layerwise"), Case("global"), Case("isomorphic"))

SCHEDULES = (
    Case("one_shot", {}, {"updates": 1, "last": 0}),
    Case("one_shot", {"at": 7, "unit": "steps"}, {"updates": 1, "last": 7}),
    Case("iterative", {"rounds": 1}, {"updates": 1, "last": 0}),
    Case("iterative", {"rounds": 5}, {"updates": 5, "last": 4}),
    Case("iterative", {"rounds": 3, "begin": 2, "every": 0.5, "unit": "epochs"}, {"updates": 3, "last": 3}),
    Case("linear", {"begin": 0, "end": 10}, {"updates": 11, "last": 10}),
    Case("linear", {"begin": 3, "end": 4, "every": 0.1, "unit": "epochs", "initial": 0.1}, {"updates": 11, "last": 4}),
    Case("exponential", {"begin": 5, "end": 25, "every": 5}, {"updates": 5, "last": 25}),
    Case("exponential", {"begin": 0, "end": 7, "unit": "rounds", "initial": 0.3}, {"updates": 8, "last": 7}),
    Case("cubic", {"begin": 100, "end": 1100, "every": 100}, {"updates": 11, "last": 1100}),
    Case("cubic", {"begin": 0, "end": 3, "unit": "epochs", "initial": 0.5}, {"updates": 4, "last": 3}),
)

CASES: dict[str, tuple[Case, ...]] = {
    "score": SCORES,
    "group score": GROUP_SCORES,
    "penalty": PENALTIES,
    "pattern": PATTERNS,
    "unit pattern": UNIT_PATTERNS,
    "solver": SOLVERS,
    "allocate": ALLOCATIONS,
    "schedule": SCHEDULES,
}
