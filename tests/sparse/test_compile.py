"""Whole models: what is chosen, what is fused, that answers stay, and what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.errors import CheckpointError, SecateurWarning, SparseError
from secateur.export import export_model
from secateur.sparse import Compiled, Convolution, Panelled, compile, conv2d, load, reason, save
from secateur.sparse import compiled as module
from secateur.sparse.fuse import fuse, take_in_, traced
from secateur.sparse.images import Blocked
from secateur.sparse.known import activation_of
from secateur.sparse.layers import MaxPool2d, SparseConv2d, SparseLayer, SparseLinear
from secateur.sparse.tune import VERSION, Dense, Option, Problem, Tuned, Tuner, build, options
from secateur.sparse.watch import watch
from sparse_models import Bottleneck, answers, pruned

pytestmark = pytest.mark.skipif(bool(reason()), reason=reason())


class Residual(nn.Module):
    """Every way in which something can follow a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(16, 16, 3, padding="same")
        self.bn2 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 1)
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.stem(x)))
        y = F.relu6(self.bn2(self.conv1(x)))
        x = self.relu(self.conv2(y) + x)
        x = F.silu(self.down(x))
        x = F.gelu(self.depthwise(x)).mean((2, 3))
        out: Tensor = self.head(x)
        return out


class Branching(nn.Module):
    """A graph that cannot be traced: Python looks at the values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor, *, scale: Tensor | None = None) -> dict[str, Tensor]:
        if bool((x > 1e9).any()):
            x = x * 0
        y = self.norm(x + self.b(self.act(self.a(x))))
        return {"y": y if scale is None else y * scale}


@pytest.mark.usefixtures("sparse_wins")
def test_traced_model_takes_in_what_follows() -> None:
    model = pruned(Residual())
    x = torch.randn(2, 3, 12, 12)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compiled = compile(model, x, cache=False, measure=False)
    layers = {name: layer for name, layer in compiled.model.named_modules() if isinstance(layer, SparseLayer)}
    assert layers.keys() == {"stem", "conv1", "conv2", "down", "head"}
    assert {name: layer.activation for name, layer in layers.items()} == {
        "stem": "relu",
        "conv1": "relu6",
        "conv2": "relu",
        "down": "silu",
        "head": "none",
    }
    assert compiled.fused.residuals == {"conv2"}
    assert compiled.report.traced
    assert compiled.report.folded == 2
    assert compiled.report.left == {}
    assert compiled.report.difference < 1e-5
    for other in (x, torch.randn(1, 3, 9, 14), torch.randn(5, 3, 12, 12)):
        torch.testing.assert_close(answers(compiled, other), answers(model, other), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Scales(nn.Module):
    """Does something else where an argument is left out."""

    def __init__(self, silently: bool) -> None:
        super().__init__()
        self.a, self.silently = nn.Linear(16, 16), silently

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        if self.silently:
            out: Tensor = self.a(x).relu() + x
            return out * 1.0 if scale is None else F.dropout(out, training=False)  # the same, until there is a scale
        return F.scaled_dot_product_attention(x, x, self.a(x), scale)


@pytest.mark.usefixtures("sparse_wins")
@pytest.mark.parametrize("silently", [True, False])
def test_argument_that_is_left_out_is_no_stand_in(silently: bool) -> None:
    model, x = pruned(Scales(silently)), torch.randn(3, 5, 16)
    compiled = compile(model, x, cache=False, measure=False)
    assert compiled.report.traced != silently
    for given in ((x,), (x, torch.zeros(5, 5))):
        torch.testing.assert_close(answers(compiled, *given), answers(model, *given), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("sparse_wins")
def test_untraceable_model_takes_in_activations_between_modules() -> None:
    model = pruned(Branching(), 0.8)
    inputs = ((torch.randn(3, 5, 16),), {"scale": torch.tensor(2.0)})
    compiled = compile(model, inputs, cache=False, measure=False)
    assert not compiled.report.traced
    assert isinstance(compiled.model.a, SparseLinear)
    assert compiled.model.a.activation == "gelu"
    assert isinstance(compiled.model.act, nn.Identity)
    expected = answers(model, *inputs[0], **inputs[1])["y"]
    torch.testing.assert_close(answers(compiled, *inputs[0], **inputs[1])["y"], expected, rtol=1e-4, atol=1e-5)


def test_activation_that_something_else_looks_past_stays_outside() -> None:
    class Peeks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.act = nn.Linear(4, 4), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            out: Tensor = self.act(h) + h * len(str(float(h.sum())))
            return out

    x = torch.randn(2, 4)
    assert list(watch(Peeks(), (x,), {}).pairs()) == []


def test_activation_of_another_library_is_tried_once_and_not_while_a_model_is_traced() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * torch.sigmoid(x)

    model = nn.Sequential(nn.Linear(4, 4), Counts(), nn.Linear(4, 4), Counts()).eval()
    graph = traced(model)
    assert graph is not None
    assert [node.op for node in graph.graph.nodes] == ["placeholder", *["call_module"] * 4, "output"]
    assert [module.calls for module in model if isinstance(module, Counts)] == [2, 2]


class Forward(nn.Conv2d):
    """Does what its base does, in words of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class PadsOdd(nn.Conv2d):
    """Pads what the size asks for: above too where it is odd, with strides of two."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (x.shape[3] % 2, 1, x.shape[2] % 2, 1)))


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, w, self.bias)


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t() + (0.0 if self.bias is None else self.bias)


class NormAct(nn.BatchNorm2d):
    """A norm and an activation in one module, as timm's."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.drop, self.act = nn.Identity(), nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.drop(super().forward(x)))
        return out


