"""Small networks for structural pruning: ``PLAIN`` ones must be pruned exactly, ``HARD`` ones never changed.

``HARD`` networks may be pruned exactly, left alone or refused with a reason, as each case's ``expect`` says. Most have
an ordinary hidden layer beside the hard one, so that a tool can prune the first, leave the second, and be right.

``build`` draws from the global generator and returns the network in evaluation mode; ``inputs`` draws from its own.
Outputs are small and of fixed size, so that every hidden width may go. Networks in ``UNSTEADY`` answer differently from
call to call: compare copies, from the same random seed.
"""

# mypy: no-warn-return-any, allow-untyped-calls
# (calling a module gives Any; some of PyTorch's functions have no types)

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

PRUNED = frozenset({"pruned"})
NOT_REFUSED = frozenset({"pruned", "frozen"})
NOT_PRUNED = frozenset({"frozen", "refused"})
ANY = frozenset({"pruned", "frozen", "refused"})


@dataclass(frozen=True)
class Case:
    """A network, its inputs, and what may become of it.

    Attributes:
        name: What the network is about; unique.
        build: Makes the network, in evaluation mode, from the global random generator.
        inputs: Makes the positional inputs from a seed.
        expect: Allowed outcomes, of "pruned", "frozen" and "refused".
        why: What makes it hard.
        kwargs: Keyword inputs.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Any, ...]]
    expect: frozenset[str]
    why: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def scatter(model: nn.Module) -> nn.Module:
    """Make every scale, shift and running statistic its own, so that no channel can stand in for another.

    Weights of layers are drawn anew, large enough that what a hidden channel does is seen at the outputs.
    """
    with torch.no_grad():
        for module in model.modules():
            weight = dict(module.named_parameters(recurse=False)).get("weight")
            if weight is not None and isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
                nn.init.kaiming_normal_(weight)
        for parameter in model.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(torch.rand_like(parameter) - 0.5)
        for module in model.modules():
            mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
            if isinstance(mean, Tensor) and isinstance(var, Tensor):
                mean.normal_(std=0.3)
                var.uniform_(0.5, 2)
    return model


# --- inputs ----------------------------------------------------------------------------------------------------------


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows(seed: int) -> tuple[Any, ...]:
    return (normal(seed, 3, 12),)


def images(seed: int) -> tuple[Any, ...]:
    return (normal(seed, 2, 3, 8, 8),)


def signals(seed: int) -> tuple[Any, ...]:
    return (normal(seed, 2, 3, 12),)


def volumes(seed: int) -> tuple[Any, ...]:
    return (normal(seed, 2, 2, 4, 4, 4),)


def vectors(seed: int) -> tuple[Any, ...]:
    return (normal(seed, 2, 8, 12),)


def two_sequences(seed: int) -> tuple[Any, ...]:
    return normal(seed, 2, 8, 12), normal(seed + 1000, 2, 6, 12)


def ids(seed: int) -> tuple[Any, ...]:
    return (torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(seed)),)


def signed_rows(seed: int) -> tuple[Any, ...]:
    """Positive on average for odd seeds, negative for even ones: networks that branch on it take both branches."""
    return (normal(seed, 3, 12) + (2 if seed % 2 else -2),)


def batches_of_two_sizes(seed: int) -> tuple[Any, ...]:
    """Three rows for even seeds, two for odd ones."""
    return (normal(seed, 2 if seed % 2 else 3, 12),)


def row_dict(seed: int) -> tuple[Any, ...]:
    return ({"x": normal(seed, 3, 12), "gate": normal(seed + 1000, 3, 12)},)


def nothing(seed: int) -> tuple[Any, ...]:
    return ()


# --- frames: an ordinary hidden layer, then a hidden layer that a subclass mixes -------------------------------------


class Rows(nn.Module):
    """12 numbers to 5, by way of 24 ordinary neurons and 16 that ``mix`` treats in its own way."""

    after = 16

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 24)
        self.second = nn.Linear(24, 16)
        self.last = nn.Linear(self.after, 5)

    def mix(self, h: Tensor) -> Tensor:
        return h

    def forward(self, x: Tensor) -> Any:
        return self.last(self.mix(self.second(torch.relu(self.first(x)))))


class Maps(nn.Module):
    """An image to 5 numbers, by way of 16 ordinary channels and 24 that ``mix`` treats in its own way."""

    after = 24

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 24, 3, padding=1)
        self.last = nn.Linear(self.after, 5)

    def mix(self, h: Tensor) -> Tensor:
        return h

    def forward(self, x: Tensor) -> Any:
        h = self.mix(self.second(torch.relu(self.first(x))))
        return self.last(torch.relu(h).mean((2, 3)) if h.dim() == 4 else h)


class Tokens(nn.Module):
    """Eight vectors of 12 to 5 numbers, by way of a residual stream of 32 that ``attend`` reads and adds to."""

    heads: int
    dim: int
    scale: float

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(12, 32)
        self.heads, self.dim, self.scale = 4, 8, 8**-0.5
        self.head = nn.Linear(32, 5)

    def attend(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Any:
        h = self.inp(x)
        return self.head((h + self.attend(h)).mean(1))


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """Attention of (batch, heads, tokens, dim) tensors, spelled out."""
    scores = q @ k.transpose(-2, -1) * scale
    return (scores if bias is None else scores + bias).softmax(-1) @ v


# --- plain: linear and convolution -----------------------------------------------------------------------------------


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 5))


def linear_batch_norm() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 32, bias=False),
        nn.BatchNorm1d(32),
        nn.PReLU(32),
        nn.Linear(32, 16),
        nn.BatchNorm1d(16, affine=False),
        nn.ELU(inplace=True),
        nn.Dropout(0.3),
        nn.Linear(16, 5),
    )


def conv_chain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 24, 3),
        nn.BatchNorm2d(24),
        nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 5),
    )


def conv_flatten() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(16 * 9, 32),
        nn.Tanh(),
        nn.Linear(32, 5),
    )


class ViewFlatten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.fc = nn.Linear(16 * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(F.leaky_relu(self.conv(x)), 2)
        return self.fc(h.view(h.size(0), -1))


class Residual(nn.Module):
    """An identity block and a projected one, as in ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.a1, self.a2 = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 16, 3, padding=1)
        self.an1, self.an2 = nn.BatchNorm2d(24), nn.BatchNorm2d(16)
        self.b1, self.b2 = nn.Conv2d(16, 32, 3, 2, 1), nn.Conv2d(32, 32, 3, padding=1)
        self.short, self.short_norm = nn.Conv2d(16, 32, 1, 2), nn.BatchNorm2d(32)
        self.fc = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.an2(self.a2(F.relu(self.an1(self.a1(x))))) + x)
        y = self.b2(F.relu(self.b1(x)))
        y += self.short_norm(self.short(x))
        return self.fc(F.relu(y).mean((2, 3)))


class Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 24, 3, padding=1)
        self.norm = nn.BatchNorm2d(40)
        self.join = nn.Conv2d(40, 16, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(torch.cat([self.a(x), self.b(x)], 1)))
        return self.fc(torch.relu(self.join(h)).mean((2, 3)))


class Dense(nn.Module):
    """DenseNet: each layer reads all that came before, through a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16 + 16 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(16 + 16 * i, 16, 3, padding=1) for i in range(3))
        self.norm = nn.BatchNorm2d(64)
        self.fc = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(torch.relu(norm(torch.cat(features, 1)))))
        return self.fc(torch.relu(self.norm(torch.cat(features, 1))).mean((2, 3)))


class CatSelf(Rows):
    after = 32

    def mix(self, h: Tensor) -> Tensor:
        h = torch.relu(h)
        return torch.cat([h, h], 1)


class SplitInTwo(nn.Module):
    """A split whose size is read off the tensor; halves go to different layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.a, self.b = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(16, 24, 1)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.stem(x))
        left, right = h.split(h.shape[1] // 2, 1)
        return self.fc(torch.relu(self.a(left) + self.b(right)).mean((2, 3)))


class ChunkGate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(12, 24), nn.Linear(24, 32), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.fc2(torch.relu(self.fc1(x))).chunk(2, -1)
        return self.fc3(value * gate.sigmoid())


class Unbind(nn.Module):
    """One layer makes three hidden vectors, unbound along a dimension of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 48)
        self.a, self.b, self.c = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(16, 24)
        self.last = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        p, q, r = torch.relu(self.fc(x)).view(len(x), 3, -1).unbind(1)
        return self.last(torch.relu(self.a(p) * self.b(q) + self.c(r)))


class Depthwise(nn.Module):
    """MobileNet: expand, filter each channel by itself (``multiplier`` times), project."""

    def __init__(self, multiplier: int) -> None:
        super().__init__()
        self.expand, self.norm1 = nn.Conv2d(3, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.depth, self.norm2 = (
            nn.Conv2d(24, 24 * multiplier, 3, padding=1, groups=24),
            nn.BatchNorm2d(24 * multiplier),
        )
        self.project = nn.Conv2d(24 * multiplier, 16, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.norm2(self.depth(F.relu6(self.norm1(self.expand(x))))))
        return self.fc(self.project(x).mean((2, 3)))


class OneFilter(nn.Module):
    """A convolution with one filter and one group, which ``groups == out_channels`` takes for depthwise."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.where = nn.Conv2d(16, 1, 3, padding=1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.stem(x))
        return self.fc((h * self.where(h).sigmoid()).mean((2, 3)))


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=4),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 16, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of groups, as ShuffleNet does."""
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


class ShuffleV1(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.squeeze, self.norm = nn.Conv2d(32, 16, 1, groups=4), nn.BatchNorm2d(16)
        self.depth = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.expand = nn.Conv2d(16, 32, 1, groups=4)
        self.fc = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = self.depth(shuffle(torch.relu(self.norm(self.squeeze(x))), 4))
        return self.fc(torch.relu(self.expand(y) + x).mean((2, 3)))


class ShuffleV2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.a = nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1))
        self.b = nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1))
        self.last = nn.Conv2d(32, 24, 1)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for branch in (self.a, self.b):
            keep, work = x.chunk(2, 1)
            x = shuffle(torch.cat([keep, branch(work)], 1), 2)
        return self.fc(torch.relu(self.last(x)).mean((2, 3)))


def transposed(groups: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 16, 2, 2, groups=groups),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 5, 1),
        nn.AdaptiveAvgPool2d(2),
    )


def conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 16, 3, padding=2, dilation=2),
        nn.BatchNorm1d(16),
        nn.SiLU(),
        nn.AvgPool1d(2),
        nn.Conv1d(16, 24, 3),
        nn.ReLU(),
        nn.AdaptiveMaxPool1d(1),
        nn.Flatten(),
        nn.Linear(24, 5),
    )


def conv3d() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 16, 3, padding=1),
        nn.BatchNorm3d(16),
        nn.ReLU(),
        nn.Conv3d(16, 16, (1, 3, 3)),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(16 * 16, 5),
    )


class SamePad(nn.Conv2d):
    """Pads as TensorFlow does, from its own attributes."""

    def forward(self, input: Tensor) -> Tensor:
        pad: list[int] = []
        for size, kernel, stride in zip(
            reversed(input.shape[2:]), reversed(self.kernel_size), reversed(self.stride), strict=True
        ):
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            pad += [total // 2, total - total // 2]
        return F.conv2d(F.pad(input, pad), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Scaled(nn.Linear):
    """A linear layer with a learnt gain, StyleGAN's way."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(a, b)
        self.gain = nn.Parameter(torch.ones(b))

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * 0.5, self.bias) * self.gain


