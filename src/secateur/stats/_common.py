"""What statistics share: the data they were promised, parameters that can be differentiated, samples of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from secateur.errors import MissingStatsError
from secateur.forward import attention_fast_path, evaluation_mode_of
from secateur.stats.gradients import LossFn
from secateur.types import Source

LOSS_AND_BATCHES = frozenset({"loss", "batches"})


def data_of(who: object, source: Source) -> tuple[LossFn, Callable[[], Iterable[Any]]]:
    """Return loss and batches.

    Args:
        who: The statistic, for the message.
        source: What it is collected from.

    Raises:
        MissingStatsError: When there are none.
    """
    if source.loss_fn is None or source.batches is None:
        raise MissingStatsError(f"{who} needs loss_fn=lambda model, batch: ... and batches=[...]")
    return source.loss_fn, source.batches


def counted(who: object, batches: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """Number the batches, and refuse to end without one.

    Args:
        who: The statistic, for the message.
        batches: The batches.

    Yields:
        Number and batch.

    Raises:
        MissingStatsError: When there was none.
    """
    index = -1
    for index, batch in enumerate(batches):
        yield index, batch
    if index < 0:
        raise MissingStatsError(f"{who} looks at batches, and there were none")


@contextmanager
def differentiable(who: object, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Evaluate with gradients by all parameters, frozen ones included; everything is put back.

    Args:
        who: The statistic, for the message.
        model: The model.
        parameters: What to differentiate by.

    Raises:
        MissingStatsError: When a parameter holds integers, by which nothing can be differentiated.
    """
    for name, parameter in parameters.items():
        if not parameter.is_floating_point():
            raise MissingStatsError(f"{who}: {name} has dtype {parameter.dtype}, which has no gradient; exclude it")
    frozen = [p for p in parameters.values() if not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with evaluation_mode_of(model), attention_fast_path(enabled=False), torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def zeros_like(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return sums to add to, in float32 or wider."""
    return {n: torch.zeros_like(p, dtype=wide(p.dtype), requires_grad=False) for n, p in parameters.items()}


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to add up in."""
    return torch.promote_types(dtype, torch.float32)


def refuse_nothing(who: object, values: Mapping[str, Tensor], why: str) -> None:
    """Refuse a statistic that is zero everywhere, or not finite somewhere: it ranks nothing.

    Args:
        who: The statistic, for the message.
        values: What was collected.
        why: What makes it zero, and what to do.

    Raises:
        MissingStatsError: Says which.
    """
    for name, value in values.items():
        if not bool(torch.isfinite(value).all()):
            raise MissingStatsError(f"{who} of {name} is NaN or infinite; the loss or the weights are too large for it")
    if not any(bool(value.any()) for value in values.values()):
        raise MissingStatsError(f"{who} is zero for every weight, which ranks nothing: {why}")


class Samples:
    """A batch taken apart into samples: the tensors whose first dimension counts them, and everything else.

    Args:
        who: The statistic, for the message.
        batch: Any nesting of lists, tuples and dicts.

    Raises:
        MissingStatsError: When the batch has no tensors, or tensors of different first dimensions.
    """

    def __init__(self, who: object, batch: Any) -> None:
        leaves, self._spec = tree_flatten(batch)
        self._leaves: list[Any] = leaves
        self.places = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor) and leaf.dim()]
        sizes = {self._leaves[i].shape[0] for i in self.places}
        if len(sizes) != 1:
            found = f"tensors of {sorted(sizes)} rows" if sizes else f"no tensor in a {type(batch).__name__}"
            raise MissingStatsError(
                f"{who} takes batches apart into samples, by the first dimension of every tensor in them, and found "
                f"{found}; give lists, tuples or dicts of tensors with one first dimension"
            )
        (self.count,) = sizes

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that hold samples."""
        return [self._leaves[i] for i in self.places]

    def batch(self, tensors: Iterable[Tensor]) -> Any:
        """Return a batch of other samples."""
        leaves = list(self._leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        return tree_unflatten(leaves, self._spec)

    def part(self, start: int, stop: int) -> Any:
        """Return a batch of some of the samples."""
        return self.batch([tensor[start:stop] for tensor in self.tensors])


def check_mean(who: object, loss_fn: LossFn, model: nn.Module, samples: Samples) -> None:
    """Refuse a loss that is no mean over samples: a sample's own gradient would not be its share of the batch's.

    The loss of the batch is compared with those of its first sample, of both halves and of all but the first.

    Args:
        who: The statistic, for the message.
        loss_fn: The loss.
        model: The model, in evaluation mode.
        samples: A batch.

    Raises:
        MissingStatsError: When they do not add up.
    """
    n = samples.count
    if n < 2:
        return
    # Sixteen bits have two or three digits.
    slack = 1e-3 if all(p.dtype.itemsize >= 4 for p in model.parameters()) else 3e-2
    with torch.no_grad():
        whole = _value(loss_fn, model, samples.part(0, n))
        for cut in sorted({1, n // 2}):
            first, rest = (_value(loss_fn, model, samples.part(*span)) for span in ((0, cut), (cut, n)))
            mean = (cut * first + (n - cut) * rest) / n
            if not abs(mean - whole) <= slack * max(abs(whole), abs(first), abs(rest)) + 1e-6:
                raise MissingStatsError(
                    f"{who} needs the gradient of each sample alone, and the loss of a batch of {n} ({whole:.6g}) is "
                    f"not the mean over its samples (parts of {cut} and {n - cut}: {mean:.6g}): it is a sum or "
                    "weighted, or the model or the loss couples the samples of a batch. Return the mean over samples"
                )


def _value(loss_fn: LossFn, model: nn.Module, batch: Any) -> float:
    return float(loss_fn(model, batch))
