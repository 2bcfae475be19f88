"""Attention of models that stay eager Python: an attention function in the library's own registry, which models of Hugging Face ask by name.

A module finds its function by its configuration, which a compiled model has a copy of, and its indexer on itself. Nothing of the user's own
model, nor of other models in the process, changes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .branches import Branches, parse
from .errors import ModelError
from .indexer import Indexer
from .ops import attend
from .ops.attend_blocks import scale_of
from .program import set_tensor

NAME, DENSE_TOKENS = "sparsify", "sparsify_dense_tokens"    # the latter: of models in which one token attends to all keys, in every layer
FAR = 1 << 29   # keys, more than any text has
WATCHED = "_sparsify_watched"  # attribute of keys: the layer of a cache that wants to see their queries
_NAMES = "_sparsify_learned"
_REGISTRY, _INDEXER, LEARNED = "ALL_ATTENTION_FUNCTIONS", "_sparsify_indexer", "sparsify_"  # LEARNED: what a tensor's name begins with
_REFUSED = {"softcap": "its scores are capped", "s_aux": "it has sinks that are learned"}


def find_library_attentions(model: nn.Module) -> dict[str, str | None]:
    """Module path -> None for every attention that asks the registry, or why it cannot be given an indexer."""
    return {path: _unfit(module, model, path) for path, module in model.named_modules() if _asks_registry(module)}


def _asks_registry(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and _REGISTRY in code.co_names and hasattr(getattr(module, "config", None), "_attn_implementation")


def _unfit(module: nn.Module, model: nn.Module, path: str) -> str | None:
    config: Any = module.config
    if not getattr(module, "is_causal", True) and not _has_sdpa(model, path):
        return "its library has no SDPA for it, so only its mask says whether it is causal"
    window = getattr(module, "sliding_window", getattr(config, "sliding_window", None))
    if window:
        return f"it reads a window of {window} tokens already"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return _REFUSED["softcap"]
    return _REFUSED["s_aux"] if hasattr(module, "sinks") else None


def _has_sdpa(model: nn.Module, path: str) -> bool:
    """What the innermost model of the library around a module says; an attention of theirs is told by `is_causal` what its mask need not say."""
    names = path.split(".") if path else []
    outer = [model.get_submodule(".".join(names[:depth])) for depth in range(len(names) + 1)]
    return bool(next((module._supports_sdpa for module in reversed(outer) if hasattr(module, "_supports_sdpa")), True))


def library_shape(module: nn.Module) -> tuple[int, int, int]:
    """Heads, groups of them that share keys, and width of such an attention."""
    config: Any = module.config
    heads = int(config.num_attention_heads)
    return heads, int(getattr(config, "num_key_value_heads", None) or heads), int(getattr(module, "head_dim", None) or config.hidden_size // heads)


def give_indexers(model: nn.Module, indexers: Mapping[str, str], learned: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Let these attentions of a private copy of a model choose their blocks, with the tensors that their indexers learned.

    The others of the same configuration attend densely.
    """
    if not indexers:
        return
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from .library_cache import before_forward
    from .library_cache_evicting import pass_on

    for name, mask in ((NAME, _mask), (DENSE_TOKENS, _mask_of_dense_tokens)):
        ALL_ATTENTION_FUNCTIONS.register(name, _attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, mask)
    name = DENSE_TOKENS if all(parse(text).is_dense(1, FAR) for text in indexers.values()) else NAME
    model.register_forward_pre_hook(before_forward, with_kwargs=True)
    for path, text in indexers.items():
        indexer = parse(text)
        setattr(model.get_submodule(path), _INDEXER, indexer)
        setattr(model.get_submodule(path), _NAMES, indexer.learned)  # torch.compile cannot look into a property that takes a lock
        for learned_name, tensor in learned.get(path, {}).items():
            set_tensor(model.get_submodule(path), LEARNED + learned_name, tensor)
        model.get_submodule(path.rpartition(".")[0]).register_forward_pre_hook(pass_on, with_kwargs=True)
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            config._attn_implementation = name


def take_indexers(model: nn.Module) -> tuple[dict[str, str], dict[str, dict[str, Tensor]]]:
    """What give_indexers gave to a model, which is as if it had been given nothing afterwards: of models that were trained with it."""
    indexers: dict[str, str] = {}
    learned: dict[str, dict[str, Tensor]] = {}
    for path, module in model.named_modules():
        indexer = module.__dict__.pop(_INDEXER, None)
        if isinstance(indexer, Indexer | Branches):
            indexers[path] = str(indexer)
            learned[path] = {name: getattr(module, LEARNED + name) for name in indexer.learned}
            for name in indexer.learned:
                delattr(module, LEARNED + name)
    return indexers, {path: tensors for path, tensors in learned.items() if tensors}


