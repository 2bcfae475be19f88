"""The cache that appends in place: the same tokens as DynamicCache, whatever is done to it, and no copy of what was said before."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from models.language import llama
from torch import Tensor

transformers = pytest.importorskip("transformers")

import sparsify_compiler as sc  # noqa: E402
from sparsify_compiler import key_sums, library_cache_streaming  # noqa: E402
from sparsify_compiler.capture import capture  # noqa: E402
from sparsify_compiler.compiled import CompiledModel  # noqa: E402
from sparsify_compiler.errors import InputError, ModelError  # noqa: E402
from sparsify_compiler.key_sums import of_blocks  # noqa: E402
from sparsify_compiler.key_value_storage import Codes, LowRank, Plain, Repaired  # noqa: E402
from sparsify_compiler.library_attention import _of_held  # noqa: E402
from sparsify_compiler.library_cache import AppendingLayer, append_in_place  # noqa: E402
from sparsify_compiler.library_cache_encoded import EncodedLayer  # noqa: E402
from sparsify_compiler.passes_api import Context  # noqa: E402
from sparsify_compiler.pipeline import Pipeline  # noqa: E402


@cache
def streamed(window: int, sinks: int) -> CompiledModel:
    text = f"select_blocks(always=(SlidingWindow(window={window}), Sinks(tokens={sinks})), block_q=4, block_k=4)"
    return CompiledModel(Pipeline.parse(text).run(capture(llama(max_position_embeddings=128), {"input_ids": torch.randint(1, 96, (2, 12))},
                                                          {"input_ids": {0: "batch", 1: "tokens"}}), Context()))


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
        for each in caches:
            ACTIONS[action](each)


@pytest.mark.parametrize("action", list(ACTIONS))
def test_sums_of_keys_follow_what_the_cache_holds(action: str) -> None:
    torch.manual_seed(0)
    cache = both()[0]
    for tokens in (5, 1, 30, 1, 400, 2, 9):
        key, _ = cache.update(*states(tokens), 0)
        for kind, block in (("sum", 8), ("squares", 8), ("min", 4), ("max", 4), ("sum", 3)):
            assert hasattr(key, "_sparsify_sums")
            torch.testing.assert_close(of_blocks(key, kind, block), of_blocks(key.clone(), kind, block))
        ACTIONS[action](cache)


def test_keys_that_somebody_put_in_the_place_of_others_are_kept() -> None:
    layer = AppendingLayer()
    layer.update(*states(10))
    other = torch.randn(2, 3, 266, 4)[:, :, :10]  # as long and as wide apart in memory as the layer's own
    assert other.stride() == layer.keys.stride()
    layer.keys = other
    key, _ = layer.update(*states(1))
    assert torch.equal(key[:, :, :10], other)


def test_sums_of_whole_blocks_are_taken_once() -> None:
    layer = AppendingLayer()
    key, _ = layer.update(*states(16))
    of_blocks(key, "sum", 4)
    key[:, :, :16] = 7.0  # behind its back
    key, _ = layer.update(*states(3))
    assert not torch.allclose(of_blocks(key, "sum", 4)[:, :, 0], torch.tensor(28.0))
    mask = torch.ones(2, 19, dtype=torch.bool)
    mask[0, :2] = False
    assert of_blocks(key, "sum", 4, mask)[0, 0, 0, 0] == 14.0
    assert of_blocks(key, "min", 4, ~torch.ones_like(mask)).isinf().all()


@pytest.mark.parametrize(("change", "entries"), [
    (lambda layer: layer.reorder_cache(torch.tensor([1, 1])), [1, 1]), (lambda layer: layer.reorder_cache(torch.tensor([0, 1])), [0, 1]),
    (lambda layer: layer.batch_repeat_interleave(2), [0, 0, 1, 1]), (lambda layer: layer.batch_select_indices(torch.tensor([1])), [1]),
    (lambda layer: layer.batch_select_indices(torch.tensor([False, True])), [1])], ids=["beams", "same beams", "repeat", "select", "mask"])
@pytest.mark.parametrize("masked", [False, True])
def test_sums_go_with_the_beams_that_go_on(change: Any, entries: list[int], masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, looked, reduced = AppendingLayer(), [], key_sums._reduced
    monkeypatch.setattr(key_sums, "_reduced", lambda key, *rest: looked.append(key.shape[2]) or reduced(key, *rest))
    key, _ = layer.update(*states(18))
    mask = torch.arange(19) >= torch.tensor([[0], [3]]) if masked else None
    of_blocks(key, "sum", 4, None if mask is None else mask[:, :18])
    held = key.clone()
    change(layer)
    room = layer._room
    key, _ = layer.update(*states(1, len(entries)))
    assert layer._room is room
    assert torch.equal(key[:, :, :18], held[entries])
    looked.clear()
    own = None if mask is None else mask[entries]
    torch.testing.assert_close(of_blocks(key, "sum", 4, own), reduced(key, "sum", 4, own))
    assert looked == [3]    # the block that is not whole


def test_beams_that_stay_move_nothing_and_others_leave_what_was_handed_out() -> None:
    layer = AppendingLayer()
    key, _ = layer.update(*states(6))
    layer.reorder_cache(torch.tensor([0, 1]))
    assert layer.keys.data_ptr() == key.data_ptr()
    before = key.clone()
    layer.reorder_cache(torch.tensor([1, 0]))
    layer.update(*states(1))
    assert torch.equal(key, before)


def test_a_layer_that_holds_nothing_yet_has_no_entries() -> None:
    layer = AppendingLayer()
    layer.reorder_cache(torch.tensor([1, 0]))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([1]))
    assert layer.update(*states(3))[0].shape[2] == 3


def test_a_batch_may_change_its_size() -> None:
    ours, theirs = both()
    for batch in (2, 4):
        key, value = states(3, batch)
        found, expected = (cache.update(key, value, 0) for cache in (ours, theirs))
        assert torch.equal(found[0], expected[0])
        for each in (ours, theirs):
            each.batch_repeat_interleave(2)


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


def test_a_streaming_cache_changes_nothing_of_a_model_that_reads_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_cache_streaming, "SLACK", 5)
    sparse, ids = streamed(window=8, sinks=3), torch.randint(1, 96, (2, 50))
    with torch.no_grad():
        whole = sparse(input_ids=ids).logits
        cache, logits = sc.streaming_cache(window=8, sinks=3), []
        for start, stop in ((0, 20), (20, 26), *((i, i + 1) for i in range(26, 50))):
            logits.append(sparse(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True).logits)
            assert cache.get_seq_length() == stop
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-5, atol=1e-5)
    layer = cache.layers[0]
    assert layer.keys.shape[2] <= 3 + 7 + 5 + 1
    assert layer.forgotten > 20
    with pytest.raises(ModelError, match="taken back"):
        cache.crop(-10)
    cache.reset()
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("options", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}])
def test_generate_with_a_streaming_cache(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    monkeypatch.setattr(library_cache_streaming, "SLACK", 5)
    sparse, ids = streamed(window=8, sinks=3), torch.randint(1, 96, (1, 20))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        plain, bounded = (sparse.generate(ids, attention_mask=mask, max_new_tokens=30, **options, **given)
                          for given in ({}, {"past_key_values": sc.streaming_cache(8, 3)}))
    assert torch.equal(plain, bounded)


def test_a_streaming_cache_refuses_padding_among_its_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_cache_streaming, "SLACK", 5)
    sparse, ids = streamed(window=8, sinks=3), torch.randint(1, 96, (2, 30))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with torch.no_grad(), pytest.raises(ModelError, match="padding"):
        sparse.generate(ids, attention_mask=mask, max_new_tokens=9, past_key_values=sc.streaming_cache(8, 3))
    for window, sinks in ((0, 4), (8, -1)):
        with pytest.raises(InputError):
            sc.streaming_cache(window, sinks)


@pytest.mark.parametrize(("bits", "most"), [(8, 0.004), (4, 0.07)])
@pytest.mark.parametrize("action", list(ACTIONS))
def test_a_quantized_cache_holds_nearly_the_same(bits: int, most: float, action: str) -> None:
    torch.manual_seed(0)
    caches = sc.quantized_cache(bits, group=8), transformers.DynamicCache()
    for tokens in (5, 1, 30, 1, 1, 20, 2):
        given = states(tokens)
        found, expected = (cache.update(*given, 0) for cache in caches)
        for one, other in zip(found, expected, strict=True):
            assert one.shape == other.shape
            assert (one - other).abs().max() <= most * (other.max() - other.min())
            assert torch.equal(one[:, :, -8:], other[:, :, -8:])
        assert caches[0].get_seq_length() == caches[1].get_seq_length()
        for each in caches:
            ACTIONS[action](each)
    if action == "append":
        layer = caches[0].layers[0]
        assert layer._groups() == 6
        plain = sum(t.numel() * 4 for t in (caches[1].layers[0].keys, caches[1].layers[0].values))
        assert layer.resident_bytes() < plain * (0.75 if bits == 8 else 0.65)  # of 4 channels: scales weigh much


FREQUENCIES = (1.0, 0.1)  # of the four channels that states() makes
CACHES: dict[str, tuple[Any, float]] = {  # name -> how to make it, and how near it is
    "eight bits, repaired": (lambda: sc.quantized_cache(8, 8, rank=1, outliers=0.3), 0.004),
    "four bits, repaired": (lambda: sc.quantized_cache(4, 8, rank=2, outliers=0.3), 0.06),
    "two bits, full rank": (lambda: sc.quantized_cache(2, 8, rank=4), 1e-6),
    "two bits, nearly all outliers": (lambda: sc.quantized_cache(2, 8, rank=1, outliers=0.9), 0.12),
    "full rank": (lambda: encoded(LowRank(12, FREQUENCIES)), 1e-6),
    "full rank, one channel not rotated": (lambda: encoded(LowRank(99, (0.3,))), 1e-6),
}


def encoded(keys: LowRank) -> Any:
    return transformers.Cache(layer_class_to_replicate=lambda: EncodedLayer(keys, Plain(), 8))


@pytest.mark.parametrize("name", list(CACHES))
@pytest.mark.parametrize("action", list(ACTIONS))
def test_an_encoded_cache_is_exact_where_nothing_is_dropped(name: str, action: str) -> None:
    torch.manual_seed(0)
    make, most = CACHES[name]
    caches = make(), transformers.DynamicCache()
    for tokens in (5, 1, 30, 1, 1, 20, 2):
        given = states(tokens)
        for one, other in zip(*(each.update(*given, 0) for each in caches), strict=True):
            assert (one - other).abs().max() <= most * (other.max() - other.min())
            assert torch.equal(one[:, :, -8:], other[:, :, -8:])
        for each in caches:
            ACTIONS[action](each)


def test_keys_have_a_low_rank_before_they_are_rotated() -> None:
    torch.manual_seed(0)
    storage = LowRank(2, FREQUENCIES)
    flat = (torch.randn(1, 40, 2, dtype=torch.float32) @ torch.randn(1, 2, 12, dtype=torch.float32)).unflatten(-1, (3, 4)).transpose(1, 2)
    keys = storage._turned(flat.unflatten(2, (5, 8)), 0, 1).flatten(2, 3)
    found = {}
    for name, used in (("undone", storage), ("left", LowRank(2))):
        cache = encoded(used)
        cache.update(keys, keys, 0)
        assert cache.get_seq_length() == 40
        found[name] = (cache.update(keys[:, :, :1], keys[:, :, :1], 0)[0][:, :, :40] - keys).abs().max()
        layer = cache.layers[0]
        plain = 2 * 41 * 12 * 4
        assert layer.resident_bytes() < 0.85 * plain
    assert found["undone"] < 1e-5 < 0.1 < found["left"]


@pytest.mark.parametrize("tokens", [64, 40000])
def test_outliers_cost_nobody_else_a_bit(tokens: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 1, 1, tokens, 16, dtype=torch.float32)
    x[..., 7, 3], x[..., tokens - 1, 3] = 1000.0, -1000.0
    for outliers, most in ((0.05, 0.3), (0.0, 200.0)):
        storage = Repaired(Codes(4, 3), 0, outliers)
        apart = (storage.decode(storage.encode(x, 0), 0) - x).abs()
        assert most / 10 < apart.max() < most
        assert (apart[..., 7, 3] == 0) == bool(outliers)


@pytest.mark.parametrize("way", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}, {"do_sample": True, "top_k": 5}])
def test_generate_with_caches_that_drop_nothing(way: dict[str, Any]) -> None:
    model, ids = llama(max_position_embeddings=128), torch.randint(1, 96, (2, 40))
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    made = []
    for held in (None, sc.quantized_cache(4, group=8, rank=8), sc.low_rank_cache(16, group=8, model=model)):
        torch.manual_seed(0)
        with torch.no_grad():
            made.append(model.generate(ids, attention_mask=mask, max_new_tokens=20, past_key_values=held, **way))
    assert all(torch.equal(made[0], one) for one in made[1:])


def test_caches_that_cannot_be() -> None:
    for wrong in ({"rank": -1}, {"outliers": 1.0}, {"bits": 5}, {"group": 0}):
        with pytest.raises(InputError, match="bits are 2, 4 or 8"):
            sc.quantized_cache(**wrong)
    with pytest.raises(InputError, match="cannot be"):
        sc.low_rank_cache(0)
    with pytest.raises(InputError, match="0 rotations"):
        sc.low_rank_cache(4, model=torch.nn.Linear(2, 2))


@pytest.mark.parametrize(("make", "most"), [(lambda: sc.quantized_cache(8, group=8), 0.05), (lambda: sc.quantized_cache(4, group=8), 0.5),
                                            (lambda: encoded(LowRank(12, FREQUENCIES)), 1e-5)])
def test_an_encoded_cache_takes_back_more_than_its_last_tokens(make: Any, most: float) -> None:
    torch.manual_seed(0)
    cache, given = make(), states(60)
    before = cache.update(*given, 0)
    cache.update(*states(1), 0)
    cache.crop(-31)
    assert cache.get_seq_length() == 30
    more = states(4)
    for side, new, old, found in zip(range(2), more, before, cache.update(*more, 0), strict=True):
        assert found.shape[2] == 34
        assert torch.equal(found[:, :, 30:], new)
        assert (found[:, :, :30] - old[:, :, :30]).abs().max() < most, side


@pytest.mark.parametrize(("side", "place"), [(0, (..., 0)), (1, (slice(None), slice(None), 0))])
def test_a_channel_of_keys_and_a_token_of_values_spoil_no_other(side: int, place: Any) -> None:
    torch.manual_seed(0)
    cache, given = sc.quantized_cache(8, group=8), states(32)
    given[side][place] *= 1000
    cache.update(*given, 0)
    found = cache.update(*states(1), 0)[side][:, :, :32]
    apart = (found - given[side]).abs()
    apart[place] = 0
    assert apart.max() < 0.05


def test_a_streaming_cache_sums_what_it_still_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_cache_streaming, "SLACK", 5)
    cache = sc.streaming_cache(window=8, sinks=3)
    for _ in range(40):
        key, _ = cache.update(*states(1), 0)
        torch.testing.assert_close(of_blocks(key, "sum", 4), of_blocks(key.clone(), "sum", 4))


def test_a_mask_of_a_cache_that_forgot_is_that_of_what_it_holds() -> None:
    mask = torch.tensor([[True, True, False, True, True, False]])
    assert _of_held(mask, library_cache_streaming.Forgotten(2, 2)).tolist() == [[True, True, True, False]]
    assert _of_held(mask, 0) is mask
    with pytest.raises(ModelError, match="padding"):
        _of_held(mask, library_cache_streaming.Forgotten(1, 3))


def test_a_model_that_chooses_blocks_appends_in_place_inside_generate() -> None:
    cache, ids = transformers.DynamicCache(), torch.randint(1, 96, (1, 12))
    with torch.no_grad():
        streamed(window=8, sinks=3).generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, past_key_values=cache)
    assert {type(layer) for layer in cache.layers} == {AppendingLayer}


def test_generate_with_a_quantized_cache() -> None:
    model, ids = llama(max_position_embeddings=128), torch.randint(1, 96, (2, 40))
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    with torch.no_grad():
        cache = sc.quantized_cache(8, group=8)
        quantized = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        more = model(input_ids=ids[:, :1], attention_mask=torch.cat((mask, mask[:, -1:]), 1), past_key_values=cache, use_cache=True).logits
        plain = model(input_ids=ids, attention_mask=mask, use_cache=True)
        expected = model(input_ids=ids[:, :1], attention_mask=torch.cat((mask, mask[:, -1:]), 1), past_key_values=plain.past_key_values).logits
    torch.testing.assert_close(quantized.logits, plain.logits)
    assert 0 < (more - expected).abs().max() < 0.02
    with pytest.raises(InputError, match="bits"):
        sc.quantized_cache(3)
    with pytest.raises(InputError, match="whole bytes"):
        sc.quantized_cache(4).update(torch.zeros(1, 1, 2, 3, dtype=torch.float32), torch.zeros(1, 1, 2, 4, dtype=torch.float32), 0)
