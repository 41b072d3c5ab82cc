"""Take blocks out of a model, and prove that it equals the dense one with these blocks bypassed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import product
from typing import Any

from torch import nn

from secateur.errors import GraphError, PlanError
from secateur.graph.axes import Axes
from secateur.graph.blocks import Block, Stack, bypassed, find_stacks
from secateur.graph.changes import Drop, Edit, Undo, class_name
from secateur.graph.compare import compare, says_nothing
from secateur.graph.examples import MOST_WAYS, Example, ScalarReads, other_batches, other_ways, unseen
from secateur.graph.model import owned_tensors, quiet_forward
from secateur.graph.plan import Plan, digest, silence
from secateur.graph.record import Leaf
from secateur.graph.state import preserved
from secateur.graph.valueless import all_have_values
from secateur.graph.values import Probe
from secateur.graph.verify import Proof, run_small

_PLACE_NAMES = ("idx", "index", "layer_id", "layer_num", "block_id", "depth")
_COUNT_NAMES = ("layer", "block", "depth", "stage")


def shorten(model: nn.Module, example: Example, gone: Mapping[Stack, Sequence[Block]]) -> tuple[Plan, Proof, Undo]:
    """Take blocks out, in place.

    Numbers that count the blocks, lists with an item for each, and attributes that hold a block's place follow as far
    as the proof allows: whether a number is a place or a value that happens to equal it shows in the result.

    Args:
        model: Left as it was when anything fails.
        example: Inputs.
        gone: What goes, by stack.

    Returns:
        The plan, the proof, and the way back.

    Raises:
        GraphError: When no variant equals the dense model with these blocks bypassed.
    """
    blocks = [block for some in gone.values() for block in some]
    if not all_have_values(model.parameters()):
        drops, edits = next(_variants(model, gone))
        plan = Plan(class_name(model), {}, {}, edits, digest(model), {}, drops)
        return plan, *_by_shapes(model, example, plan, len(blocks))
    dense = _Dense(model, example, blocks)
    mark = digest(model)
    obstacle = ""
    for drops, edits in _variants(model, gone):
        plan = Plan(class_name(model), {}, {}, edits, mark, {}, drops)
        undo = plan.apply_(model)
        try:
            proof = dense.compared()
        except GraphError as error:
            obstacle = obstacle or str(error)
        except BaseException:
            undo.revert()
            raise
        else:
            if proof.equal:
                return plan, proof, undo
            obstacle = obstacle or f"the result differs by {proof.difference:.1e}"
        undo.revert()
    names = ", ".join(block.name for block in blocks)
    raise GraphError(
        f"{class_name(model)} without {names} could not be proven equal to the dense model that bypasses them: "
        f"{obstacle}. Leave these blocks out with exclude = [...]"
    )


def blocks_of(model: nn.Module, plan: Plan, example: Example) -> list[Block]:
    """Return the blocks that a plan takes out.

    Args:
        model: The model as it was before.
        plan: The plan.
        example: Inputs.

    Raises:
        PlanError: When the plan takes out what is no block of this model, or cuts channels as well.
    """
    if plan.kept:
        raise PlanError("the plan takes out blocks and cuts channels: only one of these can be proven at a time")
    stacks, refused = find_stacks(model, example)
    here = {stack.name: {b.place: b for b in stack.blocks} for stack in stacks}
    out = []
    for drop in plan.drops:
        for place in drop.places:
            block = here.get(drop.container, {}).get(place)
            if block is None:
                name = f"{drop.container}.{place}"
                raise PlanError(
                    f"the plan takes out {name}, which is no block: {refused.get(name, 'it has no stream')}"
                )
            out.append(block)
    return out


def replay_shortened(model: nn.Module, plan: Plan, example: Example) -> tuple[Proof, Undo]:
    """Take blocks out as planned, in place, and prove the result.

    Args:
        model: The model that the plan was made for, weights included; left as it was when anything fails.
        plan: The plan.
        example: Inputs.

    Raises:
        PlanError: When the plan is not this model's.
        GraphError: When the result cannot be proven.
    """
    plan.check(model, weights=True)
    blocks = blocks_of(model, plan, example)
    if not all_have_values(model.parameters()):
        return _by_shapes(model, example, plan, len(blocks))
    dense = _Dense(model, example, blocks)
    undo = plan.apply_(model)
    try:
        proof = dense.compared()
        if not proof.equal:
            raise GraphError(
                f"the planned result differs from the dense model that bypasses the blocks by {proof.difference:.1e}; "
                "plan again with these inputs"
            )
    except BaseException:
        undo.revert()
        raise
    return proof, undo


class _Dense:
    """What a dense model gives in float64 while its stream passes by some blocks, to compare what becomes of it.

    Args:
        model: Still dense.
        example: Inputs.
        blocks: What is bypassed.

    Raises:
        GraphError: When a forward fails, or all outputs are zeros or NaN.
    """

    def __init__(self, model: nn.Module, example: Example, blocks: Sequence[Block]) -> None:
        self._model, self._bypassed = model, len(blocks)
        self._examples, self._leaves = _examples(model, example), _leaves(model)
        self._probe = Probe([leaf.tensor.detach() for leaf in self._leaves])
        with bypassed(model, blocks):
            self._reference = self._run()
        _refuse_silence(model, self._reference)

    def compared(self) -> Proof:
        """Compare the model as it is now."""
        difference, scale = compare(self._reference, self._run())
        return Proof(difference, scale, len(self._examples), {}, bypassed=self._bypassed)

    def _run(self) -> list[list[Any]]:
        return run_small(self._model, self._examples, self._leaves, {}, self._probe)


def _refuse_silence(model: nn.Module, reference: list[list[Any]]) -> None:
    if says_nothing(reference):
        raise GraphError(silence(model))


def _by_shapes(model: nn.Module, example: Example, plan: Plan, count: int) -> tuple[Proof, Undo]:
    """Take blocks out of a model without values: that it runs is all that can be known."""
    undo = plan.apply_(model)
    try:
        with preserved(model), quiet_forward(model):
            example.run(model)
    except BaseException:
        undo.revert()
        raise
    return Proof(0.0, 0.0, 0, {}, "shapes", count), undo


def prove_bypassed(dense: nn.Module, small: nn.Module, example: Example, blocks: Sequence[Block]) -> Proof:
    """Compare a shortened model with the dense one that bypasses the same blocks, in float64.

    Args:
        dense: The model as it was before.
        small: The shortened one, not trained further.
        example: Inputs; a second input of other values is compared too.
        blocks: What went.
    """
    examples = _examples(dense, example)
    leaves, own = _leaves(dense), _leaves(small)
    with bypassed(dense, blocks):
        reference = run_small(dense, examples, leaves, {}, _values(leaves))
    difference, scale = compare(reference, run_small(small, examples, own, {}, _values(own)))
    return Proof(difference, scale, len(examples), {}, bypassed=len(blocks))


def _values(leaves: Sequence[Leaf]) -> Probe:
    return Probe([leaf.tensor.detach() for leaf in leaves], distinct=False)


def _leaves(model: nn.Module) -> list[Leaf]:
    return [Leaf(tuple(names), tensor, Axes(tensor.shape), kind) for names, tensor, kind in owned_tensors(model)]


def _examples(model: nn.Module, example: Example) -> list[Example]:
    """Return the example, branches that it does not take itself, and inputs of other values and batch size."""
    reads = ScalarReads()
    with preserved(model), quiet_forward(model), reads:
        example.run(model)
    out = [example]
    made_up = unseen(example)
    others = [*other_batches(made_up), made_up]
    for tried in (other_ways(example, reads)[:MOST_WAYS], others):
        for other in tried:
            # A guard that raises is no branch, and some models refuse made-up inputs.
            with suppress(GraphError), preserved(model), quiet_forward(model):
                other.run(model)
                out.append(other)
                if tried is others:
                    break
    return out


def _variants(
    model: nn.Module, gone: Mapping[Stack, Sequence[Block]]
) -> Iterator[tuple[tuple[Drop, ...], tuple[Edit, ...]]]:
    """Yield ways to take the blocks out: with everything that follows them, then with less."""
    found = [(stack, tuple(b.place for b in blocks)) for stack, blocks in gone.items() if blocks]
    seen = set()
    for lists, places, counts in product(("named", "all", "none"), (True, False), (True, False)):
        drops = tuple(
            Drop(
                stack.name,
                stack.entries,
                which,
                tuple(_lists(model, stack, named=lists == "named")) if lists != "none" else (),
                tuple(_positions(model, stack)) if places else (),
            )
            for stack, which in found
        )
        edits = tuple(e for stack, which in found for e in _counts(model, stack, len(which))) if counts else ()
        if (drops, edits) not in seen:
            seen.add((drops, edits))
            yield drops, edits


def _owner(stack: Stack) -> str:
    return stack.name.rpartition(".")[0]


def _lists(model: nn.Module, stack: Stack, *, named: bool) -> Iterator[tuple[str, str]]:
    """Yield sequences with one item per entry: of the module that holds the stack, and of configurations.

    Args:
        model: The model.
        stack: The stack.
        named: Only those whose name speaks of layers or blocks.
    """
    owner = model.get_submodule(_owner(stack))
    for name, value in vars(owner).items():
        if _is_list(name, value, stack.entries, named):
            yield _owner(stack), name
        elif hasattr(value, "to_dict") and hasattr(value, "__dict__"):
            for inner, held in vars(value).items():
                if _is_list(inner, held, stack.entries, named):
                    yield _owner(stack), f"{name}.{inner}"


def _is_list(name: str, value: Any, entries: int, named: bool) -> bool:
    if name.startswith("_") or type(value) not in (list, tuple) or len(value) != entries:
        return False
    return not any(isinstance(v, nn.Module) for v in value) and (not named or "layer" in name or "block" in name)


def _positions(model: nn.Module, stack: Stack) -> Iterator[tuple[str, str]]:
    """Yield attributes that hold the entry's place, counted from anywhere, in every entry."""
    entries = list(model.get_submodule(stack.name).children())
    for path, module in entries[0].named_modules():
        for name, value in vars(module).items():
            if type(value) is not int or not any(word in name.lower() for word in _PLACE_NAMES):
                continue
            try:
                held = [getattr(entry.get_submodule(path), name) for entry in entries]
            except AttributeError:
                continue
            if all(type(v) is int for v in held) and held == list(range(held[0], held[0] + len(entries))):
                yield path, name


def _counts(model: nn.Module, stack: Stack, fewer: int) -> Iterator[Edit]:
    """Yield the numbers of the module that holds the stack that say how many entries there are."""
    for name, value in vars(model.get_submodule(_owner(stack))).items():
        if type(value) is int and value == stack.entries and any(word in name.lower() for word in _COUNT_NAMES):
            yield Edit(_owner(stack), name, value, value - fewer)
