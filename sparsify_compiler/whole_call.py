"""Calls of a model by one library: its graph as one function, which takes those calls that it was found to be faster for, at sizes of the example.

Whatever it does not take goes the usual way, kernel by kernel, in which nothing has changed.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from .errors import ModelError
from .executor import lies_in_model
from .export_library import output_names, whole_region
from .export_library_attentions import plain_attentions
from .export_library_blocks import LONGEST
from .export_library_products import ROWS
from .fold import is_constant
from .library_here import LibraryHere, build_here, load_here
from .normal_form_edit import aten
from .program import InputSpec, Program, Region, TensorSpec, get_tensor
from .target import Target

if TYPE_CHECKING:
    from .codegen.whole_graph import Input

NAME = "call"
PARTS = "kernel by kernel"    # what is said of calls that no library takes
DIVIDING = (aten.div, aten.floor_divide, aten.remainder, aten.fmod, aten.true_divide, operator.floordiv, operator.mod)
INDICES = ("index", "indices")      # arguments of operators that name rows: a library reads the nearest where there is no such row


class WholeCall:
    """The library of a model that was captured whole, and which calls it takes. Results are tensors of their own.

    library  run(tensors of the call) -> the graph's flat outputs
    sizes    dynamic dimension -> (least, most) that it was found to be faster for
    rows     number of an input -> rows of the table that it names rows of
    calls    that the library has taken
    """

    def __init__(self, library: LibraryHere, spec: InputSpec, sizes: Mapping[str, tuple[int, int]], rows: Mapping[int, int]) -> None:
        self.library, self.sizes, self.rows, self.calls = library, dict(sizes), dict(rows), 0
        self._places = tuple((number, axis, *sizes[size]) for number, leaf in enumerate(tensors_of(spec))
                             for axis, size in enumerate(leaf.shape) if isinstance(size, str))
        self._lock = Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> WholeCall:
        return self

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """The flat outputs of a call that fits what was captured; None where the library does not take it."""
        if not self._takes(inputs) or not self._lock.acquire(blocking=False):
            return None
        try:
            self.calls += 1
            self.library.make_room(tuple(inputs[number].shape[axis] for number, axis, _, _ in self._places))
            return self.library.run(*map(_as_read, inputs))
        finally:
            self._lock.release()

    def _takes(self, inputs: Sequence[Tensor]) -> bool:
        for number, axis, least, most in self._places:
            if not least <= inputs[number].shape[axis] <= most:
                return False
        if torch.is_autocast_enabled("cpu") or any(type(one) is not Tensor and type(one) is not nn.Parameter for one in inputs):
            return False
        return all(_within(inputs[number], rows) for number, rows in self.rows.items())


def _as_read(tensor: Tensor) -> Tensor:
    """The tensor where it lies, if a library can read it there; else a copy."""
    return (tensor.detach() if tensor.requires_grad else tensor).contiguous()


def _within(numbers: Tensor, rows: int) -> bool:
    least, most = torch.aminmax(numbers)
    return int(least) >= 0 and int(most) < rows


def tensors_of(spec: InputSpec) -> list[TensorSpec]:
    """What the tensors of a call are: the inputs of the graph's flat function."""
    return [leaf for leaf in spec.leaves if isinstance(leaf, TensorSpec)]


def sizes_of(spec: InputSpec) -> set[str]:
    """Names of dynamic dimensions."""
    return {size for leaf in tensors_of(spec) for size in leaf.shape if isinstance(size, str)}


def build_call(program: Program, target: Target, most: Mapping[str, int], room: int | None = None) -> tuple[LibraryHere, dict[int, int]]:
    """The library of a model that was captured whole, for sizes up to `most`, and the rows of tables that its inputs name (`WholeCall.rows`).

    Raises ModelError where it has no such form, or would hold more than `room` bytes of weights for itself; KernelError.
    """
    from .codegen.whole_graph import Function

    region = whole_region(program).clone()
    _check_outputs(region)
    _check_divisors(region)
    rows, limits = rows_of(region), plain_attentions(region, max([LONGEST, *most.values()]))
    if any(most[name] > limit for name, limit in limits.items() if name in most):
        raise ModelError("its attention reads blocks of shorter texts only")
    names = output_names(region.spec)

    def function(graph: fx.Graph, found: Any, computed: frozenset[fx.Node], products: Any) -> Function:
        return Function(NAME, graph, lambda name: get_tensor(region.module, name), _inputs(region.spec), names, found, computed,
                        tuple(products.reference))

    binary, parameters = build_here(program, region, target, ROWS, function, room)
    return load_here(binary, NAME, parameters, target), rows


