"""Changes to a model, and the way back: sliced tensors, edited attributes, entries that leave a container."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.errors import PlanError
from secateur.graph.model import owned_tensors
from secateur.graph.valueless import has_values

_NO_OWNERS = (type, ModuleType, FunctionType, Tensor)
"""What no size of a module is kept in."""

Kept = Mapping[str, Mapping[int, NDArray[np.int64]]]
"""Tensor name -> dimension -> kept indices, ascending."""


@dataclass(frozen=True)
class Edit:
    """An attribute that the forward reads as a size.

    Attributes:
        module: Qualified name of the module, ``""`` for the model itself.
        attribute: Its attribute, ``"num_heads"``, or one of an object it holds, ``"config.hidden_size"``.
        old: Value before.
        new: Value after.
    """

    module: str
    attribute: str
    old: Any
    new: Any


@dataclass(frozen=True)
class Drop:
    """Entries that leave a container of modules.

    Attributes:
        container: Qualified name of an ``nn.ModuleList``, ``nn.Sequential`` or ``nn.ModuleDict``.
        entries: How many entries it has before.
        places: Places of those that go, ascending.
        lists: Sequences with one item per entry that lose the same places: (module, attribute), as in :class:`Edit`.
        positions: Attributes inside an entry that hold its place, as (module within the entry, attribute): those that
            stay are counted anew.
    """

    container: str
    entries: int
    places: tuple[int, ...]
    lists: tuple[tuple[str, str], ...] = ()
    positions: tuple[tuple[str, str], ...] = ()


class Undo:
    """Changes made to a model, and the way back."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], Any]] = []
        self._twins: dict[int, Any] = {}

    def twin(self, model: nn.Module, held: Any) -> Any:
        """Put a copy of an object that the model holds in its place, and return it: another model may hold it too.

        A configuration is shared by all modules of a model, and often with the model's teacher.
        """
        if id(held) in self._twins:
            return held
        twin = copy.copy(held)
        for holder in (*model.modules(), *self._twins.values()):
            for name in [n for n, value in vars(holder).items() if value is held]:
                self.set(holder, name, twin)
        self._twins[id(twin)] = twin
        self.add(lambda: self._twins.pop(id(twin)))
        return twin

    def add(self, step: Callable[[], Any]) -> None:
        """Remember how to revert a change just made."""
        self._steps.append(step)

    def set(self, owner: Any, attribute: str, value: Any) -> None:
        """Set an attribute, past any ``__setattr__`` of the owner."""
        before, own = getattr(owner, attribute), attribute in vars(owner)
        object.__setattr__(owner, attribute, value)

        def back() -> None:
            if own or attribute not in vars(owner):
                object.__setattr__(owner, attribute, before)
            else:  # the class has it
                object.__delattr__(owner, attribute)

        self.add(back)

    @property
    def count(self) -> int:
        """How many changes there are."""
        return len(self._steps)

    def revert(self, to: int = 0) -> None:
        """Take back all changes after the first ``to``, last first."""
        while len(self._steps) > to:
            self._steps.pop()()


def slice_tensor(tensor: Tensor, kept: Mapping[int, NDArray[np.int64]]) -> Tensor:
    """Return a copy that holds the kept indices only, in the memory format of the original."""
    channels_last = tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(
        memory_format=torch.channels_last
    )  # fmt: skip
    with torch.inference_mode(mode=False), torch.no_grad():  # else it could not be trained any more
        out = tensor.detach()
        if not has_values(tensor):
            out = out.new_empty([len(kept[d]) if d in kept else size for d, size in enumerate(tensor.shape)])
            kept = {}
        for dim, indices in kept.items():
            out = out.index_select(dim, torch.from_numpy(np.ascontiguousarray(indices)).to(out.device))
        return out.contiguous(memory_format=torch.channels_last) if channels_last else out


def slice_(model: nn.Module, kept: Kept, ready: Mapping[str, Tensor] | None = None) -> Undo:
    """Shrink tensors in place, gradients with them. Tied names share one tensor and shrink once.

    Args:
        model: The model.
        kept: Kept indices.
        ready: Tensors that have been cut out before, by name.
    """
    undo = Undo()
    ready = ready or {}
    tensors = {n: t for names, t, _ in owned_tensors(model) for n in names}
    try:
        for name, dims in kept.items():
            small = ready[name] if name in ready else slice_tensor(tensors[name], dims)
            _replace(undo, tensors[name], small, dims)
    except BaseException:
        undo.revert()
        raise
    return undo


def _replace(undo: Undo, tensor: Tensor, small: Tensor, dims: Mapping[int, NDArray[np.int64]]) -> None:
    before, grad = tensor.data, tensor.grad

    def back() -> None:
        tensor.grad = None
        tensor.data = before
        tensor.grad = grad

    tensor.grad = None
    undo.add(back)
    tensor.data = small
    if grad is not None:
        tensor.grad = slice_tensor(grad, dims)


