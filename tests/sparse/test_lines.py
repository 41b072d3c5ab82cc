"""Convolutions along a line, and layers that keep a linear one's weight the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.sparse import compile, load, reason, save
from secateur.sparse.chain import Chain
from secateur.sparse.image_layers import DepthwiseConv2d
from secateur.sparse.layers import SparseConv2d, SparseLinear
from secateur.sparse.lines import LineConv1d
from sparse_models import answers, close, pruned

pytestmark = [pytest.mark.skipif(bool(reason()), reason=reason()), pytest.mark.usefixtures("sparse_wins")]


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 1},
        {"kernel_size": 5, "stride": 2, "padding": "valid"},
        {"kernel_size": 4, "padding": "same", "dilation": 2},
        {"kernel_size": 3, "padding": 4, "dilation": 3, "bias": False},
        {"kernel_size": 3, "padding": 1, "groups": 6},
    ],
)
@pytest.mark.parametrize("batch", [True, False])
def test_line_is_an_image_one_pixel_high(settings: dict[str, Any], batch: bool) -> None:
    model = pruned(nn.Sequential(nn.Conv1d(6, 12, **settings), nn.Conv1d(12, 5, 1)), 0.7)
    first: Any = model.get_submodule("0")
    x = torch.randn(2, 6, 70) if batch else torch.randn(6, 70)
    line = LineConv1d.of(first)
    assert torch.equal(answers(line, x), answers(first, x))
    assert torch.equal(line.weight, first.weight)
    assert line.stride == first.stride
    assert {name for name, _ in line.named_parameters()} <= {"conv.weight", "conv.bias"}
    compiled = compile(model, x, cache=False, measure=False)
    kind = DepthwiseConv2d if "groups" in settings else SparseConv2d
    assert isinstance(compiled.model.get_submodule("0.conv"), kind)
    for other in (x, x[..., :33]):
        close(answers(compiled, other), answers(model, other))


class Wave(nn.Module):
    """A network of lines with everything that may stand between two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn1 = nn.Conv1d(4, 16, 5, 2, bias=False), nn.BatchNorm1d(16)
        self.a, self.relu, self.drop = nn.Conv1d(16, 16, 3, padding=1), nn.ReLU(inplace=True), nn.Dropout()
        self.around = nn.Conv1d(16, 16, 3, padding=1, groups=16)
        self.b, self.bn2 = nn.Conv1d(16, 16, 1), nn.BatchNorm1d(16)
        self.norm, self.end = nn.GroupNorm(2, 16), nn.Conv1d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.stem(x)))
        y = self.around(self.drop(self.relu(self.a(x))))
        x = F.gelu(self.bn2(self.b(y)) + x)
        out: Tensor = self.end(self.norm(x)).mean(-1)
        return out


def test_lines_stay_images_between_convolutions(tmp_path: Path) -> None:
    model = pruned(Wave(), 0.7)
    for norm in (model.bn1, model.bn2):
        nn.init.uniform_(norm.get_buffer("running_mean"))  # type: ignore[union-attr, operator]
        nn.init.uniform_(norm.get_buffer("running_var"), 0.5, 2.0)  # type: ignore[union-attr, operator]
    x = torch.randn(2, 4, 150)
    compiled = compile(model, x, cache=False, measure=False)
    assert compiled.report.folded == 2
    assert compiled.report.left == {}
    assert compiled.fused.activations == {"stem.conv": "relu", "a.conv": "relu", "b.conv": "gelu"}
    assert compiled.fused.residuals == {"b.conv"}
    moves = [node.target for node in compiled.model.graph.nodes if node.op == "call_method"]  # type: ignore[union-attr]
    assert moves == ["unsqueeze", "squeeze", "unsqueeze", "squeeze", "mean"]  # around the norm that stays
    chain = next(module for module in compiled.chained.modules() if isinstance(module, Chain))
    assert len(chain.steps) == 3  # what is added lies in blocks, and the last one writes lines
    for other in (x, torch.randn(1, 4, 33)):
        close(answers(compiled, other), answers(model, other))
    save(compiled, tmp_path / "wave.sparse.safetensors")
    again = load(tmp_path / "wave.sparse.safetensors", Wave(), x)
    assert torch.equal(answers(again, x), answers(compiled, x))
    close(answers(torch.export.export(compiled, (x,)).module(), x), answers(model, x))


