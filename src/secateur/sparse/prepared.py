"""Products that are repeated: what was checked and worked out the first time is kept, and only addresses are filled in.

A layer of a large network finds the caches full of other things, and every step of Python before its product waits for
memory. Where the product itself takes a tenth of a millisecond, that is half of the time.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secateur.sparse.fallback import Csr
from secateur.sparse.formats import Bitmask, Weight
from secateur.sparse.library import ACTIVATIONS, EpilogueStruct, PlanStruct, check
from secateur.sparse.products import as_vectors, kernel_for


class Settings(NamedTuple):
    """What a linear layer does behind its sum, and how: as :func:`secateur.sparse.products.linear` takes it."""

    activation: str
    tile: int
    feature_major: bool


@dataclass(frozen=True, slots=True)
class Prepared:
    """A product with vectors of one shape, laid out in one way.

    Attributes:
        seen: Buffers of the layer, by name, with their versions: what they hold was checked.
        settings: Of the layer.
        shape: Of the vectors.
        strides: Of the vectors.
        threads: That work on it.
        memory: Shape in which the output is allocated.
        out: Shape of the output.
        major: Whether its features lie a step apart.
        function: Of the library.
        before: Its arguments between the vectors and the output.
        after: Its arguments behind the output.
        weight: Its first argument.
        alive: What the arguments point to.
    """

    seen: list[tuple[str, Tensor | None, int]]
    settings: Settings
    shape: torch.Size
    strides: tuple[int, ...]
    threads: int
    memory: tuple[int, ...]
    out: tuple[int, ...]
    major: bool
    function: Any
    before: tuple[int, ...]
    after: tuple[Any, ...]
    weight: Any
    alive: Any

    @classmethod
    def of(cls, weight: Weight, buffers: Mapping[str, Tensor | None], settings: Settings, x: Tensor) -> Prepared | None:
        """Return a product to be repeated, once it has been carried out; nothing where it needs more than addresses.

        Args:
            weight: Of the layer, its indices checked.
            buffers: Of the layer.
            settings: Of the layer.
            x: What the layer was given.
        """
        count, bias = math.prod(x.shape[:-1]), buffers["bias"]
        if isinstance(weight, Csr) or type(x) is not Tensor or x.is_neg() or count < 1:
            return None
        if (count > 1 and isinstance(weight, Bitmask)) or not (bias is None or bias.is_contiguous()):
            return None
        vectors = as_vectors(x, count)
        if vectors.data_ptr() != x.data_ptr() or (count == 1 and not x.is_contiguous()):
            return None
        try:
            seen = [(name, t, 0 if t is None else t._version) for name, t in buffers.items()]
        except RuntimeError:  # made in inference mode: nobody counts what is done to it
            return None
        activation, tile, feature_major = settings
        major, threads, rows = feature_major and count > 1, torch.get_num_threads(), weight.rows
        before: tuple[int, ...] = ()
        after: tuple[int, ...] = ()
        if count > 1:
            before = vectors.stride()
            after = (1, count, count) if major else (rows, 1, count)
        address = None if bias is None else bias.data_ptr()
        ends = EpilogueStruct(address, None, ACTIVATIONS.index(activation)), PlanStruct(threads, tile)
        out = (*x.shape[:-1], rows)
        return cls(
            seen=seen,
            settings=settings,
            shape=x.shape,
            strides=x.stride(),
            threads=threads,
            memory=(rows, count) if major else out,
            out=out,
            major=major,
            function=kernel_for(weight, count),
            before=before,
            after=(*after, *map(ctypes.byref, ends)),
            weight=ctypes.byref(weight.struct),
            alive=(weight, ends),
        )

    def repeat(self, buffers: Mapping[str, Tensor | None], settings: Settings, x: Tensor) -> Tensor | None:
        """Return the product with other vectors; nothing where anything is not as it was."""
        if type(x) is not Tensor or x.shape != self.shape or x.stride() != self.strides or settings != self.settings:
            return None
        if x.dtype is not torch.float32 or not x.is_cpu or x.is_neg() or torch.get_num_threads() != self.threads:
            return None
        if x.requires_grad and torch.is_grad_enabled():
            return None
        for name, tensor, version in self.seen:
            if buffers[name] is not tensor or (tensor is not None and tensor._version != version):
                return None
        out = torch.empty(self.memory)
        status = self.function(self.weight, x.data_ptr(), *self.before, out.data_ptr(), *self.after)
        if status:
            check(status, "a sparse product")
        return out.t().view(self.out) if self.major else out
