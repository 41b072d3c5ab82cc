"""N of every M consecutive inputs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from secateur.errors import PatternError
from secateur.patterns._layout import from_oki, oki_shape, to_oki
from secateur.select import keep_in_groups
from secateur.types import Masks, Weight


@dataclass(frozen=True)
class NM:
    """N kept of every M consecutive weights along the input dimension: 2:4, 1:4, 4:8, any N <= M.

    The name is **kept**:M. Groups run along the input units of one output unit; for a convolution, at one kernel
    position. The density is N/M in every layer, so a recipe cannot ask for another one, per layer or in total.

    Pitfalls:
        Some tools count the pruned ones instead, which shows only away from 2:4.

    Args:
        n: Weights kept per group, 1 <= n <= m.
        m: Group size.

    Raises:
        PatternError: When not 1 <= n <= m.

    Example:
        >>> import torch
        >>> w = Weight("fc.weight", (1, 4))
        >>> NM(2, 4).select(w, torch.tensor([3.0, 1.0, 2.0, 0.5]), 2).tolist()
        [True, False, True, False]

    References:
        Asit Mishra et al., Accelerating Sparse Deep Neural Networks, 2021. Aojun Zhou et al., Learning N:M
        Fine-grained Structured Sparse Neural Networks From Scratch, 2021.
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        whole = all(isinstance(v, int) and not isinstance(v, bool) for v in (self.n, self.m))
        if not (whole and 1 <= self.n <= self.m):
            raise PatternError(f"{self.n}:{self.m} is not a pattern: N (kept) must be a whole number in 1..M")

    @property
    def density(self) -> float | None:
        """N/M, always."""
        return self.n / self.m

    def check(self, weight: Weight) -> None:
        """Refuse an input dimension that M does not divide.

        Raises:
            PatternError: Names the weight and the two ways out.
        """
        inputs = oki_shape(weight)[2]
        if inputs % self.m:
            raise PatternError(
                f"{weight.name}: {self.n}:{self.m} needs the input dimension to be a multiple of {self.m}, got "
                f"{inputs} in a weight of shape {weight.shape}. Leave it out with exclude = [{weight.name!r}] or "
                f"choose the pattern 'unstructured'"
            )

    def reduce(self, weight: Weight, values: Tensor) -> Tensor:
        """Flatten, input dimension last."""
        return to_oki(weight, values).reshape(-1)

    def sizes(self, weight: Weight) -> int | Tensor:
        """One element per unit."""
        return 1

    def select(self, weight: Weight, scores: Tensor, keep: int) -> Tensor:
        """Keep the N highest of every M.

        Raises:
            PatternError: When ``keep`` is not N/M of the units: this pattern has no other density.
        """
        expected = scores.numel() // self.m * self.n
        if keep != expected:
            raise PatternError(
                f"{weight.name}: {self.n}:{self.m} keeps {expected} of {scores.numel()}, asked for {keep}"
            )
        return keep_in_groups(scores.reshape(-1, self.m), self.n).reshape(-1)

    def expand(self, weight: Weight, kept: Tensor) -> Masks:
        """Give the flags the weight's shape."""
        return {weight.name: from_oki(weight, kept.reshape(oki_shape(weight)))}
