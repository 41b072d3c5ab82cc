"""How much of an all-ones signal flows through each weight: no data, no labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from secateur.errors import MissingStatsError
from secateur.forward import attention_fast_path, undisturbed
from secateur.stats._common import refuse_inference, refuse_nothing
from secateur.types import Source

_SCALES = (1.0, 1e-150, 1e-300)


@dataclass(frozen=True)
class SynapticFlow:
    r"""Share of the synaptic flow that passes through each weight.

    .. math:: R = \mathbf 1^\top f(\mathbf 1; |w|), \qquad s_i = \frac1R \left| \frac{\partial R}{\partial |w_i|}
              \right| |w_i|

    in float64, on a copy of the weights: absolute values, biases zero, batch norms reduced to the size of their scales
    (mean 0, variance 1), the input all ones. For layers of linear maps and ReLUs the shares of every layer that all
    paths cross add up to 1, and what flows into a unit flows out of it; that is why a layer cannot be emptied before
    the others when weights go in many small rounds. Deep networks overflow even float64: both ends of the signal are
    then scaled down, which the division by :math:`R` takes out again.

    Inputs of whole numbers (tokens) are kept as they are. Layers that are not linear in the size of their input (layer
    norm, attention, sigmoids) break the conservation, and a layer norm lets nothing of a constant input through.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> with torch.no_grad():
        ...     _ = net.weight.copy_(torch.tensor([[1.0, -3.0]]))
        >>> source = Source(net, {"weight": net.weight}, example_inputs=(torch.zeros(1, 2),))
        >>> SynapticFlow().collect(source)["weight"].tolist()
        [[0.25, 0.75]]
    """

    @property
    def uses(self) -> frozenset[str]:
        """The inputs' shape."""
        return frozenset({"example_inputs"})

    @property
    def elementwise(self) -> bool:
        """Each weight has a number of its own."""
        return True

    def collect(self, source: Source) -> dict[str, Tensor]:
        """Send the signal through, and differentiate.

        Raises:
            MissingStatsError: When nothing flows, or more than float64 can hold.
        """
        if source.example_inputs is None:
            raise MissingStatsError(f"{self} needs example_inputs=(x,), what one forward pass takes")
        refuse_inference(self)
        tensors = _positive(source.model)
        wanted = {n: tensors[n].requires_grad_(True) for n in source.parameters}
        with undisturbed(source.model), attention_fast_path(enabled=False), torch.enable_grad():
            for scale in _SCALES:
                flow = _flow(source, tensors, scale)
                found = (
                    torch.autograd.grad(flow, list(wanted.values()), allow_unused=True) if flow.requires_grad else ()
                )
                if bool(torch.isfinite(flow)) and all(g is None or bool(torch.isfinite(g).all()) for g in found):
                    break
            else:
                raise MissingStatsError(
                    f"{self}: more flows than float64 can hold, whatever the input; the weights are too large"
                )
        total = float(flow.detach())
        out = {
            n: torch.zeros_like(w) if g is None else (g * w.detach()).abs() / total if total else torch.zeros_like(w)
            for (n, w), g in zip(wanted.items(), found or [None] * len(wanted), strict=True)
        }
        out = {n: value.detach() for n, value in out.items()}
        refuse_nothing(
            self, out, "no path of non-zero weights leads from the inputs to the outputs, or a norm takes the mean off"
        )
        return out


def _positive(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's tensors in float64: sizes of weights, no biases, batch norms that change nothing but scale."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        if value.is_floating_point():
            # "bias" ends the names of what is added: norms, recurrent layers (bias_ih), attention (in_proj_bias)
            added = "bias" in name.rpartition(".")[2]
            value = torch.zeros_like(value, dtype=torch.float64) if added else value.double().abs()
        tensors[name] = value
    for name, buffer in model.named_buffers():
        tensors[name] = buffer.double() if buffer.is_floating_point() else buffer
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            dot = f"{path}." if path else ""
            tensors[f"{dot}running_mean"] = torch.zeros_like(tensors[f"{dot}running_mean"])
            tensors[f"{dot}running_var"] = torch.full_like(tensors[f"{dot}running_var"], 1.0 - module.eps)
    return tensors


def _flow(source: Source, tensors: Mapping[str, Tensor], scale: float) -> Tensor:
    def ones(leaf: Any) -> Any:
        floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return torch.full_like(leaf, scale, dtype=torch.float64) if floating else leaf

    inputs = tree_map(ones, source.example_inputs)
    args, kwargs = _arguments(inputs)
    out = functional_call(source.model, dict(tensors), args, kwargs)
    found = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()]
    if not found:
        raise MissingStatsError("synaptic flow: the model returns no tensor of floating point numbers")
    return torch.stack([t.double().sum() for t in found]).sum() * scale


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, dict):
        return (), inputs
    if isinstance(inputs, tuple) and len(inputs) == 2 and isinstance(inputs[0], tuple) and isinstance(inputs[1], dict):
        return inputs[0], inputs[1]
    return (tuple(inputs), {}) if isinstance(inputs, tuple | list) else ((inputs,), {})
