"""Diagonals and products against loops, closed forms and the whole Hessian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.errors import MissingStatsError, SecateurError
from secateur.stats import (
    ConnectionSensitivity,
    FisherDiagonal,
    GaussNewtonDiagonal,
    HessianGradient,
    HutchinsonDiagonal,
    LossChange,
)
from secateur.stats.inverse_fisher import InverseFisher

from .saliency_nets import cross_entropy, flat, full_hessian, mlp, samples, source_of

WAYS = ("layers", "vmap", "loop")


def fisher_by_loop(model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], data: list[Any]) -> dict[str, Tensor]:
    """One plain backward per sample, on ``.grad``."""
    model = model.eval()
    sums = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    count = 0
    for x, y in data:
        for i in range(len(x)):
            model.zero_grad()
            loss_fn(model, (x[i : i + 1], y[i : i + 1])).backward()
            for n, p in model.named_parameters():
                sums[n] += 0 if p.grad is None else p.grad.square()
            count += 1
    model.zero_grad(set_to_none=True)
    return {n: s / count for n, s in sums.items()}


class Everything(nn.Module):
    """Convolutions of all kinds, norms, a layer called twice, positions, an in-place activation, tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1, dilation=1)
        self.bn = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 4, 3, padding="same", groups=2)
        self.depthwise = nn.Conv2d(4, 4, (1, 3), padding=(0, 1), groups=4, bias=False)
        self.up = nn.ConvTranspose2d(4, 3, 2)
        self.circular = nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular")
        self.tokens = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)
        self.twice = nn.Linear(3, 3)
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied.weight = self.twice.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = torch.relu_(x)
        x = self.depthwise(torch.tanh(self.grouped(self.bn(x))))
        x = torch.tanh(self.circular(self.up(x))).flatten(2).transpose(1, 2)
        x = self.norm(torch.tanh(self.tokens(x)))
        return self.tied(torch.tanh(self.twice(torch.tanh(self.twice(x))))).mean(1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_fisher_is_the_loop(way: str, chunk: int) -> None:
    model, data = mlp(), samples()
    got = FisherDiagonal(way, chunk).collect(source_of(model, data=data))
    for name, want in fisher_by_loop(model, cross_entropy, data).items():
        torch.testing.assert_close(got[name], want, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("way", WAYS)
def test_fisher_of_every_kind_of_layer(way: str) -> None:
    torch.manual_seed(0)
    model = Everything().double()
    for p in model.bn.parameters():
        p.data.uniform_(0.5, 1.5)
    data = [(torch.randn(4, 2, 7, 6, dtype=torch.float64), torch.randint(0, 3, (4,))) for _ in range(2)]
    got = FisherDiagonal(way, 3).collect(source_of(model, data=data))
    want = fisher_by_loop(model, cross_entropy, data)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-8, atol=1e-14, msg=name)


def test_fisher_is_not_the_square_of_the_mean() -> None:
    model, data = mlp(), samples(batches=1)
    got = FisherDiagonal().collect(source_of(model, data=data))
    mean = torch.autograd.grad(cross_entropy(model, data[0]), model[0].weight)[0]
    assert float((got["0.weight"] / mean.square()).median()) > 2


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fisher_is_wide_and_leaves_the_model_alone(way: str, dtype: torch.dtype) -> None:
    model = mlp().to(dtype).train()
    model[0].weight.requires_grad_(False)
    model[2].weight.grad = torch.ones_like(model[2].weight)
    data = [(x.to(dtype), y) for x, y in samples()]
    before = {n: p.clone() for n, p in model.state_dict().items()}
    out = FisherDiagonal(way).collect(source_of(model, data=data))
    assert all(v.dtype == torch.float32 for v in out.values())
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert model.training
    assert not model[0].weight.requires_grad
    assert torch.equal(model[2].weight.grad, torch.ones_like(model[2].weight))
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("loss_fn", "what"),
    [
        (lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1], reduction="sum"), "not the mean over its samples"),
        (lambda m, b: (m(b[0]) - m(b[0]).mean(0)).square().mean(), "couples the samples"),
        (lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1], reduction="none"), "one number per batch"),
        (lambda m, b: cross_entropy(m, b) * float("nan"), "loss is nan"),
        (lambda m, b: cross_entropy(m, b).detach(), "no gradient"),
        (lambda m, b: cross_entropy(m, b) * 0, "zero for every weight"),
    ],
)
def test_fisher_refuses_other_losses(way: str, loss_fn: Callable[[nn.Module, Any], Tensor], what: str) -> None:
    with pytest.raises(MissingStatsError, match=what):
        FisherDiagonal(way).collect(source_of(mlp(), loss_fn))