def test_lines_that_wrap_around_stay() -> None:
    model, x = pruned(nn.Sequential(nn.Conv1d(4, 8, 3, padding=1, padding_mode="circular"))), torch.randn(2, 4, 20)
    compiled = compile(model, x, cache=False, measure=False)
    assert compiled.report.left == {"0.weight": "a weight of Conv1d, which the kernels do not run"}


class InPlace(nn.Module):
    """Sums that change a tensor which is read again, in the ways in which Python can say it."""

    def __init__(self, layer: Any, way: int) -> None:
        super().__init__()
        self.a, self.b, self.c, self.way = layer(), layer(), layer(), way

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        g, old = self.b(h), h
        if self.way == 0:
            h.add_(g)
        elif self.way == 1:
            h += g
        elif self.way == 2:
            g.add_(h)
            h = g
        elif self.way == 3:
            h[:, :4].add_(g[:, :4])
        elif self.way == 4:
            h += g
            h = self.c(h) + old
        elif self.way == 5:
            torch.relu_(g)
            h = g + h
        out: Tensor = self.c(h)
        return out


@pytest.mark.parametrize("way", range(6))
@pytest.mark.parametrize("kind", ["linear", "line", "image"])
def test_what_works_in_place_still_does(kind: str, way: int) -> None:
    layers = {"linear": nn.Linear, "line": nn.Conv1d, "image": nn.Conv2d}
    x = {"linear": torch.randn(20, 8), "line": torch.randn(2, 8, 40), "image": torch.randn(2, 8, 5, 6)}[kind]
    model = pruned(InPlace(lambda: layers[kind](8, 8, 1) if kind != "linear" else nn.Linear(8, 8), way), 0.6)
    compiled = compile(model, x, cache=False, measure=False)
    assert sum(isinstance(module, SparseLinear | SparseConv2d) for module in compiled.modules()) == 3
    close(answers(compiled, x), answers(model, x))


def test_model_that_works_on_its_input_in_place() -> None:
    class Centres(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x -= 1.0
            out: Tensor = self.a(x.mul_(2.0))
            return out

    model, x = pruned(Centres()), torch.randn(4, 8)
    before = x.clone()
    compiled = compile(model, x, cache=False, measure=False)
    assert torch.equal(x, before)
    close(answers(compiled, x.clone()), answers(model, x.clone()))


class Transposed(nn.Module):
    """A linear layer whose weight is ``[inputs, outputs]``, as GPT-2's."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Scaled(Transposed):
    """Does more than a linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.5


@pytest.mark.parametrize(("inputs", "outputs"), [(12, 20), (16, 16)])
def test_weight_the_other_way_round(inputs: int, outputs: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Transposed(inputs, outputs), nn.GELU(), Transposed(outputs, inputs), Scaled(inputs, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand_like(parameter) > 0.7)
    x = torch.randn(2, 5, inputs)
    compiled = compile(model.eval(), x, cache=False, measure=False)
    assert {name for name, m in compiled.model.named_modules() if isinstance(m, SparseLinear)} == {"0", "2"}
    assert compiled.report.left == {"3.weight": "a weight of Scaled, which the kernels do not run"}
    close(answers(compiled, x), answers(model, x))
    save(compiled, tmp_path / "it.sparse.safetensors")
    again = load(tmp_path / "it.sparse.safetensors", model, x)
    assert torch.equal(answers(again, x), answers(compiled, x))
    alone = compile(model[0], x, cache=False, measure=False)
    close(answers(alone, x), answers(model[0], x))


@pytest.mark.parametrize("features", [8, 6])
def test_norm_over_positions_is_not_folded_into_features(features: int) -> None:
    model, x = pruned(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(features))), torch.randn(4, features, 8)
    nn.init.uniform_(model[1].running_mean)  # type: ignore[index, arg-type]
    compiled = compile(model, x, cache=False, measure=False)
    assert compiled.report.folded == 0
    close(answers(compiled, x), answers(model, x))
