"""Indexer: how one attention finds the blocks of keys that it reads — a static pattern, and beside it what a selector takes of a scorer's scores."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .block_layout import BlockLayout, BlockTable, stack, visible
from .block_pattern import Grid, Pattern, union
from .errors import ParseError
from .named import Named

DECODED = 8  # query rows up to which a call is a step of decoding
LAYOUTS = 64  # static layouts that are remembered: all layers of a model share them, and each step of decoding needs one


@dataclass(frozen=True)
class Indexer:
    """The choice of blocks of one attention, as plain options; str() and parse() are inverses.

    always        patterns (passes/attention/patterns) whose union is read whatever the scores are
    scorer        a file of passes/attention/scorers, or "" for the patterns alone: (query, key, grid, scale) -> scores [B, H', NQ, NK], each an
                  estimate of the log of the sum of exp(score) of a pair of blocks
    selector      a file of passes/attention/selectors: scores, -inf where nothing is visible -> bool, the blocks to read
    block_q, block_k   rows and keys of a block
    dense_below   attention over fewer keys than this runs densely; None where that is still to be measured (until then nothing does)
    dense_below_decoding  the same for a few query rows at a time
    """

    always: tuple[Any, ...] = ()
    scorer: str = ""
    selector: str = ""
    block_q: int = 64
    block_k: int = 64
    dense_below: int | None = None
    dense_below_decoding: int | None = None

    def __post_init__(self) -> None:
        if self.block_q < 1 or self.block_k < 1 or min(self.dense_below or 0, self.dense_below_decoding or 0) < 0:
            raise ParseError(f"blocks of {self.block_q} × {self.block_k}, dense below {self.dense_below} and {self.dense_below_decoding} keys",
                             where="Indexer", hint="blocks have at least one row and one key")
        if bool(self.scorer) != bool(self.selector):
            raise ParseError(f"a scorer and a selector go together, got {self.scorer!r} and {self.selector!r}", where="Indexer")
        if not self.always and not self.scorer:
            raise ParseError("nothing would be read: neither a pattern nor a scorer is given", where="Indexer",
                             hint="for example always=(SlidingWindow(window=512), Sinks(tokens=64))")
        for pattern in self.always:
            if not callable(getattr(pattern, "kinds", None)) or not callable(getattr(pattern, "allows", None)):
                raise ParseError(f"{pattern!r} is no pattern", where="Indexer", hint="a pattern is, for example, SlidingWindow(window=512)")
        for kind, name in (("block scorer", self.scorer), ("block selector", self.selector)):
            if name:
                _named(kind, name)

    def __str__(self) -> str:
        from .pipeline_text import print_value

        return print_value(self)

    @staticmethod
    @lru_cache(LAYOUTS)
    def parse(text: str) -> Indexer:
        """Raises ParseError."""
        from .pipeline_text import build, parse_call

        name, options = parse_call(text)
        if name != "Indexer":
            raise ParseError(f"{text!r} is no indexer", hint="write Indexer(always=(SlidingWindow(window=512),))")
        found: Indexer = build(Indexer, options, name)
        return found

    def is_dense(self, queries: int, keys: int) -> bool:
        """Whether attention of these lengths is better run densely."""
        limit = self.dense_below_decoding if queries <= DECODED else self.dense_below
        return keys < (limit or 0)

    def layout(self, query: Tensor, key: Tensor, causal: bool, scale: float, key_mask: Tensor | None = None) -> BlockLayout:
        """The blocks to read for these queries [B, H, Q, D] and keys [B, G, K, D], of which key_mask [B, K] count. Scores have no gradient."""
        grid = Grid(query.shape[2], key.shape[2], self.block_q, self.block_k, causal)
        shifts = _starts(key_mask) if self.always else (0,)
        if not self.scorer:
            return _static_layout(self.always, grid, shifts)
        with torch.no_grad():
            scores: Tensor = _named("block scorer", self.scorer)(query.detach(), key.detach(), grid, scale)
            if causal:
                scores = scores.masked_fill(~visible(grid.queries, grid.keys, grid.block_q, grid.block_k, query.device), -torch.inf)
            chosen: Tensor = _named("block selector", self.selector)(scores)
        return _static_table(self.always, grid, shifts).layout(chosen)


def _starts(key_mask: Tensor | None) -> tuple[int, ...]:
    """The first key that counts of each entry of the batch; one number where they agree."""
    if key_mask is None or not key_mask.numel():
        return (0,)
    first = key_mask.to(torch.int8).argmax(1).tolist()
    return (first[0],) if len(set(first)) == 1 else tuple(first)


@lru_cache(LAYOUTS)
def _static_table(patterns: tuple[Pattern, ...], grid: Grid, shifts: tuple[int, ...]) -> BlockTable:
    tables = {shift: union(patterns, replace(grid, shift=shift)) for shift in set(shifts)}
    return stack([tables[shift] for shift in shifts])


@lru_cache(LAYOUTS)
def _static_layout(patterns: tuple[Pattern, ...], grid: Grid, shifts: tuple[int, ...]) -> BlockLayout:
    return _static_table(patterns, grid, shifts).layout()


@lru_cache(LAYOUTS)
def _named(kind: str, text: str) -> Named:
    return Named.parse(kind, text)
