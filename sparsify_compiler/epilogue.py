"""What follows a linear or a convolution and can be computed with it: the addition of a residual, then an activation.

A node with a kernel may have node.meta["epilogue"], the names of nodes that its kernel computes too. The graph itself stays as it is, for whoever
traces it; the executor calls the kernel once, where the last of those nodes stands.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from .normal_form_edit import argument, aten, is_call, only_user, same_shape, shape, value

META = "epilogue"
# Activation -> its arguments beside the input, each a number or a word.
ACTIVATIONS: Mapping[Any, tuple[str, ...]] = {
    aten.relu.default: (), aten.relu6.default: (), aten.hardtanh.default: ("min_val", "max_val"), aten.hardswish.default: (),
    aten.silu.default: (), aten.gelu.default: ("approximate",), aten.leaky_relu.default: ("negative_slope",), aten.sigmoid.default: (),
    aten.tanh.default: (), aten.hardsigmoid.default: (),
}  # fmt: skip


@dataclass(frozen=True)
class Epilogue:
    """Nodes in their order, each the only user of the one before; `other` is what an addition among them adds."""

    nodes: tuple[fx.Node, ...] = ()
    other: fx.Node | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the nodes, as node.meta["epilogue"] keeps them, joined by blanks."""
        return tuple(node.name for node in self.nodes)

    @property
    def label(self) -> str:
        """The operators, for names of kernels: " + add + relu"; nothing where there are none."""
        return "".join(f" + {_operator(node)}" for node in self.nodes)

    def attributes(self) -> dict[str, Any]:
        """As data for the kernel room: whether there is an addition, and the activation's name and arguments, where there is one."""
        found: dict[str, Any] = {"add": True} if self.other is not None else {}
        for node in self.nodes:
            if node.target in ACTIVATIONS:
                found["activation"] = _operator(node)
                found["arguments"] = {name: argument(node, name) for name in ACTIVATIONS[node.target]}
        return found

    def __call__(self, y: Tensor, other: Tensor | None = None) -> Tensor:
        """What the nodes compute of y, one operator after the other."""
        for node in self.nodes:
            rest = {name: given for name, given in node.kwargs.items() if not isinstance(given, fx.Node)}
            y = node.target(y, other) if node.target is aten.add.Tensor else node.target(y, **rest)  # type: ignore[operator]
        return y

    def after(self, first: Epilogue) -> Epilogue:
        """What is left of it when `first`, its own beginning, is done."""
        return Epilogue(self.nodes[len(first.nodes):], None if first.other is not None else self.other)


def epilogues(node: fx.Node, taken: Container[fx.Node] = ()) -> list[Epilogue]:
    """Every epilogue of a node, shortest first; the first has no nodes. None goes through a node that is taken."""
    found = [Epilogue()]
    last, after = node, only_user(node)
    if after is not None and after not in taken and (other := _added(after, last)) is not None:
        found.append(Epilogue((after,), other))
        last, after = after, only_user(after)
    if after is not None and after not in taken and _activates(after, last):
        found.append(Epilogue((*found[-1].nodes, after), found[-1].other))
    return found


def epilogue_of(node: fx.Node) -> Epilogue:
    """The epilogue that a node's kernel computes, by its metadata. Raises ValueError where the graph has another one."""
    names = tuple(str(node.meta.get(META, "")).split())
    for found in epilogues(node):
        if found.names == names:
            return found
    raise ValueError(f"{node.name} is not followed by {' and '.join(names)}")


def _added(node: fx.Node, first: fx.Node) -> fx.Node | None:
    """What is added to `first`, a tensor of the same shape and dtype; None when the node is no such addition."""
    if not is_call(node, aten.add.Tensor) or argument(node, "alpha") != 1:
        return None
    operands = [node.kwargs["self"], node.kwargs["other"]]
    other = operands[1] if operands[0] is first else operands[0]
    mine, its = value(first), value(other)
    fits = mine is not None and its is not None and mine.dtype == its.dtype and same_shape(shape(first), shape(other))
    return other if other is not first and isinstance(other, fx.Node) and other.op != "get_attr" and fits else None


def _activates(node: fx.Node, first: fx.Node) -> bool:
    return is_call(node, *ACTIVATIONS) and node.kwargs.get("self") is first and all(
        isinstance(argument(node, name), int | float | str) for name in ACTIVATIONS[node.target])


def _operator(node: fx.Node) -> str:
    return str(node.target).split(".")[1]
