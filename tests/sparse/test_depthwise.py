"""Depthwise convolutions in compiled models, and convolutions of other libraries that pad on their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.errors import CheckpointError, SparseError
from secateur.sparse import Compiled, Convolution, compile, load, reason, save
from secateur.sparse.image_layers import DepthwiseConv2d, ImageLayer
from secateur.sparse.images import Blocked
from secateur.sparse.known import PaddedConv2d
from secateur.sparse.layers import SparseConv2d, layer_of
from secateur.sparse.plain import plain_layers_
from secateur.sparse.tune import Dense, Option, Problem, Tuner, build, options
from secateur.sparse.watch import Example
from sparse_models import Mobile, answers, pruned

pytestmark = pytest.mark.skipif(bool(reason()), reason=reason())

SAME = (1, 1, 1, 1)


def made(model: nn.Module, x: Tensor) -> Compiled:
    return compile(model, x, cache=False, measure=False)


def image_layers(compiled: Compiled) -> dict[str, ImageLayer]:
    return {name: layer for name, layer in compiled.model.named_modules() if isinstance(layer, ImageLayer)}


@pytest.mark.usefixtures("sparse_wins")
def test_depthwise_layers_run_in_the_kernels_beside_packed_ones() -> None:
    model, x = pruned(Mobile()), torch.randn(2, 3, 24, 24)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compiled = made(model, x)
    layers = image_layers(compiled)
    around = {f"{block}.around" for block in ("one", "two", "three")}
    assert {name for name, layer in layers.items() if isinstance(layer, DepthwiseConv2d)} == around
    assert {name: layer.activation for name, layer in layers.items() if isinstance(layer, DepthwiseConv2d)} == (
        dict.fromkeys(around, "relu6")
    )
    assert {name for name, layer in layers.items() if not layer.blocked} == {"three.project"}  # whose mean torch takes
    assert compiled.fused.residuals == {"one.project", "three.project"}
    assert compiled.report.folded == 10
    rows = {row.name: row for row in compiled.report.layers}
    assert {name for name, row in rows.items() if row.choice == "kernel"} == around
    assert all(rows[name].bytes == rows[name].dense_bytes for name in around)
    assert compiled.report.summary()[0].startswith("8 of 11 layers packed")
    assert compiled.report.left == {}
    assert compiled.report.difference < 1e-5
    for other in (x, torch.randn(1, 3, 41, 18), torch.randn(3, 3, 5, 100)):
        torch.testing.assert_close(answers(compiled, other), answers(model, other), rtol=1e-4, atol=1e-5)
    bad = x.clone()
    bad[0, 1, 9, 9] = float("nan")
    assert torch.equal(answers(compiled, bad).isnan(), answers(model, bad).isnan())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Untraceable(Mobile):
    """Python looks at the values."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if float(x.detach().sum()) < 1e30 else x * 0)


