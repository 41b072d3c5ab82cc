"""Experts that are modules in a list: which list a router's numbers pick from, and what of it goes with its rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import nn

from secateur.graph.axes import Axes, Labels, Part
from secateur.graph.changes import Drop, Edit
from secateur.graph.mentions import Entries, Mention
from secateur.graph.record import Op
from secateur.graph.spread import CHOICES
from secateur.graph.trace import Trace


@dataclass(frozen=True)
class Listed:
    """A list of modules whose entries are a router's experts.

    Attributes:
        container: Its qualified name.
        names: Those of the entries, in order.
        labels: The label of each entry.
        scopes: Modules whose code picks entries by number.
        routers: Modules whose code chooses.
        dense: Whether every entry works on everything, so that fewer entries are less work; where each gets only what
            the router gives it, those that stay get what the others had.
    """

    container: str
    names: tuple[str, ...]
    labels: Labels
    scopes: frozenset[str]
    routers: frozenset[str]
    dense: bool

    def place(self, name: str) -> int | None:
        """Return the place of the entry that a module or a tensor is part of; ``None`` where it is of none."""
        head = f"{self.container}." if self.container else ""
        if not name.startswith(head):
            return None
        entry = head + name[len(head) :].partition(".")[0]
        return self.names.index(entry) if entry in self.names else None

    def drop(self, alive: NDArray[np.bool_]) -> Drop | None:
        """Return what leaves the list.

        Args:
            alive: Per label, whether it stays.
        """
        gone = np.flatnonzero(~alive[self.labels])
        return Drop(self.container, len(self.names), tuple(gone.tolist())) if gone.size else None


@dataclass
class Found:
    """What the recordings say about lists of experts.

    Attributes:
        lists: The lists.
        refused: Labels of experts that cannot go, and why.
    """

    lists: list[Listed] = field(default_factory=list)
    refused: list[tuple[Labels, str]] = field(default_factory=list)


def listed_experts(recorded: Trace, roots: Labels) -> Found:
    """Find the lists of modules that routers choose from.

    A list counts when a module that it is part of speaks of a router's experts by number (compares what was chosen
    with it, or picks by it), it has one entry for every expert, and its entries run. Of several such lists those count
    whose entries always run right after their own number was spoken of. That numbers are used for nothing else is for
    the proof to show, in which every expert that stays gets something to do.

    Args:
        recorded: The trace.
        roots: The component of each label.
    """
    chosen = {tuple(roots[labels].tolist()) for labels, _, _ in recorded.ledger.chosen}
    by_router: dict[tuple[int, ...], list[Mention]] = {}
    for mention in recorded.ledger.mentions.made.values():
        by_router.setdefault(tuple(roots[mention.labels].tolist()), []).append(mention)
    found = Found()
    for key, mentions in by_router.items():
        lists, why = _lists_of(recorded, roots, key, mentions) if key in chosen else ([], "")
        scopes = frozenset(m.module for m in mentions)
        made = (where for labels, _, where in recorded.ledger.chosen if tuple(roots[labels].tolist()) == key)
        routers = frozenset(where.rpartition(": ")[0] for where in made)
        for some in () if why else lists:
            dense = _dense(recorded, some, key, roots)
            found.lists.append(Listed(some.container, some.names, mentions[0].labels, scopes, routers, dense))
        compared = next((m for m in mentions if m.compared), None)
        if why or (compared is not None and not lists):
            at = compared or mentions[0]
            found.refused.append((at.labels, f"{at.where} computes with the number of an expert{why}"))
    _refuse_shared(found)
    return found


def _lists_of(
    recorded: Trace, roots: Labels, key: tuple[int, ...], mentions: Sequence[Mention]
) -> tuple[list[Entries], str]:
    """Return the lists that hold a router's experts, or why there are none."""
    log = recorded.ledger.mentions
    modules = {m.module for m in mentions}
    ran = {run.container for run in log.runs.values()}
    near = [some for some in log.lists if some.container in ran and some.above & modules]
    fits = [some for some in near if len(some.names) == len(key)]
    if not fits:
        other = next((f"{s.container} has {len(s.names)} entries" for s in near), "")
        return [], f", of which there are {len(key)}: {other}" if other and any(m.compared for m in mentions) else ""
    followed = [some for some in fits if _follows(recorded, roots, key, some)]
    if not followed and len(fits) > 1:
        names = ", ".join(some.container for some in fits)
        return [], f", and which of {names} holds the experts cannot be told"
    shared = next((some for some in followed or fits if some.shared), None)
    if shared is not None:
        return [], f", and {shared.shared} of {shared.container} is held elsewhere, too"
    return followed or fits, ""


