"""Masks of units of coupled groups, so that training with masks ends in a model from which every masked unit is cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.errors import CheckpointError, PatternError, RecipeError, TargetError
from secateur.graph.choose import Removed
from secateur.graph.coupling import Coupling
from secateur.graph.examples import Example
from secateur.graph.shrink import shrink
from secateur.graph.trace import trace
from secateur.graph.unsupported import refuse_unsupported
from secateur.inputs import split_inputs
from secateur.method import Method
from secateur.patterns import Channel
from secateur.prunable import Found, check_patterns, check_storage, derived_weights
from secateur.stats.gradients import LossFn
from secateur.structure.collect import Batches, check_needs
from secateur.structure.cut import Cut, removed_by
from secateur.structure.make import Chooser, Structural, check_method, groups_left
from secateur.structure.scoring import as_group_score
from secateur.types import GroupReport, Tensors, Update, Weight

_SEED = 0x5EC


class UnitMasking:
    """Masks that make coupled units silent: every parameter is zero wherever a masked unit has a place in it.

    The rows that make a unit, its biases, scales and depthwise filters are masked, and the columns that read it too.
    That is the very model that the proof of :func:`~secateur.structure.shrink_` compares with, so what is learnt under
    the masks is what the cut model computes, also where an activation of zero is not zero (a sigmoid) or a buffer is
    added to the units. Only statistics over units (layer norms) see the zeros, and no longer do once they are cut out.

    On construction some units are cut out on trial, proven and put back, so that training starts from groups that are
    known to work. Which ones does not depend on the weights: a resumed pruner finds the same groups.

    Args:
        model: The model.
        method: The parts; the pattern is ``Channel(coupled=True)``.
        loss_fn: Runs the model on one batch, for scores that need it.
        batches: For scores that need data.
        example_inputs: A tensor, a tuple, a dict, or ``(tuple, dict)``.

    Raises:
        PatternError: When there are no example inputs.
        RecipeError: For overrides and ``allow_empty``.
        MissingStatsError: When the score needs what nobody supplied.
        WeightError: When a filter matches nothing, or a parameter cannot be masked.
        GraphError: When the forward cannot be followed or nothing can be pruned.
        TargetError: When the target is out of reach; gives the limit.
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
        pattern = method.pattern
        if not isinstance(pattern, Channel) or example_inputs is None:
            raise PatternError(
                "channel with coupled = true follows units through the network: pass example_inputs, what one forward "
                "pass takes"
            )
        check_method(method)
        if method.allow_empty:
            raise RecipeError("allow_empty and coupled channels exclude each other: nothing would be left to read")
        self._score = as_group_score(method.score, pattern)
        check_needs(self._score, loss_fn, batches)
        refuse_unsupported(model)
        self._model, self._method = model, method
        self._how = Structural.of(pattern)
        self._chooser = Chooser(model, method, self._how, loss_fn, batches)
        self._inputs = split_inputs(example_inputs)
        self._coupling = self._proven()
        self.found = self._reached()

    # -- which units there are

    def _proven(self) -> Coupling:
        """Return the groups under the constraints that cutting units out on trial has shown to be needed."""
        coupling = Coupling(trace(self._model, [Example(*self._inputs)], exact=self._how.exact))
        self._check_filters(coupling)
        measure, limit = self._chooser.goal(coupling)
        dense = measure(coupling.alive(np.zeros(coupling.units, dtype=bool)))
        if self._method.goal.kind == "kept_parameters" and limit > dense:
            raise TargetError(f"target kept_parameters={limit:g}: the model has only {dense:g} parameters")
        if limit >= dense and coupling.units:
            return coupling  # nothing will ever go
        shrunk = shrink(
            self._model,
            *self._inputs,
            self._trial,
            exact=self._how.exact,
            linked=self._how.uniform,
            recorded=coupling.trace,
            weights=False,
        )
        shrunk.undo.revert()
        return shrunk.coupling

    def _trial(self, coupling: Coupling) -> Removed:
        """Choose units at random, the same for any weights."""
        whole = self._derived(coupling)
        if not self._score.needs:
            whole |= self._chooser.scores(coupling)[1]
        return self._chooser.choose(coupling, np.random.default_rng(_SEED).random(coupling.units), whole)

    def _derived(self, coupling: Coupling) -> dict[str, str]:
        """Return the groups that reach weights computed from others: a masked row of those can be zero over zero."""
        derived = {name.rpartition(".")[0]: why for name, why in derived_weights(self._model, ()).items()}
        out = {}
        for group in coupling.groups if derived else ():
            for member in group.members:
                module = member.name.partition(".parametrizations.")[0]
                owner = module if module in derived else member.name.rpartition(".")[0]
                if owner in derived:
                    out[group.name] = f"the weight of {owner} is {derived[owner]}"
        return out

    def _check_filters(self, coupling: Coupling) -> None:
        parameters = (leaf for leaf in coupling.trace.leaves if leaf.kind == "parameter")
        names = [name for leaf in parameters for name in leaf.names]
        check_patterns((*self._method.include, *self._method.exclude), names, "parameter")

    def _reached(self) -> Found:
        """Describe every parameter that some group has a place in."""
        reached = {m.name for g in self._coupling.groups for m in g.members}
        weights = {}
        for leaf in self._coupling.trace.leaves:
            if leaf.kind == "parameter" and leaf.name in reached:
                check_storage(leaf.name, leaf.tensor)
                owner = self._model.get_submodule(leaf.name.rpartition(".")[0])
                weights[leaf.name] = Weight(leaf.name, tuple(leaf.axes.shape), kind=type(owner).__name__)
        return Found(weights, self._chooser.skipped)

    # -- what goes

    @property
    def share(self) -> float:
        """Part of the target's measure that goes in the end."""
        if self._method.goal.kind == "sparsity":
            return self._method.goal.value
        dense, limit = self._sizes()
        return max(1.0 - limit / dense, 0.0)

    def _sizes(self) -> tuple[float, float]:
        measure, limit = self._chooser.goal(self._coupling)
        return measure(self._coupling.alive(np.zeros(self._coupling.units, dtype=bool))), limit

    def asked(self, level: float) -> float:
        """Return the target's quantity when a part of its measure has gone."""
        return self._chooser.in_words_of_target(self._coupling, self._sizes()[0] * (1.0 - level))

    def update(self, level: float, previous: Tensors, *, last: bool) -> Update:
        """Return the pruning step to a level; the last one meets the target itself.

        Raises:
            TargetError: When the groups that the score can say something about do not allow the target.
            SelectionError: When scores cannot be ranked.
        """
        dense, limit = self._sizes()
        gone = removed_by(self._coupling, previous)
        removed = gone
        limit = limit if last else dense * (1.0 - level)
        if limit < dense:
            scores, silent = self._chooser.scores(self._coupling, gone)
            whole = self._derived(self._coupling) | silent
            removed = self._chooser.choose(self._coupling, scores, whole, limit=limit, gone=gone)
            self.found = Found(self.found.weights, self._chooser.skipped)
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        masks = Cut(self._coupling, removed).masks(self.found.weights)
        return Update({name: mask.to(parameters[name].device) for name, mask in masks.items()})

    def achieved(self, masks: Tensors) -> float:
        """Return the target's quantity of the model that is left once the masked units are cut out."""
        return self._chooser.value(self._coupling, self._coupling.alive(removed_by(self._coupling, masks)))

    def groups(self, masks: Tensors) -> tuple[GroupReport, ...]:
        """Return how many units stay in each group."""
        return groups_left(self._coupling, removed_by(self._coupling, masks))

    def check(self, masks: Tensors) -> None:
        """Refuse masks that are no units of these groups.

        Raises:
            CheckpointError: Names one.
        """
        if not masks:
            return
        odd = masks.keys() ^ self.found.weights.keys()
        whole = {} if odd else Cut(self._coupling, removed_by(self._coupling, masks)).masks(masks)
        odd |= {name for name, mask in whole.items() if not torch.equal(mask, masks[name].cpu())}
        if odd:
            raise CheckpointError(
                f"this pruner state does not fit the coupled groups of this model: see its masks of {sorted(odd)[:4]}"
            )
