"""What shrinking must not touch, and what it must not believe: other models, optimizer state, files, inputs."""

from __future__ import annotations

import copy
import json
from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.errors import GraphError, PlanError
from secateur.graph.changes import Edit
from secateur.graph.compare import compare, says_nothing
from secateur.graph.plan import Plan
from secateur.structure import make_plan, shrink_, verify
from secateur.targets import Target

HALF = Target("channels", 0.5)
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def mlp(width: int = 32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2)
    )  # fmt: skip


class Guarded(nn.Module):
    """A branch that ordinary inputs never take, and that refuses what a made-up input brings there."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        if x.sum() < -1e6 and h.sum() < 15:  # more than half of the units can bring
            raise ValueError("too small")
        out: Tensor = self.b(h)
        return out


def test_model_is_pruned_when_the_last_input_is_refused() -> None:
    model = Guarded()
    x = torch.randn(4, 8)
    report = shrink_(model, HALF, x)
    assert report.proof.equal
    assert tuple(model.a.weight.shape) == (8, 8)
    assert tuple(model(x).shape) == (4, 4)


class Custom(Optimizer):
    """Holds whatever state a test puts into it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        return None


# Optimizers


def test_failing_average_puts_the_optimizer_back() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    model(X).sum().backward()
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(PlanError, match="was made for"):
        shrink_(model, HALF, X, optimizer=optimizer, ema=nn.Linear(2, 2))
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(after[i][key], value) for i, state in before.items() for key, value in state.items())
    optimizer.step()


def test_state_that_could_be_rows_or_columns_is_refused() -> None:
    model = mlp(16)
    optimizer = Custom(model)
    optimizer.state[model[2].weight] = {"row": torch.arange(16.0)}
    with pytest.raises(PlanError, match="'row' of shape"):
        shrink_(model, HALF, X, optimizer=optimizer, align=1)
    optimizer.state[model[2].weight] = {"row": torch.ones(32)}
    model = mlp()
    optimizer = Custom(model)
    optimizer.state[model[0].weight] = {"row": torch.arange(32.0), "column": torch.arange(4.0)}
    kept = shrink_(model, HALF, X, optimizer=optimizer).plan.kept["0.weight"]
    assert optimizer.state[model[0].weight]["row"].tolist() == kept[0].tolist()
    assert optimizer.state[model[0].weight]["column"].tolist() == [0, 1, 2, 3]


def test_state_in_lists_is_refused() -> None:
    model = mlp()
    optimizer = Custom(model)
    optimizer.state[model[2].weight] = {"factors": [torch.zeros(32, 32), torch.zeros(32, 32)]}
    with pytest.raises(PlanError, match="'factors'"):
        shrink_(model, HALF, X, optimizer=optimizer)
    assert model[2].weight.shape == (32, 32)


def test_lbfgs_with_state_is_refused() -> None:
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(X).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.raises(PlanError, match="LBFGS"):
        shrink_(model, HALF, X, optimizer=optimizer)


# Other models


class Sizes:
    def __init__(self) -> None:
        self.heads = 4


class Attention(nn.Module):
    """Reads its number of heads from an object."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.inp, self.q, self.k, self.v, self.out = (nn.Linear(a, b) for a, b in ((12, 32), *[(32, 32)] * 3, (32, 5)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        q, k, v = (p(h).unflatten(2, (self.sizes.heads, 8)).transpose(1, 2) for p in (self.q, self.k, self.v))
        mixed = (q @ k.transpose(2, 3) * 8**-0.5).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2).mean(1))


def test_an_object_of_sizes_is_copied_before_it_changes() -> None:
    torch.manual_seed(0)
    sizes = Sizes()
    teacher, student, x = Attention(sizes), Attention(sizes), torch.randn(2, 8, 12)
    before, fresh = teacher(x), copy.deepcopy(student)
    report = shrink_(student, HALF, x, align=1)
    assert [(e.attribute, e.old) for e in report.plan.edits if "." in e.attribute] == [("sizes.heads", 4)]
    assert sizes.heads == 4
    assert student.sizes.heads < 4
    assert torch.equal(teacher(x), before)
    undo = report.plan.apply_(fresh)
    assert torch.equal(fresh(x), student(x))
    undo.revert()
    assert fresh.sizes.heads == 4


class Adapter(nn.Linear):
    """``eval()`` adds the adapter to the weight, and ``train()`` takes it out."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Parameter(torch.randn(4, inputs)), nn.Parameter(torch.randn(outputs, 4))
        self.merged = False

    def train(self, mode: bool = True) -> Adapter:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (self.up @ self.down) * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.merged else y + x @ self.down.t() @ self.up.t()


def test_a_train_method_that_merges_adapters_is_not_called() -> None:
    model = mlp()
    model[2] = Adapter(32, 32)
    before = model[2].weight.clone()
    report = make_plan(model, HALF, X)
    assert torch.equal(model[2].weight, before)
    assert not model[2].merged
    assert {"2.up", "2.down"} <= set(report.plan.kept)


# Inputs and surroundings


def test_inputs_that_prove_nothing_are_refused() -> None:
    for inputs in (torch.zeros(0, 4), torch.full((3, 4), float("nan"))):
        with pytest.raises(GraphError, match="proven"):
            shrink_(mlp(), HALF, inputs)
    with pytest.raises(GraphError, match="list_iterator"):
        shrink_(mlp(), HALF, (iter([X]), X))


def test_any_mapping_is_keyword_inputs() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, *, ids: Tensor) -> Any:
            return self.net(ids)

    assert shrink_(Named(), HALF, UserDict({"ids": X})).proof.equal


