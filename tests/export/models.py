"""Small models of the kinds that exporters trip over, with inputs and masks."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from secateur.masks import apply_masks_


class Convolutional(nn.Module):
    """Grouped convolution, and batch normalisation with statistics of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.depth = nn.Conv2d(4, 4, 3, groups=4)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(16, 3)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.fc(self.drop(torch.relu(self.depth(x)).flatten(1)))


class TiedDict(nn.Module):
    """Tied weights, keyword inputs in another order than the signature, and a dict with more than tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.inner = nn.Linear(8, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, *, scale: Tensor, shift: Tensor, times: int = 1) -> dict[str, Any]:
        y = self.head(torch.relu(self.inner(self.embed(ids)))) * times * scale.unsqueeze(-1) + shift.unsqueeze(-1)
        return {"logits": y, "stats": (y.sum(-1), y.argmax(-1)), "none": None, "count": 3, "shift": shift}


@dataclasses.dataclass
class Answer:
    first: Tensor
    rest: list[Tensor]
    count: int = 3


class Structured(nn.Module):
    """Two inputs that a caller may give as one tensor, and a dataclass that PyTorch does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> Answer:
        return Answer(self.fc(x) - y, [x.sum(-1), y.amax(-1)])


class OneBatch(nn.Module):
    """Runs with three rows only."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).reshape(3, 2, 2)


class Branch(nn.Module):
    """A graph holds one branch: right for many rows, wrong for one."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.shape[0] > 1 else self.fc(x) * 2


class Peek(nn.Module):
    """Turns a value into a number: a graph cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if float(x.sum()) > 0 else self.fc(-x)


class Noise(nn.Module):
    """Never gives the same answer twice; the number ``size`` has no batch dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, size: Tensor) -> Tensor:
        return self.fc(x) + torch.rand_like(x) * size


def transformer() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def prune_half(model: nn.Module) -> dict[str, Tensor]:
    """Prune half of every matrix, and return the masks."""
    masks = {n: torch.rand(p.shape) > 0.5 for n, p in model.named_parameters() if p.dim() > 1}
    apply_masks_(model, masks)
    return masks
