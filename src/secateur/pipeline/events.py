"""What happened, as lines in metrics.jsonl, and what is happening, for whoever watches."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Listener(Protocol):
    """Whoever wants to see a run: the command line's progress bar, a notebook."""

    def progress(self, done: int, total: int, text: str) -> None:
        """Called after every optimizer step, and when a new piece of work begins."""
        ...

    def event(self, event: Mapping[str, Any]) -> None:
        """Called with every line of metrics.jsonl."""
        ...


class Silent:
    """Nobody watches."""

    def progress(self, done: int, total: int, text: str) -> None:
        """Do nothing."""

    def event(self, event: Mapping[str, Any]) -> None:
        """Do nothing."""


class EventLog:
    """An append-only file of JSON lines that a checkpoint can cut back to what it knows.

    Args:
        path: The file; created when the first line is written.
        size: Bytes that the checkpoint vouches for; anything after them is cut off.
    """

    def __init__(self, path: Path, *, size: int = 0) -> None:
        self._path = path
        if path.exists():
            with path.open("r+b") as file:
                file.truncate(min(size, path.stat().st_size))
                file.flush()
                os.fsync(file.fileno())

    @property
    def size(self) -> int:
        """Bytes written."""
        return self._path.stat().st_size if self._path.exists() else 0

    def write(self, event: Mapping[str, Any]) -> dict[str, Any]:
        """Append one line, on the disk when this returns; return it with its time."""
        line = {**event, "time": time.time()}
        with self._path.open("ab") as file:
            file.write(json.dumps(line, allow_nan=True).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        return line

    def read(self) -> list[dict[str, Any]]:
        """Return every line."""
        if not self._path.exists():
            return []
        return [json.loads(line) for line in self._path.read_text().splitlines()]
