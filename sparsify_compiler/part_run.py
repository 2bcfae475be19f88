"""Running a stretch of a graph on some of the texts, or on some tokens of each text, that go through it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .fakes import fake_of, mode_of
from .normal_form_edit import aten, insert, same_size, shape
from .ops import attend, noted, put_part, put_rows, take_part, take_rows, top_tokens
from .program import Region

TEXTS, TOKENS = 0, 1  # dimensions of the stream
SIZED: Mapping[Any, str] = {aten.reshape.default: "shape", aten.expand.default: "size"}  # ops that are told the sizes of their result
PLACED = frozenset({attend.op, noted.op, take_rows.op, put_rows.op, take_part.op, put_part.op, top_tokens.op})  # they ask where a row stands
BROADCAST = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.where.self,
                       aten.scaled_dot_product_attention.default})


@dataclass(frozen=True)
class Outer:
    """A value that a stretch reads beside its stream: along which dimensions there are texts or tokens, once it has so many more in front."""

    node: fx.Node
    more: int
    along: tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """What lies between two values of the residual stream [B, T, width]: `start`, which it reads, and `end`, which it gives.

    dim     TEXTS or TOKENS: of which it is to run on some
    inside  its nodes in order, `end` the last
    outer   what it reads besides and is to be taken from
    sizes   nodes that say how many texts or tokens there are
    """

    region: Region
    start: fx.Node
    end: fx.Node
    dim: int
    inside: tuple[fx.Node, ...]
    outer: tuple[Outer, ...]
    sizes: tuple[fx.Node, ...]

    @staticmethod
    def of(region: Region, start: fx.Node, end: fx.Node, dim: int) -> Part | str:
        """That stretch, or why it cannot run on a part."""
        stream, last = shape(start), shape(end)
        if stream is None or last is None or len(stream) != 3 or len(last) != 3 or not all(map(same_size, stream, last)):
            return "its residual stream is not [texts, tokens, width]"
        if start.target is take_part.op:
            return "it runs on a part already"
        inside, size = between(region, start, end), stream[dim]
        members = set(inside)
        sizes = [node for node in _read(inside) if node not in members and _is_size(node)]
        allowed = members | {node for node in sizes if all(user in members for user in node.users)}
        if any(user not in allowed for node in inside[:-1] for user in node.users):
            return "a value inside of it is read elsewhere"
        if any(node.target in PLACED for node in inside):
            return "a choice of rows or keys was made inside of it before"
        if any(sum(same_size(one, size) for one in shape(node) or ()) != 1 for node in inside if isinstance(node.meta.get("val"), Tensor)):
            return f"a value inside of it does not have its {('texts', 'tokens')[dim]} in one dimension, or another size is {size}, too"
        others = [_outer(node, inside, dim, size) for node in _read(inside) if node not in members and node is not start and node not in sizes]
        why = next((one for one in others if isinstance(one, str)), None)
        if why is None and any(_mixes(node.meta["val"], size) for node in sizes):
            why = "it is told a size that is computed from the number that would change"
        counted = tuple(node for node in sizes if same_size(node.meta["val"], size))
        return why or Part(region, start, end, dim, inside, tuple(one for one in others if isinstance(one, Outer)), counted)

    def run_on(self, index: fx.Node, by: str) -> fx.Node:
        """Let it run on the part that index names (int64, [m] texts or [B, n] tokens; see take_part). Returns the part of the stream that it reads.

        `end` is what it gives of the part, for whoever reads it. Shapes are computed anew.
        """
        whole = self.start.meta["val"].shape[self.dim]
        stream = self._taken(Outer(self.start, 0, (self.dim,)), self.inside[0], index)
        size: Any = stream.meta["val"].shape[self.dim]
        if self.dim == TEXTS or not isinstance(size, int):
            size = insert(self.inside[0], aten.sym_size.int, self=stream, dim=self.dim)
        new: dict[fx.Node, Any] = {self.start: stream, **dict.fromkeys(self.sizes, size)}
        for one in self.outer:
            new[one.node] = self._taken(one, next(node for node in self.inside if one.node in node.all_input_nodes), index)
        for node in self.inside:
            shown: Any = shape(node)
            node.kwargs = fx.map_arg(node.kwargs, lambda one: new.get(one, one))
            if node.target in SIZED:
                told = [self._size(*pair, whole, size) for pair in zip(node.kwargs[SIZED[node.target]], shown, strict=True)]  # type: ignore[arg-type]
                node.kwargs = {**node.kwargs, SIZED[node.target]: told}
        self._infer()
        for node in (stream, *new.values()):
            if isinstance(node, fx.Node):
                node.meta["by"] = by
        return stream

    def _taken(self, one: Outer, before: fx.Node, index: fx.Node) -> fx.Node:
        node = one.node
        for _ in range(one.more):
            node = insert(before, aten.unsqueeze.default, self=node, dim=0)
        for along in one.along:
            node = insert(before, take_part.op, x=node, index=index, dim=along)
        return node

    def _size(self, told: Any, shown: Any, whole: Any, size: Any) -> Any:
        """What a size is told as: the part's own; the others as numbers, since of no text at all a -1 says nothing."""
        if same_size(shown, whole) and (isinstance(told, int)):
            return size
        return shown if told == -1 and isinstance(shown, int) else told

    def _infer(self) -> None:
        mode = mode_of(self.region)
        with torch.no_grad(), mode:
            for node in self.inside:
                given = fx.map_arg((node.args, node.kwargs), lambda one: fake_of(self.region, one, mode))
                node.meta["val"] = node.target(*given[0], **given[1])  # type: ignore[operator]


