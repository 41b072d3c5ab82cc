"""Whole residual blocks: found, scored, taken out, proven, replayed, and refused with nothing changed."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim.swa_utils import AveragedModel

from secateur.allocate import Layerwise
from secateur.errors import (
    GraphError,
    MissingStatsError,
    PatternError,
    PlanError,
    RecipeError,
    TargetError,
    WeightError,
)
from secateur.graph.blocks import bypassed, find_stacks
from secateur.graph.changes import Drop
from secateur.graph.examples import Example
from secateur.graph.plan import Plan, load_plans
from secateur.method import Method, Override
from secateur.patterns import Channel, Layer
from secateur.pruner import Pruner
from secateur.scores import BlockInfluence, Coupled, Magnitude, NormScale, Random, Taylor
from secateur.structure import ShrinkReport, load_pruned, make_plan, save_pruned, shrink_, verify
from secateur.targets import Target


class Mlp(nn.Module):
    def __init__(self, width: int, place: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.layer_idx = place

    def forward(self, x: Tensor, kind: str = "even") -> Tensor:
        y = self.up(self.norm(x))
        return x + self.down(torch.relu(y) if kind == "even" else torch.tanh(y))


class Stream(nn.Module):
    """A stem, six blocks and a head; a list says which kind each block is, a number how many there are."""

    def __init__(self, width: int = 16, blocks: int = 6) -> None:
        super().__init__()
        self.stem = nn.Linear(8, width)
        self.layers = nn.ModuleList(Mlp(width, i) for i in range(blocks))
        self.layer_kinds = ["odd" if i % 2 else "even" for i in range(blocks)]
        self.num_layers = blocks
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i in range(self.num_layers):
            x = self.layers[i](x, self.layer_kinds[i])
        return self.head(x)


class Scaled(Stream):
    """The place of a block is a value: its share is divided by it."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = x + (layer(x) - x) / (layer.layer_idx + 1)
        return self.head(x)


