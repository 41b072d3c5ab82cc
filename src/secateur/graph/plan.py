"""A plan: which indices stay, and which attributes change with them. Replays on a fresh instance, without pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.checkpoint import write_atomic
from secateur.errors import PlanError
from secateur.graph.changes import Drop, Edit, Kept, Undo, check_drop, class_name, drop_all_, edit_, owner_of, slice_
from secateur.graph.model import owned_tensors
from secateur.graph.valueless import has_values

FORMAT = 1

_DAMAGED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, MemoryError)
"""What reading a document of another form may raise."""

_MOST_INDICES = 2**27
"""Kept indices of all tensors together, a gigabyte: a few bytes of JSON may claim any number."""

_LARGEST = 2**31
"""Sizes stay below it."""


@dataclass(frozen=True)
class Plan:
    """What structural pruning does to a model.

    Attributes:
        model: Class of the model, ``"torchvision.models.resnet.ResNet"``.
        shapes: Shape before pruning of every tensor that shrinks.
        kept: Kept indices.
        edits: Attributes that change.
        weights: Digest of the weights the plan was made from; empty where it does not matter.
        info: What led to the plan: target, score, versions. For people, not for replay.
        drops: Modules that go as a whole, after everything else has been sliced.
    """

    model: str
    shapes: Mapping[str, tuple[int, ...]]
    kept: Kept
    edits: tuple[Edit, ...] = ()
    weights: str = ""
    info: Mapping[str, Any] = field(default_factory=dict)
    drops: tuple[Drop, ...] = ()

    @property
    def resized(self) -> frozenset[tuple[int, int]]:
        """Sizes of dimensions before and after."""
        return frozenset((self.shapes[n][d], len(kept)) for n, dims in self.kept.items() for d, kept in dims.items())

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON; index runs are written as [first, last] pairs."""
        return {
            "format": FORMAT,
            "model": self.model,
            "weights": self.weights,
            "info": dict(self.info),
            "edits": [{"module": e.module, "attribute": e.attribute, "old": e.old, "new": e.new} for e in self.edits],
            "drops": [
                {
                    "container": d.container,
                    "entries": d.entries,
                    "places": list(d.places),
                    "lists": [list(pair) for pair in d.lists],
                    "positions": [list(pair) for pair in d.positions],
                }
                for d in self.drops
            ],
            "tensors": {
                name: {
                    "shape": list(self.shapes[name]),
                    "kept": {str(dim): runs_of(indices) for dim, indices in dims.items()},
                }
                for name, dims in self.kept.items()
            },
        }

    def to_json(self) -> str:
        """Return the plan as JSON."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str, source: str = "plan") -> Plan:
        """Read a plan; nothing in it is trusted.

        Raises:
            PlanError: When it is not one; names the field.
        """
        return cls.from_dict(_parsed(text, source), source)

    @classmethod
    def from_dict(cls, document: Any, source: str = "plan") -> Plan:
        """Read a plan from plain values; nothing in it is trusted.

        Raises:
            PlanError: When it is not one; names the field.
        """
        try:
            if document["format"] != FORMAT:
                raise PlanError(f"{source}: plan format {document['format']!r} is not {FORMAT}, the one this reads")
            shapes: dict[str, tuple[int, ...]] = {}
            kept: dict[str, dict[int, NDArray[np.int64]]] = {}
            room = _MOST_INDICES
            for name, entry in document["tensors"].items():
                shape = tuple(int(s) for s in entry["shape"])
                shapes[name], kept[name] = shape, {}
                for d, runs in entry["kept"].items():
                    if d not in {str(i) for i in range(len(shape))}:
                        raise PlanError(f"{source}: {name} of shape {shape} has no dimension {d!r}")
                    kept[name][int(d)] = _indices(f"{source}: {name}", runs, shape[int(d)], room)
                    room -= len(kept[name][int(d)])
            edits = tuple(Edit(str(e["module"]), str(e["attribute"]), e["old"], e["new"]) for e in document["edits"])
            for edit in edits:
                if not _is_size(edit.old) or not _is_size(edit.new) or _rank(edit.old) != _rank(edit.new):
                    raise PlanError(
                        f"{source}: the edit of {edit.module}.{edit.attribute} from {edit.old!r} to {edit.new!r} is "
                        "not that of a size"
                    )
            drops = tuple(_drop(source, entry) for entry in document.get("drops", []))
            return cls(
                str(document["model"]), shapes, kept, edits, str(document["weights"]), dict(document["info"]), drops
            )
        except PlanError:
            raise
        except _DAMAGED as error:
            raise PlanError(f"{source}: not a plan: {type(error).__name__}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write ``plan.json`` atomically."""
        save_plans(path, [self])

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a ``plan.json`` that holds one plan.

        Raises:
            PlanError: When the file is missing, no plan, or several.
        """
        plans = load_plans(path)
        if len(plans) != 1:
            raise PlanError(f"{path}: holds {len(plans)} plans, carried out one after the other; use load_plans")
        return plans[0]

    def check(self, model: nn.Module, *, weights: bool = False) -> None:
        """Refuse a model that the plan was not made for.

        Args:
            model: A model of the original class and size.
            weights: Whether its weights, too, must be those the plan was made from.

        Raises:
            PlanError: Names the class, the tensor or the attribute that differs.
        """
        if class_name(model) != self.model:
            raise PlanError(f"the plan was made for {self.model}, not for {class_name(model)}")
        tensors = {n: t for names, t, _ in owned_tensors(model) for n in names}
        met: dict[int, str] = {}
        for name, shape in self.shapes.items():
            if name not in tensors:
                raise PlanError(f"the plan shrinks {name!r}, which this {class_name(model)} does not have")
            if met.setdefault(id(tensors[name]), name) != name:
                raise PlanError(f"the plan shrinks {name!r} and {met[id(tensors[name])]!r}, which are one tensor")
            if tuple(tensors[name].shape) != shape:
                raise PlanError(
                    f"{name} has shape {tuple(tensors[name].shape)}, the plan was made for {shape}"
                    + ("; the model has been pruned already" if _is_pruned(tensors[name], self.kept[name]) else "")
                )
        for drop in self.drops:
            check_drop(model, drop)
        for edit in self.edits:
            owner, attribute = owner_of(model, edit)
            value = getattr(owner, attribute)
            if not _is_size(value) or list_of(value) != list_of(edit.old):
                raise PlanError(f"{edit.module}.{edit.attribute} is {value!r}, the plan was made for {edit.old!r}")
        if weights and self.weights and digest(model) != self.weights:
            raise PlanError(
                "the plan was made from other weights than this model has: its choice of channels means nothing here. "
                "Load the weights it was made from, or plan again"
            )

    def apply_(self, model: nn.Module, ready: Mapping[str, Tensor] | None = None) -> Undo:
        """Shrink a model as planned, in place; parameters keep their identity.

        Args:
            model: The model.
            ready: What an earlier application of the same plan has cut out, by tensor name.

        Raises:
            PlanError: When the model is not the one the plan was made for; it is untouched then.
        """
        self.check(model)
        undo = slice_(model, self.kept, ready)
        try:
            for edit in self.edits:
                edit_(model, edit, undo)
            drop_all_(model, self.drops, undo)
        except BaseException:
            undo.revert()
            raise
        return undo


def save_plans(path: str | Path, plans: Sequence[Plan]) -> None:
    """Write ``plan.json`` atomically: one plan, or several that were carried out one after the other.

    Raises:
        PlanError: When there is none.
    """
    if not plans:
        raise PlanError(f"{path}: there is no plan to write")
    steps = [plan.to_dict() for plan in plans]
    document = steps[0] if len(steps) == 1 else {"format": FORMAT, "steps": steps}
    write_atomic(Path(path), json.dumps(document, indent=1).encode())


def load_plans(path: str | Path) -> tuple[Plan, ...]:
    """Read the plans of a ``plan.json``, in the order in which they were carried out.

    Raises:
        PlanError: When the file is missing or no plan.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: cannot be read: {error}") from error
    document = _parsed(text, str(path))
    steps = document.get("steps") if isinstance(document, dict) else None
    if steps is None:
        return (Plan.from_dict(document, str(path)),)
    if not isinstance(steps, list) or not steps:
        raise PlanError(f"{path}: not a plan: steps is no list of plans")
    return tuple(Plan.from_dict(step, f"{path}: step {i}") for i, step in enumerate(steps))


