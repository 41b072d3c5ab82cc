"""What a watched training adds up to, for any optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from secateur.errors import CheckpointError, MissingStatsError, RecipeError, SecateurError, WeightError
from secateur.scores import Karnin, Movement
from secateur.stats import PathIntegral, Trajectory, collect
from secateur.types import Source

from .saliency_nets import cross_entropy, mlp, samples

OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=1e-3),
    "momentum": lambda p: SGD(p, lr=1e-4, momentum=0.9),
    "nesterov": lambda p: SGD(p, lr=1e-4, momentum=0.9, nesterov=True),
    "adam": lambda p: Adam(p, lr=1e-4),
    "adamw": lambda p: AdamW(p, lr=1e-4, weight_decay=0.1),
    "rmsprop": lambda p: RMSprop(p, lr=1e-5),
}


def train(model: nn.Module, optimizer: Optimizer, loss: Callable[[], Tensor], steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_falls_add_up_to_the_fall_of_the_loss(name: str) -> None:
    """Sum over weights and steps of -g dw is E(initial) - E(final), the better the smaller the steps."""
    model, batch = mlp(), samples(batches=1)[0]
    loss = lambda: cross_entropy(model, batch)  # noqa: E731
    optimizer = OPTIMIZERS[name](model.parameters())
    path, before = PathIntegral(model, optimizer), loss().item()
    train(model, optimizer, loss, 400)
    fall = sum(float(v.sum()) for v in path.sums("fall").values())
    assert before - loss().item() > 1e-3
    assert fall == pytest.approx(before - loss().item(), rel=2e-3)


class Separable(nn.Module):
    """1/2 sum h (w - t)^2, from w = 0."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(4, dtype=torch.float64))
        self.h = torch.tensor([1.0, 4.0, 0.5, 2.0], dtype=torch.float64)
        self.t = torch.tensor([0.7, -0.4, 1.5, 0.1], dtype=torch.float64)

    def forward(self) -> Tensor:
        return (self.h * (self.w - self.t).square()).sum() / 2


def karnin(model: nn.Module, path: PathIntegral) -> Tensor:
    score = Karnin(path=path)
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    return score(parameters, collect(score.needs, Source(model, dict(model.named_parameters()))))["w"]


@pytest.mark.parametrize(
    ("build", "steps"),
    [
        (lambda p: SGD(p, lr=1e-3), 2_000),
        (lambda p: SGD(p, lr=1e-4, momentum=0.9), 2_000),
        (lambda p: Adam(p, lr=1e-4), 2_000),
    ],
    ids=["sgd", "momentum", "adam"],
)
def test_karnin_from_zero_is_brute_force(build: Callable[[Any], Optimizer], steps: int) -> None:
    """On a separable quadratic: what the loss rises by when the weight goes back to zero."""
    model = Separable()
    optimizer = build(model.parameters())
    path = PathIntegral(model, optimizer)
    train(model, optimizer, model, steps)
    brute = []
    with torch.no_grad():
        base = float(model())
        for i in range(4):
            value = float(model.w[i])
            model.w[i] = 0
            brute.append(float(model()) - base)
            model.w[i] = value
    torch.testing.assert_close(karnin(model, path), torch.tensor(brute, dtype=torch.float64), rtol=5e-3, atol=1e-5)


def test_karnin_elsewhere_and_by_hand() -> None:
    """From w_0 it is h w (w - w_0) / 2: negative where the weight came from beyond."""
    model = Separable()
    with torch.no_grad():
        model.w.copy_(torch.tensor([2.0, 0.3, 1.0, -1.0]))
    began = model.w.detach().clone()
    optimizer = SGD(model.parameters(), lr=5e-3)
    path = PathIntegral(model, optimizer)
    squares, rate = torch.zeros(4, dtype=torch.float64), 5e-3
    for _ in range(3_000):
        before = model.w.detach().clone()
        train(model, optimizer, model, 1)
        squares += (model.w.detach() - before).square() / rate
    w = model.w.detach()
    torch.testing.assert_close(path.sums("fall")["w"], squares)  # the paper's own sum
    torch.testing.assert_close(karnin(model, path), squares * w / (w - began))
    torch.testing.assert_close(karnin(model, path), model.h * w * (w - began) / 2, rtol=2e-2, atol=1e-3)
    assert float(karnin(model, path)[0]) < 0


