"""Numbers and recipes in words, the same on the page and in the terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

NARROW = "\u202f"
"""Narrow no-break space, between a number and its unit and between thousands."""

MINUS = "\u2212"

_SHARES = ("accuracy", "precision", "recall", "f1", "top1", "top5")


def dig(values: Any, *keys: str) -> Any:
    """Follow keys through nested mappings; ``None`` where one is missing.

    Example:
        >>> dig({"a": {"b": 1}}, "a", "b"), dig({"a": None}, "a", "b")
        (1, None)
    """
    for key in keys:
        if not isinstance(values, Mapping):
            return None
        values = values.get(key)
    return values


def number(value: Any) -> float | None:
    """Return a number as it is, and anything else (a string, a bool, nothing) as ``None``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value


def exact(value: float) -> str:
    """Return every digit, for a tooltip.

    Example:
        >>> exact(151402), exact(0.1)
        ('151402', '0.1')
    """
    return repr(value)


def sign(value: float) -> str:
    """Return the sign of a difference: ``+``, a real minus, or ``±`` for none."""
    return "+" if value > 0 else MINUS if value < 0 else "\u00b1"


def significant(value: float, digits: int = 3) -> str:
    """Round to significant digits, with narrow spaces between thousands and a power of ten for tiny values.

    Example:
        >>> significant(0.42934), significant(12.0), significant(0.000012).replace(NARROW, " ")
        ('0.429', '12.0', '1.20 × 10⁻⁵')
    """
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    power = math.floor(math.log10(abs(value)))
    if power < -4:
        mantissa, _, exponent = f"{value:.{digits - 1}e}".replace("-", MINUS, value < 0).partition("e")
        raised = "".join("⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".index(c)] for c in str(int(exponent)))
        return f"{mantissa}{NARROW}×{NARROW}10{raised}"
    return f"{value:,.{max(digits - 1 - power, 0)}f}".replace(",", NARROW).replace("-", MINUS)


def count(value: float) -> str:
    """Return a count: whole up to 9 999, then three digits and k, M, G or T.

    Example:
        >>> count(640), count(151402).replace(NARROW, " "), count(1_234_567).replace(NARROW, " ")
        ('640', '151 k', '1.23 M')
    """
    if not math.isfinite(value):
        return "not finite"
    if abs(value) < 10_000:
        return f"{value:,.0f}".replace(",", NARROW)
    return _scaled(value, 1000, ("", "k", "M", "G", "T", "P"))


def size(value: float) -> str:
    """Return bytes.

    Example:
        >>> size(512).replace(NARROW, " "), size(46_694).replace(NARROW, " ")
        ('512 B', '45.6 KiB')
    """
    return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB")) if value >= 1024 else f"{value:.0f}{NARROW}B"


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    step = 0
    while abs(value) >= base and step < len(units) - 1:
        value, step = value / base, step + 1
    # 999 999 would round to "1000 k": that is 1.00 M.
    if step < len(units) - 1 and abs(value) >= min(base, 1000) - 0.5:
        value, step = value / base, step + 1
    return f"{significant(value)}{NARROW}{units[step]}"


def fraction(value: float) -> str:
    """Return a fraction with four digits."""
    return f"{value:.4f}" if math.isfinite(value) else "not finite"


def brief(value: float) -> str:
    """Return a fraction with up to four digits.

    Example:
        >>> brief(0.9000013), brief(0.8415)
        ('0.9', '0.8415')
    """
    text = fraction(value)
    return text.rstrip("0").rstrip(".") if "." in text else text


def round_percent(value: float) -> str:
    """Return a fraction as a percentage, without a digit that says nothing.

    Example:
        >>> round_percent(0.9000013).replace(NARROW, " "), round_percent(0.8415).replace(NARROW, " ")
        ('90 %', '84.2 %')
    """
    return percent(value).replace(f".0{NARROW}", NARROW)


def percent(value: float, digits: int = 1) -> str:
    """Return a fraction as a percentage.

    Example:
        >>> percent(0.97333).replace(NARROW, " ")
        '97.3 %'
    """
    return f"{100 * value:.{digits}f}{NARROW}%" if math.isfinite(value) else "not finite"


