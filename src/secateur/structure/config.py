"""A configuration object that builds the pruned model, where one can express it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter, ne
from typing import Any

import torch
from torch import Tensor, nn

from secateur.graph.changes import Drop, Edit, Undo, edit_
from secateur.graph.examples import copies
from secateur.graph.model import quiet_forward
from secateur.graph.state import preserved
from secateur.graph.trees import tensors
from secateur.graph.valueless import all_have_values
from secateur.inputs import Inputs

_HEAD_SIZE = ("head_dim", "d_kv", "attention_head_size", "kv_channels")
"""Names of a head's size, which some configurations leave out when it is width / heads."""

_MOST_BUILDS = 200


def update_config(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]], inputs: Inputs, undo: Undo, drops: Sequence[Drop] = ()
) -> tuple[list[Edit], str]:
    """Bring ``model.config`` in line with a shrunk model, so that ``save_pretrained`` and ``from_pretrained`` work.

    Whole numbers of the configuration that equal a size that shrank are changed, one at a time, as long as the model
    that the configuration builds (without memory) comes closer to the shrunk one. The result counts only if it builds
    exactly the shrunk shapes and changes nothing that the model computes.

    Args:
        model: Shrunk; its class builds it from a configuration alone.
        shapes: Shapes of its tensors before, by name.
        inputs: Example inputs.
        undo: Where changes are noted.
        drops: Blocks that were taken out.

    Returns:
        The edits, none where there is no configuration or it cannot express the widths; and why not, if so.
    """
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(model, "save_pretrained") or not hasattr(config, "to_dict"):
        return [], ""
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    sizes: dict[int, set[int]] = {}
    for name, old in shapes.items():
        if name in wanted and not drops:  # with blocks gone, names count anew
            for large, small in zip(old, wanted[name], strict=True):
                if large != small:
                    sizes.setdefault(large, set()).add(small)
    search = _Search(type(model), config, wanted)
    before: list[Tensor] | None = None
    obstacle = (
        "the configuration cannot express these widths, which differ between layers or break width = heads × head "
        "size; uniform=True keeps them expressible"
    )
    if drops:
        obstacle = "the configuration cannot express that these blocks are gone"
    for found in search.depths(drops) if drops else search.run(sizes, _ratios(shapes, wanted)):
        before = _outputs(model, inputs) if before is None else before
        mark = undo.count
        edits = _set(model, found, undo)
        if _same(before, _outputs(model, inputs)) and _same(before, _rebuilt_outputs(model, inputs)):
            return edits, ""
        undo.revert(mark)
        obstacle = (
            "the configuration is left alone: the model computes values from its sizes (a scale, for one), which the "
            "new ones would change"
        )
    return [], obstacle


def _set(model: nn.Module, found: Mapping[str, Any], undo: Undo) -> list[Edit]:
    edits = []
    for path, new in found.items():
        edit = Edit("", f"config.{path}", attrgetter(path)(model.config), new)
        edits.append(edit)
        edit_(model, edit, undo)
    return edits


def _same(before: list[Tensor], after: list[Tensor] | None) -> bool:
    return after is not None and len(before) == len(after) and all(map(torch.equal, before, after))


def _rebuilt_outputs(model: nn.Module, inputs: Inputs) -> list[Tensor] | None:
    """Return what the model gives that the configuration builds, with the shrunk weights."""
    held = list(model.parameters())
    if not all_have_values(held):
        return _outputs(model, inputs)
    try:
        with torch.random.fork_rng(devices=[]):
            rebuilt = type(model)(copy.deepcopy(model.config)).to(held[0].device, held[0].dtype)
        rebuilt.load_state_dict(model.state_dict())
        return _outputs(rebuilt, inputs)
    except Exception:  # noqa: BLE001  # the user's class may refuse in any way it likes
        return None


def _outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    args, kwargs = copies(inputs)
    with preserved(model), quiet_forward(model):
        return tensors(model(*args, **kwargs))