def subclasses() -> nn.Module:
    return nn.Sequential(
        SamePad(3, 16, 3, stride=2),
        nn.ReLU(),
        SamePad(16, 16, 3, groups=16),
        nn.ReLU(),
        SamePad(16, 24, 2, stride=2),
        nn.Flatten(),
        Scaled(24 * 4, 16),
        nn.ReLU(),
        Scaled(16, 5),
    )


class Conv1D(nn.Module):
    """GPT-2's linear layer: its weight is (in, out)."""

    def __init__(self, nx: int, nf: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.2)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(shape)


def input_first() -> nn.Module:
    return nn.Sequential(Conv1D(12, 32), nn.GELU(), Conv1D(32, 16), nn.GELU(), Conv1D(16, 5))


class Shared(Rows):
    """One layer called twice: what it gives is what it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(16, 16)

    def mix(self, h: Tensor) -> Tensor:
        return torch.relu(self.again(torch.relu(self.again(torch.relu(h)))))


class SqueezeExcite(Maps):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(24, 16, 1), nn.Conv2d(16, 24, 1)

    def mix(self, h: Tensor) -> Tensor:
        return h * self.up(torch.relu(self.down(h.mean((2, 3), keepdim=True)))).sigmoid()


class PixelShuffles(nn.Module):
    """Sub-pixel upsampling in the middle: four channels go or stay together."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 64, 3, padding=1), nn.Conv2d(16, 5, 1)
        self.up = nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.up(self.b(torch.relu(self.a(x)))))).mean((2, 3))


class PixelUnshuffles(nn.Module):
    """Space to depth: one channel becomes four."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.down, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.PixelUnshuffle(2), nn.Conv2d(64, 24, 1)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.b(self.down(torch.relu(self.a(x))))).mean((2, 3)))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc1, self.enc2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3, padding=1)
        self.bottom, self.up = nn.Conv2d(24, 32, 3, padding=1), nn.ConvTranspose2d(32, 24, 2, 2)
        self.dec2, self.dec1 = nn.Conv2d(48, 16, 3, padding=1), nn.Conv2d(32, 16, 3, padding=1)
        self.out = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.enc1(x))
        b = torch.relu(self.enc2(F.max_pool2d(a, 2)))
        c = torch.relu(self.bottom(F.max_pool2d(b, 2)))
        d = torch.relu(self.dec2(torch.cat([self.up(c), b], 1)))
        up = F.interpolate(d, scale_factor=2.0, mode="bilinear", align_corners=False)
        return self.out(torch.relu(self.dec1(torch.cat([up, a], 1))))


# --- plain: norms and bare parameters --------------------------------------------------------------------------------


def group_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.GroupNorm(8, 32),
        nn.ReLU(),
        nn.Conv2d(32, 16, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 36, 5),
    )


def instance_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.InstanceNorm2d(16, affine=True),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3),
        nn.InstanceNorm2d(24, affine=True, track_running_stats=True),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24 * 36, 5),
    )


class NormBlock(nn.Module):
    """A pre-norm feed-forward block: the norm fixes the width of the stream, and leaves the hidden layer free."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.inp, self.norm = nn.Linear(12, 16), norm(16)
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)
        self.final, self.head = norm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        x = x + self.fc2(F.gelu(self.fc1(self.norm(x))))
        return self.head(self.final(x))


class LayerScale(nn.Module):
    """Bare parameters on the channels: one broadcast from (C, 1, 1), one from (C,), one from (1, C, 1, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, 5)
        self.gamma = nn.Parameter(torch.ones(16, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, 16, 1, 1))
        self.shift = nn.Parameter(torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.gamma * self.body(x) + self.beta
        return self.fc(x.mean((2, 3)) + self.shift)


class Containers(nn.Module):
    """Weights in a ParameterList, norms in a ParameterDict, no layer in sight."""

    def __init__(self) -> None:
        super().__init__()
        widths = (12, 32, 16, 5)
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(b, a) * 0.3) for a, b in pairwise(widths))
        self.extras = nn.ParameterDict({f"shift{i}": nn.Parameter(torch.zeros(w)) for i, w in enumerate(widths[1:])})

    def forward(self, x: Tensor) -> Tensor:
        for i, weight in enumerate(self.weights):
            x = F.linear(x if i == 0 else F.silu(x), weight) + self.extras[f"shift{i}"]
        return x


def weight_normed(how: Callable[[nn.Module], nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(
            how(nn.Conv2d(3, 16, 3, padding=1)),
            nn.ReLU(),
            how(nn.Conv2d(16, 24, 3)),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            how(nn.Linear(24, 5)),
        )


def old_weight_norm(layer: nn.Module) -> nn.Module:
    return nn.utils.weight_norm(layer)


def new_weight_norm(layer: nn.Module) -> nn.Module:
    return parametrizations.weight_norm(layer)


class Standardised(nn.Conv2d):
    """Weight standardisation: each filter has mean 0 and deviation 1, so inputs cannot go and outputs can."""

    def forward(self, input: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        std = self.weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(input, (self.weight - mean) / (std + 1e-5), self.bias)


def standardised() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        Standardised(16, 24, 3),
        nn.ReLU(),
        nn.Conv2d(24, 16, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


# --- plain: sequences ------------------------------------------------------------------------------------------------


class TiedEmbedding(nn.Module):
    """A language model that embeds and reads out with one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)
        self.lm_head = nn.Linear(16, 11, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        return self.lm_head(h + self.fc2(torch.relu(self.fc1(h))))


class SelfAttention(nn.Module):
    """``nn.MultiheadAttention`` between ordinary layers."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.inp = nn.Linear(12, 32)
        self.mha = nn.MultiheadAttention(32, 4, batch_first=batch_first)
        self.fc1, self.fc2 = nn.Linear(32, 48), nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        x = x + self.mha(x, x, x, need_weights=False)[0]
        return self.fc2(torch.relu(self.fc1(x))).sum(1 if self.mha.batch_first else 0)


class CrossAttention(nn.Module):
    """Keys and values of widths other than the queries', and the averaged weights returned as well."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.query, self.key, self.value = nn.Linear(12, 32), nn.Linear(12, 16), nn.Linear(12, 24)
        self.mha = nn.MultiheadAttention(32, 4, kdim=16, vdim=24, batch_first=batch_first)
        self.fc1, self.fc2 = nn.Linear(32, 48), nn.Linear(48, 5)

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        if not self.batch_first:
            x, context = x.transpose(0, 1), context.transpose(0, 1)
        y, weights = self.mha(self.query(x), self.key(context), self.value(context))
        return self.fc2(torch.relu(self.fc1(y))), weights


class Encoder(nn.Module):
    def __init__(self, norm_first: bool, batch_first: bool = True) -> None:
        super().__init__()
        self.inp = nn.Linear(12, 32)
        self.layer = nn.TransformerEncoderLayer(
            32, 4, 48, 0.1, "gelu" if norm_first else "relu", norm_first=norm_first, batch_first=batch_first
        )
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.inp(x)))


