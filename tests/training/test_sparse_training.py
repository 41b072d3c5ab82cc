"""The driver in a user's loop: trajectories against NumPy, exact counts, optimizers, averages, and refusals."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from secateur import load_pruned, save_pruned, shrink_
from secateur.allocate import ErdosRenyiKernel, Global, Layerwise
from secateur.errors import (
    CheckpointError,
    MissingStatsError,
    RecipeError,
    SecateurError,
    SelectionError,
    TargetError,
    WeightError,
)
from secateur.method import Method
from secateur.patterns import NM, Block, Channel, Unstructured
from secateur.pruner import Pruner, prune_
from secateur.schedules import cubic
from secateur.scores import Magnitude, Random, WeightGradient
from secateur.targets import Target
from secateur.testing import select_k
from secateur.training import ACDC, SET, GraNet, RigL, SoftFilter, SparseTraining, Static
from secateur.types import Dynamics, Pattern

from ..loops import batch, leaks, loss_fn, mlp

ERK = Method(target=Target("sparsity", 0.7), score=Random(0), allocate=ErdosRenyiKernel())
MOST = Target("sparsity", 0.8)
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "momentum": lambda m: SGD(m.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda m: Adam(m.parameters(), 0.01, amsgrad=True),
    "adamw": lambda m: AdamW(m.parameters(), 0.01, weight_decay=0.1),
}


def iterate(model: nn.Module, optimizer: Optimizer, trainer: SparseTraining, steps: int) -> Iterator[int]:
    """Train, and stop between the trainer's step and the gradients' end.

    Yields:
        The number of the step.
    """
    for step in range(1, steps + 1):
        loss_fn(model, batch()).backward()
        optimizer.step()
        trainer.step()
        yield step
        optimizer.zero_grad()


def counts(masks: dict[str, Tensor]) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in masks.items()}


# --- RigL as published -----------------------------------------------------------------------------------------------


def literal_rigl(
    weights: list[np.ndarray], masks: list[np.ndarray], data: tuple[np.ndarray, np.ndarray], steps: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The paper's algorithm on a network of two layers with tanh, its gradients by hand, plain SGD."""
    x, y = data
    every, end, alpha, rate = 3, 40, 0.4, 0.2
    for t in range(1, steps + 1):
        hidden = np.tanh(x @ weights[0].T)
        error = 2 * (hidden @ weights[1].T - y) / y.size
        inner = (error @ weights[1]) * (1 - hidden**2)
        gradients = [inner.T @ x, error.T @ hidden]  # dense
        if t % every == 0 and t < end:
            for layer, (w, mask, g) in enumerate(zip(weights, masks, gradients, strict=True)):
                k = int(alpha / 2 * (1 + math.cos(t * math.pi / end)) * mask.sum())
                active = np.flatnonzero(mask)
                drop = active[np.argsort(np.abs(w.flat[active]), kind="stable")[:k]]
                pool = np.setdiff1d(np.arange(w.size), np.setdiff1d(active, drop))
                grow = pool[np.argsort(-np.abs(g.flat[pool]), kind="stable")[:k]]
                after = mask.copy()
                after.flat[drop] = False
                after.flat[grow] = True
                weights[layer] = np.where(after & mask, w, 0.0)
                masks[layer] = after
        else:
            weights = [np.where(m, w - rate * g, 0.0) for w, g, m in zip(weights, gradients, masks, strict=True)]
    return weights, masks


def test_a_whole_training_is_the_published_algorithm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10, bias=False), nn.Tanh(), nn.Linear(10, 3, bias=False)).double()
    x, y = (t.double() for t in batch())
    optimizer = SGD(model.parameters(), 0.2)
    rigl = RigL(end=40, every=3, fraction=0.4)
    trainer = SparseTraining(model, ERK, rigl, optimizer=optimizer)
    trainer.start()
    first = {n: m.clone() for n, m in trainer.masks.items()}
    expected = literal_rigl(
        [model[i].weight.detach().numpy().copy() for i in (0, 2)],
        [trainer.masks[f"{i}.weight"].numpy().copy() for i in (0, 2)],
        (x.numpy(), y.numpy()),
        60,
    )
    moves = 0
    for _ in range(60):
        nn.functional.mse_loss(model(x), y).backward()
        if trainer.step() is None:
            optimizer.step()
        else:
            moves += 1
        optimizer.zero_grad()
    assert moves == 13
    assert trainer.finished
    for i, w, mask in zip((0, 2), *expected, strict=True):
        assert np.array_equal(trainer.masks[f"{i}.weight"].numpy(), mask)
        np.testing.assert_allclose(model[i].weight.detach().numpy(), w, rtol=1e-9, atol=1e-14)
    assert any(not torch.equal(m, trainer.masks[n]) for n, m in first.items())


