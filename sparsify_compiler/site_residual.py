"""Residual blocks: x + f(x), with at least one product with parameters inside f."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from .normal_form_edit import aten, is_call, only_user, same_shape, shape
from .operands import packed_operator
from .program import Site
from .site_graph import NORMS, View, common_path, path_of
from .site_linear import operator_name

_PRODUCTS = frozenset({"scaled_dot_product_attention", "matmul", "bmm", "baddbmm", "_grouped_mm", "grouped_mm_fallback"})


def find_residuals(view: View) -> Iterator[tuple[fx.Node, Site]]:
    """Roles input, branch, add. Facts: norm ("pre" before f, "post" after the sum, "none")."""
    heavy = {*view.linears, *view.convolutions, *(node for node in view.position if _is_product(node))}
    for add in view.calls(aten.add.Tensor):
        a, b = add.kwargs["self"], add.kwargs["other"]
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or not same_shape(shape(a), shape(b)):
            continue
        skip, branch = (a, b) if view.position[a] < view.position[b] else (b, a)
        between = _between(view, skip, branch)
        inside = [node for node in between if node in heavy]
        if not inside:
            continue
        path = common_path(path_of(node) for node in inside) or path_of(add)
        roles = {"input": skip.name, "branch": branch.name, "add": add.name}
        yield add, Site("residual", path, view.region.path, roles, {"norm": _norm(skip, add, between)})


def _is_product(node: fx.Node) -> bool:
    """Whether a node multiplies matrices otherwise than as a linear: attention, experts, a packed weight."""
    return node.op == "call_function" and (operator_name(node).rpartition(".")[2] in _PRODUCTS or bool(packed_operator(node)))


def _between(view: View, skip: fx.Node, branch: fx.Node) -> list[fx.Node]:
    """Nodes on the ways from skip to branch, in graph order; empty when there is none."""
    ancestors, pending = set(), [branch]
    while pending:
        node = pending.pop()
        if node not in ancestors and view.position[node] > view.position[skip]:
            ancestors.add(node)
            pending += node.all_input_nodes
    reached: dict[fx.Node, None] = {}
    for node in sorted(ancestors, key=view.position.__getitem__):
        if any(source is skip or source in reached for source in node.all_input_nodes):
            reached[node] = None
    return list(reached) if branch in reached else []


def _norm(skip: fx.Node, add: fx.Node, between: list[fx.Node]) -> str:
    first = [node for node in between if skip in node.all_input_nodes]
    if first and all(is_call(node, *NORMS) or is_call(node, aten.sym_size.int) for node in first):
        return "pre"
    after = only_user(add)
    return "post" if after is not None and is_call(after, *NORMS) else "none"
