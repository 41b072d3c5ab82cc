"""Second derivatives of the loss: two diagonals of its Hessian, and its product with the gradient."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import jacrev, vjp, vmap

from secateur.errors import MissingStatsError, TargetError, check_choice, check_number
from secateur.stats._common import (
    LossFn,
    OfWeights,
    averaged,
    check_count,
    data_of,
    loss_of,
    refuse_infinite,
    refuse_nothing,
    wide,
)
from secateur.stats.gradients import collect_gradients
from secateur.stats.per_sample import Samples, check_apart, over_samples
from secateur.types import Source, Tensors

Negatives = Literal["clamp", "keep"]


@contextmanager
def _output_through(
    who: object, model: nn.Module, act: Callable[[Tensor], Tensor], calls: list[Tensor] | None = None, hint: str = ""
) -> Iterator[None]:
    """Change what the model returns, on its way into the loss."""

    def hook(module: nn.Module, args: Any, out: Any) -> Tensor:
        if not isinstance(out, Tensor):
            raise MissingStatsError(
                f"{who} looks at what the model returns, which must be one tensor, and is a {type(out).__name__}; wrap "
                f"the model in a module that returns its logits{hint}"
            )
        if calls is not None:
            calls.append(out)
        return act(out)

    handle = model.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class GaussNewtonDiagonal(OfWeights):
    r"""Diagonal of the generalised Gauss-Newton matrix, exact: one backward pass per output and sample.

    With :math:`z_n` the model's outputs for sample :math:`n`, :math:`J_n = \partial z_n / \partial w` and :math:`H_n =
    \partial^2 L_n / \partial z_n^2`:

    .. math:: G_{ii} = \tfrac1N \sum_n (J_n^\top H_n J_n)_{ii} = \tfrac1N \sum_n \sum_c (J_n^\top s_{n,c})_i^2,
              \qquad H_n = \sum_c s_{n,c} s_{n,c}^\top

    It is the Hessian's diagonal without the curvature of the network itself: never negative, and equal to it where the
    network is linear in its weights or fits its data. :math:`H_n` is differentiated from the loss, whichever it is:
    :math:`\mathrm{diag}(p) - p p^\top` for cross-entropy, :math:`2 I / C` for the mean squared error over :math:`C`
    outputs. No labels are sampled.

    The loss must look at the model through the one tensor that it returns, once, and be convex in it. Costs as many
    backward passes per sample as there are outputs; for language models sample labels or use ``FisherDiagonal``.

    Args:
        chunk: Samples at once; memory for ``chunk`` times outputs times parameters.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> data = [(torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1))]
        >>> def loss_fn(model, batch):
        ...     return (model(batch[0]) - batch[1]).square().mean() / 2
        >>> source = Source(net, dict(net.named_parameters()), loss_fn, lambda: data)
        >>> GaussNewtonDiagonal().collect(source)["weight"].tolist()  # (1 + 9) / 2
        [[5.0]]
    """

    chunk: int = 8

    def __post_init__(self) -> None:
        check_count("gauss_newton: chunk", self.chunk)

    def collect(self, source: Source) -> dict[str, Tensor]:
        """Average over all samples.

        Raises:
            MissingStatsError: When the loss is not convex in the outputs, not a mean over samples, or does not look
                at one tensor of outputs.
        """
        out = averaged(self, source, lambda *given: self._add(source, *given))
        refuse_nothing(self, out, "the outputs depend on none of them, or the loss is linear in the outputs")
        return out

    def _add(self, source: Source, sums: dict[str, Tensor], loss_fn: LossFn, batch: Any, index: int) -> int:
        samples = Samples(self, batch)
        loss_of(loss_fn, source.model, batch, index)
        if index == 0:
            check_apart(self, loss_fn, source.model, samples)
        way_out = 'diagonal = "fisher" with per_sample = "loop" goes sample by sample'
        build = self._build(source, loss_fn)
        for squares, values in over_samples(self, source, samples, self.chunk, build, way_out=way_out):
            self._check_convex(values, min(p.dtype.itemsize for p in source.parameters.values()))
            for name, square in squares.items():
                sums[name] += square.sum(0)
        return samples.count

    def _build(self, source: Source, loss_fn: LossFn) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def build(run: Callable[..., Any]) -> Callable[..., tuple[Tensors, Tensor]]:
            def one(parameters: Tensors, *tensors: Tensor) -> tuple[Tensors, Tensor]:
                outputs: list[Tensor] = []

                def forward(p: Tensors) -> Tensor:
                    outputs.clear()
                    with _output_through(self, source.model, lambda z: z, outputs):
                        run(loss_fn, p, *tensors)
                    if len(outputs) != 1:
                        raise MissingStatsError(
                            f"{self}: the loss must run the model once, and ran it {len(outputs)} times"
                        )
                    return outputs[0]

                def loss_of_outputs(z: Tensor) -> Tensor:
                    with _output_through(self, source.model, lambda _: z):
                        value: Tensor = run(loss_fn, parameters, *tensors)
                    return value.reshape(())

                z, back = vjp(forward, parameters)[:2]
                curvature = jacrev(jacrev(loss_of_outputs))(z.detach()).reshape(z.numel(), z.numel())
                curvature = curvature.to(wide(z.dtype))
                sound = torch.isfinite(curvature).all()
                values, vectors = torch.linalg.eigh(curvature.nan_to_num(0.0, 0.0, 0.0))
                values = torch.where(sound, values, torch.nan)
                columns = (vectors * values.clamp_min(0).sqrt()).T.reshape(-1, *z.shape).to(z.dtype)
                (gradients,) = vmap(back)(columns)
                return {n: g.square().sum(0) for n, g in gradients.items()}, values

            return one

        return build

    def _check_convex(self, values: Tensor, itemsize: int) -> None:
        refuse_infinite(f"{self}: the loss's second derivative by the outputs", values)
        least, most = float(values.min()), float(values.abs().max())
        if least < -(3e-2 if itemsize == 2 else 1e-4) * most:  # below that it is rounding
            raise MissingStatsError(
                f"{self}: the loss is not convex in the model's outputs (a second derivative of {least:.3g} beside "
                f'{most:.3g}), so this is no Gauss-Newton matrix; use diagonal = "fisher" or "hutchinson"'
            )


@dataclass(frozen=True)
class HutchinsonDiagonal(OfWeights):
    r"""Diagonal of the loss's Hessian, estimated from products with random signs.

    .. math:: \hat h = \frac1{B S} \sum_{b=1}^{B} \sum_{s=1}^{S} v_{b,s} \odot H_b v_{b,s}, \qquad
              v \in \{-1, 1\}^d \text{ uniformly}

    Unbiased; exact at once where the Hessian is diagonal, otherwise its error falls with the root of the number of
    products, ``samples`` for each batch. Away from a minimum the true diagonal may be negative, and where it is small
    the estimate may: ``clamp`` takes such weights for free to go.

    Args:
        samples: :math:`S`, products per batch.
        seed: Seed of the signs.
        negatives: What becomes of negative estimates: ``"clamp"`` to zero, or ``"keep"``.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> source = Source(net, dict(net.named_parameters()), lambda m, x: (m.weight * x).square().sum() / 2,
        ...     lambda: [torch.tensor([1.0, 2.0])])
        >>> HutchinsonDiagonal(samples=1).collect(source)["weight"].tolist()
        [[1.0, 4.0]]

    References:
        Costas Bekas, Effrosyni Kokiopoulou, Yousef Saad, An estimator for the diagonal of a matrix, 2007.
    """

    samples: int = 16
    seed: int = 0
    negatives: Negatives = "clamp"

    def __post_init__(self) -> None:
        check_count("hutchinson: samples", self.samples)
        check_choice("hutchinson: negatives", self.negatives, get_args(Negatives))

    def collect(self, source: Source) -> dict[str, Tensor]:
        """Average over batches and draws.

        Raises:
            MissingStatsError: When the loss cannot be differentiated twice, or has no curvature at all.
        """
        out = averaged(self, source, lambda *given: self._add(source, *given))
        refuse_nothing(self, out, "the loss has no second derivative by any of them (a piecewise linear network)")
        if self.negatives == "clamp":
            out = {name: value.clamp_min_(0) for name, value in out.items()}
            refuse_nothing(self, out, "all estimates are negative, and so clamped: the weights are at no minimum")
        return out

    def _add(self, source: Source, sums: dict[str, Tensor], loss_fn: LossFn, batch: Any, index: int) -> int:
        gradients = _first(self, loss_of(loss_fn, source.model, batch, index), source.parameters)
        for draw in range(self.samples):
            signs = {n: self._signs(n, index, draw, p) for n, p in source.parameters.items()}
            for name, product in _second(self, gradients, signs, source.parameters).items():
                sums[name] += signs[name] * product
        return self.samples

    def _signs(self, name: str, batch: int, draw: int, like: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{name}/{batch}/{draw}".encode()))
        signs = torch.randint(0, 2, tuple(like.shape), generator=generator, device="cpu") * 2 - 1
        return signs.to(like)


@dataclass(frozen=True)
class HessianGradient(OfWeights):
    r"""The Hessian of the mean loss times its own gradient, by differentiating twice.

    .. math:: H g = \tfrac1B \sum_b \nabla_w \bigl( \nabla_w L_b \cdot \mathrm{stop}(g) \bigr), \qquad
              g = \tfrac1B \sum_b \nabla_w L_b

    The gradient is averaged over all batches first, so two passes are taken: the mean of products of single batches
    would be another quantity. With a ``temperature`` :math:`T` the loss sees :math:`z / T` for the model's outputs
    :math:`z`; that means something where they are logits.

    Args:
        temperature: :math:`T`, above 0.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = net.weight.copy_(torch.tensor([[1.0, 1.0]]))
        >>> source = Source(net, dict(net.named_parameters()), lambda m, x: (m.weight * x).square().sum() / 2,
        ...     lambda: [torch.tensor([1.0, 2.0])])
        >>> HessianGradient().collect(source)["weight"].tolist()  # H = diag(1, 4), g = (1, 4)
        [[1.0, 16.0]]
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_number("hessian gradient: temperature", self.temperature, above=True, error=TargetError)

    def collect(self, source: Source) -> dict[str, Tensor]:
        """Take both passes.

        Raises:
            MissingStatsError: When the loss cannot be differentiated twice, or the product is zero everywhere.
        """
        loss_fn, batches = data_of(self, source)
        with self._cooled(source.model):
            (mean,) = collect_gradients(
                source.model, source.parameters, loss_fn, batches(), needs=["gradient"]
            ).values()

            def add(sums: dict[str, Tensor], loss_fn: LossFn, batch: Any, index: int) -> int:
                gradients = _first(self, loss_of(loss_fn, source.model, batch, index), source.parameters)
                for name, product in _second(self, gradients, mean, source.parameters).items():
                    sums[name] += product
                return 1

            out = averaged(self, source, add)
        refuse_nothing(self, out, "the loss is linear in the weights here (a piecewise linear network and loss)")
        return out

    @contextmanager
    def _cooled(self, model: nn.Module) -> Iterator[None]:
        if self.temperature == 1.0:
            yield
            return
        runs = 0

        def cool(z: Tensor) -> Tensor:
            nonlocal runs
            runs += 1
            return z / self.temperature

        with _output_through(self, model, cool, hint=", or set the temperature to 1"):
            yield
        if not runs:
            raise MissingStatsError(
                f"{self} divides what the model returns, and the loss never ran the model itself (it ran parts of it): "
                "call model(...) in loss_fn, or set the temperature to 1"
            )


def _first(who: object, loss: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return gradients that can be differentiated again; those that cannot depend on the weights no more."""
    # A seed that wants a gradient makes functions that are differentiable only once leave a mark in the graph; without
    # one they pass for constants, and the second derivative comes out wrong in silence.
    seed = torch.ones_like(loss).requires_grad_()
    found = torch.autograd.grad(loss, list(parameters.values()), seed, create_graph=True, allow_unused=True)
    _check_twice(who, [g for g in found if g is not None])
    return {n: g for n, g in zip(parameters, found, strict=True) if g is not None and g.requires_grad}


def _check_twice(who: object, gradients: list[Tensor]) -> None:
    left = [g.grad_fn for g in gradients]
    seen = set()
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::Error":
            raise MissingStatsError(
                f"{who}: this loss cannot be differentiated twice: a function of your own is marked once_differentiable"
            )
        left.extend(parent for parent, _ in node.next_functions)


def _second(
    who: object, gradients: Mapping[str, Tensor], along: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the Hessian times a vector."""
    if not gradients:
        return {}
    product = torch.stack([(g * along[n].to(g)).sum() for n, g in gradients.items()]).sum()
    try:
        found = torch.autograd.grad(product, list(parameters.values()), retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        raise MissingStatsError(
            f"{who}: this loss cannot be differentiated twice ({str(error).strip().splitlines()[0]}); a fused kernel "
            "without a second derivative is in the way, or a function of your own"
        ) from error
    return {n: g for n, g in zip(parameters, found, strict=True) if g is not None}
