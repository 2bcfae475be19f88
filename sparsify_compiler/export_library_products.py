"""The layers of a Program, laid out for a target that need not be here: what a whole graph without torch computes them with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from .epilogue import Epilogue, epilogue_of, epilogues
from .errors import KernelError
from .export_library_selections import FORMULAS, as_formula
from .formats.bsr import Bsr
from .normal_form_edit import argument
from .operands import input_of, inputs_of, is_stored, operands, operator_of, packed_operator, packed_weight
from .program import Region
from .target import Target

if TYPE_CHECKING:
    from .codegen.laid import Laid
    from .codegen.whole_graph import Product
    from .codegen.whole_graph_planes import LaidPlanes

aten = torch.ops.aten
ROWS = (1, 128)
DENSE_ROWS = 16     # outputs of a block of a dense weight


@dataclass
class Products:
    """Every layer of a region with its kernels; `computed` are the nodes that these compute on their way.

    rows       numbers of rows of x that a layer is laid out for, where they vary
    held       gives the tensor that is held somewhere already for an equal one that was laid out. None: the library has weights of its own; with it
               dense layers are read where they lie, for few rows
    reference  ops without a kernel, which were written as formulas, by name
    """

    region: Region
    target: Target
    rows: tuple[int, ...] = ROWS
    held: Callable[[Tensor], Tensor] | None = None
    found: dict[fx.Node, Product] = field(default_factory=dict)
    computed: set[fx.Node] = field(default_factory=set)
    reference: list[str] = field(default_factory=list)
    _layouts: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    _names: dict[int, tuple[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from .codegen.laid import elsewhere

        with torch.no_grad(), elsewhere():
            for node in list(self.region.graph.nodes):
                if node.target in FORMULAS:
                    self._add_selecting(node)
            for node in list(self.region.graph.nodes):
                if _is_layer(node, "linear"):
                    self._add(node)
                elif _is_layer(node, "conv2d"):
                    self._add_convolution(node)

    def within(self, region: Region) -> tuple[dict[fx.Node, Product], frozenset[fx.Node]]:
        """The same for a copy of the region: `found` and `computed` of its nodes."""
        nodes = {node.name: node for node in region.graph.nodes}
        moved = {nodes[node.name]: replace(one, x=nodes[one.x.name], other=None if one.other is None else nodes[one.other.name],
                                           given=tuple(nodes[each.name] for each in one.given)) for node, one in self.found.items()}
        return moved, frozenset(nodes[node.name] for node in self.computed)

    def _add(self, node: fx.Node) -> None:
        epilogue, laid = self._in_place(node) or self._laid(node)
        self._keep(node, epilogue, self._name(node, laid), laid, input_of(node))

    def _add_convolution(self, node: fx.Node) -> None:
        from .codegen.whole_graph_planes import lay

        x, pads = _padded(node)
        size = x.meta["val"].shape[1:]
        if not all(isinstance(one, int) for one in size) or node.meta["val"].dtype is not torch.float32:
            return
        tensors, attributes, bias = operands(self.region, node)
        chosen = self._chosen(node)
        for epilogue in reversed(epilogues(node, self.computed)):
            try:
                laid = lay(operator_of(node), tensors, _with(attributes, epilogue), bias, self.target, size, pads, chosen)
                break
            except KernelError:
                continue  # no kernel has this activation
        else:
            return
        self._keep(node, epilogue, f"{self._weight(node)}/{node.name}", laid, x)
        given = input_of(node)
        if given is not x and len(given.users) == 1:
            self.computed.add(given)

    def _chosen(self, node: fx.Node) -> Any:
        """How the kernel over planes that a convolution has for this target is cut; None where it has none."""
        kernel = node.meta.get("kernel")
        options = getattr(kernel, "options", {})
        return options if options.get("layout") == "planes" and getattr(kernel, "target", None) == self.target else None

    def _add_selecting(self, node: fx.Node) -> None:
        """A layer that reads what each row selects; a formula where its sizes or its dtype have no kernel."""
        from .codegen.runtime import candidates

        tensors, attributes, bias = operands(self.region, node)
        dtype = node.meta["val"].dtype
        for candidate in candidates(operator_of(node), tensors, attributes, dtype, _rows(node) or self.rows, self.target):
            try:
                laid = candidate.lay(bias)
            except KernelError:
                continue  # a form of torch
            if {input_of(node), *(node.kwargs[one] for one in laid.given)} != set(inputs_of(node)):
                continue  # the graph computes something that kernels are made with
            self._keep(node, Epilogue(), self._name(node, laid), laid, input_of(node))
            return
        self.reference.append(operator_of(node))
        as_formula(self.region, node, FORMULAS[node.target])

    def _keep(self, node: fx.Node, epilogue: Epilogue, name: str, laid: Laid | LaidPlanes, x: fx.Node) -> None:
        """The layer and what follows it are computed by what was laid out."""
        from .codegen.whole_graph import Product

        if self.held is not None and not hasattr(laid, "schedule"):
            laid = _sharing(laid, self.held)
        *before, last = node, *epilogue.nodes
        given: Any = [node.kwargs[one] for one in getattr(laid, "given", ())]
        self.found[last] = Product(name, laid, x, epilogue.other, tuple(given))
        self.computed.update(before)

    def _in_place(self, node: fx.Node) -> tuple[Epilogue, Laid] | None:
        """A dense weight where it lies, shared with torch, for few rows."""
        from .codegen.kernels.streams import FEW_ROWS, in_place

        if self.held is None or packed_operator(node) or max(_rows(node) or self.rows) > FEW_ROWS:
            return None

        tensors, _, bias = operands(self.region, node)
        laid = in_place(tensors["weight"], bias, self.target) if tensors["weight"].dtype is node.meta["val"].dtype else None
        return None if laid is None else (Epilogue(), laid)

    def _laid(self, node: fx.Node) -> tuple[Epilogue, Laid]:
        kernel = node.meta.get("kernel")
        laid = getattr(kernel, "laid", None)
        if laid is not None and laid.target == self.target and (self.held is not None or laid.target.name != "native"):
            return epilogue_of(node), laid
        for epilogue in reversed(epilogues(node, self.computed)):
            for candidate in self._candidates(node, epilogue):
                try:
                    return epilogue, candidate.lay(operands(self.region, node)[2])
                except KernelError:
                    continue  # its kernels are made where they run
        raise KernelError(f"no kernel for {operator_of(node)} on x of {input_of(node).meta['val'].dtype} for this target",
                          where=f"{node.name} on {self.target.name}", hint="whole graphs compute linear layers in float32 and bfloat16")

    def _candidates(self, node: fx.Node, epilogue: Epilogue) -> Iterator[Any]:
        """Of a packed weight, then of a dense one as it is, then as blocks of which all are kept."""
        from .codegen.runtime import candidates

        tensors, attributes, _ = operands(self.region, node)
        dtype, rows = node.meta["val"].dtype, _rows(node) or self.rows

        def found(how: str, operator: str, stored: Mapping[str, Tensor], facts: Mapping[str, Any]) -> list[Any]:
            layouts = self._layouts.setdefault(f"{self._weight(node)} {how}", {})
            return candidates(operator, stored, _with(facts, epilogue), dtype, rows, self.target, layouts)

        if packed_operator(node):
            yield from found("packed", operator_of(node), tensors, attributes)
        weight = packed_weight(self.region, node) if packed_operator(node) else tensors["weight"]
        yield from found("dense", "linear", {"weight": weight}, {})
        yield from found("blocks", *_dense(weight))

    def _weight(self, node: fx.Node) -> str:
        """The name of the layer's weight in the model."""
        first: Any = next(value for key, value in node.kwargs.items() if is_stored(value) and key not in ("bias", "limit"))
        parts: list[str] = []
        while first.op != "get_attr":   # a view of a stored tensor: half of a gate and up in one
            parts.append(first.name)
            first = first.kwargs["self"]
        return "/".join((str(first.target).partition("_packed.")[0], *parts))

    def _name(self, node: fx.Node, laid: Laid) -> str:
        """A name for the laid out weight, the same wherever that is shared; it is held so that no other takes its place in memory."""
        name, _ = self._names.get(id(laid.prepared), ("", None))
        if not name:
            taken, wanted = {one for one, _ in self._names.values()}, self._weight(node)
            name = next(one for one in (wanted, *(f"{wanted}#{number}" for number in range(2, len(taken) + 2))) if one not in taken)
            self._names[id(laid.prepared)] = name, laid.prepared
        return name


