"""The laws of dynamics."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.testing._common import random_tensor, require
from secateur.testing.oracles import select_k
from secateur.types import Connections, Dynamics, Masks, Move, Tensors, Turn

_SHAPES: Mapping[str, tuple[int, ...]] = {"a": (4, 5), "b": (3, 2, 2), "one": (1, 1), "zero": (2, 6)}
_FINAL = 0.7
_LONGEST = 200


def check_dynamics(dynamics: Dynamics) -> None:
    """Check the laws of dynamics on four small weights, one of a single element and one of zeros.

    Masks hold exactly what their level says; what comes back is forgotten by the optimizer; dynamics that start sparse
    leave each weight as many units as it had; the last move ends at the target; and an update is a pure function.

    Args:
        dynamics: The dynamics.

    Raises:
        AssertionError: When a law is broken.
    """
    last = dynamics.last
    require(dynamics.unit in ("steps", "epochs"), dynamics, f"counts {dynamics.unit!r}")
    require(not dynamics.due(0), dynamics, "is due at 0, before the first step")
    if last is None:
        require(any(map(dynamics.due, range(1, _LONGEST))), dynamics, "is never due")
    else:
        require(last == 0 or dynamics.due(last), dynamics, f"is not due at {last}, its last time")
        require(not any(map(dynamics.due, range(last + 1, last + 200))), dynamics, f"is due after {last}, its last")
    weights = {name: random_tensor(s, i) for i, (name, s) in _numbered()}
    weights["zero"].zero_()
    masks = _choose(weights, {}, _FINAL) if dynamics.sparse_start else {}
    level = _FINAL if dynamics.sparse_start else 0.0
    for time in range(1, (_LONGEST if last is None else last) + 1):
        if not dynamics.due(time):
            continue
        move = _move(dynamics, time, weights, masks)
        _check_move(dynamics, f"at {time}", masks, move)
        masks, level = move.masks, move.level
        for name, weight in weights.items():
            gone = move.zero.get(name, torch.zeros(())).bool() | ~masks.get(name, torch.ones(())).bool()
            noise = random_tensor(weight.shape, time) * 0.1
            trained = weight.masked_fill(gone, 0.0) + noise * (name != "zero")
            weights[name] = trained.masked_fill(~masks.get(name, torch.ones(())).bool(), 0.0)
    require(last is None or level == _FINAL, dynamics, f"ends at level {level}, asked for {_FINAL}")


def _numbered() -> list[tuple[int, tuple[str, tuple[int, ...]]]]:
    return list(enumerate(_SHAPES.items()))


def _kept(level: float) -> int:
    total = sum(torch.Size(s).numel() for s in _SHAPES.values())
    return total - round(level * total)


def _choose(weights: Tensors, masks: Tensors, level: float) -> Masks:
    """Select globally by magnitude; what is masked ranks last."""
    scores = {n: w.abs().masked_fill(~masks.get(n, torch.ones(())).bool(), -1.0).flatten() for n, w in weights.items()}
    kept = select_k({name: s.tolist() for name, s in scores.items()}, _kept(level))
    return {name: torch.tensor(flags).view(_SHAPES[name]) for name, flags in kept.items()}


def _move(dynamics: Dynamics, time: int, weights: Tensors, masks: Masks) -> Move:
    """Update twice, from the same turn, which must not change."""
    noise = {name: random_tensor(s, 99 + i) for i, (name, s) in _numbered()}
    units = {
        name: Connections(
            weight.abs().flatten(),
            masks.get(name, torch.ones(weight.shape, dtype=torch.bool)).flatten(),
            noise[name].abs().flatten() if "gradients" in dynamics.needs else torch.empty(0),
        )
        for name, weight in weights.items()
    }
    before = {name: (u.sizes.clone(), u.active.clone(), u.gradients.clone()) for name, u in units.items()}
    turn = Turn(
        time,
        _FINAL,
        units if "units" in dynamics.needs else {},
        lambda level: _choose(weights, masks, level),
        lambda tensors: {name: tensors[name].flatten() for name in _SHAPES},
        lambda tensors: {name: tensors[name].view(_SHAPES[name]) for name in _SHAPES},
    )
    move, again = dynamics.update(turn), dynamics.update(turn)
    for one, two in zip(_tables(move), _tables(again), strict=True):
        same = one.keys() == two.keys() and all(torch.equal(m, two[n]) for n, m in one.items())
        require(same, dynamics, f"at {time}: a second call gives another move")
    for name, u in units.items():
        kept = all(map(torch.equal, before[name], (u.sizes, u.active, u.gradients)))
        require(kept, dynamics, f"at {time}: changes its turn")
    return move


def _tables(move: Move) -> tuple[Masks, Masks, Masks]:
    return move.masks, move.zero, move.clear


def _check_move(dynamics: Dynamics, at: str, before: Masks, move: Move) -> None:
    for table in _tables(move):
        odd = {n: (tuple(m.shape), m.dtype) for n, m in table.items()}
        fits = all(_SHAPES.get(n) == shape and dtype == torch.bool for n, (shape, dtype) in odd.items())
        require(fits, dynamics, f"{at}: masks that fit no weight among {odd}")
    require(0.0 <= move.level <= _FINAL, dynamics, f"{at}: level {move.level}, beyond the target's {_FINAL}")
    counts = {name: int(_mask(move.masks, name).sum()) for name in _SHAPES}
    require(
        sum(counts.values()) == _kept(move.level),
        dynamics,
        f"{at}: keeps {sum(counts.values())} units, and level {move.level} says {_kept(move.level)}",
    )
    for name in _SHAPES:
        back = _mask(move.masks, name) & ~_mask(before, name)
        forgotten = torch.ones_like(back) if move.restart else move.clear.get(name, torch.zeros_like(back))
        require(not bool((back & ~forgotten).any()), dynamics, f"{at}: {name} comes back with its old momentum")
        if dynamics.sparse_start:
            had = int(_mask(before, name).sum())
            require(counts[name] == had, dynamics, f"{at}: {name} has {counts[name]} units and had {had}")


def _mask(masks: Masks, name: str) -> Tensor:
    return masks.get(name, torch.ones(_SHAPES[name], dtype=torch.bool))
