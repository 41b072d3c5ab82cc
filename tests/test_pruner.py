"""The pruner in a user's loop: exact counts, floors, overrides, schedules, EMA, resuming, refusals."""

import copy
import math
import re
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from secateur.allocate import Global, Layerwise
from secateur.errors import (
    CheckpointError,
    MissingStatsError,
    PatternError,
    RecipeError,
    SecateurError,
    SelectionError,
    TargetError,
    WeightError,
)
from secateur.method import Method, Override
from secateur.patterns import NM, Block, Channel, Unstructured
from secateur.pruner import Pruner, prune_
from secateur.schedules import cubic, iterative, linear, one_shot
from secateur.scores import Magnitude, Random, WeightGradient
from secateur.targets import Target
from secateur.testing import select_k

HALF = Target("sparsity", 0.5)


def mlp(seed: int = 0, sizes: tuple[int, ...] = (6, 10, 8, 3)) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def batch(inputs: int = 6, outputs: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(16, inputs, generator=generator), torch.randn(16, outputs, generator=generator)


def loss_fn(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    dtype = next(model.parameters()).dtype
    return nn.functional.mse_loss(model(data[0].to(dtype)), data[1].to(dtype))


def one_step(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    loss_fn(model, batch()).backward()
    optimizer.step()


def sgd(model: nn.Module) -> SGD:
    return SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01)


def leaks(model: nn.Module, masks: dict[str, Tensor]) -> int:
    known = dict(model.named_parameters(remove_duplicate=False))
    return sum(int(known[name][~mask.to(known[name].device)].count_nonzero()) for name, mask in masks.items())


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.dim() > 1}


# --- exactly what was asked for --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.123, 0.5, 0.9, 0.98])
@pytest.mark.parametrize("score", [Magnitude(), Random(3)], ids=str)
def test_global_is_one_sort_over_all_weights(sparsity: float, score: Magnitude | Random) -> None:
    model = mlp()
    values = score(weights_of(model), {})
    total = sum(v.numel() for v in values.values())
    want = select_k({n: v.flatten().tolist() for n, v in values.items()}, total - round(sparsity * total))
    pruned = prune_(model, Method(target=Target("sparsity", sparsity), score=score))
    assert {n: m.flatten().tolist() for n, m in pruned.masks.items()} == want
    assert leaks(model, pruned.masks) == 0


def test_ties_are_broken_by_name_then_index() -> None:
    model = mlp(sizes=(2, 2, 2))
    for p in model.parameters():
        nn.init.ones_(p)
    masks = prune_(model, Method(target=Target("sparsity", 5 / 8))).masks
    assert masks["0.weight"].tolist() == [[False, False], [False, True]]  # the last one is the floor
    assert masks["2.weight"].tolist() == [[False, False], [True, True]]


@settings(max_examples=60, deadline=None, database=None)
@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=5),
    st.floats(0, 1),
    st.sampled_from([Global(), Layerwise()]),
    st.booleans(),
    st.integers(0, 3),
)
def test_any_shape_any_sparsity(
    sizes: list[int], sparsity: float, allocate: Global | Layerwise, allow_empty: bool, levels: int
) -> None:
    """Exactly round(s·n) weights go, or a typed refusal with the model untouched, whatever the ties."""
    model = mlp(sizes=tuple(sizes))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p * levels).round() if levels else torch.zeros_like(p))
    before = copy.deepcopy(model.state_dict())
    n = sum(w.numel() for w in weights_of(model).values())
    layers = len(sizes) - 1
    method = Method(target=Target("sparsity", sparsity), allocate=allocate, allow_empty=allow_empty)
    if not allow_empty and n - round(sparsity * n) < layers:
        with pytest.raises(TargetError, match="cannot be reached"):
            prune_(model, method)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        return
    pruned = prune_(model, method)
    removed = sum(int((~mask).sum()) for mask in pruned.masks.values())
    assert removed == round(sparsity * n)
    assert leaks(model, pruned.masks) == 0
    if not allow_empty:
        assert all(bool(mask.any()) for mask in pruned.masks.values())
    kept = {k: v for k, v in model.state_dict().items()}
    for name, mask in pruned.masks.items():
        assert torch.equal(kept[name][mask], before[name][mask]), "survivors are untouched"


def test_a_huge_layer_beside_a_single_weight() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 100_000), nn.Linear(100_000, 1))
    with torch.no_grad():
        model[0].weight.zero_()
    for allocate in (Global(), Layerwise()):
        pruned = prune_(copy.deepcopy(model), Method(target=Target("sparsity", 0.999), allocate=allocate))
        assert sum(int(m.sum()) for m in pruned.masks.values()) == 200_001 - round(0.999 * 200_001)
        assert bool(pruned.masks["0.weight"].all()), "the only weight of a layer stays"


