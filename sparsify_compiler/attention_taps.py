"""Attentions of a Program under the eyes of another function, which computes them: for calibration, and for measuring what an indexer finds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

from .call import instantiate
from .library_attention import set_function
from .program import Program, Site

# (site path, query [B, H, Q, D], key [B, G, K, D], value [B, G, K, E], mask, is_causal with ends aligned, scale) -> [B, H, Q, E]
Watch = Callable[[str, Tensor, Tensor, Tensor, Tensor | None, bool, float | None], Tensor]


class Tap(nn.Module):
    """Stands for one attention of a graph."""

    def __init__(self, path: str, watch: Watch) -> None:
        super().__init__()
        self._path, self._watch = path, watch

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False,
                scale: float | None = None, **options: Any) -> Tensor:
        return self._watch(self._path, query, key, value, attn_mask, is_causal, scale)


def with_taps(program: Program, sites: Iterable[Site], watch: Watch) -> nn.Module:
    """A module of the Program whose attentions at these sites, of graphs or of its eager Python, are computed by `watch`. The Program stays."""
    tapped = program.clone()
    eager = []
    for number, site in enumerate(sites):
        if "eager" in site.facts:
            eager.append(site.path)
            tapped.attentions[site.path] = "Indexer(always=(Sinks(tokens=0),))"  # any: what it says is never asked
            continue
        region = tapped.regions[site.region]
        node, name = region.node(site.roles["attention"]), f"sparsify_attention_tap_{number}"
        region.module.add_module(name, Tap(site.path, watch))
        with region.graph.inserting_before(node):
            made = region.graph.call_module(name, (), dict(node.kwargs))
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        region.graph.erase_node(node)
    for region in tapped.regions.values():
        region.module.recompile()
    model = instantiate(tapped)
    for path in eager:
        set_function(model, path, partial(watch, path))
    return model
