"""Shared codes: in how many parts of their channels a query and a key have the same nearest code word (SPT, arXiv:2312.10365)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from sparsify_compiler.block_grid import Grid
from sparsify_compiler.errors import ParseError
from sparsify_compiler.passes.attention._clusters import learned, observe
from sparsify_compiler.passes.attention.scorers._blocks import dots, in_blocks, log_keys

__all__ = ["LEARNED", "learn", "observe", "shared_codes"]
LEARNED = ("words",)
FEW = 1e-3  # matches of blocks that have none: they come last


def shared_codes(query: Tensor, key: Tensor, key_mask: Tensor | None, grid: Grid, scale: float, words: Tensor, *, number: int = 16,
                 parts: int = 4) -> Tensor:
    """log of (the matches of all pairs of a query and a key of two blocks, and FEW); -inf, which no selector takes, where no key counts.

    Product quantisation: a row is as many code words as it has parts. All it costs is looking for the nearest words, and counting.

    number   of code words of a part: words [G, parts, C, D / parts], directions which calibration finds
    parts    into which channels are cut
    """
    of_query, of_key = (codes(rows, words) for rows in (query, key))
    if key_mask is not None:
        of_key = of_key.masked_fill(~key_mask[:, None, :, None], 0)
    pairs = dots(in_blocks(of_query, grid.block_q).sum(-2), in_blocks(of_key, grid.block_k).sum(-2))
    return (pairs + FEW).log().masked_fill(log_keys(grid, key_mask).to(pairs.device) == -torch.inf, -torch.inf)


def codes(rows: Tensor, words: Tensor) -> Tensor:
    """float32 [B, H, N, parts * C], 1 at the word of each part that a row [B, H, N, D] points to most, else 0."""
    cut = rows.float().reshape(*rows.shape[:-1], words.shape[1], words.shape[3])
    each = words.to(rows.device, torch.float32).repeat_interleave(rows.shape[1] // len(words), 0)
    nearest = torch.einsum("bhnpd,hpcd->bhnpc", cut, each).argmax(-1)
    return one_hot(nearest, words.shape[2]).float().flatten(-2)


def learn(samples: tuple[Tensor, ...], *, number: int = 16, parts: int = 4) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What observe() saw as options and tensors. Raises ParseError where channels do not divide into the parts."""
    groups, _, width = samples[0].shape
    if width % parts:
        raise ParseError(f"{width} channels do not divide into {parts} parts", where="shared_codes")
    cut = tuple(normalize(one.reshape(groups, -1, parts, width // parts).transpose(1, 2).flatten(0, 1), dim=-1) for one in samples)
    (found,) = learned(cut, number).values()
    return {"number": number, "parts": parts}, {LEARNED[0]: found.reshape(groups, parts, *found.shape[1:])}
