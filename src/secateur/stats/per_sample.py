"""Gradients sample by sample: of the loss, or of every output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, jacrev, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from secateur.errors import MissingStatsError
from secateur.forward import attention_fast_path, evaluation_mode_of
from secateur.stats.gradients import LossFn, loss_of

# Shapes: N samples, K outputs of a sample

_NUMBERS = 2**23
"""Numbers that one yield holds at most, as far as single samples allow: 32 MB in float32."""


def per_sample_gradients(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    outputs: bool = False,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Differentiate sample by sample, a handful of samples at a time.

    A sample is one index of the first dimension of every tensor in a batch; ``loss_fn`` gets it as a batch of one. The
    samples of a handful run together (``torch.func.vmap``); where the forward or the loss cannot run so (Python
    decisions on values, recurrent layers), one after the other, with the same result. Modes and ``.grad`` are as before
    afterwards.

    Args:
        model: Runs in evaluation mode.
        parameters: What to differentiate by, by name.
        loss_fn: ``loss_fn(model, batch)``: one number, the mean or the sum over the batch.
        batches: The batches.
        outputs: Differentiate every output instead: ``loss_fn`` then returns the outputs, one row per sample.

    Yields:
        How many samples, and by name their gradients, N first; with ``outputs`` N K rows, one for every output of
        every sample.

    Raises:
        MissingStatsError: When there are no batches; the loss is not one number, not finite or without a gradient; a
            batch's tensors have different first dimensions; or samples depend on one another (a batch norm that keeps
            no running statistics, a loss that compares samples), so that there is no gradient of one sample.
    """
    count, together = 0, True
    unfrozen = [p for p in parameters.values() if not p.requires_grad]
    try:
        for p in unfrozen:
            p.requires_grad_(True)
        with evaluation_mode_of(model), attention_fast_path(enabled=False), torch.enable_grad():
            for batch in batches:
                samples = _Samples(batch, count)
                whole = _whole(model, loss_fn, batch, count, samples.count, outputs=outputs)
                width = 1 if not outputs else max(1, whole.numel() // samples.count)
                step = max(1, _NUMBERS // (width * sum(p.numel() for p in parameters.values())))
                seen = []
                for low in range(0, samples.count, step):
                    part = range(low, min(low + step, samples.count))
                    found = None
                    if together:
                        found = _together(model, parameters, loss_fn, samples, part, outputs=outputs)
                        together = found is not None
                    values, gradients = found or _one_by_one(model, parameters, loss_fn, samples, part, outputs=outputs)
                    seen.append(values)
                    yield len(part), gradients
                _check_apart(whole, torch.cat(seen), count, outputs=outputs)
                count += 1
    finally:
        for p in unfrozen:
            p.requires_grad_(False)
    if not count:
        raise MissingStatsError("gradients of single samples are needed, but there were no batches to take them from")


class _Samples:
    """A batch, and its samples as batches of one."""

    def __init__(self, batch: Any, index: int) -> None:
        self.leaves, self.spec = tree_flatten(batch)
        sizes = {leaf.shape[0] for leaf in self.leaves if isinstance(leaf, Tensor) and leaf.dim()}
        if len(sizes) != 1 or 0 in sizes:
            raise MissingStatsError(
                f"samples cannot be told apart in batch {index}: the first dimensions of its tensors are "
                f"{sorted(sizes) or 'missing'}, expected one number of samples for all"
            )
        self.count = sizes.pop()
        self.index = index
        self.varying = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor) and leaf.dim()]

    def rebuilt(self, tensors: Iterable[Tensor]) -> Any:
        """Return the batch with other tensors in the places of its own."""
        leaves = list(self.leaves)
        for i, tensor in zip(self.varying, tensors, strict=True):
            leaves[i] = tensor
        return tree_unflatten(leaves, self.spec)

    def of(self, part: range) -> list[Tensor]:
        """Return the tensors of some samples."""
        return [self.leaves[i][part.start : part.stop] for i in self.varying]


