"""The laws of solvers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from secateur.testing._common import require
from secateur.testing.score_laws import DTYPES, synthetic_stats
from secateur.types import Need, Solver, Stats, Tensors

MakeStats = Callable[[frozenset[Need], Tensors], Stats]


def check_solver(
    solver: Solver, *, make_stats: MakeStats = synthetic_stats, dtypes: Sequence[torch.dtype] = DTYPES
) -> None:
    """Check the laws of solvers.

    Shapes and types stay; what is masked is zero and what is left finite; nothing changes when nothing goes; a solver
    is pure, and blind to the order of the dict. Weights may also have gone before: they are zero, and stay so.

    Args:
        solver: The solver.
        make_stats: Makes the statistics that it needs.
        dtypes: Dtypes of the weights to try.

    Raises:
        AssertionError: When a law is broken.
    """
    require(isinstance(solver.needs, frozenset), solver, f"needs must be a frozenset, got {solver.needs!r}")
    shapes = {"b.weight": (3, 5), "a.weight": (4, 3, 3, 2), "zero.weight": (2, 3), "one.weight": (1, 1)}
    for dtype in dtypes:
        generator = torch.Generator().manual_seed(0)
        weights = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
        weights["zero.weight"].zero_()
        weights["strided.weight"] = torch.randn(4, 6, generator=generator).to(dtype).t()
        before = {name: torch.rand(w.shape, generator=generator) < 0.7 for name, w in weights.items()}
        masks = {name: torch.rand(w.shape, generator=generator) < 0.5 for name, w in weights.items()}
        everything = {name: torch.ones_like(mask) for name, mask in masks.items()}
        stats = make_stats(solver.needs, weights)
        _check_solved(solver, weights, masks, stats, f"{dtype}")
        thinned = {name: w * before[name] for name, w in weights.items()}
        fewer = {name: masks[name] & before[name] for name in masks}
        _check_solved(solver, thinned, fewer, stats, f"{dtype}, some gone before")
        nothing = {name: ~mask for name, mask in everything.items()}
        _check_solved(solver, weights, nothing, stats, f"{dtype}, all gone")
        for kept, of in ((everything, weights), (before, thinned)):
            same = solver.solve(of, kept, stats)
            for name, value in same.items():
                require(torch.equal(value, of[name]), solver, f"{dtype}, {name}: changes though nothing goes")


def _check_solved(solver: Solver, weights: Tensors, masks: Tensors, stats: Stats, where: str) -> None:
    kept = {n: w.clone() for n, w in weights.items()}, {n: m.clone() for n, m in masks.items()}
    out = solver.solve(weights, masks, stats)
    require(set(out) == set(weights), solver, f"{where}: returned {sorted(out)}, was given {sorted(weights)}")
    for name, w in weights.items():
        got, at = out[name], f"{where}, {name}"
        require(got.shape == w.shape and got.dtype == w.dtype, solver, f"{at}: {got.dtype}, {tuple(got.shape)}")
        require(bool(torch.isfinite(got).all()), solver, f"{at}: not finite on finite input")
        require(not bool(got[~masks[name]].count_nonzero()), solver, f"{at}: not zero where the mask is")
        require(torch.equal(w, kept[0][name]), solver, f"{at}: changed the weight")
        require(torch.equal(masks[name], kept[1][name]), solver, f"{at}: changed the mask")
    again = solver.solve(weights, masks, stats)
    turned = solver.solve(_turned(weights), _turned(masks), stats)
    for name, value in out.items():
        require(torch.equal(value, again[name]), solver, f"{where}, {name}: a second call gives other weights")
        require(torch.equal(value, turned[name]), solver, f"{where}, {name}: depends on the order of the dict")


def _turned(tensors: Tensors) -> dict[str, Tensor]:
    return dict(reversed(list(tensors.items())))
