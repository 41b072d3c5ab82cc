"""Attributes of PyTorch's own layers follow their weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from secateur.graph.changes import Edit

Sizes = dict[str, object]


def _conv(module: nn.Module, inputs: int | None) -> Sizes:
    assert isinstance(module, _ConvNd)
    shape = module.weight.shape
    if isinstance(module, _ConvTransposeNd):
        channels = shape[0]
        groups = module.groups
        if module.groups > 1 and module.in_channels // module.groups != 0 and channels != module.in_channels:
            per_group = module.in_channels // module.groups
            # One output per group: whole groups went.
            if module.out_channels == module.groups * shape[1] and per_group == 1:
                groups = channels
        return {"in_channels": channels, "out_channels": shape[1] * groups, "groups": groups}
    if module.groups == 1:
        return {"in_channels": shape[1], "out_channels": shape[0]}
    channels = module.in_channels if inputs is None else inputs
    return {"in_channels": channels, "out_channels": shape[0], "groups": channels // shape[1]}


def _linear(module: nn.Module, inputs: int | None) -> Sizes:
    assert isinstance(module, nn.Linear)
    return {"out_features": module.weight.shape[0], "in_features": module.weight.shape[1]}


def _norm(module: nn.Module, inputs: int | None) -> Sizes:
    tensor = getattr(module, "weight", None)
    tensor = getattr(module, "running_mean", None) if tensor is None else tensor
    size = tensor.shape[0] if isinstance(tensor, Tensor) else inputs
    return {} if size is None else {"num_features": size}


def _layer_norm(module: nn.Module, inputs: int | None) -> Sizes:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return {} if inputs is None else {"normalized_shape": (inputs,)}
    return {"normalized_shape": tuple(weight.shape)}


def _group_norm(module: nn.Module, inputs: int | None) -> Sizes:
    weight = getattr(module, "weight", None)
    size = weight.shape[0] if isinstance(weight, Tensor) else inputs
    return {} if size is None else {"num_channels": size}


def _embedding(module: nn.Module, inputs: int | None) -> Sizes:
    assert isinstance(module, nn.Embedding | nn.EmbeddingBag)
    return {"embedding_dim": module.weight.shape[1]}


def _rnn(module: nn.Module, inputs: int | None) -> Sizes:
    assert isinstance(module, nn.RNNBase)
    first, hidden = module.weight_ih_l0, module.weight_hh_l0
    assert isinstance(first, Tensor)
    assert isinstance(hidden, Tensor)
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    out: Sizes = {"input_size": first.shape[1], "hidden_size": first.shape[0] // gates}
    if module.proj_size:
        out["proj_size"] = hidden.shape[1]
    return out


def _rnn_cell(module: nn.Module, inputs: int | None) -> Sizes:
    assert isinstance(module, nn.RNNCellBase)
    return {"input_size": module.weight_ih.shape[1], "hidden_size": module.weight_hh.shape[1]}


def _prelu(module: nn.Module, inputs: int | None) -> Sizes:
    assert isinstance(module, nn.PReLU)
    return {"num_parameters": module.weight.shape[0]}


def _attention(module: nn.Module, inputs: int | None) -> Sizes:
    assert isinstance(module, nn.MultiheadAttention)
    out: Sizes = {"embed_dim": module.out_proj.weight.shape[0]}
    if module.in_proj_weight is not None:
        inner = module.in_proj_weight.shape[0] // 3
        out |= {"kdim": module.in_proj_weight.shape[1], "vdim": module.in_proj_weight.shape[1]}
    else:
        inner = module.q_proj_weight.shape[0]
        out |= {"kdim": module.k_proj_weight.shape[1], "vdim": module.v_proj_weight.shape[1]}
    out["num_heads"] = inner // module.head_dim
    return out


_FOLLOWS: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], Callable[[nn.Module, int | None], Sizes]], ...] = (
    (_ConvNd, _conv),
    (nn.Linear, _linear),
    (_NormBase, _norm),
    ((nn.LayerNorm, nn.RMSNorm), _layer_norm),
    (nn.GroupNorm, _group_norm),
    ((nn.Embedding, nn.EmbeddingBag), _embedding),
    (nn.RNNBase, _rnn),
    (nn.RNNCellBase, _rnn_cell),
    (nn.PReLU, _prelu),
    (nn.MultiheadAttention, _attention),
)


def native_edits(model: nn.Module, inputs: Mapping[str, int]) -> list[Edit]:
    """Return the attribute changes that bring PyTorch's layers in line with their sliced weights.

    Args:
        model: With sliced weights.
        inputs: Input channels after pruning, by module name, where the forward showed them.
    """
    edits = []
    for name, module in model.named_modules():
        for kind, sizes in _FOLLOWS:
            if isinstance(module, kind):
                for attribute, new in sizes(module, inputs.get(name)).items():
                    old = getattr(module, attribute, new)
                    if old != new:
                        edits.append(Edit(name, attribute, old, new))
                break
    return edits
