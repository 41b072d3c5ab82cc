"""Sparse products by torch: where the kernels are missing, and the same answers where they are not."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dense_products import (
    activations,
    assert_close,
    dense_conv2d,
    dense_linear,
    densities,
    linear_sizes,
    numbers,
    seeds,
    sparse,
)
from secateur.errors import SecateurWarning, SparseError, WeightError
from secateur.sparse import (
    Convolution,
    Csr,
    Panelled,
    SparseConv2d,
    SparseLinear,
    compile,
    conv2d,
    fallback,
    library,
    linear,
    load,
    reason,
    save,
)
from secateur.sparse.library import VARIABLE
from secateur.sparse.tune import Option, Tuned, Tuner


@pytest.fixture
def hidden(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No kernels, and nobody was warned yet."""
    monkeypatch.setattr(library, "_opened", lambda: "the kernels are hidden")
    fallback._warn.cache_clear()
    yield
    fallback._warn.cache_clear()


@pytest.mark.filterwarnings("ignore::secateur.errors.SecateurWarning")
@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(0, 40),
    columns=st.integers(0, 90),
    count=st.integers(0, 40),
    density=densities,
    activation=activations,
    feature_major=st.booleans(),
    extras=st.tuples(*(st.booleans() for _ in range(4))),
    seed=seeds,
)
def test_linear_is_the_dense_layer(
    rows: int,
    columns: int,
    count: int,
    density: float,
    activation: str,
    feature_major: bool,
    extras: tuple[bool, ...],
    seed: int,
) -> None:
    weight = sparse(rows, columns, density, seed)
    packed = Csr.pack(weight)
    assert torch.equal(packed.to_dense(), weight)
    with_bias, with_residual, turned, poisoned = extras
    x = numbers(columns, count, seed=seed).t() if turned else numbers(count, columns, seed=seed)
    if poisoned and x.numel():
        activation = "silu" if activation == "gelu" else activation  # torch's own gelu of infinity is NaN in float32
        x[seed % count, seed % columns] = (math.nan, math.inf, -math.inf)[seed % 3]
    bias = numbers(2 * rows, seed=1)[::2] if with_bias else None
    residual = numbers(count, rows, seed=2) if with_residual else None
    got = linear(x, packed, bias, residual, activation, feature_major=feature_major)
    expected = dense_linear(x, weight, bias, residual, activation)
    assert_close(got, expected, linear_sizes(x, weight, bias, residual))


@pytest.mark.filterwarnings("ignore::secateur.errors.SecateurWarning")
@pytest.mark.parametrize("poison", [0.0, math.inf])
@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize(
    "how",
    [
        Convolution(),
        Convolution((3, 3), padding=(1, 1, 1, 1)),
        Convolution((2, 3), (2, 1), (0, 2, 1, 0), (1, 2)),
        Convolution((1, 1), (2, 2)),
    ],
)
def test_conv2d_is_the_dense_layer(how: Convolution, blocked: bool, poison: float) -> None:
    weight = sparse(6, 4 * math.prod(how.kernel), 0.3, 1)
    x = numbers(2, 4, 9, 11)
    x[1, 2, 3, 4] += poison
    shaped, bias = weight.view(6, 4, *how.kernel), numbers(6)
    residual = numbers(2, 6, *how.output(9, 11), seed=2)
    got = conv2d(x, Csr.pack(weight), how, bias, residual, "silu", blocked=blocked)
    expected = dense_conv2d(x, shaped, how, bias, residual, "silu")
    sizes = dense_conv2d(numbers(2, 4, 9, 11).abs(), shaped.abs(), how, bias.abs(), residual.abs(), "none")
    assert_close(got.images() if blocked else got, expected, sizes)


@pytest.mark.parametrize(
    "shape", [(0, 4, 9, 11), (2, 0, 9, 11), (2, 4, 0, 11)], ids=["no images", "no channels", "no rows of pixels"]
)
def test_empty_images_give_the_bias(shape: tuple[int, ...]) -> None:
    how = Convolution((3, 3), padding=(2, 2, 2, 2))
    bias = numbers(6)
    got = conv2d(torch.zeros(shape), Csr.pack(torch.zeros(6, shape[1], 3, 3)), how, bias)
    assert got.shape == (shape[0], 6, *how.output(shape[2], shape[3]))
    assert torch.equal(got, bias.view(-1, 1, 1).expand_as(got))


@pytest.mark.usefixtures("hidden")
def test_one_warning_says_what_is_missing() -> None:
    packed, x = Csr.pack(sparse(8, 12, 0.3, 1)), numbers(3, 12)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        linear(x, packed)
        linear(x, packed)
        SparseLinear(packed)(x)
        conv2d(numbers(1, 12, 3, 3), packed, Convolution())
    assert [warning.category for warning in caught] == [SecateurWarning]
    said = str(caught[0].message)
    assert "since the kernels are hidden." in said
    assert "1.3 to 3 times as long as the kernels do" in said


@pytest.mark.skipif(bool(reason()), reason=reason())
def test_nobody_is_warned_where_the_kernels_are() -> None:
    fallback._warn.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear(numbers(3, 12), Csr.pack(sparse(8, 12, 0.3, 1)))