def set_function(model: nn.Module, path: str, function: Callable[[Tensor, Tensor, Tensor, Tensor | None, bool, float | None], Tensor]) -> None:
    """Let an attention that has an indexer be computed by (query, key, value, mask, is_causal, scale) -> [B, H, Q, E] instead."""
    setattr(model.get_submodule(path), _INDEXER, function)


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
               scaling: float | None = None, is_causal: bool | None = None, position_bias: Tensor | None = None,
               **options: Any) -> tuple[Tensor, None]:
    """What the registry hands out: query [B, H, Q, D], key and value [B, G, K, D] -> [B, Q, H, D]."""
    for name, why in _REFUSED.items():
        if options.get(name) is not None:
            raise ModelError(f"this attention cannot choose blocks: {why}", where=type(module).__name__, hint="name it in the pass's ignore")
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    watched: Any = getattr(key, WATCHED, None)
    if attention_mask is not None:
        if attention_mask.shape[-1] < key.shape[2]:  # a static cache is longer than what has been said
            key, value = (t[:, :, :attention_mask.shape[-1]] for t in (key, value))
        causal = causal and attention_mask.dim() == 2
        attention_mask = attention_mask[:, None, None] if attention_mask.dim() == 2 else attention_mask
    if watched is not None:
        attention_mask = watched.mask(attention_mask, query.shape[2])
    if position_bias is not None:
        if watched is not None and watched.moved:
            raise ModelError("the tokens that this cache holds do not stand in their places, and what is added to the scores is by place",
                             where=type(module).__name__, hint="use a cache that keeps everything in its order")
        attention_mask = position_bias if attention_mask is None else _added(position_bias, attention_mask)
    indexer = getattr(module, _INDEXER, None)
    if indexer is None:
        out = attend.dense(query, key, value, attention_mask, is_causal=causal, scale=scaling)
    elif not isinstance(indexer, Indexer | Branches):
        out = indexer(query, key, value, attention_mask, causal, scaling)
    else:
        learned = [getattr(module, LEARNED + name) for name in getattr(module, _NAMES)]
        if torch.compiler.is_compiling():
            out = attend.op(query, key, value, attention_mask, learned, is_causal=causal, scale=scaling, indexer=str(indexer))
        else:
            out = attend.by_indexer(indexer, query, key, value, attention_mask, learned, is_causal=causal, scale=scaling)
    if watched is not None:
        watched.observe(query, key, attention_mask, scale_of(query, scaling))
    return out.transpose(1, 2).contiguous(), None


def _added(bias: Tensor, mask: Tensor) -> Tensor:
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else bias + mask


def _of_held(mask: Tensor, forgotten: int) -> Tensor:
    """The columns of a mask [B, tokens] of the keys that a cache still holds. Raises ModelError where padding stands among the first ones."""
    after: int = getattr(forgotten, "after", 0)
    if forgotten and after and not bool(mask[:, :after].all()):
        raise ModelError("a cache that forgets keeps the first tokens, and here some of these are padding", where="streaming_cache",
                         hint="generate texts of different lengths one by one, or use a cache that keeps everything")
    return torch.cat((mask[:, :after], mask[:, after + forgotten:]), 1) if forgotten else mask


def _mask(batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor = 0, kv_offset: int = 0,
          mask_function: Callable[..., Any] | None = None, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    """None where all keys count, bool [B, K] where some are padding, [B, 1, Q, K] where the model masks in a way of its own; K is what is filled."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

    filled = min(int(q_offset) + q_length - kv_offset, kv_length) if mask_function is not bidirectional_mask_function else kv_length
    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        if getattr(kv_offset, "after", 0):
            raise ModelError("this model masks in a way of its own, and its cache forgets", hint="use a cache that keeps everything")
        options = {**options, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        mask: Tensor = sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **options)
        return mask[..., :filled]
    if attention_mask is not None:
        attention_mask = _of_held(attention_mask.bool(), kv_offset)[:, :filled]
        if attention_mask.shape[1] == kv_length and not torch.compiler.is_compiling() and bool(attention_mask.all()):
            return None
        return attention_mask
    return None if filled == kv_length else torch.ones(batch_size, filled, dtype=torch.bool, device=options.get("device"))


def _mask_of_dense_tokens(batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor = 0, kv_offset: int = 0,
                          mask_function: Callable[..., Any] | None = None, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    """The same; under torch.compile one token's mask is of all places of a static cache, so that how many are filled need not be known."""
    from transformers.masking_utils import causal_mask_function

    if not (torch.compiler.is_compiling() and isinstance(q_offset, Tensor) and q_length == 1 and mask_function is causal_mask_function):
        return _mask(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **options)
    filled = (torch.arange(kv_length, device=q_offset.device) <= q_offset - kv_offset).expand(batch_size, kv_length)
    return filled if attention_mask is None else filled & torch.nn.functional.pad(attention_mask.bool(), (0, kv_length - attention_mask.shape[1]))
