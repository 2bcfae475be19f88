"""Where each channel of a value comes from: which channels of which linear, through which elementwise function.

Channels are those of the last dimension. However a model spells "activate some channels, hand on the rest" (split, chunk, slices, narrow and
cat; where with a fixed mask; writing into a slice), this reads the same from it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from sparsify_compiler.fold import evaluate, is_constant
from sparsify_compiler.normal_form_edit import argument, aten, is_call, rank, shape
from sparsify_compiler.program import Region
from sparsify_compiler.site_graph import ACTIVATIONS


class Unreadable(Exception):  # noqa: N818 - a reason, told as a Miss
    """A value whose channels cannot be told apart; the message says why."""


@dataclass(frozen=True)
class Function:
    """An elementwise function of one value: `op(**arguments)`, where an argument may be a function of that value itself."""

    op: OpOverload
    arguments: Mapping[str, Any] = field(hash=False)

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = self.op(**{k: v(x) if isinstance(v, Function | Same) else v for k, v in self.arguments.items()})
        return result


@dataclass(frozen=True)
class Same:
    """The function that hands its value on."""

    def __call__(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class Run:
    """Channels `start` to `stop` of `source`, each through `function`."""

    source: fx.Node
    start: int
    stop: int
    function: Function | Same = Same()

    def __len__(self) -> int:
        return self.stop - self.start

    def cut(self, start: int, stop: int) -> Run:
        return Run(self.source, self.start + start, self.start + stop, self.function)


@dataclass
class Reader:
    """Reads one region. `seen` collects the nodes that a reading went through, sources among them."""

    region: Region
    seen: dict[fx.Node, None] = field(default_factory=dict)

    def read(self, node: fx.Node) -> list[Run]:
        """The runs that the channels of a value are made of, in order. Raises Unreadable."""
        self.seen[node] = None
        if is_call(node, aten.linear.default):
            return [Run(node, 0, _width(node))]
        if is_call(node, aten.cat.default) and _is_last(node, argument(node, "dim")):
            return _joined(run for part in node.kwargs["tensors"] for run in self.read(part))
        if is_call(node, aten.slice_scatter.default) and _is_last(node, argument(node, "dim")):
            start, stop = _bounds(node)
            whole = self.read(node.kwargs["self"])
            return _joined([*_cut(whole, 0, start), *self.read(node.kwargs["src"]), *_cut(whole, stop, _length(whole))])
        if is_call(node, aten.copy.default) and shape(node.kwargs["src"]) == shape(node):
            return self.read(node.kwargs["src"])
        if is_call(node, aten.where.self):
            return self._chosen(node)
        part = self._part(node)
        return self._applied(node) if part is None else part

    def _part(self, node: fx.Node) -> list[Run] | None:
        """A slice of another value; None where the node is none."""
        if is_call(node, aten.slice.Tensor, aten.narrow.default) and _is_last(node, argument(node, "dim")):
            return _cut(self.read(node.kwargs["self"]), *_bounds(node))
        if node.target is not operator.getitem:
            return None
        whole, index = node.args[0], int(node.args[1])  # type: ignore[arg-type]
        pieces = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.tensor_split.indices, aten.tensor_split.sections)
        if not is_call(whole, *pieces) or not _is_last(whole.kwargs["self"], argument(whole, "dim")):
            return None
        self.seen[whole] = None
        widths = [int(piece.shape[-1]) for piece in whole.meta["val"]]
        start = sum(widths[:index])
        return _cut(self.read(whole.kwargs["self"]), start, start + widths[index])

    def _chosen(self, node: Any) -> list[Run]:
        """where(mask, a, b), the mask the same for every row; or else an elementwise function like any other."""
        mask = self._mask(node.kwargs["condition"])
        if mask is None:
            self.read(node.kwargs["self"])  # so that a mask that cannot be read is told as this value's
            return self._applied(node)
        sides = {True: self.read(node.kwargs["self"]), False: self.read(node.kwargs["other"])}
        chosen, start = [], 0
        for stop in range(1, len(mask) + 1):
            if stop == len(mask) or mask[stop] != mask[start]:
                chosen += _cut(sides[mask[start]], start, stop)
                start = stop
        return _joined(chosen)

    def _mask(self, node: Any) -> list[bool] | None:
        """The mask of `where`, one entry a channel; None where it depends on the input, or on more than the channel."""
        value = evaluate(self.region, node) if is_constant(node) else self._filled(node)
        if value is None or value.dtype != torch.bool or value.dim() == 0 or value.numel() != value.shape[-1]:
            return None
        return [bool(v) for v in value.flatten().tolist()]

    def _filled(self, node: Any) -> Tensor | None:
        """A mask made by filling slices of zeros_like(x): of its last dimension, when nothing else is in it."""
        if is_call(node, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.full.default, aten.zeros.default,
                   aten.ones.default):
            number = node.kwargs.get("fill_value", "ones" in str(node.target))
            self.seen[node] = None
            return None if isinstance(number, fx.Node) else torch.full((_width(node),), bool(number))
        if is_call(node, aten.fill.Tensor, aten.fill.Scalar):
            self.seen |= {node: None, node.kwargs["self"]: None}  # of the latter only the shape counts
            number = node.kwargs["value"]
            if isinstance(number, fx.Node):
                number = bool(evaluate(self.region, number)) if is_constant(number) else None
            return None if number is None else torch.full((_width(node),), bool(number))
        if is_call(node, aten.slice_scatter.default) and _is_last(node, argument(node, "dim")):
            value, written = self._filled(node.kwargs["self"]), self._filled(node.kwargs["src"])
            if value is None or written is None:
                return None
            self.seen[node] = None
            start, stop = _bounds(node)
            return torch.cat([value[:start], written, value[stop:]])
        return None

    def _applied(self, node: fx.Node) -> list[Run]:
        """An elementwise function of one value, which it may read more than once (x * sigmoid(x))."""
        if not isinstance(node.target, OpOverload) or not (torch.Tag.pointwise in node.target.tags or node.target in ACTIVATIONS):
            raise Unreadable(f"{node.name} ({node.target}) is no elementwise function")
        own = [source for source in node.all_input_nodes if is_constant(source)]
        read = {source: self.read(source) for source in node.all_input_nodes if source not in own}
        if own or not read:
            raise Unreadable(f"{node.name} ({node.target}) has parameters of its own ({', '.join(one.name for one in own)})")
        first, *others = read.values()
        for other in others:
            if [(r.source, r.start, r.stop) for r in first] != [(r.source, r.start, r.stop) for r in other]:
                raise Unreadable(f"it is gated: {node.name} ({node.target}) combines two projections of each channel")
        return [Run(run.source, run.start, run.stop, Function(node.target, {
            name: read[value][i].function if isinstance(value, fx.Node) else value for name, value in node.kwargs.items()
        })) for i, run in enumerate(first)]


def _width(node: fx.Node) -> int:
    return int((shape(node) or (0,))[-1])


def _is_last(node: Any, dim: Any) -> bool:
    dims = rank(node)
    return dims is not None and dim in (-1, dims - 1)


def _bounds(node: Any) -> tuple[int, int]:
    """First and last + 1 channel of a slice, narrow or slice_scatter. Raises Unreadable for a step."""
    width = _width(node.kwargs["self"])
    if is_call(node, aten.narrow.default):
        start, length = node.kwargs["start"], node.kwargs["length"]
        stop = start + length if isinstance(start, int) and isinstance(length, int) else None
    else:
        start, stop = argument(node, "start") or 0, argument(node, "end")
        stop = width if stop is None else stop
        if argument(node, "step") != 1:
            raise Unreadable(f"{node.name} takes every {argument(node, 'step')}th channel")
    if not isinstance(start, int) or not isinstance(stop, int):
        raise Unreadable(f"{node.name} cuts at a place that depends on the input's size")
    low, high, _ = slice(start, stop).indices(width)
    return low, max(low, high)


def _length(runs: list[Run]) -> int:
    return sum(map(len, runs))


def _cut(runs: list[Run], start: int, stop: int) -> list[Run]:
    """Channels `start` to `stop` of these runs."""
    found, here = [], 0
    for run in runs:
        low, high = max(start - here, 0), min(stop - here, len(run))
        if low < high:
            found.append(run.cut(low, high))
        here += len(run)
    return found


def _joined(runs: Iterable[Run]) -> list[Run]:
    """Neighbours of one linear and one function as one run."""
    found: list[Run] = []
    for run in runs:
        last = found[-1] if found else None
        if last is not None and last.source is run.source and last.stop == run.start and last.function == run.function:
            found[-1] = Run(run.source, last.start, run.stop, run.function)
        else:
            found.append(run)
    return found

