"""Real models, each with inputs, for the coverage table of structural pruning.

    pip install --no-deps torchvision==0.28.0 timm==1.0.31 transformers==5.23.0 huggingface_hub tokenizers regex tqdm
    pip install --no-deps click hf-xet httpx2 httpcore2 h11 anyio sniffio certifi idna truststore
    python benchmarks/coverage_models.py [zoo ...]

Every case builds with random weights and no network, in eval mode, and comes with inputs as small as the architecture
allows. Parameters that an initialisation leaves constant (unit norm weights, zero biases, layer scales of 1e-6) are
drawn at random too, so that two networks which agree on the outputs do not agree by accident. Run as a script, this
file builds and checks them all.
"""

from __future__ import annotations

import functools
import importlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from _torchvision_ops import declare

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

ZOOS = ("torchvision", "torchvision-tasks", "timm", "transformers")
CLASSES = 10
LENGTH = 12
CALIBRATION = 4  # batches, for the statistics of batch norms
VOCABULARY = 99


@dataclass(frozen=True)
class Case:
    """One model of the table.

    Attributes:
        zoo: Where it comes from, one of `ZOOS`.
        name: What that zoo calls it.
        build: Makes it in eval mode; its weights are random, the same at every call, and have been through `scatter`.
        inputs: Makes positional and keyword arguments of its forward from a seed.
    """

    zoo: str
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]


def cases(zoo: str | None = None) -> list[Case]:
    """The cases of one zoo, or of all of them."""
    makers = {
        "torchvision": _torchvision,
        "torchvision-tasks": _torchvision_tasks,
        "timm": _timm,
        "transformers": _transformers,
    }
    if zoo is not None and zoo not in makers:
        raise ValueError(f"there is no zoo {zoo!r}: choose from {', '.join(ZOOS)}")
    return [case for name, maker in makers.items() if zoo in (None, name) for case in maker()]


def _case(zoo: str, name: str, make: Callable[[], nn.Module], inputs: Callable[[int], Inputs]) -> Case:
    return Case(zoo, name, functools.partial(_build, make, inputs), inputs)


def _build(make: Callable[[], nn.Module], inputs: Callable[[int], Inputs]) -> nn.Module:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = make().eval()
        scatter(model, 0)
        _normalise(model, [inputs(seed) for seed in range(1000, 1000 + CALIBRATION)])
    return model


@torch.no_grad()
def _normalise(model: nn.Module, batches: list[Inputs]) -> None:
    """Set the statistics of batch norms so that they put out a second moment of one on some batches.

    Without, what depends on the input fades (below one part in 10^8 in MobileNet) or grows (by 10^10 in ResNet-152) on
    its way through a deep network. Half of the mean is subtracted: without the mean, two inputs drift apart from layer
    to layer, and with them rounding errors (in EfficientNet-B7 up to the size of the output). A variance is at least
    half of its layer's mean one, for a few samples can miss what a channel does.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_var is not None]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    args = [torch.cat(parts) for parts in zip(*(args for args, _ in batches), strict=True)]
    kwargs = {key: torch.cat([kwargs[key] for _, kwargs in batches]) for key in batches[0][1]}
    model(*args, **kwargs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        norm.running_mean.div_(2)
        norm.running_var.add_(norm.running_mean**2)
        norm.running_var.clamp_(min=float(norm.running_var.mean()) / 2)
        norm.num_batches_tracked.zero_()
    _forget(model)


def _forget(model: nn.Module) -> None:
    """Drop what a network in eval mode has cached (timm's LeViT: its indexed attention biases)."""
    model.train()
    model.eval()


# ---------------------------------------------------------------------------------------------------------- torchvision

# Pixels a side, by the longest prefix of the name that is listed here; 64 for the others.
_SIZES = {
    "inception_v3": 96,
    "maxvit": 224,
    "swin": 112,
    "swin_v2": 128,
    "vit_b_32": 128,
    "vit_l_32": 128,
    "vit_h_14": 56,
}

_TASKS = {
    **dict.fromkeys(
        (
            "deeplabv3_mobilenet_v3_large",
            "deeplabv3_resnet101",
            "deeplabv3_resnet50",
            "fcn_resnet101",
            "fcn_resnet50",
            "lraspp_mobilenet_v3_large",
        ),
        (2, 3, 64, 64),
    ),
    **dict.fromkeys(("mc3_18", "r2plus1d_18", "r3d_18"), (2, 3, 8, 32, 32)),
    **dict.fromkeys(("swin3d_b", "swin3d_s", "swin3d_t"), (2, 3, 8, 64, 64)),
    "s3d": (2, 3, 16, 224, 224),
    # The builders of these two fix the size; one clip of it takes seconds.
    **dict.fromkeys(("mvit_v1_b", "mvit_v2_s"), (1, 3, 16, 224, 224)),
}

_NMS = "needs torchvision::nms, which the CPU build of torch has only declared"
_ROI = "needs torchvision::nms and roi_align, which the CPU build of torch has only declared"

NOT_RUNNABLE: dict[str, str] = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": _ROI,
    "fasterrcnn_mobilenet_v3_large_fpn": _ROI,
    "fasterrcnn_resnet50_fpn": _ROI,
    "fasterrcnn_resnet50_fpn_v2": _ROI,
    "fcos_resnet50_fpn": _NMS,
    "keypointrcnn_resnet50_fpn": _ROI,
    "maskrcnn_resnet50_fpn": _ROI,
    "maskrcnn_resnet50_fpn_v2": _ROI,
    "retinanet_resnet50_fpn": _NMS,
    "retinanet_resnet50_fpn_v2": _NMS,
    "ssd300_vgg16": _NMS,
    "ssdlite320_mobilenet_v3_large": _NMS,
}


