"""Attentions that read all keys: from how many tokens on the kernel of attend_blocks computes them faster than torch, measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.indexer import DECODED, Indexer
from sparsify_compiler.library_attention import find_library_attentions
from sparsify_compiler.measure import Timing, interleave
from sparsify_compiler.nearness import distance, near
from sparsify_compiler.normal_form_edit import argument
from sparsify_compiler.ops import attend
from sparsify_compiler.passes.attention._sites import KIND, attention_sites, give_indexer, shape_of
from sparsify_compiler.passes.attention.patterns.everything import Everything
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, Site

LENGTHS = (128, 512, 2048)  # tokens of a text that is read at once
NEVER = 1 << 30  # keys below which an attention reads all of them that always does
KINDS = 256  # whose times are remembered
Given = tuple[Tensor, Tensor, Tensor]  # query, key, value


@dataclass(frozen=True)
class Kind:
    """What the time of a dense attention depends on."""

    heads: int
    groups: int
    width: int
    dtype: torch.dtype
    causal: bool
    tokens: int | None = None  # of every text, where that is fixed


def lower(program: Program, ctx: Context, rounds: int, margin: float) -> None:
    """Give dense attentions the length from which on our kernel computes them. Attentions of one kind are measured once."""
    found: dict[Kind, list[Site]] = {}
    for site in _sites(program):
        kind = eager_kind(program, site) if "eager" in site.facts else _graph_kind(program, site)
        if kind is not None:
            found.setdefault(kind, []).append(site)
    for kind, sites in found.items():
        times = _times(kind, rounds, torch.get_num_threads())
        limit = kernel_limit(times, margin)
        if limit is None:
            continue
        if not ctx.spend():
            break
        for site in sites:
            _give(program, site, limit, times)


def kernel_limit(times: dict[int, dict[str, Timing]], margin: float) -> int | None:
    """The shortest measured length from which on the kernel of all keys ("every") always wins against torch ("dense"); None without one."""
    limit = None
    for tokens in reversed(times):
        form = times[tokens].get("every")
        if form is None or form.median > times[tokens]["dense"].median * (1 - margin):
            break
        limit = tokens
    return limit


def forms(given: Given, causal: bool) -> dict[str, Any]:
    """Dense attention by torch, and by the kernel where there is one for so many rows, whose numbers are torch's."""
    query, key, value = given
    made = {"dense": lambda: attend.dense(query, key, value, is_causal=causal)}
    if query.shape[2] > DECODED and attend.has_kernel(query, key, value):
        made["every"] = lambda: attend.dense(query, key, value, is_causal=causal, kernel_from=0)
        if not distance(made["every"](), made["dense"]()) <= near(query.dtype):
            del made["every"]
    return made


def eager_kind(program: Program, site: Site) -> Kind:
    """Of an attention that stays eager Python, by its configuration."""
    assert program.skeleton is not None
    heads, groups, width, _, dtype = shape_of(program, site)
    return Kind(heads, groups, width, dtype, bool(getattr(program.skeleton.get_submodule(site.path), "is_causal", True)))


def _graph_kind(program: Program, site: Site) -> Kind | None:
    """None where torch alone is asked: what is added to the scores, and texts that are always short."""
    node = program.regions[site.region].node(site.roles["attention"])
    mask: Any = argument(node, "attn_mask")
    if mask is not None and mask.meta["val"].is_floating_point():
        return None
    length = node.kwargs["query"].meta["val"].shape[2]  # type: ignore[union-attr]
    tokens = length if isinstance(length, int) else None
    if tokens is not None and tokens < LENGTHS[0]:
        return None
    heads, groups, width, _, dtype = shape_of(program, site)
    return Kind(heads, groups, width, dtype, site.facts["mask"] == "causal", tokens)


def _sites(program: Program) -> list[Site]:
    """Those without an indexer that nobody has measured yet. Of eager Python all or none: they find their function by one configuration."""
    found = attention_sites(program, Context(), KIND, ())
    eager = {} if program.skeleton is None else find_library_attentions(program.skeleton)
    return [site for site in found if site.path not in program.decisions and ("eager" not in site.facts or not any(eager.values()))]


@lru_cache(KINDS)
def _times(kind: Kind, rounds: int, threads: int) -> dict[int, dict[str, Timing]]:
    """Tokens -> the times of the forms. `threads` are torch's."""
    lengths = (kind.tokens,) if kind.tokens is not None else LENGTHS
    return {tokens: interleave(forms(random(kind, tokens, tokens), kind.causal), rounds=rounds, warmup=1, at_most=0.3, repeats=1)
            for tokens in lengths}


def random(kind: Any, queries: int, keys: int) -> Given:
    """Query, key and value as projections leave them: the heads of a token beside each other."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(1, tokens, heads, kind.width, generator=generator, dtype=torch.float32).to(kind.dtype).transpose(1, 2)
            for tokens, heads in ((queries, kind.heads), (keys, kind.groups), (keys, kind.groups))]
    return made[0], made[1], made[2]


def _give(program: Program, site: Site, limit: int, times: Mapping[int, Mapping[str, Timing]]) -> None:
    indexer = Indexer(always=(Everything(),), dense_below=NEVER, dense_below_decoding=NEVER, dense_kernel_from=limit)
    give_indexer(program, site, indexer, "lower")
    row, tokens = program.decisions[site.path], max(times)
    row.structure, row.format, row.kernel = "dense", "dense", f"attend_blocks, all keys, from {limit} tokens on"
    row.rows, row.dense_form, row.dense_ms = tokens, "attention of torch", times[tokens]["dense"].median
    row.compiled_ms = times[tokens]["every"].median
    row.reason = f"all keys by our kernel from {limit} tokens on: {row.dense_ms / row.compiled_ms:.2f} times as fast at {tokens}"
