"""What is recognised in a model, what is not, and what a model may do to its own layers."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.errors import SecateurWarning
from secateur.sparse import compile, load, reason, save
from secateur.sparse.layers import SparseConv2d, SparseLinear
from secateur.sparse.watch import difference
from sparse_models import answers, close, pruned

pytestmark = [pytest.mark.skipif(bool(reason()), reason=reason()), pytest.mark.usefixtures("sparse_wins")]


def packed(model: nn.Module) -> set[str]:
    return {name for name, m in model.named_modules() if isinstance(m, SparseLinear | SparseConv2d)}


@pytest.mark.parametrize(
    ("expected", "got", "is_infinite"),
    [
        (torch.ones(3), torch.full((3,), math.nan), True),
        (torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.nan]), False),
        (torch.tensor([1.0, math.inf]), torch.tensor([1.0, -math.inf]), True),
        (torch.tensor([1.0, math.inf]), torch.tensor([1.0, math.nan]), True),
        (torch.ones(1), torch.ones(5, 5), True),
        (torch.ones(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), True),
        ({"a": [torch.ones(2), 3]}, {"a": [torch.ones(2), 4]}, False),
        (torch.empty(0), torch.empty(0), False),
    ],
)
def test_difference_sees_shapes_and_what_is_not_finite(expected: Any, got: Any, is_infinite: bool) -> None:
    assert difference(expected, got) == (math.inf if is_infinite else 0.0)
    assert difference(torch.tensor([2.0, -4.0]), torch.tensor([2.0, -3.0])) == 0.25


class Tied(nn.Module):
    """Computes with a weight outside of its layer, too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 8), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.a(self.b(x)), self.a.weight.t()).to(self.b.weight)


def test_weight_that_is_used_outside_of_its_layer_stays() -> None:
    model, x = pruned(Tied(), 0.7), torch.randn(3, 16)
    compiled = compile(model, x, cache=False, measure=False)
    assert packed(compiled.model) == {"b"}
    assert compiled.report.left == {"a.weight": "since the model also computes with it outside of its layer"}
    close(answers(compiled, x), answers(model, x))


def test_weight_that_an_embedding_shares_does_not() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(30, 16), nn.Linear(16, 30, bias=False)
            self.head.weight = self.words.weight

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.head(self.words(ids))
            return out

    model, ids = Words().eval(), torch.randint(0, 30, (2, 5))
    model.head.weight.data *= torch.rand(30, 16) > 0.8
    compiled = compile(model, ids, cache=False, measure=False)
    assert packed(compiled.model) == {"head"}
    close(answers(compiled, ids), answers(model, ids))


class Clamped(nn.Module):
    """A linear layer, as long as nothing is large."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(size, size)), nn.Parameter(torch.randn(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias).clamp(-20, 20)


class Squashed(Clamped):
    """Zero where its weight is, as a linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, self.weight, self.bias))


@pytest.mark.parametrize("kind", [Clamped, Squashed])
def test_nothing_is_recognised_by_the_numbers_at_hand(kind: type[Clamped], tmp_path: Path) -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 16), kind(16), nn.Linear(16, 4)).eval()

    dense, x = pruned(model(), 0.7), torch.randn(3, 16) * 1e-3
    compiled = compile(dense, x, cache=False, measure=False)
    assert packed(compiled.model) == {"0", "2"}
    close(answers(compiled, 1e6 * x), answers(dense, 1e6 * x))
    save(compiled, tmp_path / "it.sparse.safetensors")
    empty = model()
    for parameter in empty.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(answers(load(tmp_path / "it.sparse.safetensors", empty, x), x), answers(compiled, x))


class NormAct(nn.BatchNorm2d):
    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.act = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(super().forward(x))
        return out


def test_activation_in_a_norm_is_kept_where_the_example_never_meets_it(tmp_path: Path) -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), NormAct(8), nn.Conv2d(8, 4, 1)).eval()

    dense, x = pruned(model(), 0.5), torch.rand(2, 3, 6, 6)
    compiled = compile(dense, x, cache=False, measure=False)
    close(answers(compiled, 400 * x), answers(dense, 400 * x))
    save(compiled, tmp_path / "it.sparse.safetensors")
    assert torch.equal(answers(load(tmp_path / "it.sparse.safetensors", model(), x), x), answers(compiled, x))


class LooksInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = NormAct(3), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(self.norm.act(self.norm(x)) * self.norm.num_features)
        return out