def _torchvision() -> Iterator[Case]:
    models = _import("torchvision.models")
    for name in models.list_models(module=models):
        size = _SIZES[max((key for key in _SIZES if name.startswith(key)), key=len)] if _listed(name) else 64
        more = {"image_size": size} if name.startswith("vit_") else {}
        build = functools.partial(_build_torchvision, name, **more)
        yield _case("torchvision", name, build, functools.partial(_images, (2, 3, size, size)))


def _listed(name: str) -> bool:
    return name.startswith(tuple(_SIZES))


def _torchvision_tasks() -> Iterator[Case]:
    for name, shape in _TASKS.items():
        more = {"weights_backbone": None} if len(shape) == 4 else {}
        build = functools.partial(_build_torchvision, name, **more)
        yield _case("torchvision-tasks", name, build, functools.partial(_images, shape))


def _build_torchvision(name: str, **options: Any) -> nn.Module:
    models = _import("torchvision.models")
    model: nn.Module = models.get_model(name, weights=None, **options)
    return model


def _images(shape: tuple[int, ...], seed: int) -> Inputs:
    return (_picture(shape, torch.Generator().manual_seed(seed)),), {}


def _picture(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Patches of colour under noise: to a network with random weights two images of mere noise are all but the same."""
    coarse = torch.randn((*shape[:2], *(min(size, 4) for size in shape[2:])), generator=generator)
    patches = nn.functional.interpolate(coarse, size=shape[2:], mode="nearest")
    return 0.5 * patches + torch.randn(shape, generator=generator)


# ----------------------------------------------------------------------------------------------------------------- timm

# Of each module of timm.models the variant with the fewest parameters (`test_*` miniatures aside), the pixels a side it
# is fed, and whether it has to be told this size. (The smallest of byoanet, halonet_h1, multiplies rounding errors by
# 10^6 with random weights: in its place the next one with halo attention.)
_TIMM: dict[str, tuple[str, int, bool]] = {
    "beit": ("beit_base_patch16_224", 64, True),
    "byoanet": ("eca_halonext26ts", 256, False),
    "byobnet": ("mobileone_s1", 64, True),
    "cait": ("cait_xxs24_224", 64, True),
    "coat": ("coat_tiny", 64, True),
    "convit": ("convit_tiny", 64, True),
    "convmixer": ("convmixer_768_32", 64, False),
    "convnext": ("convnext_zepto_rms", 64, False),
    "cpubone": ("cpubone_nano", 64, False),
    "crossvit": ("crossvit_tiny_240", 64, False),
    "csatv2": ("csatv2", 64, False),
    "cspnet": ("cs3darknet_focus_s", 64, False),
    "cspnext": ("cspnext_tiny", 64, False),
    "davit": ("davit_tiny", 112, False),
    "deepseek_vit": ("deepseek_vit_412m", 112, True),
    "deit": ("deit_tiny_patch16_224", 64, True),
    "densenet": ("densenet121", 64, False),
    "dla": ("dla46x_c", 64, False),
    "dpn": ("dpn48b", 64, False),
    "edgenext": ("edgenext_xx_small", 64, False),
    "efficientformer": ("efficientformer_l1", 224, False),
    "efficientformer_v2": ("efficientformerv2_s0", 64, True),
    "efficientnet": ("mobilenetv2_035", 64, False),
    "efficientvim": ("efficientvim_m1", 64, False),
    "efficientvit_mit": ("efficientvit_b0", 64, False),
    "efficientvit_msra": ("efficientvit_m0", 112, True),
    "eva": ("vit_tiny_patch16_dinov3_qkvb", 64, True),
    "fasternet": ("fasternet_t0", 64, False),
    "fastvit": ("fastvit_t8", 64, False),
    "focalnet": ("focalnet_tiny_srf", 64, False),
    "gcvit": ("gcvit_xxtiny", 224, True),
    "gemma4_vit": ("gemma4_vit_167m_enc", 96, True),
    "ghostnet": ("ghostnet_050", 64, False),
    "hardcorenas": ("hardcorenas_b", 64, False),
    "hgnet": ("hgnetv2_b0", 64, False),
    "hiera": ("hiera_tiny_224", 128, True),
    "hieradet_sam2": ("sam2_hiera_tiny", 128, False),
    "hrnet": ("hrnet_w18_small", 64, False),
    "iformer": ("iformer_t", 64, False),
    "inception_next": ("inception_next_atto", 64, False),
    "inception_resnet_v2": ("inception_resnet_v2", 96, False),
    "inception_v3": ("inception_v3", 96, False),
    "inception_v4": ("inception_v4", 96, False),
    "lcnetv2": ("lcnetv2_small", 64, False),
    "levit": ("levit_128s", 64, True),
    "lowformer": ("lowformer_b0", 64, False),
    "mambaout": ("mambaout_femto", 64, False),
    "maxxvit": ("maxvit_pico_rw_256", 128, True),
    "metaformer": ("poolformerv2_s12", 64, False),
    "mlp_mixer": ("gmlp_ti16_224", 64, True),
    "mobilenetv3": ("lcnet_035", 64, False),
    "mobilenetv5": ("mobilenetv5_300m_enc", 64, False),
    "mobilevit": ("mobilevit_xxs", 64, True),
    "mvitv2": ("mvitv2_tiny", 128, True),
    "naflexvit": ("naflexvit_base_patch16_parfac_gap", 64, True),
    "nasnet": ("nasnetalarge", 64, False),
    "nest": ("nest_tiny", 112, True),
    "nextvit": ("nextvit_small", 64, False),
    "nfnet": ("nf_regnet_b0", 64, False),
    "pit": ("pit_ti_224", 64, True),
    "pnasnet": ("pnasnet5large", 64, False),
    "pvt_v2": ("pvt_v2_b0", 64, False),
    "qwen3_vit": ("qwen3_vit_88m", 64, True),
    "rdnet": ("rdnet_tiny", 64, False),
    "regnet": ("regnetx_002", 64, False),
    "repghost": ("repghostnet_050", 64, False),
    "repvit": ("repvit_m1", 64, True),
    "res2net": ("res2next50", 64, False),
    "resnest": ("resnest14d", 64, False),
    "resnet": ("resnet10t", 64, False),
    "resnetv2": ("resnetv2_18", 64, False),
    "rexnet": ("rexnet_100", 64, False),
    "selecsls": ("selecsls42", 64, False),
    "senet": ("legacy_seresnet18", 64, False),
    "sequencer": ("sequencer2d_s", 64, True),
    "shvit": ("shvit_s1", 64, False),
    "sknet": ("skresnet18", 64, False),
    "starnet": ("starnet_s050", 64, False),
    "swiftformer": ("swiftformer_xs", 64, True),
    "swin_transformer": ("swin_tiny_patch4_window7_224", 112, True),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", 128, True),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", 112, True),
    "tiny_vit": ("tiny_vit_5m_224", 112, False),
    "tnt": ("tnt_s_legacy_patch16_224", 64, True),
    "tresnet": ("tresnet_m", 64, False),
    "twins": ("twins_svt_small", 224, True),
    "vgg": ("vgg11", 64, False),
    "visformer": ("visformer_tiny", 64, True),
    "vision_transformer": ("vit_tiny_patch16_224", 64, True),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", 64, True),
    "vision_transformer_relpos": ("vit_srelpos_small_patch16_224", 64, True),
    "vision_transformer_sam": ("samvit_base_patch16_224", 64, True),
    "vitamin": ("vitamin_small_224", 64, True),
    "volo": ("volo_d1_224", 64, True),
    "vovnet": ("ese_vovnet19b_slim_dw", 64, False),
    "xception": ("legacy_xception", 64, False),
    "xception_aligned": ("xception41p", 64, False),
    "xcit": ("xcit_nano_12_p8_224", 64, True),
}


def _timm() -> Iterator[Case]:
    for name, size, told in _TIMM.values():
        build = functools.partial(_build_timm, name, **({"img_size": size} if told else {}))
        yield _case("timm", name, build, functools.partial(_images, (2, 3, size, size)))


def _build_timm(name: str, **options: Any) -> nn.Module:
    timm = _import("timm")
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)
    return model


# --------------------------------------------------------------------------------------------------------- transformers

# At the usual deviation of 0.02 a network this narrow hardly depends on most of its weights.
_SPREAD: dict[str, Any] = {"initializer_range": 0.2}
_TOKENS = {**_SPREAD, "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = {
    **_TOKENS,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_GPT = {**_TOKENS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 128}
_BERT = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"} | {"num_labels": CLASSES}
_BART = {
    **_TOKENS,
    "init_std": 0.2,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
_T5 = {
    **_TOKENS,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_VISION = {
    **_SPREAD,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_VIT = {**_VISION, "num_labels": CLASSES}
_TEXT_TOWER = {**_BERT, "eos_token_id": VOCABULARY - 1}
_TOWERS = {"text_config": _TEXT_TOWER, "vision_config": _VISION}
_PYRAMID = {**_SPREAD, "image_size": 32, "num_labels": CLASSES}
_EXPERTS = {"num_experts_per_tok": 2}

# Name in the table -> (model type of the configuration, model class, kind of inputs, settings).
_TRANSFORMERS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "llama": ("llama", "LlamaForCausalLM", "decoder", _LLAMA),
    "mistral": ("mistral", "MistralForCausalLM", "decoder", {**_LLAMA, "sliding_window": 8, "head_dim": 16}),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", "decoder", _LLAMA),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", "decoder", {**_LLAMA, "head_dim": 16}),
    "gemma": ("gemma", "GemmaForCausalLM", "decoder", {**_LLAMA, "head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": (
        "gemma2",
        "Gemma2ForCausalLM",
        "decoder",
        {**_LLAMA, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
    ),
    "gemma3": (
        "gemma3_text",
        "Gemma3ForCausalLM",
        "decoder",
        {**_LLAMA, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
    ),
    "phi": ("phi", "PhiForCausalLM", "decoder", _LLAMA),
    "phi3": ("phi3", "Phi3ForCausalLM", "decoder", {**_LLAMA, "original_max_position_embeddings": 64}),
    "gpt2": ("gpt2", "GPT2LMHeadModel", "decoder", _GPT),
    "gpt_neox": ("gpt_neox", "GPTNeoXForCausalLM", "decoder", _LLAMA),
    "gptj": ("gptj", "GPTJForCausalLM", "decoder", {**_GPT, "rotary_dim": 8}),
    "opt": (
        "opt",
        "OPTForCausalLM",
        "decoder",
        {
            **_TOKENS,
            "hidden_size": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 64,
        },
    ),
    "bloom": ("bloom", "BloomForCausalLM", "decoder", {**_TOKENS, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "falcon": (
        "falcon",
        "FalconForCausalLM",
        "decoder",
        {
            **_TOKENS,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_hidden_size": 128,
            "multi_query": True,
            "max_position_embeddings": 64,
        },
    ),
    "mpt": (
        "mpt",
        "MptForCausalLM",
        "decoder",
        {**_TOKENS, "d_model": 64, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 64},
    ),
    "t5": ("t5", "T5ForConditionalGeneration", "seq2seq", _T5),
    "mt5": ("mt5", "MT5ForConditionalGeneration", "seq2seq", _T5),
    "bart": ("bart", "BartForConditionalGeneration", "seq2seq", _BART),
    "pegasus": ("pegasus", "PegasusForConditionalGeneration", "seq2seq", _BART),
    "marian": ("marian", "MarianMTModel", "seq2seq", {**_BART, "decoder_vocab_size": VOCABULARY}),
    "whisper": (
        "whisper",
        "WhisperForConditionalGeneration",
        "speech2seq",
        {
            **{key: value for key, value in _BART.items() if key != "max_position_embeddings"},
            "num_mel_bins": 16,
            "max_source_positions": 20,
            "max_target_positions": 64,
            "begin_suppress_tokens": None,
        },
    ),
    "clip": ("clip", "CLIPModel", "clip", {**_TOWERS, "projection_dim": 32}),
    "siglip": ("siglip", "SiglipModel", "clip", _TOWERS),
    "vit": ("vit", "ViTForImageClassification", "image", _VIT),
    "deit": ("deit", "DeiTForImageClassificationWithTeacher", "image", _VIT),
    "swin": (
        "swin",
        "SwinForImageClassification",
        "image",
        {**_PYRAMID, "patch_size": 4, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    ),
    "convnext": (
        "convnext",
        "ConvNextForImageClassification",
        "image",
        {**_PYRAMID, "hidden_sizes": [32, 48, 64, 80], "depths": [1, 1, 2, 1]},
    ),
    "segformer": (
        "segformer",
        "SegformerForSemanticSegmentation",
        "image",
        {
            **_PYRAMID,
            "image_size": 64,
            "hidden_sizes": [16, 32, 40, 64],
            "depths": [1, 1, 2, 1],
            "decoder_hidden_size": 64,
        },
    ),
    "bert": ("bert", "BertForSequenceClassification", "encoder", _BERT),
    "roberta": ("roberta", "RobertaForSequenceClassification", "encoder", _BERT),
    "camembert": ("camembert", "CamembertForSequenceClassification", "encoder", _BERT),
    "xlm-roberta": ("xlm-roberta", "XLMRobertaForSequenceClassification", "encoder", _BERT),
    "distilbert": (
        "distilbert",
        "DistilBertForSequenceClassification",
        "encoder",
        {
            **_TOKENS,
            "dim": 64,
            "hidden_dim": 128,
            "n_layers": 2,
            "n_heads": 4,
            "max_position_embeddings": 64,
            "num_labels": CLASSES,
        },
    ),
    "albert": ("albert", "AlbertForSequenceClassification", "encoder", {**_BERT, "embedding_size": 32}),
    "electra": ("electra", "ElectraForSequenceClassification", "encoder", {**_BERT, "embedding_size": 32}),
    "deberta_v2": (
        "deberta-v2",
        "DebertaV2ForSequenceClassification",
        "encoder",
        {
            **_BERT,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "position_biased_input": False,
            "pooler_hidden_size": 64,
        },
    ),
    "mpnet": ("mpnet", "MPNetForSequenceClassification", "encoder", _BERT),
    "mobilebert": (
        "mobilebert",
        "MobileBertForSequenceClassification",
        "encoder",
        {**_BERT, "embedding_size": 32, "intra_bottleneck_size": 32, "num_feedforward_networks": 2},
    ),
    "mamba": (
        "mamba",
        "MambaForCausalLM",
        "recurrent",
        {**_TOKENS, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4},
    ),
    "mixtral": ("mixtral", "MixtralForCausalLM", "decoder", {**_LLAMA, **_EXPERTS, "num_local_experts": 4}),
    "qwen2_moe": (
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        "decoder",
        {
            **_LLAMA,
            **_EXPERTS,
            "num_experts": 4,
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 96,
        },
    ),
    "olmo": ("olmo", "OlmoForCausalLM", "decoder", _LLAMA),
    "stablelm": ("stablelm", "StableLmForCausalLM", "decoder", _LLAMA),
    "cohere": ("cohere", "CohereForCausalLM", "decoder", _LLAMA),
    "starcoder2": ("starcoder2", "Starcoder2ForCausalLM", "decoder", _LLAMA),
    "wav2vec2": (
        "wav2vec2",
        "Wav2Vec2ForCTC",
        "audio",
        {
            **{key: value for key, value in _BERT.items() if key != "max_position_embeddings"},
            "conv_dim": [32, 32, 32],
            "conv_stride": [5, 2, 2],
            "conv_kernel": [10, 3, 2],
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        },
    ),
}

_CACHED = ("decoder", "seq2seq", "speech2seq", "recurrent")


def _transformers() -> Iterator[Case]:
    for name, (kind, model, inputs, settings) in _TRANSFORMERS.items():
        more = {"use_cache": False} if inputs in _CACHED else {}
        build = functools.partial(_build_transformers, kind, model, {**settings, **more})
        yield _case("transformers", name, build, functools.partial(_INPUTS[inputs], settings))


def _build_transformers(kind: str, name: str, settings: dict[str, Any]) -> nn.Module:
    transformers = _import("transformers")
    config = transformers.AutoConfig.for_model(kind, **settings)
    model: nn.Module = getattr(transformers, name)(config)
    return model


def _ids(generator: torch.Generator, length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCABULARY - 1, (2, length), generator=generator)


def _mask() -> Tensor:
    """An attention mask whose second row ends in padding."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, -3:] = 0
    return mask


def _decoder_inputs(settings: dict[str, Any], seed: int) -> Inputs:
    ids = _ids(torch.Generator().manual_seed(seed))
    return (), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _recurrent_inputs(settings: dict[str, Any], seed: int) -> Inputs:
    return (), {"input_ids": _ids(torch.Generator().manual_seed(seed))}


def _encoder_inputs(settings: dict[str, Any], seed: int) -> Inputs:
    mask = _mask()
    return (), {"input_ids": _ids(torch.Generator().manual_seed(seed)) * mask, "attention_mask": mask}


def _seq2seq_inputs(settings: dict[str, Any], seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    mask = _mask()
    ids = _ids(generator) * mask
    return (), {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": _ids(generator, LENGTH - 4)}


def _speech2seq_inputs(settings: dict[str, Any], seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    frames = 2 * settings["max_source_positions"]
    features = torch.randn(2, settings["num_mel_bins"], frames, generator=generator)
    return (), {"input_features": features, "decoder_input_ids": _ids(generator)}


def _image_inputs(settings: dict[str, Any], seed: int) -> Inputs:
    size = settings["image_size"]
    return (), {"pixel_values": _picture((2, 3, size, size), torch.Generator().manual_seed(seed))}


def _clip_inputs(settings: dict[str, Any], seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    mask = _mask()
    ids = _ids(generator) * mask
    ids[torch.arange(2), mask.sum(1) - 1] = VOCABULARY - 1  # the end of the text, where CLIP reads it
    _, more = _image_inputs(settings["vision_config"], seed)
    return (), {"input_ids": ids, "attention_mask": mask, **more}


def _audio_inputs(settings: dict[str, Any], seed: int) -> Inputs:
    return (), {"input_values": torch.randn(2, 400, generator=torch.Generator().manual_seed(seed))}


_INPUTS: dict[str, Callable[[dict[str, Any], int], Inputs]] = {
    "decoder": _decoder_inputs,
    "recurrent": _recurrent_inputs,
    "encoder": _encoder_inputs,
    "seq2seq": _seq2seq_inputs,
    "speech2seq": _speech2seq_inputs,
    "image": _image_inputs,
    "clip": _clip_inputs,
    "audio": _audio_inputs,
}


# -------------------------------------------------------------------------------------------------------------- weights


@torch.no_grad()
def scatter(model: nn.Module, seed: int) -> None:
    """Give the model parameters of which no two are equal and none is without effect, in place.

    Random weights stay as they were drawn, but those of linear layers and convolutions are brought to a scale between
    1 and √2 over √inputs: at the usual 0.02 attention hardly depends on its queries and keys, and the gates of an
    EfficientNet saturate at its own scale. What an initialisation leaves constant, or below 1e-3 throughout, is drawn
    anew: unit or zero norm weights from U(.5, 1.5), biases from U(-.1, .1), layer scales from U(.1, .3), matrices at
    the scale of a linear layer, other constants c from c · U(.5, 1.5). What repeats a few values (as Mamba's `A_log`)
    is moved by U(-.1, .1). Running statistics that are still at 0 and 1 are drawn too, means from U(-.1, .1) and
    variances from U(.5, 1.5). No other buffer is touched.
    What `Case.build` makes has been through this; a second time changes little but single numbers.

    Args:
        model: The model whose parameters change, in eval mode.
        seed: Of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(into: Tensor, low: float, high: float) -> None:
        into.copy_(torch.empty(into.shape, dtype=into.dtype).uniform_(low, high, generator=generator))

    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.is_floating_point() or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if _constant(parameter) or float(parameter.abs().max()) < 1e-3:
                draw(parameter, *_interval(module, name, parameter))
            elif _repeats(parameter):
                moved = parameter.clone()
                draw(parameter, -0.1, 0.1)
                parameter.add_(moved)
            elif isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and name == "weight":
                scale = float(parameter.square().mean() * parameter[0].numel()) ** 0.5
                if not 0.999 < scale < 1.415:
                    parameter.mul_(min(max(scale, 1.0), 2**0.5) / scale)
        mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if isinstance(mean, Tensor) and isinstance(variance, Tensor) and _constant(mean) and _constant(variance):
            draw(mean, -0.1, 0.1)
            draw(variance, 0.5, 1.5)
    _forget(model)


def _constant(parameter: Tensor) -> bool:
    return parameter.numel() > 0 and bool((parameter == parameter.flatten()[0]).all())


def _repeats(parameter: Tensor) -> bool:
    some = parameter.flatten()[:: max(1, parameter.numel() // 2048)]
    return len(set(some.tolist())) < len(some) / 2


def _interval(module: nn.Module, name: str, parameter: Tensor) -> tuple[float, float]:
    """From where to draw the values of a parameter that an initialisation left constant or next to zero."""
    kind = type(module).__name__.lower()
    value = float(parameter.flatten()[0]) if _constant(parameter) else 0.0
    if "bias" in name:
        return -0.1, 0.1
    if abs(value) >= 0.2:
        low, high = sorted((0.5 * value, 1.5 * value))
        return low, high
    if "norm" in kind and name == "weight":
        return 0.5, 1.5
    if value > 0 or "scale" in kind or name in ("gamma", "layer_scale"):
        return 0.1, 0.3
    if parameter.dim() >= 2 and len(parameter) > 1 and parameter[0].numel() > 1:
        bound = (3 / parameter[0].numel()) ** 0.5
        return -bound, bound
    return -0.1, 0.1


# ------------------------------------------------------------------------------------------------------------- together


def _import(name: str) -> Any:
    declare()
    return importlib.import_module(name)


def outputs(value: Any) -> list[Tensor]:
    """The floating tensors in whatever a model returns, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in outputs(item)]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in outputs(item)]
    return []


@torch.no_grad()
def check(case: Case) -> dict[str, Any]:
    """Build a case and run it; says what it found.

    Raises:
        AssertionError: If the case is not reproducible, not finite, or its outputs do not depend on its inputs.
    """
    began = time.perf_counter()
    model = case.build()
    built = time.perf_counter() - began
    assert not any(module.training for module in model.modules()), "a module is in training mode"
    assert all(bool(p.isfinite().all()) for p in model.parameters() if p.is_floating_point()), "a weight is not finite"
    results = []
    began = time.perf_counter()
    for seed in (0, 0, 1):
        args, kwargs = case.inputs(seed)
        results.append(outputs(model(*args, **kwargs)))
    ran = (time.perf_counter() - began) / 3
    first, again, other = results
    assert first, "no output"
    assert all(bool(a.isfinite().all()) for a in first + other), "an output is not finite"
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), "a second run differs"
    spread = max(float((a - b).std() / a.abs().max().clamp(min=1e-30)) for a, b in zip(first, other, strict=True))
    assert spread > 1e-6, f"the output hardly depends on the input ({spread:.0e})"
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "build_s": built,
        "run_s": ran,
        "outputs": len(first),
        "largest": max(float(a.abs().max()) for a in first),
        "spread": spread,
    }


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    failed = 0
    began = time.perf_counter()
    zoos = sys.argv[1:] or ZOOS
    for case in [case for zoo in zoos for case in cases(zoo)]:
        try:
            row = check(case)
        except Exception as problem:  # noqa: BLE001 - a table of what works must survive what does not
            failed += 1
            print(f"{case.zoo:18} {case.name:40} FAILED {type(problem).__name__}: {str(problem)[:200]}", flush=True)
            continue
        print(
            f"{case.zoo:18} {case.name:40} {row['parameters'] / 1e6:8.2f} M  build {row['build_s']:6.2f} s  "
            f"run {row['run_s']:6.3f} s  largest {row['largest']:9.2e}  spread {row['spread']:8.1e}",
            flush=True,
        )
    print(f"{failed} failed, {time.perf_counter() - began:.0f} s")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
