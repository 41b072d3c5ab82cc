"""Chauvin's energy: closed forms against numbers, what is watched, and a hidden unit that falls silent."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.checkpoint import load_tree, save_tree
from secateur.errors import CheckpointError, RecipeError, WeightError
from secateur.penalties import L1, Chauvin, Penalised, PenalisedActivity

ORDERS = (0, 1, 2)


@pytest.mark.parametrize("order", ORDERS)
def test_the_closed_form_is_the_integral_of_its_slope(order: int) -> None:
    """e' = 1 / (1 + q)^n with e(0) = 0: trapezoids over a fine grid, and a numeric derivative of the whole."""
    for o in (0.1, 0.9, 2.5, -3.0):
        q = torch.linspace(0, o * o, 400_001, dtype=torch.float64)
        want = float(torch.trapezoid((1 + q) ** -order, q))
        assert float(Chauvin(1.0, order=order).value(torch.tensor([[o]], dtype=torch.float64))) == pytest.approx(want)
        step = 1e-6
        ahead, behind = (
            float(Chauvin(1.0, order=order).value(torch.tensor([[o + d]], dtype=torch.float64))) for d in (step, -step)
        )
        assert (ahead - behind) / (2 * step) == pytest.approx(2 * o / (1 + o * o) ** order, rel=1e-6)


class Hidden(nn.Module):
    """One hidden layer whose last unit feeds nothing, beside two that are needed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.act, self.head = nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor([[1.0, 0.2], [-0.3, 1.0], [0.8, 0.9]]))
            self.head.weight.copy_(torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))
        self.head.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.first(x)))


def data(step: int = 0) -> Tensor:
    return torch.randn(64, 2, generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_a_hidden_unit_that_carries_nothing_falls_silent(order: int, make: Any) -> None:
    model = Hidden()
    active = PenalisedActivity(model, Chauvin(0.05, order=order))
    assert active.modules == ("act",)
    optimizer = make(model.parameters(), lr=1.0 if make is torch.optim.SGD else 0.01)
    before = model.act(model.first(data(1))).detach().abs().mean(0)
    for step in range(600):
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("first", group["lr"]) * (1 - step / 600)
        x = data(step)
        optimizer.zero_grad()
        loss = (model(x) - torch.tanh(x) * 2).square().mean() + active.value()
        loss.backward()
        optimizer.step()
    after = model.act(model.first(data(1))).detach().abs().mean(0)
    assert before[2] > 0.4
    assert after[2] < 0.01
    assert (after[:2] > 0.3).all(), "what is needed stays active"


def test_the_value_is_about_the_last_forward_in_training_mode() -> None:
    model = Hidden()
    active = PenalisedActivity(model, Chauvin(0.5, order=0))
    with pytest.raises(RecipeError, match="has seen no activation"):
        active.value()
    x, y = data(1), data(2)
    hidden = torch.tanh(model.first(y))
    want = 0.5 * hidden.square().sum(1).mean()
    model(x)
    model(y)
    torch.testing.assert_close(active.value(), want)
    model.eval()
    model(x)
    model.train()
    with torch.no_grad():
        model.act(model.first(x))
    torch.testing.assert_close(active.value(), want)
    grads = [torch.autograd.grad(v, model.first.weight)[0] for v in (active.value(), want)]
    torch.testing.assert_close(*grads)
    active.detach()
    model(y)
    with pytest.raises(RecipeError, match="has seen no activation"):
        active.value()


def test_shared_modules_count_every_call_and_work_in_place() -> None:
    torch.manual_seed(0)
    relu = nn.ReLU(inplace=True)
    model = nn.Sequential(nn.Linear(3, 4), relu, nn.Linear(4, 4), nn.Identity(), relu, nn.Dropout(0.0, inplace=True))
    active = PenalisedActivity(model, Chauvin(1.0, order=1, include=("1", "3")))
    x = torch.randn(5, 3)
    model(x).sum().backward()
    one = torch.relu(model[0](x))
    two = model[2](one)
    three = torch.relu(two)
    want = sum(torch.log1p(o.square()).sum() / 5 for o in (one, two, three))
    torch.testing.assert_close(active.value(), want)


def test_a_copy_of_the_model_is_not_watched() -> None:
    model = Hidden()
    active = PenalisedActivity(model, Chauvin(1.0))
    model(data(0))
    want = active.value().detach()
    average = copy.deepcopy(model)
    average(data(1))
    torch.testing.assert_close(active.value().detach(), want)
    assert not [n for n in model.state_dict() if "hook" in n]


def test_half_precision_is_added_up_in_single() -> None:
    outputs = torch.full((2, 4), 300.0, dtype=torch.float16)  # squares beyond what half precision holds
    model = nn.Sequential(nn.ReLU())
    active = PenalisedActivity(model, Chauvin(1.0, order=0))
    model(outputs)
    assert float(active.value()) == 4 * 90_000.0


def test_state_saves_and_is_checked(tmp_path: Any) -> None:
    active = PenalisedActivity(Hidden(), Chauvin(0.1))
    save_tree(tmp_path / "s", active.state_dict())
    PenalisedActivity(Hidden(), Chauvin(0.1)).load_state_dict(load_tree(tmp_path / "s"))
    for bad in ({}, {**active.state_dict(), "penalty": "L1()"}):
        with pytest.raises(CheckpointError, match="the state is that of"):
            active.load_state_dict(bad)


def test_refusals() -> None:
    for strength in (-1.0, math.nan, math.inf):
        with pytest.raises(RecipeError, match="strength"):
            Chauvin(strength)
    for order in (3, -1, 0.5):
        with pytest.raises(RecipeError, match="order must be 0, 1 or 2"):
            Chauvin(order=order)  # type: ignore[arg-type]
    plain = nn.Sequential(nn.Linear(2, 2), nn.Softmax(1))
    with pytest.raises(WeightError, match="finds no activation function"):
        PenalisedActivity(plain, Chauvin())
    with pytest.raises(WeightError, match="'act' of chauvin matches no module"):
        PenalisedActivity(plain, Chauvin(include=("act",)))
    with pytest.raises(WeightError, match="finds no activation"):
        PenalisedActivity(Hidden(), Chauvin(exclude=("act",)))
    with pytest.raises(RecipeError, match="expected an ActivityPenalty"):
        PenalisedActivity(Hidden(), L1())  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="use PenalisedActivity"):
        Penalised(Hidden(), Chauvin())  # type: ignore[arg-type]

    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    model = nn.Sequential(Two())
    PenalisedActivity(model, Chauvin(include=("0",)))
    with pytest.raises(WeightError, match="0 puts out no tensor of activations"):
        model(torch.ones(2))


def test_a_forward_without_gradients_leaves_the_value_of_the_last_one_with() -> None:
    model = Hidden()
    active = PenalisedActivity(model, Chauvin(0.05))
    model(data())
    value = float(active.value().detach())
    with torch.no_grad():
        model(data(1))  # a look at the loss on other data, in training mode
    assert float(active.value().detach()) == value