def _follows(recorded: Trace, roots: Labels, key: tuple[int, ...], some: Entries) -> bool:
    """Whether every entry ran right after its own number was spoken of."""
    runs = [run for run in recorded.ledger.mentions.runs.values() if run.container == some.container]
    return all(
        run.after is not None and run.after.number == run.place and tuple(roots[run.after.labels].tolist()) == key
        for run in runs
    )


def _dense(recorded: Trace, some: Entries, key: tuple[int, ...], roots: Labels) -> bool:
    """Whether every entry gets everything that the router chooses for.

    A choice of some experts cannot give everything to each of them.
    """
    rows = next((n for op in recorded.ops if (n := _rows(op, key, roots)) is not None), 0)
    for name in some.names:
        own = (op for op in recorded.ops if op.module == name or op.module.startswith(f"{name}."))
        given = (axes.shape for op in own for axes, leaf in zip(op.inputs, op.leaves, strict=True) if leaf < 0)
        shape = next(given, ())
        if rows not in [math.prod(shape[:d]) for d in range(1, len(shape))]:
            return False
    return True


def _rows(op: Op, key: tuple[int, ...], roots: Labels) -> int | None:
    """Return how many times a router chooses, if the operator is its choice."""
    if op.name not in CHOICES:
        return None
    axes = op.inputs[0]
    own = any(part.labels.size == len(key) and tuple(roots[part.labels.ravel()].tolist()) == key for part in axes.parts)
    return math.prod(axes.shape) // len(key) if own else None


def _refuse_shared(found: Found) -> None:
    """Take out lists that several routers choose from."""
    routers: dict[str, list[Listed]] = {}
    for some in found.lists:
        routers.setdefault(some.container, []).append(some)
    for name, several in routers.items():
        if len(several) > 1:
            why = f"{len(several)} routers choose from {name}, each by a numbering of its own"
            found.refused += [(some.labels, why) for some in several]
            found.lists = [some for some in found.lists if some.container != name]


_OTHER_COUNTS = {"per", "active", "shared", "selected", "top"}


def count_edits(model: nn.Module, lists: Sequence[Listed], drops: Sequence[Drop]) -> list[Edit]:
    """Return changes of attributes that say how many experts there are, where the forward may not trip over them.

    Args:
        model: The model.
        lists: Lists of experts.
        drops: What leaves them.
    """
    fewer = {drop.container: drop.entries - len(drop.places) for drop in drops}
    edits = {}
    for some in lists:
        holder = some.container.rpartition(".")[0]
        for module in sorted({*some.scopes, *some.routers, some.container, holder}) if some.container in fewer else ():
            for name, value in vars(model.get_submodule(module)).items():
                known = "experts" in name.lower() and not _OTHER_COUNTS & set(name.lower().split("_"))
                if known and type(value) is int and value == len(some.names):
                    edits[module, name] = Edit(module, name, value, fewer[some.container])
    return list(edits.values())


class Presence:
    """Whether a tensor, or what a module computes, is still there: a factor of 1 or 0 for sizes of a pruned model.

    Args:
        lists: Lists of experts.
    """

    def __init__(self, lists: Sequence[Listed]) -> None:
        self._lists = lists

    def of(self, *names: str, dense: bool = False) -> list[tuple[Axes, int]]:
        """Return the factors: there as long as one of the names is; none where nothing of it can go.

        Args:
            names: Names of a tensor, or of a module.
            dense: Look only at lists whose entries work on everything.
        """
        factors = []
        for some in self._lists if names else ():
            places = [some.place(name) for name in names] if some.dense or not dense else [None]
            if None not in places:
                labels = some.labels[[p for p in places if p is not None]]
                factors.append((Axes((1, len(labels)), [Part((0, 1), labels[None])]), 0))
        return factors
