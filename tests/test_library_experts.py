"""Mixtures of Hugging Face's models become one op, on a private copy; the model computes what it did."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    DbrxConfig,
    DbrxForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)
from transformers.integrations import moe

from sparsify_compiler.call import instantiate
from sparsify_compiler.capture import capture
from sparsify_compiler.library_activations import activation_name
from sparsify_compiler.library_experts import _experts, find_library_experts
from sparsify_compiler.ops import experts_ffn
from sparsify_compiler.program import LeftOut

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
         "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DYNAMIC = {"input_ids": {0: "batch", 1: "tokens"}}


def mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))


def qwen() -> PreTrainedModel:
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                                              shared_expert_intermediate_size=24))


def olmoe() -> PreTrainedModel:
    return OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=8, num_experts_per_tok=3, hidden_act="gelu"))


def deepseek() -> PreTrainedModel:
    return DeepseekV3ForCausalLM(DeepseekV3Config(**SIZES, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, n_group=2, topk_group=1,
                                                  moe_intermediate_size=16, first_k_dense_replace=0, q_lora_rank=16, kv_lora_rank=8,
                                                  qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16))


@pytest.mark.parametrize("make", [mixtral, qwen, olmoe, deepseek])
def test_a_mixture_is_one_op(make: type[PreTrainedModel]) -> None:
    torch.manual_seed(0)
    model = make().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prompt = torch.randint(3, 64, (2, 5))
    program = capture(model, {"input_ids": prompt}, DYNAMIC)
    assert [node.target for _, node in program.nodes()].count(experts_ffn.op) == 1
    assert {node.meta["path"] for _, node in program.nodes() if node.target is experts_ffn.op} == {"model.layers.0.mlp.experts"}
    assert model.config._experts_implementation == "grouped_mm"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    copy, longer = instantiate(program), torch.randint(3, 64, (1, 9))
    with torch.no_grad():
        torch.testing.assert_close(copy(longer).logits, model(longer).logits, rtol=1e-4, atol=1e-4)
    options = {"attention_mask": torch.ones(2, 5, dtype=torch.int64), "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(copy.generate(prompt, **options), model.generate(prompt, **options))  # type: ignore[operator]


LATENT = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}  # DeepSeek's attention
SMALL = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
FOUR = {"num_local_experts": 4, "num_experts_per_tok": 2}
OTHERS: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {**SMALL, "num_experts": 4, "head_dim": 16},
    "Qwen3Next": {**SMALL, "num_experts": 4, "shared_expert_intermediate_size": 16, "layer_types": ["full_attention"], "head_dim": 16},
    "DeepseekV2": {**SMALL, **LATENT, "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0},
    "Glm4Moe": {**SMALL, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "head_dim": 16},
    "Dots1": {**SMALL, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "head_dim": 16},
    "GraniteMoe": FOUR, "GraniteMoeShared": {**FOUR, "shared_intermediate_size": 16}, "Phimoe": FOUR,
    "FlexOlmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "Ernie4_5_Moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 0, "moe_num_shared_experts": 1},
    "HunYuanMoEV1": {"num_experts": 4, "moe_topk": 2, "head_dim": 16},
    "Lfm2Moe": {**SMALL, "num_experts": 4, "num_dense_layers": 0, "layer_types": ["full_attention"]},
    "MiniMax": {**FOUR, "layer_types": ["full_attention"], "head_dim": 16},
}


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_are_one_op_too(family: str) -> None:
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**SIZES, **OTHERS[family])).eval()
    program = capture(model, {"input_ids": torch.randint(3, 64, (2, 5))}, DYNAMIC)
    assert [node.target for _, node in program.nodes()].count(experts_ffn.op) == 1
    longer = torch.randint(3, 64, (1, 9))
    with torch.no_grad():
        torch.testing.assert_close(instantiate(program)(longer).logits, model(longer).logits, rtol=1e-4, atol=1e-5)


def test_experts_that_read_the_weights_of_another_module_stay_as_they_are() -> None:
    """DBRX: its experts hand slices of a module's weights to that module, in a loop over those that were chosen."""
    torch.manual_seed(0)
    ffn = {"ffn_act_fn": {"name": "silu"}, "ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32}
    model = DbrxForCausalLM(DbrxConfig(d_model=32, n_heads=2, n_layers=1, max_seq_len=64, vocab_size=64, ffn_config=ffn, pad_token_id=0,
                                       attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4})).eval()
    program, longer = capture(model, {"input_ids": torch.randint(3, 64, (2, 5))}, DYNAMIC), torch.randint(3, 64, (1, 9))
    reasons = {part.path.rpartition(".")[2]: part.reason for part in program.left_out}
    assert "control flow" in reasons["experts"]
    assert "come to it as arguments" in reasons["mlp"]
    with torch.no_grad():
        torch.testing.assert_close(instantiate(program)(longer).logits, model(longer).logits, rtol=1e-4, atol=1e-5)