def test_all_zero_layers_keep_their_floor() -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight.zero_()
    masks = prune_(model, Method(target=HALF)).masks
    assert int(masks["2.weight"].sum()) == 1
    assert sum(int(m.sum()) for m in masks.values()) == 82


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_and_double_models(dtype: torch.dtype) -> None:
    model = mlp().to(dtype)
    optimizer = sgd(model)
    pruner = Pruner(model, Method(target=Target("sparsity", 0.75)), optimizer=optimizer)
    report = pruner.prune()
    assert report.achieved == report.asked == 0.75
    for _ in range(3):
        one_step(model, optimizer)
        pruner.step()
    assert leaks(model, pruner.masks) == 0


# --- asked and achieved ----------------------------------------------------------------------------------------------


def test_asked_is_the_targets_own_value() -> None:
    """Rounding shows: 0.5 of 3 weights removes 2, and the report must not say that 0.667 was asked for."""
    report = prune_(nn.Linear(3, 1), Method(target=HALF)).report
    assert report.asked == 0.5
    assert report.achieved == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "target",
    [HALF, Target("kept_parameters", 80), Target("compression_ratio", 2.5), Target("macs", 0.4)],
    ids=lambda t: t.kind,
)
@pytest.mark.parametrize("pattern", [Unstructured(), Channel(), Block(2, 2), Block(3, 1)], ids=str)
def test_achieved_is_counted_on_the_masks(target: Target, pattern: Unstructured | Channel | Block) -> None:
    model = mlp()
    dense = sum(p.numel() for p in model.parameters())
    method = Method(target=target, pattern=pattern)
    pruned = prune_(model, method, example_inputs=(torch.zeros(1, 6),))
    gone = sum(int((~m).sum()) for m in pruned.masks.values())
    weights = sum(int((~m).sum()) for name, m in pruned.masks.items() if name.endswith("weight"))
    n = sum(w.numel() for w in weights_of(model).values())
    want = {
        "sparsity": weights / n,
        "kept_parameters": dense - gone,
        "compression_ratio": dense / (dense - gone),
        "macs": (n - weights) / n,  # batch of one: one MAC per weight
    }[target.kind]
    assert pruned.report.achieved == pytest.approx(want)
    assert pruned.report.sparsity == pytest.approx(weights / n)


def test_the_report_counts_every_layer() -> None:
    model = mlp()
    pruned = prune_(model, Method(target=HALF, exclude=("4",)))
    rows = {row.name: row for row in pruned.report.layers}
    assert list(rows) == ["0.weight", "2.weight"]
    for name, row in rows.items():
        mask = pruned.masks[name]
        assert (row.shape, row.total, row.kept) == (tuple(mask.shape), mask.numel(), int(mask.sum()))
        assert row.sparsity == pytest.approx(1 - row.kept / row.total)
    assert pruned.report.skipped == {"4.weight": "excluded by name"}
    assert pruned.report.to_dict()["layers"][0]["shape"] == [10, 6]


@pytest.mark.parametrize("value", [0.1, 0.25, 1 / 3, 0.37, 0.5, 0.77])
@pytest.mark.parametrize("allocate", [Global(), Layerwise()], ids=str)
def test_macs_are_never_more_than_asked(value: float, allocate: Global | Layerwise) -> None:
    report = prune_(
        mlp(), Method(target=Target("macs", value), allocate=allocate), example_inputs=(torch.zeros(1, 6),)
    ).report
    assert report.achieved <= value + 1e-12
    assert report.achieved > value - 1 / 164 - 1e-12, "and no whole weight less"


