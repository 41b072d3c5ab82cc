"""A transformers configuration that builds the pruned model."""

from pathlib import Path

import pytest
import torch

from secateur.allocate import Layerwise
from secateur.method import Method
from secateur.patterns import Channel
from secateur.structure import load_pruned, save_pruned, shrink_
from secateur.targets import Target

pytest.importorskip("transformers")
try:
    from transformers import LlamaConfig, LlamaForCausalLM
except (ImportError, RuntimeError) as error:  # it imports torchvision when that is there, fit for this torch or not
    pytest.skip(f"transformers cannot be imported: {error}", allow_module_level=True)

METHOD = Method(target=Target("channels", 0.6), pattern=Channel(), allocate=Layerwise())


def llama(**changes: int) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        **sizes | changes, num_hidden_layers=2, vocab_size=50, max_position_embeddings=32, use_cache=False
    )
    return LlamaForCausalLM(config).eval()


def test_uniform_widths_round_trip_through_the_configuration(tmp_path: Path) -> None:
    model, ids = llama(), torch.arange(12).reshape(2, 6)
    report = shrink_(model, METHOD, {"input_ids": ids}, uniform=True)
    assert report.config == ""
    assert model.config.num_attention_heads == 2
    assert model.config.hidden_size == model.model.embed_tokens.weight.shape[1] < 64
    logits = model(input_ids=ids).logits
    model.save_pretrained(tmp_path / "hub")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "hub").eval()
    assert torch.equal(again(input_ids=ids).logits, logits)
    save_pruned(tmp_path / "plan", model, report)
    fresh = llama()
    load_pruned(fresh, tmp_path / "plan")
    assert fresh.config.num_attention_heads == 2
    assert torch.equal(fresh(input_ids=ids).logits, logits)


def test_what_a_configuration_cannot_express_is_said() -> None:
    model = llama()
    before = model.config.to_dict()
    method = Method(target=Target("channels", 0.9), pattern=Channel(), include=("*layers.0.mlp*",))
    report = shrink_(model, method, {"input_ids": torch.arange(6)[None]})
    assert "cannot express" in report.config
    assert model.config.to_dict() == before


def test_other_attention_implementation_of_one_key_head_follows() -> None:
    model, ids = llama(num_key_value_heads=1), torch.arange(12).reshape(2, 6)
    shrink_(model, METHOD, {"input_ids": ids})
    fused = model(input_ids=ids).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(input_ids=ids).logits, fused, rtol=1e-4, atol=1e-5)