def _ratios(shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> list[tuple[int, int]]:
    """Return the (before, after) pairs of sizes that shrank."""
    pairs = {(b, a) for n, old in shapes.items() if n in wanted for b, a in zip(old, wanted[n], strict=True) if a != b}
    return sorted(pairs)


class _Search:
    """Coordinate descent over the whole numbers of a configuration."""

    def __init__(self, kind: type[nn.Module], config: Any, wanted: Mapping[str, tuple[int, ...]]) -> None:
        self._kind, self._config, self._wanted = kind, config, wanted
        self._builds = 0

    def run(self, sizes: Mapping[int, set[int]], pairs: list[tuple[int, int]]) -> Iterator[dict[str, int]]:
        """Yield sets of attributes to change that build the wanted shapes.

        Two heads of 16 and four of 8 have the same shapes; numbers of heads are therefore tried in all combinations,
        those that shrink first.

        Yields:
            Attribute paths and their new values.
        """
        chosen: dict[str, int] = {}
        best = self._misfits(chosen)
        options = {path: self._options(path, value, sizes, pairs) for path, value in _numbers(self._config)}
        improved = True
        while best and improved and self._builds < _MOST_BUILDS:
            improved = False
            for path, values in options.items():
                for value in values:
                    trial = chosen | {path: value}
                    misfits = self._misfits(trial)
                    if misfits < best:
                        best, chosen, improved = misfits, trial, True
                        break
        if best:
            return
        heads = {p: v for p, v in options.items() if ("head" in p or "group" in p) and v}
        for numbers in itertools.product(*([*v, None] for v in heads.values())):
            trial = {p: v for p, v in chosen.items() if p not in heads}
            trial |= {p: v for p, v in zip(heads, numbers, strict=True) if v is not None}
            if self._builds < 2 * _MOST_BUILDS and self._misfits(trial) == 0:
                yield trial

    def depths(self, drops: Sequence[Drop]) -> Iterator[dict[str, Any]]:
        """Yield the set of attributes to change that builds a model with fewer blocks, if there is one.

        Yields:
            Attribute paths and their new values.
        """
        fewer = {drop.entries: drop.entries - len(drop.places) for drop in drops}
        chosen: dict[str, Any] = {}
        best = self._misfits(chosen)
        for path, value in _counts(self._config):
            name = path.rpartition(".")[2]
            if not any(word in name for word in ("layer", "block", "depth")):
                continue
            for place in range(len(value)) if isinstance(value, list | tuple) else (None,):
                current = chosen.get(path, value)
                old = value if place is None else value[place]
                if old not in fewer:
                    continue
                new = fewer[old]
                if place is not None:
                    new = type(value)([*current[:place], new, *current[place + 1 :]])
                misfits = self._misfits(chosen | {path: new})
                if misfits < best:
                    best, chosen = misfits, chosen | {path: new}
        if not best:
            yield chosen

    def _options(self, path: str, value: Any, sizes: Mapping[int, set[int]], pairs: list[tuple[int, int]]) -> list[int]:
        name = path.rpartition(".")[2]
        if value is None or name in _HEAD_SIZE:
            heads = [v for p, v in _numbers(self._config) if "head" in p and isinstance(v, int) and v > 1]
            widths = sorted({b for b, _ in pairs})
            return sorted({w // h for w in widths for h in heads if w % h == 0 and w // h > 1}) if value is None else []
        out = set(sizes.get(value, set()))
        if "head" in name or "group" in name:  # heads shrink with the widths they make up
            out |= {value * after // before for before, after in pairs if value * after % before == 0}
        return sorted((v for v in out if 0 < v < value), reverse=True)

    def _misfits(self, changes: Mapping[str, Any]) -> int:
        """Return how many parameters have another shape than wanted; many when the configuration is refused."""
        self._builds += 1
        config = copy.deepcopy(self._config)
        for path, value in changes.items():
            *parents, attribute = path.split(".")
            owner = config
            for parent in parents:
                owner = getattr(owner, parent)
            try:
                setattr(owner, attribute, value)
            except (ValueError, TypeError, AttributeError):
                return len(self._wanted) + 1
        try:
            with torch.device("meta"), torch.random.fork_rng(devices=[]):
                built = {name: tuple(p.shape) for name, p in self._kind(config).named_parameters()}
        except Exception:  # noqa: BLE001  # the user's class may refuse a combination in any way it likes
            return len(self._wanted) + 1
        # Dimensions that differ: one right number must show even where the other dimension is still wrong.
        return len(built.keys() ^ self._wanted.keys()) + sum(
            1 if len(shape) != len(self._wanted[n]) else sum(map(ne, shape, self._wanted[n]))
            for n, shape in built.items()
            if n in self._wanted
        )


def _counts(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the whole numbers of a configuration and of those it holds, and its lists of whole numbers."""
    for name, value in vars(config).items():
        if name.startswith("_") or isinstance(value, bool):
            continue
        if isinstance(value, int) or (isinstance(value, list | tuple) and all(type(v) is int for v in value)):
            yield f"{prefix}{name}", value
        elif hasattr(value, "to_dict"):
            yield from _counts(value, f"{prefix}{name}.")


def _numbers(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the whole numbers of a configuration and of those it holds, and absent head sizes."""
    for name, value in vars(config).items():
        if name.startswith("_") or isinstance(value, bool):
            continue
        if isinstance(value, int) or (value is None and name in _HEAD_SIZE):
            yield f"{prefix}{name}", value
        elif hasattr(value, "to_dict"):
            yield from _numbers(value, f"{prefix}{name}.")
