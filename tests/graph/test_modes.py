"""Which modules ask for training mode, whatever way the question takes."""

import torch
from torch import Tensor, nn

from secateur.graph.modes import is_stock, who_asks_for_the_mode


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


def test_every_way_to_ask_is_seen() -> None:
    direct, by_name, silent = Direct(), ByName(), Silent()
    other = Silent()
    net = nn.Sequential(direct, by_name, silent, OfAnother(other), nn.Dropout(), nn.BatchNorm1d(4)).eval()
    with who_asks_for_the_mode() as asked:
        net(torch.randn(3, 4))
    names = {type(m).__name__ for m in asked.values()}
    assert names == {"Direct", "ByName", "Silent", "Dropout", "BatchNorm1d"}
    assert id(other) in asked
    assert id(silent) not in asked
    assert [is_stock(m) for m in net] == [False, False, False, False, True, True]


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