class Seq2Seq(nn.Module):
    """Encoder and decoder layers of PyTorch, the decoder with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Linear(12, 16), nn.Linear(12, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16), enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        target = self.target(y)
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=target.dtype)
        return self.head(self.decoder(target, self.encoder(self.source(x)), tgt_mask=mask))


class FusedQKV(Tokens):
    """One matrix for queries, keys and values, taken apart as in ViT."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)

    def attend(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(attention(q, k, v, self.scale).transpose(1, 2).flatten(2))


class SeparateQKV(Tokens):
    """Three matrices; ``shared`` heads of keys and values, each for several queries."""

    def __init__(self, shared: int = 4) -> None:
        super().__init__()
        self.shared = shared
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 8 * shared), nn.Linear(32, 8 * shared)
        self.proj = nn.Linear(32, 32, bias=False)

    def heads_of(self, x: Tensor, heads: int) -> Tensor:
        return x.view(*x.shape[:2], heads, self.dim).transpose(1, 2)

    def position(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q, k

    def attend(self, x: Tensor) -> Tensor:
        q, k = self.position(self.heads_of(self.q(x), self.heads), self.heads_of(self.k(x), self.shared))
        v = self.heads_of(self.v(x), self.shared)
        if 1 < self.shared < self.heads:
            k, v = (t.repeat_interleave(self.heads // self.shared, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.proj(y.transpose(1, 2).flatten(2))


class Rotary(SeparateQKV):
    """Rotary positions: the two halves of a head turn together, by angles held in a buffer."""

    cos: Tensor
    sin: Tensor

    def __init__(self) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(8.0), 100.0 ** -(torch.arange(4.0) / 4)).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def turn(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * self.cos + torch.cat([-b, a], -1) * self.sin

    def position(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.turn(q), self.turn(k)


class RelativeBias(FusedQKV):
    """Swin: a learnt table of biases, one column per head, looked up by distance."""

    index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(15, 4))
        self.register_buffer("index", torch.arange(8)[:, None] - torch.arange(8)[None] + 7)

    def attend(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1)
        return self.proj(attention(q, k, v, self.scale, bias[None]).transpose(1, 2).flatten(2))


class EinsumAttention(Tokens):
    """Weights of three dimensions, as JAX would write them."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv = (nn.Parameter(torch.randn(32, 4, 8) * 0.2) for _ in range(3))
        self.wo = nn.Parameter(torch.randn(4, 8, 32) * 0.2)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bnc,chd->bnhd", x, w) for w in (self.wq, self.wk, self.wv))
        weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) * self.scale).softmax(-1)
        return torch.einsum("bhnm,bmhd,hdc->bnc", weights, v, self.wo)


class Gated(nn.Module):
    """SwiGLU or GEGLU: two matrices of the same rows."""

    def __init__(self, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate = gate
        self.inp, self.norm = nn.Linear(12, 16), nn.RMSNorm(16)
        self.w1, self.w2, self.w3 = nn.Linear(16, 32, bias=False), nn.Linear(32, 16, bias=False), nn.Linear(16, 32)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        n = self.norm(x)
        return self.head(x + self.w2(self.gate(self.w1(n)) * self.w3(n)))


class Glu(Rows):
    after = 8

    def mix(self, h: Tensor) -> Tensor:
        return F.glu(h, 1)


class Recurrent(nn.Module):
    """A recurrent layer between linear ones."""

    def __init__(self, kind: type[nn.RNNBase], layers: int = 1, bidirectional: bool = False) -> None:
        super().__init__()
        self.inp = nn.Linear(12, 16)
        rnn: Callable[..., nn.Module] = kind
        self.rnn = rnn(16, 24, num_layers=layers, bidirectional=bidirectional, batch_first=True)
        self.head = nn.Linear(48 if bidirectional else 24, 5)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(torch.relu(self.inp(x)))
        return self.head(y.mean(1))


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.cell, self.head = nn.Linear(12, 16), nn.LSTMCell(16, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), self.cell.hidden_size)
        for step in self.inp(x).unbind(1):
            h, c = self.cell(step, (h, c))
        return self.head(h)


class Experts(nn.Module):
    """A mixture of four experts, each weighted by a softmax over experts (not over neurons)."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.router = nn.Linear(12, 16), nn.Linear(16, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in range(4))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        weights = self.router(x).softmax(-1)
        y = torch.stack([expert(x) for expert in self.experts], -1)
        return self.head((y * weights.unsqueeze(-2)).sum(-1))


class ConvNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 2, 2)
        self.depth = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.norm, self.up, self.down = nn.LayerNorm(16, eps=1e-6), nn.Linear(16, 64), nn.Linear(64, 16)
        self.gamma = nn.Parameter(torch.ones(16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depth(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(F.gelu(self.up(y)))
        return self.head((x + y.permute(0, 3, 1, 2)).mean((-2, -1)))


class ViT(nn.Module):
    """Patches, a class token, positions, one pre-norm block."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, 32))
        self.position = nn.Parameter(torch.randn(1, 5, 32))
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.block = FusedQKV()
        self.fc1, self.fc2 = nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, 5)
        del self.block.inp, self.block.head  # only its attention is used

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.position
        x = x + self.block.attend(self.norm1(x))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(x[:, 0])


# --- plain: inputs and outputs of every form -------------------------------------------------------------------------


@dataclass
class Answer:
    logits: Tensor
    extras: list[Tensor]
    loss: Tensor | None = None


class DictToDataclass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(12, 32), nn.Linear(12, 32), nn.Linear(32, 5), nn.Linear(32, 2)

    def forward(self, batch: dict[str, Tensor]) -> Answer:
        h = torch.relu(self.a(batch["x"])) * self.b(batch["gate"]).sigmoid()
        return Answer(self.c(h), [self.d(h)])


class ManyOutputs(Rows):
    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.first(x))
        y = self.last(self.second(h))
        return {"logits": y, "both": (y.softmax(-1), h.sum(1)), "none": None, "name": "rows"}


class KeywordOnly(Rows):
    def forward(self, x: Tensor, *, scale: Tensor, shift: Tensor, times: int = 1) -> Any:  # type: ignore[override]
        return super().forward(x * scale) * times + shift


class OnlyKeywords(Rows):
    def forward(self, *, pixel_values: Tensor, return_dict: bool = True) -> Any:  # type: ignore[override]
        y = super().forward(pixel_values)
        return {"logits": y} if return_dict else (y,)


# --- hard: order of the channels -------------------------------------------------------------------------------------


class CumSum(Rows):
    def mix(self, h: Tensor) -> Tensor:
        return h.cumsum(1)


class Difference(Rows):
    after = 15

    def mix(self, h: Tensor) -> Tensor:
        return h.diff(dim=1)


class Roll(Rows):
    def mix(self, h: Tensor) -> Tensor:
        return h.roll(3, 1)


class Flip(Rows):
    def mix(self, h: Tensor) -> Tensor:
        return h.flip(1)


class FlipAdd(Rows):
    def mix(self, h: Tensor) -> Tensor:
        return h + h.flip(1)


class Sort(Rows):
    def mix(self, h: Tensor) -> Tensor:
        return h.sort(1).values


class TopK(Rows):
    after = 4

    def mix(self, h: Tensor) -> Tensor:
        return h.topk(4, 1).values


class KeepLargest(Rows):
    """k winners take all, ``k`` a share of the width."""

    def mix(self, h: Tensor) -> Tensor:
        values, where = h.abs().topk(h.shape[1] // 4, 1)
        return torch.zeros_like(h).scatter(1, where, values)


class ArgMax(Rows):
    after = 1

    def mix(self, h: Tensor) -> Tensor:
        return h.argmax(1, keepdim=True).to(h.dtype) / 8


class Winner(Rows):
    """The code of the winning channel chooses a row of a table as wide as the channels are many."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Embedding(16, 16)

    def mix(self, h: Tensor) -> Tensor:
        return self.codes(h.argmax(1)) * h.amax(1, keepdim=True)


class Softmax(Rows):
    def mix(self, h: Tensor) -> Tensor:
        return h.softmax(1)


class FixedSlice(Rows):
    after = 7

    def mix(self, h: Tensor) -> Tensor:
        return h[:, :7]


class EverySecond(Rows):
    after = 8

    def mix(self, h: Tensor) -> Tensor:
        return h[:, ::2]


class LastChannel(Rows):
    def mix(self, h: Tensor) -> Tensor:
        return h * h[:, -1:]


class SplitSizes(Rows):
    """Sizes written into the code."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 16), nn.Linear(12, 16)

    def mix(self, h: Tensor) -> Tensor:
        few, many = h.split([4, 12], 1)
        return self.a(few) * self.b(many)


class SplitAttributes(Rows):
    """Sizes kept in a list on the module."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = [4, 12]
        self.a, self.b = nn.Linear(4, 16), nn.Linear(12, 16)

    def mix(self, h: Tensor) -> Tensor:
        few, many = h.split(self.sizes, 1)
        return self.a(few) * self.b(many)


class IndexSelect(Rows):
    after = 6

    def mix(self, h: Tensor) -> Tensor:
        return h.index_select(1, torch.tensor([0, 3, 3, 9, 14, 1]))


class PermuteChannels(Rows):
    """A fixed random permutation of the channels, as RealNVP has, in a buffer."""

    order: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.randperm(16))

    def mix(self, h: Tensor) -> Tensor:
        return torch.relu(h)[:, self.order]


class Gather(Rows):
    after = 4

    def mix(self, h: Tensor) -> Tensor:
        return h.gather(1, torch.tensor([[15, 0, 7, 7]]).expand(len(h), -1))


class BooleanIndex(Rows):
    after = 6
    keep: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keep", torch.arange(16) % 3 == 0)

    def mix(self, h: Tensor) -> Tensor:
        return h[:, self.keep]


class MaskedSelect(Rows):
    after = 1

    def mix(self, h: Tensor) -> Tensor:
        live = h[:, h.mean(0) > 0]
        return (live + 0.5).prod(1, keepdim=True) + h.masked_select(h > 0.1).sum()


class WhereIndex(Rows):
    def mix(self, h: Tensor) -> Tensor:
        return torch.where(torch.arange(h.shape[1]) % 2 == 0, h, -h.exp())


class PerChannelLoop(Rows):
    def mix(self, h: Tensor) -> Tensor:
        return torch.stack([h[:, c] * (c + 1) for c in range(h.shape[1])], 1)


class PadChannels(Maps):
    """ResNet's parameter-free shortcut: strided, and padded with zero channels to the wider block."""

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.first(x))
        extra = self.second.out_channels - self.first.out_channels
        short = F.pad(h, (0, 0, 0, 0, extra // 2, extra - extra // 2))
        return self.last(torch.relu(self.second(h) + short).mean((2, 3)))


class ConvOverChannels(Maps):
    """Efficient channel attention: a convolution along the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.eca = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def mix(self, h: Tensor) -> Tensor:
        y = self.eca(h.mean((2, 3)).unsqueeze(1)).squeeze(1)
        return h * y.sigmoid()[:, :, None, None]


class LocalResponse(Maps):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LocalResponseNorm(5, alpha=1.0, k=0.5)

    def mix(self, h: Tensor) -> Tensor:
        return self.norm(h)


class WindowsOverChannels(Rows):
    after = 28

    def mix(self, h: Tensor) -> Tensor:
        return h.unfold(1, 4, 2).flatten(1)


class PoolOverChannels(Rows):
    after = 4

    def mix(self, h: Tensor) -> Tensor:
        return F.adaptive_avg_pool1d(h.unsqueeze(1), 4).flatten(1)


class Maxout(Rows):
    after = 4

    def mix(self, h: Tensor) -> Tensor:
        return h.view(len(h), 4, -1).amax(2)


class Resize(Rows):
    after = 12

    def mix(self, h: Tensor) -> Tensor:
        return F.interpolate(h.unsqueeze(1), size=12, mode="linear").squeeze(1)


class Fourier(Rows):
    after = 9

    def mix(self, h: Tensor) -> Tensor:
        return torch.fft.rfft(h, dim=1).abs()


class ComplexPairs(Rows):
    def mix(self, h: Tensor) -> Tensor:
        pairs = torch.view_as_complex(h.reshape(len(h), -1, 2).contiguous())
        turn = torch.polar(torch.ones_like(pairs.real), torch.arange(pairs.shape[1]).to(h.dtype))
        return torch.view_as_real(pairs * turn).flatten(1)


class HashEmbedding(Rows):
    """The signs of the channels are the bits of a number, which is looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 16)

    def mix(self, h: Tensor) -> Tensor:
        bits = (h > 0).long() * 2 ** torch.arange(h.shape[1])
        return self.table(bits.sum(1) % 64)


# --- hard: number of the channels ------------------------------------------------------------------------------------


class OverWidth(Rows):
    def mix(self, h: Tensor) -> Tensor:
        return h / h.shape[1]


class OnlyOverWidth(nn.Module):
    """No other hidden layer: nothing can go unless the next layer's weights are scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return self.b(h / h.shape[1])


class TimesRoot(Rows):
    def mix(self, h: Tensor) -> Tensor:
        return h * math.sqrt(h.size(-1))


class EqualisedRate(nn.Linear):
    """StyleGAN's run-time scale: from the weight's own shape, at every call."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * (1 / math.sqrt(self.weight.shape[1])), self.bias)


def equalised() -> nn.Module:
    return nn.Sequential(EqualisedRate(12, 24), nn.ReLU(), EqualisedRate(24, 16), nn.ReLU(), EqualisedRate(16, 5))


class ChannelConstant(Rows):
    def mix(self, h: Tensor) -> Tensor:
        return h + torch.arange(h.shape[1], dtype=h.dtype, device=h.device) / 4


class ConstantOfAttribute(Rows):
    """A constant whose length is an attribute that mirrors a layer's width."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 16

    def mix(self, h: Tensor) -> Tensor:
        return h * torch.linspace(0.5, 2, self.width, dtype=h.dtype)


class Scalars(Rows):
    """Reductions over the channels by name."""

    after = 1

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def mix(self, h: Tensor) -> Tensor:
        return REDUCTIONS[self.how](h).unsqueeze(1)


REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda h: (h - 2).amax(1),
    "min": lambda h: h.abs().amin(1),
    "mean": lambda h: h.mean(1),
    "product": lambda h: (h.sigmoid() + 0.7).prod(1),
    "norm": lambda h: h.norm(dim=1),
    "logsumexp": lambda h: h.logsumexp(1),
    "std": lambda h: h.std(1),
    "median": lambda h: h.median(1).values,
    "count": lambda h: (h >= 0).sum(1).to(h.dtype) / 4,
    "any": lambda h: (h > 0.1).any(1).to(h.dtype) + h.sum(1),
}


class SpatialAttention(Maps):
    """CBAM: where to look, from the mean and the maximum over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.where = nn.Linear(24, 16), nn.Linear(16, 24), nn.Conv2d(2, 1, 3, padding=1)

    def mix(self, h: Tensor) -> Tensor:
        what = sum(self.up(torch.relu(self.down(p))) for p in (h.mean((2, 3)), h.amax((2, 3))))
        h = h * torch.sigmoid(cast(Tensor, what))[:, :, None, None]
        where = torch.cat([h.mean(1, keepdim=True), h.amax(1, keepdim=True)], 1)
        return h * self.where(where).sigmoid()


class PixelNorm(Maps):
    def mix(self, h: Tensor) -> Tensor:
        return h * torch.rsqrt(h.square().mean(1, keepdim=True) + 1e-8)


class FunctionalNorm(Rows):
    def mix(self, h: Tensor) -> Tensor:
        return F.layer_norm(h, (16,)) + F.layer_norm(h, h.shape[-1:])


class OneGroup(Maps):
    """A group norm over all channels: the statistics are everyone's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, 24)

    def mix(self, h: Tensor) -> Tensor:
        return self.norm(h)


class UnevenGroups(nn.Module):
    """GroupNorm and a grouped convolution cut the same channels into groups of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 24, 3, padding=1), nn.GroupNorm(6, 24)
        self.b, self.c = nn.Conv2d(24, 24, 3, groups=4), nn.Conv2d(24, 16, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.c(torch.relu(self.b(torch.relu(self.norm(self.a(x)))))).mean((2, 3)))


class SoftmaxedParameter(Rows):
    """Mixing weights over the channels that sum to one."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.randn(16))

    def mix(self, h: Tensor) -> Tensor:
        return h * self.alpha.softmax(0) * 4


class BinaryWeights(Rows):
    """XNOR: signs of the weights, times their mean size over the whole matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))

    def mix(self, h: Tensor) -> Tensor:
        return F.linear(h, self.weight.sign() * self.weight.abs().mean())


class FakeQuantised(Rows):
    """Weights rounded to steps of their largest value."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))

    def mix(self, h: Tensor) -> Tensor:
        step = self.weight.detach().abs().max() / 7
        return torch.relu(F.linear(torch.relu(h), (self.weight / step).round() * step))


# --- hard: attention -------------------------------------------------------------------------------------------------


class DefaultScale(SeparateQKV):
    """The scale of attention comes from the head's width at run time."""

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (self.heads_of(f(x), self.heads) for f in (self.q, self.k, self.v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Alibi(FusedQKV):
    """Slopes computed from the number of heads, at every call."""

    def attend(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4).unbind(0)
        slopes = 2.0 ** (-8.0 / self.heads * torch.arange(1, self.heads + 1, dtype=x.dtype))
        distance = (torch.arange(n)[None] - torch.arange(n)[:, None]).abs().to(x.dtype)
        y = attention(q, k, v, self.scale, -slopes[:, None, None] * distance)
        return self.proj(y.transpose(1, 2).flatten(2))


class AbsorbedHeads(FusedQKV):
    """When a head goes, ``view(b, -1, heads, dim)`` makes fewer tokens instead of failing."""

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (t.reshape(len(x), -1, 4, 8).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = attention(q, k, v, self.scale).transpose(1, 2).flatten(2)
        return self.proj(y).mean(1, keepdim=True)


class StreamWidth(FusedQKV):
    """timm's older way: heads as wide as the stream's share, and the output reshaped to the stream's width."""

    def attend(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(attention(q, k, v, (c // self.heads) ** -0.5).transpose(1, 2).reshape(b, n, c))


class HeadsInside(FusedQKV):
    """GPT-NeoX's order: each head's queries, keys and values lie together."""

    def attend(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, self.heads, -1).transpose(1, 2).chunk(3, -1)
        return self.proj(attention(q, k, v, self.scale).transpose(1, 2).flatten(2))


class TalkingHeads(FusedQKV):
    """The heads' scores are mixed by a matrix, so heads are rows of a weight too."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(4, 4), nn.Linear(4, 4)

    def attend(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4).unbind(0)
        scores = self.before((q @ k.transpose(-2, -1) * self.scale).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        weights = self.after(scores.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class ChannelAttention(FusedQKV):
    """Attention between channels (XCiT): a softmax over a head's own width."""

    def attend(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.dim).permute(2, 0, 3, 4, 1).unbind(0)
        y = attention(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, 1.0)
        return self.proj(y.permute(0, 3, 1, 2).flatten(2))


class LinearAttention(FusedQKV):
    """Feature maps ``elu + 1`` of zero are one: a masked feature still counts."""

    def attend(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        y = q @ (k.transpose(-2, -1) @ v) / (q @ k.sum(-2).unsqueeze(-1))
        return self.proj(y.transpose(1, 2).flatten(2))


class NormedHeads(SeparateQKV):
    """Queries and keys normalised within each head by one norm that all heads share."""

    def __init__(self) -> None:
        super().__init__()
        self.qnorm, self.knorm = nn.LayerNorm(8), nn.RMSNorm(8)

    def position(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.qnorm(q), self.knorm(k)


class KeyCache(SeparateQKV):
    """Keys and values are written into a buffer and read back."""

    cache: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(2, 4, 4, 16, 8), persistent=False)

    def attend(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (self.heads_of(f(x), self.heads) for f in (self.q, self.k, self.v))
        self.cache[0, :b, :, :n] = k.detach()
        self.cache[1, :b, :, :n] = v.detach()
        y = attention(q, self.cache[0, :b, :, :n], self.cache[1, :b, :, :n], self.scale)
        return self.proj(y.transpose(1, 2).flatten(2))


# --- hard: the recording does not see everything ---------------------------------------------------------------------


class BranchLayers(nn.Module):
    """The other branch has a layer of its own on the same hidden neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.positive, self.negative = nn.Linear(12, 16), nn.Linear(16, 5), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        return self.positive(h) if x.mean() > 0 else self.negative(h)


class BranchLayout(Rows):
    """The other branch reads the same neurons in another order."""

    def forward(self, x: Tensor) -> Any:
        h = self.second(torch.relu(self.first(x)))
        return self.last(h.roll(3, 1) if float(x.mean()) > 0 else h)


class BranchOnBatch(Rows):
    """The branch depends on a shape, so nothing in the recorded operations tells of it."""

    def mix(self, h: Tensor) -> Tensor:
        return h.roll(3, 1) if len(h) == 2 else h


class ShutGate(Rows):
    """A gate that is exactly zero at the recording hides what it multiplies from any comparison of outputs."""

    def forward(self, x: Tensor) -> Any:
        h = self.second(torch.relu(self.first(x)))
        return self.last(h) + (x.mean() > 0).to(x.dtype) * self.last(h.roll(3, 1))


class ItemSlice(Rows):
    after = 8

    def forward(self, x: Tensor) -> Any:
        start = int(x.abs().sum().item() * 100) % 8
        return self.last(self.second(torch.relu(self.first(x)))[:, start : start + 8])


class EarlyExit(nn.Module):
    """The deeper layers run for some inputs only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.exit = nn.Linear(12, 16), nn.Linear(16, 5)
        self.deep = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 5))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        y = self.exit(h)
        return y + self.deep(h) if bool(x.mean() > 0) else y


class RoutedRows(nn.Module):
    """Each row goes to the one expert that its router names; an expert may get no row at all."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.router = nn.Linear(12, 16), nn.Linear(16, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in range(4))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.inp(x))
        best = self.router(x).argmax(-1)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows_of = (best == i).nonzero().squeeze(1)
            if len(rows_of):
                y.index_copy_(0, rows_of, expert(x[rows_of]))
        return self.head(y)


class AuxiliaryHead(Rows):
    """A second head that only training uses."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Any:
        h = self.second(torch.relu(self.first(x)))
        return (self.last(h), self.aux(h)) if self.training else self.last(h)


class TrainingLayout(Rows):
    """Training shuffles the neurons, evaluation does not."""

    def mix(self, h: Tensor) -> Tensor:
        return h.roll(1, 1) if self.training else h


class UnusedLayer(Rows):
    """A layer that no forward pass uses, of the hidden width."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(16, 16)

    def mix(self, h: Tensor) -> Tensor:
        return torch.relu(h)


class HiddenList(Rows):
    """A layer in a plain list: none of the model's parameters, yet part of its function."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [nn.Linear(16, 16)]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> HiddenList:
        for layer in self.hidden:
            layer._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    def mix(self, h: Tensor) -> Tensor:
        return torch.relu(self.hidden[0](torch.relu(h)))


class HiddenDict(Rows):
    """A norm in a plain dict, between layers that are registered."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = {"norm": nn.BatchNorm1d(16).eval()}
        scatter(self.hidden["norm"])

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> HiddenDict:
        self.hidden["norm"]._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    def mix(self, h: Tensor) -> Tensor:
        return torch.relu(self.hidden["norm"](h))


class PlainTensor(Rows):
    """A tensor attribute that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.rand(16) + 0.5

    def mix(self, h: Tensor) -> Tensor:
        return h * self.scale.to(h)


GLOBAL_SCALE = torch.linspace(0.5, 2, 16)


class GlobalTensor(Rows):
    def mix(self, h: Tensor) -> Tensor:
        return h * GLOBAL_SCALE.to(h)


class PlainList(Rows):
    """One Python number per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.gains = [0.5 + i / 16 for i in range(16)]

    def mix(self, h: Tensor) -> Tensor:
        return h * torch.tensor(self.gains, dtype=h.dtype)


class Blur(Maps):
    """A fixed filter per channel in a buffer, its number of groups in an attribute."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.channels = 24
        self.register_buffer("kernel", torch.rand(24, 1, 3, 3))

    def mix(self, h: Tensor) -> Tensor:
        return F.conv2d(h, self.kernel, stride=2, groups=self.channels)


class Numpy(Rows):
    """Leaves PyTorch and comes back."""

    def mix(self, h: Tensor) -> Tensor:
        return torch.from_numpy(h.detach().numpy() * 2) + 0 * h


class NumpyOrder(Rows):
    """Leaves PyTorch, and comes back in another order."""

    def mix(self, h: Tensor) -> Tensor:
        return torch.from_numpy(h.detach().numpy()[:, ::-1].copy())


class ToList(Rows):
    """Leaves PyTorch as a list of numbers."""

    after = 3

    def mix(self, h: Tensor) -> Tensor:
        return torch.tensor([sorted(row)[-3:] for row in h.tolist()], dtype=h.dtype)


class DetachedWeight(Rows):
    """A weight used through ``.data`` and ``.detach()``, and so through other tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def mix(self, h: Tensor) -> Tensor:
        y = F.linear(torch.relu(h), self.inner.weight.data, self.inner.bias.detach())
        return torch.relu(y) + self.inner.weight.detach().clone().sum(1)


class Scripted(nn.Module):
    """Operations in TorchScript, which Python cannot look into."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 24), nn.Linear(16, 5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            script: Callable[[nn.Module], nn.Module] = torch.jit.script
            self.middle = script(nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 16)))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.middle(torch.relu(self.first(x)))))


class Checkpointed(Rows):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))

    def mix(self, h: Tensor) -> Tensor:
        return h + checkpoint(self.inner, h, use_reentrant=False)


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x * 4).round() / 4

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0]


