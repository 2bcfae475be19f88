"""What a model costs on a machine, and what sparsity could give there at best: by formulas, before anything is calibrated, pruned, built or timed.

    print(sc.estimate(model, example_inputs, "cortex-a76"))
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import catalog, machines
from .cost import CONVS, PRODUCTS, Cost, node_cost, node_sizes
from .normal_form_edit import aten
from .operands import input_of
from .pattern import op_name
from .shapes import example_shape
from .storage import write_file
from .work import Work, is_dense, parts_of

if TYPE_CHECKING:
    from torch import fx, nn

    from .cost_models.machine import Machine
    from .program import Program, Region

# What is tried at each density: structures whose kernels are worth having, and for single rows selecting inputs of a dense weight.
TRIED: Mapping[float, tuple[str, ...]] = {0.5: ("2:4", "unstructured", "16x1"), 0.3: ("unstructured", "4x1", "16x1"),
                                          0.1: ("unstructured", "4x1", "16x1", "32x1")}
SELECTED = "selected inputs"
IDEAL = "ideal"                             # where there are no sparse kernels: the time of the dense form, but for calling, times the density
# Operations for each element, about, of ops that do more than one: what their time is predicted by.
OPERATIONS: Mapping[str, int] = {**dict.fromkeys(("layer_norm", "rms_norm", "softmax", "group_norm", "native_layer_norm"), 8),
                                 **dict.fromkeys(("gelu", "silu", "tanh", "sigmoid", "exp", "mish", "softplus"), 20)}
CASTS = frozenset({"to", "_to_copy", "type_as"})
FORMULAS = ("float32", "bfloat16")          # dtypes of x that have formulas of their own


@dataclass(frozen=True)
class Best:
    """The fastest form of a layer at a density: its structure, its kernel, milliseconds. Where nothing beats dense, the dense form.

    structure  as Structure.parse reads it, "selected inputs", "dense", or "ideal" where the machine has no sparse kernels
    """

    density: float
    structure: str
    kernel: str
    ms: float


@dataclass(frozen=True)
class SiteEstimate:
    """One layer: sizes, operations and bytes of a call, milliseconds of its fastest dense form, what bounds it, and the best at each density.

    bound  "compute", "memory" or "overhead": the largest part of the time
    rough  no formula knows this op by name: the time is a roofline's
    """

    site: str
    kind: str
    shape: tuple[int, ...]
    rows: int
    dtype: str
    flops: float
    bytes: float
    kernel: str
    ms: float
    bound: str
    rough: bool = False
    best: tuple[Best, ...] = ()

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.flops / self.bytes if self.bytes else 0.0


@dataclass(frozen=True)
class Estimate:
    """A model on a machine. `others` is all that is not a linear layer or a convolution, each op for itself."""

    machine: str
    title: str
    sites: tuple[SiteEstimate, ...]
    others: SiteEstimate
    assumed: tuple[str, ...] = field(default=())

    @property
    def ms(self) -> float:
        """Milliseconds of a call, dense."""
        return sum(site.ms for site in (*self.sites, self.others))

    def ms_at(self, density: float) -> float:
        """Milliseconds when each layer that gains from this density has it."""
        return self.others.ms + sum(next((best.ms for best in site.best if best.density == density), site.ms) for site in self.sites)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        totals = {"ms": self.ms, "flops": sum(site.flops for site in (*self.sites, self.others)),
                  "ms_at_density": {str(density): self.ms_at(density) for density in TRIED}}
        return {**asdict(self), "total": totals}

    def write(self, path: Path) -> None:
        """As JSON. Raises StorageError where it cannot be written."""
        write_file(path, json.dumps(self.to_json(), indent=1))

    def __rich__(self) -> Any:
        from .report.estimate import table

        return table(self)

    def __str__(self) -> str:
        from .report.estimate import text

        return text(self)


def estimate(model: nn.Module, example_inputs: Any, target: Any = "cpu") -> Estimate:
    """Capture the model and predict every layer on the machine. The model is not changed.

    example_inputs  a tuple of positional or a dict of named arguments, whose sizes count
    target          a name of machines.names(), or a Machine
    Raises TargetError for an unknown machine and CaptureError where nothing of the model can be captured.
    """
    from .capture import capture

    return estimate_program(capture(model, example_inputs), example_inputs, machines.machine(target))


def estimate_program(program: Program, example_inputs: Any, machine: Machine) -> Estimate:
    """The same of a Program as it was captured."""
    paths = _paths(program)
    layers = [(region, node) for region, node in program.nodes() if (region.path, node.name) in paths]
    between = int(sum(_weight_bytes(node) for _, node in layers))
    alike = Counter(_shape(node) for _, node in layers)
    sites = tuple(_site(region, node, paths[region.path, node.name], example_inputs, between, between / alike[_shape(node)], machine)
                  for region, node in layers)
    assumed = tuple(sorted(name for name, number in machine.numbers.items() if number.source.startswith("estimate")))
    return Estimate(machine.name, machine.title, sites, _others(program, paths, machine), assumed)


def _paths(program: Program) -> dict[tuple[str, str], str]:
    from .sites import op_paths

    return op_paths(program, ("linear", "conv"))


def _weight_bytes(node: fx.Node) -> int:
    weight: Any = node.kwargs["weight"]
    value = weight.meta["val"]
    return int(value.numel() * value.element_size())


def _shape(node: fx.Node) -> tuple[int, ...]:
    weight: Any = node.kwargs["weight"]
    return tuple(int(size) for size in weight.meta["val"].shape)


def _site(region: Region, node: fx.Node, path: str, example: Any, between: int, again: float, machine: Machine) -> SiteEstimate:
    """between, again: bytes of weights that are read between two calls of this layer, and of any layer of its shape, which share a kernel."""
    shape = _shape(node)
    dtype, cost = str(node.meta["val"].dtype).removeprefix("torch."), node_cost(node)
    places = example_shape(region, input_of(node), example)
    rows = math.prod(places[:-1]) if node.target is aten.linear.default else math.prod(example_shape(region, node, example)) // max(shape[0], 1)
    is_linear = node.target is aten.linear.default
    if is_linear and dtype in FORMULAS:
        return _layer(path, "linear", shape, Work.of((shape[0], shape[1]), rows, dtype=dtype, between=between), again, machine)
    seconds, rough = _by_node(node, cost, between, machine)
    if not rough:
        return _layer(path, "conv", shape, _work_of(node, dtype, between), again, machine)
    kind = "linear" if is_linear else "conv"
    return SiteEstimate(path, kind, shape, rows, dtype, cost.flops, cost.bytes, "dense eager", seconds.total * 1e3, seconds.bound, rough)


def _layer(path: str, kind: str, shape: tuple[int, ...], work: Work, again: float, machine: Machine) -> SiteEstimate:
    parts = {name: part for name, part in parts_of(work, machine, again).items() if is_dense(name)}
    kernel = min(parts, key=lambda name: parts[name].total)
    dense, cost = parts[kernel], work.cost
    best = []
    for density in TRIED:
        found = min(_choices(work, density, again, machine), default=None, key=lambda one: one.ms)
        ideal = Best(density, IDEAL, "", (dense.overhead + density * (dense.compute + dense.memory)) * 1e3)
        found = ideal if found is None else found
        best.append(found if found.ms < dense.total * 1e3 else Best(density, "dense", kernel, dense.total * 1e3))
    return SiteEstimate(path, kind, shape, int(dict(work.sizes)["M"]), work.dtype, cost.flops, cost.bytes, kernel,
                        dense.total * 1e3, dense.bound, best=tuple(best))


def _choices(work: Work, density: float, again: float, machine: Machine) -> Iterator[Best]:
    """The fastest sparse kernel of every structure that fits the layer."""
    sizes = dict(work.sizes)
    outputs, inputs = int(sizes["N"]), int(sizes["K"] * sizes.get("taps", 1))
    parse = catalog.get("structure", "unstructured").parse
    tried = [(text, Work.stored(work.op, sizes, structure, density, work.dtype, work.between)) for text in TRIED[density]
             if (structure := parse(text)).misfit(outputs, inputs) is None]
    if work.op == "linear":
        tried.append((SELECTED, Work.make("select_linear", work.dtype, work.between, M=sizes["M"], N=outputs, K=inputs, density=density)))
    for text, one in tried:
        sparse = {name: part.total * 1e3 for name, part in parts_of(one, machine, again).items() if not is_dense(name)}
        if sparse:
            kernel = min(sparse, key=lambda name: sparse[name])
            yield Best(density, text, kernel, sparse[kernel])


def _others(program: Program, paths: Mapping[tuple[str, str], str], machine: Machine) -> SiteEstimate:
    """All other ops of the graphs together."""
    total, ms, bounds, count, all_known = Cost(), 0.0, Counter[str](), 0, True
    for region, node in program.nodes():
        cost = node_cost(node)
        if (region.path, node.name) not in paths and cost.bytes:
            seconds, rough = _by_node(node, cost, 0, machine)
            all_known = all_known and not rough
            total, ms, count = total + cost, ms + seconds.total * 1e3, count + 1
            bounds[seconds.bound] += 1
    bound = bounds.most_common(1)[0][0] if bounds else ""
    return SiteEstimate(f"{count} other ops", "others", (), 0, "", total.flops, total.bytes, "dense eager", ms, bound, rough=not all_known)


def _by_node(node: fx.Node, cost: Cost, between: int, machine: Machine) -> tuple[Any, bool]:
    """(seconds in parts, whether they are but a roofline's) of an op of torch's own. What other ops have just written lies near."""
    found, dtype = node_sizes(node), str(node.meta["val"].dtype).removeprefix("torch.")
    name = op_name(node)
    grouped = name in CONVS and (name != "conv2d" or node.kwargs.get("groups", 1) != 1)
    if found is None or dtype not in FORMULAS or name in PRODUCTS or name == "linear" or grouped:
        return catalog.get("cost model", "predict").rough(cost.flops, cost.bytes, machine), True
    return parts_of(_work_of(node, dtype, between), machine)["dense eager"], False


def _work_of(node: fx.Node, dtype: str, between: int) -> Work:
    """Of an op of torch's own that has formulas."""
    op, sizes = node_sizes(node) or ("", {})
    name = op_name(node)
    more = {}
    if op == "elementwise":
        more["taps"] = OPERATIONS.get(name, sizes["taps"])
        if name in CASTS:
            both = [one.meta["val"].element_size() for one in (node.all_input_nodes[0], node)]      # as many elements are read as written
            more["x_bytes"] = sum(both) / 2
    return Work.make(op, dtype, between, **{**{key: value for key, value in sizes.items() if not key.endswith("_bytes")}, **more})
