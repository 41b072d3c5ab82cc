"""Every weight seen as (output units, kernel positions, input units), and back."""

from __future__ import annotations

from torch import Tensor

from secateur.types import Weight

# Shapes: O output units, K kernel positions, I input units of one group, G groups


def to_oki(weight: Weight, values: Tensor) -> Tensor:
    """Return ``values`` (of the weight's shape) as O×K×I: rows are output units, the last axis is the input.

    Input units come last because N:M and blocks run along them: "4 consecutive" means 4 consecutive inputs, for a
    convolution at the same kernel position.

    Args:
        weight: The layout.
        values: Scores or a mask.

    Returns:
        A tensor O×K×I; a copy where the layout asks for one.
    """
    if weight.transposed and weight.groups > 1:
        # (G·I, O/G, ...): the output unit g·O/G + o is fed by the inputs of group g only.
        per_group = weight.shape[weight.in_dim] // weight.groups
        values = values.reshape(weight.groups, per_group, *values.shape[1:])  # (G, I, O/G, ...)
        values = values.movedim(1, -1).flatten(0, 1)  # (O, ..., I)
    else:
        values = values.movedim((weight.out_dim, weight.in_dim), (0, -1))
    return values.reshape(values.shape[0], -1, values.shape[-1])


def from_oki(weight: Weight, values_OKI: Tensor) -> Tensor:
    """Undo :func:`to_oki`.

    Args:
        weight: The layout.
        values_OKI: Shape O×K×I.

    Returns:
        A contiguous tensor of the weight's shape.
    """
    kernel = [s for d, s in enumerate(weight.shape) if d not in (weight.out_dim, weight.in_dim)]
    values = values_OKI.reshape(values_OKI.shape[0], *kernel, values_OKI.shape[-1])
    if weight.transposed and weight.groups > 1:
        values = values.reshape(weight.groups, -1, *values.shape[1:]).movedim(-1, 1).flatten(0, 1)
    else:
        values = values.movedim((0, -1), (weight.out_dim, weight.in_dim))
    return values.contiguous()


def oki_shape(weight: Weight) -> tuple[int, int, int]:
    """Return (O, K, I) without touching data."""
    outputs, inputs = weight.shape[weight.out_dim], weight.shape[weight.in_dim]
    if weight.transposed and weight.groups > 1:
        outputs, inputs = outputs * weight.groups, inputs // weight.groups
    return outputs, weight.numel // max(outputs * inputs, 1), inputs