# --- masks that swap -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("pattern", [Unstructured(), Block(1, 2), Channel()], ids=str)
@pytest.mark.parametrize("dynamics", [RigL(end=20, every=2), SET(1, 0.4, every=3, unit="steps")], ids=str)
def test_every_layer_keeps_its_number_of_weights(make: str, pattern: Pattern, dynamics: Dynamics) -> None:
    model = mlp()
    optimizer = OPTIMIZERS[make](model)
    method = replace(ERK, pattern=pattern)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    trainer = SparseTraining(model, method, dynamics, optimizer=optimizer, ema=average)
    trainer.start()
    had, seen = counts(trainer.masks), [{n: m.clone() for n, m in trainer.masks.items()}]
    for step in iterate(model, optimizer, trainer, 24):
        average.update_parameters(model)
        assert counts(trainer.masks) == had
        assert leaks(model, trainer.masks) == leaks(average.module, trainer.masks) == 0
        if dynamics.due(step):
            for name, mask in trainer.masks.items():
                new = mask & ~seen[-1][name]
                parameter = model.get_parameter(name)
                assert int(parameter.detach()[new].count_nonzero()) == 0, "grows from zero"
                for key, value in optimizer.state[parameter].items():
                    if key != "step":
                        assert int(value[new | ~mask].count_nonzero()) == 0, "without momentum"
            seen.append({n: m.clone() for n, m in trainer.masks.items()})
    if not isinstance(pattern, Channel):
        assert any(not torch.equal(seen[0][n], seen[-1][n]) for n in had), "nothing has moved"
    report = trainer.report()
    assert report.asked == method.goal.value
    assert report.finished == (dynamics.last is not None)
    if isinstance(pattern, Unstructured):
        assert report.achieved == pytest.approx(0.7, abs=0.5 / 164)


def test_dense_layers_and_layers_of_one_weight() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40))
    optimizer = SGD(model.parameters(), 0.1)
    trainer = SparseTraining(model, ERK, RigL(end=9, every=1, fraction=1.0), optimizer=optimizer)
    rows = {row.name: row.sparsity for row in trainer.start().layers}
    assert rows["0.weight"] == rows["2.weight"] == 0.0
    for _ in range(9):
        before = model[2].weight.detach().clone()
        model(torch.randn(8, 1)).square().sum().backward()
        assert trainer.step() is None or torch.equal(model[2].weight, before), "a dense layer is left as it is"
        optimizer.zero_grad()


def test_static_masks_stay_and_are_those_of_a_pruner() -> None:
    model, twin = mlp(), mlp()
    optimizer, other = (OPTIMIZERS["adamw"](m) for m in (model, twin))
    trainer = SparseTraining(model, ERK, Static(), optimizer=optimizer)
    pruner = Pruner(twin, ERK, optimizer=other)
    trainer.start()
    pruner.prune()
    for _ in iterate(model, optimizer, trainer, 8):
        loss_fn(twin, batch()).backward()
        other.step()
        other.zero_grad()
    assert trainer.finished
    assert all(torch.equal(v, twin.state_dict()[n]) for n, v in model.state_dict().items())


def test_masks_of_a_score_with_data_may_be_the_start() -> None:
    method = Method(target=MOST, score=WeightGradient())
    trainer = SparseTraining(mlp(), method, RigL(end=9, every=1), loss_fn=loss_fn, batches=[batch()])
    trainer.start()
    judged = prune_(mlp(), method, loss_fn=loss_fn, batches=[batch()])
    assert all(torch.equal(m, judged.masks[n]) for n, m in trainer.masks.items())


def test_without_an_optimizer_step_applies_the_masks() -> None:
    model = mlp()
    trainer = SparseTraining(model, ERK, Static())
    trainer.start()
    optimizer = OPTIMIZERS["momentum"](model)
    for _ in iterate(model, optimizer, trainer, 3):
        assert leaks(model, trainer.masks) == 0


