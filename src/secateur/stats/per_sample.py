"""Gradients of single samples, of the loss or of every output: how samples are told apart, and when they cannot be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, jacrev, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from secateur.errors import MissingStatsError
from secateur.stats._common import LossFn, call_loss, counted, differentiable, loss_of, refuse_infinite, slack_of
from secateur.types import Source, Tensors

# Shapes: N samples, K outputs of a sample

Way = Literal["vmap", "loop"]
"""All at once by torch.func, or one after the other; the numbers are the same, to rounding."""

_NUMBERS = 2**23
"""Numbers that one yield holds at most, as far as single samples allow: 32 MB in float32."""


class Samples:
    """A batch taken apart into samples: the tensors whose first dimension counts them, and everything else.

    Args:
        who: The statistic, for the message.
        batch: Any nesting of lists, tuples and dicts.

    Raises:
        MissingStatsError: When the batch has no tensors, tensors of different first dimensions, or no sample.
    """

    def __init__(self, who: object, batch: Any) -> None:
        leaves, self._spec = tree_flatten(batch)
        self._leaves: list[Any] = leaves
        self.places = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor) and leaf.dim()]
        sizes = {self._leaves[i].shape[0] for i in self.places}
        if len(sizes) != 1 or 0 in sizes:
            found = f"tensors of {sorted(sizes)} rows" if sizes else f"no tensor in a {type(batch).__name__}"
            raise MissingStatsError(
                f"{who} takes batches apart into samples, by the first dimension of every tensor in them, and found "
                f"{found}; give lists, tuples or dicts of tensors with one first dimension"
            )
        self.count: int = sizes.pop()

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that hold samples."""
        return [self._leaves[i] for i in self.places]

    def batch(self, tensors: Iterable[Tensor]) -> Any:
        """Return a batch of other samples."""
        leaves = list(self._leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        return tree_unflatten(leaves, self._spec)

    def part(self, start: int, stop: int) -> Any:
        """Return a batch of some of the samples."""
        return self.batch([tensor[start:stop] for tensor in self.tensors])


def per_sample_gradients(
    who: object,
    source: Source,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    way: Way,
    outputs: bool = False,
    chunk: int | None = None,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Differentiate sample by sample, a handful of samples at a time.

    A sample is one index of the first dimension of every tensor in a batch; ``loss_fn`` gets it as a batch of one. The
    model runs in evaluation mode; modes and ``.grad`` are as before afterwards.

    Args:
        who: The statistic, for messages.
        source: Model and parameters.
        loss_fn: ``loss_fn(model, batch)``: one number, the mean over the batch.
        batches: The batches.
        way: ``"vmap"``: a handful together, by torch.func; ``"loop"``: one after the other, for any model.
        outputs: Differentiate every output instead: ``loss_fn`` then returns the outputs, one row per sample.
        chunk: Samples at once; by default as many as 32 MB of gradients hold.

    Yields:
        How many samples, and by name their gradients, N first; with ``outputs`` N K rows, one for every output of
        every sample.

    Raises:
        MissingStatsError: When there are no batches; the loss is not one number, not finite or without a gradient; a
            gradient is not finite; a batch's tensors have different first dimensions; samples depend on one another (a
            batch norm that keeps no running statistics, a loss that compares samples), so that there is no gradient of
            one sample; or ``"vmap"`` cannot run the model.
    """
    with differentiable(who, source.model, source.parameters):
        for index, batch in counted(who, batches):
            samples = Samples(who, batch)
            whole = _outputs(loss_fn, source.model, batch, index, samples.count) if outputs else None
            loss = None if outputs else loss_of(loss_fn, source.model, batch, index).detach()
            if index == 0:
                check_apart(who, loss_fn, source.model, samples, outputs=outputs)
            width = 1 if whole is None else max(1, whole.numel() // samples.count)
            step = chunk or max(1, _NUMBERS // (width * sum(p.numel() for p in source.parameters.values())))
            seen = []
            found = (_together if way == "vmap" else _one_by_one)(who, source, loss_fn, samples, step, outputs)
            for values, gradients in found:
                for name, gradient in gradients.items():
                    refuse_infinite(f"{who}: the gradient of {name}", gradient)
                seen.append(values)
                yield len(values) // width, gradients
            single = torch.cat(seen)
            if whole is not None:
                _refuse_coupled(who, samples.count, whole, single.view_as(whole))
            elif loss is not None:
                _refuse_coupled(who, samples.count, loss, single.mean())


Found = Iterator[tuple[Tensor, dict[str, Tensor]]]


def _together(who: object, source: Source, loss_fn: LossFn, samples: Samples, chunk: int, outputs: bool) -> Found:
    def build(run: Run) -> Callable[..., Any]:
        def one(parameters: Tensors, *tensors: Tensor) -> Any:
            out = run(loss_fn, parameters, *tensors)
            return (out.flatten(), out.flatten()) if outputs else out.reshape(())

        differentiate: Callable[..., Any] = jacrev(one, has_aux=True) if outputs else grad_and_value(one)
        return differentiate

    for gradients, values in over_samples(who, source, samples, chunk, build):
        yield values.flatten(), {n: g.flatten(0, 1) if outputs else g for n, g in gradients.items()}


def _one_by_one(who: object, source: Source, loss_fn: LossFn, samples: Samples, chunk: int, outputs: bool) -> Found:
    parameters = list(source.parameters.values())
    for start in range(0, samples.count, chunk):
        values: list[Tensor] = []
        rows: list[tuple[Tensor, ...]] = []
        for i in range(start, min(start + chunk, samples.count)):
            flat = _alone(who, loss_fn, source.model, samples, i, i + 1).flatten()
            for k, value in enumerate(flat):
                more = k + 1 < len(flat)
                found = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=more)
                rows.append(
                    tuple(torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True))
                )
            values.append(flat.detach())
        yield (
            torch.cat(values),
            {n: torch.stack(r) for n, r in zip(source.parameters, zip(*rows, strict=True), strict=True)},
        )


def _outputs(loss_fn: LossFn, model: nn.Module, batch: Any, index: int, samples: int) -> Tensor:
    found = call_loss(loss_fn, model, batch, index)
    if not isinstance(found, Tensor) or not found.dim() or found.shape[0] != samples:
        got = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise MissingStatsError(
            f"gradients of the outputs are wanted, so loss_fn must return the outputs, one row for each of the "
            f"{samples} samples; got {got} on batch {index}"
        )
    if not bool(torch.isfinite(found).all()):
        raise MissingStatsError(f"the outputs on batch {index} are not finite")
    if not found.requires_grad:
        raise MissingStatsError("the outputs have no gradient: they were computed without grad")
    return found.detach()


# -- samples that are no samples


def check_apart(who: object, loss_fn: LossFn, model: nn.Module, samples: Samples, *, outputs: bool = False) -> None:
    """Refuse a loss that is no mean over samples: a sample's own gradient would not be its share of the batch's.

    The loss (or the outputs) of the batch is compared with those of its first sample, of both halves and of all but
    the first.

    Args:
        who: The statistic, for the message.
        loss_fn: The loss, or what returns outputs.
        model: The model, in evaluation mode.
        samples: A batch.
        outputs: Whether ``loss_fn`` returns outputs.

    Raises:
        MissingStatsError: When they do not add up, or parts of the batch cannot be run.
    """
    n = samples.count
    if n < 2:
        return
    with torch.no_grad():
        whole = loss_fn(model, samples.part(0, n))
        for cut in sorted({1, n // 2}):
            first, rest = (_alone(who, loss_fn, model, samples, *span) for span in ((0, cut), (cut, n)))
            parts = torch.cat([first, rest]) if outputs else (cut * first + (n - cut) * rest) / n
            _refuse_coupled(who, n, whole, parts)


def _alone(who: object, loss_fn: LossFn, model: nn.Module, samples: Samples, start: int, stop: int) -> Tensor:
    try:
        return loss_fn(model, samples.part(start, stop))
    except (RuntimeError, ValueError, IndexError) as error:
        raise MissingStatsError(
            f"{who} needs the gradient of each sample alone. A batch of {samples.count} can be run, {stop - start} of "
            f"its samples cannot: {error}. The model or the loss couples the samples of a batch"
        ) from error


def _refuse_coupled(who: object, count: int, whole: Tensor, parts: Tensor) -> None:
    size = float(torch.maximum(whole.abs().max(), parts.abs().max()))
    apart = float((whole.double() - parts.double()).abs().max())
    if apart <= slack_of(whole.dtype) * size + 1e-30:
        return
    if whole.numel() > 1:
        raise MissingStatsError(
            f"{who} needs the gradient of each sample alone, and the outputs of a batch of {count} are not those of "
            f"its samples (they differ by {apart:.1g}): the model couples the samples of a batch"
        )
    raise MissingStatsError(
        f"{who} needs the gradient of each sample alone, and the loss of a batch of {count} ({float(whole):.6g}) is "
        f"not the mean over its samples ({float(parts):.6g}): it is a sum or weighted, or the model or the loss "
        "couples the samples of a batch. Return the mean over samples"
    )


# -- vectorised


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
    who: object,
    source: Source,
    samples: Samples,
    chunk: int,
    build: Callable[[Run], Callable[..., Any]],
    *,
    way_out: str = 'per_sample = "loop" goes sample by sample',
) -> Iterator[Any]:
    """Vectorise a function of parameters and one sample over the samples of a batch.

    Args:
        who: The statistic, for messages.
        source: Model and parameters.
        samples: The batch.
        chunk: Samples at once.
        build: Makes the function from a way to run things with other parameters.
        way_out: What to do where that fails, for the message.

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
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
            # The whole batch has run, so it is the vectorising that fails: torch has many words for it.
            first = str(error).strip().split("\n")[0]
            raise MissingStatsError(
                f"{who}: torch.func cannot vectorise this model and loss over samples ({first:.200}). Control flow on "
                "data, random draws, counters in buffers, get_parameter and some recurrent kernels forbid it; "
                f"{way_out}"
            ) from error
        yield values
