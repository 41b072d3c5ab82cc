"""Group lasso, growing and group norm beside brute force: minima found by search, units counted by hand."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.checkpoint import load_tree, save_tree
from secateur.errors import GraphError, RecipeError, WeightError
from secateur.penalties import GroupLasso, GroupNorm, Growing, Penalised
from secateur.structure import coupled_groups
from secateur.testing import check_penalty
from secateur.types import CoupledGroup, CoupledSlices

OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.8),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.0),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.005),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def groups_by_hand(by: str, w: Tensor) -> list[Tensor]:
    """The groups' elements, one list per group, by plain loops."""
    if by == "layer":
        return [w.flatten()]
    if by == "out":
        return [w[o].flatten() for o in range(w.shape[0])]
    if by == "in":
        return [w[:, i].flatten() for i in range(w.shape[1])]
    if by == "kernel":
        return [w[o, i].flatten() for o in range(w.shape[0]) for i in range(w.shape[1])]
    flat = w.reshape(w.shape[0], -1)
    return [flat[:, j] for j in range(flat.shape[1])]


@pytest.mark.parametrize("by", ["out", "in", "kernel", "shape", "layer"])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2, 2), (2, 3, 5)])
def test_value_and_step_by_loops(by: Any, shape: tuple[int, ...]) -> None:
    w = normal(*shape)
    penalty = GroupLasso(0.3, by=by, proximal_step=True)
    groups = groups_by_hand(by, w)
    want = 0.3 * sum(math.sqrt(g.numel()) * math.sqrt(sum(float(x) ** 2 for x in g)) for g in groups)
    assert float(penalty.value({"w": w}, {})) == pytest.approx(want)
    moved = penalty.proximal({"w": w}, {}, {"w": torch.tensor(1.1, dtype=torch.float64)})["w"]
    for before, after in zip(groups, groups_by_hand(by, moved), strict=True):
        short = 1 - 1.1 * 0.3 * math.sqrt(before.numel()) / float(before.norm())
        torch.testing.assert_close(after, before * max(0.0, short))
        assert (float(after.norm()) == 0) == (short <= 0), "exactly zero, or not at all"


@pytest.mark.parametrize("seed", range(6))
def test_the_step_with_a_rate_per_element_is_the_minimum(seed: int) -> None:
    """Bisection on the norm of the solution, one group at a time; and no random neighbour does better."""
    w = normal(5, 7, seed=seed)
    rates = torch.exp(3 * normal(5, 7, seed=100 + seed))
    c = 0.05 * math.sqrt(7)
    got = GroupLasso(0.05, proximal_step=True).proximal({"w": w}, {}, {"w": rates})["w"]
    for row, rate, x in zip(w, rates, got, strict=True):
        low, high = 0.0, float(row.norm())
        for _ in range(200):
            middle = (low + high) / 2
            inside = float((row / (middle + rate * c)).square().sum()) > 1
            low, high = (middle, high) if inside else (low, middle)
        want = row * low / (low + rate * c) if low > 1e-12 else torch.zeros_like(row)
        torch.testing.assert_close(x, want, rtol=1e-9, atol=1e-12)

        def cost(y: Tensor, row: Tensor = row, rate: Tensor = rate) -> float:
            return float(((y - row).square() / (2 * rate)).sum() + c * y.norm())

        least = cost(x)
        for size in (1e-4, 1e-2, 1.0):
            for k in range(20):
                assert least <= cost(x + size * normal(7, seed=k)) + 1e-12


@pytest.mark.parametrize("by", ["out", "in", "layer"])
def test_the_step_in_float32_is_the_one_in_float64(by: Any) -> None:
    """However far rates and pulls lie apart, no element is off by more than its own last places."""
    for decades in range(9):
        w = normal(20, 50, seed=decades).float()
        noise = torch.Generator().manual_seed(decades)
        rates = 10 ** (torch.rand(20, 50, generator=noise) * decades - 6)
        for strength in (1e-3, 1e-1, 1e1):
            lasso = GroupLasso(strength, by=by, proximal_step=True)
            got = lasso.proximal({"w": w}, {}, {"w": rates})["w"]
            want = lasso.proximal({"w": w.double()}, {}, {"w": rates.double()})["w"]
            assert got.dtype == torch.float32
            assert float(((got.double() - want).abs() / w.double().abs()).max()) < 1e-6