def test_macs_of_a_layer_that_the_forward_never_runs() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)
            nn.init.zeros_(self.spare.weight)
            nn.init.zeros_(self.used.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    method = Method(target=Target("macs", 0.5))
    report = prune_(Spare(), method, example_inputs=(torch.zeros(1, 4),)).report
    assert report.achieved == 0.5


@pytest.mark.parametrize("same_object", [True, False])
def test_tied_weights_count_once(same_object: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight if same_object else nn.Parameter(model[0].weight.data)
    optimizer = sgd(model)
    pruner = Pruner(model, Method(target=Target("kept_parameters", 4)), optimizer=optimizer)
    assert pruner.facts.parameters == 16
    assert pruner.prune().achieved == 4
    x = torch.randn(3, 4)
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.step()
    assert int(model[0].weight.count_nonzero()) == 4
    assert torch.equal(model[0].weight, model[2].weight)


# --- floors and limits -----------------------------------------------------------------------------------------------

LIMIT = re.compile(r"allow is ([0-9.e+-]+?)\.? Ask")


@pytest.mark.parametrize("pattern", [Unstructured(), Channel()], ids=str)
@pytest.mark.parametrize("allocate", [Global(), Layerwise()], ids=str)
@pytest.mark.parametrize(
    ("kind", "value"), [("sparsity", 1.0), ("kept_parameters", 22), ("compression_ratio", 8.0), ("macs", 1e-9)]
)
def test_the_limit_in_the_message_can_be_asked_for(
    pattern: Unstructured | Channel, allocate: Global | Layerwise, kind: str, value: float
) -> None:
    """A model of 185 parameters, 164 of them prunable; one unit of each of three layers must stay."""
    inputs = (torch.zeros(1, 6),)
    model = mlp()
    with pytest.raises(TargetError, match=f"{kind}.*cannot be reached") as refusal:
        prune_(model, Method(target=Target(kind, value), pattern=pattern, allocate=allocate), example_inputs=inputs)
    found = LIMIT.search(str(refusal.value))
    assert found
    limit = Target(kind, float(found.group(1)))
    pruned = prune_(model, Method(target=limit, pattern=pattern, allocate=allocate), example_inputs=inputs)
    units = {n: m.any(1) if isinstance(pattern, Channel) else m for n, m in pruned.masks.items() if m.dim() > 1}
    assert [int(u.sum()) for u in units.values()] == [1, 1, 1]


@pytest.mark.parametrize("kept", [1, 2, 3, 4])
@pytest.mark.parametrize("allocate", [Global(), Layerwise()], ids=str)
def test_blocks_of_unequal_size_neither_empty_a_layer_nor_exceed_the_target(
    kept: int, allocate: Global | Layerwise
) -> None:
    """A 4-block and an edge block of 1: what the one unit that must stay costs is not the mean, 2.5."""
    model = nn.Linear(1, 5, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[5.0], [5.0], [5.0], [5.0], [1.0]]))
    method = Method(target=Target("kept_parameters", kept), pattern=Block(4, 1), allocate=allocate)
    try:
        report = prune_(model, method).report
    except TargetError:
        assert kept < 4, "keeping the block of 4 is possible"
        return
    assert 0 < report.achieved <= kept


def test_float_noise_does_not_empty_a_layer() -> None:
    """The budget of a MACs target may fall a rounding error below the cost of the floors."""
    from secateur.targets import ModelFacts

    for other in range(1, 200):
        facts = ModelFacts({"a": 9, "b": 5}, 14, {"a": 9 * 784, "b": 5 * 49}, other)
        target = Target("macs", Target("macs", 0.5).measure(facts, 784 + 49))
        budget = target.budget(facts)
        from secateur.method import make_masks
        from secateur.types import Weight

        weights = {"a": Weight("a", (3, 3)), "b": Weight("b", (1, 5))}
        values = {name: torch.arange(1.0, w.numel + 1).view(w.shape) for name, w in weights.items()}
        masks = make_masks(weights, values, Method(target=target), budget, kept=budget.kept)
        assert [int(m.sum()) for m in masks.values()] == [1, 1]


def test_allow_empty() -> None:
    pruned = prune_(mlp(), Method(target=Target("sparsity", 1.0), allow_empty=True))
    assert not any(bool(m.any()) for m in pruned.masks.values())


def test_an_unreachable_target_is_refused_before_training() -> None:
    """Not at the last of a hundred updates, days later: floors are known when the pruner is built."""
    schedule = cubic(begin=1, end=100)
    with pytest.raises(TargetError, match="cannot be reached"):
        Pruner(mlp(), Method(target=Target("sparsity", 1.0), schedule=schedule))


# --- overrides -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocate", [Global(), Layerwise()], ids=str)
def test_overrides_are_made_up_for(allocate: Global | Layerwise) -> None:
    overrides = (Override("0", 0.1), Override("4.*", 0.25))
    report = prune_(mlp(), Method(target=HALF, allocate=allocate, overrides=overrides)).report
    rows = {row.name: row for row in report.layers}
    assert rows["0.weight"].kept == 60 - 6
    assert rows["4.weight"].kept == 24 - 6
    assert report.achieved == report.asked == 0.5
    assert rows["2.weight"].kept == 82 - 54 - 18


