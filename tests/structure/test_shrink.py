"""Plans, shrinking in place, optimizers, files, and everything that must be refused with nothing changed."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from secateur.allocate import Global, Isomorphic, Layerwise
from secateur.errors import (
    GraphError,
    MissingStatsError,
    PatternError,
    PlanError,
    SecateurError,
    TargetError,
    WeightError,
)
from secateur.graph.changes import Edit
from secateur.graph.coupling import Coupling
from secateur.graph.examples import Example
from secateur.graph.plan import Plan
from secateur.graph.trace import trace
from secateur.method import Method
from secateur.patterns import NM, Channel
from secateur.pruner import Pruner
from secateur.scores import (
    ActivationStatistic,
    ActivationTaylor,
    Coupled,
    GeometricMedian,
    Lamp,
    Magnitude,
    NormScale,
    Sensitivity,
    Taylor,
)
from secateur.structure import find_groups, load_pruned, make_plan, save_pruned, shrink_, verify
from secateur.structure.scoring import unit_scores
from secateur.structure.views import group_view
from secateur.targets import Target


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False), nn.BatchNorm2d(2 * width)
        self.conv2, self.bn2 = nn.Conv2d(2 * width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Net(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    model = Net().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
HALF = Target("macs", 0.5)


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)


# Planning


@pytest.mark.parametrize("allocate", [Layerwise(), Global(), Isomorphic()])
@pytest.mark.parametrize(
    "score",
    [
        Magnitude(),
        Coupled(Magnitude(2), "sum", "out"),
        NormScale(),
        GeometricMedian(),
        Taylor(),
        Taylor("absolute"),
        Lamp(),
        ActivationTaylor(),
        ActivationStatistic("nonzero"),
        Sensitivity(per_mac=True),
        Sensitivity("values", centred=False),
    ],
)
def test_target_is_met_by_the_real_count(net: nn.Module, score: Any, allocate: Any) -> None:
    before = state_of(net)
    method = Method(target=HALF, score=score, pattern=Channel(), allocate=allocate, exclude=("stem",))
    loss = None if isinstance(score, Sensitivity | ActivationStatistic) else loss_fn
    report = make_plan(net, method, X, loss_fn=loss, batches=[X], align=2)
    assert unchanged(net, before), "planning changes nothing"
    assert report.achieved is not None
    assert 0.3 < report.achieved <= 0.5
    assert report.achieved == report.macs[1] / report.macs[0]
    small = copy.deepcopy(net)
    shrink_(small, report, X)
    from secateur.metrics import count_macs

    assert count_macs(small, (X,)).dense == report.macs[1]
    assert count_macs(net, (X,)).dense == report.macs[0]
    assert sum(p.numel() for p in small.parameters()) == report.parameters[1]


@pytest.mark.parametrize(
    ("target", "holds"),
    [
        (Target("compression_ratio", 2.0), lambda r: r.parameters[0] / r.parameters[1] >= 2),
        (Target("kept_parameters", 6000), lambda r: r.parameters[1] <= 6000),
        (Target("channels", 0.5), lambda r: sum(g.kept for g in r.groups) <= 0.5 * sum(g.units for g in r.groups)),
        (Target("sparsity", 0.6), lambda r: r.achieved >= 0.6),
    ],
)
def test_every_target(net: nn.Module, target: Target, holds: Any) -> None:
    report = make_plan(net, target, X, align=1)
    assert holds(report)
    assert report.proof.equal


def test_channel_counts_stay_aligned(net: nn.Module) -> None:
    for align in (1, 4, 8):
        report = make_plan(net, Target("channels", 0.6), X, align=align)
        assert all(g.kept % align == 0 for g in report.groups)
        assert any(g.kept < g.units for g in report.groups)


def test_lowest_scores_go_and_ties_lose_the_lowest_index() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([5.0, 1, 1, 7, 1, 6, 1, 8])[:, None].expand(8, 3))
    method = Method(target=Target("channels", 0.625), score=Coupled(over="out"), pattern=Channel())
    plan = make_plan(model, method, torch.randn(2, 3), align=1).plan
    assert plan.kept["0.weight"][0].tolist() == [0, 3, 5, 6, 7]


@pytest.mark.parametrize("over", ["all", "out", "in", "norm"])
@pytest.mark.parametrize("reduce_by", ["sum", "mean", "l2", "max"])
def test_fast_sums_equal_the_score_itself(net: nn.Module, reduce_by: Any, over: Any) -> None:
    score = Coupled(Magnitude(2), reduce_by, over, "max")
    coupling = Coupling(trace(net, [Example((X,), {})]))
    fast, silent = unit_scores(net, coupling, score, loss_fn=None, batches=None)
    values = {n: p.detach() for n, p in net.named_parameters()}
    for group in coupling.groups:
        slow = score.units(group_view(net, coupling, group, values), {})
        assert (slow is None) == (group.name in silent)
        if slow is not None:
            np.testing.assert_allclose(fast[group.ids], slow.numpy(), rtol=1e-6)


def test_residual_sum_is_one_group(net: nn.Module) -> None:
    groups = {g.name: g for g in find_groups(net, X).groups}
    assert {"stem.weight[0]", "blocks.0.conv2.weight[0]", "blocks.1.conv2.weight[0]", "head.weight[1]"} <= set(
        groups["stem"].members
    )
    assert groups["blocks.0.conv1"].units == 32
    text = find_groups(net, X).explain("blocks.0.conv1")
    assert "blocks.0.bn1.weight[0]" in text
    assert "output of the model" in find_groups(net, X).explain("head")


def test_exact_mode_keeps_normalised_dimensions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2))
    method = Method(target=Target("channels", 0.5), pattern=Channel(), allocate=Layerwise())
    free = make_plan(model, method, torch.randn(3, 4))
    exact = make_plan(model, method, torch.randn(3, 4), exact=True)
    assert {g.name for g in free.groups} == {"0", "2"}
    assert {g.name for g in exact.groups} == {"2"}
    assert free.proof.normalised
    assert not exact.proof.normalised


def test_silent_score_leaves_a_group_whole() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 2)
    )
    report = make_plan(model, Method(target=Target("channels", 0.8), score=NormScale(), pattern=Channel()), X)
    assert report.plan.kept.keys() >= {"0.weight", "1.weight"}
    assert "says nothing" in report.skipped["2"]
    assert next(g for g in report.groups if g.name == "2").kept == 16


# Shrinking


def optimizers(model: nn.Module) -> list[Optimizer]:
    p = list(model.parameters())
    return [
        torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.01),
        torch.optim.AdamW(p, lr=0.01, amsgrad=True),
        torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
        torch.optim.Adafactor(p, lr=0.01),
    ]


@pytest.mark.parametrize("number", range(4))
def test_optimizer_state_is_cut_as_the_weights_are(net: nn.Module, number: int) -> None:
    optimizer = optimizers(net)[number]
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    average = AveragedModel(net)
    net.train()
    loss_fn(net, X).backward()
    optimizer.step()
    before = {n: {k: v.clone() for k, v in optimizer.state[p].items() if isinstance(v, Tensor)}
              for n, p in net.named_parameters()}  # fmt: skip
    identity = {n: id(p) for n, p in net.named_parameters()}
    report = shrink_(net, HALF, X, optimizer=optimizer, ema=average)
    assert {n: id(p) for n, p in net.named_parameters()} == identity
    cut = 0
    for name, p in net.named_parameters():
        for key, value in optimizer.state[p].items():
            if isinstance(value, Tensor) and value.shape == p.shape and value.dim():
                old = before[name][key]
                for dim, kept in report.plan.kept.get(name, {}).items():
                    old = old.index_select(dim, torch.from_numpy(kept))
                assert torch.equal(value, old)
                cut += name in report.plan.kept
    assert cut > 5
    assert all(p.grad is None or p.grad.shape == p.shape for p in net.parameters())
    loss_fn(net, X).backward()
    optimizer.step()
    schedule.step()
    average.update_parameters(net)
    assert average.module.blocks[0].conv1.weight.shape == net.blocks[0].conv1.weight.shape


def test_verify_and_replay_on_a_fresh_instance(net: nn.Module, tmp_path: Path) -> None:
    dense = copy.deepcopy(net)
    report = shrink_(net, HALF, X)
    proof = verify(dense, net, X, report)
    assert proof.equal
    assert "equal to" in str(proof)
    save_pruned(tmp_path / "small", net, report)
    fresh = Net().eval()
    (plan,) = load_pruned(fresh, tmp_path / "small")
    assert torch.equal(fresh(X), net(X))
    assert fresh.blocks[0].conv1.out_channels == fresh.blocks[0].conv1.weight.shape[0]
    again = Plan.from_json(plan.to_json())
    assert again.to_json() == plan.to_json() == report.plan.to_json()
    with torch.no_grad():
        net.head.weight += 1
    assert not verify(dense, net, X, report).equal


def test_masks_of_training_become_the_compact_model(net: nn.Module) -> None:
    method = Method(target=Target("sparsity", 0.5), pattern=Channel(), allocate=Layerwise(), include=("*conv1",))
    pruner = Pruner(net, method, example_inputs=(X,))
    pruner.prune()
    masked = net(X)
    pruner.detach()
    report = shrink_(net, pruner.masks, X)
    assert {g.name: (g.units, g.kept) for g in report.groups} == {
        "stem": (16, 16),
        "blocks.0.conv1": (32, 16),
        "blocks.1.conv1": (32, 16),
    }
    torch.testing.assert_close(net(X), masked, rtol=1e-5, atol=1e-6)


def test_head_of_training_alone_is_followed_and_no_statistic_moves() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32)
            self.head, self.extra = nn.Linear(32, 2), nn.Linear(32, 2)

        def forward(self, x: Tensor) -> Any:
            h = torch.relu(self.norm(self.stem(x))).mean((2, 3))
            return (self.head(h), self.extra(h)) if self.training else self.head(h)

    torch.manual_seed(0)
    model = Auxiliary().eval()
    dense = copy.deepcopy(model)
    report = shrink_(model, Method(target=Target("channels", 0.5), pattern=Channel()), X)
    assert model.extra.in_features == 16
    kept = torch.from_numpy(report.plan.kept["norm.weight"][0])
    assert torch.equal(model.norm.running_mean, dense.norm.running_mean[kept])
    assert torch.equal(model.norm.running_var, dense.norm.running_var[kept])
    assert model.norm.num_batches_tracked == dense.norm.num_batches_tracked
    model.train()(X)[1].sum().backward()


def test_inputs_in_every_form() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 2)

        def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
            return {"out": self.b(torch.relu(self.a(x)) * scale)}

    x, scale = torch.randn(2, 4), torch.tensor(2.0)
    for inputs in ({"x": x, "scale": scale}, ((x,), {"scale": scale})):
        torch.manual_seed(0)
        model = Named()
        assert shrink_(model, HALF, inputs).proof.equal
        assert model.a.out_features == 8


class Guarded(nn.Module):
    """Refuses inputs that do not start with seven."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x[0, 0] != 7:
            raise ValueError("no seven")
        out: Tensor = self.down(torch.relu(self.up(x)))
        return out