def test_model_that_looks_inside_a_norm_keeps_it() -> None:
    model, x = pruned(LooksInside()), torch.randn(2, 3, 6, 6)
    compiled = compile(model, x, cache=False, measure=False)
    assert packed(compiled.model) == {"conv"}
    assert type(compiled.model.get_submodule("norm")) is NormAct
    close(answers(compiled, x), answers(model, x))


class Two(Clamped):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.linear(x + y, self.weight, self.bias)


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Two(8), (torch.randn(2, 8), torch.randn(2, 8))),
        (Clamped(8), {"x": torch.randn(2, 8)}),
        (nn.Linear(8, 8), {"input": torch.randn(2, 8)}),
        (nn.Conv1d(8, 8, 3), {"input": torch.randn(2, 8, 9)}),
        (nn.Conv2d(8, 8, 3), {"input": torch.randn(2, 8, 9, 9)}),
    ],
)
def test_single_layers_take_what_they_took(model: nn.Module, inputs: Any) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        model.get_parameter("weight").mul_(torch.rand_like(model.get_parameter("weight")) > 0.6)
    compiled = compile(model, inputs, cache=False, measure=False)
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    close(answers(compiled, *args, **kwargs), answers(model, *args, **kwargs))
    assert bool(packed(compiled)) == ("input" in kwargs)


def test_layers_that_are_called_by_name() -> None:
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv1d(4, 8, 3), nn.Linear(10, 6), nn.Conv2d(8, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.c(input=self.b(input=self.a(input=x)).unsqueeze(-1))
            return out

    model, x = pruned(ByName(), 0.6), torch.randn(2, 4, 12)
    compiled = compile(model, x, cache=False, measure=False)
    assert packed(compiled.model) == {"a.conv", "b", "c"}
    close(answers(compiled, x), answers(model, x))


@pytest.mark.parametrize("layer", [lambda: nn.Linear(8, 8), lambda: nn.Conv1d(8, 8, 1)])
def test_layer_with_two_names_is_replaced_under_both(layer: Any) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = self.b = layer()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(torch.relu(self.a(x)))
            return out

    model, x = pruned(Shared(), 0.6), torch.randn(2, 8, 8)
    compiled = compile(model, x, cache=False, measure=False)
    assert packed(compiled.model) in ({"a"}, {"a.conv"})
    assert compiled.report.left == {}
    assert compiled.fused.activations == {}
    close(answers(compiled, x), answers(model, x))


class Optional(nn.Module):
    """Its argument decides by being there, in ways that a stand-in does not show."""

    def __init__(self, way: int) -> None:
        super().__init__()
        self.k, self.l, self.way = nn.Linear(8, 8), nn.Linear(8, 8), way

    def forward(self, x: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        if self.way == 0:
            out: Tensor = self.l(x if a is None else self.k(x))
        else:
            out = self.l(self.k(x)) * (2.0 if (a is None) != (b is None) else 3.0)
        return out


@pytest.mark.parametrize("way", [0, 1])
def test_arguments_may_be_given_in_the_example_and_left_out_later(way: int) -> None:
    model, x = pruned(Optional(way), 0.6), torch.randn(3, 8)
    compiled = compile(model, (x, x), cache=False, measure=False)
    assert not compiled.report.traced
    for given in ((x,), (x, x), (x, x, x), (x, None, x)):
        close(answers(compiled, *given), answers(model, *given))


def test_norm_behind_a_layer_with_hooks_stays() -> None:
    layer = nn.Conv1d(4, 8, 3)
    layer.register_forward_hook(lambda module, inputs, output: output * 2)
    model, x = pruned(nn.Sequential(layer, nn.BatchNorm1d(8), nn.Conv1d(8, 4, 1))), torch.randn(2, 4, 12)
    nn.init.uniform_(model[1].running_mean)  # type: ignore[index, arg-type]
    compiled = compile(model, x, cache=False, measure=False)
    assert compiled.report.folded == 0
    close(answers(compiled, x), answers(model, x))


def test_example_is_not_changed_by_a_model_that_works_in_place() -> None:
    class Grows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(512, 512)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.a(x.mul_(1.5))
            return out

    model, x = pruned(Grows(), 0.98), torch.randn(4, 512)
    before = x.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SecateurWarning)  # faster or not
        compile(model, x, cache=False, measure=True)
    assert torch.equal(x, before)
