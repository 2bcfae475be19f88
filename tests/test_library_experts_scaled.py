"""Mixtures whose router scales what experts read (Llama 4) become one op of the chosen experts; the model computes what it did."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Llama4ForCausalLM, Llama4TextConfig

import sparsify_compiler as sc
from sparsify_compiler.call import instantiate
from sparsify_compiler.capture import capture
from sparsify_compiler.library_experts_scaled import find_scaled_experts
from sparsify_compiler.ops import experts_ffn
from sparsify_compiler.pipeline import Pipeline

BOTH = {0: "batch", 1: "tokens"}


def llama4(experts: int = 4, chosen: int = 1, **options: Any) -> Llama4ForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 24, "intermediate_size_mlp": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 96, "pad_token_id": 0, "attention_chunk_size": 64}
    model = Llama4ForCausalLM(Llama4TextConfig(**(sizes | options), num_local_experts=experts, num_experts_per_tok=chosen)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model


@pytest.mark.parametrize(("experts", "chosen"), [(4, 1), (5, 2), (3, 3), (1, 1)])
def test_the_chosen_experts_are_one_op(experts: int, chosen: int) -> None:
    model, ids = llama4(experts, chosen), torch.randint(1, 96, (2, 7))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    program = capture(model, {"input_ids": ids, "use_cache": False}, {"input_ids": BOTH})
    ops = [node for _, node in program.nodes() if node.target is experts_ffn.op]
    assert len(ops) == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    longer = torch.randint(1, 96, (3, 11))
    with torch.no_grad():
        found, expected = (one(input_ids=longer, use_cache=False).logits for one in (instantiate(program), model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("margin", [-1000.0, 1.0])
def test_compiled_it_generates_what_the_library_does(margin: float) -> None:
    model, ids = llama4(), torch.randint(1, 96, (2, 7))
    compiled = sc.compile(model, {"input_ids": ids}, recipe=Pipeline.parse(f"lower(margin={margin}, rounds=1)"), dynamic={"input_ids": BOTH})
    assert [row.kind for row in compiled.report().sites].count("experts") == 2
    with torch.no_grad():
        tokens: list[Tensor] = [one.generate(ids, max_new_tokens=6, do_sample=False) for one in (compiled, model)]
    assert torch.equal(tokens[0], tokens[1])


def test_what_computes_otherwise_is_left_alone_with_the_reason() -> None:
    model = llama4()
    feed: Any = model.model.layers[0].feed_forward
    forward = type(feed).forward
    feed.forward = lambda x: (lambda y, beside: (y * 2, beside))(*forward(feed, x))
    model.model.layers[1].feed_forward.experts.act_fn = nn.Mish().eval()
    found = find_scaled_experts(model)
    assert found == {"model.layers.0.feed_forward": "it computes what experts give in a way of its own",
                     "model.layers.1.feed_forward": "there is no kernel for its activation, Mish"}
    program = capture(model, {"input_ids": torch.randint(1, 96, (1, 5)), "use_cache": False})
    assert {part.path: part.reason for part in program.left_out} == found
    assert not [node for _, node in program.nodes() if node.target is experts_ffn.op]
