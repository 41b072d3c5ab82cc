"""From a method to a shorter model: which blocks go, so that the target is met."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from secateur.allocate import Global
from secateur.errors import GraphError, TargetError
from secateur.graph.blocks import Block, Stack, find_stacks
from secateur.graph.changes import Undo
from secateur.graph.examples import Example
from secateur.graph.plan import Plan
from secateur.graph.shorten import blocks_of, replay_shortened, shorten
from secateur.graph.trace import Trace, trace
from secateur.graph.unsupported import refuse_unsupported
from secateur.graph.verify import Proof
from secateur.inputs import split_inputs
from secateur.method import Method
from secateur.prunable import check_patterns, matches
from secateur.stats.gradients import LossFn
from secateur.structure.collect import Batches
from secateur.structure.config import update_config
from secateur.structure.layer_scores import BlockSet, block_scores
from secateur.structure.report import ShrinkReport
from secateur.targets import Target
from secateur.types import GroupReport, Units


@dataclass(frozen=True)
class Shortened:
    """A model that blocks were taken from.

    Attributes:
        plan: Replays on a fresh instance.
        proof: The comparison with the dense model that bypasses the blocks.
        undo: The way back.
    """

    plan: Plan
    proof: Proof
    undo: Undo


def plan_and_shorten(
    model: nn.Module,
    method: Method,
    example_inputs: Any,
    *,
    loss_fn: LossFn | None = None,
    batches: Batches | None = None,
) -> tuple[Shortened, ShrinkReport]:
    """Take whole blocks out of a model, in place; see :func:`secateur.make_plan`. ``Shortened.undo`` puts it back.

    Args:
        model: The model.
        method: Its pattern is ``Layer``.
        example_inputs: A tensor, a tuple, a dict, or ``(tuple, dict)``.
        loss_fn: For scores that look at batches.
        batches: For scores that look at batches.

    Raises:
        GraphError: When no block can go, or the result could not be proven.
        TargetError: When the target is out of reach; gives the limit.
        WeightError: When a filter matches no block.
    """
    refuse_unsupported(model)
    args, kwargs = split_inputs(example_inputs)
    example = Example(args, kwargs)
    stacks, refused = find_stacks(model, example)
    if stacks:
        names = [block.name for stack in stacks for block in stack.blocks]
        check_patterns((*method.include, *method.exclude), [*names, *refused], "block")
    stacks, skipped = _filtered(model, method, stacks)
    if not stacks:
        reasons = "; ".join(f"{n}: {why}" for n, why in list({**refused, **skipped}.items())[:4])
        raise GraphError(
            f"no block can be taken out: because {reasons or 'the model has no list of modules with parameters'}"
        )
    recorded = trace(model, [example])
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    while True:
        sets = _sets(model, stacks)
        sizes = Sizes(model, method.goal, recorded, [b.name for s in sets for b in s.blocks])
        gone = _choose(method, sets, block_scores(model, method, sets, loss_fn, batches), sizes)
        chosen = {s: blocks for s in stacks if (blocks := [b for b in s.blocks if b.name in gone])}
        try:
            plan, proof, undo = shorten(model, example, chosen)
            break
        except GraphError:
            stuck = _stuck(model, example, chosen)
            stacks = tuple(s for s in stacks if s.name not in stuck)
            if not stuck or not stacks:
                raise
            skipped |= {b.name: stuck[s.name] for s in chosen if s.name in stuck for b in s.blocks}
    edits, obstacle = update_config(model, shapes, (args, kwargs), undo, plan.drops)
    goal = method.goal
    info = {"target": {goal.kind: goal.value}, "score": str(method.score), "pattern": str(method.pattern)}
    plan = replace(plan, edits=(*plan.edits, *edits), info=info)
    report = ShrinkReport(
        plan,
        proof,
        (sizes.parameters(()), sizes.parameters(gone)),
        (sizes.macs(()), sizes.macs(gone)),
        tuple(
            GroupReport(s.name, len(names), sum(n not in gone for n in names), names)
            for s in sets
            for names in [tuple(b.name for b in s.blocks)]
        ),
        skipped,
        target=goal.kind,
        asked=goal.value,
        achieved=sizes.value(gone),
        config=obstacle,
    )
    return Shortened(plan, proof, undo), report


def _stuck(model: nn.Module, example: Example, chosen: dict[Stack, list[Block]]) -> dict[str, str]:
    """Return the stacks that cannot even be cut alone, and why: code counts on how many entries they have, say."""
    out = {}
    for stack, blocks in chosen.items():
        try:
            shorten(model, example, {stack: blocks})[2].revert()
        except GraphError as error:
            out[stack.name] = str(error)
    return out


def replay_drops(model: nn.Module, plan: Plan, example_inputs: Any) -> tuple[Shortened, ShrinkReport]:
    """Take blocks out as planned, in place.

    Args:
        model: The model that the plan was made for.
        plan: The plan.
        example_inputs: A tensor, a tuple, a dict, or ``(tuple, dict)``.

    Raises:
        PlanError: When the plan is not this model's.
        GraphError: When the result cannot be proven.
    """
    example = Example(*split_inputs(example_inputs))
    plan.check(model)
    blocks = [b.name for b in blocks_of(model, plan, example)]
    sizes, gone = Sizes(model, None, trace(model, [example]), blocks), frozenset(blocks)
    parameters = sizes.parameters(()), sizes.parameters(gone)
    groups = tuple(
        GroupReport(d.container, d.entries, d.entries - len(d.places), members)
        for d in plan.drops
        for members in [tuple(b for b in blocks if b.startswith(f"{d.container}."))]
    )
    proof, undo = replay_shortened(model, plan, example)
    report = ShrinkReport(plan, proof, parameters, (sizes.macs(()), sizes.macs(gone)), groups)
    return Shortened(plan, proof, undo), report


def _filtered(model: nn.Module, method: Method, stacks: tuple[Stack, ...]) -> tuple[tuple[Stack, ...], dict[str, str]]:
    """Return the blocks that the filters leave, and why others stay."""
    skipped: dict[str, str] = {}
    out = []
    for stack in stacks:
        for block in stack.blocks:
            kinds = {kind.__name__ for kind in type(model.get_submodule(block.name)).__mro__}
            if method.include and not matches(block.name, method.include):
                skipped[block.name] = "not in include"
            elif matches(block.name, method.exclude):
                skipped[block.name] = "excluded"
            elif method.types and not kinds & set(method.types):
                skipped[block.name] = "not of the given types"
        kept = tuple(b for b in stack.blocks if b.name not in skipped)
        if kept:
            out.append(replace(stack, blocks=kept))
    return tuple(out), skipped


def _sets(model: nn.Module, stacks: tuple[Stack, ...]) -> list[BlockSet]:
    out = []
    for stack in stacks:
        alike: dict[tuple[tuple[str, tuple[int, ...]], ...], list[Block]] = {}
        for block in stack.blocks:
            named = model.get_submodule(block.name).named_parameters()
            alike.setdefault(tuple((n, tuple(p.shape)) for n, p in named), []).append(block)
        for number, blocks in enumerate(alike.values()):
            name = stack.name if not number else f"{stack.name}#{number + 1}"
            last = len(blocks) == stack.entries  # an empty stack is no stack
            out.append(BlockSet(name, tuple(blocks), int(last)))
        if len(alike) > 1 and sum(len(b) for b in alike.values()) == stack.entries:
            out[-1] = replace(out[-1], floor=1)
    return out


class Sizes:
    """What is left of the model without some blocks, in the target's words."""

    def __init__(self, model: nn.Module, goal: Target | None, recorded: Trace, blocks: list[str]) -> None:
        self._goal, self._blocks = goal or Target("channels", 0.0), blocks
        self._macs = dict.fromkeys(["", *blocks], 0)
        for op in recorded.ops:
            cost = 0
            for factors in op.macs:
                product = 1
                for axes, dim in factors:
                    product *= axes.shape[dim]
                cost += product
            owner = next((b for b in blocks if op.module == b or op.module.startswith(f"{b}.")), "")
            self._macs[owner] += cost
        owners: dict[int, set[str]] = {}
        counted: dict[int, int] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            owner = next((b for b in blocks if name.startswith(f"{b}.")), "")
            owners.setdefault(id(parameter), set()).add(owner)
            counted[id(parameter)] = parameter.numel()
        self._owned = [(counted[key], names) for key, names in owners.items()]

    def macs(self, gone: tuple[str, ...] | frozenset[str]) -> int:
        """Return the multiply-accumulates of the example."""
        return sum(cost for block, cost in self._macs.items() if block not in gone)

    def parameters(self, gone: tuple[str, ...] | frozenset[str]) -> int:
        """Return the parameters, those that several blocks share as long as one of these stays."""
        return sum(count for count, names in self._owned if not names <= set(gone))

    def prunable(self, gone: frozenset[str]) -> int:
        """Return the parameters of blocks."""
        return sum(count for count, names in self._owned if "" not in names and not names <= gone)

    def meets(self, gone: frozenset[str]) -> bool:
        """Whether the target is met."""
        value, goal = self.value(gone), self._goal.value
        return value >= goal if self._goal.kind in ("sparsity", "compression_ratio") else value <= goal

    def value(self, gone: frozenset[str]) -> float:
        """Return the target's quantity."""
        nothing: frozenset[str] = frozenset()
        return {
            "macs": lambda: self.macs(gone) / max(self.macs(nothing), 1),
            "channels": lambda: 1 - len(gone) / len(self._blocks),
            "sparsity": lambda: 1 - self.prunable(gone) / self.prunable(nothing),
            "compression_ratio": lambda: self.parameters(nothing) / max(self.parameters(gone), 1),
            "kept_parameters": lambda: float(self.parameters(gone)),
        }[self._goal.kind]()


def _choose(method: Method, sets: list[BlockSet], scores: Mapping[str, Tensor], sizes: Sizes) -> frozenset[str]:
    """Take out as few blocks as meet the target, the lowest scores first, shared out by the allocation."""
    units = {s.name: Units(scores[s.name], 1.0, s.floor, s.name) for s in sets}
    allocate = method.allocate or Global()
    gone: frozenset[str] = frozenset()
    total, least = sum(len(s.blocks) for s in sets), sum(s.floor for s in sets)
    for kept in range(total, least - 1, -1):
        counts = allocate(units, kept)
        chosen = set()
        for some in sets:
            order = scores[some.name].argsort(stable=True).tolist()
            chosen |= {some.blocks[i].name for i in order[: len(some.blocks) - counts[some.name]]}
        gone = frozenset(chosen)
        if sizes.meets(gone):
            if not gone:
                raise GraphError("no block needs to go: the target is met as the model is")
            return gone
    goal = method.goal
    raise TargetError(
        f"target {goal.kind}={goal.value:g} cannot be reached: with {len(gone)} of {total} blocks taken out it is "
        f"{sizes.value(gone):.6g}. Ask for less, or prune channels too"
    )
