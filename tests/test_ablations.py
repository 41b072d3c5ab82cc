"""Ablations: what they take away, and that they take nothing else."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.swa_utils import AveragedModel

from secateur import Method, Pruner, Target, load_pruned, make_plan, prune_, shrink_
from secateur.ablations import (
    ABLATIONS,
    RandomMasks,
    Reinitialise,
    Shuffle,
    SmallerDense,
    reinitialise_,
    smaller_dense,
)
from secateur.checkpoint import load_tree
from secateur.errors import RecipeError, SecateurError, TargetError, UnknownNameError, WeightError
from secateur.metrics import count_macs
from secateur.patterns import NM, Block, Channel, Unstructured
from secateur.pipeline.run import run
from secateur.recipe import from_dict
from secateur.report.words import method_words
from secateur.schedules import cubic, iterative
from secateur.types import Weight
from tests.pipeline.test_resume import BASE, COUPLED, GRADUAL, ITERATIVE, assert_same, in_child
from tests.pipeline.tiny import net


def lenet(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 4))


def counts(masks: dict[str, Tensor]) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in masks.items()}


MASK_ABLATIONS = [Shuffle, RandomMasks]


@pytest.mark.parametrize("ablation", MASK_ABLATIONS)
@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), Block(3, 5), Channel()], ids=str)
def test_the_same_number_in_every_layer_elsewhere(pattern: Any, ablation: Any) -> None:
    target = None if pattern.density else Target("sparsity", 0.6)
    own = prune_(lenet(), Method(target=target, pattern=pattern)).masks
    moved = prune_(lenet(), Method(target=target, pattern=pattern, ablate=ablation(seed=1)))
    assert counts(moved.masks) == counts(own)
    assert any(not torch.equal(moved.masks[name], own[name]) for name in own)
    assert moved.report.ablation == str(ablation(seed=1))
    assert moved.report.to_dict()["ablation"]
    again = prune_(lenet(), Method(target=target, pattern=pattern, ablate=ablation(seed=1))).masks
    other = prune_(lenet(), Method(target=target, pattern=pattern, ablate=ablation(seed=2))).masks
    assert all(torch.equal(moved.masks[name], again[name]) for name in own)
    assert any(not torch.equal(moved.masks[name], other[name]) for name in own)


@pytest.mark.parametrize("ablation", MASK_ABLATIONS)
def test_every_arrangement_is_as_likely_as_every_other(ablation: Any) -> None:
    """Chi-squared over all 20 masks of 3 in 6, and over all 36 pairs of groups for 2:4."""
    weight = Weight("w", (2, 3))
    own = {"w": torch.tensor([[True, True, True], [False, False, False]])}
    seeds = 4000
    seen: Counter[tuple[bool, ...]] = Counter()
    for seed in range(seeds):
        made = ablation(seed=seed).masks({"w": weight}, Unstructured(), own, None)["w"]
        seen[tuple(made.flatten().tolist())] += 1
    assert len(seen) == 20
    assert chi_squared(seen, 20, seeds) < 43.8  # 0.1 % of draws of 19 degrees of freedom lie above
    grouped = Weight("w", (1, 8))
    own = {"w": torch.tensor([[True, True, False, False, True, True, False, False]])}
    pairs: Counter[tuple[bool, ...]] = Counter()
    for seed in range(seeds):
        made = ablation(seed=seed).masks({"w": grouped}, NM(2, 4), own, None)["w"]
        pairs[tuple(made.flatten().tolist())] += 1
    assert len(pairs) == 36
    assert chi_squared(pairs, 36, seeds) < 66.6  # 35 degrees of freedom


def chi_squared(seen: Counter[Any], cells: int, draws: int) -> float:
    expected = draws / cells
    return sum((count - expected) ** 2 / expected for count in seen.values())


@pytest.mark.parametrize("ablation", MASK_ABLATIONS)
def test_rounds_only_ever_remove(ablation: Any) -> None:
    method = Method(target=Target("sparsity", 0.8), schedule=iterative(rounds=4), ablate=ablation(seed=3))
    pruner = Pruner(lenet(), method)
    rounds = []
    while not pruner.finished:
        pruner.prune()
        rounds.append({name: mask.clone() for name, mask in pruner.masks.items()})
    for before, after in itertools.pairwise(rounds):
        assert all(not bool((after[name] & ~before[name]).any()) for name in after)
    assert pruner.report().achieved == pytest.approx(0.8, abs=1e-3)


def test_layers_and_rounds_are_shuffled_apart() -> None:
    """Two layers of one shape and one mask, and two rounds, do not get one permutation."""
    weights = {name: Weight(name, (8, 8)) for name in ("a", "b")}
    mask = torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    made = Shuffle().masks(weights, Unstructured(), {"a": mask, "b": mask}, None)
    assert not torch.equal(made["a"], made["b"])


def test_a_channel_takes_its_bias_along() -> None:
    model = lenet()
    masks = prune_(model, Method(target=Target("sparsity", 0.5), pattern=Channel(), ablate=Shuffle(seed=5))).masks
    for layer in ("0", "2", "4"):
        assert torch.equal(masks[f"{layer}.bias"], masks[f"{layer}.weight"].any(1))
        assert torch.equal(masks[f"{layer}.weight"].all(1), masks[f"{layer}.weight"].any(1))


def test_reinitialised_is_what_the_constructor_draws() -> None:
    """Bit for bit, module by module, attention and norms included, whatever was there before; and the masks stay."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.body = nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.GRU(8, 5), nn.LayerNorm(5))
            self.table = nn.Embedding(7, 8)
            self.head = nn.Bilinear(5, 8, 2)

    torch.manual_seed(11)
    model = Mixed()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
        model.body[1].running_mean.add_(3.0)
    mask = torch.rand(24, 8) < 0.5
    torch.manual_seed(99)
    state = torch.get_rng_state()
    reinitialise_(model, seed=12, masks={"attention.in_proj_weight": mask})
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12)
    fresh = Mixed().state_dict()
    fresh["attention.in_proj_weight"] = fresh["attention.in_proj_weight"] * mask
    assert all(torch.equal(value, fresh[name]) for name, value in model.state_dict().items())


