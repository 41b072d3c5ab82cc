"""Experts that are modules in a list leave with their rows of the router, whatever code runs them, or are refused."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from secateur.errors import GraphError, PlanError, TargetError
from secateur.graph.coupling import Coupling
from secateur.graph.examples import Example
from secateur.graph.plan import Plan
from secateur.graph.trace import trace
from secateur.method import Method
from secateur.patterns import Channel, Expert, Layer
from secateur.scores import Coupled, Magnitude, Random, Taylor
from secateur.structure import find_groups, load_pruned, make_plan, save_pruned, shrink_, verify
from secateur.structure.scoring import unit_scores
from secateur.targets import Target
from tests.structure.mixtures import EXPERTS, HIDDEN, WAYS, WIDTH, Gated, Listed, Mlp, Net, Switch, without

X = torch.randn(24, 5, generator=torch.Generator().manual_seed(1))
PREFIX = "mixtures.0.experts"


def made(*ways: str, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return Net(*(Listed(how, **kwargs) for how in ways)).eval()


def experts(value: float = 0.5, kind: str = "channels", **parts: Any) -> Method:
    return Method(target=Target(kind, value), pattern=Expert(), **parts)  # type: ignore[arg-type]


def kept_by(plan: Plan) -> dict[int, list[int]]:
    names = {i: f"mixtures.{i}.router.weight" for i in range(3)}
    return {i: plan.kept[name][0].tolist() for i, name in names.items() if name in plan.kept}


def unseen(seed: int) -> Tensor:
    return torch.randn(17, 5, generator=torch.Generator().manual_seed(seed))


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).square().mean()
    return loss


@pytest.mark.parametrize(("gate", "k"), [("softmax", 2), ("sigmoid", 1)])
@pytest.mark.parametrize("how", WAYS)
def test_experts_leave_their_list_with_their_rows(how: str, gate: str, k: int, tmp_path: Path) -> None:
    net = made(how, gate=gate, k=k)
    dense = copy.deepcopy(net)
    report = shrink_(net, experts(score=Random(seed=4)), X)
    (stay,) = kept_by(report.plan).values()
    assert len(stay) == 3
    assert stay != [0, 1, 2]  # else numbers would not change
    mixture = net.mixtures[0]
    assert len(mixture.experts) == mixture.num_experts == mixture.router.out_features == len(mixture.correction) == 3
    for new, old in enumerate(stay):
        assert torch.equal(mixture.experts[new].up.weight, dense.mixtures[0].experts[old].up.weight)
    for seed in range(3):
        x = unseen(seed)
        torch.testing.assert_close(net(x), without(dense, {0: stay}, x), rtol=1e-5, atol=1e-6)
    assert verify(dense, net, X, report).equal
    assert sum(p.numel() for p in net.parameters()) == report.parameters[1]
    save_pruned(tmp_path, net)
    fresh = made(how, gate=gate, k=k)
    load_pruned(fresh, tmp_path)
    assert torch.equal(fresh(X), net(X))
    assert {n: p.shape for n, p in fresh.named_parameters()} == {n: p.shape for n, p in net.named_parameters()}


@pytest.mark.parametrize("capacity", [3, 9])
def test_one_expert_per_token_in_a_dictionary(capacity: int, tmp_path: Path) -> None:
    def fresh() -> Any:
        torch.manual_seed(0)
        return Net(Switch(capacity), Switch(capacity)).eval()

    net = fresh()
    dense = copy.deepcopy(net)
    report = shrink_(net, experts(score=Random(seed=1)), X)
    stay = kept_by(report.plan)
    for number, kept in stay.items():
        assert list(net.mixtures[number].experts) == [f"expert_{i}" for i in range(len(kept))]
    assert any(kept != list(range(len(kept))) for kept in stay.values())
    for seed in range(3):
        torch.testing.assert_close(net(unseen(seed)), without(dense, stay, unseen(seed)), rtol=1e-5, atol=1e-6)
    save_pruned(tmp_path, net)
    again = fresh()
    load_pruned(again, tmp_path)
    assert torch.equal(again(X), net(X))


def test_a_mixture_inside_an_expert() -> None:
    class Outer(Listed):
        def __init__(self) -> None:
            super().__init__("enumerated", k=1, kinds=(Mlp, Mlp, lambda: Listed("masks"), Mlp, lambda: Listed("hit")))

    torch.manual_seed(0)
    net = Net(Outer()).eval()
    dense = copy.deepcopy(net)
    report = shrink_(net, experts(0.7, score=Random(seed=0)), X)
    gone = {drop.container: drop.places for drop in report.plan.drops}
    assert set(gone) > {PREFIX}
    twin = copy.deepcopy(dense)
    for container, places in gone.items():
        mixture: Any = twin.get_submodule(container.rpartition(".")[0])
        with torch.no_grad():
            mixture.router.bias[list(places)] = -torch.inf
            mixture.correction[list(places)] = -torch.inf
    torch.testing.assert_close(net(unseen(0)), twin(unseen(0)), rtol=1e-5, atol=1e-6)
    assert sum(p.numel() for p in net.parameters()) == report.parameters[1]


def test_stacked_weights_of_the_same_experts_lose_the_same_ones() -> None:
    """A twin that looks stacked weights up instead: the same method keeps the same experts, and gives the same."""

    class Stacked(Listed):
        def __init__(self, other: Listed) -> None:
            super().__init__(k=other.k)
            del self.experts
            self.load_state_dict(other.state_dict(), strict=False)
            for name in ("up.weight", "up.bias", "down.weight", "down.bias"):
                stacked = torch.stack([expert.get_parameter(name) for expert in other.experts])
                setattr(self, name.replace(".", "_"), nn.Parameter(stacked.detach()))

        def enumerated(self, x: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
            up = torch.einsum("tkhw,tw->tkh", self.up_weight[chosen], x) + self.up_bias[chosen]
            down = torch.einsum("tkwh,tkh->tkw", self.down_weight[chosen], torch.relu(up)) + self.down_bias[chosen]
            return (down * share[..., None]).sum(1)

    listed = made("enumerated")
    stacked = made("enumerated")
    stacked.mixtures[0] = Stacked(stacked.mixtures[0])
    torch.testing.assert_close(stacked(X), listed(X))
    for score in (Coupled(Magnitude(p=2), reduce_by="sum"), Coupled(Magnitude(), reduce_by="mean"), Taylor()):
        small = [copy.deepcopy(listed), copy.deepcopy(stacked)]
        plans = [shrink_(m, experts(score=score), X, loss_fn=loss_fn, batches=[X[:12], X[12:]]) for m in small]
        assert kept_by(plans[0].plan) == kept_by(plans[1].plan)
        assert plans[0].parameters == plans[1].parameters
        for seed in range(3):
            torch.testing.assert_close(small[0](unseen(seed)), small[1](unseen(seed)), rtol=1e-5, atol=1e-6)


def test_experts_that_the_example_does_not_reach_are_proven_too() -> None:
    net = made("enumerated", k=1)
    with torch.no_grad():
        net.mixtures[0].correction[5] += 100.0  # the example and anything like it only ever reach this one
    dense = copy.deepcopy(net)
    report = shrink_(net, experts(score=Random(seed=1)), X[:3])
    (stay,) = kept_by(report.plan).values()
    for model in (net, dense):
        with torch.no_grad():
            model.mixtures[0].correction.zero_()
    torch.testing.assert_close(net(X), without(dense, {0: stay}, X), rtol=1e-5, atol=1e-6)
    odd = made("special", k=1)  # the expert of number 0 is special, and never chosen here
    with torch.no_grad():
        odd.mixtures[0].correction[5] += 100.0
    assert 0 not in stay
    with pytest.raises(GraphError, match="its pruned result differs"):
        shrink_(odd, experts(score=Random(seed=1)), X[:3])


def test_several_mixtures_in_one_model() -> None:
    net = made("ranged", "masks", "dense")
    dense = copy.deepcopy(net)
    report = shrink_(net, experts(score=Random(seed=3)), X)
    stay = kept_by(report.plan)
    assert [len(m.experts) for m in net.mixtures] == [len(kept) for kept in stay.values()] == [
        g.kept for g in report.groups
    ]  # fmt: skip
    assert sum(map(len, stay.values())) == 9
    for seed in range(3):
        torch.testing.assert_close(net(unseen(seed)), without(dense, stay, unseen(seed)), rtol=1e-5, atol=1e-6)


def test_experts_of_several_classes() -> None:
    kinds = (Mlp, Gated, lambda: Mlp(5), Gated, Mlp, lambda: Mlp(4))
    net = made("guarded", kinds=kinds)
    dense = copy.deepcopy(net)
    report = shrink_(net, experts(score=Coupled(Magnitude(), reduce_by="sum")), X)
    (stay,) = kept_by(report.plan).values()
    assert 5 not in stay  # the smallest
    assert [type(e) for e in net.mixtures[0].experts] == [type(dense.mixtures[0].experts[i]) for i in stay]
    torch.testing.assert_close(net(unseen(0)), without(dense, {0: stay}, unseen(0)), rtol=1e-5, atol=1e-6)
    assert sum(p.numel() for p in net.parameters()) == report.parameters[1]


def owned(model: Any, expert: int) -> list[Tensor]:
    """What an expert owns, by hand."""
    mixture = model.mixtures[0]
    rows = [mixture.router.weight[expert], mixture.router.bias[expert], mixture.correction[expert]]
    return [*rows, *mixture.experts[expert].parameters()]


def test_scores_see_all_that_an_expert_owns() -> None:
    net = made("enumerated")
    coupling = Coupling(trace(net, [Example((X,), {})]), unit="expert")

    def scored(score: Any) -> Tensor:
        found, silent = unit_scores(net, coupling, score, loss_fn=loss_fn, batches=[X[:12], X[12:]])
        assert not silent
        return torch.from_numpy(found)

    by_hand = [torch.cat([t.detach().flatten() for t in owned(net, e)]).double() for e in range(EXPERTS)]
    for reduce_by, reduce in (
        ("sum", lambda w: w.abs().sum()),
        ("mean", lambda w: w.abs().mean()),
        ("max", lambda w: w.abs().max()),
        ("l2", lambda w: w.square().mean().sqrt()),
    ):
        wanted = torch.stack([reduce(w) for w in by_hand])  # type: ignore[no-untyped-call]
        torch.testing.assert_close(scored(Coupled(Magnitude(), reduce_by=reduce_by)), wanted)  # type: ignore[arg-type]
    products = []
    for batch in (X[:12], X[12:]):
        net.zero_grad()
        loss_fn(net, batch).backward()
        mixture = net.mixtures[0]
        products.append(
            [
                sum(float((p * p.grad).detach()[e].sum()) for p in (mixture.router.weight, mixture.router.bias))
                + float(
                    (mixture.correction.detach() * (0 if mixture.correction.grad is None else mixture.correction.grad))[
                        e
                    ]
                )
                + sum(0 if p.grad is None else float((p * p.grad).sum()) for p in mixture.experts[e].parameters())
                for e in range(EXPERTS)
            ]
        )
    wanted = torch.tensor(products, dtype=torch.float64).square().mean(0)
    torch.testing.assert_close(scored(Taylor()), wanted, rtol=1e-4, atol=1e-12)


def test_scores_of_weights_and_gradients_find_experts_that_do_nothing() -> None:
    net = made("hit")
    with torch.no_grad():
        for dead in (1, 4):
            for parameter in net.mixtures[0].experts[dead].parameters():
                parameter *= 1e-4
    plan = make_plan(net, experts(4 / 6, score=Coupled(Magnitude(p=2), reduce_by="sum")), X).plan
    assert kept_by(plan) == {0: [0, 2, 3, 5]}


def flops(model: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter:
        model(X)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("how", ["dense", "enumerated"])
def test_sizes_are_those_of_the_smaller_model(how: str) -> None:
    """Where every expert sees everything, fewer are less work; else those that stay get what the others had."""
    net = made(how)
    before = flops(net)
    report = shrink_(net, experts(score=Random(seed=4)), X)
    assert report.macs == (before, flops(net))
    assert report.parameters[1] == sum(p.numel() for p in net.parameters())
    wanted = 3 * (WIDTH + 2 + 2 * WIDTH * HIDDEN + HIDDEN + WIDTH)
    assert report.parameters[0] - report.parameters[1] == wanted


@pytest.mark.parametrize(("kind", "value"), [("kept_parameters", 900), ("compression_ratio", 1.5), ("sparsity", 0.4)])
def test_targets_count_the_modules_that_go(kind: str, value: float) -> None:
    net = made("enumerated")
    total = sum(p.numel() for p in net.parameters())
    prunable = sum(t.numel() for e in range(EXPERTS) for t in owned(net, e))
    report = shrink_(net, experts(value, kind), X)
    left = sum(p.numel() for p in net.parameters())
    assert (
        report.achieved
        == {
            "kept_parameters": left,
            "compression_ratio": total / left,
            "sparsity": pytest.approx((total - left) / prunable),
        }[kind]
    )
    with pytest.raises(TargetError, match="cannot be reached"):
        shrink_(made("enumerated", k=4), experts(0.5), X)


def test_the_optimizer_forgets_what_has_left() -> None:
    net = made("enumerated")
    optimizer = torch.optim.Adam(net.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        loss_fn(net, X).backward()
        optimizer.step()
    average = copy.deepcopy(net)
    held = [dict(net.mixtures[0].experts[i].named_parameters()) for i in range(EXPERTS)]
    before = optimizer.state[net.mixtures[0].router.weight]["exp_avg"].clone()
    report = shrink_(net, experts(score=Random(seed=4)), X, optimizer=optimizer, ema=average)
    (stay,) = kept_by(report.plan).values()
    assert torch.equal(optimizer.state[net.mixtures[0].router.weight]["exp_avg"], before[stay])
    listed = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for number, own in enumerate(held):
        for parameter in own.values():
            assert (id(parameter) in listed) == (parameter in optimizer.state) == (number in stay)
    assert torch.equal(average(X), net(X))
    optimizer.zero_grad()
    loss_fn(net, X).backward()
    optimizer.step()


def test_rounds_of_experts_and_channels(tmp_path: Path) -> None:
    net = made("masks", "itself")
    shrink_(net, experts(0.7, score=Random(seed=1)), X)
    middle = copy.deepcopy(net)
    second = shrink_(net, experts(0.7, score=Random(seed=2)), X)
    torch.testing.assert_close(net(unseen(0)), without(middle, kept_by(second.plan), unseen(0)), rtol=1e-5, atol=1e-6)
    shrink_(net, Method(target=Target("channels", 0.7), pattern=Channel()), X, align=2)
    save_pruned(tmp_path, net)
    fresh = made("masks", "itself")
    assert len(load_pruned(fresh, tmp_path)) == 3
    assert torch.equal(fresh(X), net(X))


def test_a_plan_made_on_trial_leaves_everything_and_replays() -> None:
    net = made("enumerated")
    entries = list(net.mixtures[0].experts)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    plan = make_plan(net, experts(score=Random(seed=4)), X).plan
    assert list(net.mixtures[0].experts) == entries
    assert net.mixtures[0].num_experts == EXPERTS
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())
    again = Plan.from_json(plan.to_json())
    assert json.loads(again.to_json()) == json.loads(plan.to_json())
    (drop,) = plan.drops
    torn = replace(plan, drops=(replace(drop, places=(0, 1, 2) if drop.places != (0, 1, 2) else (3, 4, 5)),))
    for wrong in (torn, replace(plan, drops=())):
        with pytest.raises((PlanError, GraphError)):
            shrink_(net, wrong, X)
        assert list(net.mixtures[0].experts) == entries
        assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())
    other = made("enumerated")
    shrink_(net, plan, X)
    shrink_(other, again, X)
    assert torch.equal(net(X), other(X))


def with_another_length() -> nn.Module:
    net = made("enumerated")
    net.mixtures[0].experts.append(Mlp())
    return net  # type: ignore[no-any-return]


def with_a_shared_list() -> nn.Module:
    net = made("enumerated", "enumerated")
    net.mixtures[1].experts = net.mixtures[0].experts
    return net  # type: ignore[no-any-return]


def with_a_second_holder() -> nn.Module:
    net = made("enumerated")
    net.mixtures[0].default = net.mixtures[0].experts[0]
    return net  # type: ignore[no-any-return]


def with_two_lists() -> nn.Module:
    net = made("ahead")
    mixture = net.mixtures[0]
    mixture.stages = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))

    def forward(x: Tensor) -> Tensor:
        for stage in mixture.stages:
            x = torch.relu(stage(x))
        return Listed.forward(mixture, x)

    mixture.forward = forward
    return net  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (lambda: made("computes"), "aten::mul computes with the number of an expert"),
        (lambda: made("scaled"), "its pruned result differs"),
        (with_another_length, "of which there are 6: mixtures.0.experts has 7 entries"),
        (with_a_shared_list, "2 routers choose from mixtures.0.experts"),
        (with_a_second_holder, "mixtures.0.experts.0 of mixtures.0.experts is held elsewhere"),
        (with_two_lists, "which of mixtures.0.experts, mixtures.0.stages holds the experts cannot be told"),
    ],
)
def test_refusals_say_why_and_change_nothing(net: Any, words: str) -> None:
    model = net()
    before, modules = {n: t.clone() for n, t in model.state_dict().items()}, list(model.modules())
    with pytest.raises(GraphError, match=words):
        shrink_(model, experts(score=Random(seed=4)), X)
    assert list(model.modules()) == modules
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_lists_of_one_length_are_told_apart_by_what_runs_when() -> None:
    """Two lists with an entry per expert go together; a stack as long as them stays."""
    net = made("enumerated")
    mixture = net.mixtures[0]
    mixture.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(EXPERTS))
    mixture.stages = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))
    for norm in mixture.norms:
        nn.init.normal_(norm.weight)

    class Own(Listed):
        def enumerated(self, x: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
            for stage in self.stages:
                x = torch.relu(stage(x))
            out = torch.zeros_like(x)
            for i, expert in enumerate(self.experts):
                token, place = torch.where(chosen == i)
                out = out.index_add(0, token, expert(self.norms[i](x[token])) * share[token, place, None])
            return out

    mixture.__class__ = Own
    dense = copy.deepcopy(net)
    report = shrink_(net, experts(score=Random(seed=4)), X)
    assert (len(mixture.experts), len(mixture.norms), len(mixture.stages)) == (3, 3, EXPERTS)
    torch.testing.assert_close(net(unseen(0)), without(dense, kept_by(report.plan), unseen(0)), rtol=1e-5, atol=1e-6)


def test_groups_and_reports_list_the_modules() -> None:
    net = made("enumerated")
    groups = find_groups(net, X)
    (group,) = groups.experts
    assert group.units == EXPERTS
    assert set(group.members) == {
        "mixtures.0.router.weight[0]", "mixtures.0.router.bias[0]", "mixtures.0.correction[0]",
        *(f"{PREFIX}.{i}" for i in range(EXPERTS)),
    }  # fmt: skip
    assert f"{PREFIX}.5" in groups.explain(f"{PREFIX}.2.up").splitlines()[-1]
    report = shrink_(net, experts(), X)
    assert "3 of 6 units stay" in report.explain(PREFIX + ".0")
    assert report.to_dict()["groups"][0]["members"] == list(group.members)


def test_other_patterns_and_filters_leave_the_experts_alone() -> None:
    for pattern in (Channel(), Layer()):
        net = made("enumerated", "enumerated")
        shrink_(net, Method(target=Target("channels", 0.8), pattern=pattern), X, align=2)
        assert all(len(m.experts) == m.router.out_features == EXPERTS for m in net.mixtures)
    net = made("enumerated", "enumerated")
    report = shrink_(net, experts(0.8, exclude=("mixtures.0.experts.*",)), X)
    assert report.skipped == {"mixtures.0.router": "excluded"}
    assert len(net.mixtures[0].experts) == EXPERTS
    net = made("enumerated", "enumerated")
    shrink_(net, experts(0.8, include=("mixtures.1.experts.*",)), X)
    assert len(net.mixtures[0].experts) == EXPERTS > len(net.mixtures[1].experts)