class _AddRolled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x + 0.5 * x.roll(1, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] + 0.5 * grads[0].roll(-1, 1)


class StraightThrough(Rows):
    def mix(self, h: Tensor) -> Tensor:
        apply: Callable[[Tensor], Tensor] = _Round.apply
        return apply(h)


class CustomFunction(Rows):
    def mix(self, h: Tensor) -> Tensor:
        apply: Callable[[Tensor], Tensor] = _AddRolled.apply
        return apply(h)


class Mapped(Rows):
    """``vmap`` over rows, with an operation on channels inside."""

    def mix(self, h: Tensor) -> Tensor:
        return torch.func.vmap(lambda row: row.roll(3, 0) * row)(h)


class Functional(Rows):
    """A layer called with other tensors in place of its own parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def mix(self, h: Tensor) -> Tensor:
        halved = {name: value / 2 for name, value in self.inner.named_parameters()}
        return torch.func.functional_call(self.inner, halved, (torch.relu(h),))


class Hooked(Rows):
    """A forward hook changes what a layer returns."""

    def __init__(self) -> None:
        super().__init__()
        self.second.register_forward_hook(roll_output)


def roll_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output + output.roll(1, 1)


class ShapeAssert(Rows):
    def mix(self, h: Tensor) -> Tensor:
        if h.shape[1] != 16:
            raise ValueError(f"expected 16 channels, got {h.shape[1]}")
        return torch.relu(h)


class CatchesErrors(Rows):
    """When shapes do not fit, it quietly does something else."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.rand(16) + 0.5

    def mix(self, h: Tensor) -> Tensor:
        try:
            return h * self.table.to(h)
        except RuntimeError:
            return h


