"""What a user points a verb at: a model reference, a recipe file, a run directory; and the shapes of inputs."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.checkpoint import load_masks, load_model, load_weights
from secateur.errors import CheckpointError, DataError, RecipeError, nearest
from secateur.masks import check_masks
from secateur.pipeline.data import derive_seed
from secateur.pipeline.factories import make_model, resolve
from secateur.recipe import Recipe, load
from secateur.types import Masks

RECIPE_SUFFIXES = (".toml", ".yaml", ".yml", ".json")
_REFERENCE = re.compile(r"(?:[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*|[\w./\-]+\.py):[A-Za-z_]\w*")
_DTYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")


@dataclass(frozen=True)
class Source:
    """A model, and where it came from.

    Attributes:
        name: How to call it.
        model: The model, weights loaded.
        recipe: Its recipe, if it came from one or from a run.
        base: Folder that the recipe's relative paths start from.
        masks: The masks of a finished run.
    """

    name: str
    model: nn.Module
    recipe: Recipe | None = None
    base: Path = Path()
    masks: Masks | None = None


def importable(folder: Path) -> None:
    """Let ``package.module:function`` name what lies in a folder, as ``python -m`` would."""
    path = str(folder.resolve())
    if path not in sys.path:
        sys.path.insert(0, path)


def open_source(
    target: str, *, weights: Path | None = None, base: Path | None = None, pruned: Path | None = None
) -> Source:
    """Build the model that a user named.

    Args:
        target: ``package.module:factory``, ``file.py:factory``, a recipe file or a run directory.
        weights: Weights to load instead of the recipe's or the run's.
        base: Folder that the relative paths of a run's recipe start from; the current one by default.
        pruned: Folder of ``secateur prune``, whose plans the model is cut by and whose weights it gets.

    Returns:
        The model and where it came from.

    Raises:
        RecipeError: When it is none of these, or what it names cannot be found or called.
        CheckpointError: When the weights cannot be read, or do not fit.
        PlanError: When the plans of the pruned folder are not this model's.
    """
    source = _open(target, weights, base)
    if pruned is None:
        return source
    from secateur.structure import load_pruned

    load_pruned(source.model, pruned)
    return replace(source, name=f"{source.name}, pruned in {pruned}", masks=None)


def _open(target: str, weights: Path | None, base: Path | None) -> Source:
    importable(Path.cwd())
    path = Path(target)
    if path.is_dir():
        return _run_directory(path, weights, base or Path())
    if path.suffix in RECIPE_SUFFIXES:
        recipe = load(path)
        found = weights or (path.parent / recipe.model.weights if recipe.model.weights is not None else None)
        return Source(recipe.name, _model(recipe, path.parent, found), recipe, path.parent)
    if not _REFERENCE.fullmatch(target):
        raise RecipeError(
            f"MODEL: got {target!r}, which is no file or folder here; expected package.module:factory, "
            "file.py:factory, a recipe file or a run directory"
        )
    model = _call(target)
    if weights is not None:
        load_weights(model, weights)
    return Source(target, model)


def _run_directory(path: Path, weights: Path | None, base: Path) -> Source:
    if (path / "plan.json").is_file() and not (path / "recipe.toml").is_file():
        raise CheckpointError(
            f"{path}: holds a pruned model, and not the class it was made from: name that as MODEL, and this folder "
            f"with --pruned {path}"
        )
    for name in ("recipe.toml", "model.safetensors", "masks.safetensors"):
        if not (path / name).is_file():
            what = "holds no run" if name == "recipe.toml" else "holds a run that is not finished"
            raise CheckpointError(f"{path}: {what}: there is no {name} in it; secateur run writes one")
    recipe = load(path / "recipe.toml")
    factory = recipe.model.factory.partition(":")[0]
    if factory.endswith(".py") and not (base / factory).is_file():
        raise RecipeError(
            f"{path / 'recipe.toml'}: model.factory: no file {base / factory}; name the folder of the recipe that the "
            "run was started from with --base"
        )
    model = _model(recipe, base, weights)
    if weights is None:
        load_model(model, path / "model.safetensors")
    masks = load_masks(path / "masks.safetensors")
    check_masks(model, masks)
    return Source(recipe.name, model, recipe, base, masks)


def _model(recipe: Recipe, base: Path, weights: Path | None) -> nn.Module:
    importable(base)
    torch.manual_seed(derive_seed(recipe.seed, "init"))  # as a run does
    model = make_model(recipe.model.factory, recipe.model.args, base=base)
    if weights is not None:
        load_weights(model, weights)
    return model


def _call(reference: str) -> nn.Module:
    factory = resolve(reference, base=Path(), field="MODEL")
    if not callable(factory):
        raise RecipeError(f"MODEL: {reference} is of type {type(factory).__name__}; expected a function or class")
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise RecipeError(
            f"MODEL: {reference} cannot be called without arguments ({error}); name a recipe, whose model.args are "
            "passed to it, or write a function that calls it"
        ) from None
    torch.manual_seed(0)  # a network without weights of its own is the same every time
    model = factory()
    if not isinstance(model, nn.Module):
        raise DataError(
            f"MODEL: {reference} returned an object of type {type(model).__name__}; expected a torch.nn.Module"
        )
    return model


def parse_inputs(texts: list[str]) -> tuple[Tensor, ...]:
    """Make positional inputs out of shapes.

    Args:
        texts: Each a shape, with a dtype unless it is float32: ``"1,3,224,224"``, ``"1,128:int64"``.

    Returns:
        Normal noise from a fixed seed in floating-point inputs, zeros in the others.

    Raises:
        DataError: When one cannot be read; says what was expected.

    Example:
        >>> [(tuple(x.shape), str(x.dtype)) for x in parse_inputs(["2,3", "1,4:int64"])]
        [((2, 3), 'torch.float32'), ((1, 4), 'torch.int64')]
    """
    generator = torch.Generator().manual_seed(0)
    return tuple(_input(text, generator) for text in texts)


def _input(text: str, generator: torch.Generator) -> Tensor:
    shape, _, dtype_name = text.partition(":")
    dtype_name = dtype_name.strip() or "float32"
    if dtype_name not in _DTYPES:
        raise DataError(f"--input {text}: unknown dtype {dtype_name!r}; {nearest(dtype_name, _DTYPES)}")
    try:
        sizes = [int(part) for part in shape.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise DataError(f"--input {text}: expected whole numbers above 0 with commas between, such as 1,3,224,224")
    dtype: Any = getattr(torch, dtype_name)
    try:
        if dtype.is_floating_point:
            return torch.randn(sizes, generator=generator).to(dtype)
        return torch.zeros(sizes, dtype=dtype)
    except (RuntimeError, TypeError) as error:  # more memory than there is, or than 64 bits can count
        reason = str(error).split("\n")[0][:200]
        raise DataError(f"--input {text}: no tensor of this shape can be made: {reason}") from None
