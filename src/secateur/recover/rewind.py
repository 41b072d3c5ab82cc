"""Rewinding in a training loop of your own: keep a point of the training, and go back to it under a mask."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur._rng import capture_rng, restore_rng
from secateur.errors import CheckpointError, WeightError, check_whole
from secateur.forward import check_module
from secateur.masks import apply_masks_, check_masks, clear_optimizer_state_
from secateur.types import Tensors

STATE_VERSION = 1
_LISTED = 4


@runtime_checkable
class Stateful(Protocol):
    """A learning-rate schedule, as far as rewinding goes."""

    def state_dict(self) -> dict[str, Any]:
        """Return where it stands."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        ...


class Rewind:
    r"""Keeps a point :math:`k` of a training, and goes back to it.

    .. math:: W \leftarrow M \odot W_k, \qquad \text{moments} \leftarrow M \odot \text{moments}_k

    :meth:`save` at the point: before the first step for the original lottery ticket, a few hundred steps later for
    late rewinding. After pruning, :meth:`rewind_` puts back weights and buffers, optimizer state, learning-rate
    schedule and random generators, all bit for bit, and zeroes what the masks prune: with all-ones masks the training
    repeats itself. :meth:`rewind_learning_rate_` puts back the optimizer's options and the schedule alone, and leaves
    the weights. What else the loop draws on, such as the order of the data, is the loop's to repeat; ``step`` says from
    where.

    Args:
        model: The model; its parameters keep their identity.
        optimizer: Its state and options go back with the weights.
        scheduler: Learning-rate schedule of the optimizer.
        rng: Whether the global random generators go back too.

    Example:
        >>> model = nn.Linear(4, 4)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> rewind = Rewind(model, optimizer)
        >>> rewind.save(step=0)
        >>> before = model.weight.detach().clone()
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> mask = model.weight.abs() > 0.2
        >>> rewind.rewind_({"weight": mask})
        0
        >>> torch.equal(model.weight, before * mask)
        True

    References:
        Jonathan Frankle, Michael Carbin, The Lottery Ticket Hypothesis, 2019; Jonathan Frankle, Gintare Karolina
        Dziugaite, Daniel M. Roy, Michael Carbin, Linear Mode Connectivity and the Lottery Ticket Hypothesis, 2020; Alex
        Renda, Jonathan Frankle, Michael Carbin, Comparing Rewinding and
        Fine-tuning in Neural Network Pruning, 2020.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        scheduler: Stateful | None = None,
        rng: bool = True,
    ) -> None:
        check_module(model)
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            raise WeightError(f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if scheduler is not None and not isinstance(scheduler, Stateful):
            raise WeightError(f"expected a learning-rate schedule with a state_dict, got {type(scheduler).__name__}")
        self._model: nn.Module = getattr(model, "_orig_mod", model)
        self._optimizer, self._scheduler, self._rng = optimizer, scheduler, rng
        self._kept: dict[str, Any] | None = None

    @property
    def step(self) -> int:
        """The step at which :meth:`save` was called.

        Raises:
            CheckpointError: When nothing was saved yet.
        """
        return int(self._point()["step"])

    def save(self, *, step: int = 0) -> None:
        """Keep everything as it is now, in place of what was kept before.

        Args:
            step: Optimizer steps so far; :meth:`rewind_` returns it.
        """
        check_whole("the step of a point to rewind to", step, least=0, error=CheckpointError)
        self._kept = {
            "version": STATE_VERSION,
            "step": step,
            "model": {name: value.detach().clone() for name, value in self._tensors().items()},
            "optimizer": None if self._optimizer is None else copy.deepcopy(self._optimizer.state_dict()),
            "scheduler": None if self._scheduler is None else copy.deepcopy(self._scheduler.state_dict()),
            "rng": capture_rng() if self._rng else None,
        }

    @torch.no_grad()
    def rewind_(self, masks: Tensors | None = None) -> int:
        """Go back to the kept point, under masks.

        Args:
            masks: Bool masks by parameter name, ``True`` = keep: ``pruner.masks``. All weights by default.

        Returns:
            The step that the training stands at again.

        Raises:
            CheckpointError: When nothing was saved yet, or model or optimizer have changed since; nothing was changed.
            WeightError: When a mask does not belong to the model; nothing was changed.
        """
        kept, masks = self._point(), {} if masks is None else masks
        check_masks(self._model, masks)
        self._check_fits(kept, weights=True)
        if self._rng:
            restore_rng(kept["rng"])  # first: it refuses what is none, and nothing below draws
        for name, value in self._tensors().items():
            value.copy_(kept["model"][name])
        apply_masks_(self._model, masks)
        if self._optimizer is not None:
            # A copy: the optimizer would train on in the very tensors that it is given.
            self._optimizer.load_state_dict(copy.deepcopy(kept["optimizer"]))
            clear_optimizer_state_(self._optimizer, self._model, masks)
        self._rewind_scheduler()
        return self.step

    def rewind_learning_rate_(self) -> int:
        """Go back to the kept point's learning rate, other optimizer options and schedule; weights and moments stay.

        Returns:
            The step of the kept point.

        Raises:
            CheckpointError: When nothing was saved yet, or the optimizer has changed since; nothing was changed.
        """
        kept = self._point()
        self._check_fits(kept, weights=False)
        if self._optimizer is not None:
            for group, saved in zip(self._optimizer.param_groups, kept["optimizer"]["param_groups"], strict=True):
                group.update({key: copy.deepcopy(value) for key, value in saved.items() if key != "params"})
        self._rewind_scheduler()
        return self.step

    def _check_fits(self, kept: Mapping[str, Any], *, weights: bool) -> None:
        """Refuse a point of another model or optimizer, before anything is put back.

        Raises:
            CheckpointError: Says what differs.
        """
        ours = {name: tuple(value.shape) for name, value in self._tensors().items()}
        theirs = {n: tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for n, v in kept["model"].items()}
        odd = sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n)) if weights else []
        if odd:
            raise CheckpointError(
                f"this point to rewind to is of another model: they differ in {odd[:_LISTED]}. Of a network that was "
                "cut smaller, save a point after the cut"
            )
        if self._optimizer is None:
            return
        try:
            sizes = [len(group["params"]) for group in kept["optimizer"]["param_groups"]]
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"this point to rewind to holds no optimizer's state: {type(error).__name__}: {error}"
            ) from error
        own = [len(group["params"]) for group in self._optimizer.param_groups]
        if own != sizes:
            raise CheckpointError(
                f"this point to rewind to is of another optimizer: its groups held {sizes} parameters, and hold {own}"
            )

    def _rewind_scheduler(self) -> None:
        if self._scheduler is None:
            return
        # A file keeps plain dicts, and MultiStepLR counts its milestones in a Counter.
        now = self._scheduler.state_dict()
        saved = copy.deepcopy(self._point()["scheduler"])
        for key, value in saved.items():
            if isinstance(value, dict) and isinstance(now.get(key), dict):
                saved[key] = type(now[key])(value)
        self._scheduler.load_state_dict(saved)

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in self._model.state_dict().items() if isinstance(value, Tensor)}

    def _point(self) -> dict[str, Any]:
        if self._kept is None:
            raise CheckpointError("there is no point to rewind to: call save() when the training passes it")
        return self._kept

    def state_dict(self) -> dict[str, Any]:
        """Return the kept point, for :func:`~secateur.checkpoint.save_tree`.

        Raises:
            CheckpointError: When nothing was saved yet.
        """
        tree: dict[str, Any] = _plain(self._point())
        return tree

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a kept point from a file; nothing is rewound yet.

        Raises:
            CheckpointError: When it is of another version, of another model, or lacks what this object rewinds.
        """
        if not isinstance(state, Mapping) or not isinstance(state.get("model", {}), Mapping):
            raise CheckpointError(f"expected the state of a Rewind, got {type(state).__name__}")
        missing = {"version", "step", "model", "optimizer", "scheduler", "rng"} - state.keys()
        if missing or state["version"] != STATE_VERSION:
            what = f"lacks {sorted(missing)}" if missing else f"has version {state['version']}"
            raise CheckpointError(f"this point to rewind to {what}; expected version {STATE_VERSION}")
        check_whole("this point to rewind to: step", state["step"], least=0, error=CheckpointError)
        parts = {"optimizer": self._optimizer, "scheduler": self._scheduler, "rng": self._rng or None}
        for part, here in parts.items():
            if here is not None and state[part] is None:
                what = "random generators: say rng=False here" if part == "rng" else f"{part} that is here"
                raise CheckpointError(f"this point to rewind to was saved without the {what}")
        self._check_fits(state, weights=True)
        self._kept = copy.deepcopy(dict(state))


def _plain(value: Any) -> Any:
    """Turn kinds of dicts that a file does not tell apart into plain ones."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