def _sharing(laid: Laid, held: Callable[[Tensor], Tensor]) -> Laid:
    """The same with the tensors that are held already."""
    from .codegen.laid import PreparedTensors

    one = laid.prepared
    tensors = {name: held(tensor) for name, tensor in one.arguments().items()}
    return replace(laid, prepared=PreparedTensors(one.layout, tensors, {}, one.out_features, one.in_features))


def _is_layer(node: fx.Node, kind: str) -> bool:
    """A layer of this kind, "linear" or "conv2d", with a stored weight, dense or packed."""
    if packed_operator(node) == kind:
        return True
    return node.target is getattr(aten, kind).default and is_stored(node.kwargs.get("weight"))


def _with(attributes: Mapping[str, Any], epilogue: Epilogue) -> dict[str, Any]:
    """A layer's attributes with this epilogue in the place of the one that it has."""
    return {name: value for name, value in attributes.items() if name not in ("add", "activation", "arguments")} | epilogue.attributes()


def _padded(node: fx.Node) -> tuple[fx.Node, tuple[int, ...]]:
    """What a convolution reads before it is padded with zeros, and by how much at the left, right, top and bottom."""
    given = input_of(node)
    if given.target is not aten.pad.default or argument(given, "mode") != "constant" or argument(given, "value") not in (None, 0.0):
        return given, (0, 0, 0, 0)
    pads: Any = given.kwargs["pad"]
    if len(pads) != 4 or min(pads) < 0:
        return given, (0, 0, 0, 0)
    return given.kwargs["self"], tuple(pads)  # type: ignore[return-value]


def _rows(node: fx.Node) -> tuple[int, ...]:
    """The number of rows of x, where that is fixed."""
    sizes = input_of(node).meta["val"].shape[:-1]
    if all(isinstance(size, int) for size in sizes):
        return (int(torch.Size(sizes).numel()),)
    return ()


def _dense(weight: Tensor) -> tuple[str, dict[str, Tensor], dict[str, int]]:
    """A dense weight as blocks of which all are kept: our kernels of blocks are those of dense layers too."""
    weight = weight.detach()
    packed = Bsr._encode(weight, torch.ones(weight.shape, dtype=torch.bool), r=DENSE_ROWS, c=1)
    return "linear_bsr", {name: getattr(packed, name) for name in Bsr.TENSORS}, {name: getattr(packed, name) for name in Bsr.ATTRIBUTES}