class Packed(nn.Module):
    """Uses a layer's weight outside the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + nn.functional.linear(x * x, self.fc.weight)


class Branching(nn.Module):
    """Decides by the data."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if bool(x.sum() > -1e9) else self.fc(-x)


class Folded(nn.Module):
    """Hides the samples from the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.reshape(-1, 2)).reshape(len(x), -1, 3).sum(1)


@pytest.mark.parametrize(
    ("model", "way", "works"), [(Packed, "layers", "vmap"), (Folded, "layers", "vmap"), (Branching, "vmap", "loop")]
)
def test_a_way_that_does_not_fit_is_refused_and_another_named(model: type[nn.Module], way: str, works: str) -> None:
    torch.manual_seed(0)
    net = model().double()
    with pytest.raises(MissingStatsError, match=works):
        FisherDiagonal(way).collect(source_of(net))
    got = FisherDiagonal(works).collect(source_of(net))
    for name, want in fisher_by_loop(net, cross_entropy, samples()).items():
        torch.testing.assert_close(got[name], want, rtol=1e-9, atol=1e-14)


def test_recurrent_layers_go_one_by_one() -> None:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(2, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x.reshape(len(x), 2, 2))[0][:, -1]

    net = Net().double()
    with pytest.raises(MissingStatsError, match="vmap"):
        FisherDiagonal("layers").collect(source_of(net))
    got = FisherDiagonal("loop").collect(source_of(net))
    for name, want in fisher_by_loop(net, cross_entropy, samples()).items():
        torch.testing.assert_close(got[name], want)


BATCHED = (FisherDiagonal(), FisherDiagonal("vmap"), GaussNewtonDiagonal())
ALL = (*BATCHED, HutchinsonDiagonal(samples=2), HessianGradient(), LossChange())


@pytest.mark.parametrize("statistic", [*ALL, FisherDiagonal("loop"), ConnectionSensitivity()], ids=str)
def test_statistics_hold_no_graph(statistic: Any) -> None:
    """Also by parameters that are not asked about, whose gradients are wanted elsewhere."""
    found = statistic.collect(source_of(mlp(), weights_only=True))
    assert found.keys() == {"0.weight", "2.weight"}
    assert not any(v.requires_grad for v in found.values())


@pytest.mark.parametrize("statistic", ALL, ids=str)
def test_no_batches(statistic: Any) -> None:
    with pytest.raises(MissingStatsError, match="no batches"):
        statistic.collect(source_of(mlp(), data=[]))


@pytest.mark.parametrize("statistic", ALL, ids=str)
@pytest.mark.parametrize(
    ("loss_fn", "what"),
    [
        (lambda m, b: m(b[0]).mean(1), "one .*number per batch"),
        (lambda m, b: cross_entropy(m, b) / 0, "finite|loss is"),
        (lambda m, b: cross_entropy(m, b) * 0, "zero for every weight"),
    ],
)
def test_bad_losses(statistic: Any, loss_fn: Callable[[nn.Module, Any], Tensor], what: str) -> None:
    with pytest.raises(MissingStatsError, match=what):
        statistic.collect(source_of(mlp(), loss_fn))


@pytest.mark.parametrize(
    "statistic", [*ALL[:2], FisherDiagonal("loop"), *ALL[3:-1], ConnectionSensitivity(), InverseFisher()], ids=str
)
def test_a_finite_loss_without_a_finite_gradient(statistic: Any) -> None:
    """One error, which says so: not that weights are used elsewhere, nor that gradients are zero."""
    rooted = lambda m, b: cross_entropy(m, b) + (m[2].weight * 0.0).square().sum().sqrt()  # noqa: E731
    with pytest.raises(MissingStatsError, match=r"2.weight is NaN or infinite"):
        statistic.collect(source_of(mlp(), rooted))


@pytest.mark.parametrize("statistic", [*BATCHED, FisherDiagonal("loop"), InverseFisher()], ids=str)
def test_a_layer_that_cannot_run_one_sample(statistic: Any) -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 3)).double()
    with pytest.raises(MissingStatsError, match=r"1 of its samples cannot: .*couples the samples of a batch"):
        statistic.collect(source_of(net))


@pytest.mark.parametrize("statistic", ALL[:-1], ids=str)
def test_integers_have_no_gradient(statistic: Any) -> None:
    model = mlp()
    model.register_parameter("codes", nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False))
    with pytest.raises(MissingStatsError, match=r"codes has dtype torch.int8"):
        statistic.collect(source_of(model))


@pytest.mark.parametrize("statistic", BATCHED, ids=str)
@pytest.mark.parametrize(
    ("batch", "what"), [((torch.zeros(2, 4), torch.zeros(3)), r"rows"), ("text", "no tensor"), ({"a": 1}, "no tensor")]
)
def test_batches_that_cannot_be_taken_apart(statistic: Any, batch: Any, what: str) -> None:
    with pytest.raises(MissingStatsError, match=what):
        statistic.collect(source_of(mlp(), lambda m, b: m(torch.zeros(1, 4, dtype=torch.float64)).sum(), [batch]))


# --- Gauss-Newton ----------------------------------------------------------------------------------------------------


def test_gauss_newton_of_linear_regression() -> None:
    """diag(X X^T) / N for every output, whatever the targets."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False).double()
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
    half = lambda m, b: (m(b[0]) - b[1]).square().sum(1).mean() / 2  # noqa: E731
    got = GaussNewtonDiagonal().collect(source_of(model, half, [(x, y)]))["weight"]
    want = (x.T @ x).diagonal() / 9
    torch.testing.assert_close(got, want.expand(3, 4))


