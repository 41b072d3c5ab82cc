"""Training mode without chance: every draw is replaced by a constant, so that two widths can be compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from secateur.graph.calls import bind, op_name
from secateur.graph.composite import Decomposing

_Bound = dict[str, Any]


class Still(Decomposing):
    """Replaces random numbers by one number in the middle of their range, and dropout by keeping everything.

    Which neurons are dropped means nothing; a pruned model draws other noise than the dense one, and only what is made
    of the noise can be compared.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def act(self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute, without chance."""
        name = op_name(func)
        if name in _CALM and not any(argument.is_out for argument in func._schema.arguments):
            return _CALM[name](bind(func, args, kwargs), func._schema.is_mutable)
        if name == "aten::rrelu_with_noise":
            bound = bind(func, args, kwargs)
            return func(bound["self"], bound["noise"], bound["lower"], bound["upper"], False)
        for i, argument in enumerate(func._schema.arguments):
            if argument.name in ("dropout_p", "dropout") and i < len(args) and isinstance(args[i], float):
                args = (*args[:i], 0.0, *args[i + 1 :])
            elif argument.name in ("dropout_p", "dropout") and argument.name in kwargs:
                kwargs = {**kwargs, argument.name: 0.0}
        return func(*args, **kwargs)


def _filled(middle: Callable[[_Bound], float]) -> Callable[[_Bound, bool], Any]:
    """Fill the first argument, or a tensor like it, with the middle of a range."""

    def fill(bound: _Bound, in_place: bool) -> Tensor:
        first = next(iter(bound.values()))
        shape = first if isinstance(first, Tensor) else bound["std"] if isinstance(bound.get("std"), Tensor) else None
        if shape is None:
            return torch.full(bound["size"], middle(bound), dtype=bound.get("dtype"), device=bound.get("device"))
        return shape.fill_(middle(bound)) if in_place else torch.full_like(shape, middle(bound))

    return fill


def _made(middle: Callable[[_Bound], float]) -> Callable[[_Bound, bool], Any]:
    """Make a tensor of the size asked for."""

    def make(bound: _Bound, in_place: bool) -> Tensor:
        dtype, device = bound.get("dtype") or torch.get_default_dtype(), bound.get("device")
        return torch.full(bound["size"], middle(bound), dtype=dtype, device=device)

    return make


def _integers(bound: _Bound, in_place: bool) -> Tensor:
    return torch.full(bound["size"], bound.get("low") or 0, **_whole_numbers(bound))


def _in_order(bound: _Bound, in_place: bool) -> Tensor:
    return torch.arange(bound["n"], **_whole_numbers(bound))


def _whole_numbers(bound: _Bound) -> dict[str, Any]:
    dtype = bound["dtype"] if isinstance(bound["dtype"], torch.dtype) else torch.int64  # a schema's default is a number
    return {"dtype": dtype, "device": bound.get("device")}


def _whole(bound: _Bound, in_place: bool) -> tuple[Tensor, Tensor]:
    kept: Tensor = bound["input"]
    return kept.clone(), torch.ones_like(kept, dtype=torch.bool)


def _likeliest(bound: _Bound, in_place: bool) -> Tensor:
    chosen = bound["self"].topk(min(bound["num_samples"], bound["self"].shape[-1]), dim=-1).indices
    out: Tensor = chosen[..., torch.arange(bound["num_samples"], device=chosen.device) % chosen.shape[-1]]
    return out


def _halfway(bound: _Bound) -> float:
    return float((bound.get("from", 0.0) + bound.get("to", 1.0)) / 2)


_CALM: dict[str, Callable[[_Bound, bool], Any]] = {
    "aten::native_dropout": _whole,
    "aten::bernoulli": _filled(lambda _: 1.0),
    "aten::uniform": _filled(_halfway),
    "aten::normal": _filled(lambda _: 0.5),
    "aten::exponential": _filled(lambda _: 1.0),
    "aten::rand_like": _filled(lambda _: 0.5),
    "aten::randn_like": _filled(lambda _: 0.5),
    "aten::rand": _made(lambda _: 0.5),
    "aten::randn": _made(lambda _: 0.5),
    "aten::randint": _integers,
    "aten::randint_like": _filled(lambda bound: bound.get("low") or 0),
    "aten::random": _filled(lambda bound: bound.get("from") or 0),
    "aten::cauchy": _filled(lambda bound: bound.get("median", 0.0) + bound.get("sigma", 1.0)),
    "aten::log_normal": _filled(lambda _: 1.0),
    "aten::geometric": _filled(lambda _: 1.0),
    "aten::poisson": lambda bound, _: bound["self"].round(),
    "aten::binomial": lambda bound, _: (bound["count"] * bound["prob"]).round(),
    "aten::multinomial": _likeliest,
    "aten::randperm": _in_order,
}
