"""Attentions: scaled_dot_product_attention with the projections before and after it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from .normal_form_edit import argument, aten, is_call, shape
from .program import Site
from .site_graph import NORMS, View, backwards, common_path, features, forwards, is_layout, path_of

# What may stand between a projection and the attention: layout, rotary positions, a scale, a norm of q and k.
_BETWEEN = frozenset({aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.neg.default, aten.cat.default, aten.stack.default,
                      aten.view_as_complex.default, aten.view_as_real.default}) | NORMS
_RANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)
_COMPARISONS = (aten.le.Tensor, aten.lt.Tensor, aten.ge.Tensor, aten.gt.Tensor)


def find_attentions(view: View) -> Iterator[tuple[fx.Node, Site]]:
    """Roles q, k, v, out (those that are linears), attention; one linear may be several of q, k and v.

    Facts: heads, kv_heads, head_dim, mask ("none", "causal" or "tensor"), padding (the mask depends on an input), cross, fused.
    """
    linears = set(view.linears)
    for node in view.calls(aten.scaled_dot_product_attention.default):
        projections: dict[str, fx.Node] = {}
        for role, name in (("q", "query"), ("k", "key"), ("v", "value")):
            start = node.kwargs[name]
            assert isinstance(start, fx.Node)
            near = backwards(start, linears.__contains__, lambda n: is_layout(n) or is_call(n, *_BETWEEN))
            if near:
                projections[role] = near[0]
        out = forwards(node, linears.__contains__, is_layout)
        if out:
            projections["out"] = out[0]
        roles = {role: linear.name for role, linear in projections.items()} | {"attention": node.name}
        path = common_path(path_of(linear) for linear in projections.values()) if projections else path_of(node)
        yield node, Site("attention", path or path_of(node), view.region.path, roles, _facts(node, projections))


def _facts(node: fx.Node, projections: dict[str, fx.Node]) -> dict[str, Any]:
    query, key = shape(node.kwargs["query"]) or (), shape(node.kwargs["key"]) or ()
    heads, head_dim = _number(query, -3), _number(query, -1)
    fused = len({projections.get(role) for role in "qkv"}) == 1 and bool(projections)
    q, k = projections.get("q"), projections.get("k")
    cross = q is not None and k is not None and q.kwargs["input"] is not k.kwargs["input"]
    mask, padding = _mask(node)
    return {"heads": heads, "kv_heads": _kv_heads(key, heads, head_dim, k, fused), "head_dim": head_dim, "mask": mask, "padding": padding,
            "cross": cross, "fused": fused}


def _kv_heads(key: tuple[Any, ...], heads: int, head_dim: int, k: fx.Node | None, fused: bool) -> int:
    """Heads of k before they are repeated: from the width of its projection."""
    if k is None or head_dim == 0 or features(k)[1] % head_dim:
        return _number(key, -3)
    width = features(k)[1] // head_dim
    return (width - heads) // 2 if fused else min(width, heads)


def _number(sizes: tuple[Any, ...], axis: int) -> int:
    return sizes[axis] if len(sizes) >= -axis and isinstance(sizes[axis], int) else 0


def _mask(node: fx.Node) -> tuple[str, bool]:
    """The kind of mask, and whether it depends on the values of an input."""
    if argument(node, "is_causal"):
        return "causal", False
    mask = argument(node, "attn_mask")
    if not isinstance(mask, fx.Node):
        return "none", False
    causal = backwards(mask, _compares_positions, lambda n: not is_call(n, aten.sym_size.int))
    # past a comparison of positions nothing more is asked: a position made by counting the mask's ones is still a position
    inputs = backwards(mask, lambda n: n.op == "placeholder", lambda n: not is_call(n, aten.sym_size.int) and n not in causal)
    return "causal" if causal else "tensor", bool(inputs)


def _compares_positions(node: fx.Node) -> bool:
    """Whether a node is a triangle: two ranges compared, or tril / triu."""
    if is_call(node, aten.tril.default, aten.triu.default):
        return True
    if not is_call(node, *_COMPARISONS):
        return False
    return all(backwards(side, lambda n: is_call(n, *_RANGES), lambda n: n.op == "call_function")
               for side in (node.kwargs["self"], node.kwargs["other"]) if isinstance(side, fx.Node))
