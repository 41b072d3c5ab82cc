"""What the EfficientNet benchmark adds to the library's own parts: a repair, and distillation."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from secateur import rematch_bn_
from secateur.structure import ShrinkReport

# Shapes: N photographs, P positions, C channels in, O channels out, U units

Kept = dict[str, dict[int, NDArray[np.int64]]]
POSITIONS = 64
"""Places of a feature map that the least-squares fit looks at, for each photograph."""


# -- layers


def readers(model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """Return the layers that mix channels."""
    return {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.groups == 1)
    }


@contextmanager
def hooked(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# -- repair


def compose(old: Kept, report: ShrinkReport) -> Kept:
    """Return the kept indices of the dense model after one more shrinking."""
    out = {name: dict(dims) for name, dims in old.items()}
    for name, dims in report.plan.kept.items():
        for dim, index in dims.items():
            before = out.setdefault(name, {}).get(dim)
            out[name][dim] = index if before is None else before[index]
    return out


def part_of(values: Tensor, kept: Kept, name: str, dim: int) -> Tensor:
    """Return the kept entries of a per-channel vector or of the columns of a matrix."""
    index = kept.get(name, {}).get(dim)
    return values if index is None else values[..., torch.from_numpy(index)]


class Dense:
    """What the repairs need of the dense model on some photographs: one pass over them, then no more.

    Attributes:
        photos: The photographs.
        moments: Batch norm -> mean and standard deviation of its input, per channel.
        outputs: Layer that mixes channels -> (N, P, O) of its output, at random positions.
        places: Layer -> (N, P): those positions.
    """

    def __init__(self, model: nn.Module, photos: Tensor, batch: int = 8) -> None:
        self.model, self.photos = model, photos
        self.outputs: dict[str, Tensor] = {}
        self.places: dict[str, Tensor] = {}
        sums: dict[str, Tensor] = {}
        rows: dict[str, list[Tensor]] = {}

        def norm_hook(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                x = args[0].transpose(0, 1).flatten(1).double()
                found = torch.stack([x.sum(1), x.square().sum(1), torch.full((len(x),), float(x.shape[1])).double()])
                sums[name] = sums[name] + found if name in sums else found

            return hook

        def reader_hook(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
                done = sum(len(r) for r in rows.get(name, []))
                rows.setdefault(name, []).append(at_places(out, self._places(name, out)[done : done + len(out)]))

            return hook

        norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
        handles = [m.register_forward_pre_hook(norm_hook(n)) for n, m in norms.items()]
        handles += [m.register_forward_hook(reader_hook(n)) for n, m in pointwise(model).items()]
        with hooked(handles), torch.no_grad():
            for part in torch.split(photos, batch):
                model(part)
        self.outputs = {n: torch.cat(parts) for n, parts in rows.items()}
        self.moments = {}
        for name, (total, square, count) in sums.items():
            mean = total / count
            self.moments[name] = (mean.float(), (square / count - mean.square()).clamp_min(0).sqrt().float())

    def _places(self, name: str, out: Tensor) -> Tensor:
        if name not in self.places:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            there = out[0, 0].numel()
            self.places[name] = torch.randint(there, (len(self.photos), min(POSITIONS, there)), generator=generator)
        return self.places[name]


def pointwise(model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """Return linear layers and 1×1 convolutions of stride 1: those whose output at a place reads one place."""
    return {
        n: m
        for n, m in readers(model).items()
        if isinstance(m, nn.Linear) or (m.kernel_size == (1, 1) and tuple(m.stride) == (1, 1))
    }


def at_places(x: Tensor, places: Tensor) -> Tensor:
    """Return the channels at some positions: (N, C, ...) -> (N, P, C)."""
    flat = x[:, None] if x.dim() == 2 else x.permute(0, 2, 3, 1).flatten(1, 2)
    return flat[torch.arange(len(flat))[:, None], places]


@torch.no_grad()
def repair_(small: nn.Module, kept: Kept, dense: Dense, *, refit: bool, ridge: float = 0.01) -> None:
    """Re-match the batch norms of a shrunk model, and fit its weights to the dense outputs on the way if asked.

    ``rematch_bn_`` wants a dense model of the same widths. Its stand-in is the shrunk model with the dense scales and
    shifts, whose norms are shown two values per channel with the recorded dense moments of the channels that stayed.

    Args:
        small: The shrunk model; changed in place.
        kept: What stayed of the dense model.
        dense: The dense model's own moments and outputs.
        refit: Whether the weights of linear layers and 1×1 convolutions are set, one after the other, to the least-
            squares fit of the dense layer's outputs from the inputs that the shrunk model offers.
        ridge: Pull towards the weights as they are, as part of the inputs' mean variance.
    """
    stand_in = copy.deepcopy(small)
    norms = {n: m for n, m in stand_in.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for name, norm in norms.items():
        for own in ("weight", "bias"):
            there = f"{name}.{own}"
            norm.get_parameter(own).copy_(part_of(dense.model.get_parameter(there).detach(), kept, there, 0))

    def fit(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            target = part_of(dense.outputs[name], kept, f"{name}.weight", 0).flatten(0, 1)
            fit_(module, at_places(args[0], dense.places[name]).flatten(0, 1), target, ridge)
            again: Tensor = module.forward(args[0])
            return again

        return hook

    def forward(model: nn.Module, photos: Tensor) -> None:
        if model is stand_in:
            for name, norm in norms.items():
                mean, std = (part_of(v, kept, f"{name}.weight", 0) for v in dense.moments[name])
                norm(torch.stack([mean - std, mean + std])[:, :, None, None])
            return
        handles = [m.register_forward_hook(fit(n)) for n, m in pointwise(model).items()] if refit else []
        with hooked(handles):
            model(photos)

    rematch_bn_(small, stand_in, dense.photos, forward=forward)


def fit_(module: nn.Module, x_RC: Tensor, y_RO: Tensor, ridge: float) -> None:
    """Move a layer's weights to the least-squares fit, and its bias, if any, to the means."""
    x, y = x_RC - x_RC.mean(0), y_RO - y_RO.mean(0)
    weight = module.get_parameter("weight").flatten(1)
    square = (x.T @ x).double() / len(x)
    missing = (x.T @ (y - x @ weight.T)).double() / len(x)
    square.diagonal().add_(ridge * square.diagonal().mean())
    weight.add_(torch.linalg.solve(square, missing, left=True).T)
    bias = dict(module.named_parameters()).get("bias")
    if bias is not None:
        bias.copy_(y_RO.mean(0) - weight @ x_RC.mean(0))


