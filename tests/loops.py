"""A small network and the plainest training step: what a user's own loop is made of."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from secateur.targets import Target

HALF = Target("sparsity", 0.5)


def mlp(seed: int = 0, sizes: tuple[int, ...] = (6, 10, 8, 3)) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def batch(inputs: int = 6, outputs: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(16, inputs, generator=generator), torch.randn(16, outputs, generator=generator)


def loss_fn(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    dtype = next(model.parameters()).dtype
    return nn.functional.mse_loss(model(data[0].to(dtype)), data[1].to(dtype))


def one_step(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    loss_fn(model, batch()).backward()
    optimizer.step()


def sgd(model: nn.Module) -> SGD:
    return SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01)


def leaks(model: nn.Module, masks: dict[str, Tensor]) -> int:
    known = dict(model.named_parameters(remove_duplicate=False))
    return sum(int(known[name][~mask.to(known[name].device)].count_nonzero()) for name, mask in masks.items())