def test_the_last_matching_override_wins() -> None:
    overrides = (Override("*", 0.5), Override("0", 0.0))
    report = prune_(mlp(), Method(target=Target("sparsity", 52 / 164), overrides=overrides)).report
    assert [row.kept for row in report.layers] == [60, 40, 12]


def test_overrides_grow_with_the_schedule() -> None:
    method = Method(target=HALF, schedule=linear(begin=0, end=4, unit="rounds"), overrides=(Override("2", 0.8),))
    pruner = Pruner(mlp(), method)
    kept = []
    while not pruner.finished:
        report = pruner.prune()
        assert report.achieved == report.asked
        kept.append(next(row.kept for row in report.layers if row.name == "2.weight"))
    assert kept == [80, 64, 48, 32, 16]


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ((Override("zzz", 0.5),), WeightError, "'zzz' matches no prunable weight"),
        ((Override("*", 0.9),), TargetError, "overrides remove more than the target"),
        ((Override("*", 0.1),), TargetError, "cannot be reached"),
        ((Override("2", 1.0), Override("0", 1.0)), TargetError, "overrides remove more"),
    ],
)
def test_overrides_that_contradict_the_target(
    overrides: tuple[Override, ...], error: type[SecateurError], message: str
) -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        prune_(model, Method(target=HALF, overrides=overrides))
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, math.nan])
def test_override_values(sparsity: float) -> None:
    with pytest.raises(TargetError, match="'fc'"):
        Override("fc", sparsity)


# --- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocate", [Global(), Layerwise()], ids=str)
@pytest.mark.parametrize("score", [Magnitude(), Random(1), WeightGradient("descent")], ids=str)
def test_pruned_stays_pruned_and_every_update_is_exact(allocate: Global | Layerwise, score: Magnitude) -> None:
    model = mlp()
    optimizer = sgd(model)
    method = Method(target=Target("sparsity", 0.9), score=score, allocate=allocate, schedule=cubic(begin=1, end=12))
    pruner = Pruner(model, method, optimizer=optimizer, loss_fn=loss_fn, batches=[batch()])
    gone: dict[str, Tensor] = {}
    updates = []
    for step in range(1, 16):
        one_step(model, optimizer)
        report = pruner.step()
        if report is not None:
            updates.append(step)
            assert report.achieved == report.asked, f"update at step {step}"
            assert all(not bool((pruner.masks[n] & was).any()) for n, was in gone.items()), "a pruned weight came back"
            gone = {n: ~m for n, m in pruner.masks.items()}
        assert leaks(model, pruner.masks) == 0
    assert updates == list(range(1, 13))
    assert pruner.finished
    assert pruner.sparsity == pytest.approx(round(0.9 * 164) / 164)
    assert [r.asked for r in pruner.history] == sorted(r.asked for r in pruner.history)


def test_layerwise_rounding_does_not_lose_weights_on_the_way() -> None:
    """Layers of 6, 6 and 2: at 11 kept the shares round to (5, 5, 1), at 10 to (4, 4, 2) (the Alabama paradox)."""
    model = nn.ModuleList([nn.Linear(n, 1, bias=False) for n in (6, 6, 2)])
    schedule = linear(begin=1, end=2, initial=3 / 14, unit="rounds")
    pruner = Pruner(model, Method(target=Target("sparsity", 4 / 14), allocate=Layerwise(), schedule=schedule))
    kept = [sum(row.kept for row in pruner.prune().layers) for _ in range(2)]
    assert kept == [11, 10]


@settings(max_examples=40, deadline=None, database=None)
@given(st.lists(st.integers(1, 12), min_size=2, max_size=5), st.integers(2, 8), st.floats(0.05, 0.8))
def test_layerwise_updates_are_exact_for_any_sizes(sizes: list[int], updates: int, sparsity: float) -> None:
    model = nn.ModuleList([nn.Linear(n, 1, bias=False) for n in sizes])
    total = sum(sizes)
    if total - round(sparsity * total) < len(sizes):
        return
    method = Method(target=Target("sparsity", sparsity), allocate=Layerwise(), schedule=iterative(rounds=updates))
    pruner = Pruner(model, method)
    while not pruner.finished:
        report = pruner.prune()
        level = method.schedule.level(len(pruner.history) - 1, round(sparsity * total) / total)
        assert sum(row.total - row.kept for row in report.layers) == round(level * total)


def test_one_shot_at_a_step() -> None:
    model = mlp()
    optimizer = sgd(model)
    pruner = Pruner(model, Method(target=HALF, schedule=one_shot(at=3, unit="steps")), optimizer=optimizer)
    reports = []
    for _ in range(5):
        one_step(model, optimizer)
        reports.append(pruner.step() is not None)
    assert reports == [False, False, True, False, False]


