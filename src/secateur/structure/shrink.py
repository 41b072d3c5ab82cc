"""Shrink a model in place: by a method, a plan, or the masks of any training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from secateur.errors import GraphError, PlanError
from secateur.graph.changes import Undo
from secateur.graph.plan import Plan
from secateur.graph.shrink import Shrunk, replay, shrink
from secateur.graph.unsupported import refuse_unsupported
from secateur.graph.valueless import outside_fake_mode
from secateur.inputs import split_inputs
from secateur.method import Method
from secateur.stats.gradients import LossFn
from secateur.structure.collect import Batches
from secateur.structure.from_masks import dead_units
from secateur.structure.layers import Shortened, replay_drops
from secateur.structure.make import Structural, plan_and_shrink, report_of, with_config
from secateur.structure.optimizer import forget, slice_state
from secateur.structure.remembered import remember
from secateur.structure.report import ShrinkReport
from secateur.targets import Target
from secateur.types import Tensors


def shrink_(  # noqa: PLR0913  # one verb; everything after the inputs is optional
    model: nn.Module,
    what: Method | Target | Plan | ShrinkReport | Tensors,
    example_inputs: Any,
    *,
    optimizer: Optimizer | None = None,
    ema: nn.Module | None = None,
    loss_fn: LossFn | None = None,
    batches: Batches | None = None,
    align: int = 8,
    uniform: bool = False,
    exact: bool = False,
) -> ShrinkReport:
    """Make a model physically smaller, in place, and prove that it is right.

    Parameters keep their identity, so that the optimizer, its schedulers and your own references go on working. On
    any failure the model, the optimizer and the averaged copy are bit for bit what they were.

    Take the masks off the optimizer first (``pruner.detach()``): they have the old shapes.

    Args:
        model: Any module whose forward runs on the inputs; not wrapped, compiled or quantised.
        what: A method or a target, a plan made earlier, or masks by parameter name: units that these have emptied go.
        example_inputs: A tensor, a tuple, a dict, or ``(tuple, dict)``.
        optimizer: Its momentum is cut along.
        ema: An averaged copy of the same class (or ``AveragedModel``), shrunk along.
        loss_fn: Runs the model on one batch, for methods whose score needs it; see :func:`make_plan`.
        batches: For methods whose score needs data.
        align: Channel counts stay multiples of it; 1 switches it off. Plans and masks have made that choice already.
        uniform: Dimensions of one size keep one size, so that a transformers configuration can express the result.
        exact: Never prune a dimension that a normalisation runs over.

    Returns:
        The report, with plan and proof. ``print`` it.

    Raises:
        GraphError: When nothing can be pruned, or the result could not be proven.
        PlanError: When a plan does not fit the model, or the optimizer's state cannot be cut.
        TargetError: When the target is out of reach.
        WeightError: When a filter matches nothing, a weight is not finite, or a mask fits no parameter.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
        >>> report = shrink_(net, Target("macs", 0.5), torch.randn(1, 8))
        >>> net[0].out_features, report.proof.equal
        (16, True)
    """
    averaged = ema.module if isinstance(ema, AveragedModel) else ema
    if averaged is model:
        raise PlanError("ema is the model itself; give the averaged copy")
    with outside_fake_mode():
        shrunk, report = _shrink(model, what, example_inputs, Structural(align, uniform, exact), loss_fn, batches)
    extra = Undo()
    try:
        if optimizer is not None:
            plan, left = report.plan, {id(p) for p in model.parameters()}

            def follow() -> None:
                slice_state(optimizer, model, plan, extra)
                forget(optimizer, [p for p in model.parameters() if id(p) not in left], extra)

            _with_dense_shapes(model, shrunk, follow)
        if averaged is not None:
            refuse_unsupported(averaged)
            extra.add(report.plan.apply_(averaged).revert)
    except BaseException:
        extra.revert()
        shrunk.undo.revert()
        raise
    for changed in (model, averaged):
        if changed is not None:
            remember(changed, report.plan)
    return report


def _with_dense_shapes(model: nn.Module, shrunk: Shrunk | Shortened, act: Any) -> None:
    """Run something that must see the parameters' shapes of before."""
    shrunk.undo.revert()
    act()
    shrunk.undo.add(shrunk.plan.apply_(model).revert)


def _shrink(
    model: nn.Module,
    what: Any,
    example_inputs: Any,
    how: Structural,
    loss_fn: LossFn | None,
    batches: Batches | None,
) -> tuple[Shrunk | Shortened, ShrinkReport]:
    if isinstance(what, ShrinkReport):
        what = what.plan
    if isinstance(what, Method | Target):
        return plan_and_shrink(model, what, example_inputs, how, loss_fn=loss_fn, batches=batches)
    args, kwargs = split_inputs(example_inputs)
    if isinstance(what, Plan):
        refuse_unsupported(model)
        if what.drops and not what.kept:
            return replay_drops(model, what, example_inputs)
        shrunk = replay(model, what, args, kwargs)
        return shrunk, replace(report_of(shrunk, {}), plan=what)
    if isinstance(what, Mapping):
        if not what:
            raise GraphError("the masks are empty, so no unit is gone")
        before = {name: tuple(p.shape) for name, p in model.named_parameters()}
        shrunk = shrink(model, args, kwargs, lambda coupling: dead_units(model, coupling, what), exact=how.exact)
        shrunk, obstacle = with_config(model, before, (args, kwargs), shrunk)
        return shrunk, replace(report_of(shrunk, {}), config=obstacle)
    raise GraphError(f"expected a Method, a Target, a Plan or masks by name, got {type(what).__name__}")
