"""What a collection of statistics is given, or a refusal that says what is missing; and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from secateur.errors import MissingStatsError
from secateur.stats._common import check_data
from secateur.stats.gradients import LossFn
from secateur.types import GroupScore, Need

Batches = Iterable[Any] | Callable[[], Iterable[Any]]


@dataclass
class Collected:
    """Statistics, and groups about which they say nothing.

    Attributes:
        stats: By statistic, then by member or by group.
        silent: Why there are none, by group.
    """

    stats: dict[Need, dict[str, Tensor]] = field(default_factory=dict)
    silent: dict[str, str] = field(default_factory=dict)


def needed(score: GroupScore, loss_fn: LossFn | None) -> LossFn:
    """Return the loss that a score needs.

    Raises:
        MissingStatsError: When nobody supplied one.
    """
    if loss_fn is None:
        raise MissingStatsError(f"{score} needs gradients: pass loss_fn=lambda model, batch: ... and batches=[...]")
    return loss_fn


def given(score: GroupScore, batches: Batches | None) -> Callable[[], Iterable[Any]]:
    """Return the batches that a score needs, as a function that begins them anew.

    Raises:
        MissingStatsError: When nobody supplied any, or an iterator, which ends for good.
    """
    if batches is None:
        raise MissingStatsError(f"{score} needs data: pass batches=[...]")
    check_data(None, batches)
    return batches if callable(batches) else lambda: batches