def test_verify_leaves_out_made_up_inputs_that_the_model_refuses() -> None:
    dense, x = Guarded(), torch.randn(4, 8)
    x[:, 0] = 7
    small = copy.deepcopy(dense)
    shrink_(small, HALF, x)
    proof = verify(dense, small, x)
    assert (proof.equal, proof.inputs) == (True, 1)
    with torch.no_grad():
        small.up.bias[0] += 1
    assert not verify(dense, small, x).equal
    with pytest.raises(GraphError, match="no seven"):
        verify(dense, small, torch.randn(4, 8))


def test_verify_compares_shapes_where_there_are_no_values() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).to("meta")

    dense, x = make(), torch.randn(2, 8, device="meta")
    small = copy.deepcopy(dense)
    report = shrink_(small, HALF, x)
    assert verify(dense, small, x).level == "shapes"
    other = copy.deepcopy(dense)
    shrink_(other, Target("macs", 0.25), x)
    with pytest.raises(PlanError, match=r"0\.weight of the shrunk model has shape \(8, 8\), the plan leaves \(16, 8\)"):
        verify(dense, other, x, report)


# What must be refused


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


BAD: dict[str, tuple[Any, Any, type[SecateurError], str]] = {
    "every channel": (Target("channels", 0.0), X, TargetError, "cannot be reached"),
    "frozen everything": (
        Method(target=HALF, pattern=Channel(), exclude=("*",)),
        X,
        GraphError,
        "nothing can be pruned",
    ),
    "a filter of nothing": (
        Method(target=HALF, pattern=Channel(), exclude=("fd",)),
        X,
        WeightError,
        "'fd' matches no parameter",
    ),
    "wrong shape": (HALF, torch.randn(2, 5, 8, 8), GraphError, "own forward fails"),
    "no tensor": (HALF, ("x",), GraphError, "no tensor"),
    "not a pattern of units": (Method(pattern=NM()), X, PatternError, "whole units"),
    "gradients, but no loss": (Method(target=HALF, score=Taylor(), pattern=Channel()), X, MissingStatsError, "loss_fn"),
    "no masks": ({}, X, GraphError, "empty"),
    "something else": (42, X, GraphError, "expected a Method"),
    "masks of another model": ({"nope": torch.ones(3, dtype=torch.bool)}, X, SecateurError, "fits no parameter"),
}


