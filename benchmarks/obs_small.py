"""The MONK's problems and XOR, for benchmarks/obs.py."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur import Method, Pruner, Target
from secateur.masks import apply_masks_
from secateur.schedules import linear
from secateur.scores import Magnitude, OptimalBrainSurgeon
from secateur.solvers import OptimalBrainSurgeon as Update
from secateur.stats.inverse_fisher import InverseFisher
from secateur.types import Need, Stats, Tensors

VALUES = (3, 3, 2, 3, 4, 2)
"""Values of the six attributes: 432 robots, 17 inputs one-hot."""
XOR_DECAY = 1e-4
XOR_ERROR = 1e-3
"""Half the mean squared error at which training on XOR ends."""
STARTS = 20
SEEDS = tuple(range(3))
PATIENCE = 3
"""Further weights that may go in the hope that a later network is right again."""


@dataclass(frozen=True)
class Problem:
    """A problem: its rule, and what is asked of a network."""

    name: str
    hidden: int
    examples: int
    noise: float
    train: float
    test: float
    decay: float = 1e-4


# Sebastian B. Thrun et al., The MONK's Problems: a Performance Comparison of Different Learning Algorithms, 1991.
PROBLEMS = (
    Problem("MONK 1", 3, 124, 0.0, 1.0, 1.0),
    Problem("MONK 2", 2, 169, 0.0, 1.0, 1.0),
    Problem("MONK 3", 4, 122, 0.05, 0.93, 0.97, decay=3e-3),
)


def robots(problem: Problem, seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return a random training set, with its noise, and all 432 robots."""
    attributes = torch.tensor(list(itertools.product(*[range(1, n + 1) for n in VALUES])))
    a = attributes.T
    rules = {
        "MONK 1": (a[0] == a[1]) | (a[4] == 1),
        "MONK 2": (attributes == 1).sum(1) == 2,
        "MONK 3": ((a[4] == 3) & (a[3] == 1)) | ((a[4] != 4) & (a[1] != 3)),
    }
    x = torch.cat([nn.functional.one_hot(column - 1, n) for column, n in zip(a, VALUES, strict=True)], 1).double()
    y = rules[problem.name].double()[:, None]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(x), generator=generator)[: problem.examples]
    labels = y[chosen].clone()
    wrong = torch.randperm(problem.examples, generator=generator)[: round(problem.noise * problem.examples)]
    labels[wrong] = 1.0 - labels[wrong]
    return (x[chosen], labels), (x, y)


