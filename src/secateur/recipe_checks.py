"""Pairs of a recipe's parts that exclude each other, refused before anything that it names is imported."""

from __future__ import annotations

from secateur.errors import RecipeError, SecateurError
from secateur.method import Method
from secateur.patterns import Channel, Unstructured
from secateur.recipe_sections import PruneSection, RecoverSection, TrainSection
from secateur.recover import Nothing
from secateur.recover.retrain import Recovery
from secateur.schedules import Schedule
from secateur.scores import watches_training
from secateur.training.sparse_training import check_pair
from secateur.types import Dynamics, Parametrisation, Pattern, PatternedParametrisation, Score

# Fields of [prune] that say how weights are chosen or when: a parametrisation does that itself.
_CHOSEN = ("score", "allocate", "solver", "schedule", "overrides", "allow_empty", "ablate", "score_batches")


def pattern_of(parametrisation: Parametrisation) -> Pattern:
    """Return what a parametrisation removes together: what it says itself, or single weights."""
    return parametrisation.pattern if isinstance(parametrisation, PatternedParametrisation) else Unstructured()


def check_training(train: TrainSection, prune: PruneSection, recovery: Recovery) -> None:
    """Refuse what does not go with masks that training makes itself.

    Raises:
        RecipeError: Names both parts.
    """
    parametrisation, dynamics = train.build_parametrisation(), train.build_dynamics()
    if parametrisation is not None and dynamics is not None:
        raise RecipeError(
            f"train.parametrisation {parametrisation} and train.dynamics {dynamics} exclude each other: both make the "
            "masks. Leave one out"
        )
    if train.latents is not None and parametrisation is None:
        raise RecipeError(
            "train.latents is about what a parametrisation trains along, and there is none; give train.parametrisation "
            "or leave it out"
        )
    if train.prunes and not train.epochs:
        name = "dynamics" if parametrisation is None else "parametrisation"
        raise RecipeError(f"train.{name} acts while the network is trained, and train.epochs is 0; train")
    if parametrisation is not None:
        _check_parametrisation(parametrisation, prune, recovery)
    if dynamics is not None:
        _check_dynamics(dynamics, prune)


def _check_parametrisation(part: Parametrisation, prune: PruneSection, recovery: Recovery) -> None:
    plain = PruneSection()
    for name in _CHOSEN:
        if getattr(prune, name) != getattr(plain, name):
            raise RecipeError(
                f"train.parametrisation {part} and prune.{name} exclude each other: training itself decides what goes, "
                f"and when. Leave prune.{name} out"
            )
    pattern, fitting = prune.build_pattern(), pattern_of(part)
    if pattern not in (fitting, Unstructured()):
        raise RecipeError(
            f"train.parametrisation {part} and prune.pattern {pattern} exclude each other: it removes {fitting}. Leave "
            "the pattern out"
        )
    asked = part.asked(None)
    if prune.target is not None:
        target = prune.target.build()
        if asked is None:
            raise RecipeError(
                f"train.parametrisation {part} and prune.target exclude each other: how much goes is found by training "
                "and not set. Leave the target out, and change the strength to get more or less"
            )
        if target.kind != "sparsity" or abs(target.value - asked) > 1e-9:
            raise RecipeError(
                f"prune.target {target.kind} = {target.value:g} and train.parametrisation {part} exclude each other: "
                f"it has a target of its own, sparsity = {asked:g}. Leave prune.target out"
            )
    if recovery.rewinds_weights:
        raise RecipeError(
            f"recover.retrain 'weight_rewinding' and train.parametrisation {part} exclude each other: during training "
            "the network computes with weights that are made from others, and there are none to go back to. Use "
            "'fine_tune' or 'learning_rate_rewinding'"
        )


def _check_dynamics(dynamics: Dynamics, prune: PruneSection) -> None:
    if prune.when != "during":
        raise RecipeError(
            f"train.dynamics {dynamics} moves masks during training, and prune.when is {prune.when!r}: say "
            "when = 'during'"
        )
    if prune.ablate is not None:
        raise RecipeError(
            f"train.dynamics {dynamics} and prune.ablate {prune.ablate.name!r} exclude each other: the masks move on "
            "from what an ablation would make of them. Leave one out"
        )
    method = prune.build(under_dynamics=True)
    try:
        check_pair(method, dynamics)
    except SecateurError as error:
        raise RecipeError(f"train.dynamics: {error}") from None
    if dynamics.sparse_start and watches_training(method.score):
        raise RecipeError(
            f"train.dynamics {dynamics} and prune.score {method.score} exclude each other: the first masks are made "
            "before any training that the score could watch. Use another score, such as {name = 'random', seed = 0}"
        )


def check_penalty(train: TrainSection, recover: RecoverSection, recovery: Recovery) -> None:
    """Refuse a penalty that would never act, and an option that does nothing.

    Raises:
        RecipeError: Says which.
    """
    penalty, penalise = train.build_penalty(), recover.penalise
    if penalty is None and penalise:
        raise RecipeError("recover.penalise goes on with train.penalty, and there is none")
    if penalise and isinstance(recovery, Nothing):
        raise RecipeError("recover.penalise has no retraining to act in; give recover.retrain, or leave it out")
    if penalty is not None and not train.epochs and not penalise:
        raise RecipeError(
            f"train.penalty = {train.penalty and train.penalty.name!r} would never act: train.epochs is "
            "0; train, or set recover.penalise = true"
        )


def check_coupled(method: Method) -> None:
    """Refuse early what only units of coupled groups have, and what they do not.

    Raises:
        RecipeError: Names both parts.
    """
    coupled = isinstance(method.pattern, Channel) and method.pattern.coupled
    hint = "which only pattern = {name = 'channel', coupled = true} knows"
    if not coupled and not isinstance(method.score, Score):
        raise RecipeError(f"prune.score {method.score} rates units of coupled groups, {hint}")
    if not coupled and method.target is not None and method.target.kind == "channels":
        raise RecipeError(f"prune.target channels counts units of coupled groups, {hint}")
    if coupled and (method.overrides or method.allow_empty):
        raise RecipeError(
            "prune.pattern with coupled = true excludes prune.overrides and prune.allow_empty: units of coupled groups "
            "have no sparsity of one layer, and a group cut to nothing would cut the network. Use exclude"
        )


def check_clock(schedule: Schedule, recovery: Recovery, *, during: bool, trained: int) -> None:
    """Refuse a schedule that its clock does not suit, as far as that shows without data.

    Args:
        schedule: The schedule.
        recovery: The retraining.
        during: Whether it prunes during training.
        trained: Epochs of the training.

    Raises:
        RecipeError: Says why.
    """
    if recovery.rewinds_weights and schedule.unit != "rounds" and not during:
        raise RecipeError(
            "recover.retrain 'weight_rewinding' and a schedule in steps or epochs after training exclude each "
            "other: rewinding starts a round. Use a schedule with unit = 'rounds'"
        )
    if schedule.unit == "epochs":
        where = "train.epochs" if during else "recover.retrain.epochs"
        epochs = trained if during else recovery.length(trained, 1)
        if schedule.time(schedule.updates - 1) > epochs or not epochs:
            raise RecipeError(
                f"prune.schedule ends at epoch {schedule.time(schedule.updates - 1):g}, but {where} = {epochs}: "
                "the target would never be reached"
            )