class _Call(nn.Module):
    """The loss as a module, so that other tensors can stand for its parameters."""

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, batch: Any) -> Any:
        return self.loss_fn(self.model, batch)


def _whole(model: nn.Module, loss_fn: LossFn, batch: Any, index: int, samples: int, *, outputs: bool) -> Tensor:
    """Return the loss or the outputs of a whole batch."""
    if not outputs:
        return loss_of(loss_fn, model, batch, index).detach()
    found = loss_fn(model, batch)
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


Found = tuple[Tensor, dict[str, Tensor]]


def _together(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    loss_fn: LossFn,
    samples: _Samples,
    part: range,
    *,
    outputs: bool,
) -> Found | None:
    """Return values and gradients of some samples at once, or nothing where the forward cannot run so."""
    call = _Call(model, loss_fn)
    detached = {f"model.{name}": p.detach() for name, p in parameters.items()}

    def run(values: dict[str, Tensor], *sample: Tensor) -> Any:
        out = functional_call(call, values, (samples.rebuilt(t[None] for t in sample),))
        return (out.flatten(), out.flatten()) if outputs else out.reshape(())

    differentiate: Callable[..., Any] = jacrev(run, has_aux=True) if outputs else grad_and_value(run)
    tensors = samples.of(part)
    try:
        gradients, values = vmap(differentiate, in_dims=(None, *[0] * len(tensors)))(detached, *tensors)
    except Exception:  # noqa: BLE001  # anything may not run so; running sample by sample then says what is truly wrong
        return None
    named = {name: gradients[f"model.{name}"].detach() for name in parameters}
    return values.detach().flatten(), {n: g.flatten(0, 1) for n, g in named.items()} if outputs else named


def _one_by_one(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    loss_fn: LossFn,
    samples: _Samples,
    part: range,
    *,
    outputs: bool,
) -> Found:
    values: list[Tensor] = []
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for i in part:
        with _said(samples.index):
            out = loss_fn(model, samples.rebuilt(samples.of(range(i, i + 1))))
        flat = out.flatten() if outputs else out.reshape(1)
        for k, value in enumerate(flat):
            more = k + 1 < len(flat)
            found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True, retain_graph=more)
            for (name, p), gradient in zip(parameters.items(), found, strict=True):
                rows[name].append(torch.zeros_like(p) if gradient is None else gradient)
        values.append(flat.detach())
    return torch.cat(values), {name: torch.stack(tensors) for name, tensors in rows.items()}


@contextmanager
def _said(index: int) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, IndexError) as error:
        raise MissingStatsError(
            f"the loss of batch {index} can be computed, that of one of its samples cannot: {error}. A layer that "
            "couples the samples of a batch has no gradient of one sample"
        ) from error


def _check_apart(whole: Tensor, single: Tensor, index: int, *, outputs: bool) -> None:
    """Refuse a batch whose value is not made of those of its samples."""
    if not bool(torch.isfinite(single).all()):
        raise MissingStatsError(f"the loss of a single sample of batch {index} is not finite")
    if outputs:
        # Rounding differs between a batch and its samples, relative to the largest output.
        apart = float((whole.flatten() - single).abs().max()) / max(float(whole.abs().max()), 1e-30)
    else:
        wanted, size = float(whole), max(float(single.abs().mean()), 1e-30)
        total, n = float(single.double().sum()), len(single)
        apart = min(abs(wanted - total / n), abs(wanted - total) / n) / size
    if apart > 1e3 * torch.finfo(whole.dtype).eps:
        what = "outputs of the batch are not those" if outputs else "loss is neither the mean nor the sum of those"
        raise MissingStatsError(
            f"batch {index}: the {what} of its samples (they differ by {apart:.1g}, relative), so there is no gradient "
            "of one sample. Batch norms must keep running statistics, and a weighted or contrastive loss must be "
            "written as a sum over samples; or give batches of one sample"
        )
