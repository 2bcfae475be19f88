"""Mixtures of Hugging Face's models become one op, on a private copy; the model computes what it did."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
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

from sparsify_compiler.call import instantiate
from sparsify_compiler.capture import capture
from sparsify_compiler.library_experts import activation_name, find_library_experts
from sparsify_compiler.ops import experts_ffn

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


def test_what_computes_in_a_way_of_its_own_stays_as_it_is() -> None:
    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=4, head_dim=16, layer_types=["full_attention"])).eval()
    assert find_library_experts(model) == {"model.layers.0.mlp.experts": "its gate is computed in a way of its own"}
    program = capture(model, {"input_ids": torch.randint(3, 64, (1, 5))}, DYNAMIC)
    assert experts_ffn.op not in [node.target for _, node in program.nodes()]


@pytest.mark.parametrize(("function", "name"), [(nn.SiLU(), "silu"), (nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu_tanh"), (nn.ReLU(), "relu"),
                                                (nn.Mish(), None), (nn.Bilinear(1, 1, 1), None)])
def test_activations_are_known_by_their_values(function: nn.Module, name: str | None) -> None:
    assert activation_name(function) == name