@pytest.mark.parametrize("name", BAD)
def test_refusal_leaves_everything_bit_for_bit(net: nn.Module, name: str) -> None:
    what, inputs, kind, words = BAD[name]
    optimizer = torch.optim.Adam(net.parameters())
    loss_fn(net, X).backward()
    optimizer.step()
    before, moments = state_of(net), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(kind, match=words):
        shrink_(net, what, inputs, optimizer=optimizer)
    assert unchanged(net, before)
    after = optimizer.state_dict()
    assert all(torch.equal(after["state"][i][k], v) for i, s in moments["state"].items() for k, v in s.items())


def test_group_smaller_than_its_rounding() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    with pytest.raises(GraphError, match="no more than one step of 8"):
        shrink_(model, Target("channels", 0.5), torch.randn(1, 4))
    assert shrink_(model, Target("channels", 0.5), torch.randn(1, 4), align=1).proof.equal


def test_foreign_optimizer_and_average_are_refused(net: nn.Module) -> None:
    before = state_of(net)
    with pytest.raises(PlanError, match="none of this model's parameters"):
        shrink_(net, HALF, X, optimizer=torch.optim.SGD(Net().parameters(), lr=0.1))
    assert unchanged(net, before)
    with pytest.raises(PlanError, match="was made for"):
        shrink_(net, HALF, X, ema=nn.Linear(2, 2))
    assert unchanged(net, before)
    with pytest.raises(PlanError, match="has shape"):
        shrink_(net, HALF, X, ema=Net(8))
    assert unchanged(net, before)
    with pytest.raises(PlanError, match="the model itself"):
        shrink_(net, HALF, X, ema=net)


