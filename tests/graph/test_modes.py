"""Whose code asks for training mode, whatever way the question takes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from secateur.graph.examples import Example
from secateur.graph.modes import who_asks_for_the_mode
from secateur.graph.still import Still
from secateur.graph.trace import trace


class Direct(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if self.training else x


class ByName(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if getattr(self, "training") else x  # noqa: B009


class OfAnother(nn.Module):
    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.other = [other]

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if self.other[0].training else x


class Silent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class Derived(nn.Dropout):
    """A layer of PyTorch's own, as it is, under another name."""


@pytest.mark.parametrize(
    ("module", "seen"),
    [
        (Direct(), True),
        (ByName(), True),
        (OfAnother(Silent()), True),
        (OfAnother(nn.Dropout()), True),
        (Silent(), False),
        (nn.Dropout(), False),
        (Derived(), False),
        (nn.BatchNorm1d(4), False),
        (
            nn.Sequential(
                nn.Linear(4, 4),
                nn.LSTM(4, 4),
            ),
            False,
        ),
        (nn.Sequential(torch.jit.script(nn.Dropout())), True),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_every_way_to_ask_is_seen(module: nn.Module, seen: bool) -> None:
    net = nn.Sequential(nn.Linear(4, 4), module).eval()
    with who_asks_for_the_mode() as asked:
        net(torch.randn(3, 4))
    scripted = any(isinstance(m, torch.jit.ScriptModule) for m in net.modules())
    assert asked == ({__name__} if seen and not scripted else set())


def test_training_mode_is_recorded_where_it_may_show_something_new() -> None:
    x = torch.randn(3, 4)
    plain = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2))
    assert trace(plain, [Example((x,), {})]).training is None
    for other in (Direct(), OfAnother(nn.Dropout()), torch.jit.script(nn.Dropout())):
        assert trace(nn.Sequential(plain, other), [Example((x,), {})]).training is not None


def test_nothing_is_left_behind() -> None:
    net = nn.Sequential(nn.Linear(2, 2), Direct())
    before = dict(vars(net[1]))
    with who_asks_for_the_mode():
        net.eval()
        assert net.training is False
        net.train()
        assert all(m.training for m in net.modules())
        made = nn.Dropout()
        assert made.training is True
    assert "training" not in vars(nn.Module)
    assert vars(net[1]).keys() == before.keys()
    assert made.training is True


def test_scripted_parts() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Dropout()))
    net = nn.Sequential(scripted, nn.Linear(4, 2)).eval()
    with who_asks_for_the_mode():
        net(torch.randn(2, 4))
        assert scripted.training is False
    assert scripted.training is False


DRAWS: list[Callable[[Tensor], Tensor]] = [
    lambda w: torch.randperm(4, device=w.device),
    lambda w: torch.multinomial(w, 2),
    lambda w: torch.multinomial(w, 5, replacement=True),
    lambda w: torch.poisson(w),
    lambda w: torch.binomial(torch.full_like(w, 3.0), w / 4),
    lambda w: torch.bernoulli(w / 4),
    lambda w: torch.empty_like(w).random_(),
    lambda w: torch.empty_like(w).random_(2, 5),
    lambda w: torch.empty_like(w).random_(7),
    lambda w: torch.empty_like(w).cauchy_(),
    lambda w: torch.empty_like(w).log_normal_(),
    lambda w: torch.empty_like(w).geometric_(0.5),
    lambda w: torch.empty_like(w).uniform_(1, 2),
    lambda w: torch.empty_like(w).exponential_(),
    lambda w: torch.empty_like(w).normal_(),
    lambda w: torch.randint_like(w, 1, 5),
    lambda w: torch.randint_like(w, 5),
    lambda w: torch.randint(1, 5, w.shape),
    lambda w: torch.rand(w.shape),
    lambda w: torch.randn(w.shape),
    lambda w: torch.rand_like(w),
    lambda w: torch.randn_like(w),
    lambda w: nn.functional.dropout(w),
    lambda w: nn.functional.rrelu(-w, training=True),
]


@pytest.mark.parametrize("draw", DRAWS)
def test_without_chance_every_draw_is_the_same_in_its_range_and_its_type(draw: Callable[[Tensor], Tensor]) -> None:
    w = torch.tensor([1.2, 3.7, 0.4])
    chance = draw(w)
    with Still():
        first, second = draw(w), draw(w)
    assert torch.equal(first, second)
    assert (first.shape, first.dtype) == (chance.shape, chance.dtype)
    assert bool(first.isfinite().all())
