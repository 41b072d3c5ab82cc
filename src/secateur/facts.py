"""A model in the currencies of the targets: parameters and multiply-accumulates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from secateur.prunable import Found
from secateur.targets import ModelFacts


def model_facts(model: nn.Module, found: Found, example_inputs: Any) -> tuple[Found, ModelFacts]:
    """Count what targets are measured in.

    Where MACs are counted, weights that multiply nothing are left out: removing them would bring no such target nearer.

    Args:
        model: The model.
        found: Its prunable weights.
        example_inputs: What one forward pass takes; without it MACs are not counted.

    Returns:
        The weights that take part, and the facts.
    """
    numel = {name: w.numel for name, w in found.weights.items()}
    parameters = sum(p.numel() for p in model.parameters())
    if example_inputs is None:
        return found, ModelFacts(numel, parameters)
    from secateur.inputs import split_inputs
    from secateur.metrics import count_macs  # only where it is needed: importing the pruner must stay quick

    count = count_macs(model, *split_inputs(example_inputs))
    macs = {name: count.per_weight[name].macs if name in count.per_weight else 0 for name in numel}
    other = count.dense - sum(macs.values())
    idle = [name for name in numel if macs[name] == 0]
    if idle and len(idle) < len(numel):
        weights = {name: w for name, w in found.weights.items() if name not in idle}
        skipped = dict(found.skipped) | dict.fromkeys(idle, "multiplies nothing in a forward pass")
        found = replace(found, weights=weights, skipped=skipped)
        numel, macs = ({name: each[name] for name in weights} for each in (numel, macs))
    return found, ModelFacts(numel, parameters, macs, other)
