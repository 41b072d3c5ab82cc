"""What the MiniLM benchmark adds to the library's own parts: a score, a repair, and distillation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from efficientnet_parts import hooked
from secateur.types import GroupView, Stats
from sentences.model import embed, tokens

# Shapes: N texts, T tokens, R tokens of all texts, C channels in, E width of the embedding, U units

Batch = dict[str, Tensor]


def batches_of(tokenizer: Any, texts: Sequence[str], batch: int) -> list[Batch]:
    """Return inputs of texts of about one length each."""
    order = sorted(texts, key=len)
    return [tokens(tokenizer, order[i : i + batch]) for i in range(0, len(order), batch)]


def layers(model: nn.Module) -> list[Any]:
    """Return the transformer layers."""
    return list(model.get_submodule("encoder.encoder.layer").children())


# -- score


@dataclass(frozen=True)
class Probes:
    """First-order changes of the embedding, along one random direction per text.

    Attributes:
        products: Layer that reads units -> (N, C): sum over tokens of gradient times input.
        gradients: Layer -> (N, C): sum over tokens of the gradient.
        means: Layer -> (C,): mean input.
    """

    products: dict[str, Tensor]
    gradients: dict[str, Tensor]
    means: dict[str, Tensor]


@dataclass(frozen=True)
class Sensitivity:
    r"""Expected squared distance that an embedding moves, to first order, when a unit is replaced by its mean.

    With :math:`a_u` what unit :math:`u` hands to the layer that reads it, :math:`e` the normalised embedding and
    :math:`v \sim N(0, I)`:

    .. math:: S_u = \tfrac1N \sum_n \Bigl(\sum_{\text{tokens, channels of } u}
              \frac{\partial (v_n \cdot e_n)}{\partial a_u} (a_u - c\,\bar a_u)\Bigr)^2

    whose expectation is :math:`\|\delta\|^2 = 2 (1 - \cos)` with :math:`\delta` the first-order change of the
    embedding. With ``centred`` (c = 1) the mean, which a bias can take over, counts as free.

    Args:
        probes: From :func:`probe`, on the very model that is pruned.
        centred: Whether the unit is replaced by its mean (or by zero).
        per_mac: Divide by the unit's weights, each of which is one multiplication per token. (What a head's scores
            and sums cost beside, 4 % at 32 tokens, is left out.)
    """

    probes: Probes = field(repr=False)
    centred: bool = True
    per_mac: bool = False

    @property
    def needs(self) -> frozenset[str]:
        """Nothing: the probes are here."""
        return frozenset()

    def units(self, group: GroupView, stats: Stats) -> Tensor | None:
        """Return one score per unit, or ``None`` where nothing that was probed reads the units."""
        cost = sum(m.values.shape[1] for m in group.members if m.name.partition("@")[0].endswith("weight"))
        moved: Tensor | None = None
        for member in group.of("in"):
            module = member.name.partition("@")[0].rpartition(".")[0]
            if module not in self.probes.products:
                continue
            free = self.probes.gradients[module] * self.probes.means[module] if self.centred else 0.0
            change_NC = self.probes.products[module] - free
            # The channels of one head lie side by side.
            change_NU = change_NC.reshape(len(change_NC), group.units, -1).sum(2)
            moved = change_NU if moved is None else moved + change_NU
        if moved is None:
            return None
        score = moved.double().square().mean(0)
        return score / cost if self.per_mac else score


def probe(model: nn.Module, tokenizer: Any, texts: Sequence[str], *, seed: int = 0, batch: int = 16) -> Probes:
    """Push random directions back from the embeddings, and record what reaches the layers that read units."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    read = {n: m for n, m in model.named_modules() if n.endswith("output.dense")}
    inputs: dict[str, Tensor] = {}

    def before(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            inputs[name] = args[0].view_as(args[0]) if args[0].requires_grad else args[0].detach().requires_grad_()
            return (inputs[name],)

        return hook

    products: dict[str, list[Tensor]] = {n: [] for n in read}
    gradients: dict[str, list[Tensor]] = {n: [] for n in read}
    sums = dict.fromkeys(read, torch.zeros(()))
    seen = 0
    with hooked([m.register_forward_pre_hook(before(n)) for n, m in read.items()]), torch.enable_grad():
        for part in batches_of(tokenizer, texts, batch):
            embedding = model(**part)
            direction = torch.randn(embedding.shape, generator=generator)
            found = torch.autograd.grad((embedding * direction).sum(), [inputs[n] for n in read])
            seen += int(part["attention_mask"].sum())
            # Padding has no gradient: nothing reads it.
            for name, gradient in zip(read, found, strict=True):
                a = inputs[name].detach()
                products[name].append((gradient * a).sum(1))
                gradients[name].append(gradient.sum(1))
                sums[name] = sums[name] + a[part["attention_mask"].bool()].sum(0)
    return Probes(
        {n: torch.cat(p) for n, p in products.items()},
        {n: torch.cat(g) for n, g in gradients.items()},
        {n: total / seen for n, total in sums.items()},
    )


# -- repair


class Moments:
    """Weighted sums of two sets of rows, for a least-squares fit of one by the other without keeping them."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []

    def add(self, x_RC: Tensor, y_RE: Tensor, weight_R1: Tensor) -> None:
        """Add rows."""
        wx = x_RC * weight_R1
        new = [weight_R1.sum(), wx.sum(0), (y_RE * weight_R1).sum(0), wx.T @ x_RC, wx.T @ y_RE]
        self._sums = (
            [a + b.double() for a, b in zip(self._sums, new, strict=True)] if self._sums else [b.double() for b in new]
        )

    def fit_(self, module: nn.Linear, *, ridge: float, weights: bool) -> None:
        """Set the bias, and if asked the weights first, to the best fit; ``ridge`` pulls to the old weights."""
        count, x, y, square, product = self._sums
        x, y = x / count, y / count
        weight = module.weight.double()
        if weights:
            square = square / count - torch.outer(x, x)
            missing = product / count - torch.outer(x, y) - square @ weight.T
            square.diagonal().add_(ridge * square.diagonal().mean())
            weight = weight + torch.linalg.solve(square, missing).T
            module.weight.copy_(weight)
        module.bias.copy_(y - weight @ x)


@torch.no_grad()
def repair_(
    small: nn.Module,
    dense: nn.Module,
    inputs: list[Batch],
    *,
    weights: bool = True,
    ridge: float = 0.01,
    by_text: bool = True,
) -> None:
    """Fit the layers that read pruned units, one after the other, to the sums that the dense model's norms see.

    Both models walk through the texts side by side. After its attention, and again after its neurons, each layer of
    MiniLM normalises ``input + dense(units)``; the small model's ``dense`` is set to the least-squares fit of the dense
    model's whole sum less the small model's own input, so that what earlier layers got wrong is made up for, too.

    Args:
        small: The shrunk model; changed in place.
        dense: The dense model.
        inputs: Unlabelled texts.
        weights: Fit weights and biases; otherwise only biases, which puts the units' mean back.
        ridge: Pull towards the weights as they are, as part of the units' mean variance.
        by_text: Weigh every text alike, however long it is, as the mean over its tokens does.
    """
    states = []
    for part in inputs:
        mask = part["attention_mask"]
        inside = mask.bool()
        share = 1.0 / mask.sum(1, keepdim=True) if by_text else torch.ones(len(mask), 1)
        wide = None if bool(inside.all()) else inside[:, None, None, :]
        ids = part["input_ids"]
        encoders = [m.get_submodule("encoder.embeddings") for m in (small, dense)]
        states.append((wide, inside, share.expand_as(mask)[inside][:, None], [e(input_ids=ids) for e in encoders]))
    for narrow, full in zip(layers(small), layers(dense), strict=True):
        sides = (narrow, full)
        read = [[s.attention.self(h, attention_mask=wide)[0] for s, h in zip(sides, hs, strict=True)]
                for wide, _, _, hs in states]  # fmt: skip
        for block, after in (([s.attention.output for s in sides], True), ([s.output for s in sides], False)):
            moments = Moments()
            for (_, inside, share, hs), units in zip(states, read, strict=True):
                wanted = hs[1] + block[1].dense(units[1]) - hs[0]
                moments.add(units[0][inside], wanted[inside], share)
            moments.fit_(block[0].dense, ridge=ridge, weights=weights)
            for at, units in enumerate(read):
                hs = states[at][3]
                hs[:] = [b(u, h) for b, u, h in zip(block, units, hs, strict=True)]
            if after:
                read = [[s.intermediate(h) for s, h in zip(sides, hs, strict=True)] for _, _, _, hs in states]


# -- distillation


@dataclass(frozen=True)
class Distillation:
    """How the dense model's embeddings are taught: 1 - cosine, of texts of about one length in each batch.

    Attributes:
        steps: Steps.
        batch: Texts per step.
        lr: Peak learning rate; linear warm-up over a tenth of the steps, then a cosine to zero.
        train_embeddings: Whether the tables of tokens and positions are trained, too.
        seed: Of the order.
    """

    steps: int = 400
    batch: int = 32
    lr: float = 1e-4
    train_embeddings: bool = False
    seed: int = 0


def distil_(student: nn.Module, tokenizer: Any, texts: Sequence[str], wanted: Tensor, how: Distillation) -> list[float]:
    """Teach embeddings; returns the losses.

    Args:
        student: Changed in place; no dropout.
        tokenizer: Of the model.
        texts: Unlabelled texts.
        wanted: (N, E), what the dense model makes of them.
        how: The settings.
    """
    generator = torch.Generator().manual_seed(how.seed)
    trained = [p for n, p in student.named_parameters() if how.train_embeddings or ".embeddings." not in n]
    optimizer = torch.optim.AdamW(trained, lr=how.lr, weight_decay=0.01)
    warm = max(how.steps // 10, 1)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=warm),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(how.steps - warm, 1)),
        ],
        [warm],
    )
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    student.eval()
    losses = []
    rows: list[list[int]] = []
    for _ in range(how.steps):
        rows = rows or _order(texts, how.batch, generator)
        chosen = rows.pop()
        given = student(**tokens(tokenizer, [texts[i] for i in chosen]))
        loss = 1 - (given * wanted[torch.tensor(chosen)]).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    student.requires_grad_(True)
    return losses


def _order(texts: Sequence[str], batch: int, generator: torch.Generator) -> list[list[int]]:
    """Return batches of one pass, in random order, each of texts of about one length."""
    shuffled = torch.randperm(len(texts), generator=generator).tolist()
    rows = []
    for start in range(0, len(shuffled), 32 * batch):
        near = sorted(shuffled[start : start + 32 * batch], key=lambda i: len(texts[i]))
        rows += [near[i : i + batch] for i in range(0, len(near), batch)]
    return [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]


@torch.no_grad()
def reset_(model: nn.Module, *, keep_embeddings: bool, seed: int = 0) -> None:
    """Give every layer the weights of a new network: normal with the standard deviation of BERT's configuration."""
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        if keep_embeddings and ".embeddings" in name:
            continue
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.normal_(0.0, 0.02, generator=generator)
        if isinstance(module, nn.LayerNorm):
            module.weight.fill_(1.0)
        if isinstance(module, nn.Linear | nn.LayerNorm):
            module.bias.zero_()


__all__ = [
    "Batch",
    "Distillation",
    "Probes",
    "Sensitivity",
    "batches_of",
    "distil_",
    "embed",
    "probe",
    "repair_",
    "reset_",
]
