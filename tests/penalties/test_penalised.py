"""Penalties at work: toy problems with known answers, other penalties in the same socket, resuming, and refusals."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.errors import CheckpointError, RecipeError, WeightError
from secateur.penalties import Penalised, ScaleL1
from secateur.testing import check_penalty
from secateur.types import Penalty, Tensors


class Toy(nn.Module):
    """Eight normed features; the target depends on the first four. The head is fixed, so scales cannot move into it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(8)
        nn.init.constant_(self.norm.weight, 0.5)
        self.head = nn.Linear(8, 8, bias=False).requires_grad_(False)
        nn.init.orthogonal_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))


def batches(steps: int, first: int = 0) -> Any:
    for step in range(first, steps):
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
        yield x


def train(model: Toy, optimizer: Optimizer, steps: int, first: int = 0) -> None:
    useful = torch.tensor([1.0] * 4 + [0.0] * 4)
    wrong = 0.15 * torch.tensor([0.0] * 4 + [1.0] * 4)  # noise that fits a little, whatever the scale
    model.train()
    for x in batches(steps, first):
        target = model.head(x * (useful + wrong))
        loss = (model(x) - target).square().sum(1).mean() / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.003, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True, weight_decay=0.0),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("proximal", [False, True])
def test_scales_of_useless_channels_go_to_zero(name: str, proximal: bool) -> None:
    """Minimum of (g - t)^2 / 2 + 0.4 |g|: t - 0.4 for t = 1, zero for t = 0.15; without the penalty it is t."""
    model = Toy()
    optimizer = OPTIMIZERS[name](model.norm.parameters())
    penalised = Penalised(model, ScaleL1(0.4, proximal_step=proximal), optimizer=optimizer)
    train(model, optimizer, 600)
    scales = model.norm.weight.detach()
    assert scales[:4].sub(0.6).abs().max() < 0.06
    assert scales[4:].abs().max() == 0.0 if proximal else scales[4:].abs().max() < 0.03
    assert float(penalised.value().detach()) == pytest.approx(0.4 * float(scales.abs().sum()))
    penalised.detach()
    train(model, optimizer, 1200)
    assert model.norm.weight[4:].min() > 0.1, "without the penalty they come back"


@pytest.mark.parametrize("proximal", [False, True])
def test_one_step_by_hand(proximal: bool) -> None:
    model = Toy()
    with torch.no_grad():
        model.norm.weight.copy_(torch.tensor([1.0, -1.0, 0.01, -0.01, 0.0, 0.5, 0.5, 0.5]))
    w, other = model.norm.weight.detach().clone(), copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other)]
    Penalised(model, ScaleL1(0.2, proximal_step=proximal), optimizer=optimizers[0])
    for m, optimizer in zip((model, other), optimizers, strict=True):
        m(torch.randn(16, 8, generator=torch.Generator().manual_seed(0))).square().mean().backward()
        optimizer.step()
    stepped = other.norm.weight.detach()
    want = stepped - 0.02 * w.sign() if not proximal else stepped.sign() * (stepped.abs() - 0.02).clamp_min(0)
    torch.testing.assert_close(model.norm.weight.detach(), want, rtol=0, atol=1e-7)
    assert torch.equal(model.norm.bias, other.norm.bias)


# Later methods fit the same socket


@dataclass(frozen=True)
class Growing:
    """L2 on the first half of a norm's scales, stronger by a step every other step: a state that moves."""

    step: float = 0.05

    def parameters(self, model: nn.Module) -> tuple[str, ...]:
        return tuple(n for n, _ in model.named_parameters() if "norm.weight" in n or ("bn" in n and "weight" in n))

    def start(self, weights: Tensors) -> dict[str, Tensor]:
        return {n: torch.full_like(w, 0.01) for n, w in weights.items()}

    def value(self, weights: Tensors, state: Tensors) -> Tensor:
        return torch.stack([(state[n] * w.square()).sum() / 2 for n, w in weights.items()]).sum()

    def gradient(self, weights: Tensors, state: Tensors) -> dict[str, Tensor]:
        return {n: state[n] * w for n, w in weights.items()}

    def proximal(self, weights: Tensors, state: Tensors, rates: Tensors) -> dict[str, Tensor]:
        return {}

    def advance(self, weights: Tensors, state: Tensors, step: int, loss: float | None) -> dict[str, Tensor]:
        grow = self.step if step % 2 else 0.0
        return {n: s + grow * (1.0 if loss is None else loss) for n, s in state.items()}


