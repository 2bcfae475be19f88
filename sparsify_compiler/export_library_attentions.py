"""Attentions of a graph as a whole graph without torch computes them: all keys, each read once for the heads that share it."""

from __future__ import annotations

import torch
from torch import fx

from .branches import parse
from .errors import ModelError
from .normal_form_edit import argument
from .ops import attend
from .program import Region

aten = torch.ops.aten
LONG = 1 << 29      # tokens: what is dense up to here always is


def plain_attentions(region: Region) -> None:
    """Bring the attentions of a graph to scaled_dot_product_attention without copies of shared keys, in place.

    Raises ModelError for one that reads some blocks of the keys only: its kernels find them at run time, with torch.
    """
    for node in list(region.graph.nodes):
        if node.target is attend.op:
            _make_plain(node)
    for node in region.graph.nodes:
        if node.target is aten.scaled_dot_product_attention.default:
            shared = [_before_repeats(argument(node, name)) for name in ("key", "value")]
            if None not in shared:
                node.kwargs = {**node.kwargs, "key": shared[0], "value": shared[1], "enable_gqa": True}
    region.graph.eliminate_dead_code()


def _make_plain(node: fx.Node) -> None:
    if argument(node, "learned") or not parse(str(argument(node, "indexer"))).is_dense(LONG, LONG):
        raise ModelError("this attention chooses the blocks that it reads, which whole graphs do not", where=node.name,
                         hint="compile without select_blocks() for this form; save() keeps it for PyTorch")
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
