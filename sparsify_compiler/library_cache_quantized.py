"""A key-value cache in 8 or 4 bits: keys by channel and values by token, as their outliers lie (KIVI, arXiv:2402.02750, section 3).

It saves memory, not time: what attention reads is decoded at each token. The last tokens stay as they are until a group of them is full.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .errors import InputError
from .library_cache import AppendingLayer

Encoded = tuple[Tensor, Tensor, Tensor]


def encode(x: Tensor, bits: int, axis: int) -> Encoded:
    """x as whole numbers of `bits` bits between its smallest and its largest value along an axis: codes uint8, two to a byte in the last dimension
    for 4 bits; scale and low in x's dtype, with x = low + scale * code.
    """
    low, high = x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
    scale = ((high - low).float() / (2**bits - 1)).clamp(min=torch.finfo(torch.float32).tiny)
    codes = ((x - low).float() / scale).round().clamp(0, 2**bits - 1).to(torch.uint8)
    if bits == 4:
        codes = codes[..., 0::2] | codes[..., 1::2] << 4
    return codes, scale.to(x.dtype), low


def decode(encoded: Encoded, bits: int) -> Tensor:
    """The inverse of encode, to rounding."""
    codes, scale, low = encoded
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    return low + codes.to(low.dtype) * scale


class QuantizedLayer(AppendingLayer):
    """`keys` and `values` hold the last tokens, fewer than two groups; all before them are encoded, [B, G, groups, tokens, D]."""

    def __init__(self, bits: int, group: int) -> None:
        super().__init__()
        self.bits, self.group = bits, group
        self._encoded: tuple[Encoded, Encoded] | None = None

    def get_seq_length(self) -> int:
        return self._groups() * self.group + self.held()

    def _groups(self) -> int:
        return 0 if self._encoded is None else int(self._encoded[0][0].shape[2])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The keys and values of all tokens, decoded."""
        if key_states.shape[-1] % 2 or value_states.shape[-1] % 2:
            raise InputError(f"keys and values of {key_states.shape[-1]} and {value_states.shape[-1]} channels do not fit into bytes by twos",
                             where="quantized_cache")
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if self._encoded is not None:
            keys, values = (torch.cat((decode(side, self.bits).flatten(2, 3), last), 2)
                            for side, last in zip(self._encoded, (keys, values), strict=True))
        self._close()
        return keys, values

    def _close(self) -> None:
        """Encode the groups that are full, but for the last one: the tokens just said matter most."""
        full = max(self.held() // self.group - 1, 0)
        if not full:
            return
        stop = full * self.group
        made = []
        for held, axis in ((self.keys, 3), (self.values, 4)):
            batch, groups, _, width = held.shape
            made.append(encode(held[:, :, :stop].reshape(batch, groups, full, self.group, width), self.bits, axis))
        if self._encoded is not None:
            made = [_each(lambda *both: torch.cat(both, 2), *sides) for sides in zip(self._encoded, made, strict=True)]
        self._encoded = made[0], made[1]
        self.keys, self.values = (held[:, :, stop:].clone() for held in (self.keys, self.values))

    def resident_bytes(self) -> int:
        """Bytes of what is held, the room for more aside."""
        tensors = [*(t for side in self._encoded or () for t in side), *((self.keys, self.values) if self.is_initialized else ())]
        return sum(t.numel() * t.element_size() for t in tensors)

    def crop(self, tokens_to_remove: int) -> None:
        missing = -(self.held() + tokens_to_remove)
        if self._encoded is not None and missing > 0:
            opened = min(-(-missing // self.group), self._groups())
            ends = [_each(lambda t: t[:, :, -opened:], side) for side in self._encoded]
            self.keys, self.values = (torch.cat((decode(end, self.bits).flatten(2, 3), held), 2)
                                      for end, held in zip(ends, (self.keys, self.values), strict=True))
            self._change(lambda t: t[:, :, :-opened])
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        self._encoded = None
        super().reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._change(lambda t: t.index_select(0, beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._change(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._change(lambda t: t[indices])

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        if self._encoded is not None:
            self._encoded = _each(change, self._encoded[0]), _each(change, self._encoded[1])


def _each(change: Callable[..., Tensor], *sides: Encoded) -> Encoded:
    codes, scale, low = (change(*parts) for parts in zip(*sides, strict=True))
    return codes, scale, low


def quantized_cache(bits: int = 8, group: int = 64) -> Cache:
    """A cache for generate(past_key_values=...) that holds keys and values in 8 or 4 bits, `group` tokens at a time. Raises InputError."""
    if bits not in (4, 8) or group < 1:
        raise InputError(f"{bits} bits in groups of {group} tokens: only 8 and 4 bits are known, and a group holds a token", where="quantized_cache")
    return Cache(layer_class_to_replicate=partial(QuantizedLayer, bits, group))
