"""Quality by place: what is hidden is found by whoever remembers it, and by nobody else."""

from __future__ import annotations

import math
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from sparsify_compiler.errors import InputError
from sparsify_compiler.quality_text import Haystack, haystack, numbers_found, perplexity_by_position

VOCABULARY = 128


def encode(text: str) -> list[int]:
    """A letter a token."""
    return [ord(letter) for letter in text]


def by_pairs(text: str) -> list[int]:
    """Two digits and the blank before them may be one token."""
    found, rest = [], text
    while rest:
        size = 3 if rest[0] == " " and rest[1:3].isdigit() else 2 if rest[:2].isdigit() else 1
        found.append(sum(ord(letter) for letter in rest[:size]) * 7 + size)
        rest = rest[size:]
    return found


def text(random: Random, spell: Any = encode) -> Haystack:
    return haystack([1 + i % 30 for i in range(2000)], spell, 1500, random, numbers=6)


class Copies:
    """Says what followed the last 12 tokens where they stood before, among the last `memory` tokens."""

    def __init__(self, memory: int) -> None:
        self.memory = memory

    def __call__(self, input_ids: Tensor) -> Any:
        tokens, said = input_ids[0].tolist(), []
        for now in range(1, len(tokens) + 1):
            first = max(now - self.memory, 0)
            places = [at for at in range(first + 12, now) if tokens[at - 12:at] == tokens[now - 12:now]]
            said.append(tokens[places[-1]] if places else 0)
        return SimpleNamespace(logits=one_hot(torch.tensor(said)[None], VOCABULARY).float() * 50)


def test_a_text_has_its_length_and_asks_for_what_it_says() -> None:
    for spell in (encode, by_pairs):
        made = text(Random(0), spell)
        assert len(made.tokens) == 1500
        assert sorted(place for place, _, _ in made.asked) == list(range(6))
        whole = "".join(map(chr, made.tokens.tolist())) if spell is encode else None
        for _, start, stop in made.asked:
            answer = made.tokens[start:stop]
            assert sum(torch.equal(answer, made.tokens[at:at + len(answer)]) for at in range(1500)) >= 2
            if whole is not None:
                assert whole[start:stop].isdigit()
                assert whole[start:stop + 1].endswith(".")
                assert whole[:start].endswith(" is ")
                assert stop - start == 5
    assert not torch.equal(text(Random(0)).tokens, text(Random(1)).tokens)


def test_whoever_remembers_all_finds_all_and_a_window_finds_what_is_near() -> None:
    texts = [text(Random(seed)) for seed in range(2)]
    every = numbers_found(Copies(1500), texts)
    assert [len(place) for place in every] == [2] * 6
    assert all(map(all, every))
    near = numbers_found(Copies(500), texts)
    assert not any(map(any, near[:3]))
    assert all(near[5])


def test_perplexity_by_position() -> None:
    tokens = torch.randint(0, 8, (2, 41), generator=torch.Generator().manual_seed(0))

    def model(input_ids: Tensor) -> tuple[Tensor]:
        """Knows nothing of the first half, and all of the second."""
        sure = one_hot(input_ids.roll(-1, 1), 8).float() * 60
        return (torch.where(torch.arange(41)[None, :, None] < 20, torch.zeros_like(sure), sure),)

    found = perplexity_by_position(model, list(tokens), 4)
    assert found == pytest.approx([8.0, 8.0, 1.0, 1.0], rel=1e-5)
    assert math.prod(found) ** 0.25 == pytest.approx(8**0.5, rel=1e-5)


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match="too few"):
        haystack([1] * 100, encode, 2000, Random(0))
    with pytest.raises(InputError, match="too few"):
        haystack([1] * 1000, encode, 300, Random(0))
    with pytest.raises(InputError, match="names"):
        haystack([1] * 1000, encode, 900, Random(0), numbers=16)
    with pytest.raises(InputError, match="one length"):
        perplexity_by_position(Copies(5), [torch.ones(9, dtype=torch.long), torch.ones(8, dtype=torch.long)])
    with pytest.raises(InputError, match="no logits"):
        perplexity_by_position(lambda input_ids: input_ids, [torch.ones(9, dtype=torch.long)])
