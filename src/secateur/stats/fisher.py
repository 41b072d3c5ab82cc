"""Diagonal of the empirical Fisher matrix: squared gradients of single samples."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from torch import Tensor

from secateur.errors import check_choice
from secateur.stats._common import (
    Add,
    LossFn,
    OfWeights,
    averaged,
    check_count,
    data_of,
    loss_of,
    refuse_nothing,
    zeros_like,
)
from secateur.stats.fisher_layers import add_squares
from secateur.stats.per_sample import Samples, Way, check_apart, per_sample_gradients
from secateur.types import Source

PerSample = Literal["layers", "vmap", "loop"]


@dataclass(frozen=True)
class FisherDiagonal(OfWeights):
    r"""Mean over samples of the squared gradient of each sample's own loss.

    .. math:: \hat F_{ii} = \tfrac1N \sum_n g_{n,i}^2

    with :math:`g_n` the gradient of the loss of sample :math:`n` alone. The square of a batch's mean gradient is
    another quantity, smaller by about the batch size: gradients of samples cancel in the mean. All three ways compute
    the same numbers, to rounding:

    * ``layers``: one backward pass per batch; :math:`g_n` is put together from what each layer gets and the gradient
      of what it returns, and for a linear layer on vectors never formed: :math:`\sum_n g_n^2 = (\delta^2)^\top x^2`.
      Checked against the gradient of the first batch, and refused where a parameter is used outside its module.
    * ``vmap``: torch.func differentiates each sample, vectorised, for any model without control flow on data.
    * ``loop``: sample by sample, for everything else.

    The model runs in evaluation mode: batch norm in training mode couples samples, which then have no gradient of their
    own. A loss that is not the mean over a batch's samples is refused, as far as the first batch shows it.

    Args:
        per_sample: ``"layers"``, ``"vmap"`` or ``"loop"``.
        chunk: Samples at once where gradients of single samples are held: memory for ``chunk`` times the parameters
            (``"vmap"``), or times the largest layer (``"layers"``).

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> source = Source(net, dict(net.named_parameters()), lambda m, x: m(x).mean(),
        ...     lambda: [torch.tensor([[1.0], [3.0]])])
        >>> FisherDiagonal().collect(source)["weight"].tolist()  # (1 + 9) / 2, not 2 squared
        [[5.0]]
    """

    per_sample: PerSample = "layers"
    chunk: int = 32

    def __post_init__(self) -> None:
        check_choice("fisher: per_sample", self.per_sample, get_args(PerSample))
        check_count("fisher: chunk", self.chunk)

    def collect(self, source: Source) -> dict[str, Tensor]:
        """Average over all samples.

        Raises:
            MissingStatsError: When samples have no gradients of their own, or all are zero.
        """
        out = averaged(self, source, self._layers(source)) if self.per_sample == "layers" else self._each(source)
        refuse_nothing(self, out, "the loss has no gradient by any of them, at a minimum or behind saturated units")
        return out

    def _layers(self, source: Source) -> Add:
        def add(sums: dict[str, Tensor], loss_fn: LossFn, batch: Any, index: int) -> int:
            samples, first = Samples(self, batch), index == 0
            if first:
                loss_of(loss_fn, source.model, batch, index)
                check_apart(self, loss_fn, source.model, samples)
            loss = partial(loss_of, loss_fn, source.model, batch, index)
            add_squares(self, sums, source, loss, samples.count, chunk=self.chunk, check=first)
            return samples.count

        return add

    def _each(self, source: Source) -> dict[str, Tensor]:
        loss_fn, batches = data_of(self, source)
        sums, total = zeros_like(source.parameters), 0
        way: Way = "loop" if self.per_sample == "loop" else "vmap"
        for count, gradients in per_sample_gradients(self, source, loss_fn, batches(), way=way, chunk=self.chunk):
            total += count
            for name, gradient in gradients.items():
                sums[name] += gradient.to(sums[name].dtype).square().sum(0)
        return {name: value.div_(total) for name, value in sums.items()}
