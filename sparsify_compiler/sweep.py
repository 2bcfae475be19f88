"""A sweep: all calibration batches go through the graph once, stop by stop, and weights are replaced on the way.

What comes behind a stop sees the weights as they are by then. Between two stops one batch at a time runs, and each batch keeps only the values
that are still needed; statistics are gathered at a stop and handed over, so those of one stop are in memory. `dense=True` sends every batch a
second time beside it through the weights as they were: what the model said there, against what it says now.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .call import Flattener, call_arguments
from .errors import CalibrationError, InputError
from .program import Program, Region, get_tensor
from .sweep_gather import Gathering, skip_of

Inputs = tuple[Any, ...] | Mapping[str, Any]


@dataclass
class Stream:
    """One batch on its way: the values of nodes that somebody still reads, and the number of the next node."""

    values: dict[fx.Node, Any]
    place: int = 0

    def copy(self) -> Stream:
        """The same state; going on with one leaves the other where it is. Tensors are shared."""
        return Stream(dict(self.values), self.place)


class Sweep:
    """The batches of a Program that was captured whole, moving through its graph together.

    The Program's graph and tensors are read as they are when the sweep is made; later changes of them are not seen: `replace` tells of new weights.
    Raises CalibrationError for a Program in regions or without a batch, InputError for a batch that is no call of the model.
    """

    def __init__(self, program: Program, batches: Iterable[Inputs], dense: bool = False) -> None:
        self._region = whole(program)
        self._nodes: list[fx.Node] = list(self._region.graph.nodes)
        self._order = {node: i for i, node in enumerate(self._nodes)}
        self._dying = _last_reads(self._nodes)
        self._call = {node: (node.args, dict(node.kwargs)) for node in self._nodes}  # passes edit the graph while it is swept
        self._tensors = {node: get_tensor(self._region.module, str(node.target)) for node in self._nodes if node.op == "get_attr"}
        self._weights = dict(self._tensors)
        self._reads: dict[fx.Node, Callable[[Tensor], Tensor]] = {}
        self._streams = [Stream(values) for values in _begin(self._region, batches)]
        self._twins = [stream.copy() for stream in self._streams] if dense else []

    def order(self, node: fx.Node) -> int:
        """The node's place in the order of execution."""
        return self._order[node]

    def replace(self, weight: fx.Node, tensor: Tensor) -> None:
        """From here on the get_attr node `weight` reads `tensor`; beside it, what was dense stays dense."""
        self._weights[weight] = tensor

    def read(self, op: fx.Node, function: Callable[[Tensor], Tensor]) -> None:
        """From here on the linear `op` reads what the function makes of its input; beside it, what was dense stays dense."""
        self._reads[op] = function

    def gather(self, wanted: Mapping[fx.Node, Collection[str]]) -> dict[fx.Node, dict[str, Tensor]]:
        """Bring all batches to the first of these ops (linears and convolutions), and gather statistics of what each of them reads.

        An op whose input is not there yet is looked at by running ahead with the weights as they are now, and coming back.

        wanted  op -> names: those of statistic.STATISTICS about a site's input, and those of sweep_gather.OWN

        Raises CalibrationError where an activation is not finite.
        """
        sums = Gathering(wanted)
        with torch.no_grad():
            for stream, twin in zip_longest(self._streams, self._twins):
                self._run(stream, min(map(self.order, wanted)), self._weights, self._reads)
                if twin is not None:
                    self._run(twin, stream.place, self._tensors)
                self._visit(stream, twin, sorted(wanted, key=self.order), sums)
        return sums.results()

    def reach(self, node: fx.Node) -> list[Tensor]:
        """Bring all batches behind this node, which somebody reads. Returns its value in each."""
        with torch.no_grad():
            for stream in self._streams:
                self._run(stream, self.order(node) + 1, self._weights, self._reads)
        return [stream.values[node] for stream in self._streams]

    def ahead(self, node: fx.Node, reads: Mapping[fx.Node, Callable[[Tensor], Tensor]]) -> list[Tensor]:
        """What a node would give, in each batch, if these linears read what the functions make of their inputs. The batches stay where they are."""
        found = []
        with torch.no_grad():
            for stream in self._streams:
                going = stream.copy()
                self._run(going, self.order(node) + 1, self._weights, {**self._reads, **reads})
                found.append(going.values[node])
        return found

    def outcome(self, weights: Mapping[fx.Node, Tensor], reads: Mapping[fx.Node, Callable[[Tensor], Tensor]] | None = None) -> list[list[Tensor]]:
        """What the whole model would give in each batch, flat, if these get_attr nodes gave other tensors, and these linears read what the functions
        make of their inputs. The batches stay where they are."""
        (result,) = [node for node in self._nodes if node.op == "output"]
        found = []
        with torch.no_grad():
            for stream in self._streams:
                going = stream.copy()
                self._run(going, self.order(result), {**self._weights, **weights}, {**self._reads, **(reads or {})})
                given = pytree.tree_leaves(fx.node.map_aggregate(result.args, partial(_value, values=going.values, weights=self._weights)))
                found.append([leaf for leaf in given if isinstance(leaf, Tensor)])
        return found

    def advance(self, op: fx.Node) -> None:
        """Bring all batches to just before an op."""
        with torch.no_grad():
            for stream in self._streams:
                self._run(stream, self.order(op), self._weights, self._reads)

    def substitute(self, node: fx.Node, values: Sequence[Tensor]) -> None:
        """From here on the readers of the node that was reached last see these values, one a batch."""
        for stream, value in zip(self._streams, values, strict=True):
            stream.values[node] = value

    def _visit(self, stream: Stream, twin: Stream | None, ops: Sequence[fx.Node], sums: Gathering) -> None:
        """Add what the ops read in one batch."""
        waiting = [op for op in ops if not self._ready(op, stream)]
        sums.begin()
        for op in ops:
            if op not in waiting:
                sums.add(op, stream.values, None if twin is None else twin.values)
        if not waiting:
            return
        ahead, beside = stream.copy(), None if twin is None else twin.copy()
        for op in waiting:
            self._run(ahead, self.order(op), self._weights, self._reads)
            if beside is not None:
                self._run(beside, self.order(op), self._tensors)
            sums.add(op, ahead.values, None if beside is None else beside.values)

    def _ready(self, op: fx.Node, stream: Stream) -> bool:
        """Is everything there that is looked at, so that nobody has to run on to the op itself?"""
        skip = skip_of(op) if self._twins else None
        return op.kwargs["input"] in stream.values and (skip is None or skip in stream.values or self.order(skip) > self.order(op))

    def _run(self, stream: Stream, until: int, weights: Mapping[fx.Node, Tensor],
             reads: Mapping[fx.Node, Callable[[Tensor], Tensor]] | None = None) -> None:
        """Execute the nodes before number `until`; those in `reads` on what its functions make of their inputs."""
        values = stream.values
        while stream.place < until:
            node = self._nodes[stream.place]
            if node.op == "call_function":
                args, kwargs = fx.node.map_aggregate(self._call[node], lambda v: _value(v, values, weights))
                if reads and node in reads:
                    kwargs = {**kwargs, "input": reads[node](kwargs["input"])}  # type: ignore[arg-type]
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            for dead in self._dying.get(node, ()):
                values.pop(dead, None)
            stream.place += 1


