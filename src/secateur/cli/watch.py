"""What a person sees while something long goes on: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class _Rate(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.3g}/s" if task.speed else "", style="dim")


class Watch:
    """A listener for runs and other long work; use it as a context manager.

    Output goes to standard error, so that standard output holds results only. On a terminal it is one progress bar
    with rate and time left; elsewhere one plain line per event.

    Args:
        title: What is going on.
        quiet: Say nothing.
    """

    def __init__(self, title: str, *, quiet: bool = False) -> None:
        self._title, self._quiet = title, quiet
        self.console = Console(file=sys.stderr, highlight=False)
        self._live = self.console.is_terminal and not quiet
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self._live,
            transient=True,
        )
        self._task = self._progress.add_task(title, total=None)

    def __enter__(self) -> Watch:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def progress(self, done: int, total: int, text: str) -> None:
        """Move the bar."""
        if self._live:
            self._progress.update(self._task, completed=done, total=max(total, 1), description=text)

    def event(self, event: Mapping[str, Any]) -> None:
        """Print one line per event."""
        if self._quiet:
            return
        line = describe(event)
        if line:
            self.console.print(f"{self._title}: {line}", soft_wrap=True, markup=False)


def describe(event: Mapping[str, Any]) -> str:
    """Say in one line what an event of ``metrics.jsonl`` means."""
    kind = event["event"]
    if kind == "epoch":
        figures = "  ".join(f"{name} {value:.4f}" for name, value in event["metrics"].items())
        phase = event["phase"] if event["round"] is None else f"{event['phase']} round {event['round'] + 1}"
        return (
            f"{phase}, epoch {event['epoch']}: train loss {event['train_loss']:.4f}  loss {event['loss']:.4f}  "
            f"{figures}  sparsity {event['sparsity']:.4f}"
        )
    if kind == "prune":
        asked = "found by training" if event["asked"] is None else f"asked {event['asked']:.6g}"
        return (
            f"pruned to {event['target']} {event['achieved']:.6g} ({asked}), "
            f"{event['kept']:,} of {event['total']:,} weights kept"
        )
    if kind == "recalibrate":
        return f"batch norm {event['kind']}: {event['layers']} layers, means had moved by {event['moved']:.2f} std"
    return ""
