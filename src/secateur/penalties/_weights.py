"""What all penalties on weights share: which parameters they press on."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Sequence

from torch.nn import Module
from torch.nn.parameter import UninitializedParameter

from secateur.errors import RecipeError, WeightError, nearest


def pressed_on(
    model: Module, include: Sequence[str], exclude: Sequence[str], *, only: Collection[str] | None = None
) -> tuple[str, ...]:
    """Name the parameters that a penalty presses on.

    Args:
        model: The model.
        include: Shell patterns, on names of parameters or modules; when given, what matches one of them. Without, all
            parameters of at least two dimensions: no biases, no scales of norms.
        exclude: Shell patterns of what is left alone.
        only: Names to choose among instead.

    Returns:
        The names, in the model's order; of a tied parameter the first one.

    Raises:
        WeightError: When a pattern matches nothing, a parameter has no shape yet, or nothing is left.
    """
    names_of: dict[int, list[str]] = {}
    found = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in found.items():
        names_of.setdefault(id(parameter), []).append(name)
    for pattern in (*include, *exclude):
        if not any(_matches(name, [pattern]) for name in found):
            known = {n.rpartition(".")[0] or n for n in found}
            raise WeightError(f"the pattern {pattern!r} of a penalty matches no parameter; {nearest(pattern, known)}")
    out = []
    for names in names_of.values():
        first = names[0]
        wanted = any(_matches(n, include) for n in names) if include else True
        if not wanted or any(_matches(n, exclude) for n in names):
            continue
        if isinstance(found[first], UninitializedParameter):
            raise WeightError(f"{first}: has no shape yet (a lazy layer); run one forward pass first")
        if only is not None:
            out += [n for n in names if n in only][:1]
        elif include or found[first].dim() > 1:
            out.append(first)
    if not out:
        raise WeightError(
            f"the penalty has nothing to press on in {type(model).__name__}: include = {list(include)}, "
            f"exclude = {list(exclude)} leave no parameter (biases and scales of norms only when included by name)"
        )
    return tuple(out)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    module = name.rpartition(".")[0]
    return any(fnmatch.fnmatchcase(n, p) for n in (name, module) for p in patterns)


def settle(penalty: object, *options: str) -> None:
    """Turn lists among a frozen penalty's options into tuples.

    Raises:
        RecipeError: On anything but a list; a text would fall apart into letters.
    """
    for option in options:
        value = getattr(penalty, option)
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise RecipeError(f"{type(penalty).__name__}: {option} must be a list, got {value!r}; write [{value!r}]")
        object.__setattr__(penalty, option, tuple(value))
