"""What layers get as input, and what the loss would lose of it: streamed over batches, channel by channel."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from secateur.errors import MissingStatsError
from secateur.forward import attention_fast_path, undisturbed
from secateur.stats._common import differentiable

# Shapes: N samples, C channels of a layer's input, * positions

INPUT_STATISTICS = frozenset(
    {
        "input_mean",
        "input_absolute",
        "input_square",
        "input_variance",
        "input_nonzero",
        "input_lowest",
        "input_highest",
    }
)
"""What :func:`collect_inputs` can return."""

Run = Callable[[nn.Module, Any, int], Any]
"""``run(model, batch, number of the batch)``: one forward."""


def collect_inputs(
    model: nn.Module, layers: Collection[str], run: Run, batches: Iterable[Any], *, needs: Collection[str]
) -> dict[str, dict[str, Tensor]]:
    r"""Describe what reaches each channel of some layers' inputs, over all samples and positions.

    With :math:`x_c` the values of channel :math:`c`:

    .. math::
        \texttt{input\_mean} = \mathrm{E}[x_c], \quad \texttt{input\_absolute} = \mathrm{E}|x_c|, \quad
        \texttt{input\_square} = \mathrm{E}[x_c^2], \\ \texttt{input\_variance} = \mathrm{Var}[x_c], \quad
        \texttt{input\_nonzero} = \mathrm{P}(x_c \ne 0)

    and the extremes ``input_lowest`` and ``input_highest``. The model runs in evaluation mode and without gradients;
    sums are merged in float64. A layer that is called several times counts every call.

    Args:
        model: The model.
        layers: Names of linear layers and convolutions.
        run: Runs the model on one batch.
        batches: The batches.
        needs: Which of the statistics to return.

    Returns:
        One number per channel, by statistic and layer; layers that no batch reached are absent.

    Raises:
        MissingStatsError: When there are no batches, or a layer gets what is not finite.
    """
    moments = {name: Moments(name, needs) for name in layers}
    count = 0

    def add(name: str, x: Tensor) -> None:
        moments[name].add(channels_first(model.get_submodule(name), x))

    with undisturbed(model), attention_fast_path(enabled=False), torch.no_grad(), watched(model, layers, add):
        for batch in batches:
            run(model, batch, count)
            count += 1
    if not count:
        raise MissingStatsError("the score needs to see activations, but there were no batches to run")
    return {need: {name: m.get(need) for name, m in moments.items() if m.count} for need in needs}


class Moments:
    """Streaming statistics of a layer's input channels.

    Args:
        name: What to call the layer in messages.
        needs: Which of :data:`INPUT_STATISTICS` are wanted.
    """

    def __init__(self, name: str, needs: Collection[str]) -> None:
        self.count = 0
        self._name = name
        self._needs = frozenset(needs)
        self._sums: dict[str, Tensor] = {}

    def add(self, x_CR: Tensor) -> None:
        """Add values, (channels, anything).

        Raises:
            MissingStatsError: When one is not finite.
        """
        x = x_CR if x_CR.dtype.itemsize >= 4 else x_CR.float()
        n, m, old = x.shape[1], self.count, self._sums
        if n == 0:
            return
        mean = x.mean(1)
        if not bool(torch.isfinite(mean).all()):
            raise MissingStatsError(
                f"{self._name} gets inputs that are NaN or infinite, which rank nothing; look at the batches and the "
                "weights"
            )
        new = {"input_mean": mean.cpu().double()}
        apart = new["input_mean"] - old.get("input_mean", torch.zeros(()))
        for need, total in _SUMS.items():
            if need in self._needs:
                new[need] = total(x, mean).cpu().double() + old.get(need, torch.zeros(()))
        if m and "input_variance" in new:  # Chan's update: no large numbers cancel
            new["input_variance"] += apart.square() * (m * n / (m + n))
        for need, pick in _EXTREMES.items():
            if need in self._needs:
                found = (x.amin(1) if pick is torch.minimum else x.amax(1)).cpu().double()
                new[need] = pick(old[need], found) if m else found
        if m:
            new["input_mean"] = old["input_mean"] + apart * (n / (m + n))
        self._sums, self.count = new, m + n

    def get(self, need: str) -> Tensor:
        """Return one of :data:`INPUT_STATISTICS`, one number per channel, float64."""
        return self._sums[need] / self.count if need in _SUMS else self._sums[need]


_SUMS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "input_absolute": lambda x, mean: x.abs().sum(1),
    "input_square": lambda x, mean: x.square().sum(1),
    "input_variance": lambda x, mean: (x - mean[:, None]).square().sum(1),
    "input_nonzero": lambda x, mean: x.count_nonzero(1),
}
_EXTREMES = {"input_lowest": torch.minimum, "input_highest": torch.maximum}


def collect_products(
    model: nn.Module,
    layers: Collection[str],
    scalar: Run,
    batches: Iterable[Any],
    *,
    means: Mapping[str, Tensor] | None = None,
) -> Iterator[tuple[int, dict[str, Tensor | str]]]:
    r"""Multiply what reaches some layers by the gradient of a scalar, sample by sample.

    For sample :math:`n` and input channel :math:`c` of a layer, over its positions :math:`t` and calls:

    .. math:: p_{n,c} = \sum_t \frac{\partial L}{\partial x_{n,c,t}} (x_{n,c,t} - \bar x_c)

    The derivative is that by the layer's own input: what the same tensor does elsewhere is not in it. Added up over all
    layers that read a unit it is the derivative by a gate on the unit. :math:`\bar x` is zero without ``means``.

    Samples are told apart by the first dimension. Where a layer's input has another first dimension than the batch
    (windows, tokens of all samples in one list), that needs batches of one sample.

    Args:
        model: The model.
        layers: Names of linear layers and convolutions.
        scalar: Runs the model on one batch and returns what is differentiated.
        batches: The batches.
        means: Values of no effect, one per channel, by layer.

    Yields:
        For each batch, how many samples it has, and by layer (samples, channels), or why samples cannot be told apart
        there. Layers that the batch did not reach are absent.

    Raises:
        MissingStatsError: When there are no batches, one has no samples, or the forward changes a layer's input in
            place after the layer has read it.
    """
    count = 0
    with differentiable("the score", model, {}):
        for batch in batches:
            samples = batch_size(batch)
            if not samples:
                raise MissingStatsError(f"batch {count} has no samples, of which nothing can be said; leave it out")
            calls: list[tuple[str, Tensor, int]] = []

            def keep(name: str, x: Tensor, calls: list[tuple[str, Tensor, int]] = calls) -> Tensor:
                # A tensor of its own, so that its gradient is what comes back through this layer alone.
                own = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
                calls.append((name, own, own._version))
                return own

            with watched(model, layers, keep):
                loss = scalar(model, batch, count)
            # A batch may reach none of the layers: of a branch that it does not take.
            found = torch.autograd.grad(loss, [x for _, x, _ in calls], allow_unused=True) if calls else ()
            yield samples, _by_layer(model, calls, found, means, samples)
            count += 1
    if not count:
        raise MissingStatsError("the score needs gradients, but there were no batches to compute them from")


def _by_layer(
    model: nn.Module,
    calls: Sequence[tuple[str, Tensor, int]],
    gradients: Sequence[Tensor | None],
    means: Mapping[str, Tensor] | None,
    samples: int,
) -> dict[str, Tensor | str]:
    out: dict[str, Tensor | str] = {}
    for (name, x, version), gradient in zip(calls, gradients, strict=True):
        if x._version != version:
            raise MissingStatsError(
                f"the forward changes the input of {name} in place after the layer has read it; write it out of place, "
                "or use a score that needs no activations"
            )
        mean = None if means is None else means[name]
        gradient = torch.zeros_like(x) if gradient is None else gradient
        product = _per_sample(name, model.get_submodule(name), x.detach(), gradient, mean, samples)
        before = out.get(name)
        if isinstance(product, Tensor) and isinstance(before, Tensor):
            product = before + product
        out[name] = before if isinstance(before, str) else product
    return out


def _per_sample(
    name: str, layer: nn.Module, x: Tensor, gradient: Tensor, mean: Tensor | None, samples: int
) -> Tensor | str:
    one = samples == 1
    if not one and (x.dim() <= _least_dims(layer) or x.shape[0] != samples):
        return (
            f"{name} gets a tensor of shape {tuple(x.shape)} for a batch of {samples}, so samples cannot be told "
            "apart; give batches of one sample"
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    x, gradient = channels_last(layer, x).to(wide), channels_last(layer, gradient).to(wide)
    if mean is not None:
        x = x - mean.to(x)
    product = x * gradient
    product = product.flatten(0, -2).sum(0, keepdim=True) if one else product.flatten(1, -2).sum(1)
    return product.cpu().double()


def _least_dims(layer: nn.Module) -> int:
    """Return the dimensions of one sample without positions: an input with no more has no batch dimension."""
    return len(layer.kernel_size) + 1 if isinstance(layer, _ConvNd) else 1


def channels_last(layer: nn.Module, x: Tensor) -> Tensor:
    """Move the channels of a layer's input to the end; at least two dimensions, and a position where there was none."""
    if isinstance(layer, _ConvNd):
        x = x if x.dim() > _least_dims(layer) else x[None]
        return x.movedim(1, -1)
    return x[:, None] if x.dim() == 2 else x[None, None] if x.dim() == 1 else x


def channels_first(layer: nn.Module, x: Tensor) -> Tensor:
    """Lay a layer's input out as (channels, samples and positions)."""
    return channels_last(layer, x).movedim(-1, 0).flatten(1)


def batch_size(batch: Any) -> int:
    """Return the first dimension of the first tensor in a batch; 1 where there is none."""
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf.shape[0]
    return 1


@contextmanager
def watched(model: nn.Module, layers: Collection[str], act: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """Act on the input of some layers whenever they are called.

    Args:
        model: The model.
        layers: Names of layers.
        act: Called with name and input; what it returns, if anything, takes the input's place.
    """

    def hook_of(name: str) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            # Linear layers and convolutions take one tensor, by position or by name.
            if args:
                other = act(name, args[0])
                return None if other is None else ((other, *args[1:]), kwargs)
            key, x = next(iter(kwargs.items()))
            other = act(name, x)
            return None if other is None else (args, {**kwargs, key: other})

        return hook

    handles = [model.get_submodule(n).register_forward_pre_hook(hook_of(n), with_kwargs=True) for n in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