# --- gradual, with return --------------------------------------------------------------------------------------------


def test_gradual_without_swaps_is_a_pruner_with_the_same_schedule() -> None:
    model, twin = mlp(), mlp()
    optimizer, other = (OPTIMIZERS["momentum"](m) for m in (model, twin))
    trainer = SparseTraining(model, MOST, GraNet(12, 2, 2, 0.0, "steps"), optimizer=optimizer)
    pruner = Pruner(twin, Method(target=MOST, schedule=cubic(begin=2, end=12, every=2)), optimizer=other)
    for _ in iterate(model, optimizer, trainer, 15):
        loss_fn(twin, batch()).backward()
        other.step()
        pruner.step()
        other.zero_grad()
        assert all(torch.equal(v, twin.state_dict()[n]) for n, v in model.state_dict().items())
        assert trainer.report().asked == pruner.report().asked
    assert trainer.finished
    assert trainer.sparsity == pruner.sparsity


def test_gradual_with_swaps_follows_the_schedule_and_brings_weights_back() -> None:
    model = mlp()
    optimizer = OPTIMIZERS["adam"](model)
    trainer = SparseTraining(
        model, Method(target=MOST, allocate=Layerwise()), GraNet(20, unit="steps"), optimizer=optimizer
    )
    gone = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in model.named_parameters() if p.dim() > 1}
    returned = 0
    for step in iterate(model, optimizer, trainer, 20):
        level = 0.8 * (1 - (1 - step / 20) ** 3)
        assert sum(counts(trainer.masks).values()) == 164 - round(level * 164)
        returned += sum(int((gone[n] & m).sum()) for n, m in trainer.masks.items())
        gone = {n: ~m for n, m in trainer.masks.items()}
    assert returned > 10
    assert trainer.finished
    assert trainer.report().achieved == pytest.approx(0.8, abs=0.5 / 164)


# --- dense and sparse in turn ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_compressions_are_exact_and_dense_phases_dense(make: str) -> None:
    model = mlp()
    with torch.no_grad():
        model[0].weight[:] = 0.5  # ties that a threshold would all remove, or all keep
    optimizer = OPTIMIZERS[make](model)
    plan = ACDC(total=20, warm_up=3, sparse=2, dense=2, last_dense=3, last_sparse=4, unit="steps")
    trainer = SparseTraining(model, Method(target=MOST, allocate=Global()), plan, optimizer=optimizer)
    phase, chosen = "dense", []
    for step in range(1, 21):
        loss_fn(model, batch()).backward()
        optimizer.step()
        before = {n: p.detach().abs().flatten().tolist() for n, p in model.named_parameters() if p.dim() > 1}
        report = trainer.step()
        if report is not None:
            phase = dict(plan.phases)[step]
        if report is not None and phase == "sparse":
            kept = 164 - round(0.8 * 164)
            expected = select_k(before, kept)
            got = {n: m.flatten().tolist() for n, m in trainer.masks.items()}
            assert sum(map(sum, got.values())) == kept
            assert got == expected or min(map(sum, expected.values())) == 0  # floors keep one weight per layer
            chosen.append({n: m.clone() for n, m in trainer.masks.items()})
        if report is not None and phase == "dense":
            assert not any(optimizer.state[p] for p in model.parameters()), "starts afresh"
            assert report.achieved == report.asked == report.sparsity == 0.0
        if phase == "dense":
            assert trainer.masks == {}
        assert leaks(model, trainer.masks) == 0
        optimizer.zero_grad()
    assert phase == "sparse"
    assert trainer.finished
    assert trainer.report().achieved == pytest.approx(0.8, abs=0.5 / 164)
    assert len(chosen) == sum(kind == "sparse" for _, kind in plan.phases)


def test_decompressed_weights_move() -> None:
    model = mlp()
    optimizer = OPTIMIZERS["adam"](model)
    trainer = SparseTraining(model, MOST, ACDC(8, 1, 1, 2, 2, 1, "steps"), optimizer=optimizer)
    zeros = []
    for _ in iterate(model, optimizer, trainer, 8):
        zeros.append(sum(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1))
    # A decompression shows after the next step; a unit cut off on both sides needs one more to feel a gradient.
    assert [z if z == 131 else "fewer" for z in zeros] == [131, 131, "fewer", 131, 131, "fewer", 131, 131]


