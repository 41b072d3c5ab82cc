"""More small networks for structural pruning, each made to get a wrong result past the proof.

Hidden neurons are multiplied by their number in many of them: cutting some out then gives another function, which no
label tells of. What differs is where the mistake hides: beside a huge output, in a buffer, behind a zero, in a mode,
in a branch or in a batch size that the example does not have.
"""

# mypy: no-warn-return-any, allow-untyped-calls

from __future__ import annotations

import math
import random
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.modules import (
    NOT_PRUNED,
    NOT_REFUSED,
    PRUNED,
    Case,
    Rows,
    _case,
    batches_of_two_sizes,
    images,
    normal,
    rows,
    vectors,
)

# --- where a mistake hides -------------------------------------------------------------------------------------------


class Times(Rows):
    """The hidden neurons times their number: the size of a dimension as a value."""

    def hidden(self, x: Tensor) -> Tensor:
        h = torch.relu(self.second(torch.relu(self.first(x))))
        return h * h.shape[1]


class MaskedScores(Times):
    """One score is always the lowest float, as invalid actions and padded tokens are."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.hidden(x))
        banned = torch.zeros_like(y, dtype=torch.bool)
        banned[:, 0] = True
        return y.masked_fill(banned, torch.finfo(torch.float32).min)


class HugeOutput(Times):
    """Beside another output of 1e15."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.last(self.hidden(x)), x.sum(1) * 1e15


class NumberOutput(Times):
    """As a Python number."""

    def forward(self, x: Tensor) -> tuple[Tensor, float]:
        y = self.last(self.hidden(x))
        return y * 0 + x[:, :5], float(y.sum())