def drop_all_(model: nn.Module, drops: Iterable[Drop], undo: Undo) -> None:
    """Take entries out of several containers, the innermost first: names change as those that stay count anew."""
    for drop in sorted(drops, key=lambda d: len(f".{d.container}".rstrip(".").split(".")), reverse=True):
        drop_(model, drop, undo)


def drop_(model: nn.Module, drop: Drop, undo: Undo) -> None:
    """Take entries out of a container, and count those that stay anew."""
    container = model.get_submodule(drop.container)
    before = dict(container._modules)
    kept = [(key, entry) for i, (key, entry) in enumerate(before.items()) if i not in drop.places]
    head = prefix_of(before)

    def fill(entries: list[tuple[str, nn.Module | None]]) -> None:
        container._modules.clear()
        container._modules.update(entries)

    places = {id(entry): i for i, entry in enumerate(before.values())}
    fill([(key if head is None else f"{head}{i}", entry) for i, (key, entry) in enumerate(kept)])
    undo.add(lambda: fill(list(before.items())))
    for name, attribute in drop.lists:
        owner, last = _owner_of(model, Edit(name, attribute, None, None), undo)
        items = getattr(owner, last)
        undo.set(owner, last, type(items)(item for i, item in enumerate(items) if i not in drop.places))
    for path, attribute in drop.positions:
        for new, (_, entry) in enumerate(kept):
            if entry is not None:
                owner = entry.get_submodule(path)
                undo.set(owner, attribute, getattr(owner, attribute) + new - places[id(entry)])


def prefix_of(keys: Iterable[str]) -> str | None:
    """Return what comes before the numbers of keys that count from 0; ``None`` where they do not.

    Example:
        >>> prefix_of(["expert_0", "expert_1"]), prefix_of(["0", "1"]), prefix_of(["a", "b"])
        ('expert_', '', None)
    """
    names = list(keys)
    head = names[0][:-1] if names else ""
    return head if names == [f"{head}{i}" for i in range(len(names))] else None


def check_drop(model: nn.Module, drop: Drop) -> None:
    """Refuse a model without such a container, or with another number of entries.

    Raises:
        PlanError: Names the container or the attribute.
    """
    try:
        container = model.get_submodule(drop.container)
    except AttributeError:
        container = None
    if not isinstance(container, nn.ModuleList | nn.Sequential | nn.ModuleDict):
        raise PlanError(f"the plan takes entries out of {drop.container!r}, which is no list of modules here")
    if len(container) != drop.entries:
        raise PlanError(
            f"{drop.container} has {len(container)} entries, the plan was made for {drop.entries}"
            + ("; the model has been pruned already" if len(container) == drop.entries - len(drop.places) else "")
        )
    for name, attribute in drop.lists:
        owner, last = owner_of(model, Edit(name, attribute, None, None))
        items = getattr(owner, last)
        if not isinstance(items, list | tuple) or len(items) != drop.entries:
            raise PlanError(f"{name}.{attribute} is no list of {drop.entries} items, as the plan expects")
    for path, attribute in drop.positions:
        for entry in container.children():
            try:
                value = getattr(entry.get_submodule(path), attribute)
            except AttributeError:
                value = None
            if type(value) is not int:
                raise PlanError(f"{drop.container}: an entry has no whole number {path}.{attribute}")


def owner_of(model: nn.Module, edit: Edit) -> tuple[Any, str]:
    """Return the object that holds an edited attribute, and the attribute's own name.

    Raises:
        PlanError: When the model has no such module or attribute.
    """
    return _owner_of(model, edit, None)


def edit_(model: nn.Module, edit: Edit, undo: Undo) -> None:
    """Change an attribute; an object on the way to it, such as a configuration, is the model's own copy from then on.

    Raises:
        PlanError: When the model has no such attribute, or it cannot be set.
    """
    owner, attribute = _owner_of(model, edit, undo)
    try:
        undo.set(owner, attribute, like(edit.old, edit.new))
    except (AttributeError, TypeError) as error:
        raise PlanError(f"{edit.module}.{edit.attribute} cannot be set: {error}") from error


def _owner_of(model: nn.Module, edit: Edit, undo: Undo | None) -> tuple[Any, str]:
    """Walk to the owner; with ``undo``, through copies that are the model's own."""
    *path, attribute = edit.attribute.split(".")
    try:
        owner: Any = model.get_submodule(edit.module)
        for name in path:
            held = vars(owner)[name] if name in vars(owner) else getattr(owner, name)
            if name.startswith("__") or isinstance(held, _NO_OWNERS) or not hasattr(held, "__dict__"):
                raise AttributeError(name)
            owner = held if undo is None or isinstance(held, nn.Module) else undo.twin(model, held)
        getattr(owner, attribute)
    except (AttributeError, KeyError) as error:
        raise PlanError(
            f"the plan edits {edit.module}.{edit.attribute}, which {class_name(model)} does not have"
        ) from error
    return owner, attribute


def class_name(model: nn.Module) -> str:
    """Return the qualified class name."""
    return f"{type(model).__module__}.{type(model).__qualname__}"


def like(old: Any, new: Any) -> Any:
    """Give a value read from JSON the type of the one it replaces."""
    return tuple(new) if isinstance(old, tuple) else new
