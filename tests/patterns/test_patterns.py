"""Layouts against explicit loops over a module's indices; order, padding and refusals by hand."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from secateur.errors import PatternError, SecateurError
from secateur.patterns import NM, Block, Channel, Unstructured
from secateur.prunable import find_prunable
from secateur.testing import LAYOUTS
from secateur.types import Weight


def described(module: nn.Module) -> tuple[Weight, Tensor]:
    found = find_prunable(module).weights["weight"]
    return found, torch.randn(found.shape, generator=torch.Generator().manual_seed(0))


MODULES = {
    "linear": nn.Linear(5, 4),
    "conv1d": nn.Conv1d(4, 6, 3),
    "conv2d": nn.Conv2d(4, 6, (3, 2)),
    "conv3d": nn.Conv3d(2, 3, (1, 2, 3)),
    "grouped": nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": nn.Conv2d(4, 8, 3, groups=4),
    "transposed": nn.ConvTranspose2d(4, 6, (2, 3)),
    "transposed 1-D": nn.ConvTranspose1d(3, 5, 4),
    "grouped transposed": nn.ConvTranspose2d(4, 6, 2, groups=2),
    "grouped transposed 3-D": nn.ConvTranspose3d(6, 9, (1, 2, 1), groups=3),
}


def outputs_fed_by(module: nn.Module, index: tuple[int, ...]) -> set[int]:
    """Output units that one weight reaches, found by running the module with that weight alone."""
    with torch.no_grad():
        module.weight.zero_()
        module.weight[index] = 1.0
    size = [3 + k for k in getattr(module, "kernel_size", ())]
    inputs = torch.ones(1, module.weight.shape[1], *[]) if not size else torch.ones(1, module.in_channels, *size)
    out = (
        nn.functional.linear(inputs, module.weight)
        if not size
        else module(inputs) - module.bias.view(-1, *[1] * len(size))
    )
    return {c for c in range(out.shape[1]) if bool(out[0, c].abs().max() > 1e-6)}


@pytest.mark.parametrize("name", MODULES)
def test_channel_units_are_what_the_module_computes(name: str) -> None:
    module = MODULES[name]
    weight, _ = described(module)
    units = Channel().reduce(weight, torch.zeros(weight.shape)).numel()
    for unit in range(units):
        alone = torch.zeros(units, dtype=torch.bool)
        alone[unit] = True
        masks = Channel().expand(weight, alone)
        mask = masks[weight.name]
        reached = [outputs_fed_by(module, tuple(i)) for i in mask.nonzero()[:4].tolist()]
        assert reached == [{unit}] * len(reached)
        assert masks["bias"].nonzero().flatten().tolist() == [unit]
    assert units == (module.out_features if name == "linear" else module.out_channels)


def test_channel_scores_by_hand() -> None:
    weight = Weight("w", (2, 1, 2, 2))
    values = torch.tensor([1.0, 2.0, 3.0, 6.0, -4.0, 0.0, 0.0, 0.0]).view(2, 1, 2, 2)
    want = {"mean": [3.0, -1.0], "sum": [12.0, -4.0], "max": [6.0, 0.0], "l2": [50**0.5 / 2, 2.0]}
    for how, scores in want.items():
        torch.testing.assert_close(Channel(how).reduce(weight, values), torch.tensor(scores))


def test_channel_without_bias_masks_the_weight_alone() -> None:
    assert set(Channel().expand(Weight("w", (3, 2)), torch.ones(3, dtype=torch.bool))) == {"w"}


def blocks_of(weight: Weight, rows: int, cols: int) -> list[list[tuple[int, ...]]]:
    """Blocks of a plain (out, in, *kernel) weight by nested loops: block row, kernel position, block column."""
    outputs, inputs, *kernel = weight.shape
    blocks = []
    for top in range(0, outputs, rows):
        for position in itertools.product(*map(range, kernel)):
            for left in range(0, inputs, cols):
                o_range, i_range = range(top, min(top + rows, outputs)), range(left, min(left + cols, inputs))
                blocks.append([(o, i, *position) for o in o_range for i in i_range])
    return blocks


PLAIN = [
    "linear",
    "linear of odd sizes",
    "one unit",
    "one row",
    "one column",
    "conv1d",
    "conv2d",
    "conv3d",
    "grouped conv",
]


@pytest.mark.parametrize("layout", PLAIN)
@pytest.mark.parametrize(("rows", "cols"), [(4, 1), (1, 4), (2, 3), (3, 2), (16, 16)])
def test_blocks_are_nested_loops(layout: str, rows: int, cols: int) -> None:
    weight = LAYOUTS[layout]
    values = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 2.0
    blocks = blocks_of(weight, rows, cols)
    elements = [torch.stack([values[index] for index in block]) for block in blocks]
    reductions = {
        "mean": lambda v: v.mean(),
        "sum": lambda v: v.sum(),
        "max": lambda v: v.max(),  # all negative here: padding must not win
        "l2": lambda v: v.square().mean().sqrt(),
    }
    for how, reduction in reductions.items():
        got = Block(rows, cols, how).reduce(weight, values)
        torch.testing.assert_close(got, torch.stack([reduction(v) for v in elements]))
    sizes = torch.as_tensor(Block(rows, cols).sizes(weight)).expand(len(blocks))
    assert sizes.tolist() == [len(block) for block in blocks]
    kept = torch.arange(len(blocks)) % 3 == 0
    mask = Block(rows, cols).expand(weight, kept)[weight.name]
    want = {index for block, keep in zip(blocks, kept.tolist(), strict=True) if keep for index in block}
    assert {tuple(i) for i in mask.nonzero().tolist()} == want


@pytest.mark.parametrize(
    "layout", ["linear", "conv1d", "conv2d", "conv3d", "grouped conv", "input first", "transposed conv"]
)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (3, 4)])
def test_nm_keeps_n_of_every_m_consecutive_inputs(layout: str, n: int, m: int) -> None:
    weight = LAYOUTS[layout]
    values = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    inputs = weight.shape[weight.in_dim]
    if inputs % m:
        with pytest.raises(PatternError, match=rf"{weight.name}: {n}:{m} .*multiple of {m}"):
            NM(n, m).check(weight)
        return
    scores = NM(n, m).reduce(weight, values)
    kept = NM(n, m).select(weight, scores, scores.numel() * n // m)
    mask = NM(n, m).expand(weight, kept)[weight.name].movedim(weight.in_dim, -1)
    values = values.movedim(weight.in_dim, -1)
    for line, flags in zip(values.reshape(-1, inputs).tolist(), mask.reshape(-1, inputs).tolist(), strict=True):
        for start in range(0, inputs, m):
            best = sorted(range(start, start + m), key=lambda i: line[i])[m - n :]
            assert {i for i in range(start, start + m) if flags[i]} == set(best)


def test_nm_ties_lose_the_lowest_index_in_every_group() -> None:
    weight = Weight("w", (2, 8))
    kept = NM(1, 4).select(weight, torch.zeros(16), 4)
    assert kept.nonzero().flatten().tolist() == [3, 7, 11, 15]


def test_nm_has_no_other_density() -> None:
    weight = Weight("w", (2, 8))
    for keep in (0, 7, 9, 16):
        with pytest.raises(PatternError, match=rf"2:4 keeps 8 of 16, asked for {keep}"):
            NM(2, 4).select(weight, torch.zeros(16), keep)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (-1, 4), (1, 0)])
def test_nm_refuses_impossible_numbers(n: int, m: int) -> None:
    with pytest.raises(PatternError, match=f"{n}:{m}"):
        NM(n, m)


def test_nm_counts_the_inputs_of_one_group() -> None:
    """A grouped convolution with 8 channels in 4 groups has 2 inputs per output, transposed or not."""
    for module in (nn.Conv2d(8, 8, 1, groups=4), nn.ConvTranspose2d(8, 8, 1, groups=4)):
        with pytest.raises(PatternError, match="got 2"):
            NM(2, 4).check(described(module)[0])


@pytest.mark.parametrize(("rows", "cols"), [(0, 1), (1, 0), (-4, 1)])
def test_block_refuses_empty_sides(rows: int, cols: int) -> None:
    with pytest.raises(PatternError, match=f"{rows}×{cols}"):
        Block(rows, cols)


@pytest.mark.parametrize("pattern", [Block, Channel])
def test_an_unknown_reduction_is_refused(pattern: type) -> None:
    with pytest.raises(SecateurError, match="avg"):
        pattern(reduce_by="avg")


@pytest.mark.parametrize("pattern", [Block(1, 4, "l2"), Channel("l2")], ids=str)
@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_l2_survives_squares_outside_float32(pattern: Block | Channel, scale: float) -> None:
    """Scores such as w·g of a converged network are small; their squares must not all become the same zero."""
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 4.0, 4.0, 4.0], [1.0, 1.0, 1.0, 1.0]]) * scale
    scores = pattern.reduce(Weight("w", (3, 4)), values)
    assert scores.argsort().tolist() == [2, 0, 1]
    assert bool(torch.isfinite(scores).all())


def test_unstructured_is_the_flat_index() -> None:
    weight = Weight("w", (2, 2, 2))
    values = torch.arange(8.0).view(2, 2, 2)
    assert Unstructured().reduce(weight, values).tolist() == list(range(8))
    kept = torch.arange(8) > 5
    assert Unstructured().expand(weight, kept)["w"][1, 1].all()


def test_masks_do_not_share_memory_with_the_flags() -> None:
    """Masks outlive selection; two of them in one storage would change together."""
    weight = Weight("w", (2, 4), bias="b")
    for pattern in (Channel(), Block(1, 2)):
        kept = pattern.select(weight, pattern.reduce(weight, torch.randn(2, 4)), 1)
        masks = pattern.expand(weight, kept)
        before = {name: mask.clone() for name, mask in masks.items()}
        kept.logical_not_()
        assert all(torch.equal(masks[name], mask) for name, mask in before.items())
        assert all(mask.is_contiguous() for mask in masks.values())
