"""Example inputs, and the ways through the forward that they do not take by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.graph.record import call, op_name
from secateur.graph.trees import mapped, tensors

_READS = frozenset({"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal"})
_MOST_FLIPS = 6


@dataclass(frozen=True)
class Example:
    """One call of the forward.

    Attributes:
        args: Positional inputs.
        kwargs: Keyword inputs.
        flip: Number of the scalar read from a tensor whose value is turned round, to enter the branch that the inputs
            themselves do not take; ``None`` for none.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    flip: int | None = None

    def run(self, model: nn.Module) -> Any:
        """Call the model, inside whatever modes are active.

        Raises:
            GraphError: When the forward fails.
        """
        with self.answers():
            return call(model, self.args, self.kwargs)

    @contextmanager
    def answers(self) -> Iterator[None]:
        """Turn the chosen scalar round."""
        if self.flip is None:
            yield
        else:
            with ScalarReads(self.flip):
                yield

    def double(self) -> Example:
        """Return the example with floating-point inputs in float64."""
        return replace(self, args=_double(self.args), kwargs=_double(self.kwargs))


class ScalarReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the truth values and numbers that Python reads from tensors, and turns one of them round.

    Args:
        flip: Which one; ``None`` to count only.
    """

    def __init__(self, flip: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flip = flip
        self.reads: list[Any] = []

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute; answer otherwise if this is the one."""
        out = func(*args, **(kwargs or {}))
        if op_name(func) not in _READS:
            return out
        self.reads.append(out)
        if self.flip == len(self.reads) - 1:
            return not out if isinstance(out, bool) else -out
        return out


def other_ways(example: Example, reads: list[Any]) -> list[Example]:
    """Return the example with one read truth value or number turned round at a time.

    Whole numbers are left alone: they are counts and positions, and a negative one is an error, not a branch.
    """
    turned = [i for i, value in enumerate(reads) if isinstance(value, bool) or (type(value) is float and value != 0)]
    return [replace(example, flip=i) for i in turned[:_MOST_FLIPS]]


def unseen(example: Example, seed: int = 1) -> Example:
    """Return inputs of the same shapes with other values: floats of the same spread, integers of the same range."""
    generator = torch.Generator().manual_seed(seed)

    def other(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.device.type == "meta" or not value.numel():
            return value
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float32).to(value)
            wide = value.float()
            spread = wide.std() if value.numel() > 1 else wide.abs().max()
            return (wide.mean() + noise * (spread if spread > 0 else 0.0)).to(value.dtype)
        if value.dtype in (torch.int64, torch.int32) and value.max() > 1:
            order = torch.randperm(value.numel(), generator=generator)
            return value.flatten()[order.to(value.device)].reshape(value.shape)
        return value

    return replace(example, args=mapped(other, example.args), kwargs=mapped(other, example.kwargs))


def made_up(example: Example) -> list[Example]:
    """Return inputs of other values to try in turn: another number of samples, if there is one, then the same.

    Two samples show what depends on their number as well as many do, and cost less; where the model refuses two, it
    may accept one less than given. A single sample is given twice.
    """
    other = unseen(example)
    sizes = {t.shape[0] for t in tensors((other.args, other.kwargs)) if t.dim() > 0}
    batch = next(iter(sizes)) if len(sizes) == 1 else 0
    numbers = dict.fromkeys((2 if batch > 2 else 0, batch - 1)) if batch > 1 else {2: None} if batch else {}
    return [*(_of_size(other, number) for number in numbers if number), other]


def _of_size(example: Example, number: int) -> Example:
    def resize(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim():
            return value
        return value[:number] if len(value) >= number else torch.cat([value, value])

    return replace(example, args=mapped(resize, example.args), kwargs=mapped(resize, example.kwargs))


def _double(value: Any) -> Any:
    return mapped(lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, value)
