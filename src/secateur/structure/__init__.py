"""Physically smaller models: plan, shrink, verify, save. The user's side of :mod:`secateur.graph`."""

from secateur.structure.duplicates import DuplicateReport, FoldedUnit, fold_duplicates_
from secateur.structure.files import load_pruned, save_pruned
from secateur.structure.fold import FoldedLayer, FoldReport, fold_constants_
from secateur.structure.groups import Groups, find_groups
from secateur.structure.make import make_plan
from secateur.structure.penalty_groups import coupled_groups
from secateur.structure.proof import verify
from secateur.structure.report import ShrinkReport
from secateur.structure.shrink import shrink_
from secateur.types import GroupReport

__all__ = [
    "DuplicateReport",
    "FoldReport",
    "FoldedLayer",
    "FoldedUnit",
    "GroupReport",
    "Groups",
    "ShrinkReport",
    "coupled_groups",
    "find_groups",
    "fold_constants_",
    "fold_duplicates_",
    "load_pruned",
    "make_plan",
    "save_pruned",
    "shrink_",
    "verify",
]
