"""Optimal Brain Surgeon through the pruner: scores that rank as greed does, and survivors that make up for the rest."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur import Method, Pruner, Target, prune_
from secateur.errors import MissingStatsError, PatternError, RecipeError
from secateur.patterns import Block, Channel
from secateur.recipe import from_dict
from secateur.schedules import iterative
from secateur.scores import Magnitude
from secateur.scores import OptimalBrainSurgeon as Score
from secateur.select import keep_top_k
from secateur.solvers import OptimalBrainSurgeon as Solver
from secateur.stats.inverse_fisher import InverseFisher
from secateur.structure import make_plan
from secateur.testing.fisher import synthetic_fisher


def regression(inputs: int = 6, outputs: int = 1, samples: int = 80, noise: float = 0.0) -> Any:
    """A linear layer at the least-squares solution: the loss is exactly quadratic in its weights."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(samples, inputs, generator=generator, dtype=torch.float64) @ mix
    y = x @ torch.randn(inputs, outputs, generator=generator, dtype=torch.float64)
    y = y + noise * torch.randn(y.shape, generator=generator, dtype=torch.float64)
    model = nn.Linear(inputs, outputs, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x, y).solution.T)
    return model, x, y


def rows(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return model(batch[0])


def half_square(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float(0.5 * (model(x).detach() - y).square().sum(1).mean())


EXACT: Any = {"damping": 0.0, "gradients": "output", "block": 0}


@pytest.mark.parametrize("order", ["single", "greedy"])
@pytest.mark.parametrize("left", [1, 2, 4])
def test_survivors_are_the_least_squares_solution_on_their_support(order: Any, left: int) -> None:
    model, x, y = regression(noise=0.3)
    method = Method(target=Target("sparsity", 1 - left / 6), score=Score(order, **EXACT), solver=Solver(**EXACT))
    masks = prune_(model, method, loss_fn=rows, batches=[(x[:50], y[:50]), (x[50:], y[50:])]).masks
    kept = masks["weight"][0]
    assert int(kept.sum()) == left
    wanted = torch.linalg.lstsq(x[:, kept], y).solution.T
    torch.testing.assert_close(model.weight.detach()[:, kept], wanted, rtol=1e-12, atol=1e-12)
    assert not model.weight.detach()[:, ~kept].count_nonzero()


def test_scores_are_the_rise_of_the_loss() -> None:
    """The loss of the exact quadratic, before and after, evaluated by the model itself."""
    model, x, y = regression(noise=0.3)
    dense = half_square(model, x, y)
    inverse = InverseFisher(None, damping=0.0, gradients="output")
    from secateur.types import Source

    stats = {inverse: inverse.collect(Source(model, {"weight": model.weight}, rows, lambda: [(x, y)]))}
    weights = {"weight": model.weight.detach()}
    single = Score("single", **EXACT)(weights, stats)["weight"][0]
    for q in range(6):
        small = copy.deepcopy(model)
        masks = {"weight": (torch.arange(6) != q)[None]}
        with torch.no_grad():
            small.weight.copy_(Solver(**EXACT).solve(weights, masks, stats)["weight"])
        assert half_square(small, x, y) - dense == pytest.approx(float(single[q]), rel=1e-10)
    pairs = Score("single", group=2, **EXACT)(weights, stats)["weight"][0]
    for q in range(0, 6, 2):
        small = copy.deepcopy(model)
        masks = {"weight": ((torch.arange(6) != q) & (torch.arange(6) != q + 1))[None]}
        with torch.no_grad():
            small.weight.copy_(Solver(**EXACT).solve(weights, masks, stats)["weight"])
        assert half_square(small, x, y) - dense == pytest.approx(float(pairs[q] + pairs[q + 1]), rel=1e-10)


def greedy_by_definition(fisher: np.ndarray, w: np.ndarray, count: int, size: int) -> set[int]:
    """Remove one weight after the other, each time the cheapest of all, with every block's inverse made anew."""
    gone: set[int] = set()
    w = w.copy()
    for _ in range(count):
        best = (np.inf, -1, w)
        for low in range(0, len(w), size):
            alive = [i for i in range(low, min(low + size, len(w))) if i not in gone]
            if alive:
                inverse = np.linalg.inv(fisher[np.ix_(alive, alive)])
                costs = w[alive] ** 2 / (2 * inverse.diagonal())
                q = int(costs.argmin())
                if costs[q] < best[0]:
                    moved = w.copy()
                    moved[alive] -= w[alive[q]] / inverse[q, q] * inverse[:, q]
                    moved[alive[q]] = 0.0
                    best = (costs[q], alive[q], moved)
        gone.add(best[1])
        w = best[2]
    return gone


@pytest.mark.parametrize("size", [4, 5, 12])
def test_the_lowest_greedy_scores_are_the_greedy_choice_for_every_count(size: int) -> None:
    """Across blocks, with a block that the size does not divide."""
    w = {"w.weight": torch.randn(3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)}
    score = Score(block=size, damping=1e-3)
    (need,) = score.needs
    stats = {need: synthetic_fisher(need, w)}
    whole = InverseFisher(None, damping=stats[need].damping, relative=False)
    fisher = np.linalg.inv(synthetic_fisher(whole, w)["w.weight"][0].numpy())
    got = score(w, stats)["w.weight"]
    for count in range(13):
        kept = keep_top_k(got.flatten(), 12 - count)
        gone = set((~kept).nonzero().flatten().tolist())
        assert gone == greedy_by_definition(fisher, w["w.weight"].flatten().numpy(), count, size), count


def test_of_two_equal_inputs_one_stays() -> None:
    """Each of the pair looks free by itself; greed sees that the second is not, once the first is gone."""
    model, x, y = regression(noise=0.0)
    x = torch.cat([x, x[:, :1]], 1)  # the first input again
    twin = nn.Linear(7, 1, bias=False).double()
    with torch.no_grad():
        twin.weight.copy_(torch.cat([model.weight, model.weight[:, :1]], 1))
        twin.weight[:, 0] *= 0.5
        twin.weight[:, 6] *= 0.5
    options: Any = {"damping": 1e-9, "gradients": "output", "block": 0}
    method = {order: Method(target=Target("sparsity", 2 / 7), score=Score(order, **options)) for order in ("single",)}
    method["greedy"] = Method(target=Target("sparsity", 2 / 7), score=Score(**options), solver=Solver(**options))
    lost = {}
    for order, how in method.items():
        small = copy.deepcopy(twin)
        masks = prune_(small, how, loss_fn=rows, batches=[(x, y)]).masks
        lost[order] = (int(masks["weight"][0, [0, 6]].sum()), half_square(small, x, y))
    assert lost["single"][0] == 0, "both go, as each looked free"
    assert lost["greedy"][0] == 1
    assert lost["greedy"][1] < 0.1 * lost["single"][1]
    magnitude = copy.deepcopy(twin)
    prune_(magnitude, Target("sparsity", 2 / 7))
    assert lost["greedy"][1] < half_square(magnitude, x, y)


def test_rounds_end_where_one_shot_on_the_same_support_does() -> None:
    """What had gone before stays zero and takes no part: the survivors are least squares again after every round."""
    model, x, y = regression(noise=0.3)
    method = Method(
        target=Target("sparsity", 4 / 6), score=Score(**EXACT), solver=Solver(**EXACT), schedule=iterative(rounds=4)
    )
    pruner = Pruner(model, method, loss_fn=rows, batches=[(x, y)])
    before = torch.ones(6, dtype=torch.bool)
    while not pruner.finished:
        pruner.prune()
        kept = pruner.masks["weight"][0]
        assert not bool((kept & ~before).any())
        before = kept.clone()
        wanted = torch.linalg.lstsq(x[:, kept], y).solution.T
        torch.testing.assert_close(model.weight.detach()[:, kept], wanted, rtol=1e-11, atol=1e-11)
    assert int(kept.sum()) == 2


def test_magnitudes_too_gain_by_the_update() -> None:
    """The solver goes with any score: the same support, a smaller loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 3))
    x = torch.randn(512, 8)
    y = (x[:, :3] + 0.5 * x[:, 3:6] + torch.randn(512, 3)).argmax(1)  # noise, without which gradients vanish
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(300):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    def run(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(m(batch[0]), batch[1])

    losses, masks = [], []
    for solver in (None, Solver(block=32)):
        small = copy.deepcopy(model)
        method = Method(target=Target("sparsity", 0.3), score=Magnitude(), solver=solver)
        masks.append(prune_(small, method, loss_fn=run, batches=[(x, y)]).masks)
        losses.append(run(small, (x, y)).item())
    assert all(torch.equal(masks[0][n], masks[1][n]) for n in masks[0])
    dense = run(model, (x, y)).item()
    assert losses[1] - dense < 0.75 * (losses[0] - dense)


def test_groups_and_the_block_pattern() -> None:
    """Shares of one group add up to the exact cost of the pattern's unit."""
    w = {"w.weight": torch.randn(3, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)}
    score = Score("single", group=4, block=8)
    (need,) = score.needs
    inverse = synthetic_fisher(need, w)
    from secateur.types import Weight

    shares = score(w, {need: inverse})["w.weight"]
    units = Block(rows=1, cols=4, reduce_by="sum").reduce(Weight("w.weight", (3, 8)), shares)
    flat = w["w.weight"].flatten()
    for unit in range(6):
        own = inverse["w.weight"][unit // 2][4 * (unit % 2) : 4 * (unit % 2) + 4, 4 * (unit % 2) : 4 * (unit % 2) + 4]
        part = flat[4 * unit : 4 * unit + 4]
        assert float(units[unit]) == pytest.approx(float(0.5 * part @ torch.linalg.solve(own, part)), rel=1e-10)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"order": "single", "group": 3}, "must divide block=64"),
        ({"order": "greedy", "group": 4}, "needs order='single'"),
        ({"order": "single", "group": 0}, "group must be a whole number of at least 1, got 0"),
    ],
)
def test_groups_that_fit_nothing(options: dict[str, Any], what: str) -> None:
    with pytest.raises(PatternError, match=what):
        Score(**options)


