"""torch's attention and its encoders, compiled: the same answers for every mask, and projections in the kernels."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.sparse import SparseLinear, compile, load, reason, save
from secateur.sparse.attention import Attention, Encoder, plain_attention
from secateur.sparse.watch import Example
from sparse_models import answers, close, pruned

pytestmark = [
    pytest.mark.skipif(bool(reason()), reason=reason()),
    pytest.mark.usefixtures("sparse_wins"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
]

PADDED = torch.arange(7).expand(3, 7) >= torch.tensor([[7], [4], [2]])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(7)


def layers_of(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, SparseLinear)}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_attention_is_torchs_for_all_masks_and_orders(batch_first: bool, bias: bool) -> None:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(24, 3, batch_first=batch_first, bias=bias).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = Attention(theirs, ("qkv",))
    many = torch.randn(3, 7, 24) if batch_first else torch.randn(7, 3, 24)
    bools, floats = torch.rand(7, 7) > 0.6, torch.randn(7, 7)
    bools[:, 0] = False  # a query that may look at nothing is NaN in some of torch's ways, and zero in others
    of_heads = torch.randn(9, 7, 7)
    for mask, padding, weights, average in itertools.product(
        (None, bools, floats, of_heads), (None, PADDED, torch.randn(3, 7)), (True, False), (True, False)
    ):
        if mask is not None and padding is not None and mask.dtype != padding.dtype:
            continue  # torch only warns
        how = {"key_padding_mask": padding, "attn_mask": mask, "need_weights": weights, "average_attn_weights": average}
        for given in ((many, many, many), (many, many + 1, many - 1)):
            with torch.no_grad():
                found, expected = ours(*given, **how), theirs(*given, **how)
            close(found, expected)
    one = torch.randn(7, 24)
    with torch.no_grad():
        close(ours(one, one, one, attn_mask=floats), theirs(one, one, one, attn_mask=floats))
        close(
            ours(one, one, one, attn_mask=CAUSAL, is_causal=True, need_weights=False),
            theirs(one, one, one, attn_mask=CAUSAL, is_causal=True, need_weights=False),
        )


def test_masks_that_do_not_fit_are_refused() -> None:
    ours, x = Attention(nn.MultiheadAttention(8, 2, batch_first=True), ("qkv",)), torch.randn(2, 5, 8)
    with pytest.raises(RuntimeError, match="need attn_mask"):
        ours(x, x, x, is_causal=True)
    with pytest.raises(RuntimeError, match=r"attn_mask must have shape \(5, 5\) or \(4, 5, 5\), got \(1, 5\)"):
        ours(x, x, x, attn_mask=torch.zeros(1, 5))
    with pytest.raises(RuntimeError, match=r"bool or floats, got torch\.int64"):
        ours(x, x, x, attn_mask=torch.zeros(5, 5, dtype=torch.int64))
    for shape in ((1, 5), (5, 2), (10,)):
        with pytest.raises(RuntimeError, match=r"key_padding_mask must have shape \(2, 5\)"):
            ours(x, x, x, key_padding_mask=torch.zeros(shape, dtype=torch.bool))


@pytest.mark.parametrize(
    ("options", "given", "names"),
    [
        ({}, "same", {"qkv", "out_proj"}),
        ({}, "memory", {"q", "kv", "out_proj"}),
        ({}, "apart", {"q", "k", "v", "out_proj"}),
        ({"kdim": 16, "vdim": 12}, "other widths", {"q", "k", "v", "out_proj"}),
    ],
)
def test_projections_that_read_the_same_are_one_product(options: Any, given: str, names: set[str]) -> None:
    model = pruned(nn.MultiheadAttention(24, 3, batch_first=True, **options))
    x, y, z = torch.randn(2, 6, 24), torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    widths = (torch.randn(2, 5, 16), torch.randn(2, 5, 12))
    inputs = {"same": (x, x, x), "memory": (x, y, y), "apart": (x, y, z), "other widths": (x, *widths)}[given]
    compiled = compile(model, inputs, cache=False, measure=False)
    assert layers_of(compiled.model) == names
    assert compiled.report.left == {}
    close(answers(compiled, *inputs), answers(model, *inputs))
    if given != "other widths":
        close(answers(compiled, x, y, z), answers(model, x, y, z))


class Classifier(nn.Module):
    """Words, torch's encoder, and a head: as most people put a transformer together."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 24)
        layer = nn.TransformerEncoderLayer(24, 2, 48, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(24))
        self.head = nn.Linear(24, 5)

    def forward(self, ids: Tensor, **masks: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(self.words(ids), **masks))
        return out


