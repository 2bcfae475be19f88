"""How a cache stores groups of keys or values that are complete: as they are, in few bits, by factors, and what repairs few bits.

x is [B, G, n, tokens, D], n groups of tokens that follow each other. Every tensor of what encode() makes begins [B, G or 1, n], so that beams and
cuts know nothing of what they move.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

BITS = (2, 4, 8)
Encoded = tuple[Tensor, ...]


class Storage(Protocol):
    """One way to store. `first` is the place in the text of the first token."""

    def encode(self, x: Tensor, first: int) -> Encoded: ...

    def decode(self, encoded: Encoded, first: int) -> Tensor: ...


@dataclass(frozen=True)
class Plain:
    """As they are."""

    def encode(self, x: Tensor, first: int) -> Encoded:
        return (x,)

    def decode(self, encoded: Encoded, first: int) -> Tensor:
        return encoded[0]


@dataclass(frozen=True)
class Codes:
    """Whole numbers of `bits` bits between the smallest and the largest value along an axis: x = low + scale * code.

    axis  3: a channel of a group of tokens has a scale of its own, as outliers of keys lie; 4: a token has (KIVI, arXiv:2402.02750, section 3)
    Codes are uint8, as many to a byte as fit; scale and low have x's dtype.
    """

    bits: int
    axis: int

    def encode(self, x: Tensor, first: int) -> Encoded:
        low, high = x.amin(self.axis, keepdim=True), x.amax(self.axis, keepdim=True)
        scale = ((high - low).float() / (2**self.bits - 1)).clamp(min=torch.finfo(torch.float32).tiny)
        codes = ((x - low).float() / scale).round().clamp(0, 2**self.bits - 1).to(torch.uint8)
        packed = codes[..., ::8 // self.bits]
        for part in range(1, 8 // self.bits):
            packed = packed | codes[..., part::8 // self.bits] << self.bits * part
        return packed, scale.to(x.dtype), low

    def decode(self, encoded: Encoded, first: int) -> Tensor:
        codes, scale, low = encoded
        if self.bits < 8:
            codes = torch.stack([codes >> self.bits * part & 2**self.bits - 1 for part in range(8 // self.bits)], -1).flatten(-2)
        return low + codes.to(low.dtype) * scale


@dataclass(frozen=True)
class Repaired:
    """Codes of what lies between the outliers, factors of what they miss, and the outliers themselves (GEAR, arXiv:2403.05527, section 3).

    rank      of the factors of x minus its codes, for each head and group of tokens; exact at min(tokens, D)
    outliers  share of the numbers along the codes' axis, half of them the largest and half the smallest, that are exact
    """

    codes: Codes
    rank: int
    outliers: float

    def encode(self, x: Tensor, first: int) -> Encoded:
        axis, count = self.codes.axis, min(round(self.outliers / 2 * x.shape[self.codes.axis]), (x.shape[self.codes.axis] - 1) // 2)
        top, bottom = x.topk(count + 1, axis), x.topk(count + 1, axis, largest=False)
        low, high = (found.values.narrow(axis, count, 1) for found in (bottom, top))
        parts = self.codes.encode(x.clamp(low, high), first)
        places = torch.cat([found.indices.narrow(axis, 0, count) for found in (top, bottom)], axis)
        left, right = factors((x - self.codes.decode(parts, first)).scatter(axis, places, 0), self.rank)
        return *parts, left, right, places.to(torch.int16 if x.shape[axis] < 1 << 15 else torch.int32), x.gather(axis, places)

    def decode(self, encoded: Encoded, first: int) -> Tensor:
        *parts, left, right, places, exact = encoded
        return (self.codes.decode(tuple(parts), first) + left @ right).scatter(self.codes.axis, places.long(), exact)


@dataclass(frozen=True)
class LowRank:
    """Factors of all heads' keys together, before they were rotated by their places (ShadowKV, arXiv:2410.21465, section 4.1).

    rank         of a group of tokens [tokens, G * D]; exact at min(tokens, G * D)
    frequencies  of the rotation, in radians a token, of the channels i and i + len(frequencies); () for keys that were not rotated. A rotation
                 that pairs channels in another way, or begins at another place, is undone and done again all the same: only the rank would suffer
    """

    rank: int
    frequencies: tuple[float, ...] = ()

    def encode(self, x: Tensor, first: int) -> Encoded:
        together = self._turned(x, first, -1).transpose(2, 1).transpose(2, 3).flatten(-2)[:, None]  # [B, 1, n, tokens, G * D]
        return *factors(together, self.rank), x.new_empty((len(x), 1, x.shape[2], x.shape[1], 0))

    def decode(self, encoded: Encoded, first: int) -> Tensor:
        left, right, sizes = encoded
        together = (left @ right)[:, 0]  # [B, n, tokens, G * D]
        together = together.view(*together.shape[:3], sizes.shape[3], -1)
        return self._turned(together.permute(0, 3, 1, 2, 4), first, 1)

    def _turned(self, x: Tensor, first: int, sign: int) -> Tensor:
        half = len(self.frequencies)
        if not half:
            return x
        place = torch.arange(first, first + x.shape[2] * x.shape[3], dtype=torch.float32).view(x.shape[2:4])
        angle = place[..., None] * torch.tensor(self.frequencies, dtype=torch.float32)
        cos, sin = angle.cos(), angle.sin() * sign
        one, other, rest = x[..., :half].float(), x[..., half:2 * half].float(), x[..., 2 * half:]
        return torch.cat(((one * cos - other * sin).to(x.dtype), (other * cos + one * sin).to(x.dtype), rest), -1)


def factors(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """left [..., tokens, r] and right [..., r, D] in x's dtype, whose product is nearest to x of all of rank r = min(rank, tokens, D)."""
    rank = min(rank, *x.shape[-2:])
    if not rank:
        return x.new_empty((*x.shape[:-1], 0)), x.new_empty((*x.shape[:-2], 0, x.shape[-1]))
    left, sizes, right = torch.linalg.svd(x.float(), full_matrices=False)
    return (left[..., :rank] * sizes[..., None, :rank]).to(x.dtype), right[..., :rank, :].to(x.dtype)
