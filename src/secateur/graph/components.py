"""What follows from ties: which labels are connected, and which cells of a reshape."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from secateur.graph.axes import FIXED, Labels


def reshape_cells(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Split a reshape into the smallest independent pieces: which dimensions become which.

    Example:
        >>> reshape_cells((2, 6, 5), (2, 2, 3, 5))
        [([0], [0]), ([1], [1, 2]), ([2], [3])]
    """
    a = [d for d, s in enumerate(before) if s != 1]
    b = [d for d, s in enumerate(after) if s != 1]
    cells, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        left, right = [a[i]], [b[j]]
        size_left, size_right = before[a[i]], after[b[j]]
        i, j = i + 1, j + 1
        while size_left != size_right:
            if size_left < size_right:
                size_left *= before[a[i]]
                left.append(a[i])
                i += 1
            else:
                size_right *= after[b[j]]
                right.append(b[j])
                j += 1
        cells.append((left, right))
    return cells


def components(count: int, left: Sequence[Labels], right: Sequence[Labels]) -> Labels:
    """Return for each of ``count`` labels the smallest one that it is connected to.

    Args:
        count: Number of labels.
        left: One end of each tie.
        right: The other end.

    Returns:
        Shape (count,).
    """
    root = np.arange(count)
    if not left:
        return root
    a, b = np.concatenate(left), np.concatenate(right)
    live = (a != b) & (a != FIXED) & (b != FIXED)
    a, b = a[live], b[live]
    while a.size:
        ra, rb = root[a], root[b]
        apart = ra != rb
        if not apart.any():
            break
        a, b, ra, rb = a[apart], b[apart], ra[apart], rb[apart]
        low, high = np.minimum(ra, rb), np.maximum(ra, rb)
        np.minimum.at(root, high, low)
        while True:  # follow to the end, so that every label names its root
            next_root = root[root]
            if (next_root == root).all():
                break
            root = next_root
    return root


def join(sets: list[set[int]], members: set[int]) -> None:
    """Add a set to sets that do not meet, and make it one with all that it meets.

    Example:
        >>> sets = [{1, 2}, {3}, {4, 5}]
        >>> join(sets, {2, 5, 6})
        >>> sets
        [{3}, {1, 2, 4, 5, 6}]
    """
    for other in [s for s in sets if s & members]:
        members |= other
        sets.remove(other)
    sets.append(members)


def components_of_rows(rows: Labels) -> int:
    """Count the classes of rows that remain when every row becomes one unit, and rows that share a label one class."""
    if rows.size == 0:
        return 0
    values, flat = np.unique(rows, return_inverse=True)
    flat = flat.reshape(rows.shape)
    n = len(values)
    owner = np.arange(n, n + len(rows))
    roots = components(n + len(rows) + 1, [np.repeat(owner, rows.shape[1]) + 1], [flat.ravel() + 1])
    return len(np.unique(roots[owner + 1]))
