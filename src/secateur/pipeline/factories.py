"""Turn ``module:function`` into an object. The only place where a recipe runs code, and only after it is valid."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

from torch import nn

from secateur.errors import DataError, RecipeError, nearest
from secateur.pipeline.data import Data


def resolve(reference: str, *, base: Path, field: str) -> Any:
    """Import what a reference names.

    Args:
        reference: ``package.module:function``, or ``file.py:function`` relative to ``base``.
        base: Folder of the recipe.
        field: Field path, for messages.

    Returns:
        The function or class.

    Raises:
        RecipeError: When the module, the file or the name in it does not exist.
    """
    where, _, name = reference.partition(":")
    if where.endswith(".py"):
        path = base / where
        if not path.is_file():
            raise RecipeError(f"{field}: no file {path}")
        # By content too: a file that was edited is another module.
        digest = hashlib.blake2b(str(path.resolve()).encode() + path.read_bytes(), digest_size=4).hexdigest()
        name_of_module = f"secateur_recipe_{path.stem}_{digest}"
        spec = importlib.util.spec_from_file_location(name_of_module, path)
        if spec is None or spec.loader is None:
            raise RecipeError(f"{field}: {path} cannot be imported")
        module = sys.modules.get(name_of_module) or importlib.util.module_from_spec(spec)
        if name_of_module not in sys.modules:
            sys.modules[name_of_module] = module  # where dataclasses and pickle look a class's module up
            try:
                spec.loader.exec_module(module)
            except BaseException:
                del sys.modules[name_of_module]
                raise
    else:
        try:
            module = importlib.import_module(where)
        except ModuleNotFoundError as error:
            if error.name is None or not where.startswith(error.name):
                raise
            raise RecipeError(
                f"{field}: no module {error.name!r}; for a file beside the recipe write 'file.py:{name}'"
            ) from None
    if not hasattr(module, name):
        public = [n for n in vars(module) if not n.startswith("_")]
        raise RecipeError(f"{field}: {where} has no {name!r}; {nearest(name, public)}")
    return getattr(module, name)


def make_model(reference: str, args: dict[str, Any], *, base: Path) -> nn.Module:
    """Build the recipe's model.

    Raises:
        RecipeError: When it cannot be found or called with these arguments.
        DataError: When it is not an ``nn.Module``.
    """
    model = _call(resolve(reference, base=base, field="model.factory"), args, "model")
    if not isinstance(model, nn.Module):
        raise DataError(f"model.factory {reference} returned a {type(model).__name__}; expected a torch.nn.Module")
    return model


def make_data(reference: str, args: dict[str, Any], *, base: Path) -> Data:
    """Build the recipe's data.

    Raises:
        RecipeError: When it cannot be found or called with these arguments.
        DataError: When it is not a :class:`~secateur.pipeline.data.Data`.
    """
    data = _call(resolve(reference, base=base, field="data.factory"), args, "data")
    if not isinstance(data, Data):
        raise DataError(
            f"data.factory {reference} returned a {type(data).__name__}; expected secateur.Data(train=..., test=...)"
        )
    return data


def _call(factory: Any, args: dict[str, Any], section: str) -> Any:
    try:
        inspect.signature(factory).bind(**args)
    except TypeError as error:
        raise RecipeError(f"{section}.args: {error}, but {section}.factory was given {args}") from None
    return factory(**args)
