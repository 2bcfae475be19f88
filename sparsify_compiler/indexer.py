"""Indexer: how one attention finds the blocks of keys that it reads — a static pattern, and beside it what a selector takes of a scorer's scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from . import page_choice
from .block_grid import Grid
from .block_layout import ALL, NONE, SOME, BlockLayout, BlockTable, merge_branches, stack
from .block_order import Order, heads_alike
from .block_pattern import three
from .block_tables import LAYOUTS, PARSED, named, starts, static_layout, static_table
from .errors import ModelError, ParseError
from .key_sums import same_keys
from .named import Named

DECODED = 8  # query rows up to which a call is a step of decoding
UNLEARNED: Mapping[str, Tensor] = MappingProxyType({})


@dataclass(frozen=True)
class Indexer:
    """The choice of blocks of one attention, as plain options; str() and parse() are inverses.

    always        patterns (passes/attention/patterns) whose union is read whatever the scores are
    scorer        a file of passes/attention/scorers, or "" for the patterns alone: (query, key, key_mask, grid, scale) -> scores [B, H, NQ, NK],
                  estimates of the log of the sum of exp(score) of a pair of blocks, up to a number of its own for each row of the table;
                  +inf for a pair that must be read
    selector      a file of passes/attention/selectors: (scores, read) -> bool like scores, the pairs to read. Scores are -inf where nothing is
                  visible, and +inf where a pair must be read or is not a number; read says what `always` reads wholly
    block_q, block_k   rows and keys of a block
    dense_below   attention over fewer keys than this runs densely; None where that is still to be measured (until then nothing does)
    dense_below_decoding  the same for a few query rows at a time
    dense_kernel_from  dense attention over at least so many rows and keys is computed by the kernel of attend_blocks, else by torch; None: by torch
    choices       other indexers, of the same blocks, for some of the heads
    heads         the heads of each choice; all others do as this indexer says
    order         a file of passes/attention/orders, or "": (query, key, key_mask, grid, scale) -> Order. All of the above is then said of tokens in
                  this order; the causal mask and padding stay exact. Scorers take the places of the order for positions
    rest          a file of passes/attention/rests, or "": (query, key, value, key_mask, left, grid, scale) -> (out, lse) stands for the blocks that
                  are not read, and is merged with attention to those that are. Blocks that a pattern or the diagonal cuts are then read whole

    Functions of files with LEARNED are given the tensors of these names behind all else: those of `learned`, which whoever runs the indexer has.
    """

    always: tuple[Any, ...] = ()
    scorer: str = ""
    selector: str = ""
    block_q: int = 64
    block_k: int = 64
    dense_below: int | None = None
    dense_below_decoding: int | None = None
    dense_kernel_from: int | None = None
    choices: tuple[Any, ...] = ()
    heads: tuple[tuple[int, ...], ...] = ()
    order: str = ""
    rest: str = ""

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
        self._functions()
        self._check_choices()

    def _functions(self) -> list[Named]:
        """The functions of the catalogue that this indexer names itself. Raises UnknownNameError and ParseError."""
        known = {"token order": self.order, "block scorer": self.scorer, "block selector": self.selector, "block rest": self.rest}
        return [named(kind, text) for kind, text in known.items() if text]

    @cached_property
    def learned(self) -> tuple[str, ...]:
        """Names of the tensors that it needs, in the order in which ops are given them."""
        of_choices = (choice.learned for choice in self.choices)
        return tuple(dict.fromkeys(name for names in (*(each.learned for each in self._functions()), *of_choices) for name in names))

    def _check_choices(self) -> None:
        named = [head for heads in self.heads for head in heads]
        if len(self.choices) != len(self.heads) or len(set(named)) != len(named) or min(named, default=0) < 0:
            raise ParseError(f"{len(self.choices)} choices for the heads {self.heads}", where="Indexer",
                             hint="every choice has heads of its own, such as choices=(Indexer(...),), heads=((0, 3),)")
        for choice in self.choices:
            if not isinstance(choice, Indexer) or choice.choices or choice._shared() != self._shared():
                raise ParseError(f"{choice} is no choice for some heads", where="Indexer",
                                 hint=f"a choice is an Indexer with block_q={self.block_q}, block_k={self.block_k}, the same order and rest, "
                                      "and no choices of its own")

    def _shared(self) -> tuple[int, int, str, str]:
        """What is the same for all choices."""
        return self.block_q, self.block_k, self.order, self.rest

    def __str__(self) -> str:
        from .pipeline_text import print_value

        return print_value(self)

    @staticmethod
    @lru_cache(PARSED)
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

    @property
    def is_static(self) -> bool:
        """Do patterns alone say what is read, whatever the queries and keys are?"""
        return not (self.scorer or self.order or self.rest) and all(choice.is_static for choice in self.choices)

    def static_table(self, heads: int, grid: Grid) -> BlockTable:
        """What each of so many heads reads, kinds [1, 1 or heads, NQ, NK], of an indexer that is static."""
        nothing = torch.empty(1, heads, 0, 0, dtype=torch.float32)
        return self._table(nothing, nothing, None, grid, 1.0, None, UNLEARNED)

    def layout(self, query: Tensor, key: Tensor, causal: bool, scale: float, key_mask: Tensor | None = None,
               weights: Mapping[str, Tensor] = UNLEARNED) -> BlockLayout:
        """The blocks to read for these queries [B, H, Q, D] and keys [B, G, K, D], of which key_mask [B, K] count. Scores have no gradient.

        weights   the tensors of `learned`, by name
        """
        grid = Grid(query.shape[2], key.shape[2], self.block_q, self.block_k, causal)
        if not (self.scorer or self.choices or self.order or self.rest):
            return static_layout(self.always, grid, starts(key_mask))
        with torch.no_grad():
            query, key = query.detach(), same_keys(key.detach(), key)
            listed = page_choice.layout(self, query, key, key_mask, grid, scale)
            if listed is not None:
                return listed
            order = _call("token order", self.order, weights, query, key, key_mask, grid, scale) if self.order else None
            if order is not None:
                query, key = order.take(query, key)
            table, left = self._table(query, key, key_mask, grid, scale, order, weights), None
            if self.rest:
                kinds, places = heads_alike(table.kinds, _whole_places(grid, order))
                table = replace(table, kinds=torch.where((kinds != NONE) | (places == SOME), ALL, NONE).to(torch.int8), tile_of=None, tiles=None)
                left = (table.kinds == NONE) & (places == ALL)
            layout = (table if order is None else order.cut(table, key_mask)).layout()
            return layout if order is None and left is None else replace(layout, order=order, left=left)

    def branch(self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, bias: Tensor | None, causal: bool, scale: float,
               weights: Mapping[str, Tensor] = UNLEARNED) -> tuple[Tensor, Tensor]:
        """Attention (out [B, H, Q, E], lse [B, H, Q]) to what is read and what stands for the rest. Raises ModelError for a bias beside a rest."""
        layout = self.layout(query, key, causal, scale, key_mask, weights)
        found = layout.attend(query, key, value, key_mask, bias, scale)
        if layout.left is None:
            return found
        if bias is not None:
            raise ModelError("something is added to the scores of this attention, and what stands for the rest of its blocks cannot know it",
                             where=f"Indexer(rest={self.rest!r})", hint="name the attention in the pass's ignore")
        order = layout.order
        if order is not None:
            query, key, value = order.take(query, key, value)
            key_mask = order.take_mask(key_mask)
        out, lse = _call("block rest", self.rest, weights, query, key, value, key_mask, layout.left, layout.grid, scale)
        return merge_branches([found, (out, lse) if order is None else (order.give_back(out), order.give_back(lse))])

    def _table(self, query: Tensor, key: Tensor, key_mask: Tensor | None, grid: Grid, scale: float, order: Order | None,
               weights: Mapping[str, Tensor]) -> BlockTable:
        """What all heads read, or each: [B or 1, H, G or 1, NQ, NK]. Queries and keys are in their order, key_mask is not."""
        total, parts = query.shape[1], self.parts(query.shape[1])
        seen = _seen(grid, key_mask, query.device) if order is None else _some((order.seen(grid, key_mask) != NONE).to(query.device), None, total)
        shifts = starts(key_mask) if order is None and any(part.always for part, _ in parts) else (0,)
        key_mask = key_mask if order is None else order.take_mask(key_mask)
        texts = [text for text in dict.fromkeys(part.scorer for part, _ in parts) if text]
        scores = {text: _clean(_call("block scorer", text, weights, query, key, key_mask, grid, scale), seen) for text in texts}
        static = grid if order is None else replace(grid, causal=False)
        if len(parts) == 1:
            only: Indexer = parts[0][0]
            return replace(only._part(scores.get(only.scorer), seen, static, shifts), grid=grid)
        tables = [part._part(_some(scores[part.scorer], heads, total) if part.scorer else None, _some(seen, heads, total), static,
                             shifts).expand(len(query), len(heads)) for part, heads in parts]
        where = torch.tensor([head for _, heads in parts for head in heads], device=query.device).argsort()
        return replace(stack(tables, 1).take_heads(where), grid=grid)

    def parts(self, total: int) -> list[tuple[Indexer, tuple[int, ...]]]:
        """This indexer and its choices, each with its own of so many heads. Raises ParseError."""
        chosen = {head for heads in self.heads for head in heads}
        if max(chosen, default=-1) >= total:
            raise ParseError(f"a choice for head {max(chosen)} of {total}", where="Indexer")
        others = tuple(head for head in range(total) if head not in chosen)
        return [(part, heads) for part, heads in ((self, others), *zip(self.choices, self.heads, strict=True)) if heads or not chosen]

    def _part(self, scores: Tensor | None, seen: Tensor, grid: Grid, shifts: tuple[int, ...]) -> BlockTable:
        """What this indexer's own options read: of the scores of some heads, if it has a scorer."""
        table = static_table(self.always, grid, shifts)
        if scores is None:
            return table
        chosen: Tensor = named("block selector", self.selector)(scores, (table.kinds == ALL) & seen)
        return replace(table, kinds=torch.where(chosen & (scores > -torch.inf), ALL, table.kinds))