class WidthBranch(Rows):
    """Another function for other widths."""

    def mix(self, h: Tensor) -> Tensor:
        return h.relu() if h.shape[1] >= 16 else h.tanh()


# --- hard: memory and randomness -------------------------------------------------------------------------------------


class BufferSlice(Rows):
    """Hidden values pass through a slice of a buffer, written in place."""

    bank: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank", torch.zeros(8, 16))

    def mix(self, h: Tensor) -> Tensor:
        self.bank[: len(h)] = h.detach()
        return torch.relu(self.bank[: len(h)]) + h


class Canvas(Rows):
    """Hidden values are written into zeros, at places of their own."""

    after = 40

    def mix(self, h: Tensor) -> Tensor:
        canvas = torch.zeros(len(h), 40, dtype=h.dtype)
        canvas[:, 4:20] = h
        canvas[:, 21:37] = torch.relu(h)
        return canvas


class Interleaved(Rows):
    """Two halves woven into an empty tensor of twice the width."""

    after = 32

    def mix(self, h: Tensor) -> Tensor:
        out = h.new_empty(len(h), 2 * h.shape[1])
        out[:, 0::2], out[:, 1::2] = h, h.tanh()
        return out


class ThroughView(Rows):
    """A view is changed in place, and the tensor is read afterwards."""

    def mix(self, h: Tensor) -> Tensor:
        h = h.clone()
        part = h[:, :8]
        part.mul_(2).add_(1)
        h[:, 3] = 0.5
        return torch.relu(h)


class SwapInPlace(Rows):
    def mix(self, h: Tensor) -> Tensor:
        h = h.clone()
        h[:, [0, 5]] = h[:, [5, 0]] * 2
        return torch.relu(h)


class Accumulated(Rows):
    """Index-add into a few slots: channel i goes to slot i % 4."""

    after = 4

    def mix(self, h: Tensor) -> Tensor:
        return h.new_zeros(len(h), 4).index_add_(1, torch.arange(h.shape[1]) % 4, h)


class MovingMean(Rows):
    """Changes its own buffer at every call, in evaluation as well."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.randn(16))

    def mix(self, h: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
        return torch.relu(h - self.mean)


class Counter(Rows):
    """Changes an attribute at every call, and answers by it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def mix(self, h: Tensor) -> Tensor:
        self.calls += 1
        return h.roll(self.calls, 1)


class Remembers(Rows):
    """Keeps the hidden values of the last call in an attribute and adds them to this one's."""

    def __init__(self) -> None:
        super().__init__()
        self.last_hidden: Tensor | None = None

    def mix(self, h: Tensor) -> Tensor:
        before, self.last_hidden = self.last_hidden, h.detach()
        return h if before is None else h + 0.5 * before


class Rebinds(Rows):
    """Sets a buffer anew at every call (to the same values)."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(16), persistent=False)

    def mix(self, h: Tensor) -> Tensor:
        self.mask = torch.arange(16, dtype=h.dtype) / 8
        return h * self.mask


class HiddenNoise(nn.Module):
    """Noise on the only hidden neurons: with fewer of them the same seed gives other noise."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(torch.relu(h + torch.randn_like(h)))


class OutputNoise(Rows):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y + 0.1 * torch.randn_like(y)


class AlwaysDropout(nn.Module):
    """Monte Carlo dropout, in evaluation as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.dropout(torch.relu(self.a(x)), 0.5, training=True))


class ChannelDropout(Maps):
    """Does nothing in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout2d(0.5)

    def mix(self, h: Tensor) -> Tensor:
        return F.alpha_dropout(self.drop(h), 0.2, self.training)


# --- hard: shapes ----------------------------------------------------------------------------------------------------


class FixedReshape(Rows):
    def mix(self, h: Tensor) -> Tensor:
        return h.reshape(-1, 4, 4).transpose(1, 2).reshape(-1, 16)


class AbsorbedRows(Rows):
    """When neurons go, ``reshape(-1, 16)`` makes fewer rows instead of failing."""

    def forward(self, x: Tensor) -> Any:
        h = self.second(torch.relu(self.first(x.repeat_interleave(16, 0))))
        return self.last(h.reshape(-1, 16)).mean(0)


class BatchAndChannels(Maps):
    """Four groups of channels become batch entries, pass one shared layer, and come back."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(6, 6, 3, padding=1)

    def mix(self, h: Tensor) -> Tensor:
        b, c, x, y = h.shape
        return self.inner(torch.relu(h).view(b * 4, c // 4, x, y)).view(b, c, x, y)


class ChannelsAsTokens(nn.Module):
    """MLP-Mixer: a layer along the channels, then one along the tokens, each the other's batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(12, 16)
        self.tokens = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8))
        self.channels = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        x = x + self.tokens(x.mT).mT
        return self.head((x + self.channels(x)).mean(1))


