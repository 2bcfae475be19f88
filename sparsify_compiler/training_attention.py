"""Attention in training on a CPU: torch's backward pass of short attentions is 2.7 times as fast in float32 as in 16 bits, so they run in that."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .program import Program

aten = torch.ops.aten
KEYS = 256  # measured, forward and backward of 2048 tokens in bfloat16: 26 ms in place of 70 at 64 keys, 44 of 57 at 256, 135 of 94 at 512


def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
           *, scale: float | None = None, enable_gqa: bool = False) -> Tensor:
    """scaled_dot_product_attention, arguments and result; 16 bits on a CPU with at most KEYS keys are brought to float32 and back."""
    plain = type(query) is Tensor and query.requires_grad and torch.is_grad_enabled()  # an export runs on stand-ins: it sees the attention alone
    if plain and query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16) and key.shape[-2] <= KEYS:
        mask = attn_mask.float() if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
        operands = query.float(), key.float(), value.float(), mask
        with torch.autocast("cpu", enabled=False):
            return scaled_dot_product_attention(*operands, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa).to(query.dtype)
    return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def put_attentions(program: Program) -> None:
    """Let attend() take the place of every attention of a Program's graphs."""
    for _, node in program.nodes():
        if node.op == "call_function" and node.target is aten.scaled_dot_product_attention.default:
            node.target = attend