def test_a_few_newton_steps_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost of a training step depends on it: with starts at zero it took five and more."""
    lasso = GroupLasso(0.02, proximal_step=True)
    w, rates = normal(50, 30), torch.exp(2 * normal(50, 30, seed=1))
    want = lasso.proximal({"w": w}, {}, {"w": rates})["w"]
    alive = want.norm(dim=1) > 0
    assert int(alive.sum()) > 0
    monkeypatch.setattr("secateur.penalties._shrink._MOST", 3)
    torch.testing.assert_close(lasso.proximal({"w": w}, {}, {"w": rates})["w"], want, rtol=1e-9, atol=1e-12)


def test_members_with_a_rate_of_zero_stay_and_hold_the_others() -> None:
    """Coupled tensors of which one learns nothing: its values are in the norm, and keep every unit alive."""
    slices = (CoupledSlices("a", 0, (0, 1, -1)), CoupledSlices("b", 0, (0, 1)))
    lasso = GroupLasso(0.5, by="coupled", proximal_step=True, groups=(CoupledGroup("g", 2, slices),))
    w = {"a": torch.tensor([[3.0, 4.0], [1e-3, 0.0], [7.0, 7.0]]), "b": torch.tensor([1.0, 2e-3])}
    rates = {"a": torch.full((3, 2), 100.0), "b": torch.tensor(0.0)}
    got = lasso.proximal(w, {}, rates)
    assert torch.equal(got["b"], w["b"])
    assert torch.equal(got["a"][2], w["a"][2])
    for unit in (0, 1):
        # With b fixed: x = a t / (t + p), t^2 = |x|^2 + b^2, by bisection.
        pull, b, a = 100.0 * 0.5 * math.sqrt(3), float(w["b"][unit]), w["a"][unit].double()
        low, high = 0.0, 10.0
        for _ in range(100):
            t = (low + high) / 2
            low, high = (t, high) if float((a * t / (t + pull)).square().sum()) + b * b > t * t else (low, t)
        torch.testing.assert_close(got["a"][unit].double(), a * low / (low + pull), rtol=1e-5, atol=1e-9)


def test_a_rate_of_zero_and_a_strength_of_zero_move_nothing() -> None:
    w = normal(3, 4)
    w[1] = 0.0
    rates = torch.rand(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for strength, rate in ((0.0, rates), (0.0, torch.tensor(1.0)), (0.5, torch.zeros(3, 4)), (0.5, torch.tensor(0.0))):
        got = GroupLasso(strength, proximal_step=True).proximal({"w": w}, {}, {"w": rate.double()})["w"]
        torch.testing.assert_close(got, w, rtol=1e-15, atol=0)
    mixed = rates * torch.tensor([0.0, 1.0, 1.0, 1.0])
    got = GroupLasso(5.0, proximal_step=True).proximal({"w": w}, {}, {"w": mixed})["w"]
    torch.testing.assert_close(got[:, 0], w[:, 0])
    assert bool(torch.isfinite(got).all())
    half = GroupLasso(0.1, proximal_step=True).proximal({"w": w.half()}, {}, {"w": torch.tensor(1.0)})["w"]
    assert half.dtype == torch.float16


class Rows(nn.Module):
    """A layer whose target needs the first two rows only; the others fit a little noise."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5, bias=False).double()
        self.target = normal(5, 6, seed=5) * torch.tensor([1.0, 1.0, 0.05, 0.05, 0.05]).unsqueeze(1)

    def forward(self) -> Tensor:
        return (self.fc.weight - self.target).square().sum() / 2


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("proximal", [False, True])
def test_useless_rows_go_whole(name: str, proximal: bool) -> None:
    """The minimum of |w - t|^2 / 2 + c |w| is (1 - c / |t|) t, or zero."""
    torch.manual_seed(0)
    model, strength = Rows(), 0.3
    optimizer = OPTIMIZERS[name](model.parameters())
    Penalised(model, GroupLasso(strength, proximal_step=proximal), optimizer=optimizer)
    for step in range(1200):
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("first", group["lr"]) * (1 - step / 1200)
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
    c = strength * math.sqrt(6)
    for row, target in zip(model.fc.weight.detach(), model.target, strict=True):
        short = max(0.0, 1 - c / float(target.norm()))
        torch.testing.assert_close(row, short * target, rtol=0, atol=0.02)
        if proximal:
            assert (float(row.norm()) == 0) == (short == 0)


# Coupled channels


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(4 * 16, 3),
    ).double()  # fmt: skip