class ChannelsInSpace(Maps):
    """Channels laid out in space and convolved across."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(1, 1, 3, padding=1)

    def mix(self, h: Tensor) -> Tensor:
        b, c, x, y = h.shape
        return self.inner(h.reshape(b, 1, c, x * y)).reshape(b, c, x, y)


class Unflattened(Rows):
    def __init__(self) -> None:
        super().__init__()
        self.split, self.inner, self.join = nn.Unflatten(1, (2, 8)), nn.Linear(8, 8), nn.Flatten()

    def mix(self, h: Tensor) -> Tensor:
        return self.join(self.inner(self.split(torch.relu(h))))


class UnfoldedConv(nn.Module):
    """A convolution written as a product with patches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fc = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(24, 5)
        self.weight = nn.Parameter(torch.randn(24, 16, 3, 3) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(torch.relu(self.first(x)), 3)
        y = (self.weight.flatten(1) @ patches).view(len(x), -1, 6, 6)
        return self.fc(torch.relu(y).mean((2, 3)))


class Folded(nn.Module):
    """Overlapping patches are made and added up again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24 * 9, 1)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.up(torch.relu(self.first(x)))
        return self.fc(torch.relu(F.fold(patches.flatten(2), (10, 10), 3)).mean((2, 3)))


class Kron(Rows):
    after = 32

    def mix(self, h: Tensor) -> Tensor:
        return torch.kron(h, torch.tensor([[1.0, -2.0]], dtype=h.dtype))


class Tiled(Rows):
    after = 48

    def mix(self, h: Tensor) -> Tensor:
        return torch.relu(h).repeat(1, 3)


class RepeatedEach(Rows):
    after = 32

    def mix(self, h: Tensor) -> Tensor:
        return torch.relu(h).repeat_interleave(2, 1)


class TiledToWidth(Rows):
    """Repeated as often as it takes to fill 32 places, and cut off there."""

    after = 32

    def mix(self, h: Tensor) -> Tensor:
        return h.repeat(1, math.ceil(32 / h.shape[1]))[:, :32]


class StackSelect(nn.Module):
    """Features of three layers stacked, then one of them selected, and the largest of all."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.last = nn.Linear(12, 16), nn.Linear(12, 16), nn.Linear(12, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.stack([self.a(x), self.b(x).tanh(), self.c(x)], 1)
        return self.last(h.select(1, 1) + h.amax(1) * h[:, -1])


class ChannelStack(nn.Module):
    """Features stacked beside the channels and flattened, so that they interleave."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(12, 16), nn.Linear(12, 16), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.stack([self.a(x), self.b(x)], 2).flatten(1))


class TwoShapes(nn.Module):
    """One convolution and one linear layer, called at different shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.fc, self.last = nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        h = F.max_pool2d(torch.relu(self.conv(h)), 2)
        h = torch.relu(self.conv(h))
        pixels = self.fc(h.flatten(2).transpose(1, 2))
        return self.last(pixels.amax(1) + self.fc(h.mean((2, 3))))


class TwoWidths(nn.Module):
    """One weight, used whole for one input and in part for another (slimmable networks)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(12, 24), nn.Linear(24, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        whole = self.last(torch.relu(self.second(h)))
        part = F.linear(h[:, :12], self.second.weight[:8, :12], self.second.bias[:8])
        return whole + F.linear(torch.relu(part), self.last.weight[:, :8])


class Broadcast(Rows):
    """A hidden layer of width one is stretched over sixteen."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(16, 1)

    def mix(self, h: Tensor) -> Tensor:
        h = torch.relu(h)
        return self.one(h).expand(-1, 16) * torch.relu(h)


class CRelu(Rows):
    after = 32

    def mix(self, h: Tensor) -> Tensor:
        return torch.relu(torch.cat([h, -h.flip(1)], 1))


# --- hard: weights ---------------------------------------------------------------------------------------------------


class Autoencoder(nn.Module):
    """One matrix, used both ways round."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24, 12) * 0.3)
        self.last = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(F.linear(x, self.weight)) @ self.weight)


class TwoRoles(Rows):
    """A square matrix and its transpose in a row, and its diagonal on top."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Parameter(torch.randn(16, 16) * 0.3)

    def mix(self, h: Tensor) -> Tensor:
        y = F.linear(torch.relu(F.linear(torch.relu(h), self.square)), self.square.t())
        return torch.relu(y) * self.square.diagonal()


class ConvAsLinear(Maps):
    """A 1×1 convolution whose weight serves as a linear layer as well."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(24, 24, 1)

    def mix(self, h: Tensor) -> Tensor:
        h = self.inner(torch.relu(h))
        return F.linear(torch.relu(h).mean((2, 3)), self.inner.weight.flatten(1), self.inner.bias)


class SharedStorage(Rows):
    """Two parameters on the same memory, one the transpose of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(16, 32, bias=False), nn.Linear(32, 16, bias=False)
        self.up.weight = nn.Parameter(self.down.weight.detach().t())

    def mix(self, h: Tensor) -> Tensor:
        return self.up(torch.relu(self.down(h)))


class FlatParameter(nn.Module):
    """All weights in one vector, cut up at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Parameter(torch.randn(12 * 16 + 16 + 16 * 5) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        a, bias, b = self.flat.split([12 * 16, 16, 16 * 5])
        return F.linear(torch.relu(F.linear(x, a.view(16, 12), bias)), b.view(5, 16))


class JoinedWeights(nn.Module):
    """Two layers run as one: their weights are put together at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(12, 16), nn.Linear(12, 24), nn.Linear(40, 5)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = torch.cat([self.a.weight, self.b.weight]), torch.cat([self.a.bias, self.b.bias])
        return self.last(torch.relu(F.linear(x, weight, bias)))


class LowRank(Rows):
    """A weight with a low-rank change added at every call (LoRA)."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(16, 16)
        self.a, self.b = nn.Parameter(torch.randn(4, 16) * 0.2), nn.Parameter(torch.randn(16, 4) * 0.2)

    def mix(self, h: Tensor) -> Tensor:
        return torch.relu(F.linear(torch.relu(h), self.base.weight + self.b @ self.a, self.base.bias))


class HyperNetwork(nn.Module):
    """The second layer's weights are made by another layer, from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.make, self.last = nn.Linear(12, 16), nn.Linear(12, 16 * 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.make(x.tanh()).view(len(x), 24, 16)
        h = torch.bmm(weights, torch.relu(self.first(x)).unsqueeze(2)).squeeze(2)
        return self.last(torch.relu(h))


class DynamicConv(nn.Module):
    """Four kernels mixed per image, applied by a grouped convolution over batch times channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.route = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 4)
        self.weight = nn.Parameter(torch.randn(4, 24, 16, 3, 3) * 0.1)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        b, c, height, width = h.shape
        mix = self.route(h.mean((2, 3))).softmax(1)
        weight = torch.einsum("bk,koihw->boihw", mix, self.weight).reshape(-1, c, 3, 3)
        y = F.conv2d(h.reshape(1, b * c, height, width), weight, groups=b)
        return self.fc(torch.relu(y).view(b, -1, height - 2, width - 2).mean((2, 3)))


class BatchedExperts(nn.Module):
    """Experts in one weight of three dimensions, with a bias per expert."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.router = nn.Linear(12, 16), nn.Linear(16, 4)
        self.up, self.down = nn.Parameter(torch.randn(4, 16, 24) * 0.2), nn.Parameter(torch.randn(4, 24, 5) * 0.2)
        self.bias = nn.Parameter(torch.randn(4, 1, 24))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.inp(x))
        weights = self.router(x).softmax(-1).t().unsqueeze(2)
        h = torch.relu(torch.baddbmm(self.bias, x.expand(4, -1, -1), self.up))
        return (torch.bmm(h, self.down) * weights).sum(0)


class MaskBuffer(Rows):
    """A mask of weights in a buffer."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)
        self.register_buffer("mask", (torch.rand(16, 16) > 0.4).float())

    def mix(self, h: Tensor) -> Tensor:
        return torch.relu(F.linear(torch.relu(h), self.inner.weight * self.mask, self.inner.bias))


def pruned_by_torch() -> nn.Module:
    model = Rows()
    prune.random_unstructured(model.first, "weight", 0.5)
    prune.random_unstructured(model.second, "weight", 0.5)
    return model


class CausalLinear(Rows):
    """A triangular weight: each neuron reads those before it only (MADE)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def mix(self, h: Tensor) -> Tensor:
        return torch.relu(F.linear(torch.relu(h), self.inner.weight.tril(-1), self.inner.bias))


class SymmetricWeight(Rows):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16) * 0.3)

    def mix(self, h: Tensor) -> Tensor:
        return torch.relu(torch.relu(h) @ (self.weight + self.weight.T))


class InverseWeight(Rows):
    """A matrix and its inverse (Glow): zero rows have none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(16) + torch.randn(16, 16) * 0.1)

    def mix(self, h: Tensor) -> Tensor:
        return torch.linalg.solve(self.weight, torch.tanh(h @ self.weight).t()).t()


def spectral(how: Callable[[nn.Module], nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(
            how(nn.Conv2d(3, 16, 3, padding=1)),
            nn.ReLU(),
            how(nn.Conv2d(16, 24, 3, padding=1)),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(24, 5),
        )


def old_spectral_norm(layer: nn.Module) -> nn.Module:
    return nn.utils.spectral_norm(layer)


def new_spectral_norm(layer: nn.Module) -> nn.Module:
    return parametrizations.spectral_norm(layer)


def orthogonal() -> nn.Module:
    model = Rows()
    parametrizations.orthogonal(model.second)
    return model


class MaxNorm(nn.Module):
    """An embedding that shortens its own rows when it looks them up."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16, max_norm=2.0)
        self.fc1, self.fc2 = nn.Linear(16, 24), nn.Linear(24, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(self.embed(tokens)))).mean(1)


def lone_rnn(kind: type[nn.RNNBase], **options: Any) -> nn.Module:
    return LoneRecurrent(kind, **options)


class LoneRecurrent(nn.Module):
    """The recurrent layer's own width is the only one to prune; the final states are read as well."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        rnn: Callable[..., nn.Module] = kind
        self.rnn = rnn(12, 16, batch_first=True, **options)
        self.head, self.state = nn.Linear(int(options.get("proj_size", 16)), 5), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, state = self.rnn(x)
        last = state[1] if isinstance(state, tuple) else state
        return self.head(y.mean(1)), self.state(last[0])


class DoubleLayer(Rows):
    """One norm for two branches of the same width."""

    def __init__(self) -> None:
        super().__init__()
        self.other, self.norm = nn.Linear(24, 16), nn.BatchNorm1d(16)

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.first(x))
        return self.last(torch.relu(self.norm(self.second(h))) * torch.relu(self.norm(self.other(h))))


# --- hard: products of channels --------------------------------------------------------------------------------------


class Outer(Rows):
    after = 16 * 16

    def mix(self, h: Tensor) -> Tensor:
        return (h.unsqueeze(2) * h.tanh().unsqueeze(1)).flatten(1)


class UpperPairs(Rows):
    """Products of all pairs once, by the indices of a triangle."""

    after = 120

    def mix(self, h: Tensor) -> Tensor:
        i, j = torch.triu_indices(h.shape[1], h.shape[1], 1)
        return h[:, i] * h[:, j]


class Gram(Maps):
    """Style transfer: which channels go together, per pixel and channel."""

    after = 24 * 24

    def mix(self, h: Tensor) -> Tensor:
        f = h.flatten(2)
        return (f @ f.transpose(1, 2) / (f.shape[1] * f.shape[2])).flatten(1) * 50


class GramPlain(Maps):
    """The same, without the channels' number."""

    after = 24 * 24

    def mix(self, h: Tensor) -> Tensor:
        f = h.flatten(2)
        return torch.einsum("bcn,bdn->bcd", f, f).flatten(1) / f.shape[2]


class Trace(Rows):
    after = 1

    def mix(self, h: Tensor) -> Tensor:
        square = h.reshape(len(h), 4, 4)
        return torch.einsum("bii->b", square @ square.tanh()).unsqueeze(1)


class BilinearLayer(Rows):
    def __init__(self) -> None:
        super().__init__()
        self.product = nn.Bilinear(16, 24, 16)

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.first(x))
        return self.last(torch.relu(self.product(torch.relu(self.second(h)), h)))


class Cosine(nn.Module):
    """Five prototypes, compared by angle."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 24), nn.Linear(24, 16)
        self.prototypes = nn.Parameter(torch.randn(5, 16))

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(torch.relu(self.first(x)))
        return F.cosine_similarity(h[:, None], self.prototypes[None], dim=-1)


class Distances(Cosine):
    def forward(self, x: Tensor) -> Tensor:
        h = self.second(torch.relu(self.first(x)))
        return torch.cdist(h, self.prototypes)


class Quantiser(Cosine):
    """Vector quantisation: the best code takes the place of the hidden vector."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(torch.relu(self.first(x)))
        code = self.prototypes[(h @ self.prototypes.t()).argmax(1)]
        return self.last(h + (code - h).detach())


class Correlation(Rows):
    """Every row normalised by its own mean and deviation over the channels, without any norm layer."""

    def mix(self, h: Tensor) -> Tensor:
        return (h - h.mean(1, keepdim=True)) / (h.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()


# --- hard: inputs and outputs ----------------------------------------------------------------------------------------


class Nested(Rows):
    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.first(x))
        y = self.last(self.second(h))
        return {"a": [(y, {"deep": y.argmax(-1)}), Answer(y.sum(-1), [y, y[:1]])], "b": (None, 3, "text", h.sum(1))}


class ReturnsHidden(nn.Module):
    """All hidden values are outputs, so nothing may go."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.relu(self.a(x))
        return self.b(h), h


class ReturnsSome(Rows):
    """One of the two hidden layers is an output."""

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.first(x))
        z = self.second(h)
        return {"y": self.last(torch.relu(z)), "features": z}


class ReturnsWidth(Rows):
    """Answers the width and the names of the largest neurons."""

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.first(x))
        z = self.second(h)
        return self.last(torch.relu(z)), z.argmax(1), h.shape[1]


class InputStream(nn.Module):
    """The input itself is the residual stream, whose width the caller fixes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(12, 32), nn.Linear(32, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.down(torch.relu(self.up(x))))


class InPlaceInput(Rows):
    """Changes the caller's tensor (by a step that does nothing the second time)."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x.clamp_(-1, 1))


class OutputOfStack(nn.Module):
    """Outputs as wide as the hidden layers: which width is which, only the labels tell."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


