"""What is said of keys block by block — sums, sums of squares, smallest and largest values — kept while a cache grows by a token a step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

FILL = {"sum": 0.0, "squares": 0.0, "min": math.inf, "max": -math.inf}  # kind -> what a key that does not count is
_HELD = "_sparsify_sums"


class KeySums:
    """Of the whole blocks of one growing tensor of keys [B, G, K, D]. Whoever changes keys that are there already calls keep()."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], Tensor] = {}

    def give(self, key: Tensor) -> Tensor:
        """The same tensor, by which of_blocks finds these sums."""
        setattr(key, _HELD, self)
        return key

    def keep(self, tokens: int) -> None:
        """Forget what was said of blocks that hold a token at or behind this one."""
        self._known = {(kind, block): known[:, :, :tokens // block] for (kind, block), known in self._known.items()} if tokens else {}

    def whole(self, key: Tensor, kind: str, block: int) -> Tensor:
        """float32 [B, G, K // block, D]."""
        known = self._known.get((kind, block))
        done, blocks = 0 if known is None else known.shape[2], key.shape[2] // block
        if known is None or done < blocks:
            fresh = _reduced(key[:, :, done * block:blocks * block], kind, block)
            known = self._known[kind, block] = fresh if known is None else torch.cat((known, fresh), 2)
        return known[:, :, :blocks]


def of_blocks(key: Tensor, kind: str, block: int, key_mask: Tensor | None = None) -> Tensor:
    """float32 [B, G, ceil(K / block), D]: "sum", "squares", "min" or "max" of each channel of the keys [B, G, K, D] that count.

    key_mask bool [B, K]: the keys that count. A block without any has 0, infinity or minus infinity. Keys of a cache that holds no padding are
    looked at once.
    """
    held: Any = getattr(key, _HELD, None)
    if held is None or key_mask is not None:
        return _reduced(key, kind, block, key_mask)
    whole: Tensor = held.whole(key, kind, block)
    rest = key.shape[2] % block
    return torch.cat((whole, _reduced(key[:, :, key.shape[2] - rest:], kind, block)), 2) if rest else whole


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