def test_epochs() -> None:
    schedule = linear(begin=1, end=2, every=0.5, unit="epochs")
    with pytest.raises(TargetError, match="steps_per_epoch"):
        Pruner(mlp(), Method(target=HALF, schedule=schedule))
    pruner = Pruner(mlp(), Method(target=HALF, schedule=schedule), steps_per_epoch=4)
    assert [step for step in range(1, 12) if pruner.step() is not None] == [4, 6, 8]


def test_rounds_are_called_by_hand() -> None:
    pruner = Pruner(mlp(), Method(target=Target("sparsity", 0.75), schedule=iterative(rounds=2)))
    assert pruner.step() is None
    assert [pruner.prune().achieved for _ in range(2)] == [0.5, 0.75]
    with pytest.raises(TargetError, match="2 updates are done"):
        pruner.prune()


def test_final_skips_to_the_end() -> None:
    pruner = Pruner(mlp(), Method(target=Target("sparsity", 0.75), schedule=iterative(rounds=5)))
    assert pruner.prune(final=True).achieved == 0.75
    assert pruner.finished


def test_a_refused_update_changes_nothing() -> None:
    model = mlp()
    pruner = Pruner(model, Method(target=Target("sparsity", 0.75), schedule=iterative(rounds=4)))
    pruner.prune()
    before, state = copy.deepcopy(model.state_dict()), pruner.state_dict()
    with torch.no_grad():
        model[2].weight[3, 3] = torch.nan
    with pytest.raises(WeightError, match=r"2\.weight: 1 of 80"):
        pruner.prune(final=True)
    after = pruner.state_dict()
    assert {k: v for k, v in after.items() if k != "masks"} == {k: v for k, v in state.items() if k != "masks"}
    assert all(torch.equal(m, state["masks"][n]) for n, m in after["masks"].items())
    with torch.no_grad():
        model[2].weight[3, 3] = before["2.weight"][3, 3]
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


# --- in the loop -----------------------------------------------------------------------------------------------------


def test_nothing_about_the_model_changes_but_zeros() -> None:
    model = mlp()
    keys, modules = list(model.state_dict()), [type(m) for m in model.modules()]
    optimizer = sgd(model)
    pruner = Pruner(model, Method(target=HALF), optimizer=optimizer)
    pruner.prune()
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == modules
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    clone = copy.deepcopy(model)
    one_step(clone, sgd(clone))
    assert leaks(clone, pruner.masks) > 0, "a copy is the user's own"
    one_step(model, optimizer)
    assert leaks(model, pruner.masks) == 0


def test_momentum_is_cleared_where_the_mask_tightens() -> None:
    model = mlp()
    optimizer = AdamW(model.parameters(), 0.01)
    pruner = Pruner(model, Method(target=HALF, schedule=linear(begin=3, end=6)), optimizer=optimizer)
    for _ in range(6):
        one_step(model, optimizer)
        if pruner.step() is None:
            continue
        for name, mask in pruner.masks.items():
            state = optimizer.state[model.get_parameter(name)]
            for key in ("exp_avg", "exp_avg_sq"):
                assert int(state[key][~mask].count_nonzero()) == 0
                assert bool(state[key][mask].any())


def test_without_an_optimizer_step_applies_the_masks() -> None:
    model = mlp()
    pruner = Pruner(model, Method(target=HALF))
    pruner.prune()
    optimizer = sgd(model)
    one_step(model, optimizer)
    assert leaks(model, pruner.masks) > 0
    pruner.step()
    assert leaks(model, pruner.masks) == 0


def test_a_second_optimizer_that_is_not_attached_does_not_regrow_weights() -> None:
    model = mlp()
    body, head = SGD(model[0].parameters(), 0.1), SGD([*model[2].parameters(), *model[4].parameters()], 0.1)
    pruner = Pruner(model, Method(target=HALF), optimizer=body)
    pruner.prune()
    loss_fn(model, batch()).backward()
    body.step()
    head.step()
    pruner.step()
    assert leaks(model, pruner.masks) == 0


def test_attach_twice_and_detach() -> None:
    model = mlp()
    optimizer = sgd(model)
    pruner = Pruner(model, Method(target=HALF), optimizer=optimizer)
    pruner.attach(optimizer)
    pruner.prune()
    pruner.detach()
    one_step(model, optimizer)
    assert leaks(model, pruner.masks) > 0


