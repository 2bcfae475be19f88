"""What indexers remember: the files of the catalogue that they name, and what patterns say of blocks of some lengths."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from .block_grid import Grid
from .block_layout import BlockLayout, BlockTable, stack
from .block_pattern import Pattern, union
from .named import Named

PARSED = 1024  # texts of indexers: each layer may have its own
LAYOUTS = 64  # static layouts that are remembered: all layers of a model share them, and each step of decoding needs one


def starts(key_mask: Tensor | None) -> tuple[int, ...]:
    """The first key that counts of each entry of the batch; one number where they agree."""
    if key_mask is None or not key_mask.numel():
        return (0,)
    first = key_mask.to(torch.int8).argmax(1).tolist()
    return (first[0],) if len(set(first)) == 1 else tuple(first)


@lru_cache(LAYOUTS)
def static_table(patterns: tuple[Pattern, ...], grid: Grid, shifts: tuple[int, ...]) -> BlockTable:
    """What the union of patterns reads, of texts that begin at these keys."""
    tables = {shift: union(patterns, replace(grid, shift=shift)) for shift in set(shifts)}
    return stack([tables[shift] for shift in shifts])


@lru_cache(LAYOUTS)
def static_layout(patterns: tuple[Pattern, ...], grid: Grid, shifts: tuple[int, ...]) -> BlockLayout:
    """The same as lists."""
    return static_table(patterns, grid, shifts).layout()


@lru_cache(PARSED)
def named(kind: str, text: str) -> Named:
    """The function of a catalogue kind, with its options."""
    return Named.parse(kind, text)
