"""Attention by blocks for graphs without torch: what each block of queries reads, as a table for the longest text, which serves all shorter ones.

Patterns speak of the places of a query and a key. So what they say of the longest text they say of every other, of a prompt in pieces and of one more
token, which is looked at before it is relied on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from .block_grid import Grid
from .block_layout import NONE, SOME, BlockTable
from .errors import ModelError
from .executor import part_function
from .export_library_limits import symbol_names
from .export_library_scores import Scores, patterns_of, places_before, scores_of
from .indexer import DECODED, Indexer
from .ops import attend
from .ops.attend_blocks import EXTENT, Extent
from .program import Region, set_tensor

LONGEST = 8192          # tokens of a text, where neither the model nor the caller says
ALWAYS = 1 << 30        # keys below which an attention that never reads blocks is dense
NOTHING, WHOLE = -2, -1     # in a table; else the number of a tile
SAMPLES = ((2, 5), (3, 8))  # sizes of batch, and of all else that varies, at which masks are looked at
HINT = "compile without select_blocks() for this form; save() keeps it for PyTorch"


def attend_blocked(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, causal: bool, starts: str, scale: float | None, table: Tensor,
                   tiles: Tensor, *more: Any) -> Tensor:
    """attend() by a table, for as many queries [B, H, n, D] as keys [B, G, n, D].

    starts   where places are counted from: "" the first key, "first" or "last" the first key that this row of the mask [B, 1, 1 or n, n] lets through
    table    int32 [1, 1 or H, NQ, NK]: -2 nothing, -1 all, else which of tiles bool [T, block_q, block_k]
    more     the numbers of an Extent; where scores choose blocks too, shares, least, logs, way, page (Scores), places_before() and text behind them
    """
    if len(more) > EXTENT:
        return attend.by_indexer(within(str(more[-1]), more), query, key, value, attn_mask, is_causal=causal, scale=scale).contiguous()
    extent = more
    size = query.shape[2]
    first = torch.zeros(1, dtype=torch.int64) if attn_mask is None or not starts else attn_mask[:, 0, 0 if starts == "first" else -1].int().argmax(-1)
    seen = torch.cat([_places(table, tiles, extent, torch.arange(size) - start, torch.arange(size) - start) for start in first.tolist()])
    seen = seen | (size < extent[3 if size <= DECODED else 2])
    mask = seen.tril() if causal else seen
    if attn_mask is not None:
        mask = mask & attn_mask if attn_mask.dtype is torch.bool else attn_mask.masked_fill(~mask, -torch.inf)
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1])


def within(text: str, more: tuple[Any, ...]) -> Indexer:
    """An indexer that is dense below these lengths."""
    return replace(Indexer.parse(text), dense_below=more[2], dense_below_decoding=more[3])


def places_read(new: int, keys: int, table: Tensor, tiles: Tensor, extent: Extent) -> Tensor:
    """bool [1, 1 or H, new, keys]: what the last `new` of so many tokens read, but for what is still to come."""
    seen = _places(table, tiles, extent, torch.arange(keys - new, keys), torch.arange(keys))
    return seen | (keys < extent[3 if new <= DECODED else 2])


def _places(table: Tensor, tiles: Tensor, extent: tuple[int, ...], queries: Tensor, keys: Tensor) -> Tensor:
    rows, columns = (place.clamp(min=0) // size for place, size in zip((queries, keys), extent, strict=False))
    kind = table[:, :, rows[:, None], columns].long()
    cut = tiles[kind.clamp(min=0), queries.clamp(min=0)[:, None] % extent[0], keys.clamp(min=0) % extent[1]]
    return torch.where(kind >= 0, cut, kind == WHOLE)


@dataclass
class Tables:
    """Tables of a region's attentions; equal ones are one. `most`: what its symbols may be at most for their sake."""

    region: Region
    longest: int = LONGEST

    def __post_init__(self) -> None:
        self.most: dict[str, int] = {}
        self._made: dict[tuple[str, int, int, bool, int], tuple[str, tuple[Tensor, Tensor]]] = {}

    def add(self, node: fx.Node, indexer: Indexer) -> fx.Node | None:
        """A node of attend_blocked before an attend() that it can stand for; None where that is dense for every length. Raises ModelError."""
        given: dict[str, Any] = {one.name: node.kwargs.get(one.name) for one in attend.op._schema.arguments}
        query, key = given["query"], given["key"]
        sizes = [one.meta["val"].shape[2] for one in (query, key)]
        if not _equal(*sizes):
            raise ModelError("this attention reads blocks of keys that are not its own tokens, which whole graphs do not", where=node.name, hint=HINT)
        below = indexer.dense_below or 0, indexer.dense_below_decoding or 0
        if min(below) >= ALWAYS:
            return None
        length, heads = self._longest(sizes[1]), query.meta["val"].shape[1]
        few = min(length, DECODED) if isinstance(sizes[1], int) else length     # with a cache few queries read as many keys as there are
        if length < below[0] and few < below[1]:
            return None
        starts, causal, fixed = _starts(self.region, node), bool(given["is_causal"]), isinstance(sizes[1], int)
        scores = None if indexer.is_static else scores_of(indexer, int(heads), node)
        before = places_before(indexer, int(heads)) if scores is not None and starts else 0
        name, made = self._table(indexer, int(heads), length, causal or starts == "last", fixed, node, before)
        with node.graph.inserting_before(node):
            stored = [self._stored(f"{name}.{part}", one) for part, one in zip(("table", "tiles"), made, strict=True)]
            of_scores: Any = () if scores is None else self._given(scores, before)
            inputs = (query, key, given["value"], given["attn_mask"], causal, starts, given["scale"])
            return node.graph.call_function(attend_blocked, (*inputs, *stored, indexer.block_q, indexer.block_k, *below, *of_scores))

    def _given(self, scores: Scores, before: int) -> tuple[Any, ...]:
        name = f"scores_{sum(one.op == 'get_attr' for one in self.region.graph.nodes)}"
        tensors = [self._stored(f"{name}.{part}", getattr(scores, part)) for part in ("shares", "least", "logs")]
        return (*tensors, scores.pages.way, scores.pages.page, before, scores.text)

    def _longest(self, size: Any) -> int:
        if isinstance(size, int):
            return size
        names, limits = symbol_names(self.region), {}
        for symbol in size.node.expr.free_symbols:
            high = self.region.spec.ranges.get(names.get(symbol, ""), (1, None))[1]
            limits[symbol] = self.longest if high is None else high
            if high is None and symbol in names:
                self.most[names[symbol]] = self.longest
        return int(size.node.expr.subs(limits))

    def _table(self, indexer: Indexer, heads: int, length: int, causal: bool, fixed: bool, node: fx.Node,
               before: int) -> tuple[str, tuple[Tensor, Tensor]]:
        key = str(replace(indexer, dense_below=None, dense_below_decoding=None, dense_kernel_from=None)), heads, length, causal, before
        if key not in self._made:
            made = table_of(indexer, heads, length, causal)
            if (before or not fixed) and not _is_of_places(indexer, heads, length, causal, made):
                raise ModelError("the pattern of this attention depends on how long a text is", where=node.name,
                                 hint="compile it for texts of one length, or with a pattern that does not, such as SlidingWindow(window=512)")
            self._made[key] = f"blocks_{len(self._made)}", table_of(indexer, heads, length, causal, before) if before else made
        return self._made[key]

    def _stored(self, name: str, tensor: Tensor) -> fx.Node:
        set_tensor(self.region.module, name, tensor)
        node = self.region.graph.get_attr(name)
        node.meta = {"val": torch.empty_like(tensor, device="meta"), "by": "export"}
        return node