def _inputs(spec: InputSpec) -> list[Input]:
    from .codegen.whole_graph import Input

    return [Input(name, leaf.shape, str(leaf.dtype).removeprefix("torch."))
            for name, leaf in zip(spec.names, spec.leaves, strict=True) if isinstance(leaf, TensorSpec)]


def _check_outputs(region: Region) -> None:
    """Raises ModelError where a result is no tensor that the graph computes at each call: callers may write into what they get."""
    output: Any = next(node for node in reversed(region.graph.nodes) if node.op == "output").args[0]
    for one in output:
        if not isinstance(one, fx.Node) or one.op != "call_function" or not isinstance(one.meta.get("val"), Tensor):
            raise ModelError("a result of it is no tensor that it computes")
        if is_constant(one) or lies_in_model(one):
            raise ModelError("a result of it is the same at every call", where=one.name)


def _check_divisors(region: Region) -> None:
    """Raises ModelError where whole numbers are divided by some that a call gives: 0 among them ends the process, where torch raises an error."""
    for node in region.graph.nodes:
        divisor = node.kwargs.get("other", node.args[1] if len(node.args) > 1 else None)
        value = node.meta.get("val")
        whole = isinstance(value, torch.SymInt) or (isinstance(value, Tensor) and not value.is_floating_point())
        if getattr(node.target, "overloadpacket", node.target) in DIVIDING and whole and isinstance(divisor, fx.Node):
            raise ModelError("it divides whole numbers by numbers that are not known before", where=node.name)


def rows_of(region: Region) -> dict[int, int]:
    """Number of an input -> rows that there are of what it names rows of.

    Raises ModelError where rows are computed of numbers of an input: nobody could tell in time that there is no such row.
    """
    inputs = [node for node in region.graph.nodes if node.op == "placeholder"]
    found: dict[int, int] = {}
    for node in region.graph.nodes:
        for table, indices in _lookups(node):
            if indices in inputs:
                number = inputs.index(indices)
                found[number] = min(found.get(number, table), table)
            elif _are_given(indices):
                raise ModelError("it computes which rows of a table it reads of numbers that a call gives it", where=node.name)
    return found


def _lookups(node: fx.Node) -> list[tuple[int, fx.Node]]:
    """(rows of a table, what names some of them) of an operator."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    given = {one.name: value for one, value in zip(node.target._schema.arguments, node.args, strict=False)} | dict(node.kwargs)
    table = next((value for key, value in given.items() if key in ("weight", "self", "input")), None)
    named: Any = next((value for key, value in given.items() if key in INDICES), None)
    if not isinstance(table, fx.Node) or named is None or not isinstance(table.meta.get("val"), Tensor):
        return []
    axes = named if isinstance(named, list | tuple) else [named]
    shape, dim = table.meta["val"].shape, given.get("dim", 0)
    return [(_size(shape, axis if isinstance(named, list | tuple) else dim), one) for axis, one in enumerate(axes) if isinstance(one, fx.Node)]


def _size(shape: Any, dim: Any) -> int:
    size = shape[dim] if isinstance(dim, int) and len(shape) else 1
    return size if isinstance(size, int) else 0     # a size that varies holds no rows that can be counted on


def _are_given(node: fx.Node) -> bool:
    """Are a value's numbers computed of those of an input? What is true or false has none, and how large a tensor is neither."""
    seen: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        one = waiting.pop()
        value = one.meta.get("val")
        if one not in seen and isinstance(value, Tensor) and value.dtype is not torch.bool:
            seen.add(one)
            waiting += one.all_input_nodes
    return any(one.op == "placeholder" for one in seen)
