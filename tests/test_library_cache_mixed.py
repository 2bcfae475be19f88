"""The cache that holds a prompt in two precisions: which tokens in which, by a slow reference; nothing else changes, in whatever order they lie."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from models.language import llama
from torch import Tensor

transformers = pytest.importorskip("transformers")

import sparsify_compiler as sc  # noqa: E402
from sparsify_compiler import library_attention  # noqa: E402
from sparsify_compiler.capture import capture  # noqa: E402
from sparsify_compiler.compiled import CompiledModel  # noqa: E402
from sparsify_compiler.errors import InputError, ModelError  # noqa: E402
from sparsify_compiler.key_value_storage import Codes  # noqa: E402
from sparsify_compiler.library_cache_evicting import EvictingLayer  # noqa: E402
from sparsify_compiler.passes_api import Context  # noqa: E402
from sparsify_compiler.pipeline import Pipeline  # noqa: E402

FINE = {"bits": 8, "rest_bits": 8, "group": 4}


@cache
def compiled() -> CompiledModel:
    given = {"input_ids": torch.ones(2, 12, dtype=torch.long), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    model = llama(max_position_embeddings=128, num_hidden_layers=2)
    text = "select_blocks(always=(Everything(),), block_q=4, block_k=4)"
    return CompiledModel(Pipeline.parse(text).run(capture(model, given, {name: {0: "batch", 1: "tokens"} for name in given}), Context()))


def prompt(padded: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(1, 96, (2, 42))
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    return {"input_ids": ids, "attention_mask": mask}


def after(held: Any, padded: int = 0, tokens: int = 3) -> Tensor:
    """The logits of some tokens behind a prompt that the cache holds."""
    given = prompt(padded)
    compiled()(**given, past_key_values=held, use_cache=True)
    return more(held, given["attention_mask"], tokens)


def more(held: Any, mask: Tensor, tokens: int = 3) -> Tensor:
    ids = torch.full((len(mask), tokens), 7)
    places = torch.arange(42, 42 + tokens).expand(len(mask), -1)
    found: Tensor = compiled()(input_ids=ids, attention_mask=torch.cat((mask, torch.ones_like(ids)), 1), position_ids=places, past_key_values=held,
                               use_cache=True).logits
    return found


@torch.no_grad()
@pytest.mark.parametrize("padded", [0, 29])
def test_in_many_bits_all_is_as_before(padded: int) -> None:
    expected = after(transformers.DynamicCache(), padded)
    held = sc.mixed_cache(mass=0.6, **FINE)
    found = after(held, padded)
    assert held.layers[0]._codes() >= 28
    assert float((found - expected).abs().max() / expected.abs().max()) < 0.02
    assert held.get_seq_length() == 45


@torch.no_grad()
def test_a_mask_with_holes_follows_its_tokens() -> None:
    """Padding on the left stands in its place in any order: it is what is looked at least, and comes first."""
    given = prompt()
    given["attention_mask"][0, 5:30:2] = 0
    found = []
    for held in (transformers.DynamicCache(), sc.mixed_cache(mass=0.6, **FINE)):
        compiled()(**given, past_key_values=held, use_cache=True)
        found.append(more(held, given["attention_mask"]))
    assert float((found[1] - found[0]).abs().max() / found[0].abs().max()) < 0.02


@torch.no_grad()
@pytest.mark.parametrize("mass", [0.3, 0.6, 0.9])
def test_salient_tokens_are_held_in_more_bits(monkeypatch: pytest.MonkeyPatch, mass: float) -> None:
    """By what the last rows look at, in the mean of all heads: the fewest tokens of that share, and the last rows' own."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    observe = EvictingLayer.observe

    def watch(self: Any, query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> None:
        if query.shape[2] == key.shape[2]:
            seen.append((query.clone(), key.clone(), self.values.clone()))
        observe(self, query, key, mask, scale)

    monkeypatch.setattr(EvictingLayer, "observe", watch)
    held = sc.mixed_cache(mass=mass, bits=8, rest_bits=2, group=4, window=5)
    after(held)
    for layer, (query, key, value) in zip(held.layers, seen, strict=True):
        heads = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        below = torch.ones(42, 42).tril()[-5:]
        shares = torch.softmax((query[:, :, -5:] @ heads.mT / key.shape[3]**0.5).masked_fill(below == 0, -torch.inf), -1)
        looked = (shares.sum(2) / below.sum(0)).mean(1)
        largest, places = looked.sort(1, descending=True)
        count = max(int((largest.cumsum(1) < mass * largest.sum(1, keepdim=True)).sum(1).max()) + 1, 5)
        decoded = [torch.cat([*(ways[side].decode(pair[side], 0).flatten(2, 3) for ways, pair in zip(layer._ways, layer._coded, strict=True)),
                              (layer.keys, layer.values)[side][:, :, :layer.kept]], 2) for side in range(2)]
        rest = (42 - count) // 4 * 4
        assert 4 <= layer.kept < 8  # the last group stays as it is
        for entry in range(2):
            order = layer._order[entry]
            salient = set(range(37, 42)) | set([place for place in places[entry].tolist() if place < 37][:count - 5])
            assert order.sort().values.tolist() == list(range(42))
            assert not salient & set(order[:rest].tolist())
            for side, exact in enumerate((key, value)):
                wrong = (decoded[side][entry] - exact[entry][:, order]).abs().amax((0, 2))
                assert wrong[rest:].max() < 0.02 * exact.abs().max()
                coarse = Codes(2, 3 + side).encode(exact[entry][:, order[:rest]].unflatten(1, (-1, 4))[None], 0)
                expected = Codes(2, 3 + side).decode(coarse, 0)[0].flatten(1, 2)
                torch.testing.assert_close(decoded[side][entry][:, :rest], expected)


@torch.no_grad()
def test_bytes_are_those_of_the_codes() -> None:
    held = sc.mixed_cache(mass=0.3, bits=4, rest_bits=2, group=4)
    compiled()(**prompt(), past_key_values=held, use_cache=True)
    plain = transformers.DynamicCache()
    compiled()(**prompt(), past_key_values=plain, use_cache=True)
    for layer, other in zip(held.layers, plain.layers, strict=True):
        (low, _), (high, _) = layer._coded
        width = other.keys.shape[3]
        assert low[0].dtype is torch.uint8
        assert (low[0].shape[-1], high[0].shape[-1]) == (width // 4, width // 2)
        assert layer.resident_bytes() < 0.6 * (other.keys.nbytes + other.values.nbytes)


@torch.no_grad()
@pytest.mark.parametrize(("change", "entries"), [(lambda held: held.reorder_cache(torch.tensor([1, 0])), [1, 0]),
                                                 (lambda held: held.batch_repeat_interleave(2), [0, 0, 1, 1]),
                                                 (lambda held: held.batch_select_indices(torch.tensor([0])), [0])])
def test_entries_of_a_batch_take_their_tokens_along(change: Any, entries: list[int]) -> None:
    held = sc.mixed_cache(mass=0.6, **FINE)
    expected, mask = after(held, 29), prompt(29)["attention_mask"]
    held.crop(-3)
    change(held)
    torch.testing.assert_close(more(held, mask[entries]), expected[entries])


@torch.no_grad()
def test_what_is_taken_back_was_never_said_and_a_prompt_stays() -> None:
    held = sc.mixed_cache(mass=0.6, **FINE)
    expected = after(held)
    held.crop(-3)
    torch.testing.assert_close(more(held, prompt()["attention_mask"]), expected)
    with pytest.raises(ModelError, match="reach into the prompt"):
        held.crop(-4)
    held.reset()
    assert held.get_seq_length() == 0
    torch.testing.assert_close(after(held), expected)


@pytest.mark.parametrize("way", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}])
def test_generate(way: dict[str, Any]) -> None:
    made = [compiled().generate(**prompt(6), max_new_tokens=8, past_key_values=held, **way)
            for held in (None, sc.mixed_cache(mass=0.6, **FINE))]
    assert torch.equal(*made)


@torch.no_grad()
def test_what_is_added_to_the_scores_by_place_is_refused_where_tokens_have_moved() -> None:
    held = sc.mixed_cache(**FINE)
    module, bias = torch.nn.Module(), torch.zeros(1, 1, 1, 43, dtype=torch.float32)
    compiled()(**prompt(), past_key_values=held, use_cache=True)
    states = held.layers[0].keys[:, :, :1]
    key, value = held.update(states, states, 0)
    query = torch.zeros(2, states.shape[1], 1, states.shape[3], dtype=torch.float32)
    assert key.shape[2] == 43
    with pytest.raises(ModelError, match="do not stand in their places"):
        library_attention._attention(module, query, key, value, None, position_bias=bias)
    assert library_attention._attention(module, query, key, value, None)[0].shape == (2, 1, states.shape[1], states.shape[3])


def test_what_cannot_be_is_refused() -> None:
    for wrong in ({"mass": 1.0}, {"bits": 3}, {"rest_bits": 1}, {"group": 0}, {"pool": 2}, {"window": 0}):
        with pytest.raises(InputError, match="neighbours"):
            sc.mixed_cache(**wrong)
