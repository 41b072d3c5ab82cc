"""Made-up Fisher matrices, of the real kind: what the statistic itself returns on made-up gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.stats.inverse_fisher import FisherInverse, InverseFisher
from secateur.types import Source, Tensors


class _Products(nn.Module):
    """One output per sample: its gradient by each weight is the input of that name."""

    def __init__(self, weights: Tensors) -> None:
        super().__init__()
        for name, weight in weights.items():
            *path, last = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(last, nn.Parameter(torch.zeros(weight.shape, dtype=torch.float64)))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return torch.stack([(self._weight(name) * x).flatten(1).sum(1) for name, x in batch.items()]).sum(0)

    def _weight(self, name: str) -> Tensor:
        path, _, last = name.rpartition(".")
        weight: Tensor = getattr(self.get_submodule(path), last)  # not a Parameter where torch.func puts others in
        return weight


def synthetic_fisher(statistic: InverseFisher, weights: Tensors, *, masks: Tensors | None = None) -> FisherInverse:
    """Collect a Fisher matrix from 40 random gradients, which depend on the weights' names and shapes alone.

    Args:
        statistic: With its options.
        weights: Of any floating type.
        masks: What had gone before.
    """
    names = sorted(weights)
    model = _Products({name: weights[name] for name in names})
    generator = torch.Generator().manual_seed(0)
    batch = {n: torch.randn(40, *weights[n].shape, generator=generator, dtype=torch.float64) for n in names}

    def run(net: nn.Module, x: dict[str, Tensor]) -> Tensor:
        out: Tensor = net(x)
        return out if statistic.gradients == "output" else out.mean()

    parameters = {name: model.get_parameter(name) for name in names}
    return statistic.collect(Source(model, parameters, run, lambda: [batch], masks=masks or {}))