class NormScaled(nn.BatchNorm2d):
    """Does more than a norm, and holds nothing that would say so."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.5


@pytest.mark.usefixtures("sparse_wins")
def test_norms_of_other_libraries_are_known_by_what_they_do(tmp_path: Path) -> None:
    def model() -> nn.Module:
        layers = (nn.Conv2d(3, 8, 3), NormAct(8), nn.Conv2d(8, 8, 1), NormScaled(8), nn.Conv2d(8, 4, 1))
        return pruned(nn.Sequential(*layers), 0.7)

    x, dense = torch.randn(2, 3, 12, 12), model()
    compiled = compile(dense, x, cache=False, measure=False)
    assert compiled.report.folded == 1
    assert compiled.fused.activations == {"0": "silu"}
    assert type(compiled.model.get_submodule("3")) is NormScaled
    torch.testing.assert_close(answers(compiled, x), answers(dense, x), rtol=1e-4, atol=1e-5)
    save(compiled, tmp_path / "it.sparse.safetensors")
    assert torch.equal(answers(load(tmp_path / "it.sparse.safetensors", model(), x), x), answers(compiled, x))


@pytest.mark.usefixtures("sparse_wins")
def test_weights_that_are_looked_at_say_where_they_are_and_nothing_else() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x + torch.ones(1, dtype=self.a.weight.dtype, device=self.a.weight.device) * self.b.weight.shape[0]
            out: Tensor = self.b(self.a(x))
            return out

    model, x = pruned(Looks()), torch.randn(2, 3, 6, 6)
    compiled = compile(model, x, cache=False, measure=False)
    torch.testing.assert_close(answers(compiled, x), answers(model, x), rtol=1e-4, atol=1e-5)
    weight = compiled.model.get_submodule("a").weight
    assert isinstance(weight, Tensor)
    assert (weight.shape, weight.dtype, weight.device.type) == ((8, 3), torch.float32, "cpu")
    assert bool(weight.isnan().all())


@pytest.mark.usefixtures("sparse_wins")
def test_layers_of_other_libraries_are_known_by_what_they_do(tmp_path: Path) -> None:
    def model() -> nn.Module:
        return nn.Sequential(
            Forward(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            PadsOdd(8, 8, 3, stride=2),
            Standardised(8, 8, 1),
            nn.Flatten(1),
            OwnLinear(8 * 36, 5),
        )

    net, x = pruned(model(), 0.5), torch.randn(2, 3, 12, 12)
    compiled = compile(net, x, cache=False, measure=False)
    packed = {name for name, module in compiled.model.named_modules() if isinstance(module, SparseLayer)}
    assert "0" in packed
    assert not {"2", "3"} & packed
    assert compiled.report.folded == 1
    torch.testing.assert_close(answers(compiled, x), answers(net, x), rtol=1e-4, atol=1e-5)
    save(compiled, tmp_path / "model.sparse.safetensors")
    loaded = load(tmp_path / "model.sparse.safetensors", model(), x)
    assert torch.equal(answers(loaded, x), answers(compiled, x))


def test_shared_layer_stays_without_its_activation() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.a(torch.relu(self.a(x)))
            return out

    x = torch.randn(2, 4)
    fused = fuse(Twice().eval(), (x,), {})
    take_in_(fused, {"a"}, (x,), {})
    assert fused.traced
    assert fused.activations == {}


def test_broadcast_sum_is_no_residual() -> None:
    class Broadcast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.a(x) + x.mean(0, keepdim=True)
            return out

    x = torch.randn(2, 4)
    fused = fuse(Broadcast().eval(), (x,), {})
    take_in_(fused, {"a"}, (x,), {})
    assert fused.residuals == set()


def test_real_tuner_measures_once_and_remembers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pruned(nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 64)), 0.95)
    x = torch.randn(32, 256)
    path = tmp_path / "cache" / "sparse.json"
    first = compile(model, x, cache=path, measure=False)
    assert all(not layer.cached and layer.dense_ms > 0 for layer in first.report.layers)
    monkeypatch.setattr(Tuner, "_cold", lambda *_: pytest.fail("measured again"))
    second = compile(model, x, cache=path, measure=False)
    assert all(layer.cached for layer in second.report.layers)
    assert [layer.choice for layer in first.report.layers] == [layer.choice for layer in second.report.layers]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", f'{{"version": {VERSION}, "layers": {{"x": 3}}}}', f'{{"version": {VERSION}, "layers": []}}'],
)
def test_damaged_cache_is_measured_over(tmp_path: Path, content: str) -> None:
    path = tmp_path / "sparse.json"
    path.write_text(content)
    model = pruned(nn.Sequential(nn.Linear(64, 64)), 0.9)
    if "x" in content:
        compile(model, torch.randn(4, 64), cache=path, measure=False)
    else:
        with pytest.warns(SecateurWarning, match="cannot be read"):
            compile(model, torch.randn(4, 64), cache=path, measure=False)
    assert json.loads(path.read_text())["version"] == VERSION


@pytest.mark.parametrize("positions", [1, 3, 40])
def test_every_option_computes_the_same(positions: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 40) * (torch.rand(6, 40) > 0.7).repeat_interleave(4, 0)
    problem = Problem(weight, torch.randn(24), "gelu_tanh", None, torch.randn(positions, 40))
    expected = build(problem, Option())(problem.x)
    ways = list(options(problem))
    assert any(way.block == (4, 1) for way in ways)
    for way in ways:
        torch.testing.assert_close(build(problem, way)(problem.x), expected, rtol=1e-4, atol=1e-5)


def test_slower_model_is_given_back_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(SparseLinear):
        def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
            for _ in range(50):
                super().forward(x, residual)
            return super().forward(x, residual)

    monkeypatch.setattr(Tuner, "tune", lambda self, problem: Tuned(Option("panelled", panel=64), 2.0, 1.0))
    monkeypatch.setattr("secateur.sparse.tune.SparseLinear", Slow)
    model = pruned(nn.Sequential(nn.Linear(64, 64)), 0.5)
    with pytest.warns(SecateurWarning, match="dense one"):
        compiled = compile(model, torch.randn(8, 64), cache=False)
    assert compiled.report.gave_up
    assert not any(isinstance(layer, SparseLayer) for layer in compiled.modules())
    assert torch.equal(answers(compiled, torch.ones(1, 64)), answers(model, torch.ones(1, 64)))


def test_dense_model_that_was_given_back_is_saved_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slower(models: dict[str, Any], *_: Any, **__: Any) -> dict[str, Any]:
        return {name: SimpleNamespace(median_ms=2.0 if name == "sparse" else 1.0) for name in models}

    monkeypatch.setattr(module, "measure_latency", slower)
    model, x, path = pruned(Residual()), torch.randn(2, 3, 12, 12), tmp_path / "model.sparse.safetensors"
    with pytest.warns(SecateurWarning, match="dense one"):
        compiled = compile(model, x, cache=False)
    save(compiled, path)
    assert torch.equal(answers(load(path, Residual(), x), x), answers(model, x))


def test_options_that_fall_behind_are_reported_with_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tuner, "_cold", lambda _, layer, x: 1.0 if isinstance(layer, Dense) else 3.0)
    problem = Problem(torch.eye(64), None, "none", None, torch.randn(8, 64))
    assert Tuner(1, None).tune(problem) == Tuned(Option(), 1.0, 3.0)


@pytest.mark.usefixtures("sparse_wins")
def test_wrong_answers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pruned(nn.Sequential(nn.Linear(16, 16)))
    monkeypatch.setattr(module, "difference", lambda *_: 0.01)
    with pytest.raises(SparseError, match="rounding alone does not explain"):
        compile(model, torch.randn(2, 16), cache=False)


@pytest.mark.parametrize("convert", [lambda m: m.double(), lambda m: m.half(), lambda m: m.to("meta")])
def test_other_dtypes_and_devices_are_refused(convert: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.raises(SparseError, match=r"0\.weight is"):
        compile(convert(nn.Sequential(nn.Linear(4, 4))), torch.randn(2, 4), cache=False)


@pytest.mark.usefixtures("sparse_wins")
def test_compiled_models_do_not_train() -> None:
    compiled = compile(pruned(nn.Sequential(nn.Linear(16, 16))), torch.randn(2, 16), cache=False, measure=False)
    with pytest.raises(SparseError, match="cannot be trained"):
        compiled.train()
    with pytest.raises(SparseError, match="no backward pass"):
        compiled(torch.randn(2, 16, requires_grad=True))
    assert not compiled.training


@pytest.mark.usefixtures("sparse_wins")
def test_copies_compile_and_export(tmp_path: Path) -> None:
    compiled = compile(pruned(Residual()), torch.randn(2, 3, 12, 12), cache=False, measure=False)
    x = torch.randn(2, 3, 12, 12)
    expected = answers(compiled, x)
    assert torch.equal(answers(copy.deepcopy(compiled), x), expected)
    graph = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    assert torch.equal(answers(graph, x), expected)
    program = torch.export.export(compiled, (x,)).module()
    torch.testing.assert_close(answers(program, x), expected)


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.usefixtures("sparse_wins")
def test_saved_and_loaded(tmp_path: Path, mapped: bool) -> None:
    model, x, path = pruned(Residual()), torch.randn(2, 3, 12, 12), tmp_path / "model.sparse.safetensors"
    compiled = compile(model, x, cache=False, measure=False)
    save(compiled, path)
    loaded = load(path, Residual(), x, mapped=mapped)
    assert isinstance(loaded, Compiled)
    assert torch.equal(answers(loaded, x), answers(compiled, x))
    layer = loaded.model.get_submodule("conv1")
    assert isinstance(layer, SparseConv2d)
    assert layer.packed.values.data_ptr() == layer.values.data_ptr()
    with pytest.raises(CheckpointError, match="another architecture"):
        load(path, Branching(), torch.randn(2, 16))
    narrow = Residual()
    narrow.head = nn.Linear(32, 9)
    loaded = load(path, narrow, x)  # the packed head comes whole from the file
    assert tuple(answers(loaded, x).shape) == (2, 10)


@pytest.mark.usefixtures("sparse_wins")
def test_damaged_files_are_refused(tmp_path: Path) -> None:
    x, path = torch.randn(2, 3, 12, 12), tmp_path / "model.sparse.safetensors"
    save(compile(pruned(Residual()), x, cache=False, measure=False), path)
    whole = path.read_bytes()
    for at in range(9, len(whole), max(len(whole) // 60, 1)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :])
        with pytest.raises((CheckpointError, SparseError)):
            load(path, Residual(), x)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError):
        load(path, Residual(), x)


@pytest.mark.usefixtures("sparse_wins")
def test_file_with_a_right_checksum_and_wrong_indices_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, path = torch.randn(2, 16), tmp_path / "model.sparse.safetensors"
    compiled = compile(pruned(nn.Sequential(nn.Linear(16, 16))), x, cache=False, measure=False)
    layer = compiled.model.get_submodule("0")
    assert isinstance(layer, SparseLinear)
    layer.indices[0] = 200
    save(compiled, path)
    with pytest.raises(SparseError, match="damaged"):
        load(path, nn.Sequential(nn.Linear(16, 16)), x)


def test_report_reads_well() -> None:
    compiled = compile(
        pruned(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), 0.9), torch.randn(4, 64), cache=False, measure=False
    )
    text = str(compiled.report)
    assert max(len(line) for line in text.splitlines()[:3]) <= 120
    assert json.loads(json.dumps(compiled.report.to_dict()))["layers"][0]["name"] == "0"


class OwnGelu(nn.Module):
    """An activation of another library."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.erf(x / 2**0.5))


