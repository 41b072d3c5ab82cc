"""A pruner for the user's own training loop, and pruning as one verb."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.errors import CheckpointError, SecateurError, TargetError, check_number, check_whole
from secateur.history import plain_history, read_history
from secateur.masking import Masking, layer_rows, open_masking, sparsity_of
from secateur.masks import MaskKeeper, check_masks, parameters_of
from secateur.method import Method, as_method
from secateur.prunable import Found
from secateur.registry import in_words
from secateur.schedules import one_shot
from secateur.stats.gradients import LossFn
from secateur.targets import Target
from secateur.types import Masks, PruneReport

STATE_VERSION = 2
"""Names what a state holds: a pruner reads its own and all older ones, and refuses newer ones. 2 added the history."""


@dataclass(frozen=True)
class Pruned:
    """What pruning returns.

    Attributes:
        masks: Bool masks by parameter name, ``True`` = keep.
        report: Asked beside achieved.
    """

    masks: Masks
    report: PruneReport


class Pruner:
    """Prunes a model inside a training loop that stays the user's.

    After every optimizer step the pruned weights are zero again (the masks hang on the optimizer's own post-step
    hook); :meth:`step` advances the schedule and recomputes the masks when an update is due. Modules, state dict keys
    and the exported graph are untouched.

    Args:
        model: The model; keep using your own reference to it.
        method: What to prune, how much, when. A bare target stands for global magnitude.
        optimizer: Masks are applied after each of its steps, and its momentum is cleared where a mask tightens. More
            can be added with :meth:`attach`. Without one, :meth:`step` applies the masks itself.
        ema: An averaged copy with the same parameter names (or ``AveragedModel``), masked along.
        loss_fn: ``loss_fn(model, batch)``, for scores that need gradients.
        batches: Batches for ``loss_fn``: an iterable that can be read again, or a function returning one.
        example_inputs: What one forward pass takes, in any form that :func:`~secateur.structure.shrink_` takes: for
            targets in MACs and scores that look at it; with the pattern ``channel`` also to find the norms whose
            parameters die with a unit. ``Channel(coupled=True)`` needs it.
        steps_per_epoch: Needed when the schedule counts epochs.

    Raises:
        WeightError: When nothing is prunable or a weight cannot be pruned.
        PatternError: When the pattern does not fit a weight, or units are coupled and there are no example inputs.
        GraphError: When units are coupled and the model cannot be cut as asked; see
            :class:`~secateur.structure.masking.UnitMasking`.
        TargetError: When the target cannot be reached.
        MissingStatsError: When the score needs gradients and ``loss_fn`` or ``batches`` is missing.

    Example:
        >>> from secateur.targets import Target
        >>> model = nn.Linear(8, 4)
        >>> pruner = Pruner(model, Method(target=Target("sparsity", 0.75)))
        >>> pruner.prune().achieved
        0.75
        >>> int(model.weight.count_nonzero())
        8
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method | Target,
        *,
        optimizer: Optimizer | None = None,
        ema: nn.Module | None = None,
        loss_fn: LossFn | None = None,
        batches: Iterable[Any] | Callable[[], Iterable[Any]] | None = None,
        example_inputs: Any = None,
        steps_per_epoch: int | None = None,
    ) -> None:
        method = as_method(method)
        self.model: nn.Module = getattr(model, "_orig_mod", model)  # torch.compile wraps; names are the inner model's
        self.method = method
        self.history: list[PruneReport] = []
        self._steps_per_epoch = steps_per_epoch
        self._steps, self._updates = 0, 0
        if method.schedule.unit == "epochs":
            method.schedule.step(0, steps_per_epoch)
        self._masking: Masking = open_masking(
            self.model, method, loss_fn=loss_fn, batches=batches, example_inputs=example_inputs
        )
        self._asked = self._masking.asked(0.0)
        self._keeper = MaskKeeper(self.model, self.found.weights)
        self.masks: Masks = self._keeper.masks
        if optimizer is not None:
            self.attach(optimizer)
        if ema is not None:
            self.attach_ema(ema)

    @property
    def found(self) -> Found:
        """The parameters that can be masked, and what is left alone."""
        return self._masking.found

    def attach(self, optimizer: Optimizer) -> None:
        """Apply the masks after every step of ``optimizer``, until :meth:`detach`.

        Raises:
            WeightError: When the optimizer holds none of the prunable weights: it was built from another model.
        """
        self._keeper.attach(optimizer)

    def attach_ema(self, ema: nn.Module) -> None:
        """Mask an averaged copy of the model whenever the masks change."""
        self._keeper.attach_ema(ema)

    def detach(self) -> None:
        """Take the masks off all optimizers; weights stay as they are."""
        self._keeper.detach()

    def step(self) -> PruneReport | None:
        """Count one optimizer step, and prune if an update is due. Call it after ``optimizer.step()``.

        Returns:
            The report of the update, or ``None`` when there was none.
        """
        self._steps += 1
        schedule = self.method.schedule
        if schedule.unit == "rounds":
            if not self._updates:
                raise TargetError(
                    "this schedule counts rounds, and pruner.step() counts steps: it would never prune. Call "
                    "pruner.prune() between rounds of training, or give the schedule unit='steps' or 'epochs'"
                )
            self._keeper.reapply()
            return None
        due = self._updates
        while due < schedule.updates and schedule.step(due, self._steps_per_epoch) <= self._steps:
            due += 1
        if due == self._updates:
            self._keeper.reapply()
            return None
        return self._update(due - 1)  # several due at once: the last one says it all

    def prune(self, *, final: bool = False) -> PruneReport:
        """Run the schedule's next update now.

        Args:
            final: Skip to the last update instead.

        Returns:
            Asked beside achieved.

        Raises:
            TargetError: When the schedule has no update left.
        """
        schedule = self.method.schedule
        if self._updates >= schedule.updates:
            raise TargetError(f"the schedule's {schedule.updates} updates are done")
        return self._update(schedule.updates - 1 if final else self._updates)

    def _update(self, number: int) -> PruneReport:
        last = number == self.method.schedule.updates - 1
        self._prune_to(self.method.schedule.level(number, self._masking.share), last=last)
        self._updates = number + 1  # only now: a refused update can be asked for again
        report = self.report()
        self.history.append(report)
        return report

    @property
    def _identity(self) -> str:
        """The method in words, without the addresses that parts of plain classes print."""
        return in_words(self.method)

    @property
    def updates(self) -> int:
        """Number of the schedule's updates that have run."""
        return self._updates

    @property
    def finished(self) -> bool:
        """Whether every update of the schedule has run."""
        return self._updates >= self.method.schedule.updates

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable weights that the masks remove now."""
        return sparsity_of(layer_rows(self.found, self.masks))

    def _prune_to(self, level: float, *, last: bool) -> None:
        self._keeper.follow()
        update = self._masking.update(level, self.masks, last=last)
        self._asked = self.method.goal.value if last else self._masking.asked(level)
        with torch.no_grad():
            for name, parameter in parameters_of(self.model, update.values).items():
                parameter.copy_(update.values[name])
        self._keeper.set(update.masks)
        self._keeper.clear_state(update.masks)
        if last:
            self.restart()

    def restart(self) -> bool:
        """Start all weights anew where the method's ablation asks for that; its last update does it by itself.

        No optimizer and no average remembers the old ones.

        Returns:
            Whether it did.
        """
        if self.method.ablate is None or not self.method.restarts:
            return False
        self.method.ablate.restart_(self.model)
        self._keeper.catch_up()
        self._keeper.zero(self.masks)
        self._keeper.restart()
        return True

    def report(self) -> PruneReport:
        """Return asked beside achieved, as things stand now."""
        rows = layer_rows(self.found, self.masks)
        return PruneReport(
            target=self.method.goal.kind,
            asked=self._asked,
            achieved=self._masking.achieved(self.masks),
            goal=self.method.goal.value,
            finished=self.finished,
            sparsity=sparsity_of(rows),
            layers=rows,
            skipped=self.found.skipped,
            groups=self._masking.groups(self.masks),
            ablation="" if self.method.ablate is None else str(self.method.ablate),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on: masks, counters, reports so far. Tensors and plain values only."""
        return {
            "version": STATE_VERSION,
            "method": self._identity,
            "steps": self._steps,
            "updates": self._updates,
            "asked": self._asked,
            "masks": {name: mask.clone() for name, mask in self.masks.items()},
            "history": plain_history(self.history),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; masks are applied at once.

        States of version 1 hold no reports: with them :attr:`history` begins anew.

        Raises:
            CheckpointError: When the state is of a newer version, lacks an entry, or one holds what it never would.
            WeightError: When its masks do not fit the model.
        """
        if not isinstance(state, Mapping) or not isinstance(state.get("masks", {}), Mapping):
            raise CheckpointError(f"expected the state of a Pruner, got {type(state).__name__}")
        version = _version_of(state)
        if state["method"] != self._identity:
            raise CheckpointError(
                f"this pruner state comes from another method: it has {state['method']}, this pruner {self._identity}"
            )
        check_masks(self.model, state["masks"])
        self._masking.check(state["masks"])
        for name in ("steps", "updates"):
            check_whole(f"this pruner state: {name}", state[name], least=0, error=CheckpointError)
        check_number("this pruner state: asked", state["asked"], error=CheckpointError)
        history = [] if version == 1 else read_history(state["history"])
        if len(history) > state["updates"]:
            raise CheckpointError(f"this pruner state has {len(history)} reports of {state['updates']} updates")
        if state["updates"] > self.method.schedule.updates:
            raise CheckpointError(
                f"this pruner state stands at step {state['steps']}, update {state['updates']} of "
                f"{self.method.schedule.updates}: it comes from another schedule"
            )
        self._steps, self._updates, self._asked = int(state["steps"]), int(state["updates"]), float(state["asked"])
        self.history[:] = history
        self._keeper.set({name: mask.clone() for name, mask in state["masks"].items()})


def _version_of(state: Mapping[str, Any]) -> int:
    """Return a state's version, all entries of which are there."""
    version = state.get("version", STATE_VERSION)
    expected = f"expected version {STATE_VERSION}, or an older one"
    if type(version) is not int or not 1 <= version <= STATE_VERSION:
        raise CheckpointError(f"this pruner state has version {version!r:.80}; {expected}")
    entries = {"version", "method", "steps", "updates", "asked", "masks"} | ({"history"} if version > 1 else set())
    if missing := entries - state.keys():
        raise CheckpointError(f"this pruner state lacks {sorted(missing)}; {expected}")
    return version


def prune_(
    model: nn.Module,
    method: Method | Target,
    *,
    optimizer: Optimizer | None = None,
    ema: nn.Module | None = None,
    loss_fn: LossFn | None = None,
    batches: Iterable[Any] | Callable[[], Iterable[Any]] | None = None,
    example_inputs: Any = None,
) -> Pruned:
    """Prune a model in place, all the way to the target, with no training in between.

    A schedule in rounds runs all of them: before each, the score is collected anew from the model with the masks so far
    (iterative SynFlow or SNIP). Scores that look at weights alone come out as in one shot. Weights are copied before
    the first of several rounds, and put back when a later one is refused.

    Args:
        model: The model; its pruned weights are zero afterwards.
        method: What to prune and how much; of a schedule in steps or epochs only the last level is used. A bare target
            stands for global magnitude.
        optimizer: Its momentum is cleared where weights were pruned. The masks do not stay on it: use a
            :class:`Pruner` to keep training.
        ema: An averaged copy to prune along.
        loss_fn: For scores that need gradients.
        batches: For scores that need gradients.
        example_inputs: For targets in MACs, and for channels.

    Returns:
        Masks and report.

    Raises:
        SecateurError: As :class:`Pruner`; the model is unchanged then.

    Example:
        >>> from secateur.targets import Target
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
        >>> prune_(model, Method(target=Target("sparsity", 0.5))).report.achieved
        0.5
    """
    method = as_method(method)
    if method.schedule.unit != "rounds":  # no clock runs here, so none needs converting
        method = replace(method, schedule=one_shot(), when="after")
    pruner = Pruner(
        model,
        method,
        optimizer=optimizer,
        ema=ema,
        loss_fn=loss_fn,
        batches=batches,
        example_inputs=example_inputs,
    )
    with _all_or_nothing(pruner.model, ema, optimizer) if method.schedule.updates > 1 else nullcontext():
        while not pruner.finished:
            pruner.prune()
    pruner.detach()
    return Pruned(pruner.masks, pruner.history[-1])


@contextmanager
def _all_or_nothing(model: nn.Module, ema: nn.Module | None, optimizer: Optimizer | None) -> Iterator[None]:
    """Put weights and momentum back when a round is refused after others have run."""
    tensors: list[Tensor] = [p.detach() for m in (model, ema) if m is not None for p in m.parameters()]
    states = [] if optimizer is None else optimizer.state.values()
    tensors += [v for state in states for v in state.values() if isinstance(v, Tensor)]
    kept = [tensor.clone() for tensor in tensors]
    try:
        yield
    except SecateurError:
        for tensor, value in zip(tensors, kept, strict=True):
            tensor.copy_(value)
        raise