def between(region: Region, start: fx.Node, end: fx.Node) -> tuple[fx.Node, ...]:
    """What is computed from start and needed for end, without sizes, in order."""
    needed, waiting = {end}, [end]
    while waiting:
        for node in waiting.pop().all_input_nodes:
            if node is not start and node not in needed:
                needed.add(node)
                waiting.append(node)
    reached: dict[fx.Node, None] = {}
    for node in region.graph.nodes:
        if node in needed and not _is_size(node) and any(source is start or source in reached for source in node.all_input_nodes):
            reached[node] = None
    return tuple(reached)


def _read(inside: tuple[fx.Node, ...]) -> list[fx.Node]:
    return list(dict.fromkeys(source for node in inside for source in node.all_input_nodes))


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), int | torch.SymInt)


def _mixes(told: Any, size: Any) -> bool:
    """Whether a size depends on another one and is not that."""
    if isinstance(told, int) or isinstance(size, int) or same_size(told, size):
        return False
    return bool(told.node.expr.free_symbols & size.node.expr.free_symbols)


def _outer(node: fx.Node, inside: tuple[fx.Node, ...], dim: int, size: Any) -> Outer | str | None:
    """What is to be taken from a value that the stretch reads; None for all of it."""
    sizes = shape(node)
    along = [i for i, one in enumerate(sizes or ()) if same_size(one, size)]
    if sizes is None or not along:
        mixed = [one for one in sizes or () if isinstance(one, torch.SymInt) and _mixes(one, size)]
        return "it reads a value whose size is computed from the number that would change" if mixed else None
    users = [user for user in inside if node in user.all_input_nodes]
    more = {len(shape(user) or ()) - len(sizes) for user in users}
    if len(more) > 1 or min(more) < 0 or any(user.target not in BROADCAST for user in users if more != {0}):
        return "it reads a value along whose dimensions texts and tokens cannot be told"
    front = more.pop()
    if dim == TEXTS:
        return Outer(node, 0, (0,)) if front == 0 and along == [0] else "it reads a value whose texts are not in front"
    first = 1 if front else sizes[0]
    whole = [i + front for i in along]
    if 0 in whole or not (same_size(first, 1) or same_size(first, (shape(inside[-1]) or ())[0])):
        return "it reads a value whose texts are not in front"
    return Outer(node, front, tuple(whole))
