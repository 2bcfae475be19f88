"""Experts that were made of a dense Hugging Face model, as a model of the library that has such experts itself: Mixtral."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

WHERE = "to_mixtral"
# What a configuration of the Llama family and Mixtral's have in common.
SHARED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act", "max_position_embeddings",
          "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_parameters",
          "attention_dropout", "head_dim")  # fmt: skip

TIED = ("lm_head.weight", "model.embed_tokens.weight")


def to_mixtral(module: nn.Module, config: PreTrainedConfig, top_k: int) -> nn.Module:
    """A transformers.MixtralForCausalLM, with its save_pretrained(), of the same outputs.

    module  what attach() made of a Llama-like language model with sparse_upcycling(): copies in every FFN, nothing shared, weights that add to 1
    config  the dense model's
    top_k   experts of each row, as the recipe has it

    Raises InputError where Mixtral has no place for what the module holds: shared experts, biases, routers that are no linear, dense layers.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    state = dict(module.state_dict())
    found = [_taken(state, f"model.layers.{layer}.mlp") for layer in range(int(config.num_hidden_layers))]
    experts, hidden = found[0]["experts.gate_up_proj"].shape[0], found[0]["experts.down_proj"].shape[2]
    if not 1 <= top_k <= experts:
        raise InputError(f"top_k is between 1 and the {experts} experts, got {top_k}", where=WHERE)
    shared = {name: getattr(config, name) for name in SHARED if hasattr(config, name)}
    with torch.device("meta"):
        model: Any = MixtralForCausalLM(MixtralConfig(**shared, intermediate_size=hidden, num_local_experts=experts, num_experts_per_tok=top_k))
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    whole = {name: value for name, value in state.items() if name in known}
    whole |= {f"model.layers.{layer}.mlp.{name}": value for layer, tensors in enumerate(found) for name, value in tensors.items()}
    if config.tie_word_embeddings:
        whole |= {name: whole[other] for name, other in (TIED, TIED[::-1]) if name not in whole and other in whole}
    missing, extra = sorted(known - set(whole)), sorted(name for name in state if name not in known and _is_weight(name))
    if missing or extra:
        raise InputError(f"Mixtral has no place for {extra[:3]}, or misses {missing[:3]}", where=WHERE)
    made: nn.Module = MixtralForCausalLM(model.config).to(next(iter(whole.values())).dtype).eval()
    made.load_state_dict(whole)
    return made


def _taken(state: dict[str, Tensor], path: str) -> Mapping[str, Tensor]:
    """Mixtral's tensors of one layer; what they are made of goes out of the state."""
    names = ("router.weight", "experts.gate", "experts.up", "experts.down")
    parts = {name: state.pop(key) for name in names if (key := f"{path}.{name}_folded") in state}
    if len(parts) < len(names):
        raise InputError("has no experts of gate, up and down with a linear router", where=f"{WHERE}, {path}",
                         hint="attach(model, example_inputs, sc.recipes.sparse_upcycling())")
    left = [name for name in state if name.startswith(f"{path}.")]
    if left:
        raise InputError(f"Mixtral has no place for {left[0]}", where=WHERE, hint="sparse_upcycling() has neither shared experts nor biases")
    return {"gate.weight": parts["router.weight"], "experts.gate_up_proj": torch.cat([parts["experts.gate"], parts["experts.up"]], 1),
            "experts.down_proj": parts["experts.down"]}


def _is_weight(name: str) -> bool:
    return name.endswith(("weight", "bias", "_folded"))
