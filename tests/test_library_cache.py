"""The cache that appends in place: the same tokens as DynamicCache, whatever is done to it, and no copy of what was said before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from sparsify_compiler.library_cache import AppendingLayer, append_in_place  # noqa: E402


def states(tokens: int, batch: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    made = torch.randn(2, batch, tokens, 3, 4, dtype=torch.float32).to(dtype).transpose(2, 3)  # as projections leave them
    return made[0], made[1]


def both() -> tuple[Any, Any]:
    ours = transformers.DynamicCache()
    append_in_place(ours)
    return ours, transformers.DynamicCache()


ACTIONS: dict[str, Any] = {
    "append": lambda cache: None,
    "crop": lambda cache: cache.crop(-3),
    "beams": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
    "reset": lambda cache: cache.reset(),
}


@pytest.mark.parametrize("action", list(ACTIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_holds_what_a_dynamic_cache_holds(action: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    caches = both()
    for tokens in (5, 1, 300, 1, 700, 2):
        given = [(states(tokens, dtype=dtype)) for _ in range(2)]
        for layer, (key, value) in enumerate(given):
            found, expected = (cache.update(key, value, layer) for cache in caches)
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])
            assert found[0].stride(-1) == 1
        assert caches[0].get_seq_length() == caches[1].get_seq_length()
        for cache in caches:
            ACTIONS[action](cache)


def test_a_batch_may_change_its_size() -> None:
    ours, theirs = both()
    for batch in (2, 4):
        key, value = states(3, batch)
        found, expected = (cache.update(key, value, 0) for cache in (ours, theirs))
        assert torch.equal(found[0], expected[0])
        for cache in (ours, theirs):
            cache.batch_repeat_interleave(2)


def test_a_token_is_written_and_nothing_else_moves() -> None:
    layer = AppendingLayer()
    first, _ = layer.update(*states(10))
    kept = first.clone()
    key, value = states(1)
    after, _ = layer.update(key, value)
    assert after.data_ptr() == first.data_ptr()
    assert torch.equal(after[:, :, :10], kept)
    layer.crop(-4)
    again, _ = layer.update(*states(1))
    assert again.data_ptr() == first.data_ptr()
    assert again.shape[2] == 8


def test_a_cache_that_holds_tokens_already_goes_on() -> None:
    cache, key = transformers.DynamicCache(), states(6)
    cache.update(*key, 0)
    append_in_place(cache)
    more = states(2)
    found, _ = cache.update(*more, 0)
    assert torch.equal(found, torch.cat((key[0], more[0]), 2))
    assert isinstance(cache.layers[0], AppendingLayer)


def test_caches_of_another_kind_stay_as_they_are() -> None:
    config = transformers.LlamaConfig(num_hidden_layers=2, hidden_size=16, num_attention_heads=2)
    static = transformers.StaticCache(config=config, max_cache_len=8)
    kinds = [type(layer) for layer in static.layers]
    append_in_place(static)
    append_in_place(None)
    assert [type(layer) for layer in static.layers] == kinds