def test_surrounding_modes_do_not_matter() -> None:
    plans = []
    for around in (
        torch.no_grad(),
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
        torch.device("meta"),
    ):
        model = mlp()
        with around:
            plans.append(shrink_(model, HALF, X).plan)
        model(X).sum().backward()
    assert len({plan.to_json() for plan in plans}) == 1


class Maps(nn.Module):
    """Convolutions, norms and recurrent layers, whose functions PyTorch computes by other operators."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.steps, self.last = nn.GRU(16, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.conv(x))).flatten(2)
        h = torch.quantile(h, torch.tensor([0.25, 0.75], dtype=h.dtype), dim=-1).permute(1, 0, 2)
        out: Tensor = self.last(self.steps(h)[0][:, -1])
        return out


class Decorated(Maps):
    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_operators_that_only_inference_mode_shows_whole() -> None:
    plans, x = [], torch.randn(2, 3, 6, 6)
    for make, around in ((Maps, torch.no_grad()), (Maps, torch.inference_mode()), (Decorated, torch.enable_grad())):
        model, dense = make(), make()
        with around:
            plans.append(shrink_(model, HALF, x).plan.to_dict() | {"model": ""})
        assert verify(dense, model, x).equal
    assert plans[0] == plans[1] == plans[2]


# The comparison itself


def test_each_output_is_judged_on_its_own_scale() -> None:
    low, nan = torch.finfo(torch.float32).min, float("nan")
    wrong = torch.tensor([low, 1.0]), torch.tensor([low, 1.1])
    assert compare([[wrong[0]]], [[wrong[1]]]) == pytest.approx((0.1, 1.0), rel=1e-5)
    assert compare([[torch.tensor([1e15]), wrong[0]]], [[torch.tensor([1e15]), wrong[1]]])[0] == pytest.approx(0.1)
    rounding = torch.tensor([-1e9, 2.0], dtype=torch.float64)
    difference, scale = compare([[rounding]], [[rounding * (1 + 1e-15)]])
    assert difference <= 1e-10 * scale
    assert compare([[nan]], [[1.0]])[0] == compare([[1.0]], [[nan]])[0] == float("inf")
    assert compare([[torch.tensor([nan])]], [[torch.tensor([1.0])]])[0] == float("inf")
    assert compare([[torch.tensor([nan])]], [[torch.tensor([nan])]]) == (0.0, 0.0)
    assert says_nothing([[torch.tensor([nan, 0.0])], [torch.zeros(0, dtype=torch.int64)]])


# Plans from elsewhere


def document(**changes: Any) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads(make_plan(mlp(), HALF, X).plan.to_json())
    return {**plan, **changes}


def edit(module: str, attribute: str, old: Any, new: Any) -> list[dict[str, Any]]:
    return [{"module": module, "attribute": attribute, "old": old, "new": new}]


def tensor(shape: list[Any], kept: dict[str, Any]) -> dict[str, Any]:
    return {"0.weight": {"shape": shape, "kept": kept}}


UNREADABLE = {
    "a size beyond memory": {"tensors": tensor([10**12, 4], {"0": [[0, 10**12 - 1]]})},
    "an infinite size": {"tensors": tensor([float("inf"), 4], {"0": [[0, 3]]})},
    "a negative dimension": {"tensors": tensor([32, 4], {"-1": [[0, 1]]})},
    "a dimension too many": {"tensors": tensor([32, 4], {"2": [[0, 1]]})},
    "an edit to another kind": {"edits": edit("0", "out_features", 32, [16])},
    "an edit to a flag": {"edits": edit("0", "training", True, False)},
    "an edit to a huge size": {"edits": edit("0", "out_features", 32, 10**12)},
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_plans_are_one_typed_error(name: str) -> None:
    with pytest.raises(PlanError, match="elsewhere"):
        Plan.from_json(json.dumps(document(**UNREADABLE[name])), "elsewhere")


UNFIT = {
    "a flag as a number": edit("0", "training", 1, 0),
    "a class": edit("0", "__class__.__basicsize__", 1, 2),
    "the number of a number": edit("0", "out_features.real", 32, 2),
    "a tensor's own": edit("0", "weight.ndim", 2, 3),
    "read-only": edit("", "weightless", 1, 2),
    "not there": edit("0", "nothing", 1, 2),
}


class ReadOnly(nn.Sequential):
    @property
    def weightless(self) -> int:
        return 1


@pytest.mark.parametrize("name", UNFIT)
def test_plans_that_reach_for_something_else_change_nothing(name: str, tmp_path: Path) -> None:
    model = ReadOnly(*mlp())
    plan = Plan.from_json(json.dumps(document(model=f"{__name__}.ReadOnly", edits=UNFIT[name])))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(PlanError):
        plan.apply_(model)
    after = model.state_dict()
    assert all(torch.equal(after[n], t) for n, t in before.items())
    assert model.training


def test_one_tensor_under_two_names_shrinks_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 4, bias=False)
            self.c = nn.Linear(4, 16)
            self.c.weight = self.a.weight

        def forward(self, x: Tensor) -> Any:
            return self.b(torch.relu(self.a(x)) + self.c(x))

    model = Tied()
    plan = make_plan(model, HALF, X).plan
    kept = {**plan.kept, "c.weight": plan.kept["a.weight"]}
    shapes = {**plan.shapes, "c.weight": plan.shapes["a.weight"]}
    with pytest.raises(PlanError, match="one tensor"):
        Plan(plan.model, shapes, kept, plan.edits).apply_(model)
    assert model.a.weight.shape == (16, 4)


def test_edits_beyond_the_model_are_refused() -> None:
    model = mlp()
    plan = make_plan(model, HALF, X).plan
    with pytest.raises(PlanError, match="does not have"):
        Plan(plan.model, plan.shapes, plan.kept, (Edit("0", "__class__.x", 1, 2),)).apply_(model)