# --- soft filters ----------------------------------------------------------------------------------------------------


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.n = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.m = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.m(self.b(torch.relu(self.n(self.a(x))))))
        return self.head(x.mean((2, 3)))


def test_soft_filters_come_back_and_what_is_left_is_cut_out() -> None:
    model, x = ConvNet(), torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    y = torch.arange(16) % 5
    optimizer = SGD(model.parameters(), 0.05, momentum=0.9)
    method = Method(
        target=Target("sparsity", 0.5), pattern=Channel(reduce_by="l2"), allocate=Layerwise(), exclude=("head",)
    )
    trainer = SparseTraining(
        model, method, SoftFilter(end=5), optimizer=optimizer, example_inputs=(x,), steps_per_epoch=4
    )
    revived = 0
    for step in range(1, 21):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        norms = {n: model.get_parameter(n).detach().flatten(1).norm(dim=1) for n in ("a.weight", "b.weight")}
        report = trainer.step()
        optimizer.zero_grad()
        assert (report is not None) == (step % 4 == 0)
        if report is None:
            revived += sum(int(bool((model.get_parameter(n).flatten(1) != 0).any(1).all())) for n in norms)
            continue
        for name, norm in norms.items():
            dead = (model.get_parameter(name).flatten(1) == 0).all(1)
            assert int(dead.sum()) == norm.numel() // 2
            assert float(norm[dead].max()) <= float(norm[~dead].min())
        assert (trainer.masks == {}) == (step < 20)
    assert revived > 0
    assert trainer.finished
    model.eval()
    before = model(x)
    trainer.detach()
    report = shrink_(model, trainer.masks, x)
    assert report.proof.equal
    assert (model.a.out_channels, model.b.out_channels) == (4, 6)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


def test_rigl_ends_in_a_file(tmp_path: object) -> None:
    """Masks that have moved feed what any masks feed."""
    model = mlp()
    method = Method(target=Target("sparsity", 0.5), pattern=Channel(), score=Random(0), exclude=("4",))
    trainer = SparseTraining(model, method, RigL(end=6, every=2), optimizer=(optimizer := SGD(model.parameters(), 0.1)))
    trainer.start()
    for _ in iterate(model, optimizer, trainer, 6):
        pass
    expected = model(batch()[0])
    trainer.detach()
    shrink_(model, trainer.masks, batch()[0])
    torch.testing.assert_close(model(batch()[0]), expected)
    save_pruned(f"{tmp_path}/model.safetensors", model)
    fresh = mlp(seed=5)
    load_pruned(fresh, f"{tmp_path}/model.safetensors")
    torch.testing.assert_close(fresh(batch()[0]), expected)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_forgotten_start_is_refused() -> None:
    trainer = SparseTraining(mlp(), ERK, RigL(end=9, every=1))
    with pytest.raises(TargetError, match="call start"):
        trainer.step()
    assert not trainer.finished
    trainer.start()
    with pytest.raises(TargetError, match="and once"):
        trainer.start()


def test_a_layer_that_could_never_grow_is_refused() -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    method = Method(target=Target("sparsity", 0.99), score=Random(0), allocate=Layerwise(), allow_empty=True)
    with pytest.raises(TargetError, match=r"4\.weight starts with nothing \(1 of 3 weights\)"):
        SparseTraining(model, method, RigL(end=9, every=1)).start()
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert SparseTraining(model, method, Static()).start().achieved == pytest.approx(0.99, abs=0.01)


def test_a_refused_move_changes_nothing_and_is_due_again() -> None:
    model = mlp()
    optimizer = OPTIMIZERS["adam"](model)
    trainer = SparseTraining(model, ERK, RigL(end=9, every=1), optimizer=optimizer)
    trainer.start()
    before, state = copy.deepcopy(model.state_dict()), trainer.state_dict()
    with pytest.raises(MissingStatsError, match=r"0\.weight has no gradient \(3 of 3 weights\).*after backward\(\)"):
        trainer.step()
    loss_fn(model, batch()).backward()
    optimizer.zero_grad(set_to_none=False)
    with pytest.raises(MissingStatsError, match="all gradients are zero"):
        trainer.step()
    loss_fn(model, batch()).backward()
    model[2].weight.grad[0, 0] = torch.inf
    with pytest.raises(SelectionError, match=r"gradient of 2\.weight"):
        trainer.step()
    model[2].weight.grad[0, 0] = 0.0
    with torch.no_grad():
        model[2].weight[1, 1] = torch.nan
    with pytest.raises(WeightError, match=r"2\.weight: 1 of 80"):
        trainer.step()
    with torch.no_grad():
        model[2].weight.copy_(before["2.weight"])
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    after = trainer.state_dict()
    assert {**after, "masks": None} == {**state, "masks": None}
    assert all(torch.equal(m, state["masks"][n]) for n, m in after["masks"].items())
    assert trainer.step() is not None