def test_a_group_across_rows_is_refused() -> None:
    model = nn.Linear(6, 4)
    method = Method(target=Target("sparsity", 0.5), score=Score("single", group=4))
    before = model.weight.detach().clone()
    with pytest.raises(PatternError, match=r"group=4 does not divide the last dimension of weight, of shape \(4, 6\)"):
        prune_(model, method, loss_fn=lambda m, b: m(b).mean(), batches=[torch.randn(8, 6)])
    assert torch.equal(model.weight, before)


def test_what_it_needs_is_said_before_anything_is_done() -> None:
    for method in (
        Method(target=Target("sparsity", 0.5), score=Score()),
        Method(target=Target("sparsity", 0.5), solver=Solver()),
    ):
        with pytest.raises(MissingStatsError, match=r"OptimalBrainSurgeon.*pass batches.*and loss_fn"):
            prune_(nn.Linear(4, 4), method)
    with pytest.raises(RecipeError, match=r"prune\.solver OptimalBrainSurgeon.*exclude each other"):
        Method(target=Target("sparsity", 0.5), solver=Solver(), pattern=Channel(coupled=True))


def test_cutting_out_takes_no_solver() -> None:
    method = Method(target=Target("channels", 0.5), solver=Solver(), pattern=Channel())
    with pytest.raises(RecipeError, match=r"prune\.solver OptimalBrainSurgeon.*cut out"):
        make_plan(nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)), method, torch.randn(2, 4))


