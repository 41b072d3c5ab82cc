"""Erdős–Rényi densities and given proportions, against the plain loop of the papers and by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.allocate import ErdosRenyi, ErdosRenyiKernel, Layerwise, Proportions
from secateur.errors import TargetError
from secateur.method import Method, Override
from secateur.patterns import Block, Channel
from secateur.prunable import find_prunable
from secateur.pruner import prune_
from secateur.schedules import cubic
from secateur.scores import Magnitude, Random
from secateur.targets import Target
from secateur.types import Units, Weight

SHAPES = st.lists(st.lists(st.integers(1, 12), min_size=2, max_size=5).map(tuple), min_size=1, max_size=5)


def problem(shapes: dict[str, tuple[int, ...]], floor: int = 0) -> dict[str, Units]:
    return {n: Units(torch.zeros(math.prod(s)), 1.0, floor, shape=s) for n, s in shapes.items()}


def densities(shapes: dict[str, tuple[int, ...]], kept: float, *, kernel: bool) -> dict[str, float]:
    """The published loop: solve for epsilon, set the densest layer that passes one dense, solve again."""
    raw = {n: (sum(s) / math.prod(s) if kernel else sum(s[:2]) / math.prod(s[:2])) for n, s in shapes.items()}
    numel = {n: math.prod(s) for n, s in shapes.items()}
    dense: set[str] = set()
    while True:
        room = kept - sum(numel[n] for n in dense)
        others = [n for n in shapes if n not in dense]
        if not others:
            return dict.fromkeys(shapes, 1.0)
        epsilon = room / sum(raw[n] * numel[n] for n in others)
        highest = max(raw[n] for n in others)
        if epsilon * highest <= 1.0 + 1e-12:
            return {n: 1.0 if n in dense else epsilon * raw[n] for n in shapes}
        dense |= {n for n in others if raw[n] == highest}


@settings(max_examples=150, deadline=None, database=None)
@given(SHAPES, st.floats(0.0, 1.0), st.booleans())
def test_the_published_densities_to_one_unit_and_the_exact_total(
    found: list[tuple[int, ...]], density: float, kernel: bool
) -> None:
    shapes = {f"w{i}": s for i, s in enumerate(found)}
    total = sum(math.prod(s) for s in found)
    kept = round(density * total)
    counts = (ErdosRenyiKernel() if kernel else ErdosRenyi())(problem(shapes), kept)
    assert sum(counts.values()) == kept
    wanted = densities(shapes, kept, kernel=kernel)
    # One common factor settles the total by rounding; it moves no layer by more than that over all of them.
    loose = len(shapes) / 2 + 1
    assert all(abs(counts[n] - wanted[n] * math.prod(s)) <= loose for n, s in shapes.items())


def test_resnet_like_densities_by_the_published_loop() -> None:
    """Large layers, where rounding cannot hide an error: to one unit in thousands."""
    shapes = {"conv1": (64, 3, 7, 7), "a": (64, 64, 1, 1), "b": (64, 64, 3, 3), "c": (512, 512, 3, 3), "fc": (100, 512)}
    total = sum(math.prod(s) for s in shapes.values())
    for sparsity in (0.5, 0.8, 0.9, 0.95, 0.99):
        kept = total - round(sparsity * total)
        counts = ErdosRenyiKernel()(problem(shapes), kept)
        wanted = densities(shapes, kept, kernel=True)
        assert sum(counts.values()) == kept
        assert all(abs(counts[n] - wanted[n] * math.prod(s)) <= 1.0 for n, s in shapes.items()), sparsity
    assert counts["conv1"] < math.prod(shapes["conv1"])
    half = ErdosRenyiKernel()(problem(shapes), total // 2)
    assert {n for n in shapes if half[n] == math.prod(shapes[n])} == {"conv1", "a", "fc", "b"}


@settings(max_examples=60, deadline=None, database=None)
@given(SHAPES, st.data())
def test_never_gives_back(found: list[tuple[int, ...]], data: st.DataObject) -> None:
    shapes = {f"w{i}": s for i, s in enumerate(found)}
    more = data.draw(st.integers(1, sum(math.prod(s) for s in found)))
    for allocate in (ErdosRenyi(), ErdosRenyiKernel()):
        before, after = allocate(problem(shapes), more), allocate(problem(shapes), more - 1)
        assert all(after[n] <= before[n] for n in shapes)


def test_a_linear_layer_is_the_same_to_both() -> None:
    units = problem({"a": (10, 20), "b": (300, 40), "c": (7, 300)})
    assert ErdosRenyi()(units, 900) == ErdosRenyiKernel()(units, 900)


def test_the_sizes_of_every_layout() -> None:
    layers = {
        "linear": (nn.Linear(5, 7), (7, 5)),
        "conv1d": (nn.Conv1d(6, 4, 3, groups=2), (4, 3, 3)),
        "conv3d": (nn.Conv3d(2, 4, (1, 2, 3)), (4, 2, 1, 2, 3)),
        "transposed": (nn.ConvTranspose2d(6, 4, (3, 2)), (4, 6, 3, 2)),
        "bilinear": (nn.Bilinear(2, 3, 4), (4, 3, 2)),
    }
    for name, (layer, sizes) in layers.items():
        (weight,) = find_prunable(nn.ModuleDict({name: layer})).weights.values()
        assert weight.sizes == sizes
    assert Weight("c_fc.weight", (4, 6), 1, 0).sizes == (6, 4)


@pytest.mark.parametrize("pattern", [Channel(), Block(2, 2)], ids=str)
def test_larger_units_get_the_same_densities(pattern: Channel | Block) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 32, 3), nn.Conv2d(32, 128, 1), nn.Flatten(), nn.Linear(512, 256))
    method = Method(target=Target("sparsity", 0.8), pattern=pattern, allocate=ErdosRenyiKernel())
    report = prune_(model, method).report
    shapes = {row.name: row.shape for row in report.layers}
    wanted = densities(shapes, sum(row.kept for row in report.layers), kernel=True)
    for row in report.layers:
        unit = 4 if isinstance(pattern, Block) else math.prod(row.shape[1:])
        # What layers of coarse units miss or exceed, the others get.
        assert abs(row.kept - wanted[row.name] * row.total) <= 2 * max(unit, 512), row.name


def test_units_without_dimensions_share_one_density() -> None:
    units = {name: Units(torch.zeros(n), 1.0, 1) for name, n in {"a": 60, "b": 20, "c": 5}.items()}
    assert ErdosRenyiKernel()(units, 34) == Layerwise()(units, 34)


# --- proportions -----------------------------------------------------------------------------------------------------


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.Flatten(), nn.Linear(32, 10))


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.77, 0.98])
@pytest.mark.parametrize("from_masks", [True, False])
def test_random_with_the_same_layerwise_proportions(sparsity: float, from_masks: bool) -> None:
    target = Target("sparsity", sparsity)
    judged = prune_(net(), Method(target=target, score=Magnitude()))
    allocate = Proportions.like(judged.masks if from_masks else judged.report)
    control = prune_(net(), Method(target=target, score=Random(0), allocate=allocate))
    assert [row.kept for row in control.report.layers] == [row.kept for row in judged.report.layers]
    if sparsity > 0.0:
        assert any(not torch.equal(control.masks[n], m) for n, m in judged.masks.items())


def test_proportions_at_another_total_keep_their_ratios() -> None:
    units = {name: Units(torch.zeros(n), 1.0, 0) for name, n in {"a": 100, "b": 100, "c": 100}.items()}
    allocate = Proportions({"a": 0.1, "b": 0.2, "c": 0.4})
    assert allocate(units, 35) == {"a": 5, "b": 10, "c": 20}
    assert allocate(units, 200) == {"a": 33, "b": 67, "c": 100}  # c is full at 2.5 times, the others go on
    assert allocate(units, 300) == {"a": 100, "b": 100, "c": 100}


def test_a_layer_that_lost_everything_comes_last() -> None:
    units = {name: Units(torch.zeros(10), 1.0, 0) for name in "ab"}
    allocate = Proportions((("a", 0.0), ("b", 0.5)))
    assert allocate(units, 5) == {"a": 0, "b": 5}
    assert allocate(units, 10) == {"a": 0, "b": 10}
    assert allocate(units, 12) == {"a": 2, "b": 10}


def test_proportions_refuse_what_they_do_not_know() -> None:
    with pytest.raises(TargetError, match=r"no density for 'b' \(1 of 2"):
        Proportions({"a": 0.5})({n: Units(torch.zeros(3), 1.0) for n in "ab"}, 2)
    for bad in ({"a": 1.5}, {"a": math.nan}, {"a": -0.1}):
        with pytest.raises(TargetError, match=r"'a' must lie in \[0, 1\]"):
            Proportions(bad)
    with pytest.raises(TargetError, match="pairs of a name and a number"):
        Proportions("half")


def test_the_rule_that_spares_the_first_and_last_layer_is_two_overrides() -> None:
    """Uniform+: the first convolution dense, the last layer at least 20 % kept, one density for the others."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 64, 3), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(64, 50)
    )
    method = Method(
        target=Target("sparsity", 0.9),
        score=Random(0),
        allocate=Layerwise(),
        overrides=(Override("0", 0.0), Override("4", 0.8)),
        schedule=cubic(begin=0, end=4),
    )
    report = prune_(model, method).report
    rows = {row.name: row for row in report.layers}
    assert rows["0.weight"].sparsity == 0.0
    assert rows["4.weight"].kept == 640
    assert rows["1.weight"].sparsity == pytest.approx(rows["2.weight"].sparsity, abs=1e-3)
    assert abs(report.achieved - 0.9) < 1e-5