def test_prune_leaves_no_hook_behind() -> None:
    model = mlp()
    optimizer = sgd(model)
    one_step(model, optimizer)
    pruned = prune_(model, Method(target=HALF), optimizer=optimizer)
    momentum = optimizer.state[model[0].weight]["momentum_buffer"]
    assert int(momentum[~pruned.masks["0.weight"]].count_nonzero()) == 0
    one_step(model, optimizer)
    assert leaks(model, pruned.masks) > 0


def test_an_optimizer_of_another_model_is_refused() -> None:
    with pytest.raises(WeightError, match="none of this model's prunable weights"):
        Pruner(mlp(), Method(target=HALF), optimizer=sgd(mlp()))


def test_parameters_that_were_replaced_are_masked_through_their_names() -> None:
    """Loading with assign=True makes new Parameters; the optimizer is then built anew and attached."""
    model = mlp()
    pruner = Pruner(model, Method(target=HALF))
    pruner.prune()
    model.load_state_dict({name: torch.ones_like(v) for name, v in model.state_dict().items()}, assign=True)
    optimizer = sgd(model)
    pruner.attach(optimizer)
    one_step(model, optimizer)
    assert leaks(model, pruner.masks) == 0


def test_two_pruners_share_an_optimizer() -> None:
    model = mlp()
    optimizer = sgd(model)
    first = Pruner(model, Method(target=HALF, include=("0",)), optimizer=optimizer)
    second = Pruner(model, Method(target=Target("sparsity", 0.75), exclude=("0",)), optimizer=optimizer)
    for _ in range(3):
        one_step(model, optimizer)
        for pruner in (first, second):
            if not pruner.finished:
                pruner.prune()
            pruner.step()
    assert not first.masks.keys() & second.masks.keys()
    assert leaks(model, {**first.masks, **second.masks}) == 0
    assert (first.sparsity, second.sparsity) == (0.5, 0.75)


@pytest.mark.parametrize("use_ema_of_torch", [True, False])
def test_ema_stays_masked(use_ema_of_torch: bool) -> None:
    model = mlp()
    optimizer = sgd(model)
    ema: nn.Module = copy.deepcopy(model)
    if use_ema_of_torch:
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    method = Method(target=Target("sparsity", 0.8), schedule=cubic(begin=2, end=8, every=3))
    pruner = Pruner(model, method, optimizer=optimizer, ema=ema)
    for _ in range(12):
        one_step(model, optimizer)
        if isinstance(ema, AveragedModel):
            ema.update_parameters(model)
        else:
            with torch.no_grad():
                for average, p in zip(ema.parameters(), model.parameters(), strict=True):
                    average.lerp_(p, 0.1)
        pruner.step()
        inner = ema.module if isinstance(ema, AveragedModel) else ema
        assert leaks(inner, pruner.masks) == 0
    assert pruner.finished
    assert not torch.equal(inner[0].weight, model[0].weight)


def test_an_ema_of_another_shape_is_refused() -> None:
    with pytest.raises(WeightError, match="mask of shape"):
        Pruner(mlp(), Method(target=HALF), ema=mlp(sizes=(6, 10, 9, 3)))


def test_a_compiled_model_keeps_its_names() -> None:
    inner = mlp()
    model = torch.compile(inner, backend="eager")
    optimizer = sgd(model)
    pruner = Pruner(model, Method(target=HALF), optimizer=optimizer)
    pruner.prune()
    assert list(pruner.masks) == ["0.weight", "2.weight", "4.weight"]
    one_step(model, optimizer)
    assert leaks(inner, pruner.masks) == 0
    assert "0.weight" in inner.state_dict()


def test_channel_masks_biases_too_and_they_stay_zero() -> None:
    model = mlp()
    optimizer = sgd(model)
    pruner = Pruner(model, Method(target=HALF, pattern=Channel(), allocate=Layerwise()), optimizer=optimizer)
    pruner.prune()
    assert set(pruner.masks) == {f"{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    for i in (0, 2, 4):
        assert torch.equal(pruner.masks[f"{i}.weight"].any(1), pruner.masks[f"{i}.bias"])
        assert torch.equal(pruner.masks[f"{i}.weight"].all(1), pruner.masks[f"{i}.bias"])
    for _ in range(5):
        one_step(model, optimizer)
        assert leaks(model, pruner.masks) == 0


def test_a_bias_that_two_layers_share_lives_while_either_unit_does() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].bias = model[0].bias
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[9.0, 9.0], [1.0, 1.0]]))
        model[1].weight.copy_(torch.tensor([[1.0, 1.0], [9.0, 9.0]]))
        model[0].bias.fill_(1.0)
    try:
        prune_(model, Method(target=HALF, pattern=Channel()))
    except SecateurError:
        return  # refusing is fine; clearing the bias of a unit that stays is not
    assert model[0].bias.tolist() == [1.0, 1.0]