def test_a_weight_that_did_not_move_scores_zero() -> None:
    stats = {
        Trajectory("fall"): {"w": torch.tensor([1.0, 0.0])},
        Trajectory("initial"): {"w": torch.tensor([3.0, 0.0])},
    }
    assert Karnin()({"w": torch.tensor([3.0, 0.0])}, stats)["w"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_movement_is_the_sum_of_gradient_times_weight(name: str) -> None:
    model, data = mlp(), samples()
    optimizer = OPTIMIZERS[name](model.parameters())
    path = PathIntegral(model, optimizer)
    want = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for batch in data * 3:
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        for n, p in model.named_parameters():
            want[n] -= p.grad * p.detach()
        optimizer.step()
    for n, value in path.sums("movement").items():
        torch.testing.assert_close(value, want[n])
    score = Movement(path=path)
    stats = collect(score.needs, Source(model, dict(model.named_parameters())))
    torch.testing.assert_close(score({"0.weight": model[0].weight.detach()}, stats)["0.weight"], want["0.weight"])


def test_movement_is_the_learnt_score_of_constant_weights() -> None:
    """Scores behind a straight-through mask, trained by SGD beside weights that stay: S = -lr sum g w."""
    model, data, rate = mlp(), samples(batches=3), 0.3
    learnt = {n: torch.zeros_like(p, requires_grad=True) for n, p in model.named_parameters()}
    optimizer = SGD(learnt.values(), lr=rate)
    frozen = SGD(model.parameters(), lr=0.0)
    path = PathIntegral(model, frozen)
    for batch in data:
        optimizer.zero_grad(), frozen.zero_grad()
        through = {n: p.detach() * (1 + learnt[n] - learnt[n].detach()) for n, p in model.named_parameters()}
        out = torch.func.functional_call(model, through, (batch[0],))
        nn.functional.cross_entropy(out, batch[1]).backward()
        optimizer.step()
        cross_entropy(model, batch).backward()
        frozen.step()
    for n, value in path.sums("movement").items():
        torch.testing.assert_close(rate * value, learnt[n].detach())


def test_going_on_from_a_saved_state_is_the_same() -> None:
    data = samples()

    def run(cut: int | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        model = mlp()
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        path = PathIntegral(model, optimizer)
        for i, batch in enumerate(data * 4):
            if i == cut:
                saved = path.state_dict()
                path.detach()
                path = PathIntegral(model)  # begins from other weights, until it is told
                path.load_state_dict(saved)
                path.attach(optimizer)
            train(model, optimizer, lambda batch=batch: cross_entropy(model, batch), 1)
        assert path.steps == 8
        return path.sums("fall"), path.sums("initial")

    for whole, resumed in zip(run(None), run(3), strict=True):
        assert all(torch.equal(whole[n], resumed[n]) for n in whole)


def test_refusals() -> None:
    model = mlp()
    path = PathIntegral(model)
    with pytest.raises(MissingStatsError, match="seen no step"):
        path.sums("fall")
    with pytest.raises(MissingStatsError, match=r"PathIntegral\(model, optimizer\)"):
        Trajectory("fall").collect(Source(model, {}))
    with pytest.raises(SecateurError, match="did you mean 'fall'"):
        path.sums("fal")  # type: ignore[arg-type]
    with pytest.raises(WeightError, match="none of this model's weights"):
        path.attach(SGD(mlp().parameters(), lr=0.1))
    with pytest.raises(WeightError, match="expected a torch"):
        path.attach("sgd")  # type: ignore[arg-type]
    optimizer = torch.optim.LBFGS(model.parameters())
    path.attach(optimizer)
    with pytest.raises(RecipeError, match="closure"):
        optimizer.step(lambda: cross_entropy(model, samples()[0]))
    for bad in (
        {},
        {"version": 9, "steps": 0, "sums": path.state_dict()["sums"]},
        PathIntegral(nn.Linear(2, 2)).state_dict(),
    ):
        with pytest.raises(CheckpointError):
            path.load_state_dict(bad)
    other = nn.Linear(2, 2)
    optimizer = SGD(other.parameters(), lr=0.1)
    path = PathIntegral(other, optimizer)
    train(other, optimizer, lambda: other(torch.ones(1, 2)).sum(), 1)
    with pytest.raises(MissingStatsError, match="did not watch"):
        Trajectory("fall", path).collect(Source(model, dict(model.named_parameters())))


def test_hooks_come_off() -> None:
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    path = PathIntegral(model, optimizer)
    train(model, optimizer, lambda: cross_entropy(model, samples()[0]), 1)
    path.detach()
    train(model, optimizer, lambda: cross_entropy(model, samples()[0]), 1)
    assert path.steps == 1
