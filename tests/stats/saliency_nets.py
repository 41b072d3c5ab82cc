"""Small float64 networks and losses that the tests of statistics share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from secateur.types import Source


def mlp(*, activation: type[nn.Module] = nn.Tanh, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, 3)).double()


def samples(count: int = 6, batches: int = 2, features: int = 4, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(count + i, features, dtype=torch.float64, generator=g),
            torch.randint(0, 3, (count + i,), generator=g),
        )
        for i in range(batches)
    ]


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def source_of(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = cross_entropy,
    data: list[Any] | None = None,
    *,
    example_inputs: Any = None,
    weights_only: bool = False,
) -> Source:
    parameters = {n: p for n, p in model.named_parameters() if p.dim() > 1 or not weights_only}
    given = samples() if data is None else data
    return Source(model, parameters, loss_fn, lambda: given, example_inputs)


def full_hessian(model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], data: list[Any]) -> Tensor:
    """The Hessian of the mean loss over batches, by autograd over one flat vector."""
    names, shapes = zip(*((n, p.shape) for n, p in model.named_parameters()), strict=True)
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def loss(vector: Tensor) -> Tensor:
        pieces = vector.split([s.numel() for s in shapes])
        state = {n: piece.view(s) for n, s, piece in zip(names, shapes, pieces, strict=True)}

        class Swapped(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                out: Tensor = torch.func.functional_call(model, state, (x,))
                return out

        return torch.stack([loss_fn(Swapped(), batch) for batch in data]).mean()

    return torch.autograd.functional.hessian(loss, flat)


def flat(values: dict[str, Tensor]) -> Tensor:
    return torch.cat([v.reshape(-1) for v in values.values()])
