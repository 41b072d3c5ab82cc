"""secateur: make trained networks smaller and faster by pruning, and prove it.

The names below are loaded when they are first used, so that ``secateur --help`` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from secateur.checkpoint import load_model, save_model
    from secateur.errors import SecateurError
    from secateur.export import export_model
    from secateur.method import Method, Override, make_masks
    from secateur.metrics import profile
    from secateur.pipeline.data import Data
    from secateur.pipeline.loop import prune_and_retrain
    from secateur.pipeline.run import RunResult, run
    from secateur.pruner import Pruned, Pruner, prune_
    from secateur.recipe import Recipe
    from secateur.recover import reestimate_bn_, rematch_bn_
    from secateur.schedules import Schedule
    from secateur.structure import load_pruned, make_plan, save_pruned, shrink_, verify
    from secateur.targets import Target

__all__ = [
    "Data",
    "Method",
    "Override",
    "Pruned",
    "Pruner",
    "Recipe",
    "RunResult",
    "Schedule",
    "SecateurError",
    "Target",
    "export_model",
    "load_model",
    "load_pruned",
    "make_masks",
    "make_plan",
    "profile",
    "prune_",
    "prune_and_retrain",
    "reestimate_bn_",
    "rematch_bn_",
    "run",
    "save_model",
    "save_pruned",
    "shrink_",
    "verify",
]

_HOMES = {
    "Data": "secateur.pipeline.data",
    "Method": "secateur.method",
    "Override": "secateur.method",
    "Pruned": "secateur.pruner",
    "Pruner": "secateur.pruner",
    "Recipe": "secateur.recipe",
    "RunResult": "secateur.pipeline.run",
    "Schedule": "secateur.schedules",
    "SecateurError": "secateur.errors",
    "Target": "secateur.targets",
    "export_model": "secateur.export",
    "load_model": "secateur.checkpoint",
    "load_pruned": "secateur.structure",
    "make_masks": "secateur.method",
    "make_plan": "secateur.structure",
    "profile": "secateur.metrics",
    "prune_": "secateur.pruner",
    "prune_and_retrain": "secateur.pipeline.loop",
    "reestimate_bn_": "secateur.recover",
    "rematch_bn_": "secateur.recover",
    "run": "secateur.pipeline.run",
    "save_model": "secateur.checkpoint",
    "save_pruned": "secateur.structure",
    "shrink_": "secateur.structure",
    "verify": "secateur.structure",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'secateur' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