def whole(program: Program) -> Region:
    """The one region of a Program that was captured whole. Raises CalibrationError for one in regions."""
    if program.skeleton is None and list(program.regions) == [""]:
        return program.regions[""]
    left = f" ({program.left_out[0].path or 'the whole'}: {program.left_out[0].reason})" if program.left_out else ""
    raise CalibrationError(f"only a model that was captured whole can be pruned layer by layer; parts of this one stayed eager Python{left}"[:400],
                           hint="for a language model add use_cache=False to the example inputs and to the batches; or say inputs='dense'")


@contextmanager
def in_batch(number: int) -> Iterator[None]:
    """Tell the number of the batch with the user's mistake in it."""
    try:
        yield
    except InputError as error:
        where = f"calibration batch {number}" + (f", {error.where}" if error.where else "")
        raise InputError(error.what, where=where, hint=error.hint) from error


def _begin(region: Region, batches: Iterable[Inputs]) -> Iterator[dict[fx.Node, Any]]:
    """The values of the placeholders, a batch at a time."""
    flatten = Flattener(region.spec)
    inputs = [node for node in region.graph.nodes if node.op == "placeholder"]
    number = -1
    for number, batch in enumerate(batches):
        with in_batch(number):
            if not isinstance(batch, tuple | Mapping):
                raise InputError(f"is a {type(batch).__name__}; a batch is a tuple of positional or a dict of named arguments",
                                 hint="put a single tensor into a tuple: (x,)")
            flat = flatten(*call_arguments(batch))
        yield dict(zip(inputs, flat, strict=True))
    if number < 0:
        raise CalibrationError("calibration holds no batch", where="calibration", hint="give at least one, like example_inputs")


def _value(value: Any, values: Mapping[fx.Node, Any], weights: Mapping[fx.Node, Tensor]) -> Any:
    if not isinstance(value, fx.Node):
        return value
    return weights[value] if value.op == "get_attr" else values[value]


def _last_reads(nodes: Sequence[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """Node -> the nodes whose values nobody reads after it."""
    seen: set[fx.Node] = set()
    dying: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(nodes):
        for used in (node, *node.all_input_nodes):
            if used not in seen:
                seen.add(used)
                dying.setdefault(node, []).append(used)
    return dying
