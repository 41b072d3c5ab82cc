"""Every error that a user can cause. Each says what came, what was expected, where, and what to do.

All derive from :class:`SecateurError`, so that a caller can catch the library's refusals without
catching its bugs. The command line turns any of them into one message and exit code 2.
"""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Iterable


class SecateurWarning(UserWarning):
    """Something was done as asked, and is likely not what was meant."""


class SecateurError(Exception):
    """A refusal: the input cannot be honoured as asked, and nothing was changed."""


class RecipeError(SecateurError):
    """A recipe file or a combination of parts is invalid; carries file, field path and value."""


class UnknownNameError(SecateurError):
    """A name that is not registered; the message lists the nearest valid one."""


class SelectionError(SecateurError):
    """Scores cannot be ranked: NaN or infinite values, wrong shape, or an impossible count."""


class WeightError(SecateurError):
    """A weight that cannot be pruned: not finite, quantised, on the meta device, or overlapping another."""


class PatternError(SecateurError):
    """A pattern that does not fit a weight's shape, such as 2:4 on 7 input features."""


class TargetError(SecateurError):
    """A target outside its range, or beyond what can be reached; the message gives the reachable maximum."""


class MissingStatsError(SecateurError):
    """A score needs data (gradients, activations) that nobody supplied."""


class CheckpointError(SecateurError):
    """A checkpoint or model file is missing, truncated, hostile, or could not be written."""


class DataError(SecateurError):
    """A data or model factory returned something the pipeline cannot use."""


class SparseError(SecateurError):
    """The sparse kernels are missing or of another version, or refused what they were given."""


class ExportError(SecateurError):
    """An export failed, or the exported model does not equal the one it came from."""


class GraphError(SecateurError):
    """A model that cannot be pruned structurally as asked; names the module, the operator and the way out."""


class PlanError(SecateurError):
    """A pruning plan that does not fit the model it is applied to, or a file that is none."""


class MetricsError(SecateurError):
    """A figure that cannot be counted or measured as asked; names what stopped it and what to do."""


class MissingExtraError(SecateurError):
    """An optional dependency is not installed; the message names the extra to install."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"this needs the package {package!r}: pip install 'secateur[{extra}]'")


def check_choice(what: str, value: object, choices: Iterable[object]) -> None:
    """Refuse a value that is not one of the choices: a misspelt option must not become another method.

    Args:
        what: Which option, for the message.
        value: What was given.
        choices: What would have been accepted.

    Raises:
        UnknownNameError: When it is none of them.
    """
    valid = list(choices)
    if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in valid):
        hint = nearest(value, map(str, valid)) if isinstance(value, str) else "valid: " + ", ".join(map(repr, valid))
        raise UnknownNameError(f"{what} is {value!r}; {hint}")


def check_number(
    what: str,
    value: object,
    *,
    least: float = 0.0,
    above: bool = False,
    most: float = math.inf,
    below: bool = False,
    error: type[SecateurError] = RecipeError,
) -> None:
    """Refuse what is no finite number of a range: a text, a truth value, NaN.

    Args:
        what: Which option, for the message: ``"l1: strength"``.
        value: What was given.
        least: The least that it may be; minus infinity for none.
        above: Whether it must be more than that.
        most: The most that it may be.
        below: Whether it must be less than that.
        error: What to raise.

    Raises:
        SecateurError: Of that type; says what came and what was expected.
    """
    # Neither infinite, nor NaN, nor a whole number beyond any float.
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if number and not (value < least or value > most or (above and value == least) or (below and value == most)):  # type: ignore[operator]
        return
    if least == -math.inf and most == math.inf:
        raise error(f"{what} must be a finite number, got {value!r}")
    lower = f"{'above' if above else 'of at least'} {least:g}" if least > -math.inf else ""
    upper = f"{'below' if below else 'at most'} {most:g}" if most < math.inf else ""
    raise error(f"{what} must be a number {' and '.join(filter(None, (lower, upper)))}, got {value!r}")


def check_whole(what: str, value: object, *, least: int = 1, error: type[SecateurError] = RecipeError) -> None:
    """Refuse what is no whole number, or too small.

    Args:
        what: Which option, for the message.
        value: What was given.
        least: The least that it may be.
        error: What to raise.

    Raises:
        SecateurError: Of that type; says what came and what was expected.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise error(f"{what} must be a whole number of at least {least}, got {value!r}")


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return a sentence naming the closest valid name, or all of them when none is close.

    Args:
        name: What the user wrote.
        valid: What would have been accepted.

    Returns:
        ``"did you mean 'global'?"``, or ``"valid: 'a', 'b'"``.

    Example:
        >>> nearest("globl", ["layerwise", "global"])
        "did you mean 'global'?"
        >>> nearest("x", ["a", "b"])
        "valid: 'a', 'b'"
    """
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return "valid: " + ", ".join(repr(n) for n in names)
