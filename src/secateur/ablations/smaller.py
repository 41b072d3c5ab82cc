"""A smaller dense network of the same size: what pruning has to beat."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from secateur.ablations.weights import reinitialise_
from secateur.errors import TargetError, check_choice, check_whole
from secateur.types import Tensors

By = Literal["parameters", "macs"]


@dataclass(frozen=True)
class SmallerDense:
    r"""Train a dense network of the same size from scratch, for as many epochs as the whole run took.

    .. math:: |W'| \le \|M \odot W\|_0 \quad \text{or} \quad \mathrm{MACs}(W') \le \mathrm{MACs}(M \odot W)

    The run itself is left alone: the smaller network is trained after it, in a directory of its own, and its figures
    stand beside the pruned network's. Where channels were pruned it is the cut-down network with new weights; where
    single weights were, the dense network with all its layers narrowed by the same factor. It gets the epochs of
    training and of all retraining together, on the training's learning-rate schedule stretched over them. Pruning that
    does not beat it has found an architecture at best.

    Args:
        by: What is equal: the ``"parameters"`` or the ``"macs"``.
        seed: Seed of the new weights.
        align: Widths stay multiples of it.

    References:
        Zhuang Liu, Mingjie Sun, Tinghui Zhou, Gao Huang, Trevor Darrell, Rethinking the Value of Network Pruning, 2019;
        Michael Zhu, Suyog Gupta, To prune, or not to prune: exploring the efficacy of pruning for model compression,
        2017 (large sparse against small dense).
    """

    by: By = "parameters"
    seed: int = 0
    align: int = 1

    def __post_init__(self) -> None:
        check_choice("smaller_dense: by", self.by, get_args(By))
        check_whole("smaller_dense: seed", self.seed, least=0)
        check_whole("smaller_dense: align", self.align, error=TargetError)

    def build(self, model: nn.Module, masks: Tensors, example_inputs: Any) -> nn.Module:
        """Return the smaller network; see :func:`smaller_dense`."""
        return smaller_dense(model, masks, example_inputs, by=self.by, seed=self.seed, align=self.align)


def smaller_dense(
    model: nn.Module, masks: Tensors, example_inputs: Any, *, by: By = "parameters", seed: int = 0, align: int = 1
) -> nn.Module:
    """Return an untrained dense network of the size that a masked one has, narrowed by the same factor everywhere.

    Args:
        model: The masked network, left as it is.
        masks: Its masks; none for a network that was cut down already, which only gets new weights.
        example_inputs: As for :func:`secateur.shrink_`.
        by: Whether ``"parameters"`` or ``"macs"`` are not to be exceeded.
        seed: Seed of the new weights.
        align: Widths stay multiples of it.

    Returns:
        A new network, at most one step of a width below that size.

    Raises:
        TargetError: When even the narrowest network is larger.
        GraphError: When the network cannot be narrowed.
        WeightError: When a module cannot be initialised anew, or a mask does not belong to the model.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
        >>> masks = {"0.weight": torch.rand(32, 8) < 0.25, "2.weight": torch.rand(2, 32) < 0.25}
        >>> left = sum(p.numel() for p in model.parameters()) - sum(int((~m).sum()) for m in masks.values())
        >>> narrow = smaller_dense(model, masks, torch.randn(4, 8))
        >>> 0 <= left - sum(p.numel() for p in narrow.parameters()) < 8 + 1 + 2
        True
    """
    from secateur.allocate import Layerwise
    from secateur.masks import check_masks
    from secateur.method import Method
    from secateur.patterns import Channel
    from secateur.scores import Random
    from secateur.structure import shrink_

    check_choice("smaller_dense: by", by, get_args(By))
    check_whole("smaller_dense: seed", seed, least=0)
    check_masks(model, masks)
    small = copy.deepcopy(model)
    for parameter in small.parameters():
        parameter.grad = None
    reinitialise_(small, seed=seed)
    if any(not bool(mask.all()) for mask in masks.values()):
        # Narrowed with new weights: a network that is mostly zeros may answer too little to prove anything.
        method = Method(
            target=_target(model, masks, example_inputs, by),
            score=Random(seed),
            pattern=Channel(),
            allocate=Layerwise(),
        )
        shrink_(small, method, example_inputs, align=align)
        reinitialise_(small, seed=seed)
    return small


def _target(model: nn.Module, masks: Tensors, example_inputs: Any, by: By) -> Any:
    from secateur.inputs import split_inputs
    from secateur.metrics import count_macs
    from secateur.targets import Target

    if by == "parameters":
        left = sum(p.numel() for p in model.parameters()) - sum(int((~mask).sum()) for mask in masks.values())
        return Target("kept_parameters", left)
    count = count_macs(model, *split_inputs(example_inputs), masks=masks)
    return Target("macs", count.density_weighted / count.dense)
