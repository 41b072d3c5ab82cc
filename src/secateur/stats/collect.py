"""Everything that parts list in ``needs``, collected once."""

from __future__ import annotations

from collections.abc import Iterable

from secateur.errors import MissingStatsError
from secateur.stats.gradients import collect_gradients
from secateur.stats.trajectory import HOW
from secateur.types import Need, Source, Statistic, Stats

STATISTICS = frozenset({"gradient", "absolute_gradient"})
"""Names that a score may list in ``needs``; others are objects that collect themselves."""


def check_needs(
    needs: Iterable[Need], who: object, *, loss: bool, batches: bool, example_inputs: bool
) -> frozenset[Need]:
    """Refuse, before anything is trained or collected, a part that needs what nobody supplied.

    Args:
        needs: What the part needs.
        who: The part, for messages.
        loss: Whether there is a loss.
        batches: Whether there are batches.
        example_inputs: Whether there are example inputs.

    Returns:
        The needs.

    Raises:
        MissingStatsError: Names the part and what to pass.
    """
    wanted = frozenset(needs)
    unknown = sorted(n for n in wanted if isinstance(n, str) and n not in STATISTICS)
    unknown += [repr(n) for n in wanted if not isinstance(n, str | Statistic)]
    if unknown:
        raise MissingStatsError(f"{who} needs {unknown}, which nothing here collects")
    if any(isinstance(n, str) for n in wanted) and not (loss and batches):
        raise MissingStatsError(f"{who} needs gradients: pass loss_fn=lambda model, batch: ... and batches=[...]")
    given = {"loss": loss, "batches": batches, "example_inputs": example_inputs}
    how = {
        "loss": "loss_fn=lambda model, batch: ...",
        "batches": "batches=[...]",
        "example_inputs": "example_inputs=(x,), what one forward pass takes",
    }
    if any(isinstance(n, Statistic) and "trajectory" in n.uses for n in wanted):
        raise MissingStatsError(f"{who} looks at what training did: {HOW}")
    missing = {use for n in wanted if isinstance(n, Statistic) for use in n.uses if not given[use]}
    if missing:
        raise MissingStatsError(f"{who} has nothing to look at: pass {' and '.join(how[m] for m in sorted(missing))}")
    return wanted


def collect(needs: Iterable[Need], source: Source) -> Stats:
    """Collect, each once.

    Args:
        needs: Checked by :func:`check_needs`.
        source: What they look at.

    Returns:
        By need.

    Raises:
        MissingStatsError: When the data gives none.
    """
    wanted = frozenset(needs)
    names = frozenset(n for n in wanted if isinstance(n, str))
    out: dict[Need, object] = {}
    if names:
        if source.loss_fn is None or source.batches is None:
            raise AssertionError("refused by check_needs")
        out.update(collect_gradients(source.model, source.parameters, source.loss_fn, source.batches(), needs=names))
    # In a fixed order, so that statistics that draw random numbers draw the same ones.
    for need in sorted((n for n in wanted if isinstance(n, Statistic)), key=repr):
        out[need] = need.collect(source)
    return out