def test_one_matrix_serves_score_and_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    collected = []
    real = InverseFisher.collect
    monkeypatch.setattr(InverseFisher, "collect", lambda self, s: collected.append(self) or real(self, s))
    model, x, y = regression()
    method = Method(target=Target("sparsity", 0.5), score=Score(**EXACT), solver=Solver(**EXACT))
    prune_(model, method, loss_fn=rows, batches=[(x, y)])
    assert len(collected) == 1


def test_a_recipe_names_the_solver(tmp_path: Path) -> None:
    recipe = from_dict(
        {
            "name": "surgeon",
            "model": {"factory": "secateur.zoo:digits_cnn"},
            "data": {"factory": "secateur.zoo:digits"},
            "prune": {
                "target": {"sparsity": 0.9},
                "score": {"name": "optimal_brain_surgeon", "block": 32},
                "solver": {"name": "optimal_brain_surgeon", "block": 32},
            },
        }
    )
    assert recipe.prune.build().solver == Solver(block=32)
    assert from_dict(recipe.to_dict()) == recipe
    with pytest.raises(RecipeError, match=r"prune\.solver: unknown solver 'optimal_brain_surgery'; did you mean"):
        from_dict(recipe.to_dict() | {"prune": {"target": {"sparsity": 0.9}, "solver": "optimal_brain_surgery"}})