class Attends(nn.Module):
    """Torch's own layers in a list, post-norm."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


class Weighty(nn.Module):
    """Returns (stream, attention weights): the second is only handed out if asked for."""

    def __init__(self, *, used: bool) -> None:
        super().__init__()
        self.used = used
        self.blocks = nn.ModuleList(Tupled(16) for _ in range(3))

    def forward(self, x: Tensor) -> Any:
        kept = []
        for block in self.blocks:
            x, weights = block(x)
            if self.used:
                kept.append(weights.sum())
        return (x, torch.stack(kept).sum()) if self.used else x


class Tupled(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.sigmoid(self.layer(x))
        return x + weights, weights


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def made(kind: Any = Stream, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind(**kwargs).eval()


def layers(value: float = 0.5, kind: str = "channels", **parts: Any) -> Method:
    return Method(target=Target(kind, value), pattern=Layer(), **parts)  # type: ignore[arg-type]


def places(report: ShrinkReport) -> list[int]:
    return [p for d in report.plan.drops for p in d.places]


def by_hand(model: Stream, gone: list[int], x: Tensor) -> Tensor:
    """The dense forward with some blocks passed by: no hook, no plan."""
    x = model.stem(x)
    for i, layer in enumerate(model.layers):
        x = x if i in gone else layer(x, model.layer_kinds[i])
    out: Tensor = model.head(x)
    return out


def test_blocks_that_go_leave_what_is_left_as_it_was() -> None:
    net = made()
    dense = copy.deepcopy(net)
    report = shrink_(net, layers(score=Random(seed=3)), X)
    assert len(net.layers) == 3
    assert net.num_layers == 3
    assert [layer.layer_idx for layer in net.layers] == [0, 1, 2]
    assert net.layer_kinds == [k for i, k in enumerate(dense.layer_kinds) if i not in places(report)]
    assert torch.equal(net(X), by_hand(dense, places(report), X))
    assert report.proof.equal
    assert report.proof.bypassed == 3
    assert report.parameters[1] == sum(p.numel() for p in net.parameters())
    assert "bypassing 3 blocks" in str(report)


def test_macs_are_those_of_what_is_left() -> None:
    net = made()
    report = shrink_(net, layers(0.6, "macs"), X)
    per_block, ends = 2 * 16 * 32 * 3, (8 * 16 + 16 * 4) * 3
    assert report.macs == (6 * per_block + ends, len(net.layers) * per_block + ends)
    assert report.macs[1] <= 0.6 * report.macs[0] < report.macs[1] + per_block


def test_targets_are_met_by_the_fewest_blocks() -> None:
    whole = sum(p.numel() for p in made().parameters())
    block = sum(p.numel() for p in made().layers[0].parameters())
    for kind, value, gone in (
        ("kept_parameters", whole - block, 1),
        ("kept_parameters", whole - block - 1, 2),
        ("compression_ratio", whole / (whole - 2 * block), 2),
        ("sparsity", 0.5, 3),
        ("sparsity", 0.51, 4),
    ):
        net = made()
        shrink_(net, layers(value, kind), X)
        assert 6 - len(net.layers) == gone, (kind, value)


def test_a_place_that_is_a_value_is_not_counted_anew() -> None:
    net = made(Scaled)
    dense = copy.deepcopy(net)
    report = shrink_(net, layers(score=Random(seed=3)), X)
    assert [layer.layer_idx for layer in net.layers] == [i for i in range(6) if i not in places(report)]
    assert verify(dense, net, X, report).equal
    assert verify(dense, net, X) == verify(dense, net, X, report)


def test_torchs_own_encoder() -> None:
    net = made(Attends)
    x = torch.randn(2, 5, 16)
    shrink_(net, layers(), x)
    assert net.encoder.num_layers == len(net.encoder.layers) == 2
    assert net(x).shape == (2, 3)


def test_what_comes_with_the_stream_may_be_lost_only_if_nobody_uses_it() -> None:
    x = torch.randn(2, 16)
    assert len(shrink_(made(Weighty, used=False), layers(0.7), x).plan.drops[0].places) == 1
    with pytest.raises(GraphError, match="beside its stream is used"):
        shrink_(made(Weighty, used=True), layers(0.7), x)


def test_what_is_no_block_stays_and_says_why() -> None:
    chain = nn.Sequential(
        nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.LayerNorm(8), Mlp(8, 0), nn.Linear(8, 4), nn.Linear(4, 4)
    )
    stacks, refused = find_stacks(chain, Example((X,), {}))
    assert not stacks
    assert refused["0"] == refused["2"] == "its result is not its input with something added"
    assert refused["4"] == "there is no other block of its kind beside it"
    assert refused["5"] == "it turns (3, 8) into (3, 4)"
    with pytest.raises(GraphError, match="no block can be taken out"):
        shrink_(chain, layers(), X)


def test_the_innermost_of_nested_stacks() -> None:
    net = nn.Sequential(nn.Sequential(Mlp(8, 0), Mlp(8, 1)), nn.Sequential(Mlp(8, 0), Mlp(8, 1)))
    stacks, refused = find_stacks(net, Example((X,), {}))
    assert [(s.name, len(s.blocks)) for s in stacks] == [("0", 2), ("1", 2)]
    assert refused == {"0": "it holds blocks of its own", "1": "it holds blocks of its own"}


def test_stacks_whose_names_change_when_another_is_cut() -> None:
    """Blocks beside a nested stack: when one of these goes, the stack is called differently."""
    torch.manual_seed(0)
    net = nn.Sequential(
        Mlp(8, 0), Mlp(8, 1), nn.Sequential(Mlp(8, 0), Mlp(8, 1), Mlp(8, 2)), nn.Linear(8, 8), Mlp(8, 2)
    ).eval()
    dense = copy.deepcopy(net)
    report = shrink_(net, layers(0.4, include=("0", "1", "2.*"), allocate=Layerwise()), X)
    assert {d.container: len(d.places) for d in report.plan.drops} == {"": 1, "2": 2}
    assert verify(dense, net, X).equal
    fresh = copy.deepcopy(dense)
    report.plan.apply_(fresh)
    assert torch.equal(fresh(X), net(X))


class Counts(nn.Module):
    """One stack whose places are fixed in the code, beside a free one."""

    def __init__(self) -> None:
        super().__init__()
        self.fixed = nn.ModuleList(Mlp(8, i) for i in range(3))
        self.free = nn.ModuleList(Mlp(8, i) for i in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fixed[2](self.fixed[1](self.fixed[0](x)))
        for block in self.free:
            x = block(x)
        return self.head(x)


def test_a_stack_that_cannot_be_cut_stays_and_says_why() -> None:
    net = made(Counts)
    report = shrink_(net, layers(0.7, score=Random(seed=1), allocate=Layerwise()), X)
    assert len(net.fixed) == 3
    assert len(net.free) < 3
    assert set(report.skipped) == {f"fixed.{i}" for i in range(3)}
    assert "IndexError" in report.skipped["fixed.0"]
    with pytest.raises(GraphError, match="could not be proven equal"):
        shrink_(made(Counts), layers(0.7, include=("fixed.*",)), X)


def test_scores_rank_blocks() -> None:
    net = made()
    with torch.no_grad():
        for i, layer in enumerate(net.layers):
            layer.down.weight.mul_([1.0, 0.01, 1.0, 0.02, 1.0, 1.0][i])
            layer.down.bias.zero_()
    for score in (BlockInfluence(), Taylor(), Coupled(Magnitude(p=2), reduce_by="sum", over="out")):
        twin = copy.deepcopy(net)
        report = shrink_(twin, layers(0.7, score=score), X, loss_fn=loss_fn, batches=[X, -X])
        assert places(report) == [1, 3], score


def test_block_influence_is_the_mean_angle() -> None:
    net = made(blocks=2)
    wanted = []
    x = net.stem(X)
    for layer, kind in zip(net.layers, net.layer_kinds, strict=True):
        y = layer(x, kind).detach()
        cosines = (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))
        wanted.append(1 - float(cosines.detach().mean()))
        x = y
    from secateur.stats.streams import collect_turns

    found = collect_turns(net, ["layers.0", "layers.1"], loss_fn, [X[:2], X[2:]])
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-6, atol=1e-7)


def test_scores_that_need_batches_or_know_no_blocks_are_refused() -> None:
    for score in (BlockInfluence(), Taylor()):
        with pytest.raises(MissingStatsError, match="batches"):
            shrink_(made(), layers(score=score), X)
    with pytest.raises(MissingStatsError, match="no batches"):
        shrink_(made(), layers(score=BlockInfluence()), X, loss_fn=loss_fn, batches=[])
    assert len(shrink_(made(), layers(score=NormScale()), X).plan.drops) == 1  # blocks own norms


def test_allocation_and_filters() -> None:
    def two() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Sequential(*[Mlp(8, i) for i in range(4)]),
            nn.Linear(8, 8),
            nn.Sequential(*[Mlp(8, i) for i in range(4)]),
        )

    report = shrink_(two(), layers(0.5, allocate=Layerwise()), X)
    assert [len(d.places) for d in report.plan.drops] == [2, 2]
    report = shrink_(two(), layers(0.5, exclude=("0.*",)), X)
    assert [d.container for d in report.plan.drops] == ["2"]
    assert report.skipped == {f"0.{i}": "excluded" for i in range(4)}
    report = shrink_(two(), layers(0.5, include=("0.1", "0.2")), X)
    assert len(places(report)) == 1
    assert set(places(report)) <= {1, 2}
    with pytest.raises(GraphError, match="not of the given types"):
        shrink_(two(), layers(0.5, types=("Conv2d",)), X)
    with pytest.raises(WeightError, match=r"'layers\.1' matches no block"):
        shrink_(two(), layers(0.5, exclude=("0.1", "layers.1")), X)


def test_optimizer_and_average_follow() -> None:
    net = made()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    average = AveragedModel(net)
    loss_fn(net, X).backward()
    optimizer.step()
    scheduler.step()
    average.update_parameters(net)
    held = {n: optimizer.state[p]["exp_avg"].clone() for n, p in net.named_parameters()}
    report = shrink_(net, layers(), X, optimizer=optimizer, ema=average)
    kept = [i for i in range(6) if i not in places(report)]
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in net.parameters()}
    assert set(optimizer.state) == set(net.parameters())
    for new, old in enumerate(kept):
        assert torch.equal(optimizer.state[net.layers[new].up.weight]["exp_avg"], held[f"layers.{old}.up.weight"])
    optimizer.zero_grad()
    loss_fn(net, X).backward()
    optimizer.step()
    scheduler.step()
    average.update_parameters(net)
    assert average.module(X).shape == (3, 4)


def test_files_replay_one_round_or_several(tmp_path: Path) -> None:
    net = made(width=32)
    first = shrink_(net, layers(0.7), X)
    save_pruned(tmp_path / "one", net, first)
    fresh = made(width=32)
    assert load_pruned(fresh, tmp_path / "one") == load_plans(tmp_path / "one" / "plan.json")
    assert torch.equal(fresh(X), net(X))
    second = shrink_(net, Method(target=Target("macs", 0.5), pattern=Channel()), X)
    third = shrink_(net, layers(0.7), X)
    save_pruned(tmp_path / "three", net)
    assert [p.to_dict() for p in load_plans(tmp_path / "three" / "plan.json")] == [
        json.loads(json.dumps(r.plan.to_dict())) for r in (first, second, third)
    ]
    with pytest.raises(PlanError, match="shrunk in 3 rounds"):
        verify(made(width=32), net, X)
    fresh = made(width=32)
    assert len(load_pruned(fresh, tmp_path / "three")) == 3
    assert torch.equal(fresh(X), net(X))
    assert len(fresh.layers) < 4
    assert fresh.layers[0].up.weight.shape == net.layers[0].up.weight.shape
    with pytest.raises(PlanError, match="2 entries, the plan was made for 6"):
        load_pruned(fresh, tmp_path / "one")
    once = made(width=32)
    load_pruned(once, tmp_path / "one")
    with pytest.raises(PlanError, match="pruned already"):
        load_pruned(once, tmp_path / "one")
    with pytest.raises(PlanError, match="no plan to write"):
        save_pruned(tmp_path / "none", net, [])
    with pytest.raises(PlanError, match="is a copy of one that has"):
        save_pruned(tmp_path / "none", copy.deepcopy(net))


def test_a_plan_can_be_given_back() -> None:
    net = made()
    report = make_plan(net, layers(), X)
    assert len(net.layers) == 6
    again = Plan.from_json(report.plan.to_json())
    assert again == report.plan
    replayed = shrink_(net, again, X)
    assert replayed.parameters == report.parameters
    assert replayed.proof.equal


def test_refusals_change_nothing() -> None:
    net = made()
    optimizer = torch.optim.SGD(net.parameters(), momentum=0.9)
    before, children = {n: t.clone() for n, t in net.state_dict().items()}, list(net.layers)
    plan = make_plan(net, layers(), X).plan
    other = made(blocks=5)
    with pytest.raises(PlanError, match="5 entries, the plan was made for 6"):
        shrink_(other, plan, X)
    for what, error, words in (
        (layers(0.0), TargetError, "cannot be reached: with 5 of 6 blocks"),
        (layers(1.0), GraphError, "no block needs to go"),
        (layers(0.5, overrides=(Override("*", 0.5),)), RecipeError, "overrides"),
        (Plan.from_json(plan.to_json().replace('"layers"', '"stem"', 1)), PlanError, "no list of modules"),
    ):
        with pytest.raises(error, match=words):
            shrink_(net, what, X, optimizer=optimizer)
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())
    assert list(net.layers) == children
    assert [layer.layer_idx for layer in net.layers] == list(range(6))
    with pytest.raises(RecipeError, match="masks do not know"):
        Pruner(net, layers(), optimizer=optimizer)


@pytest.mark.parametrize(
    ("places", "entries"), [([], 6), ([0, 0], 6), ([2, 1], 6), ([6], 6), ([-1], 6), ([0, 1], 2), (["0"], 6), ([0], "6")]
)
def test_hostile_places_in_a_plan(places: list[Any], entries: Any) -> None:
    document = make_plan(made(), layers(), X).plan.to_dict()
    document["drops"][0] |= {"places": places, "entries": entries}
    with pytest.raises(PlanError):
        Plan.from_dict(document)


def test_bypassing_takes_itself_back() -> None:
    net = made()
    (stack,), _ = find_stacks(net, Example((X,), {}))
    before = net(X)
    with bypassed(net, stack.blocks):
        assert torch.equal(net(X), net.head(net.stem(X)))
    assert torch.equal(net(X), before)
    assert not any("forward" in vars(layer) for layer in net.layers)
    assert Drop("layers", 6, (1,)) == Drop("layers", 6, (1,), (), ())


def test_on_the_meta_device_only_shapes_are_checked() -> None:
    with torch.device("meta"):
        net = Stream()
        again = Stream()
    x = torch.empty(3, 8, device="meta")
    report = shrink_(net.eval(), layers(), x)
    assert report.proof.level == "shapes"
    assert len(net.layers) == 3
    assert shrink_(again.eval(), report.plan, x).proof == report.proof
    assert len(again.layers) == 3


def test_fake_tensors_inside_and_outside_their_mode() -> None:
    for pattern in (Layer(), Channel()):
        method = Method(target=Target("macs", 0.6), pattern=pattern)
        mode = FakeTensorMode()
        with mode:
            inside, outside, x = Stream(64).eval(), Stream(64).eval(), torch.randn(3, 8)
            report = shrink_(inside, method, x)
        again = shrink_(outside, method, x)
        assert report.proof.level == again.proof.level == "shapes"
        assert report.parameters == again.parameters
        assert report.parameters[1] < report.parameters[0]
        real = made(width=64)
        report.plan.apply_(real)
        assert {n: p.shape for n, p in real.named_parameters()} == {n: p.shape for n, p in inside.named_parameters()}
        assert isinstance(next(inside.parameters()), FakeTensor)
        with mode:
            assert inside(torch.randn(5, 8)).shape == (5, 4)


@pytest.mark.parametrize("option", ["uniform", "exact"])
def test_options_about_widths_are_refused(option: str) -> None:
    with pytest.raises(PatternError, match="leave them out"):
        shrink_(made(), layers(), X, **{option: True})  # type: ignore[arg-type]
