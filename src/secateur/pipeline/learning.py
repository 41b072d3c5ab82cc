"""Weights made anew in every forward pass of a run's training, and the masks that this leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.errors import CheckpointError, RecipeError, SecateurError
from secateur.masks import MaskKeeper, check_masks
from secateur.patterns import Channel
from secateur.pipeline.data import derive_seed
from secateur.prunable import Found
from secateur.recipe import Recipe
from secateur.recipe_checks import pattern_of
from secateur.training import FinishReport, Reparametrised
from secateur.types import LayerReport, PruneReport


@dataclass(frozen=True)
class LearningReport:
    """A report of a parametrisation, in the words of all others.

    Attributes:
        of: What the parametrisation says.
    """

    of: FinishReport

    @property
    def layers(self) -> tuple[LayerReport, ...]:
        """One row per weight."""
        return self.of.layers

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; ``found`` is the sparsity where nothing was asked for."""
        values: dict[str, Any] = {"target": "sparsity", **self.of.to_dict(), "sparsity": self.of.achieved}
        if self.of.goal is None:
            values["found"] = self.of.achieved
        return values | {"groups": [], "ablation": ""}


class Learning:
    """A parametrisation in a run; see :class:`~secateur.pipeline.thinning.Thinning`.

    While training goes on, the network is the model with weights that are made from its own; :meth:`end` writes those
    of the finished network into the model, and from then on the masks are held.

    Args:
        recipe: The recipe.
        model: The network.
        example_inputs: Returns one batch, for gates in front of norms.

    Raises:
        RecipeError: When there is no parametrisation, or latents are treated that there are not.
        SecateurError: When the model cannot be made this way.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, *, example_inputs: Callable[[], Any]) -> None:
        part, prune = recipe.train.build_parametrisation(), recipe.prune
        if part is None:
            raise RecipeError("train.parametrisation is missing")
        closes_units = isinstance(pattern_of(part), Channel)
        try:
            self._wrapped = Reparametrised(
                model,
                part,
                include=prune.include,
                exclude=prune.exclude,
                types=prune.types,
                example_inputs=example_inputs() if closes_units else None,
                seed=derive_seed(recipe.seed, "parametrisation"),
            )
        except SecateurError as error:
            raise type(error)(f"train.parametrisation: {error}") from None
        if recipe.train.latents is not None and not self._wrapped.latents:
            raise RecipeError(f"train.latents: {part} trains nothing beside the weights; leave it out")
        self._model = model
        self._keeper = MaskKeeper(model, self._wrapped.found.weights)
        self.masks = self._keeper.masks

    @property
    def found(self) -> Found:
        """The weights that are made."""
        return self._wrapped.found

    @property
    def network(self) -> nn.Module:
        """The model with its weights of the moment; the model itself once they are written into it."""
        return self._model if self._wrapped.done else self._wrapped

    @property
    def latents(self) -> tuple[nn.Parameter, ...]:
        """What is trained along."""
        return () if self._wrapped.done else tuple(self._wrapped.latents.values())

    @property
    def sparsity(self) -> float:
        """What would be gone now."""
        return self._now().achieved

    @property
    def finished(self) -> bool:
        """Whether the weights are in the model, at the target where there is one."""
        return self._wrapped.done and self._now().finished

    def attach(self, optimizer: Optimizer) -> None:
        """Hold the masks, once there are any."""
        if self._wrapped.done:
            self._keeper.attach(optimizer)

    def detach(self) -> None:
        """Let go."""
        self._keeper.detach()

    def start(self) -> PruneReport | None:
        """Nothing: training begins dense."""
        return None

    def loss(self, loss: Tensor) -> Tensor:
        """Add the parametrisation's penalty, while it is at work."""
        return loss if self._wrapped.done else loss + self._wrapped.penalty()

    def step(self) -> PruneReport | None:
        """Count a step, and hold latents in their bounds."""
        self._wrapped.step()
        return None

    def end(self) -> LearningReport:
        """Write the finished weights into the model, and hold its masks from now on."""
        self._keeper.set(self._wrapped.finish_().masks)
        return self.report()

    def restart(self) -> None:
        """Never: no ablation goes with a parametrisation."""

    def _now(self) -> FinishReport:
        return self._wrapped.report_of(self.masks) if self._wrapped.done else self._wrapped.report()

    def report(self) -> LearningReport:
        """Return asked beside achieved, or what was found."""
        return LearningReport(self._now())

    def state_dict(self) -> dict[str, Any]:
        """Return latents, counters and masks; the weights are in the model."""
        own = {n: t.clone() for n, t in self._wrapped.state_dict().items() if not n.startswith("model.")}
        return {"parametrisation": own, "masks": {name: mask.clone() for name, mask in self.masks.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on.

        Raises:
            CheckpointError: When the state is that of something else.
        """
        if state.keys() != {"parametrisation", "masks"}:
            raise CheckpointError("this is not the state of a parametrisation: the run began with another recipe")
        whole = self._wrapped.state_dict()
        if not state["parametrisation"].keys() <= whole.keys():
            raise CheckpointError("this state has latents of another parametrisation or another model")
        check_masks(self._model, state["masks"])
        whole.update(state["parametrisation"])
        self._wrapped.load_state_dict(whole)
        self._keeper.set(dict(state["masks"]))