class ThroughBuffer(Times):
    """Written to a buffer and read back."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(8, 16))

    def forward(self, x: Tensor) -> Tensor:
        self.rows[: x.shape[0]] = self.hidden(x)
        return self.last(self.rows[: x.shape[0]])


class OutputBuffer(Times):
    """The output is read from a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("answer", torch.zeros(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        self.answer[: x.shape[0]] = self.last(self.hidden(x))
        return self.answer[: x.shape[0]].clone()


class ReZero(Times):
    """Behind a factor that starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.side, self.alpha = nn.Linear(12, 5), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.side(x) + self.alpha * self.last(self.hidden(x))


class TinyOutput(Times):
    """Answers in picometres."""

    def __init__(self, unit: float) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.hidden(x)) * self.unit


class NotANumber(Times):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.hidden(x)).abs().neg().sub(1).log()


class NoBias(nn.Module):
    """Zeros in, zeros out, whatever the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 16, bias=False), nn.Linear(16, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return self.b(h) * h.shape[1]


class OnesCounted(Rows):
    """The width as a sum of ones."""

    def mix(self, h: Tensor) -> Tensor:
        return h * torch.ones_like(h).sum(1, keepdim=True)


class HandSoftmax(Rows):
    """A masked neuron counts as one in the sum."""

    def mix(self, h: Tensor) -> Tensor:
        return h.exp() / h.exp().sum(1, keepdim=True)


def zeros(seed: int) -> tuple[Any, ...]:
    return (normal(seed, 3, 12) * (seed > 0),)


# --- modes, branches and shapes that the example does not have -------------------------------------------------------


class TrainingScale(Rows):
    def mix(self, h: Tensor) -> Tensor:
        return h * h.shape[1] if self.training else h


class TrainingFlip(Rows):
    def mix(self, h: Tensor) -> Tensor:
        return h.flip(1) if self.training else h


class TrainingNoise(Rows):
    """Every kind of chance, none of it in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.slopes = nn.Sequential(nn.RReLU(), nn.Dropout(0.2), nn.AlphaDropout(0.1), nn.FeatureAlphaDropout(0.1))

    def mix(self, h: Tensor) -> Tensor:
        h = self.slopes(h)
        if self.training:
            h = h + 0.1 * torch.randn_like(h) + torch.rand(h.shape[1]) + torch.empty_like(h).uniform_(-1, 1)
            h = h * torch.bernoulli(torch.full((h.shape[0], 1), 0.5)) * torch.randint(1, 3, (h.shape[0], 1))
        return h


class BranchOnOne(Rows):
    """Another order for a single row, and the example has three."""

    def mix(self, h: Tensor) -> Tensor:
        return h.flip(1) if h.shape[0] == 1 else h


class NestedBranch(Rows):
    """A layer behind two conditions."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.relu(self.second(torch.relu(self.first(x))))
        if x[:, 0].mean() > 0:
            return self.last(z)
        return self.other(z) if x[:, 1].mean() > 0 else self.last(z)


class FarThreshold(NestedBranch):
    """A number read from a tensor, compared with one far away."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.relu(self.second(torch.relu(self.first(x))))
        return self.other(z) if x.abs().mean().item() > 100 else self.last(z)


class ManyExits(nn.Module):
    """Ten exits, of which the example takes one."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(12, 32)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(10))
        self.heads = nn.ModuleList(nn.Linear(32, 5) for _ in range(10))

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        for number, (layer, head) in enumerate(zip(self.layers, self.heads, strict=True)):
            h = torch.relu(layer(h))
            if (x[:, number] > 1).all():
                return head(h)
        return self.heads[-1](h)


def exits(seed: int) -> tuple[Any, ...]:
    """No exit at seed 0, the ninth at seed 1, the third at seed 2."""
    x = normal(seed, 3, 12).clamp(max=0.9)
    x[:, {0: 11, 1: 8, 2: 2}[seed]] = 2.0
    return (x,)


# --- traces of the recordings ----------------------------------------------------------------------------------------


class Notes:
    """State that is neither in a module nor in a container of one."""

    def __init__(self) -> None:
        self.last: Tensor | None = None
        self.table: dict[str, dict[str, list[int]]] = {"calls": {"rows": []}}
        self.count = [torch.zeros(1)]


class RemembersInObject(Rows):
    def __init__(self) -> None:
        super().__init__()
        self.notes = Notes()

    def mix(self, h: Tensor) -> Tensor:
        last, self.notes.last = self.notes.last, h.detach()
        self.notes.table["calls"]["rows"].append(len(h))
        self.notes.count[0].add_(1)
        return h if last is None or last.shape[0] != h.shape[0] else h + 0 * last


class AddsToInput(Rows):
    def forward(self, x: Tensor) -> Tensor:
        x.add_(1.0)
        return super().forward(x)


@lru_cache
def ramp(many: int) -> Tensor:
    return torch.linspace(0, 1, many)


class CachedByBatch(Rows):
    """A table of the default dtype that outlives the model, one for every batch size."""

    def mix(self, h: Tensor) -> Tensor:
        return h + ramp(h.shape[0])[:, None]


class DrawsOutside(Rows):
    """Python's and NumPy's generators move with every call."""

    def forward(self, x: Tensor) -> Tensor:
        random.random()
        np.random.rand()
        return super().forward(x)


# --- kinds of numbers and memory -------------------------------------------------------------------------------------


class ComplexWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(16, 12, dtype=torch.complex64) * 0.3)
        self.b = nn.Parameter(torch.randn(5, 16, dtype=torch.complex64) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return (torch.exp(x.to(torch.complex64) @ self.a.t()) @ self.b.t()).abs()


class Bits(Rows):
    def mix(self, h: Tensor) -> Tensor:
        return (h.view(torch.int32) & ~0xFF).view(torch.float32)


class PairsAsComplex(Rows):
    def mix(self, h: Tensor) -> Tensor:
        return torch.view_as_real(h.view(torch.complex64) * 2j).flatten(1)


class SparseBuffer(Rows):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mixing", torch.rand(12, 12).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.sparse.mm(self.mixing, x.t()).t())


class StridedView(Rows):
    """Read back through memory, at another offset."""

    def mix(self, h: Tensor) -> Tensor:
        return torch.cat([h, h], 1).as_strided(h.shape, (2 * h.shape[1], 1), 3)


class Compiled(Rows):
    def __init__(self) -> None:
        super().__init__()
        self.second = torch.compile(self.second, backend="eager")


class Magic(Rows):
    """A size behind ``__getattr__``."""

    def __getattr__(self, name: str) -> Any:
        return self.second.weight.shape[0] if name == "magic" else super().__getattr__(name)

    def mix(self, h: Tensor) -> Tensor:
        return h * self.magic


class PatchedForward(Rows):
    def __init__(self) -> None:
        super().__init__()
        inner = self.second.forward
        self.second.forward = lambda x: inner(x) * self.second.out_features


class Settings:
    """A width, and what follows from it by a property."""

    def __init__(self, width: int) -> None:
        self.width = width

    @property
    def total(self) -> int:
        return self.width

    @property
    def constant(self) -> int:
        return 16


class BehindProperty(Rows):
    """The width is read through a property of an object, which works it out."""

    def __init__(self) -> None:
        super().__init__()
        self.settings = Settings(16)

    def mix(self, h: Tensor) -> Tensor:
        return h.reshape(len(h), self.settings.total)


class ConstantProperty(BehindProperty):
    """A property that can be read and not set, and says a constant."""

    def mix(self, h: Tensor) -> Tensor:
        return h.reshape(len(h), self.settings.constant)


class OneOf(Rows):
    """One of the 16 as a tensor that keeps its dimension, and all of them."""

    after = 17

    def __init__(self, start: int) -> None:
        super().__init__()
        self.start = start

    def mix(self, h: Tensor) -> Tensor:
        one = h[:, self.start : self.start + 1 or None]
        return torch.cat([one.squeeze(1)[:, None], h], 1)


class Shuffled(Rows):
    """The same memory read by columns."""

    def mix(self, h: Tensor) -> Tensor:
        n, width = h.shape
        return h.contiguous().as_strided((n, width), (1, n))


class Renormed(Rows):
    """Rows are scaled down to a largest norm."""

    def mix(self, h: Tensor) -> Tensor:
        return torch.renorm(h, 2, -2, 0.5)


# --- layers that the first table has not -----------------------------------------------------------------------------


def between(*layers: nn.Module, width: int = 16) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)
    )


