"""Experts of a mixture: found by what a router chooses, taken out of every form of look-up, proven, refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import GraphError, SecateurError, TargetError
from secateur.method import Method
from secateur.patterns import Channel, Expert
from secateur.scores import Coupled, Magnitude, Random, Taylor
from secateur.structure import load_pruned, make_plan, save_pruned, shrink_, verify
from secateur.targets import Target

WIDTH, HIDDEN, EXPERTS = 8, 12, 6


class Mixture(nn.Module):
    """Chooses ``k`` of six experts; ``how`` is the way in which their weights are looked up."""

    def __init__(self, how: str, k: int = 2, gate: str = "softmax") -> None:
        super().__init__()
        self.how, self.k, self.gate = how, k, gate
        self.num_experts = EXPERTS
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.correction = nn.Parameter(0.1 * torch.randn(EXPERTS))
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) / 3)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) / 3)
        self.bias = nn.Parameter(torch.randn(EXPERTS, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x)
        scores = scores.softmax(-1) if self.gate == "softmax" else scores.sigmoid()
        _, chosen = torch.topk(scores + self.correction, self.k, dim=-1)
        share = scores.gather(-1, chosen)
        share = share / share.sum(-1, keepdim=True)
        out: Tensor = x + getattr(self, self.how)(x, chosen, share)
        return out

    def look_up(self, x: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
        up, down = self.up[chosen], self.down[chosen]
        y = torch.einsum("tkwh,tkh->tkw", down, torch.relu(torch.einsum("tkhw,tw->tkh", up, x)))
        return ((y + self.bias[chosen]) * share[..., None]).sum(1)

    def masks(self, x: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(chosen, self.num_experts).permute(2, 1, 0)
        for expert in (mask.sum((1, 2)) > 0).nonzero():
            place, token = torch.where(mask[expert].squeeze(0))
            y = torch.relu(x[token] @ self.up[expert].squeeze(0).T) @ self.down[expert].squeeze(0).T
            out.index_add_(0, token, (y + self.bias[expert]) * share[token, place, None])
        return out

    def numbers(self, x: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(chosen, self.num_experts)
        for number in (mask.sum((0, 1)) > 0).nonzero()[:, 0]:
            expert = number.item()
            token, place = torch.where(mask[..., expert])
            y = torch.relu(F.linear(x[token], self.up[expert])) @ self.down[expert].T
            out.index_add_(0, token, (y + self.bias[expert]) * share[token, place, None])
        return out

    def weighted(self, x: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
        """All experts work; those not chosen get the share 0."""
        shares = torch.zeros(len(x), self.num_experts).scatter(1, chosen, share)
        y = torch.einsum("ewh,teh->tew", self.down, torch.relu(torch.einsum("ehw,tw->teh", self.up, x)))
        return torch.einsum("tew,te->tw", y + self.bias, shares)

    def grouped(self, x: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        counts = torch.histc(flat.float(), bins=self.num_experts, min=0, max=self.num_experts - 1)
        ends = counts.cumsum(0).to(torch.int32)
        rows = x[order // self.k]
        y = torch._grouped_mm(rows, self.up.transpose(1, 2), offs=ends)
        y = torch._grouped_mm(torch.relu(y), self.down.transpose(1, 2), offs=ends) + self.bias[flat[order]]
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        return (y[back].view(len(x), self.k, -1) * share[..., None]).sum(1)

    def computes(self, x: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
        """The number of an expert is a value."""
        return self.look_up(x, chosen, share) + (chosen * share).sum(1, keepdim=True)


class Net(nn.Module):
    def __init__(self, how: str, **kwargs: Any) -> None:
        super().__init__()
        self.stem, self.mixture, self.head = nn.Linear(5, WIDTH), Mixture(how, **kwargs), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.mixture(torch.relu(self.stem(x))))
        return out


X = torch.randn(24, 5, generator=torch.Generator().manual_seed(1))
WAYS = ["look_up", "masks", "numbers", "weighted", "grouped"]


def made(how: str, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return Net(how, **kwargs).eval()


def experts(value: float = 0.5, kind: str = "channels", **parts: Any) -> Method:
    return Method(target=Target(kind, value), pattern=Expert(), **parts)  # type: ignore[arg-type]


def without(dense: nn.Module, kept: list[int], x: Tensor) -> Tensor:
    """The dense network whose router gives the experts that are gone no chance: no label, no plan."""
    twin = copy.deepcopy(dense)
    mixture = twin.mixture
    mixture.how = "look_up"
    gone = [i for i in range(EXPERTS) if i not in kept]
    with torch.no_grad():
        mixture.router.bias[gone] = -torch.inf
        mixture.correction[gone] = -torch.inf
    out: Tensor = twin(x)
    return out


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("how", WAYS)
def test_experts_go_from_every_form_of_look_up(how: str, gate: str, tmp_path: Path) -> None:
    net = made(how, gate=gate)
    dense = copy.deepcopy(net)
    report = shrink_(net, experts(score=Random(seed=2)), X)
    kept = report.plan.kept["mixture.up"][0].tolist()
    assert len(kept) == 3
    assert net.mixture.up.shape == (3, HIDDEN, WIDTH)
    assert net.mixture.router.out_features == net.mixture.router.weight.shape[0] == 3
    assert net.mixture.bias.shape[0] == net.mixture.correction.shape[0] == 3
    assert net.stem.out_features == WIDTH
    for seed in range(3):
        x = torch.randn(17, 5, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(net(x), without(dense, kept, x), rtol=1e-5, atol=1e-6)
    assert verify(dense, net, X, report).equal
    save_pruned(tmp_path, net, report)
    fresh = made(how, gate=gate)
    load_pruned(fresh, tmp_path)
    assert torch.equal(fresh(X), net(X))


def test_channels_of_the_same_network_leave_the_experts_alone() -> None:
    for how in WAYS:
        net = made(how)
        report = shrink_(net, Method(target=Target("channels", 0.8), pattern=Channel()), X, align=4)
        assert net.mixture.router.out_features == EXPERTS
        assert all("router" not in g.name or g.kept == g.units for g in report.groups)


def test_as_many_stay_as_the_router_chooses() -> None:
    net = made("look_up", k=4)
    shrink_(net, experts(0.7), X)
    assert net.mixture.router.out_features == 4
    with pytest.raises(TargetError, match="cannot be reached"):
        shrink_(made("look_up", k=4), experts(0.5), X)


def test_scores_rate_experts() -> None:
    net = made("look_up")
    with torch.no_grad():
        for dead in (1, 4):
            net.mixture.down[dead] *= 1e-3
            net.mixture.up[dead] *= 1e-3
            net.mixture.bias[dead] *= 1e-3
    plan = make_plan(net, experts(4 / 6, score=Coupled(Magnitude(p=2), reduce_by="sum")), X).plan
    assert plan.kept["mixture.up"][0].tolist() == [0, 2, 3, 5]
    plan = make_plan(
        net, experts(4 / 6, score=Taylor()), X, loss_fn=lambda m, b: m(b).square().mean(), batches=[X[:12], X[12:]]
    ).plan
    assert len(plan.kept["mixture.up"][0]) == 4


def test_optimizer_state_follows() -> None:
    net = made("look_up")
    optimizer = torch.optim.Adam(net.parameters())
    net(X).square().mean().backward()
    optimizer.step()
    before = optimizer.state[net.mixture.up]["exp_avg"].clone()
    report = shrink_(net, experts(), X, optimizer=optimizer)
    assert torch.equal(optimizer.state[net.mixture.up]["exp_avg"], before[report.plan.kept["mixture.up"][0].tolist()])
    optimizer.zero_grad()
    net(X).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (lambda: made("computes"), "computes with the number of an expert"),
        (lambda: nn.Sequential(nn.Linear(5, 32), nn.Linear(32, 3)), "no router"),
    ],
)
def test_numbers_that_are_more_than_numbers_are_refused(net: Any, words: str) -> None:
    torch.manual_seed(0)
    model = net()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(GraphError, match=words):
        shrink_(model, experts(), X)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_channels_next_to_a_choice_of_channels() -> None:
    """A choice among channels that looks nothing up: frozen for channels, as before."""

    class Best(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(5, 32), nn.Linear(5, 32), nn.Linear(36, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([self.a(x).topk(4, -1).values, torch.relu(self.b(x))], -1))

    torch.manual_seed(0)
    net = Best()
    shrink_(net, Target("channels", 0.6), X)
    assert net.a.out_features == 32
    assert net.b.out_features < 32
    with pytest.raises(SecateurError):
        shrink_(net, experts(0.0), X)
