"""torch's own multi-head attention with linear layers for its projections, whose weights it keeps to itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.sparse.known import hooked
from secateur.sparse.watch import Example, answers

Groups = tuple[str, ...]
"""Which of queries, keys and values one product makes: ``("qkv",)``, ``("q", "kv")`` or ``("q", "k", "v")``."""

_ACTIVATIONS: dict[Any, type[nn.Module]] = {F.relu: nn.ReLU, F.gelu: nn.GELU}


class Attention(nn.Module):
    r"""Multi-head attention, :math:`\mathrm{softmax}(Q K^T / \sqrt{d} + M) V` in every head, for inference.

    Takes and returns what :class:`torch.nn.MultiheadAttention` does. Queries, keys and values that are made of the same
    tensor are one product.

    Attributes:
        groups: Which of them; each is a linear layer of that name.
        out_proj: Of all heads' results.
        embed_dim: Features of the output.
        num_heads: Heads.
        batch_first: Whether batches come before positions.
    """

    # What torch's layers look at.
    in_proj_weight = None
    in_proj_bias = None
    _qkv_same_embed_dim = True

    def __init__(self, module: nn.MultiheadAttention, groups: Groups) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.batch_first = module.embed_dim, module.num_heads, module.batch_first
        self.groups = groups
        weights, biases = _projections(module)
        for group in groups:
            weight = torch.cat([weights[name] for name in group])
            self.add_module(group, _linear(weight, torch.cat([biases[name] for name in group]) if biases else None))
        self.out_proj = _linear(module.out_proj.weight, module.out_proj.bias)
        self.eval()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output, shaped as the queries, and the weights of the keys where they are needed.

        Args:
            query: ``[positions, features]``, or ``[batch, positions, features]`` (``batch_first``) or
                ``[positions, batch, features]``.
            key: In the same order.
            value: In the same order.
            key_padding_mask: ``[batch, keys]`` or ``[keys]``; True, or a number to add to scores.
            need_weights: Return the weights, too.
            attn_mask: ``[positions, keys]`` or ``[batch * heads, positions, keys]``, likewise.
            average_attn_weights: Return the mean over heads.
            is_causal: A hint that nothing here needs: the mask says it.

        Raises:
            RuntimeError: When the hint comes without a mask, or a mask has another shape or dtype, as in torch.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("need attn_mask if specifying the is_causal hint")
        q, k, v = (self._heads(part, query.dim()) for part in self._projected(query, key, value))
        mask = _merged(attn_mask, key_padding_mask, q, k)
        weights: Tensor | None = None
        if need_weights:
            scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            out = weights @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask)
        out = out.transpose(1, 2).flatten(2)
        if query.dim() == 2:
            out = out.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights.squeeze(0) if query.dim() == 2 else weights
        return self.out_proj(out), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        given, out = {"q": query, "k": key, "v": value}, []
        for group in self.groups:
            layer, source, parts = self.get_submodule(group), None, ()
            for i, name in enumerate(group):
                if source is None or given[name] is not source:  # right for other tensors than in the example, too
                    source = given[name]
                    parts = layer(source).chunk(len(group), -1)
                out.append(parts[i])
        return out

    def _heads(self, x: Tensor, dimensions: int) -> Tensor:
        """Return ``[batch, heads, positions, features of a head]``."""
        if dimensions == 2:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # type: ignore[no-untyped-call, no-any-return]


class Encoder(nn.TransformerEncoder):
    """torch's encoder, without its nested tensors, which no layer but its own takes.

    With them, positions behind the end of a shorter sequence come out as zeros, without gradients; so they do here.

    Attributes:
        nests: Whether torch's would make them.
    """

    nests: bool

    @classmethod
    def of(cls, module: nn.TransformerEncoder) -> Encoder:
        """Return an encoder that shares everything with torch's."""
        encoder = cls.__new__(cls)
        encoder.__dict__ = module.__dict__ | {"nests": bool(getattr(module, "use_nested_tensor", False))}
        return encoder

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Return what torch's encoder does; the mask says whether it is causal."""
        out = src
        for layer in self.layers:
            out = layer(out, src_mask=mask, src_key_padding_mask=src_key_padding_mask)
        if src_key_padding_mask is not None and mask is None and self._nests(src):
            beyond = src_key_padding_mask != 0
            if bool((beyond[:, :-1] <= beyond[:, 1:]).all()):
                out = out.masked_fill(beyond.unsqueeze(-1), 0.0)
        return out if self.norm is None else self.norm(out)

    def _nests(self, x: Tensor) -> bool:
        """Whether torch's encoder would make nested tensors of sequences of several lengths."""
        return self.nests and x.dim() == 3 and not torch.compiler.is_compiling() and not torch.is_autocast_enabled()


