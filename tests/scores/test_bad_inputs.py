"""Every score and solver on bad data: a typed refusal that changes nothing, or the right result."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur import Method, Target, prune_
from secateur.errors import MissingStatsError, PatternError, SecateurError, TargetError, WeightError
from secateur.patterns import NM
from secateur.scores import SCORES, Grasp, Karnin, Magnitude, OptimalBrainDamage, OptimalBrainSurgeon, WeightGradient
from secateur.solvers import SOLVERS
from secateur.stats import GaussNewtonDiagonal
from secateur.types import Source
from tests.cases import CASES, Case

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (24,), generator=torch.Generator().manual_seed(1))
BATCHES = [(X[:10], Y[:10]), (X[10:], Y[10:])]

WATCHING = ("karnin", "movement")
"""They look at a training, and at no batch."""

WITHOUT_DATA = ("random", "magnitude", "lamp", "synflow")


def cases(axis: str) -> list[Case]:
    return [case for case in CASES[axis] if case.name not in WATCHING and case.kwargs.get("gradients") != "output"]


PARTS = [("score", case) for case in cases("score")] + [("solver", case) for case in cases("solver")]
DATA = [(axis, case) for axis, case in PARTS if case.name not in WITHOUT_DATA]


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).to(dtype).train()


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def method(part: tuple[str, Case], sparsity: float = 0.5) -> Method:
    axis, case = part
    score = SCORES[case.name](**case.kwargs) if axis == "score" else Magnitude()
    solver = SOLVERS[case.name](**case.kwargs) if axis == "solver" else None
    return Method(target=Target("sparsity", sparsity), score=score, solver=solver, allow_empty=sparsity == 1.0)


def prune(part: tuple[str, Case], model: nn.Module, *, sparsity: float = 0.5, **given: Any) -> float:
    dtype = next(model.parameters()).dtype
    data = {"loss_fn": loss_fn, "batches": [(x.to(dtype), y) for x, y in BATCHES], "example_inputs": (X.to(dtype),)}
    return prune_(model, method(part, sparsity), **{**data, **given}).report.achieved


def each(parts: list[tuple[str, Case]]) -> Any:
    return pytest.mark.parametrize("part", parts, ids=lambda part: f"{part[0]}-{part[1]}")


def used_up() -> Callable[[], Iterator[Any]]:
    generator: Iterator[Any] = iter([])
    return lambda: generator


LOSSES: dict[str, tuple[Callable[..., Any], str]] = {
    "one per sample": (lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"), r"one number .* shape \(10,\)"),
    "a float": (lambda m, b: loss_fn(m, b).item(), "one number per batch, got float on batch 0"),
    "nothing": (lambda m, b: None, "one number per batch, got NoneType on batch 0"),
    "NaN": (lambda m, b: loss_fn(m, b) * torch.nan, "the loss is nan on batch 0; such a loss ranks nothing"),
    "without gradient": (lambda m, b: torch.ones(()), "no gradient|zero for every weight"),
    "zero": (lambda m, b: 0.0 * m(b[0]).sum(), "zero for every weight|every gradient is zero"),
    "of another signature": (lambda m: 1.0, r"fails on batch 0 .*TypeError: .* but 2 were given"),
    "a loss without a model": (F.cross_entropy, r"fails on batch 0 \(a tuple: \(10, 6\) of float32, \(10,\) of int64"),
}
BATCH: dict[str, tuple[Any, str]] = {
    "none": ([], "no batches"),
    "used up": (used_up(), "no batches"),
    "an iterator": (iter(BATCHES), "is an iterator"),
    "one tensor": (X, "got Tensor. For a single batch: batches="),
    "a number": (5, "got int"),
    "a function of nothing": (lambda: None, r"batches\(\) returns .* got NoneType"),
    "NaN in the second": ([BATCHES[0], (X * torch.nan, Y)], "the loss is nan on batch 1"),
    "no sample": ([(X[:0], Y[:0])], r"the loss is nan on batch 0, which has no samples|found tensors of \[0\] rows"),
    "labels of another dtype": ([(X, Y.int())], r"fails on batch 0 .*\(24,\) of int32\): RuntimeError: .*got Int"),
    "labels out of range": ([(X, Y + 3)], "fails on batch 0 .*IndexError: Target"),
    "inputs of another width": ([(X[:, :4], Y)], r"fails on batch 0 .*\(24, 4\) of float32.*cannot be multiplied"),
}


def refused(part: tuple[str, Case], match: str, model: nn.Module, **given: Any) -> None:
    model[3].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SecateurError, match=f"(?s){match}"):
        prune(part, model, **given)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    assert all(m.training for m in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, True, False, True]
    assert all(p.grad is None for p in model.parameters())


@each(DATA)
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_that_are_none(loss: str, part: tuple[str, Case]) -> None:
    refused(part, LOSSES[loss][1], network(), loss_fn=LOSSES[loss][0])


@each(DATA)
@pytest.mark.parametrize("batches", BATCH)
def test_batches_that_say_nothing(batches: str, part: tuple[str, Case]) -> None:
    refused(part, BATCH[batches][1], network(), batches=BATCH[batches][0])


@each(PARTS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_named_whatever_the_loss_says(value: float, part: tuple[str, Case]) -> None:
    model = network()
    with torch.no_grad():
        model[0].weight[1, 2] = value
    refused(part, "0.weight: 1 of 30 weights are NaN or infinite", model)


@each(PARTS)
def test_frozen_narrow_tied_and_counting_models(part: tuple[str, Case]) -> None:
    """All of them can be scored, and exactly as much goes as was asked for."""
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert prune(part, network(dtype)) == pytest.approx(22 / 45)
    frozen = network().requires_grad_(False)
    assert prune(part, frozen) == pytest.approx(22 / 45)
    alike = network()
    with torch.no_grad():
        for parameter in (alike[0].weight, alike[3].weight):
            parameter.copy_(torch.linspace(-1, 1, 5)[:, None] if parameter.shape[0] == 5 else torch.ones(3, 5))
        alike[3].bias.copy_(torch.arange(3.0))
    assert prune(part, alike, loss_fn=lambda m, b: m(b[0]).square().mean()) == pytest.approx(22 / 45)


@each(PARTS)
@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_nothing_and_everything(sparsity: float, part: tuple[str, Case]) -> None:
    model = network()
    dense = copy.deepcopy(model)
    assert prune(part, model, sparsity=sparsity) == sparsity
    for i in (0, 3):
        assert torch.equal(model[i].weight, dense[i].weight if not sparsity else torch.zeros_like(model[i].weight))


@each(DATA)
def test_buffers_are_put_back(part: tuple[str, Case]) -> None:
    """A forward that counts its calls in a buffer leaves no count; where it cannot be vectorised, that is said."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("last", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            out: Tensor = self.net(x)
            self.last = out.detach().mean(0)  # another tensor each time
            return out

    model = Counting()
    last = model.last
    try:
        prune(part, model)
    except MissingStatsError as error:
        assert "counters in buffers" in str(error)  # noqa: PT017  # some ways can, some cannot
    assert model.calls.item() == 0
    assert model.last is last
    assert not last.any()