def sixteen(seed: int) -> tuple[Any, ...]:
    return (normal(seed, 16, 16),)


# --- the tables ------------------------------------------------------------------------------------------------------


def _case(
    name: str,
    build: Callable[[], nn.Module],
    inputs: Callable[[int], tuple[Any, ...]],
    why: str,
    expect: frozenset[str] = ANY,
    kwargs: Mapping[str, Any] | None = None,
) -> Case:
    return Case(name, partial(_built, build), inputs, expect, why, kwargs or {})


def _built(build: Callable[[], nn.Module]) -> nn.Module:
    return scatter(build()).eval()


_plain = partial(_case, expect=PRUNED)

PLAIN: tuple[Case, ...] = (
    _plain("mlp", mlp, rows, "linear layers"),
    _plain("linear with batch norm", linear_batch_norm, rows, "norms with and without scales, a slope per neuron"),
    _plain("conv chain", conv_chain, images, "batch norm between convolutions"),
    _plain("conv, flatten, linear", conv_flatten, images, "nine columns per channel; sigmoid of zero is one half"),
    _plain("conv, view, linear", ViewFlatten, images, "flattened by view(size, -1)"),
    _plain("residual with projection", Residual, images, "channels coupled by additions, one in place"),
    _plain("concat", Concat, images, "a norm and a layer over two producers"),
    _plain("dense growth", Dense, images, "every producer read at another offset by every later layer"),
    _plain("cat of itself", CatSelf, rows, "one neuron is two columns"),
    _plain("split", SplitInTwo, images, "halves by a size read off the tensor: as many must go from each"),
    _plain("chunk", ChunkGate, rows, "value i and gate i go together"),
    _plain("unbind", Unbind, rows, "three vectors out of one layer"),
    _plain("glu", Glu, rows, "halves coupled inside one operation"),
    _plain("depthwise", partial(Depthwise, 1), images, "groups follow the channels"),
    _plain("depthwise, multiplier 2", partial(Depthwise, 2), images, "two filters per channel"),
    _plain("one filter", OneFilter, images, "out_channels == groups == 1 is not depthwise"),
    _plain("grouped conv", grouped, images, "as many must go from each group, or whole groups"),
    _plain("channel shuffle, v1", ShuffleV1, images, "groups interleaved between grouped convolutions"),
    _plain("channel shuffle, v2", ShuffleV2, images, "split, concatenated and interleaved twice"),
    _plain("transposed conv", partial(transposed, 1), images, "the weight is (in, out)"),
    _plain("grouped transposed conv", partial(transposed, 4), images, "the weight is (in, out per group)"),
    _plain("conv1d", conv1d, signals, "one spatial dimension, dilated"),
    _plain("conv3d", conv3d, volumes, "three spatial dimensions"),
    _plain("unet", UNet, images, "skips, transposed convolution and interpolation"),
    _plain("squeeze and excite", SqueezeExcite, images, "a gate on the channels, by 1×1 convolutions"),
    _plain("pixel shuffle", PixelShuffles, images, "four channels are one"),
    _plain("pixel unshuffle", PixelUnshuffles, images, "one channel is four"),
    _plain("group norm", group_norm, images, "statistics of groups: whole groups, or the other layer"),
    _plain("instance norm", instance_norm, images, "affine, with and without running statistics"),
    _plain("layer norm", partial(NormBlock, nn.LayerNorm), rows, "the stream's width is fixed by its statistics"),
    _plain("rms norm", partial(NormBlock, nn.RMSNorm), rows, "the stream's width is fixed by its mean square"),
    _plain("bare parameters", LayerScale, images, "broadcast from three shapes"),
    _plain("parameter containers", Containers, rows, "weights that no layer owns"),
    _plain("weight norm, hooks", partial(weight_normed, old_weight_norm), images, "the weight is made of g and v"),
    _plain("weight norm, parametrised", partial(weight_normed, new_weight_norm), images, "the weight is made of two"),
    _plain("weight standardisation", standardised, images, "inputs frozen by the filter's mean, outputs free"),
    _plain("subclasses", subclasses, images, "own forward functions that read attributes"),
    _plain("input first", input_first, rows, "GPT-2's (in, out) weights, and the width in an attribute"),
    _plain("shared layer", Shared, rows, "what a layer gives is what it takes"),
    _plain("tied embedding", TiedEmbedding, ids, "one matrix at both ends; the vocabulary stays"),
    _plain("self attention, batch first", partial(SelfAttention, True), vectors, "one packed projection"),
    _plain("self attention, batch second", partial(SelfAttention, False), vectors, "one packed projection"),
    _plain("cross attention, batch first", partial(CrossAttention, True), two_sequences, "three separate widths"),
    _plain("cross attention, batch second", partial(CrossAttention, False), two_sequences, "three separate widths"),
    _plain("encoder layer", partial(Encoder, False), vectors, "the fused fast path in evaluation"),
    _plain("encoder layer, norm first", partial(Encoder, True, False), vectors, "another order of norms and of batch"),
    _plain("encoder and decoder", Seq2Seq, two_sequences, "cloned layers, causal mask, cross attention"),
    _plain("fused qkv", FusedQKV, vectors, "queries, keys, values and heads in one dimension"),
    _plain("separate qkv", SeparateQKV, vectors, "heads by view, a fixed scale"),
    _plain("grouped queries", partial(SeparateQKV, 2), vectors, "keys and values repeated for groups of heads"),
    _plain("one key head", partial(SeparateQKV, 1), vectors, "keys and values broadcast over heads"),
    _plain("rotary", Rotary, vectors, "halves of heads turn together"),
    _plain("relative bias", RelativeBias, vectors, "a table with a column per head"),
    _plain("einsum attention", EinsumAttention, vectors, "weights of three dimensions"),
    _plain("swiglu", partial(Gated, F.silu), rows, "two matrices of the same rows"),
    _plain("geglu", partial(Gated, F.gelu), rows, "two matrices of the same rows"),
    _plain("lstm", partial(Recurrent, nn.LSTM), vectors, "four gates per neuron"),
    _plain("lstm, two layers, both ways", partial(Recurrent, nn.LSTM, 2, True), vectors, "eight gates in two places"),
    _plain("gru", partial(Recurrent, nn.GRU), vectors, "three gates per neuron"),
    _plain("lstm cell", Cell, vectors, "zeros of the hidden size start the loop"),
    _plain("experts", Experts, rows, "softmax over experts, not over neurons"),
    _plain("convnext", ConvNeXt, images, "channels last and back"),
    _plain("vit", ViT, images, "class token and positions on the stream"),
    _plain("dict to dataclass", DictToDataclass, row_dict, "inputs in a dict, outputs in a dataclass"),
    _plain("many outputs", ManyOutputs, rows, "a dict with a tuple, None and a string"),
    _plain(
        "keywords",
        KeywordOnly,
        rows,
        "keyword-only inputs beside a positional one",
        kwargs={"scale": normal(7, 12), "shift": normal(8, 5), "times": 2},
    ),
    _plain("only keywords", OnlyKeywords, nothing, "no positional input", kwargs={"pixel_values": normal(9, 3, 12)}),
)

