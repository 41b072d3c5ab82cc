"""The products as torch operators: what torch itself checks of them, compiled and exported."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dense_products import dense_conv2d, dense_linear, numbers, sparse
from secateur.errors import SparseError
from secateur.sparse import Bitmask, Convolution, Csr, Panelled, SparseConv2d, SparseLinear, linear, reason
from secateur.sparse import operators as module
from secateur.sparse.formats import Weight
from secateur.sparse.images import Blocked

pytestmark = pytest.mark.skipif(bool(reason()), reason=reason())

WEIGHT, BIAS = sparse(8, 12, 0.4, 1), numbers(8)
HOW = Convolution((2, 2), (2, 1), (1, 0, 0, 1))


def arrays_of(packed: Weight) -> tuple[list[Tensor], list[int]]:
    return list(packed.tensors().values()), list(packed.header().values())


@pytest.mark.parametrize("feature_major", [False, True])
@pytest.mark.parametrize("form", [Panelled, Bitmask, Csr])
@pytest.mark.parametrize("shape", [(5, 12), (12,), (2, 3, 12), (1, 12), (0, 12)])
def test_linear_is_a_sound_operator(
    form: type[Panelled | Bitmask | Csr], shape: tuple[int, ...], feature_major: bool
) -> None:
    arrays, header = arrays_of(form.pack(WEIGHT))
    x, residual = numbers(*shape), numbers(*shape[:-1], 8, seed=1)
    for bias, added, activation in ((None, None, "none"), (BIAS, residual, "gelu")):
        arguments = (x, arrays, header, bias, added, activation, 0, feature_major)
        torch.library.opcheck(torch.ops.secateur.sparse_linear.default, arguments)
        got = torch.ops.secateur.sparse_linear(*arguments)
        torch.testing.assert_close(got.double(), dense_linear(x, WEIGHT, bias, added, activation), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", [Panelled, Csr])
@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("blocked_in", [False, True])
def test_conv2d_is_a_sound_operator(form: type[Panelled | Csr], blocked_in: bool, blocked: bool) -> None:
    arrays, header = arrays_of(form.pack(WEIGHT))
    images = numbers(2, 3, 9, 11)
    height, width = HOW.output(9, 11)
    added = numbers(2, 8, height, width, seed=1)
    x = Blocked.of(images).data if blocked_in else images
    residual = Blocked.of(added).data if blocked else added
    flat = [*HOW.flat(), 9, 11, int(blocked_in), int(blocked)]
    arguments = (x, arrays, header, flat, BIAS, residual, "relu", 0)
    torch.library.opcheck(torch.ops.secateur.sparse_conv2d.default, arguments)
    got = torch.ops.secateur.sparse_conv2d(*arguments)
    got = Blocked(got, height, width).images() if blocked else got
    expected = dense_conv2d(images, WEIGHT.view(8, 3, 2, 2), HOW, BIAS, added, "relu")
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("blocked_in", [False, True])
def test_depthwise2d_is_a_sound_operator(blocked_in: bool, blocked: bool, multiplier: int) -> None:
    images, weight = numbers(2, 3, 9, 11), numbers(3 * multiplier, 1, 2, 2)
    height, width = HOW.output(9, 11)
    added = numbers(2, 3 * multiplier, height, width, seed=1)
    flat = [*HOW.flat(), 9, 11, int(blocked_in), int(blocked)]
    x = Blocked.of(images).data if blocked_in else images
    residual = Blocked.of(added).data if blocked else added
    for bias, plus, activation in ((None, None, "none"), (numbers(3 * multiplier), residual, "relu6")):
        arguments = (x, weight, flat, bias, plus, activation)
        torch.library.opcheck(torch.ops.secateur.depthwise2d.default, arguments)
        got = torch.ops.secateur.depthwise2d(*arguments)
        got = Blocked(got, height, width).images() if blocked else got
        expected = dense_conv2d(images, weight, HOW, bias, None if plus is None else added, activation)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("blocked_in", [False, True])
def test_max_pool2d_is_a_sound_operator(blocked_in: bool, blocked: bool) -> None:
    images, how = numbers(2, 3, 9, 11), Convolution((3, 3), (2, 1), (1, 1, 1, 1))
    x = Blocked.of(images).data if blocked_in else images
    arguments = (x, [*how.flat(), 9, 11, int(blocked_in), int(blocked)])
    torch.library.opcheck(torch.ops.secateur.max_pool2d.default, arguments)
    got = torch.ops.secateur.max_pool2d(*arguments)
    got = Blocked(got, *how.output(9, 11)).images() if blocked else got
    assert torch.equal(got, F.max_pool2d(images, 3, (2, 1), 1))


class Small(nn.Module):
    """A convolution, both formats of a linear layer, and torch's own operators between them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = SparseConv2d(
            Panelled.pack(sparse(6, 27, 0.5, 1)), Convolution((3, 3)), numbers(6), activation="relu"
        )
        self.hidden = SparseLinear(Panelled.pack(sparse(16, 6, 0.5, 2)), numbers(16), feature_major=True)
        self.out = SparseLinear(Bitmask.pack(sparse(4, 16, 0.5, 4)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).mean((2, 3))
        out: Tensor = self.out(torch.tanh(self.hidden(x, torch.ones(x.shape[0], 16))))
        return out


@pytest.fixture
def fresh() -> None:
    torch._dynamo.reset()


def dense_answer(model: Small, x: Tensor) -> Tensor:
    weights = {name: getattr(model, name).packed.to_dense() for name in ("conv", "hidden", "out")}
    c = dense_conv2d(x, weights["conv"].view(6, 3, 3, 3), Convolution((3, 3)), model.conv.bias, None, "relu").mean(
        (2, 3)
    )
    h = dense_linear(c, weights["hidden"], model.hidden.bias, torch.ones(16), "none").tanh()
    return dense_linear(h, weights["out"], None, None, "none")


@pytest.mark.usefixtures("fresh")
def test_a_model_compiles_in_one_graph_for_any_batch() -> None:
    model = Small().eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for batch in (3, 2, 7):
            x = numbers(batch, 3, 5, 6, seed=batch)
            torch.testing.assert_close(compiled(x), model(x))
            torch.testing.assert_close(compiled(x).double(), dense_answer(model, x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
def test_a_model_compiles_with_inductor() -> None:
    model = Small().eval()
    compiled = torch.compile(model, fullgraph=True)
    x = numbers(3, 3, 5, 6)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x).double(), dense_answer(model, x), rtol=1e-5, atol=1e-5)


def test_a_model_is_exported_for_any_batch(tmp_path: Path) -> None:
    model = Small().eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (numbers(3, 3, 5, 6),), dynamic_shapes={"x": {0: batch}})
    names = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert {torch.ops.secateur.sparse_linear.default, torch.ops.secateur.sparse_conv2d.default} <= names
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for count in (1, 2, 9):
        x = numbers(count, 3, 5, 6, seed=count)
        torch.testing.assert_close(loaded(x).double(), dense_answer(model, x), rtol=1e-5, atol=1e-5)


