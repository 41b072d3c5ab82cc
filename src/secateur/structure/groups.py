"""Looking at a model's coupled groups before anything is pruned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from secateur.graph.blocks import find_stacks
from secateur.graph.coupling import Coupling
from secateur.graph.examples import Example
from secateur.graph.trace import trace
from secateur.graph.unsupported import refuse_unsupported
from secateur.graph.valueless import outside_fake_mode
from secateur.inputs import split_inputs
from secateur.structure.report import explain, members_of
from secateur.types import GroupReport


@dataclass(frozen=True)
class Groups:
    """What must be pruned together in a model, and what cannot be pruned.

    Attributes:
        groups: The coupled groups.
        fixed: Parameters with a dimension that no group reaches, and why.
        unknown: Operators without a rule, and the modules that call them.
        experts: Experts that routers choose from, for the pattern ``Expert``.
        layers: Stacks of residual blocks, for the pattern ``Layer``.
    """

    groups: tuple[GroupReport, ...]
    fixed: Mapping[str, str]
    unknown: Mapping[str, tuple[str, ...]]
    experts: tuple[GroupReport, ...] = ()
    layers: tuple[GroupReport, ...] = ()

    def explain(self, name: str) -> str:
        """Say which groups a layer takes part in, and what of it is fixed.

        Args:
            name: Name of a group, a module or a parameter.
        """
        lines = [explain((*self.groups, *self.experts, *self.layers), {}, name)]
        lines += [f"{n}: {why}" for n, why in self.fixed.items() if n == name or n.startswith(f"{name}.")]
        return "\n".join(line for line in lines if line) or f"{name}: no such group, module or parameter"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            **{
                kind: [{"name": g.name, "units": g.units, "members": list(g.members)} for g in groups]
                for kind, groups in (("groups", self.groups), ("experts", self.experts), ("layers", self.layers))
            },
            "fixed": dict(self.fixed),
            "unknown": {name: list(modules) for name, modules in self.unknown.items()},
        }


def find_groups(model: nn.Module, example_inputs: Any, *, exact: bool = False) -> Groups:
    """Record one forward and list what must be pruned together.

    Args:
        model: Any module whose forward runs; left as it was.
        example_inputs: A tensor, a tuple, a dict, or ``(tuple, dict)``.
        exact: Count dimensions that a normalisation runs over as fixed.

    Raises:
        GraphError: When the forward fails, or the model is wrapped or quantised.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
        >>> [(g.name, g.units, g.members) for g in find_groups(net, torch.randn(1, 8)).groups]
        [('0', 32, ('0.weight[0]', '0.bias[0]', '2.weight[1]'))]
    """
    refuse_unsupported(model)
    with outside_fake_mode():
        return _find(model, example_inputs, exact)


def _find(model: nn.Module, example_inputs: Any, exact: bool) -> Groups:
    example = Example(*split_inputs(example_inputs))
    recorded = trace(model, [example], exact=exact)
    coupling = Coupling(recorded)
    experts = _reports(Coupling(recorded, unit="expert")) if recorded.ledger.chosen else ()
    stacks, _ = find_stacks(model, example)
    layers = tuple(GroupReport(s.name, len(s.blocks), len(s.blocks), tuple(b.name for b in s.blocks)) for s in stacks)
    fixed = {}
    for leaf in coupling.trace.leaves:
        why = coupling.why_fixed(leaf.name)
        if leaf.kind == "parameter" and "fixed by" in why:
            lines = why.removeprefix(f"{leaf.name}: ").split("; ")
            fixed[leaf.name] = "; ".join(line for line in lines if "fixed by" in line)
    unknown = {name: tuple(sorted(modules)) for name, modules in coupling.trace.unknown.items()}
    return Groups(_reports(coupling), fixed, unknown, experts, layers)


def _reports(coupling: Coupling) -> tuple[GroupReport, ...]:
    return tuple(GroupReport(g.name, g.units, g.units, members_of(g)) for g in coupling.groups)