def test_modules_without_a_reset_are_named_and_nothing_changes() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.full((4,), 2.0))

    model = nn.Sequential(nn.Linear(4, 4), Scale())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(WeightError, match=r"1 \(Scale\)"):
        reinitialise_(model, seed=0)
    with pytest.raises(WeightError, match=r"1 \(Scale\)"):
        prune_(nn.Sequential(nn.Linear(4, 4), Scale()), Method(target=Target("sparsity", 0.5), ablate=Reinitialise()))
    with pytest.raises(WeightError, match="mask of shape"):
        reinitialise_(nn.Linear(4, 4), seed=0, masks={"weight": torch.ones(1, dtype=torch.bool)})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_survivors_start_anew_after_the_last_round_only() -> None:
    model = lenet(1)
    optimizer = Adam(model.parameters(), 0.01)
    average = AveragedModel(model)
    method = Method(target=Target("sparsity", 0.75), schedule=iterative(rounds=2), ablate=Reinitialise(seed=4))
    pruner = Pruner(model, method, optimizer=optimizer, ema=average)
    plain = Pruner(lenet(1), Method(target=Target("sparsity", 0.75), schedule=iterative(rounds=2)))
    model(torch.ones(2, 16)).sum().backward()
    optimizer.step()
    trained = model[0].weight.detach().clone()
    plain.model.load_state_dict(model.state_dict())
    pruner.prune()
    plain.prune()
    assert torch.equal(model[0].weight, trained * pruner.masks["0.weight"])
    assert optimizer.state
    pruner.prune()
    plain.prune()
    assert all(torch.equal(pruner.masks[name], plain.masks[name]) for name in plain.masks)  # the method's own
    fresh = lenet(4)
    for name, p in model.named_parameters():
        expected = fresh.get_parameter(name)
        assert torch.equal(p, expected * pruner.masks[name] if name in pruner.masks else expected)
        assert torch.equal(p, average.module.get_parameter(name))
    assert not optimizer.state
    assert not torch.equal(model[0].weight, trained * pruner.masks["0.weight"])


