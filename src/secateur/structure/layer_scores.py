"""One score per block: what the score needs is collected, every parameter of a block is one row of its set."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.errors import MissingStatsError, SelectionError
from secateur.forward import call_model, requiring_gradients, undisturbed
from secateur.graph.blocks import Block
from secateur.graph.valueless import all_have_values
from secateur.method import Method, check_finite
from secateur.select import check_scores
from secateur.stats._common import LossFn, loss_of, refuse_inference
from secateur.stats.streams import collect_turns
from secateur.structure.collect import Batches
from secateur.structure.parameter_stats import UNIT_STATISTICS
from secateur.structure.scoring import as_group_score, refuse_silence
from secateur.structure.views import role_of
from secateur.types import GroupView, MemberView, Need, Stats


@dataclass(frozen=True)
class BlockSet:
    """Blocks of one stack whose parameters have the same shapes: what scores compare.

    Attributes:
        name: The stack's name; numbered where it has several sets.
        blocks: The blocks.
        floor: Fewest that stay.
    """

    name: str
    blocks: tuple[Block, ...]
    floor: int


def block_scores(
    model: nn.Module, method: Method, sets: list[BlockSet], loss_fn: LossFn | None, batches: Batches | None
) -> dict[str, Tensor]:
    """Score every block of every set.

    Args:
        model: The model.
        method: Its score is used.
        sets: The blocks.
        loss_fn: For scores that look at batches.
        batches: For scores that look at batches.

    Returns:
        One score per block, by set.

    Raises:
        MissingStatsError: When the score needs what nobody supplied, or what it needs is zero for every block.
        WeightError: When a weight is not finite.
        SelectionError: When a score is not finite, or says nothing about blocks.
    """
    score = as_group_score(method.score, method.pattern)
    if not all_have_values(model.parameters()):  # no values to score: the first blocks go
        return {some.name: torch.zeros(len(some.blocks), dtype=torch.float64) for some in sets}
    for name, parameter in model.named_parameters():
        check_finite(name, parameter)
    stats = _collect(model, score.needs, sets, loss_fn, batches)
    refuse_silence(score, stats)
    out = {}
    for some in sets:
        found = score.units(_view(model, some), stats)
        if found is None:
            raise SelectionError(f"{some.name}: {score} says nothing about whole blocks")
        if tuple(found.shape) != (len(some.blocks),):
            raise SelectionError(f"{some.name}: {score} returned {tuple(found.shape)} for {len(some.blocks)} blocks")
        out[some.name] = check_scores(some.name, found.detach().double().cpu())
    return out


def _view(model: nn.Module, some: BlockSet) -> GroupView:
    """Return a set of blocks as scores see it: every parameter of a block, one row per block."""
    modules = [model.get_submodule(b.name) for b in some.blocks]
    members = []
    for name, parameter in modules[0].named_parameters():
        rows = torch.stack([m.get_parameter(name).detach().flatten() for m in modules])
        members.append(MemberView(name, role_of(modules[0], name, 0, tuple(parameter.shape)), rows))
    return GroupView(some.name, len(modules), tuple(members))


def _collect(
    model: nn.Module, needs: frozenset[Need], sets: list[BlockSet], loss_fn: LossFn | None, batches: Batches | None
) -> Stats:
    if not needs:
        return {}
    unknown = needs - UNIT_STATISTICS - {"stream_turn"}
    if unknown:
        raise MissingStatsError(
            f"the score needs {sorted(map(str, unknown))}, which nothing here collects for whole blocks"
        )
    if batches is None or (loss_fn is None and needs & UNIT_STATISTICS):
        raise MissingStatsError("the score looks at batches: pass loss_fn=lambda model, batch: ... and batches=[...]")
    loss_fn = loss_fn or call_model  # streams are only watched: any forward will do
    stats: dict[str, dict[str, Tensor]] = {}
    if "stream_turn" in needs:
        names = [b.name for s in sets for b in s.blocks]
        stats["stream_turn"] = _shared(sets, collect_turns(model, names, loss_fn, batches))
    if needs & UNIT_STATISTICS:
        products = _products(model, sets, loss_fn, batches)
        stats |= {str(need): _shared(sets, products[str(need)]) for need in needs & UNIT_STATISTICS}
    return stats


def _shared(sets: list[BlockSet], values: Tensor) -> dict[str, Tensor]:
    """Share out one value per block among the sets."""
    parts = torch.split(values, [len(s.blocks) for s in sets])
    return {s.name: part for s, part in zip(sets, parts, strict=True)}


def _products(model: nn.Module, sets: list[BlockSet], loss_fn: LossFn, batches: Batches) -> dict[str, Tensor]:
    """Return, per block, statistics over batches of the sum of weight times gradient."""
    owned = [list(model.get_submodule(b.name).parameters()) for s in sets for b in s.blocks]
    flat = list({id(p): p for some in owned for p in some}.values())
    found: list[Tensor] = []
    refuse_inference("the score")
    with requiring_gradients(flat), undisturbed(model), torch.enable_grad():
        for number, batch in enumerate(batches() if callable(batches) else batches):
            loss = loss_of(loss_fn, model, batch, number)
            gradients = torch.autograd.grad(loss, flat, allow_unused=True)
            dots = {
                id(p): 0.0 if g is None else float((p.detach().double() * g.double()).sum())
                for p, g in zip(flat, gradients, strict=True)
            }
            found.append(torch.tensor([sum(dots[id(p)] for p in some) for some in owned], dtype=torch.float64))
    if not found:
        raise MissingStatsError("the score needs gradients, but there were no batches to compute them from")
    stacked = torch.stack(found)
    return {
        "unit_product": stacked.mean(0),
        "unit_product_square": stacked.square().mean(0),
        "unit_product_absolute": stacked.abs().mean(0),
    }
