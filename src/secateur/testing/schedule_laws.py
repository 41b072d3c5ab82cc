"""The laws of schedules."""

from __future__ import annotations

import math
from itertools import pairwise

from secateur.schedules import Schedule
from secateur.testing._common import require


def check_schedule(schedule: Schedule, *, updates: int | None = None, last: float | None = None) -> None:
    """Check that a schedule rises to exactly its final level, at increasing times, and never beyond it.

    Args:
        schedule: The schedule.
        updates: Number of updates expected, if known.
        last: Time of the last update expected, if known.

    Raises:
        AssertionError: When a law is broken.
    """
    n = schedule.updates
    require(updates is None or n == updates, schedule, f"has {n} updates, expected {updates}")
    times = [schedule.time(i) for i in range(n)]
    require(all(a < b for a, b in pairwise(times)), schedule, f"times do not increase: {times}")
    require(times[0] >= 0, schedule, f"starts at {times[0]}, before the clock")
    at_end = last is None or math.isclose(times[-1], last, rel_tol=1e-9, abs_tol=1e-9)
    require(at_end, schedule, f"the last update is at {times[-1]}, expected {last}")
    if schedule.unit != "rounds":
        steps = [schedule.step(i, 1000) for i in range(n)]
        require(steps == sorted(steps), schedule, f"steps go back: {steps}")
    for final in (0.0, 0.1, 0.3, 0.5, 2 / 3, 0.9, 0.999, 1.0):
        levels = [schedule.level(i, final) for i in range(n)]
        require(levels[-1] == final, schedule, f"ends at {levels[-1]}, asked for {final}")
        rising = all(b >= a - 1e-12 for a, b in pairwise(levels))
        require(rising, schedule, f"sparsity falls on the way to {final}: {levels}")
        require(levels[0] >= 0.0, schedule, f"starts below zero on the way to {final}: {levels[0]}")
        require(max(levels) <= final, schedule, f"goes beyond {final}: {max(levels)!r}")
