"""Operators that treat every element alike."""

from __future__ import annotations

import numpy as np

from secateur.graph.axes import Axes, Part
from secateur.graph.calls import Call
from secateur.graph.rules._registry import elementwise, rule

rule(
    "clamp", "clamp_min", "clamp_max", "masked_fill", "copy", "dropout", "addcmul", "addcdiv", "lerp", "prelu",
    "_prelu_kernel", "rrelu_with_noise", "threshold", "hardtanh", "leaky_relu", "elu", "celu", "selu", "gelu", "silu",
    "mish", "hardswish", "hardsigmoid", "softplus", "softshrink", "hardshrink", "log_sigmoid_forward", "relu6",
    "logit", "nan_to_num", "bitwise_not", "isnan", "isinf", "isfinite", "pow", "add", "mul", "sub", "div", "rsub",
    "floor_divide",
    "maximum", "minimum", "sigmoid", "tanh", "sqrt", "rsqrt", "exp", "neg", "abs", "square", "softmax_backward",
)(elementwise)  # fmt: skip


@rule(
    "clone", "_to_copy", "contiguous", "alias", "detach", "lift_fresh", "lift_fresh_copy", "positive", "view_dtype",
    "bernoulli", "native_dropout", "fill", "zero", "zeros_like", "ones_like", "full_like", "empty_like", "_conj",
    "conj_physical", "resolve_conj", "_pin_memory", "data", "to", "_fw_primal", "set_data", "requires_grad",
)  # fmt: skip
def same(call: Call) -> None:
    """The results have the labels of the first argument."""
    axes = call.axes(call.first)
    for out in call.outputs():
        if tuple(out.shape) == axes.shape:
            call.put(out, axes)
        else:
            call.put_fixed([out])


@rule("where")
def where(call: Call) -> None:
    """Pick elementwise; with a condition alone, the places where it holds."""
    if "self" in call.args:
        elementwise(call)
    else:
        call.freeze()


@rule("rand_like", "randn_like", "randint_like", "normal", "uniform", "exponential", "random", "cauchy", "log_normal")
def noise(call: Call) -> None:
    """Noise differs at every index and run: fixed."""
    call.ledger.freeze_all(call.axes(call.first))
    call.put_fixed(call.outputs())


@rule("glu")
def glu(call: Call) -> None:
    """The two halves of a dimension are multiplied index by index."""
    axes = call.axes(call.first)
    dim = call["dim"] % len(axes.shape)
    labels = call.ledger.plain(axes, dim)
    parts = [p for p in axes.parts if dim not in p.dims]
    if labels is not None:
        parts.append(Part([dim], call.ledger.equal_parts(labels, 2)))
    call.put(call.result, Axes(call.result.shape, parts))


@rule("flip")
def flip(call: Call) -> None:
    """A reversed dimension has reversed labels."""
    axes = call.axes(call.first)
    parts = []
    for part in axes.parts:
        labels = part.labels
        for dim in {d % len(axes.shape) for d in call["dims"]} & set(part.dims):
            labels = np.flip(labels, part.dims.index(dim))
        parts.append(Part(part.dims, labels))
    call.put(call.result, Axes(axes.shape, parts))


def order_matters(call: Call, dims: list[int]) -> None:
    """The result depends on the position along some dimensions: they are fixed, the others pass."""
    axes = call.axes(call.first)
    for dim in dims:
        call.ledger.drop(axes, dim % max(len(axes.shape), 1))
    for out in call.outputs():
        call.put(out, Axes(out.shape, axes.parts if tuple(out.shape) == axes.shape else ()))


@rule("roll")
def roll(call: Call) -> None:
    """Shifted by a fixed number of places."""
    dims = list(call["dims"]) or list(range(call.first.dim()))
    order_matters(call, dims)


@rule("cumsum", "_softmax", "softmax", "_safe_softmax")
def shares(call: Call) -> None:
    """Every result along one dimension depends on others, but not on those that have no share: experts not chosen."""
    axes = call.axes(call.first)
    if axes.shape:
        call.ledger.contest(axes, call["dim"] % len(axes.shape))
    call.put(call.result, Axes(call.result.shape, axes.parts))


@rule("cumprod", "cummax", "cummin", "logcumsumexp", "sort", "argsort", "_log_softmax", "log_softmax")
def along_one(call: Call) -> None:
    """Every result along one dimension depends on all or on the earlier inputs."""
    dim = call["dim"]
    order_matters(call, [-1 if dim is None else dim])


@rule("triu", "tril")
def triangle(call: Call) -> None:
    """Row against column index."""
    order_matters(call, [-1, -2])


@rule("_fft_r2c", "_fft_c2r", "_fft_c2c")
def fft(call: Call) -> None:
    """Every frequency depends on all inputs along the transformed dimensions."""
    dims = [d % call.first.dim() for d in call["dim"]]
    axes = call.axes(call.first)
    for dim in dims:
        call.ledger.drop(axes, dim)
    call.put(call.result, Axes(call.result.shape, axes.parts))


@rule("complex", "polar")
def complex_of(call: Call) -> None:
    """Two real tensors make a complex one."""
    elementwise(call)


@rule("view_as_real")
def view_as_real(call: Call) -> None:
    """A last dimension of size 2 is added."""
    axes = call.axes(call.first)
    call.put(call.result, Axes(call.result.shape, axes.parts))


@rule("view_as_complex", "real", "imag")
def view_as_complex(call: Call) -> None:
    """The last dimension of size 2 goes."""
    axes = call.axes(call.first)
    if len(axes.shape) > call.result.dim():
        call.ledger.drop(axes, len(axes.shape) - 1)
    call.put(call.result, Axes(call.result.shape, axes.parts))