class TemporalShift(nn.Module):
    """A quarter of the channels moves down, a quarter up."""

    def forward(self, x: Tensor) -> Tensor:
        part, out = x.shape[1] // 4, torch.zeros_like(x)
        out[:, :part, 1:] = x[:, :part, :-1]
        out[:, part : 2 * part, :-1] = x[:, part : 2 * part, 1:]
        out[:, 2 * part :] = x[:, 2 * part :]
        return out


class SpatialTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.where = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        grid = F.affine_grid(self.where(x.mean((2, 3))).view(-1, 2, 3), list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)


class PaddedResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 24, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + F.pad(x, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))


class LearnedState(nn.Module):
    """The first hidden state is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.rnn, self.out = nn.Linear(12, 16), nn.LSTM(16, 24), nn.Linear(24, 5)
        self.h, self.c = nn.Parameter(torch.randn(1, 1, 24)), nn.Parameter(torch.randn(1, 1, 24))

    def forward(self, x: Tensor) -> Tensor:
        h, c = (s.expand(-1, len(x), -1).contiguous() for s in (self.h, self.c))
        return self.out(self.rnn(self.inp(x).transpose(0, 1), (h, c))[1][0][0])


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.rnn, self.out = nn.Linear(12, 16), nn.GRU(16, 24, batch_first=True), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(self.inp(x), torch.full((len(x),), 5), batch_first=True)
        return self.out(nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0][:, -1])


class AttentionExtras(nn.Module):
    """Learned keys and values, and zeros, beside those of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(12, 32)
        self.mix = nn.MultiheadAttention(32, 4, batch_first=True, add_bias_kv=True, add_zero_attn=True)
        self.out = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        return self.out(self.mix(h, h, h, need_weights=False)[0].mean(1))


