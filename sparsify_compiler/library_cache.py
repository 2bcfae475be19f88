"""A key-value cache for Hugging Face's generate() that appends in place: a token costs its own bytes, not a copy of all that was said before.

Imported only where transformers is. What it hands to attention are views of its buffers, [B, G, tokens, D], the last dimension contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .key_sums import KeySums

SPARE = 256  # tokens of room that a buffer has at least after it has grown
GROWTH = 1.25


class AppendingLayer(DynamicLayer):  # type: ignore[misc]
    """The keys and values of one attention. As DynamicLayer, whatever is done to `keys` and `values` from outside (beams, cuts)."""

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        super().__init__()
        self._room: tuple[Tensor, Tensor] | None = None
        self._sums = KeySums()
        if keys is not None and values is not None:
            self.lazy_initialization(keys, values)
            self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The keys and values of all tokens, the new ones [B, G, tokens, D] at the end."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.held()
        after = before + key_states.shape[-2]
        if not self._fits(key_states, after):
            self._sums = KeySums()  # keys that were put there by somebody else
            self._grow(key_states, value_states, before, after)
        assert self._room is not None
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, before:after] = states
        self.keys, self.values = (room[:, :, :after] for room in self._room)
        return self._sums.give(self.keys), self.values

    def room_for(self, more: int) -> tuple[Tensor, Tensor]:
        """The buffers [B, G, capacity, D] of keys and values that are there, with room for so many more: whoever fills it says so by show()."""
        assert self.keys is not None
        assert self.values is not None
        before = self.held()
        if not self._fits(self.keys, before + more):
            self._sums = KeySums()
            self._grow(self.keys, self.values, before, before + more)
        assert self._room is not None
        return self._room

    def show(self, tokens: int) -> None:
        """So many tokens are in the buffers of room_for() now."""
        assert self._room is not None
        keys, self.values = (room[:, :, :tokens] for room in self._room)
        self.keys = self._sums.give(keys)

    def held(self) -> int:
        """Tokens in `keys` and `values`."""
        return int(self.keys.shape[-2]) if self.is_initialized and self.keys is not None and self.keys.dim() == 4 else 0

    def _fits(self, states: Tensor, after: int) -> bool:
        """Whether the tokens so far lie at the start of the buffers, and the new ones find room behind them."""
        if self._room is None or self.keys is None or self._room[0].shape[2] < after or self._room[0].shape[:2] != states.shape[:2]:
            return False
        return all(held.data_ptr() == room.data_ptr() and held.stride() == room.stride()
                   for held, room in zip((self.keys, self.values), self._room, strict=True))

    def _grow(self, key_states: Tensor, value_states: Tensor, before: int, after: int) -> None:
        room = max(after + SPARE, int(after * GROWTH))
        made = []
        for held, states in ((self.keys, key_states), (self.values, value_states)):
            buffer = states.new_empty((*states.shape[:2], room, states.shape[3]))
            if before:
                buffer[:, :, :before] = held
            made.append(buffer)
        self._room = made[0], made[1]

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self._sums.keep(self.held())

    def begin(self) -> None:
        """Told to the first layer before each forward of the model."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if not torch.equal(beam_idx.cpu(), torch.arange(self._entries())):
            self._take(beam_idx)
            self._change(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._take(torch.arange(self._entries()).repeat_interleave(repeats))
        self._change(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.held():
            self._take(torch.arange(self._entries())[indices.cpu()])
        self._change(lambda t: t[indices])

    def _entries(self) -> int:
        """Of the batch."""
        return len(self.keys) if self.held() and self.keys is not None else 0

    def _take(self, entries: Tensor) -> None:
        """Have these entries of the batch, each as often as it is named. Buffers keep their room, and what is known of blocks stays known."""
        if not self.held() or self.keys is None or self.values is None:
            return
        entries, tokens = entries.to(self.keys.device), self.held()
        if self._room is None or not self._fits(self.keys, tokens):
            self.keys, self.values = (held.index_select(0, entries) for held in (self.keys, self.values))
            return
        self._room, self._sums = (self._room[0].index_select(0, entries), self._room[1].index_select(0, entries)), self._sums.take(entries)
        self.keys, self.values = (room[:, :, :tokens] for room in self._room)

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        """For layers that hold more than keys and values: what beams do to the entries of the batch, done to it."""

    def reset(self) -> None:
        """Forget all tokens, and keep the room."""
        self._sums = KeySums()
        super().reset()
        if self._room is not None:
            self.is_initialized = True
            self.keys, self.values = (room[:, :, :0] for room in self._room)


def append_in_place(cache: Any) -> None:
    """Let the layers of a DynamicCache append in place, whatever they hold already. Layers of any other kind stay as they are."""
    if not isinstance(cache, DynamicCache):
        return
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = AppendingLayer
    for place, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[place] = AppendingLayer(layer.keys, layer.values) if layer.is_initialized else AppendingLayer()


def before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook of a language model: the cache that it is given appends in place, and hears that a forward begins."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Cache):
            append_in_place(value)
            for layer in getattr(value, "layers", ())[:1]:
                if isinstance(layer, AppendingLayer):
                    layer.begin()