@dataclass(frozen=True)
class GroupLasso:
    """Rows of matrices, by the proximal step alone."""

    strength: float = 0.3

    def parameters(self, model: nn.Module) -> tuple[str, ...]:
        return tuple(n for n, p in model.named_parameters() if p.dim() > 1)

    def start(self, weights: Tensors) -> dict[str, Tensor]:
        return {}

    def value(self, weights: Tensors, state: Tensors) -> Tensor:
        return self.strength * torch.stack([w.flatten(1).norm(dim=1).sum() for w in weights.values()]).sum()

    def gradient(self, weights: Tensors, state: Tensors) -> dict[str, Tensor]:
        return {}

    def proximal(self, weights: Tensors, state: Tensors, rates: Tensors) -> dict[str, Tensor]:
        out = {}
        for name, w in weights.items():
            norm = w.flatten(1).norm(dim=1).clamp_min(1e-12)
            out[name] = w * (1 - rates[name] * self.strength / norm).clamp_min(0).reshape(-1, *[1] * (w.dim() - 1))
        return out

    def advance(self, weights: Tensors, state: Tensors, step: int, loss: float | None) -> dict[str, Tensor]:
        return {}


@pytest.mark.parametrize("penalty", [Growing(), GroupLasso()], ids=str)
def test_others_fit_the_protocol(penalty: Penalty) -> None:
    check_penalty(penalty)


def test_the_laws_catch_what_they_should() -> None:
    @dataclass(frozen=True)
    class Wrong(GroupLasso):
        kind: str = ""

        def gradient(self, weights: Tensors, state: Tensors) -> dict[str, Tensor]:
            return {n: w * 0.1 for n, w in weights.items()} if self.kind == "gradient" else {}

        def proximal(self, weights: Tensors, state: Tensors, rates: Tensors) -> dict[str, Tensor]:
            if self.kind == "nothing":
                return {}
            if self.kind == "changes":
                next(iter(weights.values())).mul_(2.0)
            by = 0.7 if self.kind == "proximal" else 1.0
            return super().proximal(weights, state, {n: by * r for n, r in rates.items()})

        def advance(self, weights: Tensors, state: Tensors, step: int, loss: float | None) -> dict[str, Tensor]:
            return {"new": torch.zeros(1)} if self.kind == "state" else {}

    for kind in ("gradient", "proximal", "nothing", "changes", "state"):
        with pytest.raises(AssertionError):
            check_penalty(Wrong(kind=kind))


# Resuming


@pytest.mark.parametrize("penalty", [ScaleL1(0.1), ScaleL1(0.1, proximal_step=True), Growing()], ids=str)
def test_resuming_is_bit_for_bit(penalty: Penalty) -> None:
    def fresh() -> tuple[Toy, Optimizer, Penalised]:
        model = Toy()
        optimizer = torch.optim.AdamW(model.norm.parameters(), lr=0.01)
        return model, optimizer, Penalised(model, penalty, optimizer=optimizer)

    model, optimizer, penalised = fresh()
    penalised.observe(0.5)
    train(model, optimizer, 20)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict())), penalised.state_dict()
    train(model, optimizer, 40, first=20)

    again, optimizer2, penalised2 = fresh()
    again.load_state_dict(saved[0][0])
    optimizer2.load_state_dict(saved[0][1])
    penalised2.load_state_dict(saved[1])
    train(again, optimizer2, 40, first=20)
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())
    one, two = penalised.state_dict(), penalised2.state_dict()
    assert one["steps"] == two["steps"] == 40
    assert all(torch.equal(t, two["state"][n]) for n, t in one["state"].items())


def test_state_saves_without_pickle(tmp_path: Any) -> None:
    from secateur.checkpoint import load_tree, save_tree

    model = Toy()
    penalised = Penalised(model, Growing(), optimizer=torch.optim.SGD(model.norm.parameters(), lr=0.1))
    save_tree(tmp_path / "state", penalised.state_dict())
    penalised.load_state_dict(load_tree(tmp_path / "state"))


# Mixed precision, frozen and unused weights, refusals