class ScaledTie(nn.Module):
    """A tied embedding, scaled by the root of a width that is read at run time."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mlp = nn.Embedding(11, 32), nn.Linear(32, 32)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids) * math.sqrt(self.embed.embedding_dim)
        return (h + torch.relu(self.mlp(h))) @ self.embed.weight.t()


def some_ids(seed: int) -> tuple[Any, ...]:
    return (torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(seed)),)


MORE: tuple[Case, ...] = (
    _case("masked scores", MaskedScores, rows, "-3e38 beside the scores made any difference look small", NOT_PRUNED),
    _case("a huge output beside", HugeOutput, rows, "1e15 beside it made any difference look small", NOT_PRUNED),
    _case("a number as output", NumberOutput, rows, "not a tensor", NOT_PRUNED),
    _case("through a buffer", ThroughBuffer, rows, "a proof that loses the write compares zeros", NOT_PRUNED),
    _case("output from a buffer", OutputBuffer, rows, "a proof that loses the write compares zeros"),
    _case("rezero", ReZero, rows, "a factor of zero hides the branch", NOT_PRUNED),
    _case("tiny outputs", lambda: TinyOutput(1e-12), rows, "any difference is small", NOT_PRUNED),
    _case("small outputs", lambda: TinyOutput(1e-8), rows, "any difference is small", NOT_PRUNED),
    _case("not a number", NotANumber, rows, "NaN equals NaN", NOT_PRUNED),
    _case("zeros as example", NoBias, zeros, "zeros in, zeros out", NOT_PRUNED),
    _case("ones counted", OnesCounted, rows, "a sum is no statistic over what is kept", NOT_PRUNED),
    _case("softmax by hand", HandSoftmax, rows, "a masked zero counts as one in the sum", NOT_PRUNED),
    _case("training scale", TrainingScale, rows, "the width as a value, in training only", NOT_PRUNED),
    _case("training flip", TrainingFlip, rows, "an order that only training has", PRUNED),
    _case("training noise", TrainingNoise, rows, "noise in training must fix nothing", PRUNED),
    _case("branch on one row", BranchOnOne, batches_of_two_sizes, "another order for a single row"),
    _case("nested branch", NestedBranch, rows, "a layer behind two conditions", PRUNED),
    _case("far threshold", FarThreshold, rows, "a number that no sign change brings over the threshold", PRUNED),
    _case("many exits", ManyExits, exits, "more branches than are tried by default", PRUNED),
    _case("remembers in an object", RemembersInObject, rows, "state where no module keeps it", PRUNED),
    _case("adds to its input", AddsToInput, rows, "the caller's tensor moves with every call", PRUNED),
    _case("cached by batch size", CachedByBatch, rows, "a table made in float64 stays float64", PRUNED),
    _case("draws outside", DrawsOutside, rows, "generators that are not PyTorch's", PRUNED),
    _case("complex weights", ComplexWeights, rows, "neither float nor integer"),
    _case("bits", Bits, rows, "another dtype for the same memory"),
    _case("pairs as complex numbers", PairsAsComplex, rows, "half as many of another dtype"),
    _case("sparse buffer", SparseBuffer, rows, "no storage", NOT_REFUSED),
    _case("strided view", StridedView, rows, "an offset into memory"),
    _case("compiled part", Compiled, rows, "guards on shapes", NOT_REFUSED),
    _case("magic attribute", Magic, rows, "a size behind __getattr__", NOT_PRUNED),
    _case("patched forward", PatchedForward, rows, "a closure reads a size", NOT_PRUNED),
    _case("temporal shift", lambda: between(TemporalShift()), images, "slices by shares of the width", PRUNED),
    _case("spatial transformer", lambda: between(SpatialTransformer()), images, "positions from channels", PRUNED),
    _case("padded residual", lambda: between(PaddedResidual(), width=24), images, "channels padded by widths"),
    _case(
        "transposed depthwise, multiplier 2",
        lambda: between(nn.ConvTranspose2d(16, 32, 3, groups=16), width=32),
        images,
        "two outputs per group",
        NOT_REFUSED,
    ),
    _case(
        "circular",
        lambda: between(nn.Conv2d(16, 16, 3, padding="same", padding_mode="circular")),
        images,
        "padded by code",
        PRUNED,
    ),
    _case("learned state", LearnedState, vectors, "parameters of the hidden width, expanded", PRUNED),
    _case("packed sequence", Packed, vectors, "rows and steps in one dimension", NOT_REFUSED),
    _case("attention extras", AttentionExtras, vectors, "rows joined to keys and values", NOT_REFUSED),
    _case("size behind a property", BehindProperty, rows, "the property cannot be set, what it reads can", PRUNED),
    _case("constant property", ConstantProperty, rows, "a size that cannot be set", NOT_PRUNED),
    _case("first of all", lambda: OneOf(0), rows, "a dimension of size 1 in a reshape", PRUNED),
    _case("last of all", lambda: OneOf(-1), rows, "a dimension of size 1 in a reshape", PRUNED),
    _case("one of the middle", lambda: OneOf(5), rows, "its place changes with what goes before it", PRUNED),
    _case("read by columns", Shuffled, rows, "another order of the same shape", PRUNED),
    _case("renormed", Renormed, rows, "the norm runs over the other dimensions", PRUNED),
    _case("scaled tie", ScaledTie, some_ids, "the root of the width", NOT_PRUNED),
)
