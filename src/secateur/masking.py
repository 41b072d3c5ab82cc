"""From a method to masks over training: what a pruner asks at every update.

Here weight by weight, as patterns lay them over single tensors; units of coupled groups are in
:mod:`secateur.structure.masking`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

from secateur.errors import CheckpointError, SelectionError, WeightError
from secateur.facts import model_facts
from secateur.masks import parameters_of
from secateur.method import Infeasible, Method, check_finite, check_reachable, make_masks
from secateur.patterns import Channel
from secateur.prunable import Found, check_each, find_prunable, matches
from secateur.stats import check_data, check_needs, collect
from secateur.stats.gradients import LossFn
from secateur.targets import unreachable
from secateur.types import GroupReport, LayerReport, Need, Source, Stats, Tensors, Update

Batches = Iterable[Any] | Callable[[], Iterable[Any]]


class Masking(Protocol):
    """Makes masks at any level of removal. It keeps no state over updates: the masks so far are all there is."""

    found: Found
    """The parameters that can be masked, and what is left alone."""

    @property
    def share(self) -> float:
        """Part of the target's currency that goes in the end: the level of a schedule's last update."""
        ...

    def asked(self, level: float) -> float:
        """Return the target's quantity at a level."""
        ...

    def update(self, level: float, previous: Tensors, *, last: bool) -> Update:
        """Return the pruning step to a level; pruned stays pruned. The last one meets the target itself."""
        ...

    def achieved(self, masks: Tensors) -> float:
        """Return the target's quantity under some masks."""
        ...

    def groups(self, masks: Tensors) -> tuple[GroupReport, ...]:
        """Return how many units stay in each coupled group; nothing where weights are pruned one by one."""
        ...

    def check(self, masks: Tensors) -> None:
        """Raise :class:`~secateur.errors.CheckpointError` for masks that this would never make."""
        ...


class WeightMasking:
    """Masks of single weights, blocks, or one layer's own units.

    Args:
        model: The model.
        method: The parts.
        loss_fn: ``loss_fn(model, batch)``, for scores that need gradients.
        batches: Batches for it.
        example_inputs: For targets in MACs, and for the norms that die with channels.

    Raises:
        SecateurError: As :class:`~secateur.pruner.Pruner`.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        *,
        loss_fn: LossFn | None,
        batches: Batches | None,
        example_inputs: Any,
    ) -> None:
        self._model, self._method = model, method
        self._loss_fn, self._batches, self._inputs = loss_fn, batches, example_inputs
        self.found: Found = find_prunable(model, include=method.include, exclude=method.exclude, types=method.types)
        self._check_pattern()
        self._check_parts()
        if isinstance(method.pattern, Channel) and example_inputs is not None:
            from secateur.structure.companions import with_companions  # imports a tracer, which takes its time

            self.found = with_companions(model, self.found, example_inputs)
        inputs = example_inputs if method.goal.kind == "macs" else None
        self.found, self.facts = model_facts(model, self.found, inputs)
        self.budget = method.goal.budget(self.facts)
        with self._in_the_targets_words():
            check_reachable(self.found.weights, method, self.budget)

    @contextmanager
    def _in_the_targets_words(self) -> Iterator[None]:
        """Turn what the floors cost into how far the target can go."""
        try:
            yield
        except Infeasible as refusal:
            raise unreachable(self._method.goal, self._method.goal.measure(self.facts, refusal.least)) from None

    def _check_pattern(self) -> None:
        """Refuse once, naming every weight that the pattern does not fit."""
        check_each(self.found, self._method.masking.check)

    def _check_parts(self) -> None:
        for override in self._method.overrides:
            if not any(matches(name, [override.match]) for name in self.found.weights):
                raise WeightError(f"the override {override.match!r} matches no prunable weight")
        for part in (self._method.score, self._method.solver):
            check_needs(
                () if part is None else part.needs,
                part,
                loss=self._loss_fn is not None,
                batches=self._batches is not None,
                example_inputs=self._inputs is not None,
            )

    @property
    def share(self) -> float:
        """Part of the budget that goes in the end."""
        if self._method.goal.kind == "sparsity":
            return self._method.goal.value
        return 1.0 - self.budget.kept / self.budget.total if self.budget.total else 0.0

    def asked(self, level: float) -> float:
        """Return the target's quantity when a part of the budget has gone."""
        return self._method.goal.measure(self.facts, self.budget.total - level * self.budget.total)

    def update(self, level: float, previous: Tensors, *, last: bool) -> Update:
        """Return the pruning step to a level.

        Raises:
            TargetError: When the floors cost more than may stay.
            SelectionError: When scores cannot be ranked, or a solver returns weights of other shapes.
        """
        total = self.budget.total
        kept = self.budget.kept if last else total - level * total
        if self.budget.currency == "weights":
            kept = total - round(total - kept)
        tensors = {name: p.detach() for name, p in parameters_of(self._model, self.found.weights).items()}
        stats = self._collect(tensors, previous)
        with self._in_the_targets_words():
            masks = make_masks(
                self.found.weights,
                tensors,
                self._method,
                self.budget,
                kept=kept,
                stats=stats,
                previous={name: previous[name] for name in self.found.weights} if previous else None,
            )
        return Update(masks, self._solved(tensors, masks, stats))

    def _solved(self, tensors: Tensors, masks: Tensors, stats: Stats) -> dict[str, Tensor]:
        solver = self._method.solver
        if solver is None:
            return {}
        values = solver.solve(tensors, {name: masks[name] for name in tensors}, stats)
        for name, value in values.items():
            if name not in tensors or value.shape != tensors[name].shape or value.dtype != tensors[name].dtype:
                raise SelectionError(f"{solver} returned {tuple(value.shape)}, {value.dtype} for {name}")
            check_finite(name, value)
        return values

    def _collect(self, tensors: Tensors, previous: Tensors) -> Stats:
        score, solver = self._method.score, self._method.solver
        needs: frozenset[Need] = frozenset(score.needs) | (frozenset() if solver is None else solver.needs)
        if needs:  # before a loss of NaN says so of a batch
            for name, value in tensors.items():
                check_finite(name, value)
        batches = self._batches
        source = Source(
            self._model,
            parameters_of(self._model, self.found.weights),
            self._loss_fn,
            None if batches is None else (lambda: batches() if callable(batches) else batches),
            self._inputs,
            previous,
        )
        return collect(needs, source)

    def achieved(self, masks: Tensors) -> float:
        """Return the target's quantity, counted on the masks."""
        left: float = sum(
            (int(masks[name].sum()) if name in masks else weight.numel) * self.budget.cost[name]
            for name, weight in self.found.weights.items()
        )
        if self._method.goal.kind in ("kept_parameters", "compression_ratio"):
            # These count the whole model, and so the biases that went with their units.
            left -= sum(int((~m).sum()) for name, m in masks.items() if name not in self.found.weights)
        return self._method.goal.measure(self.facts, left)

    def groups(self, masks: Tensors) -> tuple[GroupReport, ...]:
        """Return nothing: a weight's own units are no coupled groups."""
        return ()

    def check(self, masks: Tensors) -> None:
        """Refuse masks of other weights.

        Raises:
            CheckpointError: Names some that differ.
        """
        weights = self.found.weights.values()
        vectors = {w.bias for w in weights if w.bias is not None} | {n for w in weights for n in w.companions}
        refuse_other_names(masks.keys() - vectors, self.found.weights if masks else {})