PRUNED: dict[str, float] = {"half": 0.5, "a tenth": 0.9}


@pytest.mark.parametrize("sparsity", PRUNED.values(), ids=PRUNED)
def test_the_smaller_network_has_the_size_of_the_masked_one(sparsity: float) -> None:
    model, inputs = lenet(), torch.randn(4, 16)
    masks = prune_(model, Target("sparsity", sparsity)).masks
    before = {name: value.clone() for name, value in model.state_dict().items()}
    left = sum(p.numel() for p in model.parameters()) - sum(int((~m).sum()) for m in masks.values())
    small = smaller_dense(model, masks, inputs, seed=6)
    size = sum(p.numel() for p in small.parameters())
    step = max(16 + 1 + 12, 24 + 1 + 4)  # one unit of either hidden layer, in the widest network there is
    assert left - step < size <= left
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    widths = small[0].out_features / 24, small[2].out_features / 12
    assert abs(widths[0] - widths[1]) <= 1 / 12  # by one factor
    torch.manual_seed(6)
    a, b = small[0].out_features, small[2].out_features
    fresh = nn.Sequential(nn.Linear(16, a), nn.ReLU(), nn.Linear(a, b), nn.ReLU(), nn.Linear(b, 4))
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in small.state_dict().items())


def test_the_smaller_network_by_multiplications_and_in_steps() -> None:
    model, inputs = net(), torch.randn(4, 1, 5, 5)
    masks = prune_(model, Target("sparsity", 0.5)).masks
    goal = count_macs(model, (inputs,), masks=masks).density_weighted
    small = smaller_dense(model, masks, inputs, by="macs")
    assert count_macs(small, (inputs,)).dense <= goal
    assert count_macs(small, (inputs,)).dense > 0.5 * goal
    stepped = smaller_dense(model, masks, inputs, align=2)
    assert (stepped[0].out_channels % 2, stepped[5].out_features % 2) == (0, 0)


def test_a_cut_network_only_gets_new_weights() -> None:
    small, inputs = lenet(), torch.randn(4, 16)
    shrink_(small, Target("channels", 0.5), inputs, align=1)
    again = smaller_dense(small, {}, inputs, seed=2)
    assert [p.shape for p in again.parameters()] == [p.shape for p in small.parameters()]
    assert not any(torch.equal(p, q) for p, q in zip(again.parameters(), small.parameters(), strict=True))


def test_no_network_is_that_small() -> None:
    model = lenet()
    masks = prune_(model, Target("sparsity", 0.9)).masks
    with pytest.raises(TargetError, match="cannot be reached"):
        smaller_dense(model, masks, torch.randn(2, 16), align=8)  # 8 and 8 units are the fewest then


