"""A key-value cache that stores what is complete in another way: in few bits, repaired, or by factors (key_value_storage.py).

It saves memory, not time: what attention reads is decoded at each token. The last tokens stay as they are until a group of them is full.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .errors import InputError
from .key_value_storage import BITS, Codes, Encoded, LowRank, Plain, Repaired, Storage
from .library_cache import AppendingLayer


class EncodedLayer(AppendingLayer):
    """`keys` and `values` hold the last tokens, fewer than two groups; all before them are encoded, [B, G, groups, tokens, D]."""

    def __init__(self, keys: Storage, values: Storage, group: int) -> None:
        super().__init__()
        self.storages, self.group = (keys, values), group
        self._encoded: tuple[Encoded, Encoded] | None = None

    def get_seq_length(self) -> int:
        return self._groups() * self.group + self.held()

    def _groups(self) -> int:
        return 0 if self._encoded is None else int(self._encoded[0][0].shape[2])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The keys and values of all tokens, decoded."""
        for storage, states in zip(self.storages, (key_states, value_states), strict=True):
            codes = storage.codes if isinstance(storage, Repaired) else storage
            if isinstance(codes, Codes) and states.shape[-1] * codes.bits % 8:
                raise InputError(f"{states.shape[-1]} channels of {codes.bits} bits do not fill whole bytes", where="quantized_cache")
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if self._encoded is not None:
            keys, values = self._decoded(self._encoded, 0, (keys, values))
        self._close()
        return keys, values

    def _decoded(self, encoded: tuple[Encoded, Encoded], first: int, last: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values of the groups from token `first` on, and what follows them."""
        keys, values = (torch.cat((storage.decode(side, first).flatten(2, 3), held), 2)
                        for storage, side, held in zip(self.storages, encoded, last, strict=True))
        return keys, values

    def _close(self) -> None:
        """Encode the groups that are full, but for the last one: the tokens just said matter most."""
        full = max(self.held() // self.group - 1, 0)
        if not full:
            return
        stop = full * self.group
        made = []
        for held, storage in zip((self.keys, self.values), self.storages, strict=True):
            batch, groups, _, width = held.shape
            whole = held[:, :, :stop].reshape(batch, groups, full, self.group, width)
            made.append(storage.encode(whole, self._groups() * self.group))
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
            keys, values = (_each(lambda t: t[:, :, -opened:], side) for side in self._encoded)
            self.keys, self.values = self._decoded((keys, values), (self._groups() - opened) * self.group, (self.keys, self.values))
            self._change(lambda t: t[:, :, :-opened])
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        self._encoded = None
        super().reset()

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        if self._encoded is not None:
            self._encoded = _each(change, self._encoded[0]), _each(change, self._encoded[1])


def _each(change: Callable[..., Tensor], *sides: Encoded) -> Encoded:
    return tuple(change(*parts) for parts in zip(*sides, strict=True))


def quantized_cache(bits: int = 8, group: int = 64, rank: int = 0, outliers: float = 0.0) -> Cache:
    """A cache for generate(past_key_values=...) that holds keys and values in 8, 4 or 2 bits, `group` tokens at a time (KIVI).

    rank, outliers  what repairs them: factors of what the codes miss, and a share of exact numbers (GEAR: rank 4, outliers 0.02). Raises InputError.
    """
    if bits not in BITS or group < 1 or rank < 0 or not 0 <= outliers < 1:
        raise InputError(f"{bits} bits in groups of {group} tokens, repaired by rank {rank} and a share of {outliers}: bits are 2, 4 or 8, a group "
                         "holds a token, and a share is below 1", where="quantized_cache")
    by_channel, by_token = Codes(bits, 3), Codes(bits, 4)
    sides: tuple[Storage, Storage] = (by_channel, by_token)
    if rank or outliers:
        sides = Repaired(by_channel, rank, outliers), Repaired(by_token, rank, outliers)
    return Cache(layer_class_to_replicate=partial(EncodedLayer, *sides, group))


def low_rank_cache(rank: int, group: int = 512, model: nn.Module | None = None) -> Cache:
    """A cache for generate(past_key_values=...) whose keys are factors of this rank, all heads together, `group` tokens at a time (ShadowKV).

    model  whose rotation of the keys is undone for that: rotated keys have no low rank. Values stay as they are: a model compiled to read some
           blocks only (select_blocks with scorer=pooled) fetches those. Raises InputError.
    """
    if rank < 1 or group < 1:
        raise InputError(f"rank {rank} in groups of {group} tokens cannot be", where="low_rank_cache")
    return Cache(layer_class_to_replicate=partial(EncodedLayer, LowRank(rank, _frequencies(model)), Plain(), group))


def _frequencies(model: nn.Module | None) -> tuple[float, ...]:
    """Of the one rotation that all layers share, as models of Hugging Face hold it; () without a model. Raises InputError."""
    if model is None:
        return ()
    found = {tuple(buffer.tolist()) for name, buffer in model.named_buffers() if name.rpartition(".")[2] == "inv_freq" and buffer.dim() == 1}
    if len(found) != 1:
        raise InputError(f"this model has {len(found)} rotations of its keys, not one", where="low_rank_cache", hint="leave `model` out")
    frequencies: tuple[float, ...] = found.pop()
    return frequencies
