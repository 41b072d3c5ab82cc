"""Where a run stands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Position:
    """Where a run stands: everything in it is a plain number, and it travels in the checkpoint."""

    stage: int = 0
    epoch: int = 0
    batch: int = 0
    epochs_done: int = 0
    steps_done: int = 0
    loss_sum: float = 0.0
    seen: int = 0
    log_size: int = 0
    seconds: float = 0.0
    started: str = ""