REFUSED: tuple[tuple[Any, type[SecateurError], str], ...] = (
    (
        lambda: Method(target=Target("channels", 0.5), pattern=Channel(coupled=True), ablate=Shuffle()),
        RecipeError,
        "coupled groups go from many layers",
    ),
    (
        lambda: Method(target=Target("channels", 0.5), pattern=Channel(coupled=True), ablate=RandomMasks()),
        RecipeError,
        "name = 'random'",
    ),
    (
        lambda: Method(target=Target("sparsity", 0.5), schedule=cubic(begin=0, end=4), ablate=Reinitialise()),
        RecipeError,
        "unit = 'rounds'",
    ),
    (lambda: Method(target=Target("sparsity", 0.5), ablate=SmallerDense()), RecipeError, "must be a Ablation"),
    (lambda: Method(target=Target("sparsity", 0.5), ablate=Shuffle), RecipeError, "must be a Ablation"),
    (lambda: SmallerDense(by="params"), UnknownNameError, "did you mean 'parameters'"),
    (
        lambda: smaller_dense(nn.Linear(8, 8), {}, torch.ones(1, 8), by="params"),
        UnknownNameError,
        "did you mean 'parameters'",
    ),
    (
        lambda: smaller_dense(nn.Linear(8, 8), {}, torch.ones(1, 8), seed="1"),
        RecipeError,
        "seed must be a whole number",
    ),
    (lambda: reinitialise_(nn.Linear(8, 8), seed="1"), RecipeError, "seed must be a whole number"),
    (lambda: reinitialise_(3, seed=1), WeightError, "expected a torch.nn.Module, got int"),
    (lambda: SmallerDense(align=0), TargetError, "align must be"),
    (
        lambda: make_plan(
            lenet(), Method(target=Target("macs", 0.5), pattern=Channel(), ablate=Shuffle()), torch.randn(2, 16)
        ),
        RecipeError,
        "cutting out leaves none",
    ),
)


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_refused(number: int) -> None:
    call, kind, words = REFUSED[number]
    with pytest.raises(kind, match=words):
        call()


# In a run


def recipe(ablate: Any, **changes: Any) -> Any:
    base = ITERATIVE | changes
    return from_dict(base | {"prune": base["prune"] | {"ablate": ablate}})


@pytest.mark.parametrize("name", ["shuffle", "random_masks"])
def test_a_run_with_other_masks_says_so(name: str, tmp_path: Path) -> None:
    done = run(recipe(name), tmp_path / "run", report=True)
    result = done.result
    assert result["ablation"]["name"] == name
    assert result["prune"]["ablation"] == str(ABLATIONS[name]())
    assert any("not the method's own" in note for note in result["notes"])
    assert f"(ablation: {name.replace('_', ' ')})" in method_words(result["recipe"])
    assert "ablation" in (tmp_path / "run" / "report.html").read_text()
    # Trained alike and ranked alike, the first round leaves as much of every layer as the method itself.
    own = run(from_dict(ITERATIVE | {"prune": {"target": {"sparsity": 0.8}}}), tmp_path / "own", report=False)
    once = run(recipe(name, prune={"target": {"sparsity": 0.8}}), tmp_path / "once", report=False)
    assert counts(own.masks) == counts(once.masks)
    assert any(not torch.equal(own.masks[n], once.masks[n]) for n in own.masks)
    assert "ablation" not in " ".join(own.result["notes"])


def test_a_reinitialised_ticket_trains_from_new_weights(tmp_path: Path) -> None:
    """The control of the lottery ticket: masks of the rewound run, weights nobody trained, all epochs."""
    rewound = {"retrain": {"name": "weight_rewinding", "rewind_to": 0}}
    own = run(from_dict(ITERATIVE | {"recover": rewound}), tmp_path / "own", report=False)
    control = recipe({"name": "reinitialise", "seed": 8}, recover=rewound)
    done = run(control, tmp_path / "control", report=False)
    assert all(torch.equal(own.masks[n], done.masks[n]) for n in own.masks)
    # By hand: the constructor's weights under that seed, the masks, and the training of the recipe.
    torch.manual_seed(8)
    model = net()
    plain = run(
        from_dict(BASE | {"prune": {"target": {"sparsity": 0.0}}}),
        tmp_path / "hand",
        model=masked_while_training(model, done.masks),
        report=False,
    )
    for name, value in done.model.state_dict().items():
        assert torch.equal(value, plain.model.state_dict()[name]), name


def test_batch_norms_are_not_matched_to_weights_that_are_gone(tmp_path: Path) -> None:
    """Judged without any retraining, the network is the constructor's own times the masks, norms included."""
    control = recipe({"name": "reinitialise", "seed": 8}, recover={}, prune={"target": {"sparsity": 0.5}})
    done = run(control, tmp_path, report=False)
    torch.manual_seed(8)
    for name, value in net().state_dict().items():
        expected = value * done.masks[name] if name in done.masks else value
        assert torch.equal(done.model.state_dict()[name], expected), name


