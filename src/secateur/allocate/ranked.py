"""One ranking over all layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from secateur.select import global_counts
from secateur.types import Units


@dataclass(frozen=True)
class Global:
    """Rank the units of all layers together; a layer keeps what survives.

    Each layer keeps at least its floor (one unit), taken before the ranking: a plain global ranking can empty a layer
    and so cut the network in two.

    Pitfalls:
        The score decides the layers' shares, so it must be comparable between them: magnitudes of layers of different
        kinds, as in transformers, are not.

    Cost:
        One ranking of all units, by histograms of their scores: a few passes over them, no sort.

    Example:
        >>> import torch
        >>> units = {"a": Units(torch.tensor([9.0, 8.0, 7.0]), 1), "b": Units(torch.tensor([1.0, 2.0]), 1)}
        >>> Global()(units, 4)
        {'a': 3, 'b': 1}

    References:
        Davis Blalock, Jose Javier Gonzalez Ortiz, Jonathan Frankle, John Guttag, What is the State of Neural Network
        Pruning?, 2020.
    """

    def __call__(self, units: Mapping[str, Units], kept: float) -> dict[str, int]:
        """Return the number of units that stay in each layer."""
        return global_counts(units, kept)
