"""What a data factory returns, and batches in an order that depends on nothing but the seed and the epoch."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from secateur.errors import DataError, RecipeError

Split = tuple[Tensor, Tensor] | Dataset[Any]
"""Inputs and targets as two tensors of equal length, or a map-style data set of (input, target) pairs."""


@dataclass(frozen=True)
class Data:
    """What a recipe's data factory returns.

    Attributes:
        train: What the network is trained on, and what scores and batch-norm repair may look at.
        test: What the final figures are measured on; nothing is chosen by it.
        validation: What the curves of the run show; the test split when there is none.
    """

    train: Split
    test: Split
    validation: Split | None = None

    def __post_init__(self) -> None:
        for name in ("train", "test", "validation"):
            split = getattr(self, name)
            if split is not None:
                _check(name, split)


def _check(name: str, split: object) -> None:
    if isinstance(split, tuple):
        shapes = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in split]
        if len(split) != 2 or not all(isinstance(t, Tensor) for t in split):
            raise DataError(f"data.{name}: expected (inputs, targets) as two tensors, got {shapes}")
        if len(split[0]) != len(split[1]):
            raise DataError(f"data.{name}: {len(split[0])} inputs but {len(split[1])} targets")
    elif not (hasattr(split, "__len__") and hasattr(split, "__getitem__")):
        raise DataError(f"data.{name}: expected two tensors or a map-style data set, got {type(split).__name__}")
    if length(split) == 0:  # type: ignore[arg-type]
        raise DataError(f"data.{name} is empty")


def length(split: Split) -> int:
    """Return the number of samples."""
    return len(split[0]) if isinstance(split, tuple) else len(split)  # type: ignore[arg-type]


def order_of(split: Split, seed: int, *what: object) -> Tensor:
    """Return the order of one epoch: a function of seed and name alone, so that it can be taken up half-way."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", *what))
    return torch.randperm(length(split), generator=generator)


def derive_seed(seed: int, *what: object) -> int:
    """Return a seed for one purpose, independent of those for every other."""
    digest = hashlib.blake2b(repr((seed, *what)).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


def seed_everything(seed: int) -> None:
    """Seed torch, numpy and random: a data set's own augmentation may use any of them."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def batches(split: Split, size: int, *, order: Tensor | None = None, start: int = 0) -> Iterator[tuple[Any, Tensor]]:
    """Yield (inputs, targets), from batch number ``start`` on.

    Args:
        split: The data.
        size: Samples per batch; the last one may be smaller.
        order: Indices in the order to visit; all, in order, by default.
        start: Batches to skip without loading them.

    Yields:
        One batch.
    """
    if isinstance(split, tuple):
        inputs, targets = split
        for first in range(start * size, len(inputs) if order is None else len(order), size):
            rows: Any = slice(first, first + size) if order is None else order[first : first + size]
            yield inputs[rows], targets[rows]
        return
    indices = (torch.arange(length(split)) if order is None else order).tolist()
    groups = [indices[i : i + size] for i in range(start * size, len(indices), size)]
    # A generator of its own: the loader would otherwise draw a seed from the global one, and a run taken up in the
    # middle of an epoch would draw once more than one that was not.
    yield from DataLoader(split, batch_sampler=groups, collate_fn=default_collate, generator=torch.Generator())


def score_batches(split: Split, seed: int, *, size: int, count: int) -> Iterator[tuple[Any, Tensor]]:
    """Yield the batches that a score may look at: the same in every call."""
    return islice(batches(split, size, order=order_of(split, seed, "score")), count)


def sample_inputs(split: Split, seed: int, purpose: str, count: int) -> Any:
    """Return the inputs of ``count`` random samples (or of all, if fewer) as one batch, the same in every call."""
    order = order_of(split, seed, purpose)[:count]
    return next(batches(split, len(order), order=order))[0]


def first_inputs(split: Split, count: int) -> Any:
    """Return the inputs of the first ``count`` samples as one batch."""
    return next(batches(split, count))[0]


def check_last_batch(model: nn.Module, data: Data, batch_size: int) -> None:
    """Refuse a last batch of one sample: a batch norm over features has no statistics on it, and says so too late.

    Raises:
        RecipeError: Says how to avoid it.
    """
    if length(data.train) % batch_size == 1 and any(isinstance(m, nn.BatchNorm1d) for m in model.modules()):
        raise RecipeError(
            f"data.batch_size = {batch_size} leaves a last batch of one sample, which BatchNorm1d "
            "cannot be trained on; choose another"
        )