def _parsed(text: str, source: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError, MemoryError) as error:
        raise PlanError(f"{source}: not a plan: {type(error).__name__}: {error}") from error


def silence(model: nn.Module) -> str:
    """Say that a model's answers prove nothing."""
    return (
        f"{class_name(model)} answers the example inputs with zeros, NaN or nothing only, whatever is pruned, so no "
        "result could be proven. Give inputs with an ordinary answer"
    )


def digest(model: nn.Module) -> str:
    """Return a digest of all parameters: names, shapes and values; of shapes alone on the meta device."""
    state = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.named_parameters()):
        state.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if has_values(tensor) and tensor.numel():
            value = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
            state.update(str(int(torch.hash_tensor(value).view(torch.int64))).encode())  # whatever the order
            state.update(value.flatten()[:1024].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def runs_of(indices: NDArray[np.int64]) -> list[list[int]]:
    """Return ascending indices as [first, last] runs.

    Example:
        >>> runs_of(np.array([0, 1, 2, 5]))
        [[0, 2], [5, 5]]
    """
    if not indices.size:
        return []
    ends = np.flatnonzero(np.diff(indices) != 1)
    firsts, lasts = indices[np.r_[0, ends + 1]], indices[np.r_[ends, len(indices) - 1]]
    return [[int(a), int(b)] for a, b in zip(firsts, lasts, strict=True)]


def _indices(where: str, runs: Sequence[Sequence[int]], size: int, room: int) -> NDArray[np.int64]:
    out: list[NDArray[np.int64]] = []
    last = -1
    if size > room:
        raise PlanError(f"{where}: a dimension of {size} is more than a plan can hold")
    for low, high in runs:
        if type(low) is not int or type(high) is not int or not last < low <= high < size:
            raise PlanError(
                f"{where}: kept indices [{low!r}, {high!r}] do not ascend within a dimension of size {size}"
            )
        out.append(np.arange(low, high + 1))
        last = high
    if not out:
        raise PlanError(f"{where}: a dimension would keep no index")
    return np.concatenate(out)


def _drop(source: str, entry: Mapping[str, Any]) -> Drop:
    """Read a drop; nothing in it is trusted."""
    entries, places = entry["entries"], entry["places"]
    pairs = {
        key: tuple((str(module), str(attribute)) for module, attribute in entry[key]) for key in ("lists", "positions")
    }
    drop = Drop(str(entry["container"]), entries, tuple(places), pairs["lists"], pairs["positions"])
    ascending = all(type(p) is int for p in places) and list(places) == sorted(set(places))
    if type(entries) is not int or not ascending or not places or not 0 <= places[0] <= places[-1] < entries:
        raise PlanError(f"{source}: {drop.container}: places {places!r} do not ascend within {entries!r} entries")
    if len(places) == entries:
        raise PlanError(f"{source}: {drop.container}: a container would keep no entry")
    if any(part.startswith("__") for _, a in (*drop.lists, *drop.positions) for part in a.split(".")):
        raise PlanError(f"{source}: {drop.container}: an attribute of the language is no list of blocks")
    return drop


def _is_size(value: Any) -> bool:
    sizes = value if isinstance(value, list | tuple) else [value]
    return all(type(v) is int and abs(v) < _LARGEST for v in sizes)


def _rank(value: Any) -> int:
    return len(value) if isinstance(value, list | tuple) else -1


def _is_pruned(tensor: Tensor, kept: Mapping[int, NDArray[np.int64]]) -> bool:
    return all(d < tensor.dim() and tensor.shape[d] == len(i) for d, i in kept.items())


def list_of(value: Any) -> Any:
    """Return sequences as lists, for comparison with JSON."""
    return list(value) if isinstance(value, list | tuple) else value
