"""Diagonal of the empirical Fisher matrix: squared gradients of single samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from secateur.errors import MissingStatsError, TargetError, check_choice
from secateur.stats._common import (
    LOSS_AND_BATCHES,
    Samples,
    check_mean,
    counted,
    data_of,
    differentiable,
    refuse_nothing,
    zeros_like,
)
from secateur.stats.fisher_layers import add_squares
from secateur.stats.gradients import LossFn, loss_of
from secateur.types import Source, Tensors

PerSample = Literal["layers", "vmap", "loop"]


@dataclass(frozen=True)
class FisherDiagonal:
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
        >>> net = nn.Linear(1, 1, bias=False)
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

    @property
    def uses(self) -> frozenset[str]:
        """Loss and batches."""
        return LOSS_AND_BATCHES

    @property
    def elementwise(self) -> bool:
        """Each weight has a number of its own."""
        return True

    def collect(self, source: Source) -> dict[str, Tensor]:
        """Average over all samples.

        Raises:
            MissingStatsError: When samples have no gradients of their own, or all are zero.
        """
        loss_fn, batches = data_of(self, source)
        sums, total = zeros_like(source.parameters), 0
        add = {"layers": self._layers, "vmap": self._vmap, "loop": self._loop}[self.per_sample]
        with differentiable(self, source.model, source.parameters):
            for index, batch in counted(self, batches()):
                samples = Samples(self, batch)
                if index == 0:
                    loss_of(loss_fn, source.model, batch, index)
                    check_mean(self, loss_fn, source.model, samples)
                add(sums, source, loss_fn, samples, index)
                total += samples.count
        out = {name: value.div_(max(total, 1)) for name, value in sums.items()}
        refuse_nothing(self, out, "the loss has no gradient by any of them, at a minimum or behind saturated units")
        return out

    def _layers(self, sums: dict[str, Tensor], source: Source, loss_fn: LossFn, samples: Samples, index: int) -> None:
        add_squares(
            self,
            sums,
            source,
            lambda: loss_of(loss_fn, source.model, samples.part(0, samples.count), index),
            samples.count,
            chunk=self.chunk,
            check=index == 0,
        )

    def _vmap(self, sums: dict[str, Tensor], source: Source, loss_fn: LossFn, samples: Samples, index: int) -> None:
        for values in over_samples(
            self, source, samples, self.chunk, lambda run: grad(lambda p, *x: run(loss_fn, p, *x))
        ):
            for name, gradients in values.items():
                sums[name] += gradients.to(sums[name].dtype).square().sum(0)

    def _loop(self, sums: dict[str, Tensor], source: Source, loss_fn: LossFn, samples: Samples, index: int) -> None:
        for i in range(samples.count):
            loss = loss_of(loss_fn, source.model, samples.part(i, i + 1), index)
            found = torch.autograd.grad(loss, list(source.parameters.values()), allow_unused=True)
            for name, gradient in zip(source.parameters, found, strict=True):
                if gradient is not None:
                    sums[name] += gradient.to(sums[name].dtype).square()


def check_count(what: str, value: int) -> None:
    """Refuse anything but a whole number of at least one.

    Raises:
        TargetError: Names the option.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise TargetError(f"{what} must be a whole number of at least 1, got {value!r}")


class _Called(nn.Module):
    """Runs a function of a model with the model's tensors replaced by others."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[nn.Module, Any], Any], batch: Any) -> Any:
        return function(self.model, batch)


Run = Callable[..., Any]
"""``run(function, parameters, *tensors of one sample)``: ``function(model, batch of one)`` with other parameters."""


def over_samples(
    who: object, source: Source, samples: Samples, chunk: int, build: Callable[[Run], Callable[..., Any]]
) -> Iterator[Any]:
    """Vectorise a function of parameters and one sample over the samples of a batch.

    Args:
        who: The statistic, for messages.
        source: Model and parameters.
        samples: The batch.
        chunk: Samples at once.
        build: Makes the function from a way to run things with other parameters.

    Yields:
        What it returns, stacked, for every chunk.

    Raises:
        MissingStatsError: When the model or the loss cannot be vectorised.
    """
    called = _Called(source.model)

    def run(function: Callable[[nn.Module, Any], Any], parameters: Tensors, *tensors: Tensor) -> Any:
        batch = samples.batch([tensor.unsqueeze(0) for tensor in tensors])
        return functional_call(called, {f"model.{n}": p for n, p in parameters.items()}, (function, batch))

    parameters: Mapping[str, Tensor] = {n: p.detach() for n, p in source.parameters.items()}
    each = vmap(build(run), in_dims=(None, *[0] * len(samples.places)))
    for start in range(0, samples.count, chunk):
        try:
            with torch.no_grad():  # torch.func differentiates all the same; no graph to the other parameters is kept
                values = each(parameters, *[t[start : start + chunk] for t in samples.tensors])
        except (RuntimeError, ValueError, NotImplementedError) as error:
            first = str(error).strip().split("\n")[0]
            raise MissingStatsError(
                f"{who}: torch.func cannot vectorise this model and loss over samples ({first}). Control flow on data, "
                'random draws and some recurrent kernels forbid it; per_sample = "loop" goes sample by sample'
            ) from error
        yield values