@pytest.mark.usefixtures("hidden")
@pytest.mark.filterwarnings("ignore::secateur.errors.SecateurWarning")
def test_layers_of_it_are_layers() -> None:
    weight, x = sparse(8, 27, 0.3, 1), numbers(2, 3, 6, 6)
    layer = SparseConv2d(Csr.pack(weight), Convolution((3, 3)), numbers(8), activation="relu")
    expected = dense_conv2d(x, weight.view(8, 3, 3, 3), Convolution((3, 3)), numbers(8), None, "relu")
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert "27 -> 8, csr" in repr(layer)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))


def test_what_does_not_fit_is_refused() -> None:
    packed = Csr.pack(sparse(8, 12, 0.3, 1))
    header, arrays = packed.header(), packed.tensors()
    with pytest.raises(WeightError, match=r"float32 weights on the CPU"):
        Csr.pack(torch.ones(3, 3).half())
    with pytest.raises(SparseError, match=r"expected inputs of 12 features"):
        linear(numbers(3, 11), packed)
    with pytest.raises(SparseError, match=r"tile must be a power of two"):
        linear(numbers(3, 12), packed, tile=3)
    twice = arrays["indices"].clone()
    twice[1] = twice[0]
    changes: list[dict[str, torch.Tensor]] = [{"indices": twice}, {"offsets": arrays["offsets"].flip(0)}]
    changes += [{"indices": arrays["indices"] + step} for step in (-1, 9)]
    for change in changes:
        with pytest.raises(SparseError, match=r"reading a csr weight.*damaged"):
            Csr.from_tensors(header, {**arrays, **change})
    for numbers_ in ({"rows": 9, "columns": 12}, {"rows": 8, "columns": 2**31}, {"rows": 2**40, "columns": 2**40}):
        with pytest.raises(SparseError, match=r"reading a csr weight.*damaged"):
            Csr.from_tensors(numbers_, arrays)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 96), nn.Linear(96, 64), nn.Linear(64, 8)
        with torch.no_grad():
            for layer, density in ((self.a, 0.05), (self.b, 0.5)):
                layer.weight.copy_(sparse(*layer.weight.shape, density, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.c(torch.relu(self.b(torch.relu(self.a(x)))))
        return out


@pytest.mark.usefixtures("hidden")
@pytest.mark.filterwarnings("ignore::secateur.errors.SecateurWarning")
def test_a_model_is_compiled_without_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only layers with zeros enough are tried, and what is chosen is saved and loaded like any other."""
    tried: list[Option] = []

    def tune(self: Tuner, problem: object) -> Tuned:
        from secateur.sparse.tune import options

        ways = list(options(problem))  # type: ignore[arg-type]
        tried.extend(ways)
        return Tuned(ways[0] if ways else Option(), 1.0, 0.5)

    monkeypatch.setattr(Tuner, "tune", tune)
    model, x = Mlp().eval(), numbers(16, 64)
    compiled = compile(model, x, cache=False, measure=False)
    assert tried == [Option("csr")]
    assert [row.choice for row in compiled.report.layers] == ["csr", "dense", "dense"]
    assert compiled.report.isa == "torch"
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    save(compiled, tmp_path / "model.sparse.safetensors")
    loaded = load(tmp_path / "model.sparse.safetensors", Mlp(), x)
    assert torch.equal(loaded(x), compiled(x))


@pytest.mark.skipif(bool(reason()), reason=reason())
def test_a_file_that_needs_the_kernels_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def tune(self: Tuner, problem: object) -> Tuned:
        return Tuned(Option("panelled", (1, 1), 64, 16), 1.0, 0.5)

    monkeypatch.setattr(Tuner, "tune", tune)
    model, x = Mlp().eval(), numbers(16, 64)
    save(compile(model, x, cache=False, measure=False), tmp_path / "model.sparse.safetensors")
    monkeypatch.setattr(library, "_opened", lambda: "the kernels are hidden")
    with pytest.raises(SparseError, match=r"model\.sparse\.safetensors: a: the kernels are hidden"):
        load(tmp_path / "model.sparse.safetensors", Mlp(), x)
    with pytest.raises(SparseError, match="the kernels are hidden"):
        Panelled.pack(model.a.weight)


SCRIPT = """
import torch, warnings
from torch import nn
from secateur.sparse import Csr, compile, linear, reason
warnings.simplefilter("always")
weight = torch.randn(64, 96) * (torch.rand(64, 96) < 0.05)
x = torch.randn(5, 96)
torch.testing.assert_close(linear(x, Csr.pack(weight)), x @ weight.t(), rtol=1e-4, atol=1e-4)
model = nn.Sequential(nn.Linear(96, 64)).eval()
with torch.no_grad():
    model[0].weight.copy_(weight)
compiled = compile(model, x, cache=False, measure=False)
torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
print(reason())
"""


def test_a_process_without_the_library_goes_on() -> None:
    environment = {**os.environ, VARIABLE: "/nowhere/at.all"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert "no such file" in done.stdout
    assert done.stderr.count(f"torch's own sparse matrices, since {VARIABLE} is '/nowhere/at.all'") == 1
    assert "beta" not in done.stderr
