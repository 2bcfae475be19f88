"""What is said of keys block by block — sums, sums of squares, smallest and largest values — kept while a cache grows by a token a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

FILL = {"sum": 0.0, "squares": 0.0, "min": math.inf, "max": -math.inf}  # kind -> what a key that does not count is
_HELD = "_sparsify_sums"
SPARE, GROWTH = 16, 1.25  # room for more blocks when it grows


@dataclass
class _Kept:
    """Of the first `done` blocks, in a tensor with room for more; and bool [B, tokens], which of their keys counted, or None for all."""

    room: Tensor
    done: int
    mask: Tensor | None


class KeySums:
    """Of the whole blocks of one growing tensor of keys [B, G, K, D]. Whoever changes keys that are there already calls keep()."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], _Kept] = {}

    def give(self, key: Tensor) -> Tensor:
        """The same tensor, by which of_blocks finds these sums."""
        setattr(key, _HELD, self)
        return key

    def keep(self, tokens: int) -> None:
        """Forget what was said of blocks that hold a token at or behind this one."""
        for (_, block), known in self._known.items():
            known.done = min(known.done, tokens // block)

    def take(self, entries: Tensor) -> KeySums:
        """Those of these entries of the batch, in this order: of beams that go on."""
        made = KeySums()
        for which, known in self._known.items():
            mask = None if known.mask is None else known.mask.index_select(0, entries)
            made._known[which] = _Kept(known.room.index_select(0, entries), known.done, mask)
        return made

    def whole(self, key: Tensor, kind: str, block: int, key_mask: Tensor | None = None) -> Tensor:
        """float32 [B, G, K // block, D], in memory that is written behind its end when keys are added."""
        known, blocks = self._known.get((kind, block)), key.shape[2] // block
        mask = None if key_mask is None else key_mask[:, :blocks * block]
        if known is None or not _same_mask(known, mask, block) or known.room.shape[2] < blocks:
            held = None if known is None or not _same_mask(known, mask, block) else known.room[:, :, :known.done]
            room = torch.empty(*key.shape[:2], max(blocks + SPARE, int(blocks * GROWTH)), key.shape[3], dtype=torch.float32, device=key.device)
            known = self._known[kind, block] = _Kept(room, 0 if held is None else held.shape[2], None)
            if held is not None:
                room[:, :, :held.shape[2]] = held
        if known.done < blocks:
            start = known.done * block
            fresh = None if mask is None else mask[:, start:]
            known.room[:, :, known.done:blocks] = _reduced(key[:, :, start:blocks * block], kind, block, fresh)
            known.done, known.mask = blocks, None if mask is None else mask.clone()
        return known.room[:, :, :blocks]


def _same_mask(known: _Kept, mask: Tensor | None, block: int) -> bool:
    """Did the same keys count when this was found, of the blocks that it is about?"""
    if mask is None or known.mask is None:
        return mask is known.mask
    tokens = min(known.done * block, mask.shape[1])
    return mask.shape[0] == known.mask.shape[0] and torch.equal(mask[:, :tokens], known.mask[:, :tokens])


def kept_blocks(key: Tensor, kind: str, block: int, key_mask: Tensor | None = None) -> Tensor:
    """float32 [B, G, P, D]: what a cache that holds these keys keeps of their first P blocks, all that are whole; 0 without one."""
    held: Any = getattr(key, _HELD, None)
    if held is None:
        return key.new_empty((*key.shape[:2], 0, key.shape[3]), dtype=torch.float32)
    found: Tensor = held.whole(key, kind, block, key_mask)
    return found


def of_blocks(key: Tensor, kind: str, block: int, key_mask: Tensor | None = None) -> Tensor:
    """float32 [B, G, ceil(K / block), D]: "sum", "squares", "min" or "max" of each channel of the keys [B, G, K, D] that count.

    key_mask bool [B, K]: the keys that count. A block without any has 0, infinity or minus infinity. Keys of a cache are looked at once, as long as
    the same of them count.
    """
    held: Any = getattr(key, _HELD, None)
    if held is None:
        return _reduced(key, kind, block, key_mask)
    whole: Tensor = held.whole(key, kind, block, key_mask)
    rest = key.shape[2] % block
    if not rest:
        return whole
    last = _reduced(key[:, :, key.shape[2] - rest:], kind, block, None if key_mask is None else key_mask[:, key.shape[2] - rest:])
    return torch.cat((whole, last), 2)


def same_keys(made: Tensor, key: Tensor) -> Tensor:
    """`made`, another tensor of the same keys, with the sums that `key` has."""
    held: Any = getattr(key, _HELD, None)
    return made if held is None else held.give(made)


def _reduced(key: Tensor, kind: str, block: int, key_mask: Tensor | None = None) -> Tensor:
    wide = key.float().square() if kind == "squares" else key.float()
    if key_mask is not None:
        wide = wide.masked_fill(~key_mask[:, None, :, None], FILL[kind])
    missing = -key.shape[2] % block
    wide = pad(wide, (0, 0, 0, missing), value=FILL[kind]) if missing else wide
    wide = wide.reshape(*wide.shape[:2], wide.shape[2] // block, block, wide.shape[3])
    return wide.sum(3) if kind in ("sum", "squares") else wide.amin(3) if kind == "min" else wide.amax(3)