def test_what_computes_in_a_way_of_its_own_stays_as_it_is() -> None:
    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=4, head_dim=16, layer_types=["full_attention"])).eval()
    assert find_library_experts(model) == {"model.layers.0.mlp.experts": "its gate is computed in a way of its own"}
    program = capture(model, {"input_ids": torch.randint(3, 64, (1, 5))}, DYNAMIC)
    assert experts_ffn.op not in [node.target for _, node in program.nodes()]
    assert program.left_out[-1] == LeftOut("model.layers.0.mlp.experts", "its gate is computed in a way of its own")


class Library(nn.Module):
    """What the library's decorator makes of a class of experts: four of 6 neurons, 8 inputs and outputs, kept as the flags say."""

    _apply_gate = moe._default_apply_gate

    def __init__(self, gate: bool, transposed: bool, concatenated: bool, bias: bool, post_norm: bool = False) -> None:
        super().__init__()
        self.has_gate, self.has_bias, self.has_post_expert_norm = gate, bias, post_norm
        self.is_transposed, self.is_concatenated = transposed, concatenated
        self.config, self.act_fn, self._sparsify_activation = MixtralConfig(**SIZES), nn.SiLU(), "silu"
        self.own = {name: torch.randn(4, *size) for name, size in {"gate": (6, 8), "up": (6, 8), "down": (8, 6), "gate_bias": (6,), "up_bias": (6,),
                                                                    "bias": (8,)}.items()}
        self._keep("gate_up_proj", "up_proj", "gate", "up", transposed)
        self.down_proj = self.own["down"].transpose(1, 2).contiguous() if transposed else self.own["down"]
        if bias:
            self._keep("gate_up_proj_bias", "up_proj_bias", "gate_bias", "up_bias", False)
            self.down_proj_bias = self.own["bias"]

    def _keep(self, both: str, alone: str, gate: str, up: str, transposed: bool) -> None:
        parts = [self.own[gate], self.own[up]] if self.has_gate else [self.own[gate]]
        kept = torch.cat(parts, 1) if self.is_concatenated else torch.stack(parts, 2).flatten(1, 2)
        setattr(self, both if self.has_gate else alone, kept.transpose(1, 2).contiguous() if transposed else kept)


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize(("transposed", "concatenated"), [(False, True), (True, True), (False, False), (True, False)])
@pytest.mark.parametrize("bias", [True, False])
def test_experts_are_read_as_the_library_keeps_them(gate: bool, transposed: bool, concatenated: bool, bias: bool) -> None:
    torch.manual_seed(0)
    module, x, chosen, weights = Library(gate, transposed, concatenated, bias), torch.randn(5, 8), torch.randint(4, (5, 2)), torch.rand(5, 2)
    own = {name: tensor for name, tensor in module.own.items() if (bias or "bias" not in name) and (gate or not name.startswith("up"))}
    expected = experts_ffn.op(x, chosen, weights, **{"up": None, **own}, activation="silu")
    torch.testing.assert_close(_experts(module, x, chosen, weights), expected)


def test_why_experts_are_not_taken() -> None:
    fits, normed, parallel, other = (Library(True, False, True, False, post_norm) for post_norm in (False, True, False, False))
    parallel._is_expert_parallel, other.act_fn = True, nn.Mish()
    found = find_library_experts(nn.ModuleList([fits, normed, parallel, other]))
    assert found["0"] is None
    assert all(why in str(found[path]) for path, why in (("1", "normalises"), ("2", "several processes"), ("3", "Mish")))


@pytest.mark.parametrize(("function", "name"), [(nn.SiLU(), "silu"), (nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu_tanh"), (nn.ReLU(), "relu"),
                                                (nn.Mish(), None), (nn.Bilinear(1, 1, 1), None)])
def test_activations_are_known_by_their_values(function: nn.Module, name: str | None) -> None:
    assert activation_name(function) == name
