"""What the sparse kernels are compared with: dense products in float64, and weights with many kinds of zeros."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from secateur.sparse import Bitmask, Convolution, Csr, Panelled
from secateur.sparse.formats import Weight
from secateur.sparse.library import ACTIVATIONS

TOLERANCE = 1e-5
"""Of an output, relative to the sum of the magnitudes of its terms."""

BLOCKS = ((1, 1), (4, 1), (1, 4))


def sparse(rows: int, columns: int, density: float, seed: int) -> Tensor:
    """A weight at a density; every third one has rows and columns without any."""
    generator = torch.Generator().manual_seed(seed)
    there = torch.rand(rows, columns, generator=generator) < density
    if seed % 3 == 0:
        there &= torch.rand(rows, 1, generator=generator) < 0.5
        there &= torch.rand(1, columns, generator=generator) < 0.8
    return torch.where(there, torch.randn(rows, columns, generator=generator), torch.zeros(()))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 + seed))


def activated(x: Tensor, activation: str) -> Tensor:
    return {
        "none": lambda: x,
        "relu": lambda: F.relu(x),
        "relu6": lambda: F.relu6(x),
        "gelu": lambda: F.gelu(x),
        "gelu_tanh": lambda: F.gelu(x, approximate="tanh"),
        "silu": lambda: F.silu(x),
    }[activation]()


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> Tensor:
    """In float64, term by term: no library may skip a zero that meets an infinity."""
    out = (x.double().unsqueeze(-2) * weight.double()).sum(-1)
    for term in (bias, residual):
        out = out if term is None else out + term.double()
    return activated(out, activation)


def dense_conv2d(
    x: Tensor, weight: Tensor, how: Convolution, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:
    top, left, bottom, right = how.padding
    padded = F.pad(x.double(), (left, right, top, bottom))
    groups = x.shape[1] // max(weight.shape[1], 1)
    out = F.conv2d(padded, weight.double(), None, how.stride, 0, how.dilation, groups)
    out = out if bias is None else out + bias.double().view(-1, 1, 1)
    return activated(out if residual is None else out + residual.double(), activation)


def assert_close(got: Tensor, expected: Tensor, sizes: Tensor) -> None:
    """Equal shapes, NaN and infinities in the same places, and all else within the tolerance of ``sizes``."""
    assert got.dtype == torch.float32
    assert got.shape == expected.shape
    assert torch.equal(got.isnan(), expected.isnan())
    infinite = expected.isinf()
    assert torch.equal(got.double()[infinite], expected[infinite])
    finite = expected.isfinite()
    bound = TOLERANCE * (sizes.double().broadcast_to(expected.shape)[finite] + expected[finite].abs()) + 1e-30
    assert bool(((got.double()[finite] - expected[finite]).abs() <= bound).all())


def linear_sizes(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    terms = (None if t is None else t.abs() for t in (bias, residual))
    return dense_linear(x.abs(), weight.abs(), *terms, "none")


def pack(kind: str, weight: Tensor, block: tuple[int, int], panel: int, parts: int) -> Weight:
    if kind != "panelled":
        return (Bitmask if kind == "bitmask" else Csr).pack(weight)
    return Panelled.pack(weight, block=block, panel=panel * block[1], parts=parts)


kinds = st.sampled_from(["panelled", "bitmask", "csr"])
blocks = st.sampled_from(BLOCKS)
panels = st.sampled_from([1, 4, 32, 128, 256, 300])
parts = st.sampled_from([1, 2, 4, 9])
densities = st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0])
activations = st.sampled_from(ACTIVATIONS)
seeds = st.integers(0, 999)
