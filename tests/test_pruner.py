"""The pruner in a user's loop: schedules, optimizers, EMA, resuming, scores that need data, refusals."""

import copy
from collections.abc import Callable, Iterable

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
    SecateurError,
    SelectionError,
    TargetError,
    WeightError,
)
from secateur.method import Method
from secateur.patterns import Channel
from secateur.pruner import Pruner, prune_
from secateur.schedules import cubic, iterative, linear, one_shot
from secateur.scores import Magnitude, Random, WeightGradient
from secateur.targets import Target

from .loops import HALF, batch, leaks, loss_fn, mlp, one_step, sgd

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
            assert abs(report.achieved - report.asked) <= 0.5 / 164 + 1e-12, f"update at step {step}"
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
        level = method.schedule.level(len(pruner.history) - 1, sparsity)
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
    with pytest.raises(TargetError, match="it would never prune"):
        pruner.step()
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


OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {
    "SGD": lambda ps: SGD(ps, 0.1, momentum=0.9),
    "AdamW": lambda ps: AdamW(ps, 0.01),
    "Muon": lambda ps: torch.optim.Muon(ps, 0.02),  # mixes all of a momentum's entries, masked ones included
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("stop", [0, 4, 5, 9, 15])
def test_resuming_is_bit_for_bit(name: str, stop: int) -> None:
    method = Method(target=Target("sparsity", 0.8), schedule=cubic(begin=2, end=14, every=3), score=Magnitude())

    def build() -> tuple[nn.Module, Optimizer, Pruner]:
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Linear(6, 10, bias=False),
            nn.Tanh(),
            nn.Linear(10, 8, bias=False),
            nn.Tanh(),
            nn.Linear(8, 3, bias=False),
        )
        optimizer = OPTIMIZERS[name](model.parameters())
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
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in resumed.state_dict().items()), "weights"
    assert all(torch.equal(m, pruner.masks[n]) for n, m in pruner2.masks.items())
    assert pruner2.history == pruner.history
    assert len(pruner.history) == 5
    one, two = optimizer.state_dict()["state"], optimizer2.state_dict()["state"]
    for index, entries in one.items():
        for key, value in entries.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(two[index][key])), f"optimizer state {key}"


def test_state_is_plain_and_independent() -> None:
    pruner = Pruner(mlp(), Method(target=Target("sparsity", 0.75), schedule=iterative(rounds=2)))
    pruner.prune()
    state = pruner.state_dict()
    assert all(isinstance(v, int | float | str | dict) for v in state.values())
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
        ({"updates": -3}, CheckpointError, "at least 0, got -3"),
        ({"version": 0}, CheckpointError, "version 0"),
        ({"version": torch.ones(2)}, CheckpointError, "version"),
        ({"asked": 10**400}, CheckpointError, "asked must be a number"),
        ({"asked": "half"}, CheckpointError, "asked must be a number.*'half'"),
        ({"history": None}, CheckpointError, "lacks .*history"),
        ({"history": {"tables": [], "reports": 3}}, CheckpointError, "history must have list there, got 3"),
        (
            {"masks": {"0.weight": torch.ones(10, 6, dtype=torch.bool)}},
            CheckpointError,
            "other filters: they differ in .*2.weight",
        ),
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
    with pytest.raises(CheckpointError, match=r"another method.*exclude"):
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


def test_a_part_of_a_plain_class_resumes_too() -> None:
    class Plain:
        """No dataclass: its repr carries an address."""

        needs: frozenset[str] = frozenset()

        def __call__(self, weights: dict[str, Tensor], stats: object) -> dict[str, Tensor]:
            return {name: w.abs() for name, w in weights.items()}

    first, second = (Pruner(mlp(), Method(target=HALF, score=Plain())) for _ in range(2))
    first.prune()
    second.load_state_dict(first.state_dict())
    assert second.finished
