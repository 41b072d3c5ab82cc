"""What makes the masks of a run: a schedule's pruning steps, masks that move, or weights made anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.patterns import Channel
from secateur.pipeline.learning import Learning
from secateur.pipeline.moving import Moving
from secateur.prunable import Found
from secateur.pruner import Pruner
from secateur.scores import watches_training, with_path
from secateur.stats import PathIntegral
from secateur.types import LayerReport, Masks, PruneReport, Statistic

if TYPE_CHECKING:
    from secateur.method import Method
    from secateur.pipeline.run import Runner


class ThinningReport(Protocol):
    """How much is gone by now."""

    @property
    def layers(self) -> tuple[LayerReport, ...]:
        """One row per weight."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON: asked beside achieved, or ``found`` where nothing was asked for."""
        ...


class Thinning(Protocol):
    """Makes masks while a run goes on, and holds them until its end.

    In a stage in which the plan prunes, :meth:`step` is called once per step of the optimizer, and :meth:`end` when
    training is over; rounds call ``prune`` of the pruner itself.
    """

    masks: Masks

    @property
    def found(self) -> Found:
        """The weights that can be masked, and what is left alone."""
        ...

    @property
    def network(self) -> nn.Module:
        """What training and evaluation run: the model, or the model with other weights."""
        ...

    @property
    def latents(self) -> tuple[nn.Parameter, ...]:
        """What the optimizer trains beside the model's parameters now."""
        ...

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable weights that is gone now."""
        ...

    @property
    def finished(self) -> bool:
        """Whether the masks are final."""
        ...

    def attach(self, optimizer: Optimizer) -> None:
        """Hold the masks after every step of an optimizer."""
        ...

    def detach(self) -> None:
        """Let go of all optimizers."""
        ...

    def start(self) -> PruneReport | None:
        """Put the first masks on, before training; once in a run's life."""
        ...

    def loss(self, loss: Tensor) -> Tensor:
        """Return what is to be differentiated."""
        ...

    def step(self) -> PruneReport | None:
        """Count one step, after the optimizer's and before gradients are cleared; return what has changed."""
        ...

    def end(self) -> ThinningReport | None:
        """Training is over: return what that has changed."""
        ...

    def restart(self) -> None:
        """Start the weights anew, where an ablation asks for that."""
        ...

    def report(self) -> ThinningReport:
        """Return how much is gone."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on, beside the model's own state."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; the model has its state already."""
        ...


class Scheduled:
    """A pruner: masks that tighten along a schedule.

    Args:
        pruner: The pruner.
    """

    def __init__(self, pruner: Pruner) -> None:
        self.pruner = pruner
        self.masks = pruner.masks
        self.network = pruner.model
        self.latents: tuple[nn.Parameter, ...] = ()
        self.attach, self.detach, self.step, self.report = pruner.attach, pruner.detach, pruner.step, pruner.report
        self.state_dict, self.load_state_dict = pruner.state_dict, pruner.load_state_dict

    @property
    def found(self) -> Found:
        """The pruner's."""
        return self.pruner.found

    @property
    def sparsity(self) -> float:
        """By its masks."""
        return self.pruner.sparsity

    @property
    def finished(self) -> bool:
        """Whether the schedule is."""
        return self.pruner.finished

    def start(self) -> PruneReport | None:
        """Nothing: the schedule begins dense."""
        return None

    def loss(self, loss: Tensor) -> Tensor:
        """The task's."""
        return loss

    def end(self) -> ThinningReport | None:
        """Nothing: the schedule has an end of its own."""
        return None

    def restart(self) -> None:
        """Once the schedule is over, where its method says so."""
        if self.pruner.finished:
            self.pruner.restart()


def thinning_of(runner: Runner) -> tuple[Thinning, PathIntegral | None]:
    """Return what makes a run's masks, and the path of its training where a score looks at that.

    Args:
        runner: The run, its plan made.

    Raises:
        SecateurError: When the recipe does not fit the model.
    """
    plan, model = runner.plan, runner.model

    def inputs() -> tuple[Any, ...]:
        return (runner.sample("macs", 1),)

    if plan.method is None:
        return Learning(runner.recipe, model, example_inputs=inputs), None
    method, path = plan.method, None
    if watches_training(method.score):
        path = PathIntegral(model)
        method = replace(method, score=with_path(method.score, path))
    data: dict[str, Any] = {
        "loss_fn": runner.loss,
        "batches": runner.score_batches,
        "example_inputs": inputs() if _sees_a_forward(method) else None,
        "steps_per_epoch": plan.steps_per_epoch,
    }
    if plan.dynamics is not None:
        return Moving(model, method, plan.dynamics, **data), path
    return Scheduled(Pruner(model, method, **data)), path


def _sees_a_forward(method: Method) -> bool:
    """Whether the target, the pattern or the score must see a forward pass."""
    wanted = method.goal.kind == "macs" or isinstance(method.pattern, Channel)
    return wanted or any(isinstance(n, Statistic) and "example_inputs" in n.uses for n in method.score.needs)