# -- distillation


@dataclass(frozen=True)
class Distillation:
    """How the dense model's outputs are taught.

    Attributes:
        steps: Steps.
        batch: Photographs per step.
        lr: Peak learning rate; linear warm-up over a tenth of the steps, then a cosine to zero.
        temperature: Of both softmaxes.
        train_norms: Whether batch norms use and move batch statistics.
        seed: Of the order and the augmentation.
    """

    steps: int = 300
    batch: int = 8
    lr: float = 3e-5
    temperature: float = 1.0
    train_norms: bool = False
    seed: int = 0


def distil_(student: nn.Module, teacher: nn.Module, photos: Tensor, how: Distillation) -> list[float]:
    """Teach the dense model's logits on augmented photographs; returns the losses."""
    generator = torch.Generator().manual_seed(how.seed)
    optimizer = torch.optim.AdamW(student.parameters(), lr=how.lr, weight_decay=1e-4)
    warm = max(how.steps // 10, 1)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=warm),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(how.steps - warm, 1)),
        ],
        [warm],
    )
    teacher.eval()
    student.train(how.train_norms)
    losses = []
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(how.steps):
        if len(order) < how.batch:
            order = torch.cat([order, torch.randperm(len(photos), generator=generator)])
        chosen, order = order[: how.batch], order[how.batch :]
        images = augmented(photos[chosen], generator)
        with torch.no_grad():
            wanted = (teacher(images) / how.temperature).log_softmax(1)
        given = (student(images) / how.temperature).log_softmax(1)
        loss = F.kl_div(given, wanted, log_target=True, reduction="batchmean") * how.temperature**2
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    student.eval()
    return losses


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Crop each image at random (60 to 100 % of its side), resize it back, flip half of them."""
    side = images.shape[-1]
    out = []
    for image in images:
        part = int(side * (0.6 + 0.4 * float(torch.rand((), generator=generator))))
        top, left = (int(torch.randint(side - part + 1, (), generator=generator)) for _ in range(2))
        cut = image[None, :, top : top + part, left : left + part]
        cut = F.interpolate(cut, (side, side), mode="bilinear", align_corners=False)
        out.append(cut.flip(3) if float(torch.rand((), generator=generator)) < 0.5 else cut)
    return torch.cat(out).contiguous(memory_format=torch.channels_last)


def reset_(model: nn.Module, seed: int = 0) -> None:
    """Give every layer the weights of a new network."""
    torch.manual_seed(seed)
    for module in model.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()


def divergence(reference: Tensor, given: Tensor) -> float:
    """Return KL(dense || pruned), the mean over photographs."""
    p, q = reference.log_softmax(1), given.log_softmax(1)
    return float((p.exp() * (p - q)).sum(1).mean())


__all__ = [
    "Dense",
    "Distillation",
    "Kept",
    "compose",
    "distil_",
    "divergence",
    "repair_",
    "reset_",
]
