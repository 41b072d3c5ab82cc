"""The exact change of the loss when a weight or a unit is removed: one evaluation for each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from secateur.errors import MissingStatsError, check_choice
from secateur.forward import check_batches, undisturbed
from secateur.stats._common import (
    LOSS_AND_BATCHES,
    LossFn,
    call_loss,
    check_count,
    check_loss,
    counted,
    data_of,
    refuse_nothing,
)
from secateur.types import Source

Per = Literal["element", "unit"]


@dataclass(frozen=True)
class LossChange:
    r"""Mean loss with one weight set to zero, less the mean loss as it is.

    .. math:: \Delta_i = \bar L(w \text{ with } w_i = 0) - \bar L(w)

    One pass over all batches for every weight that is not zero already, so it costs as many evaluations as there are
    weights; ``limit`` stands between a slip and a week. With ``unit``, all weights of an output unit go together, with
    the unit's bias, and each of them carries the unit's change: the mean over the unit is the change itself.

    Args:
        per: ``"element"`` or ``"unit"``.
        limit: Candidates to try at most.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = net.weight.copy_(torch.tensor([[1.0, -2.0]]))
        >>> source = Source(net, dict(net.named_parameters()), lambda m, x: m(x).square().mean(),
        ...     lambda: [torch.ones(1, 2)])
        >>> LossChange().collect(source)["weight"].tolist()  # 4 - 1 and 1 - 1
        [[3.0, 0.0]]
    """

    per: Per = "element"
    limit: int = 10_000

    def __post_init__(self) -> None:
        check_choice("loss change: per", self.per, get_args(Per))
        check_count("loss change: limit", self.limit)

    @property
    def uses(self) -> frozenset[str]:
        """Loss and batches."""
        return LOSS_AND_BATCHES

    @property
    def elementwise(self) -> bool:
        """Single weights can be added up over units; whole units cannot."""
        return self.per == "element"

    @torch.no_grad()
    def collect(self, source: Source) -> dict[str, Tensor]:
        """Try every candidate.

        Raises:
            MissingStatsError: When there are more than ``limit``, a loss is not one finite number, or no removal
                changes it.
        """
        loss_fn, batches = data_of(self, source)
        candidates = sum(self._count(source.model, n, p) for n, p in source.parameters.items())
        if candidates > self.limit:
            raise MissingStatsError(
                f"{self} takes one pass over the batches for each of {candidates} candidates, and limit is "
                f"{self.limit}; raise limit, prune fewer layers, or use a score that estimates the change"
            )
        out = {}
        with undisturbed(source.model):
            given = batches()
            check_batches("what batches() returns", given, error=MissingStatsError)
            data = list(given)
            base = _mean(self, loss_fn, source.model, data)
            for name, parameter in source.parameters.items():
                changes = torch.zeros(parameter.shape, dtype=torch.float64, device="cpu")
                for where, pieces in self._candidates(source.model, name, parameter):
                    kept = [tensor[index].clone() for tensor, index in pieces]
                    try:
                        for tensor, index in pieces:
                            tensor[index] = 0
                        changes[where] = _mean(self, loss_fn, source.model, data) - base
                    finally:
                        for (tensor, index), value in zip(pieces, kept, strict=True):
                            tensor[index] = value
                out[name] = changes.to(parameter.device)
        refuse_nothing(self, out, "the loss depends on none of them")
        return out

    def _count(self, model: nn.Module, name: str, parameter: Tensor) -> int:
        if self.per == "element":
            return int(parameter.count_nonzero())
        return parameter.shape[_unit_dim(self, model, name)]

    def _candidates(
        self, model: nn.Module, name: str, parameter: Tensor
    ) -> Iterator[tuple[Any, list[tuple[Tensor, Any]]]]:
        """Yield where a change belongs, and what is set to zero for it."""
        data = parameter.data
        if self.per == "element":
            for index in map(tuple, data.nonzero().tolist()):
                yield index, [(data, index)]
            return
        dim = _unit_dim(self, model, name)
        bias = getattr(model.get_submodule(name.rpartition(".")[0]), "bias", None)
        for unit in range(data.shape[dim]):
            where = (*[slice(None)] * dim, unit)
            own = [(bias.data, (unit,))] if isinstance(bias, Tensor) and bias.shape == (data.shape[dim],) else []
            yield where, [(data, where), *own]


def _unit_dim(who: object, model: nn.Module, name: str) -> int:
    module = model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, _ConvTransposeNd) and module.groups > 1:
        raise MissingStatsError(
            f'{who}: units of the grouped transposed convolution {name} have no index of their own; use per = "element"'
        )
    return 1 if isinstance(module, _ConvTransposeNd) or type(module).__name__ == "Conv1D" else 0


def _mean(who: object, loss_fn: LossFn, model: nn.Module, batches: list[Any]) -> float:
    total, count = 0.0, 0
    for index, batch in counted(who, batches):
        loss = check_loss(call_loss(loss_fn, model, batch, index), batch, index)
        total, count = total + float(loss), count + 1
    return total / count
