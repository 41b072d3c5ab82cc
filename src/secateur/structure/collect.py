"""What group scores need beyond the weights: what a unit costs, and which statistics are collected where."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import MissingStatsError
from secateur.graph.choose import Removed
from secateur.graph.coupling import Coupling
from secateur.stats.gradients import LossFn
from secateur.stats.trajectory import HOW
from secateur.structure.collected import Batches, Collected, given, needed
from secateur.structure.parameter_stats import (
    ELEMENT_STATISTICS,
    UNIT_STATISTICS,
    collect_elements,
    collect_unit_gradients,
)
from secateur.structure.reader_stats import PRODUCT_STATISTICS, READER_STATISTICS, collect_of_readers
from secateur.types import GroupScore, OutputScore, Statistic, Stats

COST = "unit_macs"
"""Multiply-accumulates that the removal of one unit saves."""


def collect(
    model: nn.Module,
    coupling: Coupling,
    score: GroupScore,
    loss_fn: LossFn | None,
    batches: Batches | None,
    removed: Removed | None = None,
) -> Collected:
    """Collect what a score needs.

    Args:
        model: The model.
        coupling: Its groups.
        score: The score.
        loss_fn: Runs the model on one batch; see :func:`~secateur.structure.make_plan`.
        batches: The batches.
        removed: Units that are masked already.

    Returns:
        The statistics.

    Raises:
        MissingStatsError: When the score needs what nobody supplied, or the data gives none.
    """
    needs, out = score.needs, Collected()
    _check_known(score)
    if COST in needs:
        out.stats[COST] = unit_costs(coupling, removed)
    for need in sorted((n for n in needs if isinstance(n, Statistic)), key=repr):
        out.stats[need] = collect_elements(model, coupling, need, loss_fn, batches)
    gradients = frozenset(str(n) for n in needs & (UNIT_STATISTICS | ELEMENT_STATISTICS))
    if gradients:
        loss, data = needed(score, loss_fn), given(score, batches)
        out.stats.update(collect_unit_gradients(model, coupling, score, gradients, loss, data))
    if needs & READER_STATISTICS:
        read = collect_of_readers(model, coupling, score, loss_fn, given(score, batches))
        out.stats.update(read.stats)
        out.silent = read.silent
    return out


def check_needs(score: GroupScore, loss_fn: LossFn | None, batches: Batches | None) -> None:
    """Refuse, before anything is trained or collected, a score that needs what nobody supplied.

    Args:
        score: The score.
        loss_fn: Runs the model on one batch.
        batches: The batches.

    Raises:
        MissingStatsError: Says what is missing.
    """
    _check_known(score)
    uses = {use for n in score.needs if isinstance(n, Statistic) for use in n.uses}
    if "batches" in uses or any(isinstance(n, str) for n in score.needs - {COST}):
        given(score, batches)
    if "loss" in uses:
        needed(score, loss_fn)
    if "trajectory" in uses:
        raise MissingStatsError(f"{score} looks at what training did: {HOW}")
    by_loss = UNIT_STATISTICS | ELEMENT_STATISTICS
    if not isinstance(score, OutputScore):
        by_loss |= PRODUCT_STATISTICS
    if score.needs & by_loss:
        needed(score, loss_fn)


def _check_known(score: GroupScore) -> None:
    known = UNIT_STATISTICS | ELEMENT_STATISTICS | READER_STATISTICS | {COST}
    for need in score.needs - known:
        if not isinstance(need, Statistic):
            raise MissingStatsError(f"{score} needs {need!r}, which nothing here collects")
        if not need.elementwise:
            raise MissingStatsError(
                f"{score} needs {need}, which rates weights jointly and cannot be added up over coupled units; use an "
                "element score, or a pattern of single weights"
            )


def unit_costs(coupling: Coupling, removed: Removed | None = None) -> dict[str, Tensor]:
    """Return the multiply-accumulates that the removal of one unit saves, by group; all units of a group are alike.

    Args:
        coupling: The groups.
        removed: Units that have gone already.
    """
    before = np.zeros(coupling.units, dtype=bool) if removed is None else removed
    dense = coupling.macs(coupling.alive(before))
    out = {}
    for group in coupling.groups:
        without = before.copy()
        without[group.ids[~before[group.ids]][0]] = True
        saved = dense - coupling.macs(coupling.alive(without))
        out[group.name] = torch.full((group.units,), float(saved), dtype=torch.float64)
    return out


__all__ = ["Batches", "Collected", "Stats", "check_needs", "collect", "unit_costs"]
