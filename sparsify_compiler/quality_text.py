"""Quality of language models that one perplexity hides: perplexity by place in the text, and numbers that are found again (a needle in a haystack).

Attention that forgets what is far away adds little to a perplexity, and finds nothing. As a metric of compile():

    quality=lambda model: sum(map(sum, numbers_found(model, texts))) / (8 * len(texts))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .errors import InputError

NAMES = ("Alice", "Boris", "Clara", "David", "Elena", "Frank", "Grace", "Henry", "Irene", "Jacob", "Karen", "Louis", "Maria", "Nigel", "Olive")


@dataclass(frozen=True)
class Haystack:
    """A text of token numbers, int64 [T], in which numbers are hidden that it asks for at its end.

    asked   of each, in the order of the questions: which stretch of the text it is hidden behind, and where the tokens of its answer begin and end
    """

    tokens: Tensor
    asked: tuple[tuple[int, int, int], ...]


def haystack(words: Sequence[int], encode: Callable[[str], list[int]], length: int, random: Random, numbers: int = 8, digits: int = 5) -> Haystack:
    """Spread telephone numbers evenly over the tokens `words`, and ask for one after the other: `length` tokens in all.

    encode   token numbers of a piece of text, without any that stand for its beginning or end. Raises InputError where the text is too short.
    """
    if not 1 <= numbers <= len(NAMES) or digits < 1:
        raise InputError(f"{numbers} numbers of {digits} digits: there are 1 to {len(NAMES)} names", where="haystack")
    names = random.sample(NAMES, numbers)
    before = [f" The phone number of {name} is " for name in names]
    facts = [f"{text}{random.randrange(10 ** (digits - 1), 10 ** digits)}." for text in before]
    pieces, known = ([list(encode(text)) for text in texts] for texts in (facts, before))
    stretch, rest = divmod(length - 2 * sum(map(len, pieces)), numbers)
    if stretch < 1 or len(words) < rest + stretch * numbers:
        raise InputError(f"{len(words)} tokens of text are too few for {numbers} numbers in {length} tokens", where="haystack")
    tokens = list(words[:rest])
    for place, piece in enumerate(pieces):
        tokens += [*words[rest + place * stretch : rest + (place + 1) * stretch], *piece]
    asked = []
    for place in random.sample(range(numbers), numbers):
        shared = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(known[place], pieces[place], strict=False)))
        asked.append((place, len(tokens) + shared, len(tokens) + len(pieces[place]) - 1))
        tokens += pieces[place]
    return Haystack(torch.tensor(tokens), tuple(asked))


def numbers_found(model: Callable[..., Any], texts: Iterable[Haystack]) -> list[list[bool]]:
    """By place in the text: whether each token of a number was the most likely one after the right ones before it, text by text."""
    found: list[list[bool]] = []
    for text in texts:
        likely = _logits(model, text.tokens).argmax(-1)
        found += [[] for _ in range(len(text.asked) - len(found))]
        for place, start, stop in text.asked:
            found[place].append(torch.equal(likely[start - 1 : stop - 1], text.tokens[start:stop]))
    return found


def perplexity_by_position(model: Callable[..., Any], texts: Iterable[Tensor], bins: int = 4) -> list[float]:
    """Perplexity of each of so many parts of texts of one length [T], the first part first. Raises InputError for no texts or several lengths."""
    losses = [cross_entropy(_logits(model, tokens)[:-1].float(), tokens[1:], reduction="none") for tokens in texts]
    if len({len(each) for each in losses}) != 1 or len(losses[0]) < bins or bins < 1:
        lengths = sorted({len(each) + 1 for each in losses})
        raise InputError(f"{len(losses)} texts of {lengths} tokens, in {bins} parts", where="perplexity_by_position",
                         hint="give texts of one length, of more tokens than parts")
    return [math.exp(float(part.mean())) for part in torch.stack(losses).tensor_split(bins, 1)]


def _logits(model: Callable[..., Any], tokens: Tensor) -> Tensor:
    """[T, V] of one text."""
    with torch.no_grad():
        output = model(input_ids=tokens[None])
    logits = getattr(output, "logits", output[0] if isinstance(output, tuple) else output)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[1] != len(tokens):
        raise InputError(f"the model gives no logits [1, {len(tokens)}, V] for input_ids", where="quality_text")
    return logits[0]
