"""Selection of exactly k units, by rank on (score, name, index). The one place that ranks.

A threshold comparison (``score <= t``) removes every tie at ``t`` and so prunes more than was asked; reference code
does this all over the field. Here the threshold is found exactly, and ties at it are removed one by one in the order
of name and index, so the number kept is the number asked, in every dtype and at every size.

On the processor NumPy partitions a copy of the scores, which vectorised code does in a tenth of the time of anything
else. The threshold of a problem too large to copy, or with costs, is found by radix histograms over the floats' bits:
two passes for float32, no copy of the scores, and no sort. (A histogram is also what several processes can add up,
which a sort is not.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from secateur.errors import SelectionError
from secateur.types import Units

# Under this size a quickselect on a copy is faster than clearing 2^16 histogram bins, on any device.
_SMALL = 1 << 16
# Up to this size, 128 MB of float32, scores on the processor are copied.
_COPIED = 1 << 25
# Up to this many units a group is ranked by comparing all pairs, which takes less time than sorting many short rows.
_PAIRS = 16
_CHUNK = 1 << 20
_DIGIT = 16
_BINS = 1 << _DIGIT


def check_scores(name: str, scores: Tensor) -> Tensor:
    """Return ``scores`` as float32 or float64, refusing what has no rank.

    Args:
        name: Whose scores they are, for the message.
        scores: Any floating or integer tensor.

    Returns:
        The scores, at least float32 (float16 would merge scores below 6e-8 into ties).

    Raises:
        SelectionError: When a score is NaN or infinite.
    """
    if scores.dtype not in (torch.float32, torch.float64):
        scores = scores.to(torch.float64 if scores.dtype in (torch.int32, torch.int64) else torch.float32)
    # The sum is finite only if every score is, and is several times cheaper than isfinite().all(); it can overflow
    # on healthy scores, so a bad sum only leads to the exact check.
    if scores.numel() and not bool(torch.isfinite(scores.sum())) and not bool(torch.isfinite(scores).all()):
        bad = int((~torch.isfinite(scores)).sum())
        first = int((~torch.isfinite(scores.flatten())).nonzero()[0])
        value = float(scores.flatten()[first])
        raise SelectionError(
            f"{name}: {bad} of {scores.numel()} scores are NaN or infinite (first at flat index {first}: {value}), so "
            "they cannot be ranked. Check the weights, the loss and the batches that the score was computed from."
        )
    return scores


def keep_top_k(scores: Tensor, k: int, name: str = "scores") -> Tensor:
    """Keep the ``k`` highest scores; ties lose the lowest index first.

    Args:
        scores: Scores of any shape.
        k: Number to keep, 0 <= k <= numel.
        name: What errors call them.

    Returns:
        Bool tensor of the same shape with exactly ``k`` ``True``.

    Raises:
        SelectionError: When ``k`` is out of range or a score is NaN.

    Example:
        >>> keep_top_k(torch.tensor([3.0, 1.0, 1.0, 2.0]), 3).tolist()
        [True, False, True, True]
    """
    return keep_global({name: scores}, k)[name]


def keep_global(scores: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    """Keep the ``k`` highest scores of all tensors together; ties lose by name, then by index.

    Args:
        scores: Scores per name.
        k: Number to keep over all of them.

    Returns:
        Bool tensors of the scores' shapes, with exactly ``k`` ``True`` in total.

    Raises:
        SelectionError: When ``k`` is out of range or a score is NaN.
    """
    total = sum(s.numel() for s in scores.values())
    if not 0 <= k <= total:
        raise SelectionError(f"cannot keep {k} of {total} units; k must lie in 0..{total}")
    return _remove_cheapest(scores, dict.fromkeys(scores, 1.0), float(total - k))


def keep_budget(scores: Mapping[str, Tensor], costs: Mapping[str, float | Tensor], kept: float) -> dict[str, Tensor]:
    """Remove units from the lowest score up until what is left costs at most ``kept``.

    Args:
        scores: 1-D scores per name.
        costs: Cost of one unit: a number per name, or a tensor with one cost per unit. Positive.
        kept: Total cost that may stay.

    Returns:
        Bool tensors; the removed set is the shortest prefix of the rank order that fits.

    Raises:
        SelectionError: When ``kept`` is negative or a score is NaN.
    """
    if kept < 0:
        raise SelectionError(f"a budget of {kept} cannot be met: even an empty network costs 0")
    total = sum(_total_cost(scores[name].numel(), costs[name]) for name in scores)
    return _remove_cheapest(scores, costs, total - kept)


def keep_in_groups(scores: Tensor, n: int) -> Tensor:
    """Keep the ``n`` highest scores in every row; ties lose the lowest index first.

    Args:
        scores: Shape (groups, M).
        n: Number to keep per row, 0 <= n <= M.

    Returns:
        Bool tensor of the same shape with exactly ``n`` ``True`` per row.

    Raises:
        SelectionError: When ``n`` is out of range or a score is NaN.
    """
    groups, m = scores.shape
    if not 0 <= n <= m:
        raise SelectionError(f"cannot keep {n} of every {m}")
    scores = _rankable("scores", scores)
    if m <= _PAIRS:
        return _keep_by_pairs(scores, n)
    keep = torch.zeros(groups, m, dtype=torch.bool, device=scores.device)
    for rows in range(0, groups, _CHUNK):
        order = torch.sort(scores[rows : rows + _CHUNK], dim=1, stable=True).indices
        keep[rows : rows + _CHUNK].scatter_(1, order[:, m - n :], True)
    return keep


def _keep_by_pairs(scores: Tensor, n: int) -> Tensor:
    """Keep what is outranked by fewer than ``n`` of its row: higher scores, and equal ones of a higher index."""
    groups, m = scores.shape
    keep = torch.empty(groups, m, dtype=torch.bool, device=scores.device)
    for rows in range(0, groups, _CHUNK):
        columns = scores[rows : rows + _CHUNK].T.contiguous()
        above = torch.zeros(columns.shape, dtype=torch.uint8, device=scores.device)
        for i in range(m):
            for j in range(i + 1, m):
                later = columns[j] >= columns[i]
                above[i] += later
                above[j] += ~later
        keep[rows : rows + _CHUNK] = (above < n).T
    return keep


def live(units: Units) -> int:
    """Return how many units are not pruned yet."""
    return units.scores.numel() - int(torch.isneginf(units.scores).sum())


def cost_of_best(units: Units) -> Callable[[int], float]:
    """Return the cost of keeping the k best units, as a function of k.

    Args:
        units: Scored and priced units.

    Returns:
        A function of k; it sorts once where units differ in cost, and not at all where they do not.
    """
    cost = units.cost
    if not isinstance(cost, Tensor):
        return lambda k: k * cost
    # Ascending and stable, read from the end: the order in which units are removed, backwards.
    order = torch.sort(units.scores, stable=True).indices
    spent = torch.cat([cost.new_zeros(1, dtype=torch.float64), cost.double()[order].flip(0).cumsum(0)])
    return lambda k: float(spent[k])


def global_counts(units: Mapping[str, Units], kept: float) -> dict[str, int]:
    """Rank all units together and return how many of each name stay.

    The best ``floor`` units of each name are set aside first, so that no layer is emptied.

    Args:
        units: Scored and priced units per name.
        kept: Total cost that may stay.

    Returns:
        Units that stay, per name. Per-name selection of that many gives the same masks as one global ranking.
    """
    guarded = {name: _guard(u.scores, u.floor) for name, u in units.items()}
    keep = keep_budget(guarded, {name: u.cost for name, u in units.items()}, kept)
    return {name: int(mask.sum()) for name, mask in keep.items()}


def _guard(scores: Tensor, floor: int) -> Tensor:
    """Raise the scores of the ``floor`` best units out of reach."""
    if floor <= 0:
        return scores
    best = keep_top_k(scores, min(floor, scores.numel()))
    return scores.masked_fill(best, torch.inf)


def _total_cost(count: int, cost: float | Tensor) -> float:
    return float(cost.sum()) if isinstance(cost, Tensor) else count * cost


def _rankable(name: str, scores: Tensor) -> Tensor:
    """Accept infinities (the library's own marks for pruned and guarded units) but not NaN."""
    if scores.dtype not in (torch.float32, torch.float64):
        scores = check_scores(name, scores)
    # max() propagates NaN and allocates nothing.
    if scores.numel() and bool(torch.isnan(scores.max())):
        check_scores(name, scores)
    return scores


def _remove_cheapest(
    scores: Mapping[str, Tensor], costs: Mapping[str, float | Tensor], need: float
) -> dict[str, Tensor]:
    """Remove the shortest prefix of the rank order whose cost reaches ``need``."""
    ranked = {name: _rankable(name, scores[name]) for name in sorted(scores)}
    if need <= 0:
        return {name: torch.ones_like(s, dtype=torch.bool) for name, s in ranked.items()}
    flat = [s.reshape(-1) for s in ranked.values()]
    if any(s.dtype != flat[0].dtype for s in flat):
        flat = [s.double() for s in flat]
    threshold, below = _threshold(flat, [costs[name] for name in ranked], need)
    need -= below
    masks = {}
    for (name, shaped), s in zip(ranked.items(), flat, strict=True):
        keep = s > threshold
        if need > 0:
            need -= _remove_ties(keep, s == threshold, costs[name], need)
        else:
            keep |= s == threshold
        masks[name] = keep.view(shaped.shape)
    return masks


def _remove_ties(keep: Tensor, tied: Tensor, cost: float | Tensor, need: float) -> float:
    """Give back, in ``keep``, the ties beyond the first ones that cover ``need``; return the cost removed."""
    if isinstance(cost, Tensor):
        ties = tied.nonzero().flatten()
        spent = cost[ties].double().cumsum(0)
        count = min(int((spent < need).sum()) + 1, ties.numel())
        keep[ties[count:]] = True
        return float(spent[count - 1]) if count else 0.0
    found = int(tied.count_nonzero())
    # A free unit brings the total no nearer to the budget: all of them go, and the ranking goes on.
    count = min(math.ceil(need / cost), found) if cost else found
    if count < found:  # counting takes less time than listing, and most often all of them go
        keep[tied.nonzero().flatten()[count:]] = True
    return count * cost


def _threshold(flat: Sequence[Tensor], costs: Sequence[float | Tensor], need: float) -> tuple[float, float]:
    """Return the score at which the cost of all lower and equal scores reaches ``need``, and the cost of all lower."""
    plain = all(not isinstance(c, Tensor) and c == 1.0 for c in costs)
    size = sum(s.numel() for s in flat)
    if plain and size <= _COPIED and all(s.device.type == "cpu" for s in flat):
        values = np.concatenate([s.detach().numpy() for s in flat])
        place = min(math.ceil(need), size) - 1
        values.partition(place)
        return float(values[place]), float(np.count_nonzero(values[:place] < values[place]))
    if plain and size <= _SMALL:
        joined = flat[0] if len(flat) == 1 else torch.cat(list(flat))
        value = float(torch.kthvalue(joined, min(math.ceil(need), joined.numel())).values)
        return value, float((joined < value).sum())
    bits = 64 if flat[0].dtype == torch.float64 else 32
    candidates: list[tuple[Tensor, float | Tensor]] = list(zip(flat, costs, strict=True))
    below, prefix = 0.0, 0
    for shift in range(bits - _DIGIT, -1, -_DIGIT):
        first = shift == bits - _DIGIT
        histogram = torch.zeros(_BINS, dtype=torch.float64, device="cpu")
        for digits, _, cost in _digits(candidates, bits, shift, first):
            histogram += _count(digits, cost)
        reached = histogram.cumsum(0)
        bin_ = min(
            int(torch.searchsorted(reached, torch.tensor(need - below, dtype=torch.float64, device="cpu"))), _BINS - 1
        )
        below += float(reached[bin_] - histogram[bin_])
        prefix = prefix << _DIGIT | bin_
        if shift:
            candidates = [
                (chunk[digits == bin_], cost[digits == bin_] if isinstance(cost, Tensor) else cost)
                for digits, chunk, cost in _digits(candidates, bits, shift, first)
            ]
    return _unkey(prefix, bits), below


def _count(digits: Tensor, cost: float | Tensor) -> Tensor:
    if isinstance(cost, Tensor):
        return torch.bincount(digits, weights=cost.double(), minlength=_BINS).cpu()
    return torch.bincount(digits, minlength=_BINS).double().cpu() * cost


def _digits(
    parts: Sequence[tuple[Tensor, float | Tensor]], bits: int, shift: int, first: bool
) -> Iterator[tuple[Tensor, Tensor, float | Tensor]]:
    """Yield (digit per element, scores, cost) a chunk at a time, so that temporaries stay in cache."""
    dtype = torch.int64 if bits == 64 else torch.int32
    for scores, cost in parts:
        for start in range(0, scores.numel(), _CHUNK):
            chunk = scores[start : start + _CHUNK]
            # Adding zero turns -0.0 into 0.0: equal scores must have equal keys.
            raw = (chunk + 0.0).view(dtype)
            # Two's complement order equals float order once the lower bits of negatives are flipped.
            key = raw ^ ((raw >> (bits - 1)) & (2 ** (bits - 1) - 1))
            digit = (key >> shift) & (_BINS - 1)
            if first:
                digit ^= 1 << (_DIGIT - 1)  # the sign bit: negative keys come first
            part = cost[start : start + _CHUNK] if isinstance(cost, Tensor) else cost
            yield digit, chunk, part


def _unkey(prefix: int, bits: int) -> float:
    """Turn a sorted key back into the float that it came from."""
    key = prefix ^ (1 << (bits - 1))
    raw = key if key < 1 << (bits - 1) else key ^ ((1 << (bits - 1)) - 1)
    signed = raw - (1 << bits) if raw >> (bits - 1) else raw
    integer, floating = (torch.int64, torch.float64) if bits == 64 else (torch.int32, torch.float32)
    return float(torch.tensor([signed], dtype=integer, device="cpu").view(floating)[0])
