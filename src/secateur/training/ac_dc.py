"""AC/DC: dense and sparse phases in turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from secateur.errors import RecipeError, check_choice, check_whole
from secateur.types import Move, Turn

Unit = Literal["steps", "epochs"]


@dataclass(frozen=True)
class ACDC:
    """Alternate between compressed and decompressed training.

    ================================ ==========================
    phases, in this order            length of each
    ================================ ==========================
    dense                            ``warm_up``
    sparse, dense, ..., sparse       ``sparse``, ``dense``
    dense                            ``last_dense``
    sparse                           ``last_sparse``
    ================================ ==========================

    At each compression the method's score and allocation choose afresh among all weights (the paper: magnitude,
    ``global``), so the weights that stay differ from phase to phase. At each decompression every weight may move, from
    zero where it was masked, and the optimizer starts afresh: momentum of masked weights, gathered from dense
    gradients, would push them all at once. The last phase is sparse. A by-product is the dense network of the end of
    the last dense phase.

    The phases must fill the training exactly. The defaults are those with which the authors trained ImageNet for 100
    epochs: compressed at the ends of epochs 10, 20, ..., 70 and 85, decompressed at those of 15, 25, ..., 65 and 75.
    Their longer trainings have the same phases and more of them.

    Pitfalls:
        The masks of the finished network are chosen when the last phase begins: it must be long enough to recover from
        that, at a learning rate that still allows it. A network measured in a dense phase is not the sparse one.

    Args:
        total: Length of the training.
        warm_up: Length of the first dense phase.
        sparse: Length of a sparse phase.
        dense: Length of a dense phase.
        last_dense: Length of the dense phase before the last one.
        last_sparse: Length of the last phase.
        unit: What the lengths count.

    Raises:
        RecipeError: When a length is below 1, or the phases do not add up to the total.

    Example:
        >>> ACDC(total=10, warm_up=2, sparse=1, dense=1, last_dense=1, last_sparse=2).phases
        ((2, 'sparse'), (3, 'dense'), (4, 'sparse'), (5, 'dense'), (6, 'sparse'), (7, 'dense'), (8, 'sparse'))

    References:
        Alexandra Peste, Eugenia Iofinova, Adrian Vladu, Dan Alistarh, AC/DC: Alternating Compressed/DeCompressed
        Training of Deep Neural Networks, 2021.
    """

    total: int = 100
    warm_up: int = 10
    sparse: int = 5
    dense: int = 5
    last_dense: int = 10
    last_sparse: int = 15
    unit: Unit = "epochs"

    def __post_init__(self) -> None:
        check_choice("ac_dc: unit", self.unit, get_args(Unit))
        check_whole("ac_dc: total", self.total)
        check_whole("ac_dc: warm_up", self.warm_up)
        check_whole("ac_dc: sparse", self.sparse)
        check_whole("ac_dc: dense", self.dense)
        check_whole("ac_dc: last_dense", self.last_dense)
        check_whole("ac_dc: last_sparse", self.last_sparse)
        fixed = self.warm_up + self.sparse + self.last_dense + self.last_sparse
        pairs, over = divmod(self.total - fixed, self.sparse + self.dense)
        if pairs < 0 or over:
            fits = [fixed + max(pairs + i, 0) * (self.sparse + self.dense) for i in (0, 1)]
            raise RecipeError(
                f"ac_dc: the phases do not fill total={self.total}: warm_up={self.warm_up}, then sparse={self.sparse} "
                f"and dense={self.dense} in turn, last_dense={self.last_dense} and last_sparse={self.last_sparse} fit "
                f"{' or '.join(str(n) for n in dict.fromkeys(fits))}; change total or a phase"
            )

    @property
    def phases(self) -> tuple[tuple[int, str], ...]:
        """Time at which each phase after the warm-up begins, and what it is."""
        out, time = [], self.warm_up
        turns = (self.total - self.warm_up - self.last_dense - self.last_sparse + self.dense) // (
            self.sparse + self.dense
        )
        for turn in range(turns):
            out += [(time, "sparse"), (time + self.sparse, "dense")]
            time += self.sparse + (self.dense if turn < turns - 1 else self.last_dense)
        return (*out, (time, "sparse"))

    @property
    def needs(self) -> frozenset[str]:
        """Nothing."""
        return frozenset()

    @property
    def sparse_start(self) -> bool:
        """No: it warms up dense."""
        return False

    @property
    def last(self) -> int | None:
        """The beginning of the last phase."""
        return self.total - self.last_sparse

    def due(self, time: int) -> bool:
        """Where a phase begins."""
        return any(time == begin for begin, _ in self.phases)

    def update(self, turn: Turn) -> Move:
        """Compress or decompress."""
        if dict(self.phases)[turn.time] == "dense":
            return Move({}, 0.0, restart=True)
        return Move(turn.select(turn.final), turn.final)