def test_an_exported_weight_is_checked_before_it_is_followed() -> None:
    arrays, header = arrays_of(Panelled.pack(WEIGHT))
    x = numbers(3, 12)

    def run(arrays: list[Tensor], header: list[int]) -> Any:
        return torch.ops.secateur.sparse_linear(x, arrays, header, None, None, "none", 0, False)

    before = run(arrays, header)
    indices = arrays[1]
    with pytest.raises(SparseError, match="damaged"):
        run([arrays[0], torch.full_like(indices, 200), *arrays[2:]], header)
    with pytest.raises(SparseError, match=r"reading a panelled weight"):
        run(arrays, [99, *header[1:]])  # the same arrays, and another header
    with pytest.raises(SparseError, match=r"no sparse weight has 8 numbers and 3 arrays"):
        run(arrays[:3], header)
    with pytest.raises(SparseError, match=r"no sparse weight has 7 numbers and 5 arrays"):
        run(arrays, header[:-1])
    kept = indices.clone()
    indices.fill_(200)  # in place, after it has been checked
    with pytest.raises(SparseError, match="damaged"):
        run(arrays, header)
    indices.copy_(kept)
    assert torch.equal(run(arrays, header), before)


def test_a_weight_that_an_operator_has_seen_can_go() -> None:
    arrays, header = arrays_of(Panelled.pack(WEIGHT))
    gc.collect()
    known = len(module._checked)
    torch.ops.secateur.sparse_linear(numbers(3, 12), arrays, header, None, None, "none", 0, False)
    assert len(module._checked) == known + 1
    gone = weakref.ref(arrays[0])
    arrays.clear()
    gc.collect()
    assert gone() is None
    assert len(module._checked) == known


def test_the_operator_is_the_function() -> None:
    packed = Panelled.pack(WEIGHT)
    arrays, header = arrays_of(packed)
    x = numbers(3, 12)
    for _ in range(2):  # the second time its indices are known
        got = torch.ops.secateur.sparse_linear(x, arrays, header, BIAS, None, "silu", 8, True)
        assert torch.equal(got, linear(x, packed, BIAS, None, "silu", tile=8, feature_major=True))