def table_of(indexer: Indexer, heads: int, length: int, causal: bool, before: int = 0) -> tuple[Tensor, Tensor]:
    """table int32 [1, 1 or H, NQ, NK] and tiles bool [T, block_q, block_k] (at least one) of what an indexer reads whatever the scores are.

    before  places of the table ahead of the text's first
    """
    whole = length + before
    return encoded(patterns_of(indexer, heads, Grid(whole, whole, indexer.block_q, indexer.block_k, causal), before))


def encoded(found: BlockTable) -> tuple[Tensor, Tensor]:
    """The same of what patterns read."""
    kinds = found.kinds
    numbers = torch.full_like(kinds, WHOLE, dtype=torch.int32) if found.tile_of is None else found.tile_of.to(torch.int32)
    table = torch.where(kinds == SOME, numbers, torch.where(kinds == NONE, NOTHING, WHOLE).to(torch.int32)).contiguous()
    tiles = torch.zeros(1, found.grid.block_q, found.grid.block_k, dtype=torch.bool) if found.tiles is None else found.tiles.contiguous()
    return table, tiles


def _is_of_places(indexer: Indexer, heads: int, length: int, causal: bool, made: tuple[Tensor, Tensor]) -> bool:
    """Does it say of shorter texts what the table says of their places?"""
    extent = indexer.block_q, indexer.block_k, 0, 0
    for blocks in (1, 3, 6):
        shorter = min(length, blocks * max(extent) + 5)
        found, expected = (places_read(shorter, shorter, *one, extent) for one in (made, table_of(indexer, heads, shorter, causal)))
        if not torch.equal(*((one.tril() if causal else one) for one in (found, expected))):
            return False
    return True


def _equal(a: Any, b: Any) -> bool:
    """Are two sizes the same number whatever the symbols are?"""
    return bool(a == b) if isinstance(a, int) or isinstance(b, int) else a.node.expr == b.node.expr


def _starts(region: Region, node: fx.Node) -> str:
    """Where places are counted from (attend_blocked), as attend() finds it from the mask at hand: seen on samples with and without padding."""
    mask: Any = node.kwargs.get("attn_mask")
    if mask is None or mask.meta["val"].dtype is not torch.bool:
        return ""
    answers = set()
    for size in SAMPLES:
        for padded in (False, True):
            shapes = [_shape(node.kwargs[name], size) for name in ("query", "key")]
            says = attend.mask_of_keys(_sample(region, mask, size, padded), *(torch.empty(one, dtype=torch.float32, device="meta") for one in shapes))
            answers.add("" if says is None else "last" if says[1] else "first")
    if len(answers) == 1:
        return str(answers.pop())
    raise ModelError("the mask of this attention is sometimes one of keys and sometimes more than that", where=node.name, hint=HINT)


def _sample(region: Region, mask: fx.Node, size: tuple[int, int], padded: bool) -> Tensor:
    """The mask of inputs of ones, or of such as hide the first keys of the first text."""
    places = [one for one in region.graph.nodes if one.op == "placeholder"]
    given = [torch.ones(_shape(one, size), dtype=one.meta["val"].dtype) for one in places]
    for one in given:
        if padded and one.dim() > 1 and not one.is_floating_point():
            one[0, ..., : one.shape[-1] // 2] = 0
    found: Tensor = part_function(region, places, [mask])(*given)[0]
    return found


def _shape(node: Any, size: tuple[int, int]) -> list[int]:
    """The shape of a value, its first dimension and all others of these sizes where they vary."""
    return [size[dim > 0] if isinstance(found, torch.SymInt) else found for dim, found in enumerate(node.meta["val"].shape)]