class Shifted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x) + 0.01


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x) + torch.rand_like(x)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.ReLU(inplace=True), "relu"),
        (nn.ReLU6(), "relu6"),
        (nn.Hardtanh(0.0, 6.0), "relu6"),
        (nn.GELU(), "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (nn.SiLU(), "silu"),
        (OwnGelu(), "gelu"),
        (nn.Hardtanh(), None),
        (nn.LeakyReLU(), None),
        (nn.Softmax(-1), None),
        (nn.PReLU(), None),
        (nn.Identity(), None),
        (Shifted(), None),
        (Noisy(), None),
        (nn.Flatten(), None),
    ],
    ids=str,
)
def test_activations_are_known_by_what_they_do(module: nn.Module, name: str | None) -> None:
    assert activation_of(module) == name


@pytest.mark.usefixtures("sparse_wins")
def test_vectors_pass_from_layer_to_layer_as_the_kernels_have_them() -> None:
    model = pruned(nn.Sequential(nn.Linear(16, 32), OwnGelu(), nn.Linear(32, 16), nn.LayerNorm(16), nn.Linear(16, 8)))
    x = torch.randn(2, 5, 16)
    compiled = compile(model, x, cache=False, measure=False)
    flags = {n: m.feature_major for n, m in compiled.model.named_modules() if isinstance(m, SparseLinear)}
    assert flags == {"0": True, "2": False, "4": False}
    assert compiled.fused.activations["0"] == "gelu"
    for other in (x, torch.randn(1, 1, 16), torch.randn(7, 16)):
        torch.testing.assert_close(answers(compiled, other), answers(model, other), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("sparse_wins")
def test_maximum_over_images_is_saved_and_loaded(tmp_path: Path) -> None:
    x, path = torch.randn(2, 32, 10, 9), tmp_path / "model.sparse.safetensors"
    compiled = compile(pruned(Bottleneck()), x, cache=False, measure=False)
    save(compiled, path)
    loaded = load(path, Bottleneck(), x)
    assert isinstance(loaded.model.get_submodule("pool"), MaxPool2d)
    assert torch.equal(answers(loaded, x), answers(compiled, x))
    other = Bottleneck()
    other.pool = nn.MaxPool2d(2, 2)
    with pytest.raises(CheckpointError, match="another architecture: pool is a maximum with"):
        load(path, other, x)


@pytest.mark.parametrize(
    "module",
    [
        nn.MaxPool2d(2, ceil_mode=True),
        nn.MaxPool2d(2, return_indices=True),
        nn.MaxPool2d(3, padding=2),
        type("Own", (nn.MaxPool2d,), {})(2),
    ],
)
def test_other_maxima_stay_with_torch(module: nn.MaxPool2d) -> None:
    assert MaxPool2d.of(module) is None


def test_faster_maximum_is_measured_once(tmp_path: Path) -> None:
    dense, x, cache = nn.MaxPool2d(3, 2, padding=1), torch.randn(1, 3, 24, 24), tmp_path / "sparse.json"
    ours = MaxPool2d.of(dense)
    assert ours is not None
    tuner = Tuner(1, cache)
    first = tuner.tune_pool(dense, ours, x)
    tuner.save()
    again = Tuner(1, cache).tune_pool(dense, ours, x)
    assert min(first.dense_ms, first.ms) > 0
    assert again.cached
    assert (again.option, again.ms) == (first.option, first.ms)


@pytest.mark.usefixtures("sparse_wins")
def test_images_stay_in_blocks_between_convolutions_that_read_them_there() -> None:
    model = pruned(Bottleneck())
    x = torch.randn(2, 32, 10, 9)
    compiled = compile(model, x, cache=False, measure=False)
    blocked = {n for n, m in compiled.model.named_modules() if isinstance(m, SparseConv2d) and m.blocked}
    assert blocked == {"a1", "a2", "a3", "b1", "b2"}  # what b3 gives goes to a function of torch
    pool = compiled.model.get_submodule("pool")
    assert isinstance(pool, MaxPool2d)
    assert pool.blocked
    assert [row.name for row in compiled.report.layers] == ["pool", "a1", "a2", "a3", "b1", "b2", "b3", "end"]
    assert compiled.report.summary()[0].startswith("7 of 7 layers packed")
    for other in (x, torch.randn(1, 32, 16, 16), torch.randn(3, 32, 8, 4)):
        torch.testing.assert_close(answers(compiled, other), answers(model, other), rtol=1e-4, atol=1e-5)
    program = torch.export.export(compiled, (x,)).module()
    torch.testing.assert_close(answers(program, x), answers(compiled, x))
    bad = x.clone()
    bad[0, 3, 4, 4] = float("inf")
    assert torch.equal(answers(compiled, bad).isnan(), answers(model, bad).isnan())


@pytest.mark.parametrize("size", [(8, 8), (5, 13), (1, 1), (16, 9)])
def test_blocked_images_and_back(size: tuple[int, int]) -> None:
    images = torch.randn(2, 3, *size)
    blocked = Blocked.of(images)
    assert blocked.data.shape == (2, -(-size[0] * size[1] // 64), 3, 64)
    assert torch.equal(blocked.images(), images)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("into", [False, True])
@pytest.mark.parametrize("out", [False, True])
def test_convolution_in_either_layout(kernel: int, stride: int, into: bool, out: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(9, 6, kernel, kernel) * (torch.rand(9, 6, kernel, kernel) > 0.6)
    x, bias = torch.randn(2, 6, 11, 13), torch.randn(9)
    pad = kernel // 2
    expected = F.conv2d(x, weight, bias, stride, pad)
    residual = torch.randn_like(expected)
    how = Convolution((kernel, kernel), (stride, stride), (pad,) * 4)
    for added in (residual, Blocked.of(residual)):
        found = conv2d(Blocked.of(x) if into else x, Panelled.pack(weight), how, bias, added, "relu", blocked=out)
        got = found.images() if out else found
        torch.testing.assert_close(got, F.relu(expected + residual), rtol=1e-4, atol=1e-5)


def test_export_writes_checks_and_says_what_came_out(tmp_path: Path) -> None:
    model = pruned(Residual())
    masks = {name: p != 0 for name, p in model.named_parameters() if p.dim() > 1}
    (made,) = export_model(model, torch.randn(2, 3, 12, 12), out_dir=tmp_path, formats=["sparse"], masks=masks)
    assert made.format == "sparse"
    assert made.path.name == "model.sparse.safetensors"
    assert made.path.exists()
    assert made.max_difference < 1e-4
    assert any("layers packed" in note for note in made.notes)


@pytest.mark.usefixtures("sparse_wins")
@pytest.mark.parametrize(
    ("layer", "x"),
    [(nn.Linear(24, 16), torch.randn(5, 24)), (nn.Conv2d(3, 8, 3, padding=1), torch.randn(2, 3, 9, 9))],
)
def test_a_model_that_is_a_single_layer(layer: nn.Module, x: Tensor, tmp_path: Path) -> None:
    model, path = pruned(layer), tmp_path / "layer.sparse.safetensors"
    compiled = compile(model, x, cache=False, measure=False)
    assert any(isinstance(module, SparseLayer) for module in compiled.modules())
    torch.testing.assert_close(answers(compiled, x), answers(model, x), rtol=1e-4, atol=1e-5)
    save(compiled, path)
    assert torch.equal(answers(load(path, model, x), x), answers(compiled, x))
