"""Masks that move, in a training loop that stays the user's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.errors import CheckpointError, MissingStatsError, RecipeError, TargetError, check_number, check_whole
from secateur.masking import Masking, layer_rows, open_masking, sparsity_of
from secateur.masks import MaskKeeper, check_masks, parameters_of
from secateur.method import Method, as_method, check_finite
from secateur.patterns import Channel
from secateur.prunable import Found
from secateur.registry import in_words
from secateur.schedules import one_shot
from secateur.select import check_scores
from secateur.stats.gradients import LossFn
from secateur.targets import Target
from secateur.types import Connections, Dynamics, Masks, Move, PruneReport, Tensors, Turn

STATE_VERSION = 1


class SparseTraining:
    """Trains a model under masks that move, in a training loop that stays the user's.

    The method says what may go, how much, and where: target, score, pattern, allocation. The dynamics say how the masks
    move. Masks are applied after every optimizer step by the optimizer's own post-step hook, as with a
    :class:`~secateur.pruner.Pruner`; gradients stay dense. Call :meth:`start` once before training, or
    :meth:`load_state_dict` to go on, and :meth:`step` once per iteration, between ``backward()`` and ``zero_grad()``.

    Where exactly is a choice. After ``optimizer.step()`` a move comes on top of the step. In its place it is RigL as
    published, where a move costs a step::

        loss.backward()
        if trainer.step() is None:
            optimizer.step()
        optimizer.zero_grad()

    Args:
        model: The model; keep using your own reference to it.
        method: What may go. Dynamics that start sparse take their first masks from it: ``score=Random(seed)`` for those
            of the papers. Its schedule stays the default.
        dynamics: How the masks move.
        optimizer: Masks are applied after each of its steps, and its momentum is cleared where they move. More can be
            added with :meth:`attach`. Without one, :meth:`step` applies the masks itself.
        ema: An averaged copy with the same parameter names (or ``AveragedModel``), masked along.
        loss_fn: ``loss_fn(model, batch)``, for scores that need gradients.
        batches: Batches for it: an iterable that can be read again, or a function returning one.
        example_inputs: As for a pruner: for targets in MACs, and for channels.
        steps_per_epoch: Needed when the dynamics count epochs.

    Raises:
        RecipeError: When method and dynamics exclude each other.
        WeightError: When nothing is prunable or a weight cannot be pruned.
        PatternError: When the pattern does not fit a weight.
        TargetError: When the target cannot be reached, a layer would get nothing, or ``steps_per_epoch`` is missing.
        MissingStatsError: When the score needs gradients and ``loss_fn`` or ``batches`` is missing.

    Example:
        >>> from secateur.scores import Random
        >>> from secateur.training import RigL
        >>> model = nn.Linear(8, 4)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> method = Method(target=Target("sparsity", 0.75), score=Random(0))
        >>> trainer = SparseTraining(model, method, RigL(end=4, every=2), optimizer=optimizer)
        >>> trainer.start().achieved
        0.75
        >>> for _ in range(4):
        ...     model(torch.ones(2, 8)).square().sum().backward()
        ...     optimizer.step()
        ...     _ = trainer.step()
        ...     optimizer.zero_grad()
        >>> int(model.weight.count_nonzero()), trainer.finished
        (8, True)
    """

    def __init__(  # noqa: PLR0913  # a pruner's arguments, and the dynamics
        self,
        model: nn.Module,
        method: Method | Target,
        dynamics: Dynamics,
        *,
        optimizer: Optimizer | None = None,
        ema: nn.Module | None = None,
        loss_fn: LossFn | None = None,
        batches: Iterable[Any] | Callable[[], Iterable[Any]] | None = None,
        example_inputs: Any = None,
        steps_per_epoch: int | None = None,
    ) -> None:
        self.method, self.dynamics = as_method(method), dynamics
        self.model: nn.Module = getattr(model, "_orig_mod", model)  # torch.compile wraps; names are the inner model's
        check_pair(self.method, dynamics)
        if steps_per_epoch is not None:
            check_whole("steps_per_epoch", steps_per_epoch, least=0, error=TargetError)
        if dynamics.unit == "epochs" and (steps_per_epoch is None or steps_per_epoch < 1):
            raise TargetError(
                f"{dynamics} counts epochs: pass steps_per_epoch, or use unit='steps'; got {steps_per_epoch}"
            )
        self._steps_per_epoch = steps_per_epoch
        self._masking: Masking = open_masking(
            self.model, self.method, loss_fn=loss_fn, batches=batches, example_inputs=example_inputs
        )
        self._steps, self._level = 0, 0.0
        self._started = not dynamics.sparse_start
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
        """Mask an averaged copy of the model whenever the masks move."""
        self._keeper.attach_ema(ema)

    def detach(self) -> None:
        """Take the masks off all optimizers; weights stay as they are. Do it before ``secateur.shrink_``."""
        self._keeper.detach()

    def start(self) -> PruneReport:
        """Put the first masks on, where the dynamics start sparse. Once, before training.

        Returns:
            Asked beside achieved.

        Raises:
            TargetError: When training has begun already, or a layer would get nothing and could never grow.
        """
        if self._steps or (self._started and self.dynamics.sparse_start):
            raise TargetError(f"training has begun, {self._steps} steps ago; start() comes before it, and once")
        if self.dynamics.sparse_start:
            final = self._masking.share
            masks = self._select(final)
            empty = [name for name in self.found.weights if not bool(masks[name].any())]
            if empty and self.dynamics.last != 0:
                raise TargetError(
                    f"{empty[0]} starts with nothing ({len(empty)} of {len(masks)} weights), and {self.dynamics} gives "
                    "no layer more than it has: leave allow_empty out, or ask for less"
                )
            self._go(Move(masks, final))
            self._started = True
        return self.report()

    def step(self) -> PruneReport | None:
        """Count one iteration, and move the masks if that is due. Call it between ``backward()`` and ``zero_grad()``.

        A refused move changes nothing, and is due again at the next call. Under a ``GradScaler`` call it where the
        gradients are unscaled, and not where the scaler skips its step.

        Returns:
            The report of the move, or ``None`` when there was none.

        Raises:
            TargetError: When :meth:`start` was forgotten.
            MissingStatsError: When a move needs gradients and there are none.
            WeightError: When a weight is not finite.
            SelectionError: When a gradient is not finite.
        """
        if not self._started:
            raise TargetError(
                f"{self.dynamics} starts sparse, and no masks are on: call start() before training, or "
                "load_state_dict() to go on"
            )
        time = self._time_at(self._steps + 1)
        if time is None or not self.dynamics.due(time):
            self._steps += 1
            self._keeper.reapply()
            return None
        self._keeper.follow()
        self._go(self.dynamics.update(self._turn(time)))
        self._steps += 1  # only now: a refused move can be asked for again
        return self.report()

    def _time_at(self, steps: int) -> int | None:
        """Return the dynamics' time after some steps, ``None`` within an epoch."""
        if self.dynamics.unit == "steps" or self._steps_per_epoch is None:
            return steps
        epochs, within = divmod(steps, self._steps_per_epoch)
        return None if within else epochs

    def _select(self, level: float) -> Masks:
        return self._masking.update(level, self.masks, last=level >= self._masking.share).masks

    def _turn(self, time: int) -> Turn:
        weights, pattern = self.found.weights, self.method.masking

        def reduce(masks: Tensors) -> dict[str, Tensor]:
            return {name: pattern.reduce(weight, masks[name]) for name, weight in weights.items()}

        def expand(flags: Tensors) -> Masks:
            out: Masks = {}
            for name, weight in weights.items():
                out |= pattern.expand(weight, flags[name])
            return out

        units = self._units() if "units" in self.dynamics.needs else {}
        return Turn(time, self._masking.share, units, self._select, reduce, expand)

    def _units(self) -> dict[str, Connections]:
        pattern, weights = self.method.masking, self.found.weights
        parameters = parameters_of(self.model, weights)
        gradients = self._gradients(parameters) if "gradients" in self.dynamics.needs else {}
        units = {}
        for name, weight in weights.items():
            check_finite(name, parameters[name])
            sizes = _wide(parameters[name])
            mask = self.masks[name] if name in self.masks else torch.ones_like(sizes, dtype=torch.bool)
            units[name] = Connections(
                pattern.reduce(weight, sizes),
                pattern.reduce(weight, mask),
                pattern.reduce(weight, gradients[name]) if gradients else sizes.new_empty(0),
            )
        return units

    def _gradients(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Return the sizes of the gradients that the loop has just computed."""
        found = {name: p.grad for name, p in parameters.items()}
        missing = [name for name, gradient in found.items() if gradient is None]
        if missing:
            raise MissingStatsError(
                f"{missing[0]} has no gradient ({len(missing)} of {len(found)} weights), and {self.dynamics} grows by "
                "gradients: call step() after backward() and before zero_grad(), and exclude weights that are frozen "
                "or that the loss does not use"
            )
        sizes = {n: check_scores(f"gradient of {n}", _wide(g)) for n, g in found.items() if g is not None}
        if not any(bool(size.any()) for size in sizes.values()):
            raise MissingStatsError(
                f"all gradients are zero, and {self.dynamics} grows by gradients: call step() before zero_grad()"
            )
        return sizes

    def _go(self, move: Move) -> None:
        for masks in (move.zero, move.clear):
            check_masks(self.model, masks)
        self._keeper.set(move.masks)
        self._keeper.zero({name: ~mask for name, mask in move.zero.items()})
        self._keeper.clear_state(move.masks)
        self._keeper.clear_state({name: ~mask for name, mask in move.clear.items()})
        if move.restart:
            self._keeper.restart()
        self._level = move.level

    @property
    def finished(self) -> bool:
        """Whether the masks have made their last move; never, where the dynamics have no end."""
        last = self.dynamics.last
        per = self._steps_per_epoch if self.dynamics.unit == "epochs" else None
        return self._started and last is not None and self._steps >= last * (per or 1)

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable weights that the masks remove now."""
        return sparsity_of(layer_rows(self.found, self.masks))

    def report(self) -> PruneReport:
        """Return asked beside achieved, as the masks stand now; in a dense phase both are those of the dense model."""
        rows = layer_rows(self.found, self.masks)
        at_target = self._level >= self._masking.share
        return PruneReport(
            target=self.method.goal.kind,
            asked=self.method.goal.value if at_target else self._masking.asked(self._level),
            achieved=self._masking.achieved(self.masks),
            goal=self.method.goal.value,
            finished=self.finished,
            sparsity=sparsity_of(rows),
            layers=rows,
            skipped=self.found.skipped,
            groups=self._masking.groups(self.masks),
        )

    def _identity(self) -> dict[str, Any]:
        """Method and dynamics in words, without the addresses that parts of plain classes print."""
        method, dynamics = map(in_words, (self.method, self.dynamics))
        return {"method": method, "dynamics": dynamics, "steps_per_epoch": self._steps_per_epoch}

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on: masks and counters. Tensors and plain values only."""
        return {
            "version": STATE_VERSION,
            **self._identity(),
            "steps": self._steps,
            "started": self._started,
            "level": self._level,
            "masks": {name: mask.clone() for name, mask in self.masks.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; masks are applied at once. Instead of :meth:`start`.

        Raises:
            CheckpointError: When the state is of another version, method or model, or lacks an entry.
            WeightError: When its masks do not fit the model.
        """
        if not isinstance(state, Mapping) or not isinstance(state.get("masks", {}), Mapping):
            raise CheckpointError(f"expected the state of a SparseTraining, got {type(state).__name__}")
        missing = {"version", "steps", "started", "level", "masks", *self._identity()} - state.keys()
        if missing or state["version"] != STATE_VERSION:
            what = f"lacks {sorted(missing)}" if missing else f"has version {state['version']}"
            raise CheckpointError(f"this state of a sparse training {what}; expected version {STATE_VERSION}")
        for part, own in self._identity().items():
            if state[part] != own:
                raise CheckpointError(
                    f"this state comes from another sparse training: its {part} is {state[part]}, here {own}"
                )
        check_whole("this state of a sparse training: steps", state["steps"], least=0, error=CheckpointError)
        check_number("this state of a sparse training: level", state["level"], most=1.0, error=CheckpointError)
        if state["masks"] and not state["started"]:
            raise CheckpointError("this state of a sparse training has masks and has not started: it is damaged")
        check_masks(self.model, state["masks"])
        self._masking.check(state["masks"])
        self._steps, self._level = int(state["steps"]), float(state["level"])
        self._started = bool(state["started"])
        self._keeper.set({name: mask.clone() for name, mask in state["masks"].items()})


def check_pair(method: Method, dynamics: Dynamics) -> None:
    """Refuse a method and dynamics that exclude each other.

    Args:
        method: What may go.
        dynamics: How the masks move.

    Raises:
        RecipeError: Names both.
        MissingStatsError: When the dynamics need what there is not.
    """
    coupled = isinstance(method.pattern, Channel) and method.pattern.coupled
    if isinstance(dynamics, type) or not isinstance(dynamics, Dynamics):
        raise RecipeError(f"expected a Dynamics such as RigL(end=1000), got {dynamics!r}")
    if method.schedule != one_shot():
        raise RecipeError(
            f"the schedule {method.schedule.curve} and {dynamics} exclude each other: both say when. Leave the "
            "schedule out, or use a Pruner"
        )
    if method.solver is not None:
        raise RecipeError(
            f"the solver {method.solver} and {dynamics} exclude each other: here training makes up for what goes. "
            "Leave the solver out, or use a Pruner"
        )
    if dynamics.needs - {"units", "gradients"}:
        raise MissingStatsError(f"{dynamics} needs {sorted(dynamics.needs)}; units and gradients are what there is")
    if coupled and dynamics.last != 0:
        raise RecipeError(
            f"{method.pattern} and {dynamics} exclude each other: masks of coupled units cover what makes a unit and "
            "what reads it, so no gradient reaches it and it could not grow back. Use Channel() without coupled"
        )
    if "units" in dynamics.needs and method.masking.density is not None:
        raise RecipeError(
            f"{method.pattern} and {dynamics} exclude each other: it chooses among units of which any number may stay. "
            "Use unstructured, block or channel"
        )


def _wide(values: Tensor) -> Tensor:
    """Return absolute values, in float32 or better."""
    values = values.detach()
    return values.to(torch.promote_types(values.dtype, torch.float32)).abs()
