"""Scores that look at a training, and how they are told of it."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

from secateur.stats.trajectory import PathIntegral, Trajectory


def watches_training(score: Any) -> bool:
    """Tell whether a score needs a training that nobody has watched yet."""
    return any(isinstance(need, Trajectory) and need.path is None for need in score.needs)


def with_path(score: Any, path: PathIntegral) -> Any:
    """Return a score that looks at a path: itself, and scores that it is made of.

    Args:
        score: The score; must be a dataclass where it has one inside.
        path: Who watches the training.
    """
    if not is_dataclass(score) or isinstance(score, type):
        return score
    names = {f.name for f in fields(score)}
    changes: dict[str, Any] = {}
    if "path" in names:
        changes["path"] = path
    if "score" in names:
        changes["score"] = with_path(getattr(score, "score"), path)  # noqa: B009 - known by its fields alone
    return replace(score, **changes) if changes else score
