"""Products and convolutions on every instruction set, beside dense ones in float64."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from dense_products import (
    activated,
    activations,
    assert_close,
    blocks,
    dense_conv2d,
    dense_linear,
    densities,
    kinds,
    linear_sizes,
    numbers,
    pack,
    panels,
    parts,
    seeds,
    sparse,
)
from secateur.errors import SecateurError, SparseError, WeightError
from secateur.sparse import Bitmask, Convolution, Panelled, conv2d, isa, isas, linear, max_pool2d, reason, use_isa
from secateur.sparse.convolutions import check_depthwise, depthwise2d
from secateur.sparse.images import Blocked

pytestmark = pytest.mark.skipif(bool(reason()), reason=reason())

ISAS = () if reason() else isas()


@pytest.fixture(scope="module", params=ISAS)
def each_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = isa()
    use_isa(request.param)
    yield request.param
    use_isa(before)


@settings(max_examples=120, deadline=None)
@given(
    rows=st.integers(0, 40),
    columns=st.integers(0, 150),
    count=st.integers(0, 70),
    density=densities,
    kind=kinds,
    block=blocks,
    panel=panels,
    pieces=parts,
    tile=st.sampled_from([0, 1, 4, 8, 16, 32, 64, 128, 256]),
    activation=activations,
    feature_major=st.booleans(),
    extras=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
    seed=seeds,
)
def test_linear_is_the_dense_layer(
    each_isa: str,
    rows: int,
    columns: int,
    count: int,
    density: float,
    kind: str,
    block: tuple[int, int],
    panel: int,
    pieces: int,
    tile: int,
    activation: str,
    feature_major: bool,
    extras: tuple[bool, bool, bool, bool],
    seed: int,
) -> None:
    weight = sparse(rows, columns, density, seed)
    packed = pack(kind, weight, block, panel, pieces)
    with_bias, with_residual, turned, poisoned = extras
    x = numbers(columns, count, seed=seed).t() if turned else numbers(count, columns, seed=seed)
    if poisoned and x.numel():
        if kind == "csr" and activation == "gelu":  # torch's own gelu of infinity is NaN in float32
            activation = "silu"
        x[seed % count, seed % columns] = (math.nan, math.inf, -math.inf)[seed % 3]
    bias = numbers(rows, seed=1) if with_bias else None
    residual = numbers(count, rows, seed=2) if with_residual else None
    outs = [
        linear(x, packed, bias, residual, activation, tile=tile, threads=threads, feature_major=feature_major)
        for threads in (1, 3)
    ]
    expected = dense_linear(x, weight, bias, residual, activation)
    assert_close(outs[0], expected, linear_sizes(x, weight, bias, residual))
    assert torch.equal(outs[0].view(torch.int32), outs[1].view(torch.int32))
    if feature_major and kind != "bitmask" and count > 1 and rows > 1:
        assert outs[0].stride() == (1, count)


@pytest.mark.parametrize("count", [64, 70, 200])
def test_more_rows_and_columns_than_are_laid_out_at_once(each_isa: str, count: int) -> None:
    weight = sparse(2100, 4200, 0.01, seed=count)
    packed = Panelled.pack(weight, panel=128, parts=3)
    x = numbers(count, 4200, seed=1)
    x[count // 2, 3000] = 0.0
    expected, sizes = x.double() @ weight.double().t(), x.double().abs() @ weight.double().abs().t()
    x[count // 2, 3000] = math.inf  # long before the last columns
    expected[count // 2] += math.inf * weight[:, 3000].double()
    outs = [linear(x, packed, threads=threads) for threads in (1, 2, 3, 5)]
    assert_close(outs[0], expected, sizes)
    assert all(torch.equal(out.view(torch.int32), outs[0].view(torch.int32)) for out in outs)


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 12), st.integers(0, 70)),
    rows=st.integers(0, 9),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(*(st.integers(0, 3) for _ in range(4))),
    dilation=st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 40])),
    density=densities,
    block=blocks,
    panel=panels,
    tile=st.sampled_from([0, 8, 64, 128]),
    activation=activations,
    extras=st.tuples(*(st.booleans() for _ in range(6))),
    seed=seeds,
)
def test_conv2d_is_the_dense_layer(
    each_isa: str,
    sizes: tuple[int, int, int, int],
    rows: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    density: float,
    block: tuple[int, int],
    panel: int,
    tile: int,
    activation: str,
    extras: tuple[bool, ...],
    seed: int,
) -> None:
    with_bias, with_residual, poisoned, blocked_in, blocked, pointwise = extras
    how = Convolution() if pointwise else Convolution(kernel, stride, padding, dilation)
    height, width = how.output(sizes[2], sizes[3])
    weight = sparse(rows, sizes[1] * math.prod(how.kernel), density, seed)
    packed = Panelled.pack(weight, block=block, panel=panel * block[1], parts=1 + seed % 3)
    x = numbers(*sizes, seed=seed)
    if poisoned and x.numel():
        x.view(-1)[seed % x.numel()] = (math.nan, math.inf, -math.inf)[seed % 3]
    images = Blocked.of(x) if blocked_in else x
    if height < 1 or width < 1:
        with pytest.raises(SparseError, match="does not fit"):
            conv2d(images, packed, how)
        return
    shaped = weight.view(rows, sizes[1], *how.kernel)
    bias = numbers(rows, seed=1) if with_bias else None
    residual = numbers(sizes[0], rows, height, width, seed=2) if with_residual else None
    outs = []
    for threads in (1, 3):
        out = conv2d(images, packed, how, bias, residual, activation, tile=tile, threads=threads, blocked=blocked)
        outs.append(out.images() if isinstance(out, Blocked) else out)
    expected = _conv_of_zeros(x, shaped, how, bias, residual, activation)
    magnitudes = [None if t is None else t.abs() for t in (bias, residual)]
    assert_close(outs[0], expected, _conv_of_zeros(x.abs(), shaped.abs(), how, *magnitudes, "none"))
    assert torch.equal(outs[0].view(torch.int32), outs[1].view(torch.int32))


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.tuples(
        st.integers(0, 2),
        st.sampled_from([1, 2, 3, 5, 33]),
        st.integers(0, 45),
        st.sampled_from([0, 1, 3, 7, 8, 15, 40, 70]),
    ),
    multiplier=st.sampled_from([1, 1, 2, 3]),
    kernel=st.tuples(st.integers(1, 7), st.integers(1, 5)),
    stride=st.tuples(st.sampled_from([1, 1, 2, 3]), st.sampled_from([1, 1, 2, 3])),
    padding=st.tuples(*(st.integers(0, 3) for _ in range(4))),
    dilation=st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 3, 40])),
    density=densities,
    activation=activations,
    extras=st.tuples(*(st.booleans() for _ in range(7))),
    seed=seeds,
)
def test_depthwise2d_is_the_dense_layer(
    each_isa: str,
    sizes: tuple[int, int, int, int],
    multiplier: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    density: float,
    activation: str,
    extras: tuple[bool, ...],
    seed: int,
) -> None:
    with_bias, with_residual, poisoned, blocked_in, blocked, blocked_residual, turned = extras
    how = Convolution(kernel, stride, padding, dilation)
    batch, rows = sizes[0], sizes[1] * multiplier
    height, width = how.output(sizes[2], sizes[3])
    weight = sparse(rows, math.prod(kernel), density, seed).view(rows, 1, *kernel)
    x = numbers(*sizes[::-1], seed=seed).permute(3, 2, 1, 0) if turned else numbers(*sizes, seed=seed)
    for n in range(3 * poisoned if x.numel() else 0):
        at = torch.unravel_index(torch.tensor((seed + n) * 7919 % x.numel()), x.shape)
        x[at] = (math.nan, math.inf, -math.inf)[(seed + n) % 3]
    images = Blocked.of(x) if blocked_in else x
    if height < 1 or width < 1:
        with pytest.raises(SparseError, match="does not fit"):
            depthwise2d(images, weight, how)
        return
    bias = numbers(rows, seed=1) if with_bias else None
    residual = numbers(batch, rows, height, width, seed=2) if with_residual else None
    shaped = Blocked.of(residual) if residual is not None and blocked_residual else residual
    outs = []
    for threads in (1, 3):
        out = depthwise2d(images, weight, how, bias, shaped, activation, threads=threads, blocked=blocked)
        outs.append(out.images() if isinstance(out, Blocked) else out)
    expected = dense_conv2d(x, weight, how, bias, residual, activation)
    terms, added = (None if t is None else t.abs() for t in (bias, residual))
    assert_close(outs[0], expected, dense_conv2d(x.abs(), weight.abs(), how, terms, added, "none"))
    assert torch.equal(outs[0].view(torch.int32), outs[1].view(torch.int32))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 20), st.integers(1, 70)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 9)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 5])),
    padded=st.tuples(st.booleans(), st.booleans()),
    layouts=st.tuples(st.booleans(), st.booleans()),
    poisoned=st.booleans(),
    seed=seeds,
)
def test_max_pool2d_is_torchs(
    each_isa: str,
    sizes: tuple[int, int, int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padded: tuple[bool, bool],
    layouts: tuple[bool, bool],
    poisoned: bool,
    seed: int,
) -> None:
    pad = (kernel[0] // 2 * padded[0], kernel[1] // 2 * padded[1])
    how = Convolution(kernel, stride, pad * 2, dilation)
    x = numbers(*sizes, seed=seed)
    if poisoned:
        x.view(-1)[seed % x.numel()] = (math.nan, math.inf, -math.inf)[seed % 3]
    images = Blocked.of(x) if layouts[0] else x
    if min(how.output(sizes[2], sizes[3])) < 1:
        with pytest.raises(SparseError, match="does not fit"):
            max_pool2d(images, how)
        return
    expected = F.max_pool2d(x, kernel, stride, pad, dilation)
    for threads in (1, 3):
        out = max_pool2d(images, how, threads=threads, blocked=layouts[1])
        got = out.images() if isinstance(out, Blocked) else out
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def _conv_of_zeros(
    x: Tensor, weight: Tensor, how: Convolution, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:
    """torch refuses images without pixels, channels or outputs; one more of each, of zeros, changes nothing."""
    batch, rows = x.shape[0], weight.shape[0]
    height, width = how.output(x.shape[2], x.shape[3])
    top, left, bottom, right = how.padding
    grown = x.new_zeros(batch + 1, x.shape[1] + 1, x.shape[2] + top + bottom, x.shape[3] + left + right)
    grown[:batch, : x.shape[1], top : top + x.shape[2], left : left + x.shape[3]] = x
    taps = weight.new_zeros(rows + 1, x.shape[1] + 1, *how.kernel)
    taps[:rows, : x.shape[1]] = weight
    plain = Convolution(how.kernel, how.stride, (0, 0, 0, 0), how.dilation)
    out = dense_conv2d(grown, taps, plain, None, None, "none")[:batch, :rows, :height, :width]
    out = out if bias is None else out + bias.double().view(-1, 1, 1)
    return activated(out if residual is None else out + residual.double(), activation)


def strange_inputs() -> list[tuple[str, Tensor]]:
    wide = numbers(6, 40)
    return [
        ("every other column", wide[:, ::2]),
        ("every other row", numbers(12, 20)[::2]),
        ("transposed", numbers(20, 6).t()),
        ("a slice of columns", wide[:, 7:27]),
        ("a slice of a transposed matrix", numbers(40, 9).t()[:, 3:23]),
        ("one vector", numbers(20)),
        ("one vector, every other", numbers(40)[::2]),
        ("three dimensions", numbers(2, 3, 20)),
        ("three dimensions, turned", numbers(2, 20, 3).transpose(1, 2)),
        ("three dimensions, swapped", numbers(3, 2, 20).transpose(0, 1)),
        ("repeated", numbers(1, 20).expand(5, 20)),
        ("repeated in a feature", numbers(5, 1).expand(5, 20)),
        ("no vectors", numbers(0, 20)),
        ("no vectors in three dimensions", numbers(3, 0, 20)),
        ("one vector in three dimensions", numbers(1, 1, 20)),
        ("negated where it lies", torch.complex(numbers(4, 20), numbers(4, 20, seed=3)).conj().imag),
        ("not at a multiple of 16 bytes", numbers(6 * 20 + 1)[1:].view(6, 20)),
    ]


@pytest.mark.parametrize("kind", ["panelled", "bitmask", "csr"])
@pytest.mark.parametrize(("name", "x"), strange_inputs(), ids=[name for name, _ in strange_inputs()])
def test_inputs_may_lie_in_any_way(name: str, x: Tensor, kind: str) -> None:
    weight = sparse(13, 20, 0.3, 5)
    packed = pack(kind, weight, (1, 1), 8, 3)
    bias, residual = numbers(26)[::2], numbers(13, *x.shape[:-1]).movedim(0, -1)
    before = x.clone()
    for feature_major in (False, True):
        got = linear(x, packed, bias, residual, "silu", feature_major=feature_major)
        expected = dense_linear(x, weight, bias, residual, "silu")
        assert_close(got, expected, linear_sizes(x, weight, bias, residual))
    assert torch.equal(before, x)


def test_images_may_lie_in_any_way() -> None:
    weight, how = numbers(4, 3, 3, 3), Convolution((3, 3), padding=(1, 1, 1, 1))
    packed, bias = Panelled.pack(weight), numbers(8)[::2]
    plain = numbers(2, 3, 5, 6)
    images = [
        plain.contiguous(memory_format=torch.channels_last),
        numbers(2, 3, 10, 6)[:, :, ::2],
        numbers(3, 2, 5, 6).transpose(0, 1),
        numbers(1, 3, 5, 6).expand(2, 3, 5, 6),
    ]
    for x in images:
        residual = numbers(2, 4, 5, 6).contiguous(memory_format=torch.channels_last)
        expected = dense_conv2d(x, weight, how, bias, residual, "relu")
        for blocked in (False, True):
            got = conv2d(x, packed, how, bias, residual, "relu", blocked=blocked)
            got = got.images() if blocked else got
            assert_close(got, expected, dense_conv2d(x.abs(), weight.abs(), how, bias.abs(), residual.abs(), "none"))
        deep = numbers(3, 1, 3, 6).transpose(0, 3)  # of [6, 1, 3, 3]
        added = numbers(2, 5, 6, 6).permute(0, 3, 1, 2)
        expected = dense_conv2d(x, deep, how, numbers(12)[::2], added, "silu")
        sizes = dense_conv2d(x.abs(), deep.abs(), how, numbers(12)[::2].abs(), added.abs(), "none")
        for blocked in (False, True):
            got = depthwise2d(x, deep, how, numbers(12)[::2], added, "silu", blocked=blocked)
            assert_close(got.images() if blocked else got, expected, sizes)


@pytest.mark.parametrize("size", [(1, 1023), (1, 1025), (33, 32), (9, 128), (300, 7), (1200, 1), (64, 48)])
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise2d_goes_on_where_a_strip_ends(each_isa: str, size: tuple[int, int], stride: int) -> None:
    weight, how = numbers(3, 1, 3, 5), Convolution((3, 5), (stride, stride), (1, 2, 1, 2))
    x = numbers(1, 3, *(stride * n for n in size))
    expected = dense_conv2d(x, weight, how, None, None, "none")
    sizes = dense_conv2d(x.abs(), weight.abs(), how, None, None, "none")
    for blocked in (False, True):
        got = depthwise2d(Blocked.of(x) if blocked else x, weight, how, blocked=blocked)
        assert_close(got.images() if blocked else got, expected, sizes)


WEIGHT = sparse(8, 12, 0.5, 1)
HOW = Convolution((2, 2))
DEPTHWISE = numbers(3, 1, 2, 2)

REFUSED: list[tuple[str, Callable[[Panelled], object], str]] = [
    (
        "float64",
        lambda w: linear(numbers(3, 12).double(), w),
        r"the input is torch\.float64 on cpu.*\.float\(\)\.cpu\(\)",
    ),
    ("bfloat16", lambda w: linear(numbers(3, 12).bfloat16(), w), r"the input is torch\.bfloat16"),
    ("meta", lambda w: linear(numbers(3, 12).to("meta"), w), r"the input is torch\.float32 on meta.*\.cpu\(\)"),
    ("sparse", lambda w: linear(numbers(3, 12).to_sparse(), w), r"layout torch\.sparse_coo"),
    ("features", lambda w: linear(numbers(3, 11), w), r"expected inputs of 12 features, got shape \(3, 11\)"),
    ("scalar", lambda w: linear(numbers(1)[0], w), r"expected inputs of 12 features, got shape \(\)"),
    ("gradient", lambda w: linear(numbers(3, 12).requires_grad_(), w), r"no backward pass.*the input.*inference_mode"),
    ("bias of a size", lambda w: linear(numbers(3, 12), w, numbers(7)), r"expected a bias of shape \(8,\), got \(7,\)"),
    ("bias of a dtype", lambda w: linear(numbers(3, 12), w, numbers(8).half()), r"the bias is torch\.float16"),
    ("bias with a gradient", lambda w: linear(numbers(3, 12), w, numbers(8).requires_grad_()), r"the bias wants"),
    ("residual", lambda w: linear(numbers(3, 12), w, None, numbers(8)), r"residual has shape \(8,\).*\(3, 8\)"),
    ("activation", lambda w: linear(numbers(3, 12), w, activation="rellu"), r"activation is 'rellu'.*'relu'"),
    ("tile", lambda w: linear(numbers(3, 12), w, tile=24), r"tile must be a power of two up to 256.*got 24"),
    ("threads", lambda w: linear(numbers(3, 12), w, threads=0), r"threads must be a whole number of at least 1.*got 0"),
    ("threads of 64 bits", lambda w: linear(numbers(3, 12), w, threads=2**32 + 1), r"threads must be .*got 4294967297"),
    ("image of three dimensions", lambda w: conv2d(numbers(3, 5, 5), w, HOW), r"\[batch, channels, height, width\]"),
    ("channels", lambda w: conv2d(numbers(1, 4, 5, 5), w, HOW), r"expected images of 3 channels, got 4"),
    ("image of a dtype", lambda w: conv2d(numbers(1, 3, 5, 5).double(), w, HOW), r"torch\.float64"),
    ("small image", lambda w: conv2d(numbers(1, 3, 1, 5), w, HOW), r"kernel of \(2, 2\) does not fit.*\(1, 5\)"),
    ("residual image", lambda w: conv2d(numbers(1, 3, 5, 5), w, HOW, None, numbers(1, 8, 5, 5)), r"residual has shape"),
    (
        "residual vector",
        lambda w: conv2d(numbers(1, 3, 5, 5), w, HOW, None, numbers(8), blocked=True),
        r"\[batch, chan",
    ),
    (
        "blocks",
        lambda w: conv2d(Blocked(numbers(1, 1, 3, 64), 9, 9), w, HOW),
        r"have the shape \[batch, 2, channels, 64\]",
    ),
    (
        "narrow blocks",
        lambda w: conv2d(Blocked(numbers(1, 1, 3, 32), 5, 5), w, HOW),
        r"channels, 64\], got \(1, 1, 3, 32\)",
    ),
    (
        "depthwise kernel",
        lambda w: depthwise2d(numbers(1, 3, 5, 5), numbers(3, 1, 2, 3), HOW),
        r"\[outputs, 1, 2, 2\], outputs a whole multiple of 3, got shape \(3, 1, 2, 3\)",
    ),
    (
        "depthwise rows",
        lambda w: depthwise2d(numbers(1, 3, 5, 5), numbers(4, 1, 2, 2), HOW),
        r"multiple of 3, got .*\(4,",
    ),
    (
        "no depthwise rows",
        lambda w: check_depthwise(numbers(0, 1, 2, 2), 3, HOW),
        r"multiple of 3, got shape \(0, 1, 2",
    ),
    (
        "depthwise groups",
        lambda w: depthwise2d(numbers(1, 4, 5, 5), numbers(4, 2, 2, 2), HOW),
        r"got shape \(4, 2, 2, 2",
    ),
    ("depthwise vector", lambda w: depthwise2d(numbers(1, 3, 5, 5), numbers(3), HOW), r"got shape \(3,\)"),
    (
        "depthwise weight of a dtype",
        lambda w: depthwise2d(numbers(1, 3, 5, 5), DEPTHWISE.double(), HOW),
        r"torch\.float64 on cpu.*\.float\(\)\.cpu\(\)",
    ),
    (
        "depthwise weight elsewhere",
        lambda w: depthwise2d(numbers(1, 3, 5, 5), DEPTHWISE.to("meta"), HOW),
        r"torch\.float32 on meta",
    ),
    (
        "depthwise weight with a gradient",
        lambda w: depthwise2d(numbers(1, 3, 5, 5), numbers(3, 1, 2, 2).requires_grad_(), HOW),
        r"no backward pass",
    ),
    (
        "depthwise image of a dtype",
        lambda w: depthwise2d(numbers(1, 3, 5, 5).half(), DEPTHWISE, HOW),
        r"torch\.float16",
    ),
    ("depthwise image of three dimensions", lambda w: depthwise2d(numbers(3, 5, 5), DEPTHWISE, HOW), r"\[batch, chan"),
    ("small depthwise image", lambda w: depthwise2d(numbers(1, 3, 5, 1), DEPTHWISE, HOW), r"does not fit.*\(5, 1\)"),
    (
        "depthwise bias",
        lambda w: depthwise2d(numbers(1, 3, 5, 5), DEPTHWISE, HOW, numbers(4)),
        r"expected a bias of shape \(3,\), got \(4,\)",
    ),
    (
        "depthwise residual",
        lambda w: depthwise2d(numbers(1, 3, 5, 5), DEPTHWISE, HOW, None, numbers(1, 3, 5, 5)),
        r"residual has shape \(1, 3, 5, 5\).*\(1, 3, 4, 4\)",
    ),
    (
        "depthwise residual in blocks",
        lambda w: depthwise2d(numbers(1, 3, 5, 5), DEPTHWISE, HOW, None, Blocked.of(numbers(1, 3, 9, 9)), blocked=True),
        r"residual has shape \(1, 2, 3, 64\)",
    ),
    (
        "depthwise activation",
        lambda w: depthwise2d(numbers(1, 3, 5, 5), DEPTHWISE, HOW, activation="rellu"),
        r"activation is 'rellu'.*'relu'",
    ),
    (
        "depthwise threads",
        lambda w: depthwise2d(numbers(1, 3, 5, 5), DEPTHWISE, HOW, threads=0),
        r"threads must be a whole number of at least 1.*got 0",
    ),
    (
        "depthwise blocks",
        lambda w: depthwise2d(Blocked(numbers(1, 1, 3, 64), 9, 9), DEPTHWISE, HOW),
        r"have the shape \[batch, 2, channels, 64\]",
    ),
    (
        "stride",
        lambda w: Convolution(stride=(1, 2**32 + 1)),
        r"stride of a convolution must be 2 whole numbers from 1 up",
    ),
    ("no stride", lambda w: Convolution(stride=(1, 0)), r"stride .* got \(1, 0\)"),
    ("padding", lambda w: Convolution(padding=(0, 0, 0, -1)), r"padding .* 4 whole numbers from 0 up"),
    ("kernel", lambda w: Convolution(kernel=(3,)), r"kernel of a convolution must be 2 whole numbers"),  # type: ignore[arg-type]
    (
        "weight of integers",
        lambda w: Panelled.pack(torch.ones(3, 3, dtype=torch.int64)),
        r"weight\.detach\(\)\.float\(\)",
    ),
    ("weight vector", lambda w: Bitmask.pack(numbers(3)), r"at least two dimensions, got shape \(3,\)"),
    ("weight on meta", lambda w: Bitmask.pack(numbers(3, 3).to("meta")), r"float32 weights on the CPU.* on meta"),
    ("block", lambda w: Panelled.pack(WEIGHT, block=(2, 2)), r"block must be one of \(1, 1\), \(4, 1\), \(1, 4\)"),
    ("panel", lambda w: Panelled.pack(WEIGHT, block=(1, 4), panel=6), r"panel must be a multiple of the block's 4"),
    ("parts", lambda w: Panelled.pack(WEIGHT, parts=0), r"parts must be a whole number of at least 1, got 0"),
]


@pytest.mark.parametrize(("call", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_does_not_fit_is_refused(call: Callable[[Panelled], object], message: str) -> None:
    with pytest.raises((SparseError, WeightError, SecateurError), match=message):
        call(Panelled.pack(WEIGHT))


def test_gradients_are_no_matter_where_none_are_kept() -> None:
    x = numbers(3, 12).requires_grad_()
    with torch.no_grad():
        assert not linear(x, Panelled.pack(WEIGHT)).requires_grad
    with torch.inference_mode():
        assert linear(x, Panelled.pack(WEIGHT)).is_inference()


def test_an_unknown_instruction_set_is_refused_and_changes_nothing() -> None:
    before = isa()
    with pytest.raises(SparseError, match=r"instruction set 'x86-64-v9'.*usable here: "):
        use_isa("x86-64-v9")
    assert isa() == before


def test_two_threads_run_two_weights_at_once() -> None:
    weights = [sparse(64, 96, 0.2, seed) for seed in (1, 2)]
    x = numbers(50, 96)

    def run(number: int) -> bool:
        packed = Panelled.pack(weights[number], block=((1, 1), (4, 1))[number])
        expected = linear(x, packed, threads=1)
        return all(torch.equal(linear(x, packed, threads=2 + i % 3), expected) for i in range(200))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(run, (0, 1)))


THREADS = """
import os
import torch
from secateur.sparse import Panelled, library, linear
torch.set_num_threads(3)
x = torch.randn(512, 512)
(x @ x).sum(), x.add(1)
packed, count = Panelled.pack(x), len(os.listdir("/proc/self/task"))
linear(x, packed, threads=3)
print(library._torchs_threads() is None or len(os.listdir("/proc/self/task")) <= count)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are counted in /proc")
def test_torchs_own_threads_do_the_work() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", THREADS], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["True"], done.stderr


FORK = """
import os, signal, sys, threading
import torch
from secateur.sparse import Panelled, linear
torch.set_num_threads(1)  # torch's own threads do not survive a fork
weight, x = torch.randn(64, 96) * (torch.rand(64, 96) < 0.2), torch.randn(50, 96)
packed = Panelled.pack(weight)
expected = linear(x, packed, threads=1)
assert torch.equal(linear(x, packed, threads=3), expected)
done = threading.Event()
def others():
    while not done.is_set():
        linear(x, packed, threads=2)
busy = threading.Thread(target=others)
busy.start()
for _ in range(10):
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(0 if all(torch.equal(linear(x, packed, threads=n), expected) for n in (2, 3, 5, 1)) else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
    assert torch.equal(linear(x, packed, threads=3), expected)
done.set()
busy.join()
print("same")
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="this system cannot fork")
def test_products_on_several_threads_go_on_after_a_fork() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["same"]
