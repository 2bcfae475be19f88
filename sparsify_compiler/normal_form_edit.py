"""Small tools to edit an fx graph in normal form: arguments by name, making a node in place of another, asking for shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, fx

aten = torch.ops.aten
Overload = torch._ops.OpOverload


if TYPE_CHECKING:

    class Call(fx.Node):
        """A call_function node, whose arguments the checker may take for anything: the schema knows their types."""

        target: Any
        args: Any
        kwargs: Any

else:
    Call = fx.Node


class NotFunctionalError(Exception):
    """A graph writes into a tensor in a way that cannot be undone locally."""


def value(node: Any) -> Tensor | None:
    """The fake tensor that says a node's shape and dtype, if it is known."""
    found = node.meta.get("val") if isinstance(node, fx.Node) else None
    return found if isinstance(found, Tensor) else None


def rank(node: Any) -> int | None:
    """Number of dimensions, if it is known."""
    known = value(node)
    return None if known is None else known.dim()


def shape(node: Any) -> tuple[Any, ...] | None:
    """Sizes (int or SymInt), if they are known."""
    known = value(node)
    return None if known is None else tuple(known.shape)


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal, without adding a guard to the shape environment."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt) and a.node.expr == b.node.expr


def same_shape(a: tuple[Any, ...] | None, b: tuple[Any, ...] | None) -> bool:
    """Whether two shapes are known to be equal."""
    return a is not None and b is not None and len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))


def is_call(node: Any, *targets: Any) -> TypeGuard[Call]:
    """Whether a node calls one of these overloads."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def argument(node: fx.Node, name: str) -> Any:
    """An argument of a node in normal form, by the schema's name; the schema's default when it was dropped."""
    if name in node.kwargs:
        return node.kwargs[name]
    assert isinstance(node.target, Overload)
    for known in node.target._schema.arguments:
        if known.name == name:
            return known.default_value
    raise KeyError(name)


def insert(before: fx.Node, target: Any, fake: Any = None, **kwargs: Any) -> fx.Node:
    """A new call in front of `before`, with its provenance. `fake` says shape and dtype; by default the overload is asked."""
    with before.graph.inserting_before(before):
        node = before.graph.create_node("call_function", target, (), kwargs, name=str(target).split(".")[1])
    node.meta = {key: before.meta[key] for key in ("path", "module") if key in before.meta} | {"by": "normal_form"}
    fake = infer(target, kwargs) if fake is None else fake
    if fake is not None:
        node.meta["val"] = fake
    return node


def infer(target: Any, kwargs: dict[str, Any]) -> Any:
    """What a call would give on fake tensors; None when an argument's shape is unknown."""
    missing = False

    def fake(node: fx.Node) -> Any:
        nonlocal missing
        missing |= "val" not in node.meta
        return node.meta.get("val")

    arguments = fx.node.map_arg(kwargs, fake)
    if missing:
        return None
    with torch.no_grad():
        return target(**arguments)


def replace(node: fx.Node, new: fx.Node) -> None:
    """All users of `node` take `new`; `node` goes."""
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def take_place(node: fx.Node, new: fx.Node, by: str, **meta: Any) -> None:
    """The same for a node of a site, which `new` stands for from now on: with what was known of it, and under its name, as sites know it."""
    new.meta |= {**node.meta, "by": by, **meta}
    replace(node, new)
    new.name = node.name


def only_user(node: fx.Node) -> fx.Node | None:
    """The one user of a node, None when there are more or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def from_parameters(node: Any) -> bool:
    """Whether a node is computed from parameters, buffers and constants alone, so that folding can run it once."""
    pending, seen = [node], set()
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op == "placeholder":
            return False
        if current.op != "get_attr" and not current.all_input_nodes:
            return False
        pending += current.all_input_nodes
    return True
