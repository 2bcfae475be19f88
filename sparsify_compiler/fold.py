"""Folding: what depends on parameters alone is computed once and stored as a new parameter. Originals are never touched.

Arithmetic is in float64, and only the result is rounded to the dtype that the graph says: a formula such as w * gamma / sqrt(var + eps) would
otherwise round once an op, which in bfloat16 loses digits that the unfolded model keeps.

Masks are kept: `weight * mask` is a training-time promise, not a constant to be computed away. A value made from it is folded only where one
of its masks still holds for the result; the result is then stored as weight and multiplied by that mask again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from .fakes import fake_like, mode_of
from .passes_api import Miss
from .program import Region, get_tensor, set_tensor

aten = torch.ops.aten


@dataclass(frozen=True)
class Fold:
    """One value to be stored: the node it replaces, the tensor, and the mask (a get_attr) that must stay around it."""

    node: fx.Node
    value: Tensor
    mask: fx.Node | None


def is_constant(node: fx.Node) -> bool:
    """True when the value depends on parameters, buffers and literals alone, and is the same at every run."""
    return all(one.op == "get_attr" or (one.op == "call_function" and not _is_random(one)) for one in _above(node))


def constants(graph: fx.Graph) -> set[fx.Node]:
    """Every constant node of a graph, found in one walk."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        computed = node.op == "call_function" and not _is_random(node) and all(source in found for source in node.all_input_nodes)
        if node.op == "get_attr" or computed:
            found.add(node)
    return found


def evaluate(region: Region, node: fx.Node, memo: dict[fx.Node, Any] | None = None) -> Tensor:
    """The value of a constant node, computed in float64 and rounded once to the node's dtype."""
    with torch.inference_mode(False), torch.no_grad():
        value: Tensor = _compute(region, node, {} if memo is None else memo)
        says = node.meta.get("val")
        dtype = says.dtype if isinstance(says, Tensor) else value.dtype
        if node.op == "get_attr":
            return get_tensor(region.module, str(node.target)).detach()
        return value.to(dtype).contiguous()


def fold_all(region: Region, by: str = "fold") -> int:
    """Fold every parameter-only value of the region, at the user's request; masks stay. Returns how many values were stored."""
    plans = plan(region, [node for node in region.graph.nodes if node.op == "call_function"], None)
    folds = [] if isinstance(plans, Miss) else plans
    for item in folds:
        store(region, item, by)
    return len(folds)


def plan(region: Region, nodes: Sequence[fx.Node], output: fx.Node | None) -> list[Fold] | Miss:
    """What to store so that none of `nodes` is computed from parameters alone at run time; `output` counts as used from outside.

    A Miss, and nothing to do, when a rewrite (output given) would dissolve a mask. Without one, such values are left as they are.
    """
    constant = {node for node in nodes if is_constant(node) and not is_mask_product(region, node)}
    folds: list[Fold] = []
    memo: dict[fx.Node, Any] = {}
    for node in nodes:
        used = node is output or any(user not in constant for user in node.users)
        if node not in constant or not used or not isinstance(node.meta.get("val"), Tensor):
            continue
        value = evaluate(region, node, memo)
        above = [m for m in masks(region, node) if get_tensor(region.module, str(m.target)).dim() <= value.dim()]  # a bias has no mask
        mask = holding(region, above, value)
        if above and mask is None:
            if output is not None:
                return Miss(f"would dissolve the mask {above[0].target}")
            continue
        folds.append(Fold(node, value, mask))
    return folds


def store(region: Region, item: Fold, by: str) -> fx.Node:
    """Put the value into the region under a new name and read it where the node was. Returns the node that now stands for it."""
    node = item.node
    user = next(iter(node.users), node)
    argument = next((k for k, v in user.kwargs.items() if v is node), "value")
    new = put(region, node, item.value, argument, leaves(node), user.meta, by, item.mask)
    node.replace_all_uses_with(new)
    erase_dead([node])
    return new


