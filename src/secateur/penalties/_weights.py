"""What all penalties on weights share: which parameters they press on, and numbers that make sense."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Collection, Sequence

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


def check_number(where: str, value: float, *, least: float = 0.0, above: bool = False, most: float = math.inf) -> None:
    """Refuse what is no number of a range.

    Args:
        where: What it is, for the message: ``"l1: strength"``.
        value: The number; finite.
        least: The least that it may be.
        above: Whether it must be more than that.
        most: The most.

    Raises:
        RecipeError: Says what came and what was expected.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < least or value > most or (above and value == least):
        upper = f" and at most {most:g}" if most < math.inf else ""
        raise RecipeError(
            f"{where} must be a number {'above' if above else 'of at least'} {least:g}{upper}, got {value!r}"
        )