class Net(nn.Module):
    """One hidden layer; the biases are weights of an input that is one, so that they can be pruned too."""

    def __init__(self, inputs: int, hidden: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.hidden = nn.Linear(inputs + 1, hidden, bias=False).double()
        self.out = nn.Linear(hidden + 1, 1, bias=False).double()
        nn.init.normal_(self.hidden.weight)
        nn.init.normal_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return one number in [0, 1] per row."""
        one = torch.ones_like(x[..., :1])
        h = torch.tanh(self.hidden(torch.cat([x, one], -1)))
        return torch.sigmoid(self.out(torch.cat([h, one], -1)))


def objective(net: nn.Module, x: Tensor, y: Tensor, decay: float) -> Tensor:
    """Half the mean squared error, and weight decay."""
    return 0.5 * (net(x) - y).square().mean() + 0.5 * decay * sum(p.square().sum() for p in net.parameters())


def train(net: nn.Module, data: tuple[Tensor, Tensor], steps: int, decay: float, masks: Tensors | None = None) -> float:
    """Minimise the objective by L-BFGS over the weights that stay."""
    parameters = dict(net.named_parameters())
    optimizer = torch.optim.LBFGS(parameters.values(), max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective(net, *data, decay)
        value.backward()  # type: ignore[no-untyped-call]
        for name, mask in (masks or {}).items():
            parameters[name].grad.mul_(mask)  # type: ignore[union-attr]
        return value

    optimizer.step(closure)
    apply_masks_(net, masks or {})
    return objective(net, *data, decay).item()


@torch.no_grad()
def accuracy(net: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    return ((net(data[0]) > 0.5) == (data[1] > 0.5)).double().mean().item()


@dataclass(frozen=True)
class Damage:
    """Optimal Brain Damage: half the curvature times the squared weight, by the Gauss-Newton diagonal."""

    fisher: InverseFisher

    @property
    def needs(self) -> frozenset[Need]:
        """The matrix, of which the diagonal is used."""
        return frozenset({self.fisher})

    def __call__(self, weights: Tensors, stats: Stats) -> dict[str, Tensor]:
        """Return the score."""
        return {name: 0.5 * h * weights[name].square() for name, h in stats[self.fisher].curvature().items()}


METHODS = ("OBS", "OBD", "magnitude")


def methods(decay: float) -> dict[str, tuple[Any, Any]]:
    """Return score and solver of each method, by the Gauss-Newton matrix of the objective, weight decay included."""
    options: dict[str, Any] = {"damping": decay, "relative": False, "gradients": "output"}
    return {
        "OBS": (OptimalBrainSurgeon("single", block=0, **options), Update(block=0, **options)),
        "OBD": (Damage(InverseFisher(None, **options)), None),
        "magnitude": (Magnitude(), None),
    }


def pruner_of(net: nn.Module, method: str, decay: float, x: Tensor, y: Tensor) -> Pruner:
    """Return a pruner that removes one weight each round."""
    score, solver = methods(decay)[method]
    total = sum(p.numel() for p in net.parameters())
    schedule = linear(begin=1, end=total - 1, unit="rounds", initial=1 / total)
    how = Method(Target("sparsity", (total - 1) / total), score, solver=solver, schedule=schedule, allow_empty=True)
    return Pruner(net, how, loss_fn=lambda model, batch: model(batch[0]), batches=[(x, y)])


def started(problem: Problem, seed: int, data: Any, everything: Any) -> tuple[Net, int]:
    """Train from new starts until the accuracy is reached (with noise, on the training set); else the best one."""
    best: tuple[float, Net] = (-1.0, Net(17, problem.hidden, 0))
    for start in range(STARTS):
        net = Net(17, problem.hidden, 1000 * seed + start)
        train(net, data, 400, problem.decay)
        got = accuracy(net, data), accuracy(net, everything)
        if got[0] >= problem.train and (got[1] >= problem.test or problem.noise):
            return net, start + 1
        if sum(got) > best[0]:
            best = (sum(got), net)
    return best[1], STARTS


def monks() -> list[dict[str, Any]]:
    """Prune every problem's networks by every method."""
    rows = []
    for problem in PROBLEMS:
        for seed in SEEDS:
            data, everything = robots(problem, seed)
            net, starts = started(problem, seed, data, everything)
            total = sum(p.numel() for p in net.parameters())
            dense = {"dense_train": accuracy(net, data), "dense_test": accuracy(net, everything)}
            for method, retrain in itertools.product(METHODS, (True, False)):
                small = copy.deepcopy(net)
                pruner, missed = pruner_of(small, method, problem.decay, *data), 0
                left: int | None = None
                ends = (accuracy(small, data), accuracy(small, everything))
                if ends[0] >= problem.train and ends[1] >= problem.test:
                    left = total
                while not pruner.finished and missed < PATIENCE:
                    pruner.prune()
                    if retrain:
                        train(small, data, 100, problem.decay, pruner.masks)
                    got = accuracy(small, data), accuracy(small, everything)
                    missed = missed + 1 if got[0] < problem.train else 0
                    if got[0] >= problem.train and got[1] >= problem.test:
                        left, ends = sum(int(m.sum()) for m in pruner.masks.values()), got
                row = {"problem": problem.name, "net": f"17-{problem.hidden}-1", "seed": seed, "method": method}
                row |= {"retrain": retrain, **dense}
                asked = f"{problem.train:.0%}, {problem.test:.0%}"
                row |= {"weights": total, "left": left, "starts": starts, "asked": asked}
                rows.append(row | {"train": ends[0], "test": ends[1]})
                print(rows[-1], flush=True)
    return rows


def xor(seeds: int = 10) -> list[dict[str, Any]]:
    """Compare the first weight that each method removes with brute force and retraining."""
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    data = (x, torch.tensor([[0.0], [1.0], [1.0], [0.0]], dtype=torch.float64))
    rows: list[dict[str, Any]] = []
    for seed in itertools.count():
        net = Net(2, 2, seed)
        if not _solve(net, data):
            continue
        after = _brute_force(net, data)
        spared = {place for place, (_, right) in after.items() if right}
        least = min(value for value, _ in after.values())
        if not 0 < len(spared) < len(after):
            continue  # nothing to be right or wrong about
        for method in METHODS:
            small = copy.deepcopy(net)
            pruner = pruner_of(small, method, XOR_DECAY, *data)
            pruner.prune()
            (first,) = [
                (name, i) for name, m in pruner.masks.items() for i in (~m).flatten().nonzero().flatten().tolist()
            ]
            row = {"seed": seed, "method": method, "spared": first in spared, "best": after[first][0] <= 1.001 * least}
            rows.append(row | {"can_go": len(spared), "loss": after[first][0], "best_loss": least})
        if len(rows) == seeds * len(METHODS):
            return rows
    raise AssertionError("unreachable")


def _solve(net: Net, data: tuple[Tensor, Tensor]) -> bool:
    """Train until the squared error is small, and not to the end, as backpropagation was; say whether it became so."""
    for _ in range(30):
        train(net, data, 5, XOR_DECAY)
        if 0.5 * (net(data[0]) - data[1]).square().mean().item() < XOR_ERROR:
            return True
    return False


def _brute_force(net: Net, data: tuple[Tensor, Tensor]) -> dict[tuple[str, int], tuple[float, bool]]:
    """Remove each weight, retrain, and return the loss and whether all answers are right."""
    out = {}
    for name, parameter in net.named_parameters():
        for i in range(parameter.numel()):
            masks = {n: torch.ones(p.shape, dtype=torch.bool) for n, p in net.named_parameters()}
            masks[name].view(-1)[i] = False
            small = copy.deepcopy(net)
            apply_masks_(small, masks)
            value = train(small, data, 300, XOR_DECAY, masks)
            out[name, i] = (value if math.isfinite(value) else math.inf, accuracy(small, data) == 1.0)
    return out
