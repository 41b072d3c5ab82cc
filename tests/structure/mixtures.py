"""Mixtures whose experts are modules in a list, with every way of running them, and one with stacked weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HIDDEN, EXPERTS = 8, 12, 6


class Mlp(nn.Module):
    def __init__(self, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.relu(self.up(x)))
        return out


class Gated(nn.Module):
    """An expert of another class."""

    def __init__(self, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, hidden, bias=False), nn.Linear(WIDTH, hidden, bias=False)
        self.down, self.scale = nn.Linear(hidden, WIDTH, bias=False), nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x)) * self.scale
        return out


class Many(nn.ModuleList):
    """A list that runs its own entries, for experts that were hit."""

    def forward(self, x: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(chosen, len(self)).permute(2, 1, 0)
        for number in torch.greater(mask.sum((-1, -2)), 0).nonzero():
            place, token = torch.where(mask[number].squeeze(0))
            out.index_add_(0, token, self[number](x[token]) * share[token, place, None])
        return out


class Listed(nn.Module):
    """Chooses ``k`` of the experts in a list; ``how`` is the way in which they are run."""

    def __init__(
        self, how: str = "enumerated", k: int = 2, gate: str = "softmax", kinds: Iterable[Any] = (Mlp,) * EXPERTS
    ) -> None:
        super().__init__()
        self.how, self.k, self.gate = how, k, gate
        self.experts = (Many if how == "itself" else nn.ModuleList)(kind() for kind in kinds)
        self.num_experts = len(self.experts)
        self.router = nn.Linear(WIDTH, self.num_experts)
        self.correction = nn.Parameter(0.1 * torch.randn(self.num_experts))
        self.shared = Mlp(4)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x)
        scores = scores.softmax(-1) if self.gate == "softmax" else scores.sigmoid()
        _, chosen = torch.topk(scores + self.correction, self.k, dim=-1)
        share = scores.gather(-1, chosen)
        share = share / share.sum(-1, keepdim=True)
        out: Tensor = x + self.shared(x) + getattr(self, self.how)(x, chosen, share)
        return out

    def enumerated(self, x: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, place = torch.where(chosen == i)
            out = out.index_add(0, token, expert(x[token]) * share[token, place, None])
        return out

    def ranged(self, x: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i in range(self.num_experts):
            mask = chosen == i
            if mask.any():
                token = mask.any(-1)
                out[token] += self.experts[i](x[token]) * (share * mask).sum(-1)[token, None]
        return out

    def guarded(self, x: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, place = (chosen == i).nonzero(as_tuple=True)
            if token.numel() == 0:
                continue
            out[token] += share[token, place].unsqueeze(-1) * expert(x[token])
        return out

    def masks(self, x: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(chosen, num_classes=self.num_experts).permute(2, 1, 0)
        for i in range(self.num_experts):
            place, token = torch.where(mask[i])
            out.index_add_(0, token, self.experts[i](x[None, token].reshape(-1, WIDTH)) * share[token, place, None])
        return out

    def hit(self, x: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number in chosen.unique():
            token, place = torch.where(chosen == number)
            out.index_add_(0, token, self.experts[int(number)](x[token]) * share[token, place, None])
        return out

    def one_by_one(self, x: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
        rows = []
        for row, numbers, shares in zip(x, chosen, share, strict=True):
            rows.append(sum(s * self.experts[n.item()](row) for n, s in zip(numbers, shares, strict=True)))
        return torch.stack(rows)

    def zipped(self, x: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        masks = F.one_hot(chosen, len(self.experts)).permute(2, 1, 0)
        for mask, expert in zip(masks, self.experts, strict=True):
            place, token = torch.where(mask)
            out.index_add_(0, token, expert(x[token]) * share[token, place, None])
        return out

    def dense(self, x: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
        """Every expert works on everything; those not chosen get the share 0."""
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            out = out + expert(x) * ((chosen == i) * share).sum(-1, keepdim=True)
        return out

    def dense_shares(self, x: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
        shares = torch.zeros(len(x), self.num_experts).scatter(1, chosen, share)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            out = out + shares[:, i].unsqueeze(-1) * expert(x)
        return out

    def columns(self, x: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
        """Shares by slices of one column, read after the expert has run."""
        shares = torch.zeros(len(x), self.num_experts).scatter(1, chosen, share)
        return sum((e(x) * shares[:, i : i + 1] for i, e in enumerate(self.experts)), torch.zeros_like(x))

    def in_order(self, x: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
        """Tokens sorted by expert; Python reads how many each gets."""
        counts = chosen.new_zeros(len(x), len(self.experts)).scatter_(1, chosen, 1).sum(0)
        order = chosen.view(-1).argsort(stable=True)
        rows, start, out = x[order // chosen.shape[1]], 0, []
        for i, count in enumerate(counts.tolist()):
            if count:
                out.append(self.experts[i](rows[start : start + count]))
                start += count
        back = torch.empty_like(rows)
        back[order] = torch.cat(out)
        return (back.view(*chosen.shape, -1) * share[..., None]).sum(1)

    def ahead(self, x: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
        """All masks first."""
        places = [torch.where(chosen == i) for i in range(len(self.experts))]
        out = torch.zeros_like(x)
        for (token, place), expert in zip(places, self.experts, strict=True):
            out = out.index_add(0, token, expert(x[token]) * share[token, place, None])
        return out

    def itself(self, x: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
        out: Tensor = self.experts(x, chosen, share)
        return out

    def computes(self, x: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
        """The number of an expert is a value."""
        return self.enumerated(x, chosen, share) + (chosen * share).sum(1, keepdim=True)

    def special(self, x: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
        """The expert of number 0 counts twice, whoever that is."""
        return self.enumerated(x, chosen, share * torch.where(chosen == 0, 2.0, 1.0))

    def scaled(self, x: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
        """Python code computes with the number."""
        out = torch.zeros_like(x)
        for number in chosen.unique():
            token, place = torch.where(chosen == number)
            y = self.experts[int(number)](x[token]) * (1 + int(number))
            out.index_add_(0, token, y * share[token, place, None])
        return out


WAYS = [
    "enumerated", "ranged", "guarded", "masks", "hit", "one_by_one", "zipped", "dense", "dense_shares", "columns",
    "in_order", "ahead", "itself",
]  # fmt: skip


class Switch(Listed):
    """One expert per token by ``argmax``, with room for so many tokens, under names that count; the router casts."""

    def __init__(self, capacity: int = 9) -> None:
        super().__init__(k=1)
        self.capacity = capacity
        self.experts = nn.ModuleDict({f"expert_{i}": expert for i, expert in enumerate(self.experts)})

    def forward(self, x: Tensor) -> Tensor:
        self.router = self.router.to(torch.float32)
        scores = (self.router(x) + self.correction).softmax(-1)
        taken = F.one_hot(scores.argmax(-1), self.num_experts)
        taken = taken * (taken.cumsum(0) <= self.capacity)
        share, _ = scores.max(-1)
        out = torch.zeros_like(x)
        masks = taken.T
        for number in (masks.sum(-1) > 0).nonzero():
            (token,) = torch.where(masks[number].squeeze(0))
            out.index_add_(0, token, self.experts[f"expert_{number[0]}"](x[token]) * share[token, None])
        return x + out


class Net(nn.Module):
    def __init__(self, *mixtures: nn.Module) -> None:
        super().__init__()
        self.stem, self.mixtures, self.head = nn.Linear(5, WIDTH), nn.Sequential(*mixtures), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.mixtures(torch.relu(self.stem(x))))
        return out


def without(dense: nn.Module, kept: dict[int, list[int]], x: Tensor) -> Tensor:
    """The dense network whose routers give the experts that are gone no chance: no label, no plan."""
    twin = copy.deepcopy(dense)
    for number, stay in kept.items():
        mixture: Any = twin.mixtures[number]
        gone = [i for i in range(mixture.num_experts) if i not in stay]
        with torch.no_grad():
            mixture.router.bias[gone] = -torch.inf
            mixture.correction[gone] = -torch.inf
    out: Tensor = twin(x)
    return out