def test_a_scaled_loss_scales_the_penalty_along_and_overflow_is_no_step() -> None:
    model, other = Toy(), Toy()
    penalty = ScaleL1(0.1)
    for m, scale in ((model, 1.0), (other, 1024.0)):
        optimizer = torch.optim.Adam(m.norm.parameters(), lr=0.01, fused=True)
        penalised = Penalised(m, penalty, optimizer=optimizer)
        if scale != 1.0:  # what GradScaler tells an optimizer that handles scales itself
            optimizer.grad_scale = torch.tensor(scale)
            optimizer.found_inf = torch.tensor(0.0)
        (m(torch.randn(8, 8, generator=torch.Generator().manual_seed(0))).square().mean() * scale).backward()
        optimizer.step()
    torch.testing.assert_close(model.norm.weight, other.norm.weight)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert penalised.state_dict()["steps"] == 1


def test_frozen_and_unused_weights_are_left_alone() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.frozen = (nn.BatchNorm1d(3) for _ in range(3))
            self.frozen.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.frozen(self.used(x))

    for proximal in (False, True):
        model = Two()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        penalised = Penalised(model, ScaleL1(0.5, proximal_step=proximal), optimizer=optimizer)
        assert penalised.parameters == ("used.weight", "unused.weight")
        model(torch.randn(4, 3)).sum().backward()
        optimizer.step()
        assert (model.used.weight < 0.96).all()
        assert (model.unused.weight == 1).all()
        assert (model.frozen.weight == 1).all()


def test_refusals() -> None:
    model = Toy()
    with pytest.raises(WeightError, match="has none that it may"):
        Penalised(nn.Linear(2, 2), ScaleL1())
    with pytest.raises(WeightError, match="has none that it may"):
        Penalised(model, ScaleL1(exclude=("norm",)))
    with pytest.raises(WeightError, match="frozen"):
        Penalised(Toy().requires_grad_(False), ScaleL1())
    with pytest.raises(WeightError, match=r"does not hold norm\.weight"):
        Penalised(model, ScaleL1(), optimizer=torch.optim.SGD(Toy().parameters(), lr=0.1))
    with pytest.raises(WeightError, match="got a Toy"):
        Penalised(model, ScaleL1(), optimizer=model)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="expected a Penalty"):
        Penalised(model, 1e-4)  # type: ignore[arg-type]
    for strength in (-1.0, float("nan"), float("inf")):
        with pytest.raises(RecipeError, match="strength"):
            ScaleL1(strength)
    optimizer = torch.optim.LBFGS(model.norm.parameters())
    penalised = Penalised(model, ScaleL1(), optimizer=optimizer)
    before = model.norm.weight.detach().clone()
    with pytest.raises(RecipeError, match="closure"):
        optimizer.step(lambda: model(torch.randn(4, 8)).sum())
    assert torch.equal(model.norm.weight, before)
    good = penalised.state_dict()
    for bad, words in (
        ({}, "not the state"),
        ({**good, "version": 2}, "version 2"),
        ({**good, "penalty": "ScaleL1(strength=1)"}, "is that of"),
        ({**good, "state": {"x": torch.zeros(1)}}, "does not fit"),
        ({**good, "state": 3}, "not the state"),
    ):
        with pytest.raises(CheckpointError, match=words):
            penalised.load_state_dict(bad)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_where_the_objective_is_maximised_the_penalty_still_falls(make: Any) -> None:
    """The same steps as on the negative objective."""
    ends = []
    for sign in (1, -1):
        model = Toy()
        optimizer = make(model.norm.parameters(), lr=0.01, maximize=sign < 0)
        Penalised(model, ScaleL1(0.4), optimizer=optimizer)
        for x in batches(5):
            optimizer.zero_grad()
            (sign * model(x).square().mean()).backward()
            optimizer.step()
        ends.append(model.norm.weight.detach().clone())
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-7)


def test_the_proximal_step_follows_adagrads_decaying_rate() -> None:
    """With gradients of one in every step the sum after n is n, so a step goes lr / (1 + (n - 1) d) / sqrt(n)."""
    model = Toy()
    optimizer = torch.optim.Adagrad(model.norm.parameters(), lr=0.1, lr_decay=0.5)
    Penalised(model, ScaleL1(0.25, proximal_step=True), optimizer=optimizer)
    want = 0.5
    for n in range(1, 5):
        optimizer.zero_grad()
        model.norm.weight.sum().backward()
        optimizer.step()
        want -= 1.25 * 0.1 / (1 + (n - 1) * 0.5) / n**0.5
    torch.testing.assert_close(model.norm.weight.detach(), torch.full((8,), want), rtol=1e-5, atol=1e-6)