@pytest.mark.usefixtures("sparse_wins")
def test_depthwise_layers_of_an_untraceable_model_take_in_what_follows() -> None:
    model, x = pruned(Untraceable()), torch.randn(2, 3, 24, 24)
    compiled = made(model, x)
    layer = compiled.model.get_submodule("two.around")
    assert not compiled.report.traced
    assert isinstance(layer, DepthwiseConv2d)
    assert layer.convolution == Convolution((5, 5), (2, 2), (2, 2, 2, 2))
    assert not layer.blocked
    torch.testing.assert_close(answers(compiled, x), answers(model, x), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("sparse_wins")
def test_depthwise_layers_alone_are_no_reason_to_leave_torch() -> None:
    model, x = Mobile().eval(), torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        for block in (model.one, model.two, model.three):
            block.around.weight[::2] = 0.0
    compiled = made(model, x)
    assert image_layers(compiled) == {}
    assert {row.choice for row in compiled.report.layers} == {"dense"}
    torch.testing.assert_close(answers(compiled, x), answers(model, x), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("sparse_wins")
def test_what_is_a_depthwise_layer_and_what_is_not() -> None:
    model = pruned(
        nn.Sequential(
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(8, 24, 3, padding="same", dilation=(1, 2), groups=8),  # three outputs of each channel
            nn.Conv2d(24, 24, (1, 5), groups=24, padding=(0, 2), padding_mode="reflect"),
            nn.Conv2d(24, 24, 3, groups=12),
            nn.Conv2d(24, 1, 1),
            nn.Conv2d(1, 1, 3),  # one channel in one group
        )
    )
    x = torch.randn(2, 3, 11, 13)
    compiled = made(model, x)
    layers = image_layers(compiled)
    assert {name: type(layer) for name, layer in layers.items()} == {
        "0": SparseConv2d,
        "1": DepthwiseConv2d,
        "4": SparseConv2d,
        "5": SparseConv2d,
    }
    assert layers["1"].convolution.padding == (1, 2, 1, 2)
    assert compiled.report.left == {"2.weight": "a convolution in 24 groups", "3.weight": "a convolution in 12 groups"}
    torch.testing.assert_close(answers(compiled, x), answers(model, x), rtol=1e-4, atol=1e-5)


def test_depthwise_layer_is_measured_as_torch_runs_it(tmp_path: Path) -> None:
    how = Convolution((3, 3), (2, 1), (0, 1, 1, 0))
    problem = Problem(torch.randn(12, 1, 3, 3), torch.randn(12), "silu", how, torch.randn(2, 6, 9, 8))
    assert problem.depthwise
    assert list(options(problem)) == [Option("kernel")]
    dense, ours = build(problem, Option()), build(problem, Option("kernel"))
    assert isinstance(dense, Dense)
    torch.testing.assert_close(ours(problem.x), dense(problem.x), rtol=1e-5, atol=1e-5)
    tuner = Tuner(1, tmp_path / "sparse.json")
    first = tuner.tune(problem)
    tuner.save()
    again = Tuner(1, tmp_path / "sparse.json").tune(problem)
    assert min(first.dense_ms, first.ms) > 0
    assert again.cached
    assert (again.option, again.ms) == (first.option, first.ms)


@pytest.mark.parametrize("blocked", [False, True])
def test_layer_takes_images_in_either_layout_and_single_ones(blocked: bool) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(10, 1, 3, 3), torch.randn(10)
    layer = DepthwiseConv2d(
        weight, Convolution((3, 3), padding=SAME), 5, bias, activation="relu", blocked=blocked
    ).eval()
    x, residual = torch.randn(2, 5, 9, 8), torch.randn(2, 10, 9, 8)
    expected = F.relu(F.conv2d(x, weight, bias, padding=1, groups=5) + residual)
    for images in (x, Blocked.of(x)):
        for added in (residual, Blocked.of(residual)):
            out = layer(images, added)
            assert isinstance(out, Blocked) == blocked
            torch.testing.assert_close(out.images() if blocked else out, expected, rtol=1e-4, atol=1e-5)
    if not blocked:
        torch.testing.assert_close(layer(x[1], residual[1]), expected[1], rtol=1e-4, atol=1e-5)
    assert str(layer).startswith("DepthwiseConv2d(5 -> 10, ")
    assert str(layer).endswith(", relu)")


def test_layer_refuses_images_of_other_channels() -> None:
    layer = DepthwiseConv2d(torch.randn(6, 1, 1, 1), Convolution(), 6)
    for channels in (1, 2, 3):
        with pytest.raises(SparseError):
            layer(torch.randn(1, channels, 4, 4))


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.usefixtures("sparse_wins")
def test_depthwise_layers_are_saved_and_loaded(tmp_path: Path, mapped: bool) -> None:
    x, path = torch.randn(2, 3, 24, 24), tmp_path / "model.sparse.safetensors"
    compiled = made(pruned(Mobile()), x)
    save(compiled, path)
    loaded = load(path, Mobile(), x, mapped=mapped)
    assert {name: repr(layer) for name, layer in image_layers(loaded).items()} == {
        name: repr(layer) for name, layer in image_layers(compiled).items()
    }
    assert [layer.blocked for layer in image_layers(loaded).values()].count(False) == 1
    assert torch.equal(answers(loaded, x), answers(compiled, x))


def _set(**attributes: Any) -> Callable[[DepthwiseConv2d], None]:
    def damage(layer: DepthwiseConv2d) -> None:
        for name, value in attributes.items():
            setattr(layer, name, value)

    return damage


DAMAGED: list[tuple[str, Callable[[DepthwiseConv2d], None], str]] = [
    ("channels", _set(channels=7), r"one\.around: expected kernels .*a whole multiple of 7, got shape \(32, 1, 3, 3\)"),
    ("channels in words", _set(channels="32"), r"one\.around: a depthwise convolution of '32' channels"),
    ("no channels", _set(channels=None), r"a depthwise convolution of None channels"),
    ("no weight", lambda layer: layer._buffers.update(weight=None), r"'relu6' and no weight cannot be"),
    ("weight of a dtype", lambda layer: layer._buffers.update(weight=layer.weight.double()), r"torch\.float64"),
    ("weight of a shape", lambda layer: layer._buffers.update(weight=layer.weight[:, 0]), r"got shape \(32, 3, 3\)"),
    ("scalar weight", lambda layer: layer._buffers.update(weight=torch.ones(())), r"one\.around: "),
    ("bias of a shape", lambda layer: layer._buffers.update(bias=torch.ones(5)), r"float32 bias of 32 entries"),
    ("bias of a dtype", lambda layer: layer._buffers.update(bias=torch.ones(32).double()), r"float32 bias of 32 entri"),
    ("kernel", _set(convolution=Convolution((5, 5), padding=SAME)), r"expected kernels \[outputs, 1, 5, 5\]"),
    ("other activation", _set(activation="silu"), r"one\.around is followed by silu there and by relu6 here"),
    ("no activation", _set(activation="rellu"), r"with activation 'rellu'"),
    ("activation of a type", _set(activation=3), r"with activation 3 "),
]


@pytest.mark.parametrize(("damage", "message"), [row[1:] for row in DAMAGED], ids=[row[0] for row in DAMAGED])
@pytest.mark.usefixtures("sparse_wins")
def test_damaged_depthwise_layers_are_refused(
    tmp_path: Path, damage: Callable[[DepthwiseConv2d], None], message: str
) -> None:
    x, path = torch.randn(2, 3, 24, 24), tmp_path / "model.sparse.safetensors"
    compiled = made(pruned(Mobile()), x)
    damage(compiled.model.get_submodule("one.around"))  # type: ignore[arg-type]
    save(compiled, path)
    with pytest.raises((CheckpointError, SparseError), match=message):
        load(path, Mobile(), x)


@pytest.mark.parametrize("flat", [None, "3", [3, 3, 1, 1, 1, 1, 1, 1, 1], [3, 3, 0, 1, 1, 1, 1, 1, 1, 1], [3.0] * 10])
def test_settings_that_are_no_convolution_are_refused(flat: object) -> None:
    layer = DepthwiseConv2d(torch.randn(4, 1, 3, 3), Convolution((3, 3), padding=SAME), 4)
    again = layer_of(layer.settings(), {"weight": layer.weight})
    assert repr(again) == repr(layer)
    with pytest.raises(SparseError, match=r"ten whole numbers|whole numbers from 1 up"):
        layer_of(layer.settings() | {"convolution": flat}, {"weight": layer.weight})


@pytest.mark.parametrize("channels", [0, -4])
def test_settings_without_channels_are_refused(channels: int) -> None:
    layer = DepthwiseConv2d(torch.randn(4, 1, 3, 3), Convolution((3, 3)), 4)
    with pytest.raises(SparseError):
        layer_of(layer.settings() | {"channels": channels}, {"weight": layer.weight})


@pytest.mark.usefixtures("sparse_wins")
def test_depthwise_layers_of_another_architecture_are_refused(tmp_path: Path) -> None:
    x, path = torch.randn(2, 3, 24, 24), tmp_path / "model.sparse.safetensors"
    save(made(pruned(Mobile()), x), path)
    other = Mobile()
    other.one.add_module("relu6", nn.SiLU())
    with pytest.raises(
        CheckpointError, match=r"another architecture: one\.expand is followed by relu6 there and by silu"
    ):
        load(path, other, x)
    flat = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten())
    with pytest.raises(CheckpointError, match="another architecture"):
        load(path, flat, x)


class StaticSame(nn.Conv2d):
    """As efficientnet-lite's: as many zeros as the image size asks for that the network was built for."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, size: int, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        side = (total // 2, total - total // 2)
        self.static_padding = nn.ZeroPad2d(side * 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(
            self.static_padding(x), self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class DynamicSame(nn.Conv2d):
    """As TensorFlow's: as many zeros as the size of the image asks for."""

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for size, kernel, stride in zip(x.shape[2:], self.kernel_size, self.stride, strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads = [total // 2, total - total // 2, *pads]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Lite(nn.Module):
    """As efficientnet-lite: every convolution pads on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn1 = StaticSame(3, 8, 3, 2, 24), nn.BatchNorm2d(8)
        self.around, self.bn2 = StaticSame(8, 8, 5, 2, 12, groups=8), nn.BatchNorm2d(8)
        self.last = StaticSame(8, 4, 1, 1, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.bn1(self.stem(x)))
        out: Tensor = self.last(F.relu6(self.bn2(self.around(x))))
        return out


@pytest.mark.usefixtures("sparse_wins")
@pytest.mark.parametrize("dense_stem", [False, True])
def test_padding_on_one_side_is_taken_into_the_layers(tmp_path: Path, dense_stem: bool) -> None:
    model, x, path = pruned(Lite()), torch.randn(2, 3, 24, 24), tmp_path / "model.sparse.safetensors"
    if dense_stem:
        with torch.no_grad():
            model.get_parameter("stem.weight").normal_()
    compiled = made(model, x)
    assert compiled.report.traced
    assert compiled.report.folded == 2
    layers = image_layers(compiled)
    stem = compiled.model.get_submodule("stem")
    assert stem.pads == (0, 0, 1, 1) if isinstance(stem, PaddedConv2d) else not dense_stem
    assert {name: layer.convolution.padding for name, layer in layers.items()} == {
        **({} if dense_stem else {"stem": (0, 0, 1, 1)}),
        "around": (1, 1, 2, 2),
        "last": (0, 0, 0, 0),
    }
    assert isinstance(layers["around"], DepthwiseConv2d)
    for other in (x, torch.randn(1, 3, 17, 30), torch.randn(2, 3, 5, 6)):
        torch.testing.assert_close(answers(compiled, other), answers(model, other), rtol=1e-4, atol=1e-5)
    save(compiled, path)
    assert torch.equal(answers(load(path, Lite(), x), x), answers(compiled, x))


@settings(max_examples=60, deadline=None)
@given(
    kernel=st.integers(1, 7),
    stride=st.integers(1, 5),
    size=st.integers(7, 24),
    built_for=st.one_of(st.none(), st.integers(7, 24)),
    seed=st.integers(0, 9),
)
def test_padding_is_known_by_what_it_does(
    kernel: int, stride: int, size: int, built_for: int | None, seed: int
) -> None:
    torch.manual_seed(seed)
    if built_for is None:
        model = nn.Sequential(DynamicSame(2, 3, kernel, stride))
    else:
        model = nn.Sequential(StaticSame(2, 3, kernel, stride, built_for))
    before = model[0]
    plain_layers_(model, Example.of(model, (torch.randn(1, 2, size, size),), {}))
    if built_for is not None:
        assert type(model[0]) in (nn.Conv2d, PaddedConv2d)
    elif stride > 1 and kernel > 1 and kernel % 2:  # with even kernels, zeros that are not needed may not be seen
        assert model[0] is before
    for other in range(7, 24):
        x = torch.randn(1, 2, other, other + 1)
        torch.testing.assert_close(model[0](x), before(x), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("sparse_wins")
def test_padding_that_depends_on_the_size_stays_with_its_layer() -> None:
    model = pruned(nn.Sequential(DynamicSame(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 1)))
    x = torch.randn(2, 3, 12, 12)
    compiled = made(model, x)
    assert image_layers(compiled).keys() == {"2"}
    for size in range(5, 14):
        other = torch.randn(1, 3, size, 27 - size)
        torch.testing.assert_close(answers(compiled, other), answers(model, other), rtol=1e-4, atol=1e-5)


class Reflecting(nn.Conv2d):
    """Pads with something other than zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1), mode="replicate"), self.weight, self.bias, self.stride)


class Hooked(StaticSame):
    """Someone listens."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("layer", [Reflecting(3, 4, 3, 2), Hooked(3, 4, 3, 2, 12)], ids=["other padding", "a hook"])
def test_other_padding_stays(layer: nn.Conv2d) -> None:
    model = nn.Sequential(layer)
    plain_layers_(model, Example.of(model, (torch.randn(1, 3, 12, 12),), {}))
    assert model[0] is layer