# --- resuming --------------------------------------------------------------------------------------------------------


def optimizers() -> Iterator[tuple[str, object]]:
    yield "SGD", lambda ps: SGD(ps, 0.1, momentum=0.9)
    yield "AdamW", lambda ps: AdamW(ps, 0.01)
    yield "Muon", lambda ps: torch.optim.Muon(ps, 0.02)  # mixes all of a momentum's entries, masked ones included


@pytest.mark.parametrize("make", [m for _, m in optimizers()], ids=[n for n, _ in optimizers()])
@pytest.mark.parametrize("stop", [0, 4, 5, 9, 15])
def test_resuming_is_bit_for_bit(make, stop: int) -> None:
    method = Method(target=Target("sparsity", 0.8), schedule=cubic(begin=2, end=14, every=3), score=Magnitude())

    def build() -> tuple[nn.Module, Optimizer, Pruner]:
        model = nn.Sequential(*[m for m in mlp() if not isinstance(m, nn.Linear)])
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Linear(6, 10, bias=False),
            nn.Tanh(),
            nn.Linear(10, 8, bias=False),
            nn.Tanh(),
            nn.Linear(8, 3, bias=False),
        )
        optimizer = make(model.parameters())
        return model, optimizer, Pruner(model, method, optimizer=optimizer)

    model, optimizer, pruner = build()
    saved = None
    for step in range(20):
        if step == stop:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), pruner.state_dict()))
        one_step(model, optimizer)
        pruner.step()

    resumed, optimizer2, pruner2 = build()
    resumed.load_state_dict(saved[0])
    optimizer2.load_state_dict(saved[1])
    pruner2.load_state_dict(saved[2])
    assert leaks(resumed, pruner2.masks) == 0
    for _ in range(20 - stop):
        one_step(resumed, optimizer2)
        pruner2.step()
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in resumed.state_dict().items())
    assert all(torch.equal(m, pruner.masks[n]) for n, m in pruner2.masks.items())
    one, two = optimizer.state_dict()["state"], optimizer2.state_dict()["state"]
    for index, entries in one.items():
        for key, value in entries.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(two[index][key])), f"optimizer state {key}"


def test_state_is_plain_and_independent() -> None:
    pruner = Pruner(mlp(), Method(target=Target("sparsity", 0.75), schedule=iterative(rounds=2)))
    pruner.prune()
    state = pruner.state_dict()
    assert all(isinstance(v, int | float | dict) for v in state.values())
    assert all(isinstance(m, Tensor) and m.dtype == torch.bool for m in state["masks"].values())
    kept = {n: m.clone() for n, m in state["masks"].items()}
    pruner.prune()
    assert all(torch.equal(m, kept[n]) for n, m in state["masks"].items())
    other = Pruner(mlp(), pruner.method)
    other.load_state_dict(state)
    state["masks"]["0.weight"].zero_()
    assert bool(other.masks["0.weight"].any())


def test_loading_zeroes_a_model_that_was_saved_dense() -> None:
    method = Method(target=HALF)
    pruner = Pruner(mlp(), method)
    pruner.prune()
    model = mlp(seed=1)
    Pruner(model, method).load_state_dict(pruner.state_dict())
    assert leaks(model, pruner.masks) == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"version": 99}, CheckpointError, "99"),
        ({"masks": None}, CheckpointError, "masks"),
        ({"steps": None}, CheckpointError, "steps"),
        ({"updates": -3}, CheckpointError, "updates"),
        ({"updates": 99}, CheckpointError, "updates"),
        ({"masks": {"0.weight": torch.ones(10, 6, dtype=torch.bool)}}, CheckpointError, "no mask for .*2.weight"),
        ({"masks": {"x": torch.ones(1, dtype=torch.bool)}}, WeightError, "'x'"),
        ({"masks": {"0.weight": torch.ones(6, 10, dtype=torch.bool)}}, WeightError, r"\(6, 10\)"),
    ],
    ids=str,
)
def test_states_that_do_not_fit(change: dict[str, object], error: type[SecateurError], message: str) -> None:
    model = mlp()
    pruner = Pruner(model, Method(target=HALF))
    pruner.prune()
    state = pruner.state_dict() | change
    state = {key: value for key, value in state.items() if value is not None}
    fresh = Pruner(mlp(), Method(target=HALF))
    with pytest.raises(error, match=message):
        fresh.load_state_dict(state)
    assert fresh.masks == {}
    assert not fresh.finished


