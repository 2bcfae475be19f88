"""A language model of random weights, small enough for every test that needs one inside generate()."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def llama(**options: Any) -> nn.Module:
    """Two layers of width 32 with grouped queries; 97 tokens, of which 0 is padding and 96 ends a text. `options` of LlamaConfig change it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    usual = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 96}
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**{**usual, **options})).eval()
    return model
