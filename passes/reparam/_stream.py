"""A residual stream: the values that additions and views join, what writes to them, and the norms that read them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import fx

from sparsify_compiler.fold import is_constant
from sparsify_compiler.normal_form_edit import argument, aten, is_call, rank
from sparsify_compiler.passes.reparam._features import follow, origin
from sparsify_compiler.passes.reparam._weights import number
from sparsify_compiler.passes_api import Miss
from sparsify_compiler.pattern import op_name

Place = tuple[fx.Node, int]  # a value, and the dimension at which its features lie
_SUMS = (aten.add.Tensor, aten.sub.Tensor)
_FACTORS = (aten.mul.Tensor, aten.div.Tensor)


@dataclass
class Stream:
    """What was found by walking from a norm's input.

    writers  values that enter by an op that is not the stream's own: each is where its last node gives it
    leaves   (node, constant argument, dimension of its features) for parameters that are added or put beside other values
    norms    norms over the features, of the kind that the walk began at
    miss     why the walk stopped: something reads or writes the stream that is not looked through
    """

    writers: dict[fx.Node, int] = field(default_factory=dict)
    leaves: list[tuple[fx.Node, fx.Node, int]] = field(default_factory=list)
    norms: list[fx.Node] = field(default_factory=list)
    miss: Miss | None = None
    seen: set[fx.Node] = field(default_factory=set)


def stream_of(norm: fx.Node) -> Stream:
    """The stream that a layer_norm or rms_norm reads, in all directions."""
    stream = Stream(norms=[norm])
    waiting: list[Place] = [(norm.kwargs["input"], (rank(norm) or 0) - 1)]  # type: ignore[list-item]
    while waiting and stream.miss is None:
        node, dim = waiting.pop()
        if node not in stream.seen:
            stream.seen.add(node)
            if _is_inside(node):
                waiting += _above(stream, node, dim)
            else:
                stream.writers[node] = dim
            if not centred(node):  # what is free of its mean stays as it is, whoever reads it
                waiting += _below(stream, node, dim, norm.target)
    return stream


def centred(node: fx.Node) -> bool:
    """True for the output of a layer_norm without affine: its features have mean 0."""
    return is_call(node, aten.layer_norm.default) and not {"weight", "bias"} & node.kwargs.keys() and len(node.kwargs["normalized_shape"]) == 1


def _is_inside(node: fx.Node) -> bool:
    """Sums, numeric factors, concatenations and views, whose mean over the features is that of what they are made of."""
    if is_call(node, *_SUMS, aten.cat.default):
        return True
    if is_call(node, *_FACTORS):
        return number(node.kwargs["other"])
    source = node.kwargs.get("self")
    return isinstance(source, fx.Node) and any(follow(node, source, d) is not None for d in range(rank(source) or 0))


def _above(stream: Stream, node: fx.Node, dim: int) -> Iterator[Place]:
    """The values that a node of the stream is made of."""
    parts = node.kwargs["tensors"] if is_call(node, aten.cat.default) else [node.kwargs[k] for k in ("self", "other") if k in node.kwargs]
    joined = is_call(node, *_SUMS, *_FACTORS)
    for part in parts:
        if not isinstance(part, fx.Node):
            if is_call(node, *_SUMS):
                stream.miss = Miss(f"{op_name(node)} ({node.name}) adds a number to the residual stream", node.name)
            continue
        own = dim - (rank(node) or 0) + (rank(part) or 0) if joined else origin(node, part, dim)
        if own is None or own < 0:
            stream.miss = Miss(f"{op_name(node)} ({node.name}) does not keep the features of {part.name} together", node.name)
        elif is_constant(part):
            stream.leaves.append((node, part, own))
        else:
            yield part, own


def _below(stream: Stream, node: fx.Node, dim: int, norm: object) -> Iterator[Place]:
    """The values of the stream that a node goes into. Norms are noted; any other reader ends the walk."""
    for user in node.users:
        moved = _moved(user, node, dim)
        if is_call(user, norm) and len(user.kwargs["normalized_shape"]) == 1 and dim == (rank(node) or 0) - 1:
            if user not in stream.norms:
                stream.norms.append(user)
        elif moved is not None:
            yield user, moved
        elif op_name(user) != "sym_size":
            who = f"{op_name(user)} ({user.name})" if user.op == "call_function" else "the output"
            stream.miss = Miss(f"{who} reads the residual stream {node.name} itself, and would see what is changed in it", user.name)


def _moved(user: fx.Node, node: fx.Node, dim: int) -> int | None:
    """Where the features lie in a reader that belongs to the stream."""
    if is_call(user, *_SUMS):
        return dim + (rank(user) or 0) - (rank(node) or 0)
    if is_call(user, *_FACTORS):
        return dim if user.kwargs["self"] is node and number(user.kwargs["other"]) else None
    if is_call(user, aten.cat.default):
        return None if argument(user, "dim") % (rank(node) or 1) == dim else dim
    return follow(user, node, dim)
