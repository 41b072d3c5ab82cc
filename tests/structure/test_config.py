"""A transformers configuration that builds the pruned model."""

import sys
from pathlib import Path

import pytest
import torch

from secateur.allocate import Layerwise
from secateur.method import Method
from secateur.patterns import Channel, Expert, Layer
from secateur.structure import load_pruned, save_pruned, shrink_
from secateur.targets import Target

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from _torchvision_ops import declare  # transformers imports torchvision where that is there

declare()
sys.path.pop(0)
try:
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )
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


def saved_and_loaded(model: torch.nn.Module, folder: Path, ids: torch.Tensor) -> torch.nn.Module:
    """Check that ``save_pretrained`` and ``from_pretrained`` give back the same model."""
    wanted = model(input_ids=ids).logits
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder).eval()
    assert torch.equal(again(input_ids=ids).logits, wanted)
    return again


def test_fewer_layers_round_trip_through_the_configuration(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(**sizes, num_hidden_layers=4, vocab_size=50, head_dim=8, max_position_embeddings=32)
    model, ids = Qwen3ForCausalLM(config).eval(), torch.arange(12).reshape(2, 6)
    report = shrink_(model, Method(target=Target("channels", 0.5), pattern=Layer()), {"input_ids": ids})
    assert report.config == ""
    assert (model.config.num_hidden_layers, len(model.config.layer_types)) == (2, 2)
    again = saved_and_loaded(model, tmp_path, ids)
    assert again.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 9)
    assert torch.equal(
        again.generate(ids, max_new_tokens=3, do_sample=False), model.generate(ids, max_new_tokens=3, do_sample=False)
    )


@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
def test_fewer_experts_round_trip_through_the_configuration(how: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
        vocab_size=50, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=32,
    )  # fmt: skip
    model, ids = MixtralForCausalLM(config).eval(), torch.arange(24).reshape(2, 12)
    model.set_experts_implementation(how)
    report = shrink_(model, Method(target=Target("channels", 0.75), pattern=Expert()), {"input_ids": ids})
    if len({g.kept for g in report.groups}) == 1:
        assert report.config == ""
        assert model.config.num_local_experts == report.groups[0].kept
        saved_and_loaded(model, tmp_path, ids)
    else:
        assert "cannot express" in report.config


def test_as_many_experts_in_every_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
        vocab_size=50, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=32,
    )  # fmt: skip
    model, ids = MixtralForCausalLM(config).eval(), torch.arange(24).reshape(2, 12)
    method = Method(target=Target("channels", 0.75), pattern=Expert(), allocate=Layerwise())
    assert shrink_(model, method, {"input_ids": ids}, uniform=True).config == ""
    assert model.config.num_local_experts == 3
    saved_and_loaded(model, tmp_path, ids)
