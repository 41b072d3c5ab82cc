"""A network with everything that makes a run hard to repeat (dropout, batch norm), small enough to train in no time."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from secateur import Data


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(4 * 25, 16),
        nn.ReLU(),
        nn.Linear(16, 3),
    )


def data(n: int = 60) -> Data:
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(n, 1, 5, 5, generator=generator)
    labels = (images.mean((1, 2, 3)) * 8).round().long().clamp(-1, 1) + 1
    return Data(train=(images[: n * 3 // 4], labels[: n * 3 // 4]), test=(images[n * 3 // 4 :], labels[n * 3 // 4 :]))


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """A map-style data set whose augmentation draws from every global generator there is."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        shift = 0.1 * np.random.randn() + 0.1 * random.random() + 0.1 * float(torch.rand(()))
        return self.images[index] + shift, self.labels[index]


def noisy(n: int = 60) -> Data:
    plain = data(n)
    assert isinstance(plain.train, tuple)
    return Data(train=Noisy(*plain.train), test=plain.test)