def test_gauss_newton_is_the_hessian_of_a_linear_softmax() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    data = samples(batches=1)
    got = GaussNewtonDiagonal().collect(source_of(model, data=data))
    torch.testing.assert_close(flat(got), full_hessian(model, cross_entropy, data).diagonal())


def test_gauss_newton_of_a_network_by_jacobians() -> None:
    model, data = mlp(), samples(batches=1, count=5)
    x, _ = data[0]
    want = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for row in x:
        z = model(row[None])[0]
        p = z.softmax(0).detach()
        jacobian = [torch.autograd.grad(z[c], list(model.parameters()), retain_graph=True) for c in range(3)]
        for a in range(3):
            for b in range(3):
                curvature = p[a] * (float(a == b) - p[b])
                for k, n in enumerate(want):
                    want[n] += curvature * jacobian[a][k] * jacobian[b][k] / len(x)
    got = GaussNewtonDiagonal(chunk=2).collect(source_of(model, data=data))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-14)


def test_gauss_newton_needs_a_convex_loss_of_one_tensor() -> None:
    with pytest.raises(MissingStatsError, match="not convex"):
        GaussNewtonDiagonal().collect(source_of(mlp(), lambda m, b: -m(b[0]).square().mean()))
    with pytest.raises(MissingStatsError, match="ran it 2 times"):
        GaussNewtonDiagonal().collect(source_of(mlp(), lambda m, b: (m(b[0]) + m(b[0])).square().mean()))

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.net(x), x

    with pytest.raises(MissingStatsError, match="one tensor"):
        GaussNewtonDiagonal().collect(source_of(Pair(), lambda m, b: m(b[0])[0].square().mean()))


# --- Hutchinson, Hg --------------------------------------------------------------------------------------------------


def test_hutchinson_is_exact_where_the_hessian_is_diagonal() -> None:
    model = nn.Linear(3, 2, bias=False).double()
    h = torch.arange(1.0, 7.0, dtype=torch.float64).view(2, 3)
    got = HutchinsonDiagonal(samples=1).collect(source_of(model, lambda m, b: (h * m.weight.square()).sum() / 2))
    torch.testing.assert_close(got["weight"], h)


def test_hutchinson_converges_to_the_diagonal() -> None:
    model, data = mlp(), samples()
    want = full_hessian(model, cross_entropy, data).diagonal()
    errors = {}
    for draws in (10, 1000):
        got = HutchinsonDiagonal(draws, seed=3, negatives="keep").collect(source_of(model, data=data))
        errors[draws] = float((flat(got) - want).norm() / want.norm())
    assert errors[1000] < 0.1
    assert errors[1000] < errors[10] / 4  # a hundred times the draws, a tenth of the error


def test_nothing_is_left_of_a_diagonal_that_is_negative_everywhere() -> None:
    with pytest.raises(MissingStatsError, match="all estimates are negative"):
        HutchinsonDiagonal(1).collect(source_of(nn.Linear(3, 2).double(), lambda m, b: -m.weight.square().sum()))