@pytest.mark.parametrize(
    "options",
    [
        {"batch_first": True},
        {"batch_first": True, "norm_first": True, "activation": "gelu"},
        {"batch_first": False},
    ],
)
def test_encoder_is_the_same_for_all_masks(options: Any, tmp_path: Path) -> None:
    model = pruned(Classifier(**options), 0.7)
    ids = torch.randint(0, 50, (3, 7) if options["batch_first"] else (7, 3))
    masks = [{}, {"src_key_padding_mask": PADDED}, {"mask": CAUSAL}, {"src_key_padding_mask": PADDED.flip(1)}]
    masks.append({"mask": CAUSAL, "src_key_padding_mask": torch.zeros(3, 7).masked_fill(PADDED, -torch.inf)})
    for given in masks:
        compiled = compile(model, ((ids,), given), cache=False, measure=False)
        for layer in ("encoder.layers.0", "encoder.layers.1"):
            assert {f"{layer}.{n}" for n in ("self_attn.qkv", "self_attn.out_proj", "linear1", "linear2")} <= layers_of(
                compiled.model
            )
        assert compiled.report.left == {}
        assert compiled.fused.activations["encoder.layers.0.linear1"] == options.get("activation", "relu")
        for other in masks:
            close(answers(compiled, ids, **other), answers(model, ids, **other))
    save(compiled, tmp_path / "encoder.sparse.safetensors")
    again = load(tmp_path / "encoder.sparse.safetensors", Classifier(**options), ((ids,), masks[-1]))
    assert torch.equal(answers(again, ids), answers(compiled, ids))


def test_traced_model_takes_in_what_follows_inside_an_encoder() -> None:
    class Traced(Classifier):
        def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
            out: Tensor = torch.relu(self.head(self.encoder(self.words(ids))))
            return out

    model, ids = pruned(Traced(batch_first=True)), torch.randint(0, 50, (3, 7))
    compiled = compile(model, ids, cache=False, measure=False)
    assert compiled.report.traced
    assert compiled.fused.activations == {
        "encoder.layers.0.linear1": "relu",
        "encoder.layers.1.linear1": "relu",
        "head": "relu",
    }
    close(answers(compiled, ids), answers(model, ids))
    exported = torch.export.export(compiled, (ids,)).module()
    close(answers(exported, ids), answers(model, ids))
    close(answers(torch.compile(compiled, fullgraph=True), ids), answers(model, ids))


def test_whole_transformer() -> None:
    model = pruned(nn.Transformer(24, 2, 1, 1, 32, batch_first=True), 0.7)
    given = torch.randn(2, 6, 24), torch.randn(2, 5, 24)
    compiled = compile(model, given, cache=False, measure=False)
    own = {"qkv", "out_proj"}
    assert layers_of(compiled.model.decoder.layers[0].self_attn) == own  # type: ignore[union-attr, index]
    assert layers_of(compiled.model.decoder.layers[0].multihead_attn) == {"q", "kv", "out_proj"}  # type: ignore[union-attr, index]
    close(answers(compiled, *given), answers(model, *given))


class Peeks(nn.Module):
    """Looks at what is inside an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x)[0] * self.attention.in_proj_weight.mean() + self.layer(x)
        return out


def test_model_that_looks_inside_keeps_its_attentions() -> None:
    model, x = pruned(Peeks()), torch.randn(5, 2, 16)
    compiled = compile(model, x, cache=False, measure=False)
    assert layers_of(compiled.model) == {"layer.linear1", "layer.linear2"}
    assert "attention.in_proj_weight" in compiled.report.left
    close(answers(compiled, x), answers(model, x))
    plain = plain_attention(model, Example.of(model, (x,), {}))
    assert plain is model
    assert type(plain.layer.self_attn) is nn.MultiheadAttention


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_attention_with_more_keys_stays(option: str) -> None:
    model, x = pruned(nn.MultiheadAttention(16, 2, **{option: True})), torch.randn(5, 2, 16)  # type: ignore[arg-type]
    compiled = compile(model, (x, x, x), cache=False, measure=False)
    assert layers_of(compiled.model) == set()
    assert "in_proj_weight" in compiled.report.left


@pytest.mark.parametrize("norm", [None, nn.Softmax(1)])
def test_encoder_with_any_norm(norm: nn.Module | None) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model, x = pruned(nn.TransformerEncoder(layer, 1, norm=norm)), torch.randn(3, 7, 16)
    compiled = compile(model, x, cache=False, measure=False)
    assert isinstance(compiled.model, Encoder)
    for masks in ({}, {"src_key_padding_mask": PADDED}):
        close(answers(compiled, x, **masks), answers(model, x, **masks))


def test_attention_used_twice_is_one_layer() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = self.b = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            out: Tensor = self.a(x, x, x)[0] + self.b(x, y, y)[0]
            return out

    model, x, y = pruned(Twice()), torch.randn(2, 5, 16), torch.randn(2, 4, 16)
    compiled = compile(model, (x, y), cache=False, measure=False)
    assert {m.groups for m in compiled.modules() if isinstance(m, Attention)} == {("q", "k", "v")}
    close(answers(compiled, x, y), answers(model, x, y))
