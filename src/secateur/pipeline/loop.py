"""The founding algorithm around the user's own training functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from secateur.errors import RecipeError, WeightError
from secateur.masks import apply_masks_, parameters_of
from secateur.pruner import Pruner
from secateur.types import Masks, PruneReport


@dataclass(frozen=True)
class Founding:
    """What the founding algorithm returns: f(x; M ⊙ W').

    Attributes:
        masks: :math:`M`, bool, by parameter name.
        weights: :math:`W'`, the state dict after the last round; pruned entries are zero.
        rounds: One report per round.
    """

    masks: Masks
    weights: dict[str, Tensor]
    rounds: tuple[PruneReport, ...]


def prune_and_retrain(
    pruner: Pruner,
    *,
    train: Callable[[nn.Module], None] | None = None,
    retrain: Callable[[nn.Module, int], None] | None = None,
) -> Founding:
    """Train to convergence, then for every round of the schedule: score, prune, fine-tune.

    ``retrain`` builds its optimizer and calls ``pruner.attach(optimizer)``, and steps it as it likes; the pruned
    weights stay zero.

    Args:
        pruner: A pruner whose schedule counts rounds.
        train: Trains the dense model; left out when it comes trained.
        retrain: ``retrain(model, round)``, called after every pruning step; rounds count from 0.

    Returns:
        Masks, weights and reports.

    Raises:
        RecipeError: When the schedule counts steps or epochs: then call ``pruner.step()`` in your loop instead.
        WeightError: When pruned weights came back during retraining, because its optimizer was not attached.

    Example:
        >>> from secateur import Method, Target
        >>> from secateur.schedules import iterative
        >>> model = nn.Linear(16, 4)
        >>> method = Method(target=Target("sparsity", 0.75), schedule=iterative(rounds=2))
        >>> done = prune_and_retrain(Pruner(model, method))
        >>> [r.achieved for r in done.rounds], int(done.weights["weight"].count_nonzero())
        ([0.5, 0.75], 16)

    References:
        Davis Blalock, Jose Javier Gonzalez Ortiz, Jonathan Frankle, John Guttag, What is the State of Neural Network
        Pruning?, 2020 (algorithm 1).
    """
    if pruner.method.schedule.unit != "rounds":
        raise RecipeError(
            f"prune_and_retrain works in rounds, and the schedule counts {pruner.method.schedule.unit}: call "
            "pruner.step() after each optimizer step instead, or give the schedule unit='rounds'"
        )
    if train is not None and not pruner.masks:  # a pruner that was resumed half-way has that behind it
        train(pruner.model)
    reports = []
    while not pruner.finished:
        number = pruner.updates
        reports.append(pruner.prune())
        if retrain is not None:
            retrain(pruner.model, number)
            _check_zeros(pruner)
    pruner.detach()
    apply_masks_(pruner.model, pruner.masks)
    weights = {name: value.detach().clone() for name, value in pruner.model.state_dict().items()}
    return Founding(dict(pruner.masks), weights, tuple(reports))


def _check_zeros(pruner: Pruner) -> None:
    for name, parameter in parameters_of(pruner.model, pruner.masks).items():
        back = int(parameter.detach()[~pruner.masks[name].to(parameter.device)].count_nonzero())
        if back:
            raise WeightError(
                f"{name}: {back} pruned weights came back during retraining; call pruner.attach(optimizer) with the "
                "optimizer that retrain uses"
            )