def test_coupled_groups_are_the_channels() -> None:
    model = net()
    inputs = normal(2, 2, 4, 4)
    first, second = coupled_groups(model, inputs)
    assert (first.units, second.units) == (6, 4)
    assert [s.name for s in first.slices] == ["0.bias", "0.weight", "1.bias", "1.weight"]
    assert [(s.name, s.dim) for s in second.slices] == [("3.bias", 0), ("3.weight", 0)]
    with_readers = coupled_groups(model, inputs, readers=True)
    assert [(s.name, s.dim) for s in with_readers[0].slices][4:] == [("3.weight", 1)]
    flattened = with_readers[1].slices[-1]
    assert (flattened.name, flattened.dim, flattened.units) == ("6.weight", 1, tuple(i // 16 for i in range(64)))
    with pytest.raises(GraphError, match="no channels of this model are coupled"):
        coupled_groups(nn.Linear(3, 2), torch.randn(1, 3))


def unit_by_hand(model: nn.Module, unit: int, *, readers: bool) -> list[Tensor]:
    """Everything of one channel of the first convolution."""
    p = dict(model.named_parameters())
    parts = [p["0.weight"][unit], p["0.bias"][unit], p["1.weight"][unit], p["1.bias"][unit]]
    return [x.detach().flatten() for x in (*parts, *([p["3.weight"][:, unit]] if readers else []))]


@pytest.mark.parametrize("readers", [False, True])
def test_lasso_over_coupled_channels_by_hand(readers: bool) -> None:
    model = net()
    groups = coupled_groups(model, normal(2, 2, 4, 4), readers=readers)
    penalty = GroupLasso(0.1, by="coupled", groups=groups[:1], proximal_step=True)
    names = penalty.parameters(model)
    weights = {n: model.get_parameter(n).detach() for n in names}
    joined = [torch.cat(unit_by_hand(model, u, readers=readers)) for u in range(6)]
    value = 0.1 * sum(math.sqrt(len(x)) * float(x.norm()) for x in joined)
    assert float(penalty.value(weights, {})) == pytest.approx(value)
    c = 0.1 * math.sqrt(len(joined[0]))
    rate = torch.tensor(sorted(float(x.norm()) for x in joined)[2] / c, dtype=torch.float64)  # three go
    moved = penalty.proximal(weights, {}, dict.fromkeys(names, rate))
    after = copy.deepcopy(model)
    after.load_state_dict(after.state_dict() | moved)
    for unit, before in enumerate(joined):
        short = max(0.0, 1 - float(rate) * c / float(before.norm()))
        torch.testing.assert_close(torch.cat(unit_by_hand(after, unit, readers=readers)), short * before)
    # Rates of their own for one of the tensors: the same step with a rate per element.
    uneven = dict.fromkeys(names, rate) | {"0.bias": 3 * rate}
    spelt = {n: r.expand_as(weights[n]) for n, r in uneven.items()}
    one, two = penalty.proximal(weights, {}, uneven), penalty.proximal(weights, {}, spelt)
    assert all(torch.allclose(one[n], two[n]) for n in names)


def test_a_channel_that_goes_is_silent_and_can_be_cut_out() -> None:
    import secateur
    from secateur.patterns import Channel

    model, inputs = net(), normal(4, 2, 4, 4)
    penalty = GroupLasso(0.004, by="coupled", groups=coupled_groups(model, inputs), proximal_step=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    Penalised(model, penalty, optimizer=optimizer)
    for _ in range(400):
        optimizer.zero_grad()
        (model(inputs).mean(1) - inputs.mean((1, 2, 3))).square().mean().backward()
        optimizer.step()
    gone = [u for u in range(6) if float(torch.cat(unit_by_hand(model, u, readers=False)).norm()) == 0]
    silent = model[3].weight.detach().flatten(1).norm(dim=1) + model[3].bias.detach().abs() == 0
    both = len(gone) + int(silent.sum())
    assert 0 < len(gone) < 6
    model.eval()
    dense = copy.deepcopy(model)
    method = secateur.Method(
        target=secateur.Target("channels", (10 - both) / 10), pattern=Channel(coupled=True, align=1)
    )
    report = secateur.shrink_(model, method, inputs[:1])
    assert {g.name: g.kept for g in report.groups} == {"0": 6 - len(gone), "3": 4 - int(silent.sum())}
    torch.testing.assert_close(model(inputs), dense(inputs))


@pytest.mark.parametrize("make", [GroupNorm, lambda **k: Growing(share=0.5, **k), lambda **k: GroupLasso(**k)])
def test_overlapping_groups_have_a_gradient(make: Any) -> None:
    """Rows of one group are columns of another: the gradient is still that of the value."""
    model = net()
    penalty = make(by="coupled", groups=coupled_groups(model, normal(2, 2, 4, 4), readers=True))
    weights = {n: model.get_parameter(n).detach().clone().requires_grad_() for n in penalty.parameters(model)}
    state = penalty.start({n: w.detach() for n, w in weights.items()})
    wanted = torch.autograd.grad(penalty.value(weights, state), list(weights.values()))
    got = penalty.gradient({n: w.detach() for n, w in weights.items()}, state)
    for (name, g), want in zip(got.items(), wanted, strict=True):
        torch.testing.assert_close(g, want, msg=name)


# Growing and group norm


def test_growing_chooses_exactly_the_smallest_and_grows_by_the_clock() -> None:
    w = torch.tensor([[3.0, 0.0], [1.0, 1.0], [-0.5, 0.5], [1.0, 1.0], [0.0, 0.1]])
    penalty = Growing(share=0.6, strength=0.1, step=0.1, every=5, ceiling=0.35)
    state = penalty.start({"w": w})
    torch.testing.assert_close(state["w"], torch.tensor([0.0, 0.1, 0.1, 0.0, 0.1]))  # of a tie the first goes
    levels = []
    for step in range(20):
        torch.testing.assert_close(float(state["w"].max()) * w[1], penalty.gradient({"w": w}, state)["w"][1])
        levels.append(round(float(state["w"].max()), 6))
        state = penalty.advance({"w": w}, state, step, None)
    assert levels == [0.1] * 5 + [0.2] * 5 + [0.3] * 5 + [0.35] * 5
    assert float(state["w"][0]) == 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_growing_empties_what_it_chose_and_spares_the_rest(name: str) -> None:
    torch.manual_seed(0)
    model = Rows()
    with torch.no_grad():
        model.fc.weight.copy_(model.target)  # trained
    optimizer = OPTIMIZERS[name](model.parameters())
    Penalised(model, Growing(share=0.6, step=0.5, every=5, ceiling=30.0), optimizer=optimizer)
    for _ in range(600):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
    norms = model.fc.weight.detach().norm(dim=1) / model.target.norm(dim=1)
    assert (norms[2:] < 0.35).all()  # 1 / (1 + 30), and what steps of one length leave
    torch.testing.assert_close(norms[:2], torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-3)


def test_group_norm_presses_the_smallest_hardest() -> None:
    w = {"w": torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)}
    penalty = GroupNorm(0.1, alpha=2.0, every=2)
    state = penalty.start(w)
    want = [2 ** (2.0 * (4 - i) / 4) for i in (4, 1, 0)]
    assert state["w"].tolist() == pytest.approx(want)
    assert float(penalty.value(w, state)) == pytest.approx(0.05 * (want[0] * 4 + want[1] * 1))
    assert penalty.gradient(w, state)["w"][1].tolist() == pytest.approx([0.0, 0.1 * want[1]])
    other = {"w": w["w"].flip(0)}
    assert torch.equal(penalty.advance(other, state, 0, None)["w"], state["w"])
    torch.testing.assert_close(penalty.advance(other, state, 1, None)["w"], state["w"].flip(0))
    alike = penalty.start({"w": torch.ones(3, 2)})
    assert alike["w"].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    "make",
    [
        lambda groups: Growing(share=0.5, step=0.1, every=3, by="coupled", groups=groups),
        lambda groups: GroupNorm(0.1, every=3, by="coupled", groups=groups),
        lambda groups: GroupLasso(0.01, by="coupled", groups=groups, proximal_step=True),
        lambda groups: Growing(share=0.5, step=0.1, every=3, by="in"),
    ],
)
def test_resuming_is_bit_for_bit(name: str, make: Any, tmp_path: Any) -> None:
    inputs = normal(4, 2, 4, 4)

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer, Penalised]:
        model = net()
        optimizer = OPTIMIZERS[name](model.parameters())
        return model, optimizer, Penalised(model, make(coupled_groups(model, inputs)), optimizer=optimizer)

    def go_on(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(7):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()

    whole = fresh()
    go_on(*whole[:2])
    save_tree(tmp_path / "s", [x.state_dict() for x in whole])
    go_on(*whole[:2])
    again = fresh()
    for part, state in zip(again, load_tree(tmp_path / "s"), strict=True):
        part.load_state_dict(state)
    go_on(*again[:2])
    assert all(torch.equal(t, again[0].state_dict()[n]) for n, t in whole[0].state_dict().items())
    one, two = whole[2].state_dict(), again[2].state_dict()
    assert all(torch.equal(t, two["state"][n]) for n, t in one["state"].items())


def test_laws_over_coupled_groups() -> None:
    """The network of the laws, its groups written by hand: two tensors, in another order, one place left out."""
    own = (CoupledSlices("conv.weight", 0, (2, 1, 0, -1, 4, 3)), CoupledSlices("bn1.weight", 0, (0, 1, 2, 3, 4, 4)))
    groups = (
        CoupledGroup("first", 5, own),
        CoupledGroup("second", 2, (CoupledSlices("fc.weight", 0, (0, 1, 0, 1, 0)),)),
    )
    for proximal in (False, True):
        check_penalty(GroupLasso(0.2, by="coupled", groups=groups, proximal_step=proximal))
    check_penalty(GroupNorm(0.2, by="coupled", groups=groups))
    check_penalty(Growing(share=0.5, strength=0.2, by="coupled", groups=groups))


def test_refusals() -> None:
    model = net()
    groups = coupled_groups(model, normal(2, 2, 4, 4), readers=True)
    for make in (GroupLasso, GroupNorm, Growing):
        for strength in (-1.0, math.nan, math.inf):
            with pytest.raises(RecipeError, match="strength"):
                make(strength=strength)
        with pytest.raises(RecipeError, match="by must be"):
            make(by="row")
        with pytest.raises(RecipeError, match="needs the groups"):
            make(by="coupled").parameters(model)
        with pytest.raises(RecipeError, match="groups are for by = 'coupled'"):
            make(groups=groups)
        with pytest.raises(RecipeError, match="one name"):
            make(by="coupled", groups=groups * 2)
        with pytest.raises(WeightError, match="needs two dimensions"):
            make(by="in", include=("0",)).parameters(model)
        with pytest.raises(WeightError, match="stores its weight inputs first"):
            make().parameters(nn.Sequential(nn.ConvTranspose2d(2, 3, 3)))
        with pytest.raises(WeightError, match="no elements"):
            make().parameters(nn.Sequential(nn.Linear(3, 0)))
        with pytest.raises(WeightError, match="matches no parameter"):
            make(exclude=("bn*",)).parameters(model)
        with pytest.raises(WeightError, match="not of this model"):
            make(by="coupled", groups=groups).parameters(nn.Sequential(nn.Conv2d(1, 6, 3), nn.Linear(2, 2)))
        with pytest.raises(WeightError, match="nothing to press on"):
            make(by="coupled", groups=groups, exclude=("*",)).parameters(model)
    with pytest.raises(RecipeError, match=r"elements of 3\.weight are in two groups"):
        GroupLasso(by="coupled", groups=groups, proximal_step=True).parameters(model)
    with pytest.raises(RecipeError, match=r"share = 0\.1 of at most 6 units is none"):
        Penalised(model, Growing(share=0.1))
    for options in ({"share": 1.5}, {"step": -1.0}, {"every": 0}, {"ceiling": 1e-9}, {"strength": 0.0}):
        with pytest.raises(RecipeError, match=next(iter(options))):
            Growing(**options)
    for options in ({"alpha": -1.0}, {"alpha": math.nan}, {"every": 0}):
        with pytest.raises(RecipeError, match=next(iter(options))):
            GroupNorm(**options)


def test_frozen_members_are_left_out() -> None:
    model = net()
    groups = coupled_groups(model, normal(2, 2, 4, 4))
    model[0].requires_grad_(False)
    penalised = Penalised(model, GroupLasso(0.1, by="coupled", groups=groups))
    assert penalised.parameters == ("1.weight", "1.bias", "3.weight", "3.bias")
    channel = torch.stack([model[1].weight.detach(), model[1].bias.detach()])
    second = torch.cat([model[3].weight.detach().flatten(1), model[3].bias.detach()[:, None]], 1)
    want = 0.1 * (math.sqrt(2) * channel.norm(dim=0).sum() + math.sqrt(second.shape[1]) * second.norm(dim=1).sum())
    assert float(penalised.value().detach()) == pytest.approx(float(want))