@each([part for part in DATA if part[1].name not in ("brute_force",)])
def test_inference_mode(part: tuple[str, Case]) -> None:
    model = network()
    with torch.inference_mode():
        refused(part, "needs gradients, and torch.inference_mode", model)
        made = network()
    with pytest.raises(WeightError, match=r"0.weight: was made under torch.inference_mode\(\)"):
        prune(part, made)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gauss_newton_in_sixteen_bits_is_that_of_the_same_weights_in_float64(dtype: torch.dtype) -> None:
    """Its small matrices are taken apart in float32: half precision has no kernel for that, and few digits."""
    model = network(dtype).eval()
    wide = copy.deepcopy(model).double()
    found, wanted = (
        GaussNewtonDiagonal().collect(Source(m, {"0.weight": m[0].weight}, loss_fn, lambda t=t: [(X.to(t), Y)]))[
            "0.weight"
        ]
        for m, t in ((model, dtype), (wide, torch.float64))
    )
    assert float((found.double() - wanted).norm() / wanted.norm()) < 3e-2


def test_a_loss_without_a_second_derivative_is_no_failure_of_the_vectorising() -> None:
    model = network()

    def rooted(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (m(batch[0]) - m(batch[0]).detach()).abs().sqrt().mean()

    with pytest.raises(MissingStatsError, match=r"NaN or infinite: the loss has no derivative there|ran it 2 times"):
        prune_(
            model,
            Method(target=Target("sparsity", 0.5), score=OptimalBrainDamage(diagonal="gauss_newton")),
            loss_fn=rooted,
            batches=BATCHES,
        )


@pytest.mark.parametrize("damping", [0.0, 1e-300])
def test_a_singular_fisher_matrix_is_damped_by_name_or_refused(damping: float) -> None:
    """Ten gradients, thirty weights: the matrix has no inverse, and none is made up."""
    given: dict[str, Any] = {"loss_fn": loss_fn, "batches": [(X[:10], Y[:10])]}
    for score, solver in (
        (OptimalBrainSurgeon(damping=damping), None),
        (Magnitude(), SOLVERS["optimal_brain_surgeon"](damping=damping)),
    ):
        model = network()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(MissingStatsError, match=r"singular in block 0 of 0.weight.*Raise damping"):
            prune_(model, Method(target=Target("sparsity", 0.5), score=score, solver=solver), **given)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert prune_(
        network(), Method(target=Target("sparsity", 0.5), score=OptimalBrainSurgeon(damping=1e-2)), **given
    ).report.achieved == pytest.approx(22 / 45)


def test_one_weight_per_layer_and_layers_of_nothing() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net, self.none = network(), nn.Linear(0, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + self.none(x[:, :0])

    given: dict[str, Any] = {"loss_fn": loss_fn, "batches": BATCHES}
    pruned = prune_(Odd(), Method(target=Target("sparsity", 0.5), score=WeightGradient()), **given)
    assert pruned.report.skipped["none.weight"] == "empty"
    one = nn.Sequential(nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 1))
    mean = {"loss_fn": lambda m, b: m(b[0][:, :1]).square().mean(), "batches": BATCHES}
    with pytest.raises(TargetError, match=r"the highest sparsity .* is 0"):
        prune_(one, Method(target=Target("sparsity", 0.5), score=WeightGradient()), **mean)
    assert prune_(one, Method(target=Target("sparsity", 0.5), score=WeightGradient(), allow_empty=True), **mean)


WRONG: tuple[Callable[[Any], object], ...] = (
    lambda v: Grasp(temperature=v),
    lambda v: OptimalBrainSurgeon(damping=v),
    lambda v: OptimalBrainSurgeon(block=v),
    lambda v: OptimalBrainSurgeon(group=v),
    lambda v: SOLVERS["optimal_brain_surgeon"](damping=v),
    lambda v: SOLVERS["optimal_brain_surgeon"](block=v),
    lambda v: NM(v, 4),
    lambda v: NM(2, v),
)


@pytest.mark.parametrize("value", ["1", True, [1], torch.nan, 1e999, -1], ids=repr)
@pytest.mark.parametrize("make", WRONG)
def test_options_of_the_wrong_kind(make: Callable[[Any], object], value: Any) -> None:
    with pytest.raises(SecateurError, match=r"must be a|is not a pattern"):
        make(value)


def test_a_path_that_is_none() -> None:
    with pytest.raises(MissingStatsError, match="must be a number of at least 0, got 1000"):
        OptimalBrainSurgeon(damping=10**400)  # no float holds it
    with pytest.raises(MissingStatsError, match="path is a str: make path = PathIntegral"):
        _ = Karnin(path="run").needs  # type: ignore[arg-type]
    with pytest.raises(PatternError, match="5:4 is not a pattern"):
        NM(5, 4)