def seconds(value: float) -> str:
    """Return a duration.

    Example:
        >>> [seconds(s).replace(NARROW, " ") for s in (0.0004293, 1.5, 75, 7380)]
        ['0.429 ms', '1.50 s', '1 min 15 s', '2 h 3 min']
    """
    if value < 1:
        return f"{significant(1000 * value)}{NARROW}ms"
    if value < 60:
        return f"{significant(value)}{NARROW}s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60}{NARROW}min {whole % 60}{NARROW}s"
    return f"{whole // 3600}{NARROW}h {whole % 3600 // 60}{NARROW}min"


def joules(value: float) -> str:
    """Return an energy.

    Example:
        >>> joules(0.000103).replace(NARROW, " ")
        '103 µJ'
    """
    for scale, unit in ((1, "J"), (1e3, "mJ"), (1e6, "µJ")):
        if abs(value) * scale >= 1:
            return f"{significant(value * scale)}{NARROW}{unit}"
    return f"{significant(value * 1e9)}{NARROW}nJ"


def is_share(name: str) -> bool:
    """Whether a figure is a fraction of the examples, and so is shown as a percentage."""
    return any(word in name.lower() for word in _SHARES)


def plain(name: str) -> str:
    """Return a field's name as words.

    Example:
        >>> plain("top5_accuracy")
        'top-5 accuracy'
    """
    return re.sub(r"\btop(\d)", r"top-\1", name.replace("_", " "))


def part_name(part: Any) -> str:
    """Return the name of a recipe's part, given as a string or as a table with a ``name``."""
    found = part.get("name") if isinstance(part, Mapping) else part
    return plain(found) if isinstance(found, str) else ""


def method_words(recipe: Any) -> str:
    """Name the method in a recipe: ``"iterative global magnitude"``.

    Example:
        >>> method_words({"prune": {"schedule": {"name": "iterative"}, "allocate": "global", "score": "magnitude"}})
        'iterative global magnitude'
        >>> method_words({"train": {"dynamics": {"name": "rigl"}}, "prune": {"allocate": "erk", "score": "random"}})
        'rigl, from erk random'
    """
    learnt, moves = (part_name(dig(recipe, "train", axis)) for axis in ("parametrisation", "dynamics"))
    if learnt:
        return learnt
    prune = dig(recipe, "prune")
    words = [part_name(dig(prune, axis)) for axis in ("allocate", "score")]
    words = [f"{moves}, from", *words] if moves else [part_name(dig(prune, "schedule")), *words]
    ablation = part_name(dig(prune, "ablate"))
    marked = [f"(ablation: {ablation})"] if ablation else []
    return " ".join([*(word.replace("one shot", "one-shot") for word in words if word), *marked])


def pattern_words(recipe: Any) -> str:
    """Say what is removed together, or nothing when the recipe does not."""
    learnt = dig(recipe, "train", "parametrisation")
    pattern = learnt or dig(recipe, "prune", "pattern")
    name = part_name(pattern)
    if learnt:
        units = name == "l0" and dig(learnt, "group") != "weight"
        name = "nm" if name == "sr ste" else "channel" if units else "unstructured"
        pattern = {"n": 2, "m": 4, **learnt} if isinstance(learnt, Mapping) else learnt
    if name == "nm":
        kept, of = dig(pattern, "n"), dig(pattern, "m")
        return f"{kept} of every {of} neighbouring weights are kept" if kept and of else "N of every M weights are kept"
    known = {
        "unstructured": "Single weights are removed, anywhere in a layer",
        "block": "Small blocks of weights are removed together",
        "channel": "Whole channels (filters and neurons) are removed",
    }
    return known.get(name, f"What is removed together: {name}" if name else "")


def retrain_words(recipe: Any) -> str:
    """Say how the network was retrained, or nothing when the recipe does not."""
    retrain = dig(recipe, "recover", "retrain")
    name, epochs = part_name(retrain), dig(retrain, "epochs")
    if name == "nothing":
        return "It was not retrained afterwards"
    if not name:
        return ""
    length = f" for {epochs} {'epoch' if epochs == 1 else 'epochs'}" if isinstance(epochs, int) else ""
    how = "fine-tuned" if name == "fine tune" else f"retrained ({name})"
    # Schedules in steps or epochs prune while the network trains, so "after" would be wrong for them.
    when = {"one shot": " after pruning", "iterative": " after each pruning round"}
    after = when.get(part_name(dig(recipe, "prune", "schedule")), "")
    teacher = ", learning from the dense network, too" if dig(recipe, "recover", "distill") else ""
    return f"It was {how}{length}{after}{teacher}"
