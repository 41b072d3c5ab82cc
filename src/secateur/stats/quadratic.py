r"""The quadratic model of the loss around the weights: what removal costs, and what the others can make up for.

With a positive definite curvature :math:`F`, moving the weights by :math:`d` adds :math:`\tfrac12 d^T F d`. Everything
here works with :math:`F^{-1}`, in the dtype that it is given (float64 is meant), and on many blocks at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.errors import MissingStatsError

# Shapes: N gradients, ... blocks, B weights of a block

_CACHED = 2**18
"""Numbers that a step of the elimination goes over: as many as a core keeps close."""


def woodbury(gradients: Tensor, damping: float) -> Tensor:
    r"""Invert a damped Fisher matrix gradient by gradient.

    .. math::
        F_0^{-1} = \lambda^{-1} I, \qquad
        F_n^{-1} = F_{n-1}^{-1} - \frac{F_{n-1}^{-1} g_n g_n^T F_{n-1}^{-1}}{N + g_n^T F_{n-1}^{-1} g_n}

    with :math:`\lambda` = ``damping``; the last is the inverse of :math:`\lambda I + \tfrac1N \sum_n g_n g_n^T`. Every
    gradient passes over the whole matrix, so that building the matrix and inverting it once (:func:`invert`) is faster
    wherever it fits; the two agree.

    Args:
        gradients: Shape (N, ..., B).
        damping: A positive number.

    Returns:
        The inverse, (..., B, B), float64.

    Raises:
        MissingStatsError: When the damping is not positive, or there are no gradients.

    Example:
        >>> woodbury(torch.tensor([[1.0, 0.0]]), damping=1.0).tolist()
        [[0.5, 0.0], [0.0, 1.0]]

    References:
        Babak Hassibi, David G. Stork, Second Order Derivatives for Network Pruning: Optimal Brain Surgeon, 1993; Sidak
        Pal Singh, Dan Alistarh, WoodFisher: Efficient Second-Order Approximation for Neural Network Compression, 2020.
    """
    if not damping > 0.0:
        raise MissingStatsError(f"the recursion starts from the inverse of damping * I; damping is {damping!r}")
    if not len(gradients):
        raise MissingStatsError("there are no gradients to make a Fisher matrix of")
    count, size = len(gradients), gradients.shape[-1]
    eye = torch.eye(size, dtype=torch.float64, device=gradients.device) / damping
    inverse = eye.expand(*gradients.shape[1:-1], size, size).clone()
    for g in gradients.double():
        y = torch.einsum("...ij,...j->...i", inverse, g)
        inverse -= (y / (count + (y * g).sum(-1, keepdim=True)))[..., None] * y[..., None, :]
    return inverse


def invert(matrices: Tensor) -> Tensor:
    """Invert positive definite matrices, (..., B, B), by Cholesky factors.

    A matrix counts as singular when a pivot is lost in the rounding of its own diagonal entry.

    Raises:
        SingularMatrix: Carries the index of the first matrix that has no inverse.
    """
    factors, failed = torch.linalg.cholesky_ex(matrices)
    pivots = factors.diagonal(dim1=-2, dim2=-1).square()
    rounding = torch.finfo(matrices.dtype).eps * matrices.shape[-1]
    lost = (pivots <= rounding * matrices.diagonal(dim1=-2, dim2=-1)).any(-1) | (failed != 0)
    lost |= ~torch.isfinite(pivots).all(-1)
    if bool(lost.any()):
        raise SingularMatrix(int(lost.flatten().nonzero()[0]))
    return torch.cholesky_inverse(factors)


class SingularMatrix(Exception):
    """A matrix without an inverse; :attr:`index` is its flat place among those that were to be inverted."""

    def __init__(self, index: int) -> None:
        super().__init__(f"matrix {index} is singular or not positive definite")
        self.index = index


def downdate(inverse: Tensor, index: int | Tensor) -> Tensor:
    r"""Take one weight out of an inverse: eliminate its row and column.

    .. math:: F^{-1} \leftarrow F^{-1} - \frac{F^{-1}_{:,q} F^{-1}_{q,:}}{[F^{-1}]_{qq}}

    On the other weights that is the inverse of :math:`F` without row and column :math:`q`; there it is zero.

    Args:
        inverse: Shape (..., B, B).
        index: Which weight; one number, or one per block, (...).

    Returns:
        The new inverse.

    Example:
        >>> downdate(torch.tensor([[2.0, 1.0], [1.0, 1.0]]), 0).tolist()
        [[0.0, 0.0], [0.0, 0.5]]
    """
    size = inverse.shape[-1]
    flat = inverse.reshape(-1, size, size).clone()
    rows = torch.arange(len(flat), device=flat.device)
    gone = torch.as_tensor(index, device=flat.device).reshape(-1).expand(len(flat))
    _eliminate_(flat, rows, gone)
    return flat.reshape(inverse.shape)


def _eliminate_(inverse: Tensor, rows: Tensor, gone: Tensor) -> Tensor:
    """Take one weight out of each block in place; return what was its row over its diagonal entry."""
    column = inverse[rows, gone]
    scaled = column / column[rows, gone][:, None]
    inverse.baddbmm_(column[:, :, None], scaled[:, None, :], alpha=-1.0)
    inverse[rows, gone] = 0.0
    inverse[rows, :, gone] = 0.0
    return scaled


def remove(inverse: Tensor, weights: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    r"""Set some weights to zero and move all others to where the quadratic model is least.

    .. math::
        \delta w = -F^{-1}_{:,Q} \bigl([F^{-1}]_{QQ}\bigr)^{-1} w_Q, \qquad
        L_Q = \tfrac12 w_Q^T \bigl([F^{-1}]_{QQ}\bigr)^{-1} w_Q

    Removing the weights of :math:`Q` one after the other with :func:`downdate` ends at the same point in any order, and
    the single losses add up to :math:`L_Q`. Weights that are zero already and must stay so belong in :math:`Q` too:
    they cost nothing, and the others are then moved as if they did not exist.

    Args:
        inverse: :math:`F^{-1}`, shape (..., B, B).
        weights: Shape (..., B).
        indices: The set :math:`Q`: bool, shape (..., B), or whole numbers, the same weights in every block.

    Returns:
        The new weights, exactly zero in :math:`Q`, and the loss, (...).

    Raises:
        MissingStatsError: When the inverse is not positive definite on :math:`Q`.

    Example:
        >>> inverse = torch.tensor([[2.0, 1.0], [1.0, 1.0]])
        >>> [t.tolist() for t in remove(inverse, torch.tensor([4.0, 5.0]), torch.tensor([0]))]
        [[0.0, 3.0], 4.0]

    References:
        Babak Hassibi, David G. Stork, Second Order Derivatives for Network Pruning: Optimal Brain Surgeon, 1993.
    """
    if indices.dtype != torch.bool:
        chosen = torch.zeros(weights.shape[-1], dtype=torch.bool, device=weights.device)
        chosen[indices] = True
        indices = chosen.expand(weights.shape)
    # One system of full size per block, whatever goes in it: the identity where a weight stays.
    inside = indices[..., :, None] & indices[..., None, :]
    system = torch.where(inside, inverse, torch.diag_embed((~indices).to(inverse.dtype)))
    gone = torch.where(indices, weights, 0.0)
    pull = _solved(system, gone)
    moved = weights - torch.einsum("...ij,...j->...i", inverse, pull)
    return moved.masked_fill(indices, 0.0), 0.5 * (gone * pull).sum(-1)


def group_losses(inverse: Tensor, weights: Tensor, size: int) -> Tensor:
    r"""Return what it costs to remove each run of ``size`` consecutive weights of a block together.

    .. math:: L_Q = \tfrac12 w_Q^T \bigl([F^{-1}]_{QQ}\bigr)^{-1} w_Q

    Args:
        inverse: Shape (..., B, B).
        weights: Shape (..., B), ``size`` a divisor of B.
        size: Weights that go together; 1 for single ones.

    Returns:
        Shape (..., B / size).

    Raises:
        MissingStatsError: When the inverse is not positive definite on a run.

    Example:
        >>> group_losses(torch.tensor([[2.0, 0.0], [0.0, 4.0]]), torch.tensor([2.0, 2.0]), 1).tolist()
        [1.0, 0.5]
    """
    if size == 1:
        alone = inverse.diagonal(dim1=-2, dim2=-1)
        _refuse_lost(alone <= 0)
        return 0.5 * weights.square() / alone
    lead, many = weights.shape[:-1], weights.shape[-1] // size
    runs = weights.reshape(*lead, many, size)
    blocks = inverse.reshape(*lead, many, size, many, size)
    own = blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
    return 0.5 * (runs * _solved(own, runs)).sum(-1)


def _solved(systems: Tensor, right: Tensor) -> Tensor:
    factors, failed = torch.linalg.cholesky_ex(systems)
    _refuse_lost(failed)
    found: Tensor = torch.cholesky_solve(right[..., None], factors)[..., 0]
    return found


def _refuse_lost(lost: Tensor) -> None:
    if bool(lost.any()):
        raise MissingStatsError(
            "the inverse is not positive definite on the weights that go: it was made with too little damping, or some "
            "of them were taken out of it before (downdate)"
        )


@dataclass(frozen=True)
class Trace:
    """The order in which a block loses its weights, each time the one that costs least.

    Attributes:
        order: Indices of the weights, the first to go first; shape (..., B).
        losses: What each of these removals adds to the loss; shape (..., B).
    """

    order: Tensor
    losses: Tensor


def eliminate(inverse: Tensor, weights: Tensor, curvature: Tensor | None = None) -> Trace:
    r"""Remove every weight of each block, one at a time, the cheapest next; the others move each time.

    .. math:: q = \arg\min_q \frac{w_q^2}{2 [F^{-1}]_{qq}}, \qquad
        w \leftarrow w - \frac{w_q}{[F^{-1}]_{qq}} F^{-1}_{:,q}

    followed by :func:`downdate`. The first k losses add up to :func:`remove` of the first k weights. Ties go to the
    lowest index.

    Args:
        inverse: Shape (..., B, B); not changed.
        weights: Shape (..., B); not changed.
        curvature: Diagonal of F, shape (..., B). Rounding cannot then push an entry of the inverse below its least
            possible value, one over this.

    Returns:
        The trace.

    Example:
        >>> trace = eliminate(torch.diag(torch.tensor([1.0, 1.0, 4.0])), torch.tensor([3.0, 1.0, 4.0]))
        >>> trace.order.tolist(), trace.losses.tolist()
        ([1, 2, 0], [0.5, 2.0, 4.5])

    References:
        Babak Hassibi, David G. Stork, Second Order Derivatives for Network Pruning: Optimal Brain Surgeon, 1993; Elias
        Frantar, Dan Alistarh, Optimal Brain Compression, 2022 (traces of blocks, merged afterwards); Denis Kuznedelev,
        Eldar Kurtic, Elias Frantar, Dan Alistarh, CAP: Correlation-Aware Pruning for Highly-Accurate Sparse Vision
        Models, 2023 (on Fisher blocks).
    """
    size = weights.shape[-1]
    matrices, vectors = inverse.reshape(-1, size, size), weights.reshape(-1, size)
    least = torch.zeros_like(vectors) if curvature is None else 1.0 / curvature.reshape(-1, size)
    order = torch.empty(vectors.shape, dtype=torch.int64, device=vectors.device)
    losses = torch.empty_like(vectors)
    step = max(1, _CACHED // size**2)
    for low in range(0, len(vectors), step):
        part = slice(low, low + step)
        _trace_(matrices[part].clone(), vectors[part].clone(), least[part], order[part], losses[part])
    return Trace(order.reshape(weights.shape), losses.reshape(weights.shape))


def _trace_(inverse: Tensor, w: Tensor, least: Tensor, order: Tensor, losses: Tensor) -> None:
    rows = torch.arange(len(w), device=w.device)
    gone = torch.zeros_like(w, dtype=torch.bool)
    diagonal = inverse.diagonal(dim1=-2, dim2=-1)
    for step in range(w.shape[-1]):
        cost = (0.5 * w.square() / torch.maximum(diagonal, least)).masked_fill_(gone, torch.inf)
        losses[:, step], q = cost.min(-1)
        order[:, step] = q
        gone[rows, q] = True
        diagonal[rows, q] = torch.maximum(diagonal, least)[rows, q]
        w -= w[rows, q][:, None] * _eliminate_(inverse, rows, q)
        w.masked_fill_(gone, 0.0)