def put(region: Region, before: fx.Node, value: Tensor, argument: str, made_of: Iterable[fx.Node], place: Mapping[str, Any], by: str,
        mask: fx.Node | None = None) -> fx.Node:
    """Store a new tensor in the region, named `<place's module path>.<argument>_folded`, and read it before a node; times its mask, where given.

    It is a parameter where one of the get_attr nodes that it is made of is one, and trains where one of them does.
    """
    made_of = list(made_of)
    name = _fresh_name(region, place, argument)
    trained = value.is_floating_point() and any(_is_parameter(region, leaf) for leaf in made_of)
    grad = any(get_tensor(region.module, str(leaf.target)).requires_grad for leaf in made_of)
    set_tensor(region.module, name, nn.Parameter(value, requires_grad=grad) if trained else value)
    about: dict[str, Any] = {key: place[key] for key in ("path", "module") if key in place} | {"by": by}
    with region.graph.inserting_before(before):
        new = region.graph.get_attr(name)
        new.meta = about | {"val": fake_like(value, mode_of(region))}
        if mask is not None:
            tensor = get_tensor(region.module, str(mask.target))
            set_tensor(region.module, f"{name}_mask", tensor)
            mask_node = region.graph.get_attr(f"{name}_mask")
            mask_node.meta = about | {"val": fake_like(tensor, mode_of(region))}
            product = region.graph.call_function(aten.mul.Tensor, (), {"self": new, "other": mask_node})
            product.meta = about | {"val": new.meta["val"]}
            new = product
    return new


def is_mask_product(region: Region, node: fx.Node) -> bool:
    """True for weight * mask, the mask being a bool parameter or buffer."""
    return node.target is aten.mul.Tensor and any(_is_mask(region, source) for source in node.all_input_nodes)


def _compute(region: Region, node: fx.Node, memo: dict[fx.Node, Any]) -> Any:
    if node in memo:
        return memo[node]
    if node.op == "get_attr":
        value: Any = get_tensor(region.module, str(node.target)).detach()
    else:
        sources = {source: _compute(region, source, memo) for source in node.all_input_nodes}
        value = node.target(*fx.map_arg(node.args, sources.__getitem__), **fx.map_arg(node.kwargs, sources.__getitem__))  # type: ignore[operator]
    memo[node] = value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
    return memo[node]


def _above(node: fx.Node) -> Iterator[fx.Node]:
    """The node and all that it is computed from, nearest first."""
    seen, waiting = {node}, [node]
    while waiting:
        one = waiting.pop()
        yield one
        waiting += [source for source in one.all_input_nodes if source not in seen]
        seen.update(one.all_input_nodes)


def _is_random(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def leaves(node: fx.Node) -> list[fx.Node]:
    """The parameters and buffers that a constant is made of."""
    return [one for one in _above(node) if one.op == "get_attr"]


def masks(region: Region, node: fx.Node) -> list[fx.Node]:
    """The masks among them."""
    return [leaf for leaf in leaves(node) if _is_mask(region, leaf)]


def _is_mask(region: Region, node: fx.Node) -> bool:
    return node.op == "get_attr" and get_tensor(region.module, str(node.target)).dtype == torch.bool


def holding(region: Region, above: Iterable[fx.Node], value: Tensor) -> fx.Node | None:
    """The first of these masks that is still one of the value: of its shape, and zero where the mask is."""
    tensors = ((node, get_tensor(region.module, str(node.target))) for node in above)
    return next((node for node, mask in tensors if mask.shape == value.shape and not bool((value[~mask] != 0).any())), None)


def _is_parameter(region: Region, leaf: fx.Node) -> bool:
    return isinstance(get_tensor(region.module, str(leaf.target)), nn.Parameter)


def _fresh_name(region: Region, place: Mapping[str, Any], argument: str) -> str:
    """`<module path>.<argument>_folded` after the op that reads the value, with a number where that is taken."""
    whole = str(place.get("path", ""))
    path = whole.removeprefix(region.path).strip(".") if region.path else whole
    tensors = {name for name, _ in [*region.module.named_parameters(remove_duplicate=False), *region.module.named_buffers(remove_duplicate=False)]}
    if any(".".join(path.split(".")[: i + 1]) in tensors for i in range(path.count(".") + 1)):
        path = path.replace(".", "_") + "_at"  # a parameter stands where the module's name would go
    base = f"{path}.{argument}_folded" if path else f"{argument}_folded"
    name, number = base, 1
    while name in tensors or f"{name}_mask" in tensors:
        number += 1
        name = f"{base}_{number}"
    return name


def erase_dead(nodes: Iterable[fx.Node]) -> None:
    """Erase those of the nodes that nothing uses, and then what only they used."""
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if not node.users and node.op in ("call_function", "get_attr") and not node._erased:
            sources = node.all_input_nodes
            node.graph.erase_node(node)
            waiting += sources
