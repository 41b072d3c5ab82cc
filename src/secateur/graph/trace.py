"""A recorded forward: on every example, on the branches that these do not take, and in training mode."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from secateur.errors import GraphError
from secateur.graph.axes import Axes
from secateur.graph.examples import MOST_WAYS, Example, ScalarReads, other_batches, other_ways
from secateur.graph.labels import Ledger
from secateur.graph.model import module_stack, quiet_forward
from secateur.graph.modes import who_asks_for_the_mode
from secateur.graph.outputs import fixed_outputs
from secateur.graph.record import Leaf, Op, Recorder
from secateur.graph.rules import RULES, Rules
from secateur.graph.spread import passes_to_reach_all
from secateur.graph.state import preserved

_MOST_SEARCHES = 64
"""Recordings of branches, those in search of unused parameters included."""


@dataclass
class Trace:
    """A recorded forward.

    Attributes:
        ledger: All labels and ties.
        leaves: The tensors that the model owns.
        touched: Indices of the leaves that the forward used.
        ops: Operators of the first forward, in order.
        unknown: Operators without a rule, and the modules that call them.
        examples: What was recorded in evaluation mode: the examples, and branches that they do not take themselves.
        training: What was recorded in training mode; ``None`` where that fails, or could show nothing new.
    """

    ledger: Ledger
    leaves: list[Leaf]
    touched: set[int]
    ops: list[Op]
    unknown: dict[str, set[str]]
    examples: tuple[Example, ...] = ()
    training: Example | None = None


def trace(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    exact: bool = False,
    rules: Rules = RULES,
) -> Trace:
    """Record the forward on each of the examples; all of them constrain what can be pruned.

    Where Python reads truth values or numbers from tensors, the forward may have branches: each is recorded too, with
    the answer turned round, unless it raises an error; and as long as there are parameters that no recording has used,
    several answers at a time. Where a router may choose from a list of modules, further recordings give every entry
    something to do. One more recording is made in training mode, for what only that does (auxiliary
    classifiers), unless nothing but PyTorch's own layers asks for the mode.

    Args:
        model: Runs in evaluation mode, without gradients; left as it was.
        examples: Inputs.
        exact: Never prune a dimension that a normalisation runs over.
        rules: What each operator does to labels.

    Raises:
        GraphError: When the forward fails, or changes a parameter in place.
    """
    if not examples:
        raise GraphError("no example inputs were given, so the forward cannot be recorded")
    ledger = Ledger()
    first = Recorder(ledger, rules, exact=exact)
    first.add_leaves(model)
    ledger.mentions.watch(model)
    taken: list[Example] = []
    asked: set[str] = set()

    def another() -> Recorder:
        mode = Recorder(ledger, rules, exact=exact, keep_ops=False)
        mode.adopt(first.leaves)
        return mode

    def record(mode: Recorder, example: Example) -> ScalarReads:
        reads = _record(model, mode, example, asked)
        first.note(mode)
        taken.append(example)
        return reads

    ways: deque[Example] = deque()
    later: deque[Example] = deque()
    for number, example in enumerate(examples):
        reads = record(first if number == 0 else another(), example)
        near = other_ways(example, reads)
        ways += near[:MOST_WAYS]
        later += near[MOST_WAYS:] + other_ways(example, reads, far=True)
    for spread in range(1, passes_to_reach_all(first.ops, ledger) + 1):
        with suppress(GraphError):
            record(another(), replace(examples[0], spread=spread))
    for _ in range(_MOST_SEARCHES):
        if not ways and later and _untouched(first):
            ways.append(later.popleft())
        if not ways:
            break
        way = ways.popleft()
        with suppress(GraphError):  # a guard that raises is no branch
            later += other_ways(way, record(another(), way))
    # Where only PyTorch's own layers ask for the mode, training takes no other way, and ties nothing more together.
    scripted = any(isinstance(module, torch.jit.ScriptModule) for module in model.modules())
    same = not (asked or scripted or _untouched(first))
    training = None if same else _record_training(model, examples[0], first, another)
    return Trace(ledger, first.leaves, first.touched, first.ops, first.unknown, tuple(taken), training)


def _record_training(
    model: nn.Module, example: Example, first: Recorder, another: Callable[[], Recorder]
) -> Example | None:
    """Record a forward in training mode, which may take other ways, and use parameters that evaluation leaves unused.

    Batch norms need several samples. Some models want more inputs than they do in evaluation (targets): such a
    recording is left out, and parameters that it would use are fixed.
    """
    tried = set[int]()
    why = ""
    for inputs in (example, *other_batches(example)):
        mode = another()
        way = replace(inputs, training=True)
        try:
            _record(model, mode, way, set())
        except GraphError as error:
            tried |= mode.touched
            why = why or f"training mode, where {error}"
        else:
            first.note(mode)
            return way
    for i in tried - first.touched:  # nobody knows what they would have to follow
        first.ledger.freeze_all(Axes((), first.leaves[i].axes.parts), why)
    return None


def _untouched(mode: Recorder) -> bool:
    """Whether there are parameters that no recording has used."""
    return any(leaf.kind == "parameter" and i not in mode.touched for i, leaf in enumerate(mode.leaves))


def _record(model: nn.Module, mode: Recorder, example: Example, asked: set[str]) -> ScalarReads:
    """Record one forward; return the scalars that Python read from tensors, and add who asked for the mode."""
    reads = ScalarReads(stack=mode.stack)
    mode.spread = example.spread
    quiet = quiet_forward(model, training=example.training)
    with preserved(model), quiet, module_stack(model, mode.stack), mode, reads:
        with who_asks_for_the_mode() as here:
            out = example.run(model)
        asked |= here
        mode.ledger.where = "an output of the model"
        results = [leaf for leaf in fixed_outputs(out) if isinstance(leaf, Tensor)]
        for tensor in results:
            mode.ledger.freeze_all(mode.axes(tensor))
    if not results and not example.training:
        raise GraphError(
            f"the forward returns {type(out).__name__} without a tensor in it, so nothing of it could be compared; "
            "return the results as tensors, in any container or object"
        )
    return reads