HARD: tuple[Case, ...] = (
    # Order of the channels.
    _case("cumsum", CumSum, rows, "channel i holds all before it"),
    _case("diff", Difference, rows, "neighbours change when one goes"),
    _case("roll", Roll, rows, "a fixed distance, around a width that changes"),
    _case("flip", Flip, rows, "column i belongs to neuron 15 - i"),
    _case("flip and add", FlipAdd, rows, "neurons i and 15 - i go together"),
    _case("sort", Sort, rows, "position is rank"),
    _case("topk", TopK, rows, "a masked zero may be among the largest"),
    _case("keep the largest", KeepLargest, rows, "k is a share of the width; scattered back by index"),
    _case("argmax", ArgMax, rows, "a channel's number is the answer"),
    _case("winner's code", Winner, rows, "a channel's number looks up a table"),
    _case("softmax over channels", Softmax, rows, "a masked zero counts as one in the sum"),
    _case("fixed slice", FixedSlice, rows, "x[:, :7] moves on to other channels"),
    _case("every second", EverySecond, rows, "a stride over the channels"),
    _case("last channel", LastChannel, rows, "x[:, -1:] is another channel when the last goes"),
    _case("split sizes in code", SplitSizes, rows, "[4, 12] cannot follow"),
    _case("split sizes in a list", SplitAttributes, rows, "[4, 12] is an attribute that could follow"),
    _case("index_select", IndexSelect, rows, "constant indices, one of them twice"),
    _case("permuted by a buffer", PermuteChannels, rows, "indices in a buffer, all of which are used"),
    _case("gather", Gather, rows, "constant indices expanded over the batch"),
    _case("boolean index", BooleanIndex, rows, "a mask of channels in a buffer"),
    _case("masked select", MaskedSelect, rows, "how many channels are live depends on the data"),
    _case("where by index", WhereIndex, rows, "even and odd channels differ, and exp(0) is one"),
    _case("loop over channels", PerChannelLoop, rows, "a Python loop with the channel's number as a factor"),
    _case("padded channels", PadChannels, images, "channels meet others by an offset computed from widths"),
    _case("conv over channels", ConvOverChannels, images, "channels are a spatial dimension"),
    _case("local response norm", LocalResponse, images, "each channel is divided by its neighbours"),
    _case("windows over channels", WindowsOverChannels, rows, "overlapping windows along the channels"),
    _case("pool over channels", PoolOverChannels, rows, "bins of channels by position"),
    _case("maxout", Maxout, rows, "groups of channels by position, and max is not neutral to zero"),
    _case("resize over channels", Resize, rows, "interpolates between channels"),
    _case("fourier over channels", Fourier, rows, "every output from every channel and its place"),
    _case("complex pairs", ComplexPairs, rows, "neighbours are one number; angles from the place"),
    _case("hash of channels", HashEmbedding, rows, "bits by the channel's place"),
    # Number of the channels.
    _case("divided by the width", OverWidth, rows, "x.shape[1] as a value"),
    _case("divided by the only width", OnlyOverWidth, rows, "x.shape[1] as a value, and no other layer to prune"),
    _case("times root of the width", TimesRoot, rows, "x.size(-1) as a value"),
    _case("equalised learning rate", equalised, rows, "weight.shape[1] as a value"),
    _case("arange of the width", ChannelConstant, rows, "a constant made for the width at hand"),
    _case("constant of an attribute", ConstantOfAttribute, rows, "repairing the attribute makes another constant"),
    *(_case(f"{how} over channels", partial(Scalars, how), rows, "reduces over the channels") for how in REDUCTIONS),
    _case("spatial attention", SpatialAttention, images, "CBAM: mean and maximum over the channels"),
    _case("pixel norm", PixelNorm, images, "mean square over the channels"),
    _case("functional layer norm", FunctionalNorm, rows, "a norm of fixed shape and one of the shape at hand"),
    _case("standardised rows", Correlation, rows, "a layer norm by hand"),
    _case("one group", OneGroup, images, "GroupNorm(1, C) has everyone's statistics"),
    _case("uneven groups", UnevenGroups, images, "six groups of a norm, four of a convolution", NOT_REFUSED),
    _case("softmaxed parameter", SoftmaxedParameter, rows, "the shares of the others grow when one goes"),
    _case("binary weights", BinaryWeights, rows, "one mean over the whole weight"),
    _case("fake quantised weights", FakeQuantised, rows, "one maximum over the whole weight"),
    # Attention.
    _case("default scale", DefaultScale, vectors, "the scale is the head's width at run time", NOT_REFUSED),
    _case("alibi", Alibi, vectors, "slopes from the number of heads"),
    _case("absorbed heads", AbsorbedHeads, vectors, "view(b, -1, 4, 8) turns lost heads into lost tokens"),
    _case("stream width", StreamWidth, vectors, "heads are shares of the stream's width"),
    _case("heads inside", HeadsInside, vectors, "view(heads, -1) then chunk: either may absorb"),
    _case("talking heads", TalkingHeads, vectors, "heads are rows of a weight"),
    _case("channel attention", ChannelAttention, vectors, "softmax over a head's width"),
    _case("linear attention", LinearAttention, vectors, "elu(0) + 1 is one"),
    _case("normed heads", NormedHeads, vectors, "one norm for all heads"),
    _case("key cache", KeyCache, vectors, "keys and values pass through a buffer's slices"),
    # What one recording does not see.
    _case("branch with other layers", BranchLayers, signed_rows, "one branch's layer is not seen"),
    _case("branch with another order", BranchLayout, signed_rows, "one branch's order is not seen"),
    _case("branch on the batch", BranchOnBatch, batches_of_two_sizes, "no operation tells of the branch"),
    _case("shut gate", ShutGate, signed_rows, "zero at even seeds: comparing outputs sees nothing"),
    _case("item-driven slice", ItemSlice, rows, "a slice at a place from the data"),
    _case("early exit", EarlyExit, signed_rows, "the deeper layers run for some inputs only"),
    _case("routed rows", RoutedRows, rows, "an expert without rows is not seen"),
    _case("auxiliary head", AuxiliaryHead, rows, "a layer that only training runs"),
    _case("training shuffles", TrainingLayout, rows, "an order that only training has"),
    _case("unused layer", UnusedLayer, rows, "a layer of the hidden width that nothing runs"),
    _case("layer in a list", HiddenList, rows, "weights that are no parameters of the model"),
    _case("norm in a dict", HiddenDict, rows, "scales and statistics that are none of the model"),
    _case("plain tensor", PlainTensor, rows, "one number per channel, neither parameter nor buffer"),
    _case("global tensor", GlobalTensor, rows, "one number per channel, outside the model"),
    _case("plain list", PlainList, rows, "one Python number per channel"),
    _case("blur", Blur, images, "a filter per channel in a buffer, groups in an attribute"),
    _case("numpy", Numpy, rows, "leaves PyTorch and comes back"),
    _case("numpy in another order", NumpyOrder, rows, "comes back reversed: same shape, no trace"),
    _case("tolist", ToList, rows, "comes back as numbers of fixed count"),
    _case("detached weight", DetachedWeight, rows, ".data and .detach() are other tensors"),
    _case("scripted part", Scripted, rows, "TorchScript in the middle"),
    _case("checkpoint", Checkpointed, rows, "activation checkpointing", NOT_REFUSED),
    _case("straight-through function", StraightThrough, rows, "a custom function that is elementwise"),
    _case("custom function", CustomFunction, rows, "a custom function over the channels"),
    _case("vmap", Mapped, rows, "batched tensors hide a dimension"),
    _case("functional call", Functional, rows, "other tensors in place of the parameters"),
    _case("hook", Hooked, rows, "a hook mixes the channels"),
    _case("asserted width", ShapeAssert, rows, "raises at any other width"),
    _case("catches errors", CatchesErrors, rows, "does something else when the shapes do not fit"),
    _case("branch on the width", WidthBranch, rows, "another function below 16 channels"),
    # Memory and randomness.
    _case("buffer slice", BufferSlice, rows, "hidden values are written into a buffer and read back"),
    _case("canvas", Canvas, rows, "written into zeros at fixed places"),
    _case("interleaved", Interleaved, rows, "written into an empty tensor with a stride"),
    _case("through a view", ThroughView, rows, "a view is changed, the tensor is read; one channel overwritten"),
    _case("swapped in place", SwapInPlace, rows, "index_put of two channels"),
    _case("index_add", Accumulated, rows, "channels fall into slots by number"),
    _case("moving mean", MovingMean, rows, "its buffer changes with every call"),
    _case("counter", Counter, rows, "its order of channels changes with every call"),
    _case("remembers", Remembers, rows, "the last call's hidden values, of the old width, in an attribute"),
    _case("rebinds a buffer", Rebinds, rows, "a buffer of fixed width is made anew with every call"),
    _case("hidden noise", HiddenNoise, rows, "fewer neurons draw other noise", NOT_PRUNED),
    _case("output noise", OutputNoise, rows, "the same noise for any width, given the seed"),
    _case("dropout always", AlwaysDropout, rows, "fewer neurons draw other masks", NOT_PRUNED),
    _case("channel dropout", ChannelDropout, images, "does nothing in evaluation", PRUNED),
    # Shapes.
    _case("fixed reshape", FixedReshape, rows, "reshape(-1, 4, 4)"),
    _case("absorbed rows", AbsorbedRows, rows, "reshape(-1, 16) turns lost neurons into lost rows"),
    _case("batch and channels", BatchAndChannels, images, "one dimension holds both"),
    _case("mixer", ChannelsAsTokens, vectors, "tokens of fixed number as features", PRUNED),
    _case("channels in space", ChannelsInSpace, images, "channels are convolved across"),
    _case("unflatten", Unflattened, rows, "a module with sizes, and one layer for both halves"),
    _case("unfolded conv", UnfoldedConv, images, "a convolution by patches"),
    _case("fold", Folded, images, "nine channels are one"),
    _case("kron", Kron, rows, "one neuron is two columns, with different factors"),
    _case("tile", Tiled, rows, "one neuron is three columns"),
    _case("repeat each", RepeatedEach, rows, "one neuron is two neighbouring columns"),
    _case("tile to a width", TiledToWidth, rows, "repeats wrap around at another place"),
    _case("stack and select", StackSelect, rows, "three producers, one of them picked"),
    _case("stack beside channels", ChannelStack, rows, "columns of two producers alternate"),
    _case("two shapes", TwoShapes, images, "layers called at several shapes", PRUNED),
    _case("two widths", TwoWidths, rows, "a weight used whole and in part"),
    _case("broadcast of one", Broadcast, rows, "one neuron stretched to sixteen by a fixed number"),
    _case("crelu, flipped", CRelu, rows, "a neuron is column i and column 31 - i"),
    # Weights.
    _case("tied autoencoder", Autoencoder, rows, "a weight and its transpose"),
    _case("two roles", TwoRoles, rows, "rows, columns and diagonal of one weight go together"),
    _case("conv as linear", ConvAsLinear, images, "one weight in two kinds of layer"),
    _case("shared storage", SharedStorage, rows, "two parameters on one memory"),
    _case("flat parameter", FlatParameter, rows, "three weights in one vector"),
    _case("joined weights", JoinedWeights, rows, "weights concatenated before use"),
    _case("low rank", LowRank, rows, "a weight that is a sum with a product"),
    _case("hypernetwork", HyperNetwork, rows, "one layer's rows are another's weight"),
    _case("dynamic conv", DynamicConv, images, "batch times channels, groups of the batch"),
    _case("batched experts", BatchedExperts, rows, "weights of three dimensions, a transposed softmax"),
    _case("mask buffer", MaskBuffer, rows, "a buffer of the weight's shape"),
    _case("masked by torch", pruned_by_torch, rows, "weight_orig and weight_mask by hooks"),
    _case("triangular weight", CausalLinear, rows, "which entries count depends on their place"),
    _case("symmetric weight", SymmetricWeight, rows, "rows and columns of one weight added"),
    _case("inverse of a weight", InverseWeight, rows, "zero rows make it singular"),
    _case("spectral norm, hooks", partial(spectral, old_spectral_norm), images, "u, v and the sum over all"),
    _case("spectral norm, parametrised", partial(spectral, new_spectral_norm), images, "u, v and the sum over all"),
    _case("orthogonal weight", orthogonal, rows, "the weight is a function of all of another"),
    _case("max norm", MaxNorm, ids, "an embedding that changes itself at look-up"),
    _case("one norm twice", DoubleLayer, rows, "two producers coupled by a shared norm", PRUNED),
    _case("lstm alone", partial(lone_rnn, nn.LSTM), vectors, "its width is the only one", NOT_REFUSED),
    _case("gru alone", partial(lone_rnn, nn.GRU), vectors, "its width is the only one", NOT_REFUSED),
    _case("rnn alone", partial(lone_rnn, nn.RNN), vectors, "its width is the only one", NOT_REFUSED),
    _case("lstm with projection", partial(lone_rnn, nn.LSTM, proj_size=8), vectors, "two widths in one layer"),
    # Products of channels.
    _case("outer product", Outer, rows, "column 16 i + j goes with neurons i and j"),
    _case("pairs", UpperPairs, rows, "a triangle of pairs by index"),
    _case("gram", Gram, images, "pairs of channels, divided by their number"),
    _case("gram, plain", GramPlain, images, "pairs of channels by einsum"),
    _case("trace", Trace, rows, "a fixed square of channels, and its diagonal"),
    _case("bilinear", BilinearLayer, rows, "a weight of three dimensions, two inputs"),
    _case("cosine similarity", Cosine, rows, "zero channels are neutral; prototypes lose columns"),
    _case("distances", Distances, rows, "zero channels are neutral; prototypes lose columns"),
    _case("vector quantisation", Quantiser, rows, "the best of five codes, in place of the hidden vector"),
    # Inputs and outputs.
    _case("nested outputs", Nested, rows, "containers in containers, one of them a dataclass", PRUNED),
    _case("returns all hidden values", ReturnsHidden, rows, "the outputs' width is the hidden width", NOT_PRUNED),
    _case("returns one hidden layer", ReturnsSome, rows, "one of two hidden layers is an output", NOT_REFUSED),
    _case("returns a width", ReturnsWidth, rows, "a width and a channel's number are outputs"),
    _case("input as the stream", InputStream, rows, "the caller fixes the stream's width", PRUNED),
    _case("changes its input", InPlaceInput, rows, "the caller's tensor is clamped in place"),
    _case("all widths alike", OutputOfStack, sixteen, "batch, input, hidden and output are all 16", PRUNED),
)

UNSTEADY = frozenset({"moving mean", "counter", "remembers", "hidden noise", "output noise", "dropout always"})
"""Names of the cases whose network answers differently from call to call."""