def masked_while_training(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """Multiply by the masks before every forward: what an optimizer does to pruned weights is undone in time."""

    def apply(*_: Any) -> None:
        with torch.no_grad():
            for name, mask in masks.items():
                model.get_parameter(name).masked_fill_(~mask, 0.0)

    apply()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(apply)  # the first to run
    return model


def test_a_smaller_dense_network_is_trained_as_long(tmp_path: Path) -> None:
    wanted = recipe({"name": "smaller_dense", "seed": 5})
    done = run(wanted, tmp_path / "run", report=True)
    found = done.result["ablation"]
    masked = sum(int((~m).sum()) for m in done.masks.values())
    left = sum(p.numel() for p in done.model.parameters()) - masked
    assert left - 4 * 25 - 40 < found["parameters"] <= left
    assert found["epochs"] == 3 + 2 * 2
    assert 0.0 <= found["quality"]["accuracy"] <= 1.0
    assert done.result["quality"].keys() == {"dense", "pruned"}
    inner = load_tree(tmp_path / "run" / "smaller_dense" / "checkpoint.safetensors")
    assert inner["position"]["epochs_done"] == 7
    plain = run(from_dict(ITERATIVE), tmp_path / "plain", report=False)  # and the run itself is what it was
    assert all(torch.equal(v, done.model.state_dict()[n]) for n, v in plain.model.state_dict().items())


def test_a_smaller_dense_network_beside_a_solver(tmp_path: Path) -> None:
    """What the solver needs is collected in the run, not when the size is tried out before it."""
    solved = {
        "prune": {"target": {"sparsity": 0.5}, "solver": "optimal_brain_surgeon", "score_batches": 2},
        "recover": {},
    }
    done = run(recipe("smaller_dense", **solved), tmp_path, report=False)
    assert done.result["ablation"]["epochs"] == 3


def test_a_smaller_dense_network_for_cut_channels(tmp_path: Path) -> None:
    changed = COUPLED | {"prune": COUPLED["prune"] | {"ablate": "smaller_dense"}}
    done = run(from_dict(changed), tmp_path / "run", report=False)
    found = done.result["ablation"]
    small = net()
    load_pruned(small, tmp_path / "run" / "pruned")
    assert found["parameters"] == sum(p.numel() for p in small.parameters())
    assert found["macs"]["dense"] == done.result["profile"]["pruned"]["macs"]["dense"]


@pytest.mark.parametrize("kill_at", [9, 33, 41, 60])
def test_killed_during_either_training(kill_at: int, tmp_path: Path) -> None:
    wanted = recipe("smaller_dense")
    assert in_child(wanted, tmp_path / "whole", resume=False) == 0
    assert in_child(wanted, tmp_path / "killed", kill_at=kill_at, resume=False) < 0
    assert in_child(wanted, tmp_path / "killed", resume=True) == 0
    assert_same(tmp_path / "whole", tmp_path / "killed")
    assert_same(tmp_path / "whole" / "smaller_dense", tmp_path / "killed" / "smaller_dense")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prune": {"target": {"sparsity": 0.999}, "ablate": "smaller_dense"}}, "no dense network of that size"),
        (
            {"train": {"epochs": 0}, "recover": {}, "prune": {"target": {"sparsity": 0.5}, "ablate": "smaller_dense"}},
            "for no epoch",
        ),
        ({"prune": GRADUAL["prune"] | {"ablate": "reinitialise"}, "recover": {}}, "unit = 'rounds'"),
        ({"prune": COUPLED["prune"] | {"ablate": "shuffle"}, "recover": {}}, "coupled groups"),
        ({"prune": {"target": {"sparsity": 0.5}, "ablate": "shufle"}}, "did you mean 'shuffle'?"),
    ],
)
def test_refused_before_any_training(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        run(from_dict(ITERATIVE | changes), tmp_path / "run", report=False)
    assert words in str(error.value)
    assert not (tmp_path / "run").exists()
