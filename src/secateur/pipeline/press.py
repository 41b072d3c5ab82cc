"""The recipe's penalty in a run: in which stages it acts, and what of it survives a kill."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.errors import RecipeError
from secateur.penalties import GroupLasso, GroupNorm, Growing, Penalised, PenalisedActivity
from secateur.recipe import Recipe
from secateur.structure import coupled_groups
from secateur.types import ActivityPenalty, Penalty


class Press:
    """A penalty that acts in the stages that the recipe names; without one, nothing.

    Args:
        recipe: The recipe.
        model: The network, with the weights that training starts from.
        sample: Returns inputs of one forward pass, for penalties on coupled channels.

    Raises:
        RecipeError: When the penalty would never act.
        WeightError: When it finds nothing to press on.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, sample: Callable[[], Any]) -> None:
        self._stages = ("train", "retrain") if recipe.recover.penalise else ("train",)
        self._acts = False
        self._at_work: Penalised | PenalisedActivity | None = None
        penalty: Penalty | ActivityPenalty | None = recipe.train.build_penalty()
        if penalty is None:
            return
        if isinstance(penalty, GroupLasso | GroupNorm | Growing) and penalty.by == "coupled":
            # The paper of group_norm presses on readers too; for the others every element is of one group.
            groups = coupled_groups(model, sample(), readers=isinstance(penalty, GroupNorm))
            penalty = replace(penalty, groups=groups)
        try:
            if isinstance(penalty, ActivityPenalty):
                self._at_work = PenalisedActivity(model, penalty)
                self._at_work.detach()
            else:
                self._at_work = Penalised(model, penalty)
        except RecipeError as error:
            raise RecipeError(f"train.penalty: {error}") from None

    def begin(self, stage: str, optimizer: Optimizer) -> None:
        """Act from now on, if this is a stage for it."""
        self.end()
        if self._at_work is None or stage not in self._stages:
            return
        self._acts = True
        if isinstance(self._at_work, Penalised):
            self._at_work.attach(optimizer)
        else:
            self._at_work.attach()

    def end(self) -> None:
        """Stop; what it has learnt stays."""
        if self._at_work is not None:
            self._at_work.detach()
        self._acts = False

    def loss(self, loss: Tensor) -> Tensor:
        """Return what is to be differentiated, and tell the penalty the loss."""
        if not self._acts or self._at_work is None:
            return loss
        if isinstance(self._at_work, PenalisedActivity):
            return loss + self._at_work.value()
        self._at_work.observe(float(loss.detach()))
        return loss

    def figures(self) -> dict[str, float]:
        """Return the penalty's value, for the log."""
        if not self._acts or self._at_work is None:
            return {}
        return {"penalty": float(self._at_work.value().detach())}

    def state_dict(self) -> dict[str, Any] | None:
        """Return what is needed to go on; nothing without a penalty."""
        return None if self._at_work is None else self._at_work.state_dict()

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            CheckpointError: When the state is that of another penalty.
        """
        if self._at_work is not None:
            self._at_work.load_state_dict(state or {})