def test_hutchinson_clamps_and_repeats() -> None:
    source = source_of(mlp())
    kept, clamped = (HutchinsonDiagonal(2, negatives=n).collect(source) for n in ("keep", "clamp"))
    assert float(flat(kept).min()) < 0
    torch.testing.assert_close(flat(clamped), flat(kept).clamp_min(0), rtol=0, atol=0)
    assert torch.equal(flat(HutchinsonDiagonal(2).collect(source)), flat(clamped))
    assert not torch.equal(flat(HutchinsonDiagonal(2, seed=1).collect(source)), flat(clamped))


@pytest.mark.parametrize("statistic", [HutchinsonDiagonal(samples=1, negatives="keep"), HessianGradient()], ids=str)
def test_a_loss_without_curvature(statistic: Any) -> None:
    linear = lambda m, b: m(b[0]).mean()  # noqa: E731
    with pytest.raises(MissingStatsError, match="zero for every weight"):
        statistic.collect(source_of(nn.Linear(4, 3).double(), linear))


def test_a_function_without_a_second_derivative() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.square().sum()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 2 * g * ctx.saved_tensors[0]

    with pytest.raises(MissingStatsError, match="differentiated twice"):
        HessianGradient().collect(source_of(mlp(), lambda m, b: Once.apply(m(b[0]))))


def test_hessian_gradient_is_a_difference_of_gradients() -> None:
    model, data = mlp(), samples()
    got = HessianGradient().collect(source_of(model, data=data))
    names = [n for n, _ in model.named_parameters()]

    def gradient() -> list[Tensor]:
        parts = [torch.autograd.grad(cross_entropy(model, b), list(model.parameters())) for b in data]
        return [torch.stack(p).mean(0) for p in zip(*parts, strict=True)]

    g, step = gradient(), 1e-5
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, v in zip(model.parameters(), g, strict=True):
                p += sign * step * v
        ends.append(gradient())
        with torch.no_grad():
            for p, v in zip(model.parameters(), g, strict=True):
                p -= sign * step * v
    for name, up, down in zip(names, *ends, strict=True):
        torch.testing.assert_close(got[name], (up - down) / (2 * step), rtol=1e-5, atol=1e-8)


def test_temperature_divides_the_logits() -> None:
    model, data = mlp(), samples()
    hot = lambda m, b: nn.functional.cross_entropy(m(b[0]) / 7, b[1])  # noqa: E731
    got, want = (
        HessianGradient(7.0).collect(source_of(model, data=data)),
        HessianGradient().collect(source_of(model, hot, data)),
    )
    torch.testing.assert_close(flat(got), flat(want))
    assert not model._forward_hooks
    with pytest.raises(SecateurError, match="temperature"):
        HessianGradient(0.0)
    parts = lambda m, b: nn.functional.cross_entropy(m[2](m[1](m[0](b[0]))), b[1])  # noqa: E731
    with pytest.raises(MissingStatsError, match="never ran the model itself"):
        HessianGradient(7.0).collect(source_of(model, parts, data))


# --- brute force -----------------------------------------------------------------------------------------------------


def test_loss_change_of_units() -> None:
    model, data = mlp(), samples()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    got = LossChange("unit").collect(source_of(model, data=data, weights_only=True))["0.weight"]
    with torch.no_grad():
        base = sum(float(cross_entropy(model, b)) for b in data) / 2
        for unit in range(5):
            cut = mlp()
            cut[0].weight[unit], cut[0].bias[unit] = 0, 0
            want = sum(float(cross_entropy(cut, b)) for b in data) / 2 - base
            assert got[unit].tolist() == pytest.approx([want] * 4)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_too_many_candidates_are_refused_at_once() -> None:
    calls = []
    with pytest.raises(MissingStatsError, match=r"43 candidates, and limit is 42"):
        LossChange(limit=42).collect(source_of(mlp(), lambda m, b: calls.append(1) or cross_entropy(m, b)))
    assert not calls
    LossChange(limit=43).collect(source_of(mlp(), data=samples(batches=1)))


def test_the_weight_comes_back_when_a_loss_fails() -> None:
    model = mlp()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    calls = []

    def failing(m: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
        calls.append(1)
        if len(calls) > 9:
            raise ZeroDivisionError
        return cross_entropy(m, b)

    with pytest.raises(MissingStatsError, match="ZeroDivisionError"):
        LossChange().collect(source_of(model, failing))
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