def open_masking(
    model: nn.Module,
    method: Method,
    *,
    loss_fn: LossFn | None,
    batches: Batches | None,
    example_inputs: Any,
) -> Masking:
    """Return what makes a method's masks: over coupled groups where its pattern asks for them, else weight by weight.

    Args:
        model: The model.
        method: The parts.
        loss_fn: ``loss_fn(model, batch)``, for scores that need gradients.
        batches: Batches for it.
        example_inputs: What one forward pass takes.

    Raises:
        SecateurError: As :class:`~secateur.pruner.Pruner`.
    """
    check_data(loss_fn, batches)
    coupled = isinstance(method.pattern, Channel) and method.pattern.coupled
    if not coupled:
        return WeightMasking(model, method, loss_fn=loss_fn, batches=batches, example_inputs=example_inputs)
    from secateur.structure.masking import UnitMasking  # imports a tracer, which takes its time

    return UnitMasking(model, method, loss_fn=loss_fn, batches=batches, example_inputs=example_inputs)


def layer_rows(found: Found, masks: Tensors) -> tuple[LayerReport, ...]:
    """Return what the masks keep of every weight; a weight without a mask is whole."""
    return tuple(
        LayerReport(name, w.shape, w.numel, int(masks[name].sum()) if name in masks else w.numel)
        for name, w in found.weights.items()
    )


def sparsity_of(rows: Sequence[LayerReport]) -> float:
    """Return the fraction of all weights that is gone."""
    return 1.0 - sum(row.kept for row in rows) / sum(row.total for row in rows)


def refuse_other_names(names: Iterable[str], expected: Mapping[str, object]) -> None:
    """Refuse masks of other weights than expected.

    Args:
        names: Names of the masks.
        expected: Names that there should be.

    Raises:
        CheckpointError: Names some that differ.
    """
    odd = set(names) ^ expected.keys()
    if odd:
        raise CheckpointError(f"this pruner state comes from other filters: they differ in {sorted(odd)[:4]}")
