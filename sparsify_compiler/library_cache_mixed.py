"""A key-value cache that holds a prompt in two precisions: the tokens that its last rows look at in more bits, all others in fewer.

As evicting_cache chooses, but nothing is forgotten: what would have gone stays in few bits. The tokens of a prompt then stand in another order,
which attention to all that came before does not see; masks of padding are put into the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .errors import InputError, ModelError
from .key_value_storage import BITS, Codes, Encoded
from .library_attention import WATCHED
from .library_cache_encoded import _each
from .library_cache_evicting import Choice, EvictingLayer, Shared
from .library_cache_streaming import Forgotten

Pair = tuple[Encoded, Encoded]


class MixedLayer(EvictingLayer):
    """`keys` and `values` hold the last of the salient tokens of a prompt and all that follows; its others are codes, the least salient first."""

    def __init__(self, choice: Choice, shared: Shared, bits: tuple[int, int], group: int) -> None:
        super().__init__(choice, shared)
        self.group = group
        self._ways = tuple((Codes(number, 3), Codes(number, 4)) for number in bits)     # keys by channel, values by token, as quantized_cache
        self._coded: list[Pair] = []
        self._order: Tensor | None = None   # [B, tokens of the prompt]: where each of them stood

    def get_seq_length(self) -> int:
        return super().get_seq_length() + self._codes()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, Forgotten(0, 0)

    @property
    def moved(self) -> bool:
        return self._order is not None

    def _codes(self) -> int:
        """Tokens that are codes."""
        return sum(int(keys[0].shape[2]) for keys, _ in self._coded) * self.group

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The keys and values of all tokens, decoded."""
        for states in (key_states, value_states):
            if any(states.shape[-1] * way.bits % 8 for ways in self._ways for way in ways):
                raise InputError(f"{states.shape[-1]} channels do not fill whole bytes", where="mixed_cache")
        held = super().update(key_states, value_states, *args, **kwargs)
        if not self._coded:
            return held
        keys, values = (torch.cat([*(ways[side].decode(pair[side], 0).flatten(2, 3) for ways, pair in zip(self._ways, self._coded, strict=True)),
                                   held[side]], 2) for side in range(2))
        setattr(keys, WATCHED, self)
        return keys, values

    def mask(self, given: Tensor | None, queries: int) -> Tensor | None:
        given = super().mask(given, queries)
        if given is None or self._order is None:
            return given
        own = given.expand(len(self._order), -1, -1, -1)
        before = self._order.shape[1]
        return torch.cat((own[..., :before].gather(3, self._order[:, None, None]), own[..., before:]), 3)

    def _chosen(self, found: Tensor, mask: Tensor | None, count: int, recent: int) -> Tensor:
        """The same tokens for all groups of heads, lest each has a mask of its own."""
        return super()._chosen(found.mean(1, keepdim=True).expand_as(found), mask, count, recent)

    def _keep(self, places: Tensor, mask: Tensor | None, total: int) -> None:
        """Hold the tokens [B, G, count] in more bits and the others in fewer; what fills no group, and the last group, as they are."""
        tokens, count = self.held(), places.shape[2]
        salient = torch.zeros(len(places), tokens, dtype=torch.int8).scatter_(1, places[:, 0], 1)
        order = salient.argsort(dim=1, stable=True)
        first = (tokens - count) // self.group
        second = max((tokens - first * self.group) // self.group - 1, 0)
        sides = []
        for side, held in enumerate((self.keys, self.values)):
            moved = held.gather(2, order[:, None, :, None].expand_as(held))
            coded = (first + second) * self.group
            groups = moved[:, :, :coded].reshape(*held.shape[:2], first + second, self.group, held.shape[3])
            parts = groups[:, :, :first], groups[:, :, first:]
            of_rest, of_salient = (ways[side].encode(part, 0) for ways, part in zip(self._ways, parts, strict=True))
            sides.append((of_rest, of_salient, moved[:, :, coded:].clone()))
        (low_keys, high_keys, self.keys), (low_values, high_values, self.values) = sides
        self._coded, self._order = [(low_keys, low_values), (high_keys, high_values)], order
        self._room, self.kept = None, self.held()

    def resident_bytes(self) -> int:
        """Bytes of what is held, the room for more aside."""
        tensors = [*(t for pair in self._coded for side in pair for t in side), *((self.keys, self.values) if self.is_initialized else ())]
        return sum(t.numel() * t.element_size() for t in tensors)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens. Raises ModelError where some of the prompt would go, whose tokens do not stand in their order."""
        if self._coded and self.held() + tokens_to_remove < self.kept:
            raise ModelError(f"{-tokens_to_remove} tokens cannot be taken back: they reach into the prompt", where="mixed_cache")
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        self._coded, self._order = [], None
        super().reset()

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        self._coded = [(_each(change, keys), _each(change, values)) for keys, values in self._coded]
        self._order = None if self._order is None else change(self._order)


def mixed_cache(mass: float = 0.95, bits: int = 4, rest_bits: int = 2, group: int = 64, window: int = 8, pool: int = 1) -> Cache:
    """A cache for generate(past_key_values=...) that holds the salient tokens of a prompt in more bits than the others (ZipVL, arXiv:2410.08584).

    mass       as many tokens are salient in a layer as hold this share of what the last rows look at
    bits       of their keys and values, and rest_bits of those of the others: 2, 4 or 8, `group` tokens at a time
    window, pool   as in evicting_cache
    What follows the prompt stays as it is. The model must be compiled, so that its attention is ours. Raises InputError.
    """
    if not 0 < mass < 1 or {bits, rest_bits} - set(BITS) or min(group, window, pool) < 1 or not pool % 2:
        raise InputError(f"a mass of {mass}, {bits} and {rest_bits} bits in groups of {group} tokens, a window of {window} rows, {pool} neighbours: "
                         "a mass lies between 0 and 1, bits are 2, 4 or 8, and neighbours are an odd number", where="mixed_cache")
    choice = Choice(1.0, mass, window, pool, None, 1.0)
    return Cache(layer_class_to_replicate=partial(MixedLayer, choice, Shared(), (rest_bits, bits), group))