def test_a_state_of_wider_filters_is_refused() -> None:
    """Its masks would prune a layer that this recipe excludes."""
    everything = Pruner(mlp(), Method(target=HALF))
    everything.prune()
    model = mlp()
    narrow = Pruner(model, Method(target=HALF, exclude=("4",)))
    with pytest.raises(CheckpointError, match=r"4\.weight|filters"):
        narrow.load_state_dict(everything.state_dict())
    assert int(model[4].weight.count_nonzero()) == 24


# --- scores that need data -------------------------------------------------------------------------------------------


def test_gradient_scores_need_a_loss_and_batches() -> None:
    method = Method(target=HALF, score=WeightGradient())
    for arguments in ({}, {"loss_fn": loss_fn}, {"batches": [batch()]}):
        with pytest.raises(MissingStatsError, match="loss_fn"):
            Pruner(mlp(), method, **arguments)


def test_unknown_statistics_are_refused() -> None:
    class Wants:
        needs = frozenset({"hessian"})

        def __call__(self, weights: dict[str, Tensor], stats: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
            return {}

    with pytest.raises(MissingStatsError, match="hessian"):
        Pruner(mlp(), Method(target=HALF, score=Wants()))


@pytest.mark.parametrize("as_function", [True, False])
def test_batches_may_be_a_list_or_a_function(as_function: bool) -> None:
    data = [batch()]
    pruner = Pruner(
        mlp(),
        Method(target=HALF, score=WeightGradient(), schedule=iterative(rounds=2)),
        loss_fn=loss_fn,
        batches=(lambda: iter(data)) if as_function else data,
    )
    pruner.prune()
    assert pruner.prune().achieved == 0.5


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite(bad: float) -> None:
    model = mlp()
    with torch.no_grad():
        model[4].weight[0, :2] = bad
    with pytest.raises(WeightError, match=r"4\.weight: 2 of 24"):
        prune_(model, Method(target=HALF))


def test_a_score_of_the_wrong_shape_or_not_finite() -> None:
    class Bad:
        needs: frozenset[str] = frozenset()

        def __init__(self, function: object) -> None:
            self.function = function

        def __call__(self, weights: dict[str, Tensor], stats: object) -> dict[str, Tensor]:
            return {name: self.function(w) for name, w in weights.items() if self.function(w) is not None}

    for function, message in (
        (lambda w: w.abs().t(), r"0\.weight: .*\(6, 10\).*\(10, 6\)"),
        (lambda w: None, r"0\.weight: .*nothing"),
        (lambda w: w * torch.nan, r"0\.weight: 60 of 60 scores"),
        (lambda w: w.abs() / 0, r"0\.weight: .*infinite"),
    ):
        with pytest.raises(SelectionError, match=message):
            prune_(mlp(), Method(target=HALF, score=Bad(function)))


# --- methods that contradict themselves ------------------------------------------------------------------------------


def test_nm_prunes_exactly_its_density() -> None:
    model = mlp(sizes=(8, 12, 4))
    report = prune_(model, Method(pattern=NM(1, 4))).report
    assert report.achieved == report.asked == 0.75
    assert all((row != 0).sum() == 2 for row in model[0].weight.detach())


def test_nm_that_does_not_fit_is_refused_before_anything_changes() -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PatternError, match=r"0\.weight: 2:4.*multiple of 4, got 6"):
        prune_(model, Method(pattern=NM(2, 4)))
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert prune_(model, Method(pattern=NM(2, 4), include=("4",))).report.achieved == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "prune.target is missing"),
        ({"pattern": NM(2, 4), "allocate": Global()}, r"NM\(n=2, m=4\).*Global"),
        ({"pattern": NM(2, 4), "overrides": (Override("*", 0.5),)}, "overrides"),
        ({"pattern": NM(2, 4), "schedule": iterative(rounds=2)}, "schedule of 2 updates"),
        ({"pattern": NM(2, 4), "target": Target("sparsity", 0.6)}, "always has sparsity 0.5"),
        ({"pattern": NM(2, 4), "target": Target("kept_parameters", 10)}, "kept_parameters"),
        ({"target": HALF, "when": "during"}, "'during' and a schedule in 'rounds'"),
        ({"target": HALF, "when": "sometime"}, "sometime"),
    ],
    ids=str,
)
def test_parts_that_exclude_each_other(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Method(**arguments)


def test_defaults_follow_the_pattern() -> None:
    assert Method(target=HALF).allocate == Global()
    assert Method(pattern=NM()).allocate == Layerwise()
    assert Method(pattern=NM()).goal == HALF
