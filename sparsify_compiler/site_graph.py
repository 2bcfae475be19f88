"""Walks over a captured graph that the finders of sites share."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property

from torch import fx

from .normal_form_edit import aten, from_parameters, is_call, shape
from .program import Region

CONVOLUTIONS = frozenset({aten.conv1d.default, aten.conv2d.default, aten.conv3d.default})
NORMS = frozenset({aten.layer_norm.default, aten.rms_norm.default, aten.batch_norm.default, aten.group_norm.default, aten.instance_norm.default})
ACTIVATIONS = frozenset({
    aten.relu.default, aten.gelu.default, aten.silu.default, aten.hardtanh.default, aten.hardswish.default, aten.hardsigmoid.default,
    aten.leaky_relu.default, aten.elu.default, aten.selu.default, aten.celu.default, aten.mish.default, aten.softplus.default,
    aten.sigmoid.default, aten.tanh.default,
    aten.relu6.default, aten.prelu.default,
})
# Calls that only rearrange, pick or convert elements.
LAYOUT = frozenset({
    aten.reshape.default, aten.transpose.int, aten.permute.default, aten.t.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.squeeze.default, aten.flatten.using_ints, aten.unflatten.int, aten.expand.default, aten.to.dtype, aten.slice.Tensor, aten.select.int,
    aten.repeat_interleave.self_int, aten.repeat.default, aten.clone.default, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default,
    aten.unbind.int, operator.getitem,
})


SAYING = ("scores", "limit")  # what an op of ours is told of what it selects


@dataclass
class View:
    """One region's graph with the order of its nodes."""

    region: Region
    position: dict[fx.Node, int] = field(init=False)

    def __post_init__(self) -> None:
        self.position = {node: i for i, node in enumerate(self.region.graph.nodes)}

    def calls(self, *targets: object) -> list[fx.Node]:
        """Calls of these overloads, in graph order."""
        return [node for node in self.position if is_call(node, *targets)]

    @cached_property
    def linears(self) -> list[fx.Node]:
        """Every linear whose weight comes from parameters alone, but for those that only say what others select: predictors of a pass."""
        return [node for node in self.calls(aten.linear.default) if from_parameters(node.kwargs["weight"]) and node not in self._saying]

    @cached_property
    def _saying(self) -> set[fx.Node]:
        """What is read for nothing but scores and limits of selections."""
        found: set[fx.Node] = set()
        for node in reversed(self.position):
            if node.users and all(user in found or not _is_value(node, user) for user in node.users):
                found.add(node)
        return found

    @cached_property
    def convolutions(self) -> list[fx.Node]:
        """Every convolution whose weight comes from parameters alone."""
        return [node for node in self.calls(*CONVOLUTIONS) if from_parameters(node.kwargs["weight"])]


def _is_value(node: fx.Node, user: fx.Node) -> bool:
    if not str(user.target).startswith("sparsify."):
        return True
    read = [given if isinstance(given, list | tuple) else (given,) for name, given in user.kwargs.items() if name not in SAYING]
    return any(node in several for several in read)


def path_of(node: fx.Node) -> str:
    """Path of the module that a node came from."""
    path: str = node.meta.get("path", "")
    return path


def common_path(paths: Iterable[str]) -> str:
    """The deepest module that all paths lie in."""
    split = [path.split(".") if path else [] for path in paths]
    common = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def weight_of(node: fx.Node) -> str:
    """The name of the parameter that a linear's or convolution's weight is made of: through transposes and masks."""
    pending = [node.kwargs["weight"]]
    while pending:
        current = pending.pop(0)
        if isinstance(current, fx.Node):
            if current.op == "get_attr":
                return str(current.target)
            pending += current.all_input_nodes
    return ""


def features(linear: fx.Node) -> tuple[int, int]:
    """(in_features, out_features) of a linear; 0 where unknown."""
    sizes = shape(linear.kwargs["weight"])
    return (int(sizes[1]), int(sizes[0])) if sizes is not None and len(sizes) == 2 else (0, 0)


def backwards(start: fx.Node, stop: Callable[[fx.Node], bool], through: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """Nodes where `stop` holds, nearest first, on the ways back from `start` through nodes where `through` holds."""
    return _walk([start], stop, through, lambda node: node.all_input_nodes)


def forwards(start: fx.Node, stop: Callable[[fx.Node], bool], through: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """The same, along the users of `start`."""
    return _walk(start.users, stop, through, lambda node: node.users)


def _walk(begin: Iterable[fx.Node], stop: Callable[[fx.Node], bool], through: Callable[[fx.Node], bool],
          following: Callable[[fx.Node], Iterable[fx.Node]]) -> list[fx.Node]:
    """Breadth first from `begin`."""
    found: list[fx.Node] = []
    pending, seen = list(begin), set[fx.Node]()
    while pending:
        node = pending.pop(0)
        if node in seen:
            continue
        seen.add(node)
        if stop(node):
            found.append(node)
        elif through(node):
            pending += following(node)
    return found


def is_layout(node: fx.Node) -> bool:
    """Whether a node only rearranges, picks or converts elements."""
    return node.op == "call_function" and node.target in LAYOUT