@pytest.mark.parametrize(
    ("method", "dynamics", "error", "message"),
    [
        (ERK, RigL, RecipeError, r"a Dynamics such as RigL\(end=1000\)"),
        (ERK, Magnitude(), RecipeError, "a Dynamics such as"),
        (Method(target=MOST, schedule=cubic(begin=0, end=4)), Static(), RecipeError, "cubic.*both say when"),
        (Method(pattern=NM(2, 4), exclude=("0", "4")), RigL(end=900), RecipeError, "any number may stay"),
        (ERK, SET(0), TargetError, "counts epochs: pass steps_per_epoch"),
        (Method(target=Target("sparsity", 0.99)), RigL(end=900), TargetError, "allow is 0.98170"),
        (Method(target=Target("sparsity", 0.999)), ACDC(unit="steps"), TargetError, "cannot be reached"),
        (Method(target=MOST, pattern=Channel(coupled=True)), ACDC(unit="steps"), RecipeError, "could not grow back"),
    ],
    ids=str,
)
def test_pairs_that_exclude_each_other(method: Method, dynamics: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        SparseTraining(mlp(), method, dynamics, example_inputs=batch()[0])


def test_coupled_units_may_stay_where_they_are() -> None:
    model = mlp(sizes=(6, 16, 16, 3))
    method = Method(target=Target("channels", 0.5), pattern=Channel(coupled=True))
    trainer = SparseTraining(model, method, Static(), example_inputs=batch()[0])
    assert trainer.start().achieved == 0.5
    shrink_(model, trainer.masks, batch()[0])
    assert [layer.out_features for layer in model if isinstance(layer, nn.Linear)] == [8, 8, 3]


def test_a_solver_is_refused() -> None:
    class Solver:
        needs = frozenset()

        def solve(self, weights: object, masks: object, stats: object) -> dict[str, Tensor]:
            return {}

    with pytest.raises(RecipeError, match=r"solver.*training makes up for what goes"):
        SparseTraining(mlp(), replace(ERK, solver=Solver()), Static())


def test_an_unknown_need_is_refused() -> None:
    class Curious(RigL):
        needs = frozenset({"hessian"})

    with pytest.raises(MissingStatsError, match="hessian"):
        SparseTraining(mlp(), ERK, Curious(end=900))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"version": 9}, CheckpointError, "version 9"),
        ({"masks": None}, CheckpointError, "lacks.*masks"),
        ({"dynamics": "SET(seed=0)"}, CheckpointError, r"its dynamics is SET\(seed=0\)"),
        ({"steps_per_epoch": 7}, CheckpointError, "its steps_per_epoch is 7"),
        ({"steps": -1}, CheckpointError, "steps must be a whole number of at least 0, got -1"),
        ({"level": 2.0}, CheckpointError, "level must be a number of at least 0 and at most 1, got 2.0"),
        ({"masks": {"0.weight": torch.ones(10, 6, dtype=torch.bool)}}, CheckpointError, "other filters"),
        ({"masks": {"0.weight": torch.ones(2, 2, dtype=torch.bool)}}, WeightError, r"\(2, 2\)"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_states_that_do_not_fit(change: dict[str, object], error: type[SecateurError], message: str) -> None:
    trainer = SparseTraining(mlp(), ERK, RigL(end=900))
    trainer.start()
    state = {
        key: value for key, value in (trainer.state_dict() | change).items() if change.get(key, "kept") is not None
    }
    fresh = SparseTraining(mlp(), ERK, RigL(end=900))
    with pytest.raises(error, match=message):
        fresh.load_state_dict(state)
    assert fresh.masks == {}
