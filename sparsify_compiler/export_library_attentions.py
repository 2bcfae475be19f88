"""Attentions of a graph as a whole graph without torch computes them: over all keys, or blocks by a table.

A key is read once for the heads that share it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from .branches import parse
from .errors import ModelError
from .export_library_blocks import HINT, LONGEST, Tables, attend_blocked
from .indexer import Indexer
from .normal_form_edit import argument
from .ops import attend
from .program import Region

aten = torch.ops.aten


class Attention(NamedTuple):
    """The arguments of an attention in either form; `blocks`: those of attend_blocked after its scale."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    attn_mask: fx.Node | None
    is_causal: bool
    scale: float | None
    blocks: tuple[Any, ...] = ()


def attention_of(node: fx.Node) -> Attention | None:
    """The attention that a node is, after plain_attentions()."""
    if node.target is attend_blocked:
        query, key, value, mask, causal, _, scale, *blocks = node.args
        return Attention(query, key, value, mask, causal, scale, tuple(blocks))  # type: ignore[arg-type]
    if node.target is aten.scaled_dot_product_attention.default:
        return Attention(*(argument(node, name) for name in ("query", "key", "value", "attn_mask", "is_causal", "scale")))
    return None


def plain_attentions(region: Region, longest: int = LONGEST) -> dict[str, int]:
    """Bring the attentions of a graph to scaled_dot_product_attention or attend_blocked, without copies of shared keys, in place.

    longest   tokens of a text, where the model sets no limit itself
    Returns symbols of the graph -> what they are at most for the sake of tables. Raises ModelError for an attention that has neither form.
    """
    tables = Tables(region, longest)
    for node in list(region.graph.nodes):
        if node.target is attend.op:
            _make_plain(node, tables)
    for node in region.graph.nodes:
        found = attention_of(node)
        if found is None:
            continue
        shared = [_before_repeats(one) for one in (found.key, found.value)]
        if None not in shared and found.blocks:
            node.args = (node.args[0], *shared, *node.args[3:])
        elif None not in shared:
            node.kwargs = {**node.kwargs, "key": shared[0], "value": shared[1], "enable_gqa": True}
    region.graph.eliminate_dead_code()
    return tables.most


def _make_plain(node: fx.Node, tables: Tables) -> None:
    indexer = parse(str(argument(node, "indexer")))
    if argument(node, "learned") or not isinstance(indexer, Indexer):
        raise ModelError("this attention reads by what it has learned, which whole graphs do not", where=node.name, hint=HINT)
    plain = tables.add(node, indexer)
    if plain is None:
        given = {name: argument(node, name) for name in ("query", "key", "value", "attn_mask", "is_causal", "scale")}
        heads, groups = (given[name].meta["val"].shape[1] for name in ("query", "key"))
        with node.graph.inserting_before(node):
            plain = node.graph.call_function(aten.scaled_dot_product_attention.default, (), {**given, "enable_gqa": heads != groups})
    plain.meta = {key: value for key, value in node.meta.items() if key != "kernel"}
    node.replace_all_uses_with(plain)
    node.graph.erase_node(node)


def _before_repeats(node: fx.Node) -> fx.Node | None:
    """x [B, G, S, D] where the node is x[:, :, None].expand(B, G, n, S, D).reshape(B, G * n, S, D)."""
    chain = [node]
    for targets in ((aten.reshape.default, aten.view.default, aten.flatten.using_ints), (aten.expand.default,), (aten.unsqueeze.default,)):
        if chain[-1].target not in targets:
            return None
        chain.append(chain[-1].all_input_nodes[0])
    source, wide = chain[-1].meta["val"].shape, chain[1].meta["val"].shape
    fits = len(source) == 4 and len(wide) == 5 and chain[2].kwargs["dim"] == 2 and wide[1] == source[1] and wide[4] == source[3]
    return chain[-1] if fits and node.meta["val"].dim() == 4 else None