def plain_attention(model: nn.Module, example: Example) -> nn.Module:
    """Return a model with its multi-head attentions, and the encoders around them, replaced by those above.

    A model that looks at what is inside an attention keeps it.
    """
    if not any(isinstance(module, nn.MultiheadAttention) for module in model.modules()):
        return model
    found = _groups(model, example.args, example.kwargs)
    for groups in (found, {}) if found else ({},):
        new, changed = example.kept(model, partial(_changed, model, groups))
        if changed:
            return new
    return model


def _changed(model: nn.Module, groups: Mapping[nn.Module, Groups], undo: list[Callable[[], None]]) -> nn.Module:
    return _Change(groups, undo).of(model)


class _Change:
    """Modules that take the place of others, and how to go back."""

    def __init__(self, groups: Mapping[nn.Module, Groups], undo: list[Callable[[], None]]) -> None:
        self.groups = groups
        self.undo = undo
        self._done: dict[nn.Module, nn.Module] = {}

    def of(self, module: nn.Module) -> nn.Module:
        """Return what takes a module's place, its children replaced: mostly itself."""
        if module not in self._done:
            self._done[module] = module  # in a circle
            for name, child in list(module._modules.items()):
                if child is not None:
                    self.undo.append(partial(module._modules.__setitem__, name, child))
                    module._modules[name] = self.of(child)
            self._done[module] = self._alone(module)
        return self._done[module]

    def _alone(self, module: nn.Module) -> nn.Module:
        if module in self.groups:
            assert isinstance(module, nn.MultiheadAttention)
            return Attention(module, self.groups[module])
        if isinstance(module, nn.TransformerEncoder) and type(module).forward is nn.TransformerEncoder.forward:
            return Encoder.of(module)
        if isinstance(module, nn.TransformerEncoderLayer):
            # What torch's layers ask for before they call one function with all weights, instead of their modules.
            asked = "activation_relu_or_gelu"
            if asked in module.__dict__:
                self.undo.append(partial(setattr, module, asked, module.__dict__[asked]))
                setattr(module, asked, 0)
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            kind = _ACTIVATIONS.get(module.activation)
            if kind is not None:  # as a module, which a layer can take in
                self.undo.append(partial(_as_function, module, module.activation))
                module.activation = kind()
        return module


def _as_function(layer: nn.Module, activation: Any) -> None:
    del layer.activation
    layer.activation = activation


def _groups(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mapping[nn.Module, Groups]:
    """Return how the projections of each attention go together, from what one forward pass gives it."""
    found: dict[nn.Module, Groups] = {}

    def before(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = dict(zip(("query", "key", "value"), inputs, strict=False)) | named
        together = given["key"] is given["value"] and _alike(module)
        groups: Groups = ("q", "k", "v")
        if together:
            groups = ("qkv",) if given["query"] is given["key"] else ("q", "kv")
        found[module] = groups if found.get(module, groups) == groups else ("q", "k", "v")

    modules = [m for m in model.modules() if _replaceable(m)]
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        answers(model, args, kwargs)
    return found


def _replaceable(module: nn.Module) -> bool:
    if type(module) is not nn.MultiheadAttention or hooked(module):
        return False
    return module.bias_k is None and module.bias_v is None and not module.add_zero_attn


def _alike(module: nn.Module) -> bool:
    return bool(module._qkv_same_embed_dim)


def _projections(module: nn.MultiheadAttention) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights, and the biases if there are any, of queries, keys and values."""
    if _alike(module):
        weights = module.in_proj_weight.chunk(3)
    else:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    biases = {} if module.in_proj_bias is None else dict(zip("qkv", module.in_proj_bias.chunk(3), strict=True))
    return dict(zip("qkv", weights, strict=True)), biases


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def _merged(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Return what is added to the scores ``[batch, heads, queries, keys]``, for both masks."""
    batch, heads, keys = q.shape[0], q.shape[1], k.shape[2]
    masks = []
    if attn_mask is not None:
        if attn_mask.shape not in ((q.shape[2], keys), (batch * heads, q.shape[2], keys)):
            raise RuntimeError(
                f"attn_mask must have shape {(q.shape[2], keys)} or {(batch * heads, q.shape[2], keys)}, got "
                f"{tuple(attn_mask.shape)}"
            )
        mask = _additive(attn_mask, q)
        masks.append(mask if mask.dim() == 2 else mask.view(batch, heads, *mask.shape[1:]))
    if key_padding_mask is not None:
        if key_padding_mask.shape not in ((batch, keys), (keys,)) or (key_padding_mask.dim() == 1 and batch > 1):
            raise RuntimeError(f"key_padding_mask must have shape {(batch, keys)}, got {tuple(key_padding_mask.shape)}")
        masks.append(_additive(key_padding_mask, q).view(batch, 1, 1, keys))
    return masks[0] + masks[1] if len(masks) == 2 else masks[0] if masks else None


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise RuntimeError(f"masks of attention are of bool or floats, got {mask.dtype}")
    return torch.zeros(mask.shape, dtype=like.dtype).masked_fill_(mask, -math.inf)
