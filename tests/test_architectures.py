"""Every kind of model that transformers has, tiny and with random weights: it compiles, and gives what its masked weights give in torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler.call import instantiate
from sparsify_compiler.capture import capture

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

MASKED = "mask_weights(density=0.5, structure='16x1')"
# Whatever a configuration calls its sizes, this is what they are.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim", "lru_width"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_ff", "hidden_dim", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "mlp_dim"), 128),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 64),
    "vocab_size": 99, "num_key_value_heads": 2, "head_dim": 16, "d_kv": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1, "image_size": 32, "patch_size": 8,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "max_source_positions": 32, "max_target_positions": 32, "num_mel_bins": 16,
    "rotary_dim": 8, "sliding_window": 16, "state_size": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
FOUR = {"hidden_sizes": [16, 32, 32, 32], "depths": [1, 1, 1, 1]}
THREE = {"hidden_sizes": [16, 32, 32], "depths": [1, 1, 1]}
TWO = {"hidden_sizes": [16, 32], "depths": [1, 1]}
LATENT = {"head_dim": 8, "num_key_value_heads": 4}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"]}
WAVES = {"conv_dim": [16] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
TALK = {"relative_attention": True, "max_relative_positions": 16, "pos_att_type": ["c2p", "p2c"]}
# The kinds of models, by what they are called with.
CAUSAL = [
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi", "phi3", "gpt2", "gpt_neox", "gptj", "opt", "bloom", "stablelm",
    "starcoder2", "olmo", "olmo2", "cohere", "granite", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "phimoe", "smollm3",
    "glm", "persimmon", "codegen", "xglm", "biogpt", "nemotron", "helium", "mamba", "falcon_mamba", "bitnet", "ernie4_5",
    "hunyuan_v1_dense", "seed_oss", "gpt_neo", "mpt", "falcon", "deepseek_v2", "deepseek_v3", "gemma3_text", "gpt_oss", "exaone4", "jamba",
    "lfm2", "qwen3_next",
]
ENCODERS = [
    "bert", "roberta", "distilbert", "albert", "electra", "mpnet", "camembert", "xlm-roberta", "mobilebert", "layoutlm", "nomic_bert",
    "modernbert", "convbert", "ibert", "roformer", "fnet", "nystromformer", "esm", "megatron-bert", "rembert", "deberta", "deberta-v2",
    "big_bird", "longformer", "squeezebert", "xlnet",
]
VISION = [
    "vit", "deit", "beit", "dinov2", "mobilenet_v1", "mobilenet_v2", "siglip_vision_model", "clip_vision_model", "ijepa",
    "data2vec-vision", "swin", "convnext", "convnextv2", "resnet", "regnet", "poolformer", "segformer", "pvt", "hiera", "levit",
    "mobilevit", "focalnet",
]
PAIRS = [
    "t5", "bart", "mbart", "pegasus", "marian", "m2m_100", "blenderbot", "mt5", "switch_transformers", "nllb-moe", "longt5",
]
SPEECH = {"whisper": (16, 64), "speech_to_text": (48, 16)}
SOUND = {"wav2vec2": (2000,), "hubert": (2000,), "wavlm": (2000,), "audio-spectrogram-transformer": (64, 16)}
# What their configurations need beside.
MORE: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16}, "mpt": {"use_cache": True}, "falcon": {"num_kv_heads": 2},
    "deepseek_v2": LATENT, "deepseek_v3": LATENT, "gemma3_text": WINDOWS, "gpt_oss": WINDOWS, "exaone4": WINDOWS,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "deberta": TALK, "deberta-v2": {**TALK, "position_buckets": 8}, "big_bird": {"attention_type": "original_full"},
    "longformer": {"attention_window": 8}, "xlnet": {"d_inner": 128},
    "squeezebert": dict.fromkeys(("q_groups", "k_groups", "v_groups", "post_attention_groups", "intermediate_groups", "output_groups"), 1),
    "swin": {"depths": [1, 1], "num_heads": [2, 4], "embed_dim": 32, "window_size": 2, "patch_size": 4}, "convnext": {**TWO, "num_stages": 2},
    "convnextv2": {**TWO, "num_stages": 2}, "resnet": {**TWO, "embedding_size": 16, "layer_type": "basic"},
    "regnet": {**TWO, "embedding_size": 16, "groups_width": 8}, "poolformer": FOUR, "segformer": {**FOUR, "num_attention_heads": [1, 2, 2, 4]},
    "pvt": {**FOUR, "image_size": 64, "num_attention_heads": [1, 2, 2, 4]},
    "hiera": {"embed_dim": 16, "num_heads": [1, 2, 2, 4], "depths": [1, 1, 1, 1], "image_size": [32, 32]},
    "levit": {**THREE, "num_attention_heads": [2, 2, 2], "key_dim": [8, 8, 8], "image_size": 64, "patch_size": 16},
    "mobilevit": {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 64], "image_size": 64, "patch_size": 2},
    "focalnet": {"embed_dim": 16, "depths": [1, 1], "focal_levels": [1, 1], "focal_windows": [3, 3], "hidden_sizes": [16, 32], "patch_size": 4},
    "whisper": {"suppress_tokens": None, "begin_suppress_tokens": None},
    "speech_to_text": {"conv_channels": 32, "input_feat_per_channel": 16, "input_channels": 1}, "wav2vec2": WAVES, "hubert": WAVES, "wavlm": WAVES,
    "audio-spectrogram-transformer": {"max_length": 64, "frequency_stride": 8, "time_stride": 8},
}


def configured(kind: str) -> Any:
    """The smallest sensible configuration of a kind of model."""
    base = transformers.AutoConfig.for_model(kind)
    known = {name: value for name, value in SIZES.items() if name in base.to_dict() and not isinstance(base.to_dict()[name], (list, tuple, dict))}
    return type(base)(**{**known, **MORE.get(kind, {})})


def checked(model: nn.Module, inputs: dict[str, Tensor], dynamic: dict[str, dict[int, str]] | None) -> tuple[nn.Module, nn.Module]:
    """The compiled model and the masked one in torch, which agree on the example and, where sizes vary, on a smaller one."""
    compiled = sc.compile(model, inputs, recipe=sc.Pipeline.parse(f"{MASKED} | pack() | lower()"), dynamic=dynamic, target="cpu")
    masked = instantiate(sc.Pipeline.parse(MASKED).run(capture(model, inputs, dynamic)))
    smaller = {name: value[:1, : value.shape[1] - 3] if 1 in (dynamic or {}).get(name, {}) else value[:1] for name, value in inputs.items()}
    for given in [inputs, *([smaller] if dynamic else [])]:
        with torch.no_grad():
            expected, actual = masked(**given), compiled(**given)
        assert type(actual) is type(expected)
        pairs = list(zip(floats(expected), floats(actual), strict=True))
        assert pairs
        for a, b in pairs:
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4 * float(a.abs().max()), equal_nan=True)
    return compiled, masked


def floats(result: Any) -> list[Tensor]:
    """The tensors of numbers in what a model returns; caches are no part of it."""
    if isinstance(result, Tensor):
        return [result] if result.is_floating_point() else []
    inside = result.to_tuple() if hasattr(result, "to_tuple") else result
    return [one for part in inside for one in floats(part)] if isinstance(inside, (tuple, list)) else []


def words(*shape: int) -> Tensor:
    return torch.randint(3, 90, shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", CAUSAL)
def test_language_models(kind: str) -> None:
    model, ids = transformers.AutoModelForCausalLM.from_config(configured(kind)).eval(), words(2, 16)
    compiled, masked = checked(model, {"input_ids": ids}, {"input_ids": {0: "batch", 1: "tokens"}})
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(compiled.generate(ids, **options), masked.generate(ids, **options))


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders(kind: str) -> None:
    ids = words(2, 16)
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    axes = {0: "batch", 1: "tokens"}
    checked(transformers.AutoModel.from_config(configured(kind)).eval(), {"input_ids": ids, "attention_mask": mask},
            {"input_ids": axes, "attention_mask": axes})


@pytest.mark.parametrize("kind", VISION)
def test_images(kind: str) -> None:
    config = configured(kind)
    size = getattr(config, "image_size", 32)
    size = size if isinstance(size, int) else size[0]
    checked(transformers.AutoModel.from_config(config).eval(), {"pixel_values": torch.randn(2, 3, size, size)}, {"pixel_values": {0: "batch"}})


@pytest.mark.parametrize("kind", PAIRS)
def test_encoders_and_decoders(kind: str) -> None:
    model = transformers.AutoModelForSeq2SeqLM.from_config(configured(kind)).eval()
    checked(model, {"input_ids": words(2, 16), "decoder_input_ids": words(2, 8)},
            {"input_ids": {0: "batch", 1: "tokens"}, "decoder_input_ids": {0: "batch", 1: "written"}})


@pytest.mark.parametrize("kind", SPEECH)
def test_speech(kind: str) -> None:
    model = transformers.AutoModelForSpeechSeq2Seq.from_config(configured(kind)).eval()
    checked(model, {"input_features": torch.randn(2, *SPEECH[kind]), "decoder_input_ids": words(2, 8)}, None)


@pytest.mark.parametrize("kind", SOUND)
def test_sound(kind: str) -> None:
    model = transformers.AutoModel.from_config(configured(kind)).eval()
    checked(model, {"input_values": torch.randn(2, *SOUND[kind])}, {"input_values": {0: "batch"}})
