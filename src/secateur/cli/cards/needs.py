"""What a part must have collected before it can say anything, in words."""

from __future__ import annotations

import json
import typing
from collections.abc import Callable, Iterable
from typing import Any, Literal

from secateur.cli.cards.options import EXAMPLES, Option
from secateur.cli.docstrings import parse
from secateur.types import Need

_STATISTICS = {
    "gradient": "the mean gradient of the loss over prune.score_batches batches",
    "absolute_gradient": "the mean absolute gradient of the loss over prune.score_batches batches",
    "unit_product": "weight times gradient, added up per unit: loss_fn and batches",
    "unit_product_square": "weight times gradient, added up per unit and squared per batch: loss_fn and batches",
    "unit_product_absolute": "weight times gradient, added up per unit, its size per batch: loss_fn and batches",
    "activation_product": "activation times gradient per unit and sample: loss_fn and batches",
    "activation_product_absolute": "the size of activation times gradient per unit and sample: loss_fn and batches",
    "activation_product_square": "activation times gradient per unit and sample, squared: batches",
    "activation_product_recent": "activation times gradient per unit, the latest batches most: loss_fn and batches",
    "centred_product_square": "activation, less its mean, times gradient per unit and sample, squared: batches",
    "stream_turn": "how far each block turns the stream that passes through it: batches without labels",
    "unit_macs": "the multiplications that a unit costs, counted on the recorded forward",
    "input_absolute": "what the layers that read a unit get, its mean size: batches without labels",
    "input_square": "what the layers that read a unit get, its mean square: batches without labels",
    "input_variance": "what the layers that read a unit get, its variance: batches without labels",
    "input_nonzero": "what the layers that read a unit get, how often it is not zero: batches without labels",
}


def needs_of(factory: Callable[..., Any], options: tuple[Option, ...]) -> list[str]:
    """Say what a score must have collected, by the values of the option that it depends on, if one does."""
    required = {o.name: EXAMPLES.get(o.name) for o in options if o.required}
    hints = typing.get_type_hints(factory)
    words = {name: typing.get_args(h) for name, h in hints.items() if typing.get_origin(h) is Literal}
    by_needs: dict[str, list[str]] = {}
    for name, choices in words.items():
        found: dict[str, list[str]] = {}
        for value in choices:
            found.setdefault(_needed(factory(**{**required, name: value}).needs), []).append(json.dumps(value))
        if len(found) > 1:
            by_needs = {needs: [f"{name} = {values[0]}", *values[1:]] for needs, values in found.items()}
            break
    by_needs = by_needs or {_needed(factory(**required).needs): []}
    return [f"{what} ({' or '.join(when)})" if when else what for what, when in by_needs.items()]


def _needed(needs: Iterable[Need]) -> str:
    """Say what is collected."""
    words = dict.fromkeys(_need_words(need) for need in sorted(needs, key=repr))
    return ", ".join(words) or "nothing but the weights"


def _need_words(need: Any) -> str:
    """Say what a need is: a simple statistic by name, one with options by its docstring's first line."""
    if isinstance(need, str):
        return _STATISTICS.get(need, need)
    supplied = {"loss": "loss_fn", "batches": "batches", "example_inputs": "example_inputs"}
    supply = [
        supplied.get(use, "a training that is watched") for use in supplied | {"trajectory": ""} if use in need.uses
    ]
    line = parse(type(need).__doc__).summary.rstrip(".")
    words = f"{type(need).__name__}: {line[:1].lower()}{line[1:]}"
    return f"{words} ({' and '.join(supply)})" if supply else words
