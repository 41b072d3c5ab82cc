"""Masks that move while a run trains its network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.errors import CheckpointError
from secateur.method import Method
from secateur.prunable import Found
from secateur.training import SparseTraining
from secateur.types import Dynamics, PruneReport


class Moving:
    """A sparse training; see :class:`~secateur.pipeline.thinning.Thinning`. A move comes on top of a step.

    Args:
        model: The network.
        method: What may go.
        dynamics: How the masks move.
        **data: What :class:`~secateur.training.SparseTraining` takes besides.
    """

    def __init__(self, model: nn.Module, method: Method, dynamics: Dynamics, **data: Any) -> None:
        self._trainer = SparseTraining(model, method, dynamics, **data)
        self._over = False
        self.network = model
        self.masks = self._trainer.masks
        self.latents: tuple[nn.Parameter, ...] = ()

    @property
    def found(self) -> Found:
        """The trainer's."""
        return self._trainer.found

    @property
    def sparsity(self) -> float:
        """By the masks; in a dense phase none."""
        return self._trainer.sparsity

    @property
    def finished(self) -> bool:
        """Whether training is over, at the target."""
        report = self._trainer.report()
        return self._over and report.asked == report.goal

    def attach(self, optimizer: Optimizer) -> None:
        """Hold the masks."""
        self._trainer.attach(optimizer)

    def detach(self) -> None:
        """Let go."""
        self._trainer.detach()

    def start(self) -> PruneReport | None:
        """Put the first masks on, where the dynamics start sparse."""
        report = self._trainer.start()
        return report if self.masks else None

    def loss(self, loss: Tensor) -> Tensor:
        """The task's."""
        return loss

    def step(self) -> PruneReport | None:
        """Move the masks, if that is due."""
        return self._trainer.step()

    def end(self) -> None:
        """The masks stay where they are."""
        self._over = True

    def restart(self) -> None:
        """Never: no ablation goes with moving masks."""

    def report(self) -> PruneReport:
        """Return asked beside achieved."""
        return replace(self._trainer.report(), finished=self.finished)

    def state_dict(self) -> dict[str, Any]:
        """Return the trainer's state, and whether training is over."""
        return {"trainer": self._trainer.state_dict(), "over": self._over}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on.

        Raises:
            CheckpointError: When the state is that of something else.
        """
        if state.keys() != {"trainer", "over"}:
            raise CheckpointError("this is not the state of a sparse training: the run began with another recipe")
        self._trainer.load_state_dict(state["trainer"])
        self._over = bool(state["over"])