def _call(kind: str, text: str, weights: Mapping[str, Tensor], *given: Any) -> Any:
    function = named(kind, text)
    return function(*given, *(weights[name] for name in function.learned))


def _some(table: Tensor, heads: tuple[int, ...] | None, total: int) -> Tensor:
    """What a table that is for all heads, for each group or for each of `total` heads says of these, or of each."""
    if table.dim() < 4 or table.shape[1] == 1:
        return table
    every = table.repeat_interleave(total // table.shape[1], 1)
    return every if heads is None else every[:, heads]


def _whole_places(grid: Grid, order: Order | None) -> Tensor:
    """int8, broadcast to [B, H, NQ, NK]: whether NONE, SOME or ALL places of a pair of blocks are at or below the diagonal."""
    if order is not None:
        return order.seen(grid)
    whole = grid.k[1] <= grid.q[0] if grid.causal else torch.ones(grid.rows, grid.columns, dtype=torch.bool)
    return three(grid.visible(), whole)[None, None]


def _clean(scores: Tensor, seen: Tensor) -> Tensor:
    """Scores with +inf where they are no number, -inf where nothing is seen."""
    scores = scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if seen.dim() == 4:
        scores, seen = heads_alike(scores, seen)
    return scores.masked_fill(~seen, -torch.inf)


def _seen(grid: Grid, key_mask: Tensor | None, device: torch.device) -> Tensor:
    """bool, broadcast to [B, 1, NQ, NK]: the pairs of blocks with a key that counts, at or below the diagonal where causal."""
    seen = _visible(grid).to(device)
    if key_mask is None:
        return seen
    padded = torch.nn.functional.pad(key_mask, (0, -grid.keys % grid.block_k))
    return seen & padded.view(len(key_mask), grid.columns, grid.block_k).any(-1)[:, None, None]


@lru_cache(LAYOUTS)
def _visible(grid: Grid) -> Tensor:
    return grid.visible()
