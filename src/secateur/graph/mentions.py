"""Where code speaks of an expert by its number, and which entries of which lists of modules run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from secateur.graph.axes import Labels
from secateur.graph.changes import prefix_of


@dataclass(frozen=True)
class Mention:
    """One place where code speaks of an expert by its number.

    Attributes:
        labels: Those of all experts.
        number: The number; ``None`` where all of them are taken apart at once.
        module: The module whose code it is.
        where: Module and operator, for people.
        compared: Whether numbers were compared with it, which ties no label.
    """

    labels: Labels
    number: int | None
    module: str
    where: str
    compared: bool


@dataclass(frozen=True)
class Entries:
    """A list of modules.

    Attributes:
        container: Its qualified name.
        names: Those of its entries, in order.
        above: The modules that it is part of, itself included.
        shared: What of an entry is held elsewhere too, so that it could not go; empty where nothing is.
    """

    container: str
    names: tuple[str, ...]
    above: frozenset[str]
    shared: str


@dataclass(frozen=True)
class Run:
    """An entry whose forward was entered, and the last mention before that."""

    container: str
    place: int
    after: Mention | None


class Mentions:
    """What all recordings of one model noted.

    Attributes:
        made: The mentions, those that are alike once.
        runs: Entries that ran, likewise.
        lists: The model's lists of modules.
    """

    def __init__(self) -> None:
        self.made: dict[tuple[object, ...], Mention] = {}
        self.runs: dict[tuple[object, ...], Run] = {}
        self.lists: tuple[Entries, ...] = ()
        self._places: dict[str, tuple[str, int]] = {}
        self._open: list[str] = []
        self._last: Mention | None = None

    def watch(self, model: nn.Module) -> None:
        """Note which entries there are."""
        self.lists = lists_of(model)
        self._places = {name: (some.container, place) for some in self.lists for place, name in enumerate(some.names)}

    @property
    def sizes(self) -> set[int]:
        """Numbers of entries."""
        return {len(some.names) for some in self.lists}

    def start(self) -> None:
        """Begin another recording."""
        self._open, self._last = [], None

    def add(self, mention: Mention) -> None:
        """Note a mention."""
        if self._places:
            key = id(mention.labels), mention.number, mention.module, mention.compared  # the labels are kept
            self._last = self.made.setdefault(key, mention)

    def enter(self, stack: Sequence[str]) -> None:
        """Note the entries that have been entered since the last operator.

        Args:
            stack: The modules whose forward is running, outermost first.
        """
        if self._places and (len(stack) != len(self._open) or stack[-1:] != self._open[-1:]):
            for name in stack:
                if name in self._places and name not in self._open:
                    container, place = self._places[name]
                    self.runs.setdefault((container, place, id(self._last)), Run(container, place, self._last))
            self._open = list(stack)


def lists_of(model: nn.Module) -> tuple[Entries, ...]:
    """Return every ``nn.ModuleList`` with several entries, and every ``nn.ModuleDict`` whose keys count them."""
    names = {id(module): name for name, module in model.named_modules()}
    parents: dict[int, list[int]] = {}
    for module in model.modules():
        for child in module._modules.values():
            if child is not None:
                parents.setdefault(id(child), []).append(id(module))
    holders = Counter({key: len(held) for key, held in parents.items()})
    out = []
    for name, container in model.named_modules():
        counted = isinstance(container, nn.ModuleDict) and prefix_of(container._modules) is not None
        if not (counted or isinstance(container, nn.ModuleList)) or len(container._modules) < 2:
            continue
        above, todo = {id(container)}, [id(container)]
        while todo:
            for parent in parents.get(todo.pop(), ()):
                if parent not in above:
                    above.add(parent)
                    todo.append(parent)
        shared = next(
            (names[id(m)] for entry in container.children() for m in entry.modules() if holders[id(m)] > 1), ""
        )
        entries = tuple(f"{name}.{key}" if name else key for key in container._modules)
        out.append(Entries(name, entries, frozenset(names[key] for key in above), shared))
    return tuple(out)
