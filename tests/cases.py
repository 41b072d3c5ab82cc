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
    Case("brute_force"),
    Case("brute_force", {"per": "unit", "limit": 50}),
    Case("optimal_brain_damage"),
    Case("optimal_brain_damage", {"per_sample": "vmap"}),
    Case("optimal_brain_damage", {"diagonal": "gauss_newton"}),
    Case("optimal_brain_damage", {"diagonal": "hutchinson", "samples": 2, "seed": 5}),
    Case("karnin"),
    Case("movement"),
    Case("snip"),
    Case("grasp"),
    Case("grasp", {"temperature": 1.0}),
    Case("synflow"),
    Case("lamp", {}, {"equivariant": False}),  # of equals, the lowest index goes first
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
    Case("activation_taylor", {"form": "signed", "normalise": "none", "average": "recent"}),
    Case("skeletonization"),
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
    Case("weight_decay"),
    Case("weight_decay", {"strength": 0.3, "proximal_step": True, "include": ("fc", "head.*")}),
    Case("l1"),
    Case("l1", {"strength": 0.7, "proximal_step": True, "exclude": ("conv",)}),
    Case("weight_elimination"),
    Case("weight_elimination", {"delta": 0.1, "every": 3, "scale": 0.3, "wanted": 0.2}),
    Case("weight_elimination", {"strength": 0.3, "scale": 2.0}),
    Case("group_lasso"),
    *(Case("group_lasso", {"strength": 0.1, "by": by}) for by in ("in", "kernel", "shape", "layer")),
    Case("group_lasso", {"strength": 0.3, "proximal_step": True}),
    Case("group_lasso", {"strength": 0.3, "by": "in", "proximal_step": True, "exclude": ("head",)}),
    Case("growing"),
    Case("growing", {"share": 0.7, "strength": 0.1, "step": 0.2, "every": 4, "ceiling": 0.5, "by": "in"}),
    Case("group_norm"),
    Case("group_norm", {"strength": 0.2, "alpha": 2.0, "every": 7, "by": "kernel", "include": ("conv.weight",)}),
    Case("chauvin"),
    Case("chauvin", {"strength": 0.5, "order": 0}),
    Case("chauvin", {"strength": 0.5, "order": 2, "include": ("relu*",)}),
)

PARAMETRISATIONS = (
    Case("l0"),
    Case("l0", {"group": "output", "strength": 1e-3, "l2": 0.1, "dropped": 0.2}),
    Case("l0", {"group": "input"}),
    Case("l0", {"group": "weight"}),
    Case("variational_dropout"),
    Case("variational_dropout", {"local": False, "warm_up": 10, "threshold": 2.0}),
    Case("soft_threshold"),
    Case("soft_threshold", {"start_threshold": -3.0, "decay": 0.0}),
    Case("movement"),
    Case("movement", {"sparsity": 0.0}),
    Case("soft_movement"),
    Case("soft_movement", {"strength": 0.1, "threshold": -0.5}),
    Case("sr_ste", {"n": 1, "m": 2}),
    Case("sr_ste", {"n": 2, "m": 4, "decay": 0.0}),
)

SOLVERS = (
    Case("optimal_brain_surgeon"),
    Case("optimal_brain_surgeon", {"block": 0, "damping": 0.1, "relative": False}),
    Case("optimal_brain_surgeon", {"block": 5, "gradients": "output", "per_sample": "loop"}),
)

UNIT_PATTERNS = (Case("expert"), Case("layer"))

# Densities for the problems of the laws and of the matrix: every weight needs one.
DENSITIES = {
    **{"a": 0.5, "b": 0.1, "c": 1.0, "fc1": 0.3, "fc2": 0.6, "head": 0.0, "one": 1.0, "x": 0.2, "y": 0.9, "z": 0.0},
    **{"w": 0.4, "p": 0.7, "q": 0.1, "0.weight": 0.5, "2.weight": 0.1, "4.weight": 1.0, "a.weight": 0.2},
    **{"b.weight": 0.05, "c.weight": 0.7, "head.weight": 1.0},
}

ALLOCATIONS = (
    Case("layerwise"),
    Case("global"),
    Case("isomorphic"),
    Case("per_round"),
    Case("per_round", {"rate": 0.4, "slower": ("[acfpwx2]*",), "factor": 0.25}),  # some of every problem's layers
    Case("uniform_plus"),
    Case("er"),
    Case("erk"),
    Case("proportions", {"densities": tuple(DENSITIES.items())}),
)

DYNAMICS = (
    Case("static"),
    Case("set", {"seed": 0}),
    Case("set", {"seed": 2**40, "fraction": 1.0, "every": 3, "end": 10, "unit": "steps"}),
    Case("rigl", {"end": 1000}),
    Case("rigl", {"end": 9, "every": 2, "begin": 3, "fraction": 1.0}),
    Case("rigl", {"end": 4, "every": 1, "fraction": 0.0, "unit": "epochs"}),
    Case("granet", {"end": 10}),
    Case("granet", {"end": 20, "begin": 5, "every": 5, "fraction": 1.0, "unit": "steps"}),
    Case("ac_dc"),
    Case("ac_dc", {"total": 4, "warm_up": 1, "sparse": 1, "dense": 7, "last_dense": 1, "last_sparse": 1}),
    Case("soft_filter", {"end": 4}),
    Case("soft_filter", {"end": 7, "every": 3, "unit": "steps"}),
)

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

ABLATIONS = (
    Case("shuffle"),
    Case("shuffle", {"seed": 7}),
    Case("random_masks"),
    Case("random_masks", {"seed": 7}),
    Case("reinitialise", {"seed": 3}),
    Case("smaller_dense", {"by": "macs"}, {"trains_apart": True}),
)

DISTILLATIONS = (
    Case("soft_targets"),
    Case("soft_targets", {"weight": 0.9, "temperature": 4.0}),
    Case("outputs", {"weight": 0.1}),
)

CASES: dict[str, tuple[Case, ...]] = {
    "ablation": ABLATIONS,
    "distill": DISTILLATIONS,
    "score": SCORES,
    "group score": GROUP_SCORES,
    "penalty": PENALTIES,
    "parametrisation": PARAMETRISATIONS,
    "dynamics": DYNAMICS,
    "pattern": PATTERNS,
    "unit pattern": UNIT_PATTERNS,
    "solver": SOLVERS,
    "allocate": ALLOCATIONS,
    "schedule": SCHEDULES,
}
