"""The run directory: what its files are called, and whose it is."""

from __future__ import annotations

from pathlib import Path

from secateur.checkpoint import remove_stale, write_atomic
from secateur.errors import CheckpointError
from secateur.recipe import Recipe

CHECKPOINT = "checkpoint.safetensors"
DENSE = "dense.safetensors"
REWIND = "rewind.safetensors"


def check_directory(directory: Path, recipe: Recipe, *, resume: bool) -> None:
    """Refuse a directory that holds anything but this recipe's own unfinished run.

    Raises:
        CheckpointError: Saying what it holds, and what to do.
    """
    written = directory / "recipe.toml"
    if written.exists():
        if not resume:
            raise CheckpointError(
                f"{directory} already holds a run; go on with it (resume), or choose another directory"
            )
        if written.read_text() != recipe.to_toml():
            raise CheckpointError(f"{written} differs from this recipe: a run can only go on with the recipe it began")
        return
    try:
        found = directory.exists() and any(not p.name.endswith(".tmp") for p in directory.iterdir())
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be used as a run directory: {error.strerror}") from None
    if found:
        raise CheckpointError(f"{directory} is not empty and holds no run; choose another directory")
    if resume:
        raise CheckpointError(f"{directory} holds no run to go on with")


def claim(directory: Path, recipe: Recipe) -> None:
    """Make the directory this recipe's, and clear what a killed run left half-written.

    Raises:
        CheckpointError: When it cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be created: {error.strerror}") from None
    remove_stale(directory)
    if not (directory / "recipe.toml").exists():
        write_atomic(directory / "recipe.toml", recipe.to_toml().encode())
