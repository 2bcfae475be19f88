"""The cache that keeps what a prompt's last rows look at: which tokens, by a slow reference; nothing changed where nothing goes."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from models.language import llama
from torch import Tensor

transformers = pytest.importorskip("transformers")

import sparsify_compiler as sc  # noqa: E402
from sparsify_compiler.capture import capture  # noqa: E402
from sparsify_compiler.compiled import CompiledModel  # noqa: E402
from sparsify_compiler.errors import InputError, ModelError  # noqa: E402
from sparsify_compiler.passes_api import Context  # noqa: E402
from sparsify_compiler.pipeline import Pipeline  # noqa: E402


@cache
def models() -> tuple[Any, CompiledModel]:
    model, given = llama(max_position_embeddings=128, num_hidden_layers=3), {"input_ids": torch.ones(2, 12, dtype=torch.long)}
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    axes = {name: {0: "batch", 1: "tokens"} for name in given}
    text = "select_blocks(always=(Everything(),), block_q=4, block_k=4)"
    return model, CompiledModel(Pipeline.parse(text).run(capture(model, given, axes), Context()))


def prompt(padded: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(1, 96, (2, 40))
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("way", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}, {"do_sample": True, "top_k": 5}])
def test_nothing_changes_where_nothing_goes(way: dict[str, Any]) -> None:
    model, compiled = models()
    for options in ({}, {"mass": 1.0, "layer": 1}):
        made = []
        for one, held in ((model, None), (compiled, sc.evicting_cache(**options))):
            torch.manual_seed(0)
            with torch.no_grad():
                made.append(one.generate(**prompt(6), max_new_tokens=9, past_key_values=held, **way))
        assert torch.equal(*made)


def looked_at(query: Tensor, key: Tensor, valid: list[bool], window: int) -> list[float]:
    """What the last rows [w, D] of one head look at, over how many of them see it."""
    tokens, found = len(key), [0.0] * len(key)
    for row in range(tokens - window, tokens):
        shares = torch.exp(query[row] @ key.T / key.shape[1]**0.5) * torch.tensor([valid[k] and k <= row for k in range(tokens)])
        for k in range(tokens):
            found[k] += float(shares[k] / max(float(shares.sum()), 1e-30)) / min(window, tokens - k)
    return found


@pytest.mark.parametrize("padded", [0, 30])
@pytest.mark.parametrize("options", [{"share": 0.5}, {"mass": 0.7}, {"share": 0.3, "window": 3, "pool": 1}])
def test_what_stays_is_what_the_last_rows_look_at(monkeypatch: pytest.MonkeyPatch, padded: int, options: dict[str, Any]) -> None:
    compiled, given = models()[1], prompt(padded)
    seen: list[tuple[Tensor, Tensor]] = []
    from sparsify_compiler.library_cache_evicting import EvictingLayer

    observe = EvictingLayer.observe
    monkeypatch.setattr(EvictingLayer, "observe", lambda self, q, k, mask, scale: seen.append((q, k.clone())) or observe(self, q, k, mask, scale))
    held = sc.evicting_cache(**options)
    with torch.no_grad():
        compiled(**given, past_key_values=held, use_cache=True)
    window, pool = options.get("window", 8), options.get("pool", 7)
    for layer, (query, key) in zip(held.layers, seen, strict=True):
        heads = [[looked_at(query[b, h], key[b, h // 2], given["attention_mask"][b].bool().tolist(), window) for h in range(4)] for b in range(2)]
        count = round(options.get("share", 0) * 40)
        if "mass" in options:
            for row in torch.tensor(heads).mean(1):
                ordered, least = row.sort(descending=True).values, 0.7 * row.sum()
                count = max(count, next(n for n in range(1, 41) if ordered[:n].sum() >= least))
        assert layer.keys.shape[2] == max(count, window)
        for b in range(2):
            for group in range(2):
                both = torch.tensor(heads[b][2 * group:2 * group + 2]).mean(0)
                near = [both[max(0, k - pool // 2):k + pool // 2 + 1].mean() if given["attention_mask"][b, k] else -1 - k / 40 for k in range(40)]
                best = sorted(range(40 - window), key=lambda k: -near[k])[:layer.keys.shape[2] - window]
                assert torch.equal(layer.keys[b, group], key[b, group, [*sorted(best), *range(40 - window, 40)]])
        assert layer.get_seq_length() == 40
        assert layer.valid is not None
        assert layer.valid[0].sum() == min(40 - padded, layer.keys.shape[2])


def test_only_salient_tokens_go_on_to_later_layers() -> None:
    model, compiled = models()
    held, given = sc.evicting_cache(layer=0, passed=0.5), prompt(0)
    with torch.no_grad():
        found = compiled(**given, past_key_values=held, use_cache=True).logits
        going = held.layers[0].shared.going
        assert [layer.keys.shape[2] for layer in held.layers] == [40, 20, 20]
        hidden, place = model.model.embed_tokens(given["input_ids"]), torch.arange(40)[None]
        turns = model.model.rotary_emb(hidden, place)
        hidden = model.model.layers[0](hidden, position_embeddings=turns)
        hidden = hidden.gather(1, going[..., None].expand(-1, -1, 32))
        turns = tuple(t.expand(2, -1, -1).gather(1, going[..., None].expand(-1, -1, t.shape[-1])) for t in turns)
        for layer in model.model.layers[1:]:
            hidden = layer(hidden, position_embeddings=turns)
        torch.testing.assert_close(found, model.lm_head(model.model.norm(hidden)))
        ids, mask = torch.ones(2, 1, dtype=torch.long), torch.ones(2, 41, dtype=torch.long)
        compiled(input_ids=ids, attention_mask=mask, past_key_values=held, use_cache=True)
    assert [layer.keys.shape[2] for layer in held.layers] == [41, 21, 21]
    assert {layer.get_seq_length() for layer in held.layers} == {41}


@pytest.mark.parametrize("way", ["again", "after it"])
def test_what_went_on_is_forgotten_when_as_many_tokens_follow(way: str) -> None:
    compiled, given, held = models()[1], prompt(0), sc.evicting_cache(layer=0, passed=0.5)
    with torch.no_grad():
        first = compiled(**given, past_key_values=held, use_cache=True).logits
        if way == "again":
            held.reset()
            torch.testing.assert_close(compiled(**given, past_key_values=held, use_cache=True).logits, first)
            assert [layer.keys.shape[2] for layer in held.layers] == [40, 20, 20]
        else:
            mask = torch.ones(2, 80, dtype=torch.long)
            assert compiled(given["input_ids"], mask, past_key_values=held, use_cache=True).logits.shape[1] == 40
            assert [layer.keys.shape[2] for layer in held.layers] == [80, 60, 60]
            assert {layer.get_seq_length() for layer in held.layers} == {80}


@pytest.mark.parametrize("way", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}])
def test_a_prompt_that_is_thinned_goes_on_by_the_token(way: dict[str, Any]) -> None:
    compiled = models()[1]
    held = sc.evicting_cache(share=0.4, layer=1, passed=0.5)
    with torch.no_grad():
        made = compiled.generate(**prompt(30), max_new_tokens=9, past_key_values=held, **way)
    assert made.shape[1] > 40
    assert [layer.keys.shape[2] for layer in held.layers] == [16 + made.shape[1] - 41] * 3
    held.crop(-2)
    assert held.get_seq_length() == made.shape[1] - 3
    with pytest.raises(ModelError, match="cannot be taken back"):
        held.crop(-20)
    held.reset()
    assert held.get_seq_length() == 0


def thinned() -> tuple[Any, Tensor]:
    """A cache after a prompt, of whose first entry ten of forty tokens count, so that it holds some that do not; and the mask of the prompt."""
    held, given = sc.evicting_cache(share=0.4), prompt(30)
    models()[1](**given, past_key_values=held, use_cache=True)
    assert not held.layers[0].valid[0].all()
    return held, given["attention_mask"]


def read(held: Any, mask: Tensor, token: int, place: int) -> Tensor:
    """The logits after one more token of every entry, at this place, of which the mask knows."""
    ids = torch.full((len(mask), 1), token)
    made = models()[1](input_ids=ids, attention_mask=mask, position_ids=torch.full_like(ids, place), past_key_values=held, use_cache=True)
    found: Tensor = made.logits[:, 0]
    return found


@torch.no_grad()
def test_what_is_taken_back_was_never_said() -> None:
    found = []
    for more in (0, 2):
        held, mask = thinned()
        for i in range(more):
            mask = torch.cat((mask, mask.new_ones(2, 1)), 1)
            read(held, mask, 7 + i, 40 + i)
        held.crop(-more)
        found.append(read(held, torch.cat((mask[:, :40], mask.new_ones(2, 1)), 1), 5, 40))
        held.crop(-1)
        assert [layer.keys.shape[2] for layer in held.layers] == [16] * 3
        with pytest.raises(ModelError, match="cannot be taken back"):
            held.crop(-1)
    torch.testing.assert_close(*found)


@torch.no_grad()
def test_a_token_that_does_not_count_is_not_looked_at() -> None:
    held, mask = thinned()
    mask = torch.cat((mask, torch.tensor([[1], [0]])), 1)
    read(held, mask, 7, 40)
    found = read(held, torch.cat((mask, mask.new_ones(2, 1)), 1), 5, 41)
    held, mask = thinned()
    expected = read(held, torch.cat((mask, mask.new_ones(2, 1)), 1), 5, 41)
    torch.testing.assert_close(found[1], expected[1])
    assert not torch.allclose(found[0], expected[0], atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize(("change", "entries"), [(lambda held: held.reorder_cache(torch.tensor([1, 0])), [1, 0]),
                                                 (lambda held: held.batch_repeat_interleave(2), [0, 0, 1, 1]),
                                                 (lambda held: held.batch_select_indices(torch.tensor([0])), [0])])
def test_entries_take_along_which_of_their_tokens_count(change: Any, entries: list[int]) -> None:
    held, mask = thinned()
    mask = torch.cat((mask, mask.new_ones(2, 1)), 1)
    expected = read(held, mask, 5, 40)
    held.crop(-1)
    change(held)
    torch.testing.assert_close(read(held, mask[entries], 5, 40), expected[entries])


@torch.no_grad()
def test_a_cache_that_is_reset_begins_again() -> None:
    held, mask = thinned()
    mask = torch.cat((mask, mask.new_ones(2, 1)), 1)
    expected = read(held, mask, 5, 40)
    held.reset()
    models()[1](**prompt(30), past_key_values=held, use_cache=True)
    assert [layer.keys.shape[2] for layer in held.layers] == [16] * 3
    torch.testing.assert_close(read(held, mask, 5, 40), expected)


def test_what_cannot_be_is_refused() -> None:
    model, _ = models()
    held = sc.evicting_cache(share=0.5)
    with torch.no_grad(), pytest.raises(ModelError, match="compile the model"):
        model.generate(**prompt(0), max_new_tokens=3, past_key_values=held)
    for wrong in ({"share": 0.0}, {"mass": 1.5}, {"pool": 4}, {"window": 0}, {"passed": 0.0}):
        with pytest.raises(InputError, match="neighbours"):
            sc.evicting_cache(**wrong)