def test_wrapped_compiled_scripted_and_quantised_models_are_refused(net: nn.Module) -> None:
    for model, words in (
        (nn.DataParallel(net), "prune model.module first"),
        (torch.compile(net), "prune model._orig_mod first"),
        (torch.jit.trace(net, X), "ScriptModule"),
        (nn.Sequential(nn.LazyLinear(3)), "no shape yet"),
    ):
        with pytest.raises(GraphError, match=words):
            shrink_(model, HALF, X)
    with pytest.raises(GraphError, match="nothing can be pruned"):
        shrink_(Nothing(), HALF, X)


def test_model_that_changes_its_parameters_is_refused() -> None:
    class Moving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.a.weight.mul_(0.99)
            return self.b(torch.relu(self.a(x)))

    model = Moving()
    before = state_of(model)
    with pytest.raises(GraphError, match="in place"):
        shrink_(model, HALF, torch.randn(2, 4))
    assert unchanged(model, before)


def test_plan_for_another_class_size_or_weights(net: nn.Module) -> None:
    plan = make_plan(net, HALF, X).plan
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.head.weight[0, 0] += 1
    for model, words in ((Nothing(), "was made for"), (Net(8), "has shape"), (other, "other weights")):
        before = state_of(model)
        with pytest.raises(PlanError, match=words):
            shrink_(model, plan, X)
        assert unchanged(model, before)
    shrink_(net, plan, X)
    with pytest.raises(PlanError, match="pruned already"):
        plan.apply_(net)


