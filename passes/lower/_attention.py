"""Attentions that choose their blocks: from how many tokens on that is faster than dense attention, measured.

How many blocks an indexer finds depends on queries and keys: they are those of the model's own calibration batch, stretched to the lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from sparsify_compiler.attention_taps import with_taps
from sparsify_compiler.branches import Branches, parse
from sparsify_compiler.calibrate_run import call_on
from sparsify_compiler.decision import Decision
from sparsify_compiler.indexer import Indexer
from sparsify_compiler.key_sums import KeySums
from sparsify_compiler.measure import Timing, interleave
from sparsify_compiler.nearness import distance, near
from sparsify_compiler.normal_form_edit import insert
from sparsify_compiler.normal_form_edit import replace as replace_node
from sparsify_compiler.ops import attend
from sparsify_compiler.ops.attend_blocks import reference, scale_of
from sparsify_compiler.passes.attention._sites import shape_of
from sparsify_compiler.passes.lower import _dense_attention
from sparsify_compiler.passes.lower._dense_attention import NEVER, Given, eager_kind, kernel_limit
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, Site, get_tensor

PROMPTS = (256, 512, 1024, 2048, 4096)  # tokens of a prompt that is read at once
CACHES = (256, 1024, 4096, 16384)  # tokens before the one that is said


@dataclass(frozen=True)
class _Kind:
    """What the time of an attention depends on."""

    indexer: Indexer
    heads: int
    groups: int
    width: int
    dtype: torch.dtype
    causal: bool
    biased: bool  # something is added to its scores


@dataclass(frozen=True)
class _Place:
    """One attention of the Program; how to write its indexer back, and how to make it what it was, without one."""

    site: str
    tap: Site
    kind: _Kind
    write: Callable[[str], None]
    make_dense: Callable[[], None]
    learned: tuple[Tensor, ...]  # what its indexer names


def lower(program: Program, ctx: Context, rounds: int, margin: float) -> None:
    """Give every indexer that has none the lengths below which attention is dense. Attentions of one kind are measured once."""
    found: dict[_Kind, list[_Place]] = {}
    for place in [*_in_graphs(program), *_in_python(program)]:
        if place.kind.indexer.dense_below is None:
            found.setdefault(place.kind, []).append(place)
    seen = _seen(program, ctx, {kind: places[0].tap for kind, places in found.items() if kind.indexer.scorer or kind.indexer.choices})
    for done, (kind, places) in enumerate(found.items()):
        if not ctx.spend():
            break
        measured = _measured(kind, seen.get(kind), places[0].learned, rounds, margin)
        for place in places:
            if measured.never and measured.indexer.dense_kernel_from is None:
                place.make_dense()
            else:
                place.write(str(measured.indexer))
            if place.site in program.decisions:
                measured.note(program.decisions[place.site])
        ctx.progress("lower attention", done + 1, len(found))
    _dense_attention.lower(program, ctx, rounds, margin)


def _seen(program: Program, ctx: Context, taps: dict[_Kind, Site]) -> dict[_Kind, Given]:
    """Queries, keys and values of the first call of these attentions, on a calibration batch or the example inputs."""
    batch = ctx.batches[0] if ctx.batches else ctx.example_inputs
    found: dict[str, Given] = {}
    if batch is None or not taps:
        return {}

    def watch(path: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
        found.setdefault(path, (query[:1].detach(), key[:1].detach(), value[:1].detach()))
        return attend.dense(query, key, value, mask, is_causal=causal, scale=scale)

    with torch.no_grad():
        call_on(with_taps(program, taps.values(), watch), batch, 0)
    return {kind: found[site.path] for kind, site in taps.items() if site.path in found and found[site.path][0].shape[2]}


def _in_graphs(program: Program) -> list[_Place]:
    places = []
    for region, node in program.nodes():
        if node.target is attend.op:
            indexer = parse(str(node.kwargs["indexer"]))
            if isinstance(indexer, Branches):
                continue
            mask: Any = node.kwargs.get("attn_mask")
            biased = mask is not None and mask.meta["val"].is_floating_point()
            causal = bool(node.kwargs.get("is_causal", False) or node.meta.get("causal", False))
            site = str(node.meta.get("site", node.name))
            tap = Site("attention", f"{region.path}/{node.name}", region.path, {"attention": node.name})
            heads, groups, width, _, dtype = shape_of(program, tap)
            kind = _Kind(indexer, heads, groups, width, dtype, causal, biased)
            given: Any = node.kwargs.get("learned", ())
            learned = tuple(get_tensor(region.module, str(one.target)) for one in given)
            places.append(_Place(site, tap, kind, partial(_write, node), partial(_make_dense, node), learned))
    return places


def _write(node: fx.Node, text: str) -> None:
    node.kwargs = {**node.kwargs, "indexer": text}


def _make_dense(node: fx.Node) -> None:
    given = {name: value for name, value in node.kwargs.items() if name not in ("indexer", "learned")}
    if node.kwargs["query"].meta["val"].shape[1] != node.kwargs["key"].meta["val"].shape[1]:  # type: ignore[union-attr]
        given["enable_gqa"] = True
    dense = insert(node, torch.ops.aten.scaled_dot_product_attention.default, node.meta["val"], **given)
    replace_node(node, dense)


def _in_python(program: Program) -> list[_Place]:
    places = []
    for path, text in list(program.attentions.items()):
        indexer = parse(text)
        if isinstance(indexer, Branches):
            continue
        tap = Site("attention", path, "", {}, {"eager": True})
        of = eager_kind(program, tap)
        kind = _Kind(indexer, of.heads, of.groups, of.width, of.dtype, of.causal, False)
        learned = tuple(program.learned.get(path, {})[name] for name in indexer.learned)
        places.append(_Place(path, tap, kind, partial(program.attentions.__setitem__, path), partial(program.attentions.__delitem__, path), learned))
    return places


@dataclass(frozen=True)
class _Measured:
    """What measuring gave: the indexer with its limits, and the times and the density at the longest prompt."""

    indexer: Indexer
    tokens: int
    times: dict[str, Timing]
    density: float
    off: float  # how far the kernel is from its reference, where that is more than rounding; else 0

    @property
    def never(self) -> bool:
        return self.indexer.dense_below == self.indexer.dense_below_decoding == NEVER

    def note(self, row: Decision) -> None:
        name = min((name for name in ("dense", "every") if name in self.times), key=lambda name: self.times[name].median)
        dense, sparse = self.times[name].median, self.times["blocks"].median
        form = "dense attention" if name == "dense" else "attend_blocks, all keys"
        row.rows, row.dense_form, row.dense_ms, row.sparse_ms, row.density = self.tokens, form, dense, sparse, self.density
        prompt, decoding = self.indexer.dense_below or 0, self.indexer.dense_below_decoding or 0
        runs = "blocks" if self.tokens >= prompt else "dense" if self.indexer.dense_kernel_from is None else "every"
        row.compiled_ms = self.times[runs].median
        if self.never:
            row.format, row.kernel, row.density = "dense", "dense attention", 1.0
        row.reason = f"by blocks: prompts {_from(prompt)}, decoding {_from(decoding)}"
        if self.off:
            row.reason = f"stays dense: its kernel's numbers are {self.off:.1e} from the reference's, by their norm"


def _from(limit: int) -> str:
    return "never, slower than dense at every length" if limit == NEVER else f"from {limit} tokens on" if limit else "always"


def _measured(kind: _Kind, seen: Given | None, learned: tuple[Tensor, ...], rounds: int, margin: float) -> _Measured:
    prompts = {tokens: _times(kind, _tensors(kind, seen, tokens, tokens), learned, rounds) for tokens in PROMPTS}
    caches = {tokens: _times(kind, _tensors(kind, seen, 1, tokens), learned, rounds) for tokens in CACHES}
    off = max(_off(kind, _tensors(kind, seen, queries, PROMPTS[0]), learned) for queries in (1, PROMPTS[0]))
    limits = (NEVER, NEVER) if off else (_limit(prompts, margin), _limit(caches, margin))
    indexer = replace(kind.indexer, dense_below=limits[0], dense_below_decoding=limits[1], dense_kernel_from=kernel_limit(prompts, margin))
    query, key, _ = _tensors(kind, seen, PROMPTS[-1], PROMPTS[-1])
    weights = dict(zip(indexer.learned, learned, strict=True))
    density = kind.indexer.layout(query, key, kind.causal, scale_of(query, None), None, weights).density()
    return _Measured(indexer, PROMPTS[-1], prompts[PROMPTS[-1]], density, off)


def _off(kind: _Kind, given: Given, learned: tuple[Tensor, ...]) -> float:
    """How far attention over the blocks that are found is from its reference; 0 where it is no further than rounding takes it."""
    query, key, value = given
    layout = kind.indexer.layout(query, key, kind.causal, scale_of(query, None), None, dict(zip(kind.indexer.learned, learned, strict=True)))
    off = distance(layout.attend(query, key, value)[0], layout.attend(query, key, value, run=reference)[0])
    return 0.0 if off <= near(kind.dtype) else off


def _limit(times: dict[int, dict[str, Timing]], margin: float) -> int:
    """The shortest measured length from which on blocks always win; 0 where they win at the shortest."""
    limit = NEVER
    for tokens in reversed(times):
        dense = min(times[tokens][name].median for name in ("dense", "every") if name in times[tokens])
        if times[tokens]["blocks"].median > dense * (1 - margin):
            break
        limit = tokens
    return 0 if limit == next(iter(times)) else limit


def _times(kind: _Kind, given: Given, learned: tuple[Tensor, ...], rounds: int) -> dict[str, Timing]:
    query, key, value = given
    queries, keys = query.shape[2], key.shape[2]
    mask = torch.zeros(1, 1, queries, keys, dtype=kind.dtype) if kind.biased else None
    if queries == 1:
        key = KeySums().give(key)  # a cache keeps them
    forms = _dense_attention.forms((query, key, value), kind.causal) if mask is None else {
        "dense": lambda: attend.dense(query, key, value, mask, is_causal=kind.causal)}
    forms["blocks"] = lambda: attend.by_indexer(kind.indexer, query, key, value, mask, learned, is_causal=kind.causal)
    return interleave(forms, rounds=rounds, warmup=1, at_most=0.5, repeats=1)


def _tensors(kind: _Kind, seen: Given | None, queries: int, keys: int) -> Given:
    """Query, key and value as projections leave them: the heads of a token beside each other. What was seen is repeated; else they are random."""
    if seen is not None:
        query, key, value = (_stretched(tensor, tokens) for tensor, tokens in zip(seen, (queries, keys, keys), strict=True))
        return query, key, value
    return _dense_attention.random(kind, queries, keys)


def _stretched(tensor: Tensor, tokens: int) -> Tensor:
    """The last tokens of a tensor [1, heads, T, width] that is repeated until it has as many."""
    again = tensor.repeat(1, 1, -(-tokens // tensor.shape[2]), 1)[:, :, -tokens:]
    return again.transpose(1, 2).contiguous().transpose(1, 2)
