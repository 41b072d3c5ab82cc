"""Example inputs, and the ways through the forward that they do not take by themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.graph.calls import op_name
from secateur.graph.composite import Decomposing
from secateur.graph.model import call
from secateur.graph.still import Still
from secateur.graph.trees import mapped, tensors
from secateur.graph.valueless import has_values

_READS = frozenset({"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal"})
_FAR = 1e6

MOST_WAYS = 6
"""Branches of one example that are always taken."""

_TURNS: dict[str, Callable[[Any], Any]] = {
    "not": lambda value: not value,
    "negative": lambda value: -value,
    "large": lambda value: value + _FAR,
    "small": lambda value: value - _FAR,
}
"""What a scalar read from a tensor can be turned into, to enter the other side of a comparison."""


@dataclass(frozen=True)
class Example:
    """One call of the forward.

    Attributes:
        args: Positional inputs.
        kwargs: Keyword inputs.
        turns: Scalars read from tensors that are turned round, by number, to enter branches that the inputs themselves
            do not take: (2, "not") for the third.
        training: Whether the model is in training mode, without chance.
        spread: Which pass of those in which routers choose in turn rather than by their scores; 0 for none.
        reads_in: Modules where scalars were read, up to the last one that is turned round.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    turns: tuple[tuple[int, str], ...] = ()
    training: bool = False
    spread: int = 0
    reads_in: frozenset[str] = frozenset()

    def run(self, model: nn.Module) -> Any:
        """Call the model, inside whatever modes are active, on copies of the inputs: a forward may change them.

        Raises:
            GraphError: When the forward fails.
        """
        args, kwargs = copies((self.args, self.kwargs))
        with (
            ScalarReads(dict(self.turns)) if self.turns else nullcontext(),
            Still() if self.training else nullcontext(),
        ):
            return call(model, args, kwargs)

    def shaken(self) -> Example:
        """Return the example with floating-point inputs changed in their last digits, in float64."""
        generator = torch.Generator().manual_seed(0)

        def shake(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.device)
            return value.double() * (1 + noise * 2.0**-52)

        return replace(self, args=mapped(shake, self.args), kwargs=mapped(shake, self.kwargs))

    def double(self) -> Example:
        """Return the example with floating-point inputs in float64."""
        return replace(self, args=_double(self.args), kwargs=_double(self.kwargs))


class ScalarReads(Decomposing):
    """Counts the truth values and numbers that Python reads from tensors, and turns some of them round.

    Args:
        turns: Which, and how; none to count only.
        stack: The modules whose forward is running, outermost first, if that is known.
    """

    def __init__(self, turns: Mapping[int, str] | None = None, stack: Sequence[str] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._turns, self._stack = turns or {}, stack
        self.reads: list[Any] = []
        self.modules: list[str] = []

    def act(self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute; answer otherwise where asked to."""
        out = func(*args, **kwargs)
        if op_name(func) not in _READS:
            return out
        self.reads.append(out)
        self.modules.append(self._stack[-1] if self._stack else "")
        turn = self._turns.get(len(self.reads) - 1)
        fits = isinstance(out, bool) if turn == "not" else isinstance(out, float)
        return _TURNS[turn](out) if turn is not None and fits else out


def other_ways(example: Example, found: ScalarReads, *, far: bool = False) -> list[Example]:
    """Return the example with one more truth value or number turned round at a time, after those that are already.

    Whole numbers are left alone: they are counts and positions, and another one is an error, not a branch.

    Args:
        example: What was run.
        found: What it read.
        far: Whether to make numbers very large and very small, rather than to change their sign.
    """
    first = example.turns[-1][0] + 1 if example.turns else 0
    out = []
    for number, value in enumerate(found.reads[first:], first):
        for turn in _turns_of(value, far):
            turns = (*example.turns, (number, turn))
            out.append(replace(example, turns=turns, reads_in=frozenset(found.modules[: number + 1])))
    return out


def _turns_of(value: Any, far: bool) -> tuple[str, ...]:
    if isinstance(value, bool):
        return () if far else ("not",)
    if not isinstance(value, float) or not math.isfinite(value):
        return ()
    if far:
        return "large", "small"
    return ("negative",) if value else ()


def copies(value: Any) -> Any:
    """Return inputs with every tensor copied; one that occurs twice is one copy."""
    made: dict[int, Tensor] = {}

    def copy_of(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or isinstance(leaf, nn.Parameter):
            return leaf
        if id(leaf) not in made:
            made[id(leaf)] = leaf.detach().clone().requires_grad_(leaf.requires_grad)
        return made[id(leaf)]

    return mapped(copy_of, value)


def unseen(example: Example, seed: int = 1) -> Example:
    """Return inputs of the same shapes with other values: floats of the same spread, integers of the same range.

    Where all floats are alike, as in the zeros that stand for an image, they spread around that value.
    """
    generator = torch.Generator("cpu").manual_seed(seed)

    def other(value: Any) -> Any:
        if not isinstance(value, Tensor) or not has_values(value) or not value.numel():
            return value
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float32, device="cpu").to(value)
            wide = value.float()
            spread = wide.std() if value.numel() > 1 else wide.abs().max()
            if not spread > 0:
                spread = 0.1 * wide.abs().max() if wide.any() else wide.new_ones(())
            return (wide.mean() + noise * spread).to(value.dtype)
        if value.dtype in (torch.int64, torch.int32) and value.max() > 1:
            order = torch.randperm(value.numel(), generator=generator, device="cpu")
            return value.flatten()[order.to(value.device)].reshape(value.shape)
        return value

    return replace(example, args=mapped(other, example.args), kwargs=mapped(other, example.kwargs))


def other_batches(example: Example) -> list[Example]:
    """Return the example with one sample less and with one sample only (or two, if it is one); none without a batch."""
    sizes = {t.shape[0] for t in tensors((example.args, example.kwargs)) if t.dim() > 0}
    if len(sizes) != 1 or not next(iter(sizes)):
        return []
    (size,) = sizes

    def resized(new: int) -> Example:
        def resize(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.dim():
                return value
            return value[:new] if new < size else torch.cat([value, value])

        return replace(example, args=mapped(resize, example.args), kwargs=mapped(resize, example.kwargs))

    return [resized(new) for new in ([2] if size == 1 else sorted({size - 1, 1}))]


def _double(value: Any) -> Any:
    return mapped(lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, value)