def test_torn_plan_is_refused(net: nn.Module) -> None:
    plan = make_plan(net, HALF, X).plan
    name = next(n for n, dims in plan.kept.items() if n.endswith("conv1.weight") and 0 in dims)
    kept = {n: dict(d) for n, d in plan.kept.items()}
    kept[name][0] = np.setdiff1d(np.arange(plan.shapes[name][0]), kept[name][0])[: len(kept[name][0])]
    torn = Plan(plan.model, plan.shapes, kept, plan.edits)
    before = state_of(net)
    with pytest.raises(PlanError, match="coupled"):
        shrink_(net, torn, X)
    assert unchanged(net, before)


HOSTILE = {
    "not json": "{",
    "a list": "[]",
    "another format": '{"format": 99}',
    "no tensors": '{"format": 1, "model": "m", "weights": "", "info": {}, "edits": []}',
    "an edit that is code": '{"format": 1, "model": "m", "weights": "", "info": {}, "tensors": {}, "edits": '
    '[{"module": "", "attribute": "forward", "old": "x", "new": "__import__"}]}',
    "indices beyond the end": '{"format": 1, "model": "m", "weights": "", "info": {}, "edits": [], "tensors": '
    '{"w": {"shape": [4], "kept": {"0": [[0, 9]]}}}}',
    "indices that go back": '{"format": 1, "model": "m", "weights": "", "info": {}, "edits": [], "tensors": '
    '{"w": {"shape": [4], "kept": {"0": [[2, 3], [0, 1]]}}}}',
    "nothing kept": '{"format": 1, "model": "m", "weights": "", "info": {}, "edits": [], "tensors": '
    '{"w": {"shape": [4], "kept": {"0": []}}}}',
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_plans_are_one_typed_error(name: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(HOSTILE[name])
    with pytest.raises(PlanError, match=r"plan.json"):
        Plan.load(path)


def test_edits_reach_sizes_only(net: nn.Module) -> None:
    report = make_plan(net, HALF, X)
    edit = Edit("blocks.0.nowhere", "x", 1, 2)
    plan = Plan(report.plan.model, report.plan.shapes, report.plan.kept, (edit,))
    with pytest.raises(PlanError, match="does not have"):
        plan.apply_(net)
    document = json.loads(report.plan.to_json())
    assert all(isinstance(e["new"], int | list) for e in document["edits"])


def test_missing_files(net: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be read"):
        load_pruned(net, tmp_path)
    report = shrink_(copy.deepcopy(net), HALF, X)
    report.plan.save(tmp_path / "plan.json")
    before = state_of(net)
    with pytest.raises(SecateurError):
        load_pruned(net, tmp_path)
    assert unchanged(net, before)


def test_a_norm_that_is_excluded_keeps_its_channels(net: nn.Module) -> None:
    report = shrink_(net, Method(target=Target("channels", 0.7), pattern=Channel(), exclude=("blocks.0.bn1",)), X)
    kept = {g.name: (g.kept, g.units) for g in report.groups}
    assert kept["blocks.0.conv1"] == (32, 32)
    assert report.skipped == {"blocks.0.conv1": "excluded"}
