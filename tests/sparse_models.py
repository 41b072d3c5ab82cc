"""Models that several tests of the sparse runtime compile, pruned so that every layer is worth packing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur import Method, Target, prune_
from secateur.allocate import Layerwise


def pruned(model: nn.Module, sparsity: float = 0.9) -> nn.Module:
    torch.manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.get_buffer("running_mean"))
            nn.init.uniform_(layer.get_buffer("running_var"), 0.5, 2.0)
            nn.init.uniform_(layer.weight, 0.5, 2.0)
            nn.init.uniform_(layer.bias)
    prune_(model, Method(target=Target("sparsity", sparsity), allocate=Layerwise()))
    return model.eval()


def answers(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with torch.inference_mode():
        return model(*args, **kwargs)


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class Bottleneck(nn.Module):
    """Two residual blocks of 1x1, 3x3 and 1x1 convolutions, and maxima, of which one reaches the kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.a1, self.a2, self.a3 = nn.Conv2d(32, 16, 1), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 32, 1)
        self.b1, self.b2, self.b3 = nn.Conv2d(32, 16, 1), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 32, 1)
        self.pool, self.end = nn.MaxPool2d(3, 2, padding=1), nn.Conv2d(32, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(x)
        x = F.relu(self.a3(F.relu(self.a2(F.relu(self.a1(x))))) + x)
        x = F.relu(self.b3(F.relu(self.b2(F.relu(self.b1(x))))) + x)
        out: Tensor = self.end(F.max_pool2d(x, 2))
        return out


class Inverted(nn.Module):
    """Expands, looks around in every channel alone, projects back; adds its input where that fits."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        hidden = 2 * inputs
        self.expand, self.bn1 = nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
        self.around = nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=hidden, bias=False)
        self.bn2, self.relu6 = nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)
        self.project, self.bn3 = nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu6(self.bn1(self.expand(x)))
        y = self.bn3(self.project(self.relu6(self.bn2(self.around(y)))))
        return x + y if self.adds else y


class Mobile(nn.Module):
    """As MobileNetV2, in small."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.one, self.two, self.three = Inverted(16, 16, 3), Inverted(16, 24, 5, 2), Inverted(24, 24, 3)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.three(self.two(self.one(F.relu6(self.bn(self.stem(x))))))
        out: Tensor = self.head(x.mean((2, 3)))
        return out
