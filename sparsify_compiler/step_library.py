"""The graph of one token as a library that runs beside torch: its weights are those that the model holds already, its code is in the cache."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from .export_library_cached import PAST
from .export_library_products import Products
from .export_library_selections import spell
from .program import Program, describe, get_tensor
from .step_graph import IDS, PLACES, STARTS, StepGraph
from .target import Target

if TYPE_CHECKING:
    from .codegen.whole_graph import Function, Product
    from .codegen.whole_graph_here import Here

NAME = "step"
SAMPLED = 61    # numbers by which tensors are told apart before all of them are compared
KERNEL, TENSOR, OWN, WORDS = "kernel", "tensor", "own", "words"


@dataclass
class StepLibrary:
    """What decodes one token.

    run         (input_ids, position_ids, past, starts, caches...) -> logits [B, 1, vocabulary]
    caches      (groups, width) of each cache, keys before values, layer by layer
    dtype       of the caches and the logits
    binary      the library
    parameters  its parameters: where each is held, and the tensor
    """

    run: Here
    caches: tuple[tuple[int, int], ...]
    dtype: torch.dtype
    binary: bytes
    parameters: tuple[tuple[tuple[str, ...], Tensor], ...]

    @property
    def own(self) -> list[Tensor]:
        """Tensors that are held for the library alone."""
        return [tensor for place, tensor in self.parameters if place[0] == OWN]


def build_step(program: Program, step: StepGraph, target: Target) -> StepLibrary:
    """Compile it, or take it from the cache. Raises KernelError."""
    from .codegen.whole_graph_here import library

    held, region = Held(program), step.region
    with torch.no_grad():
        spell(region)
        products = Products(region, target, (1,), held.find)
        copy = region.clone()
        found, computed = products.within(copy)
        function = _function(step, copy.graph, found, computed, products)
        binary, names = library(function, _told(function), target)
    laid = {f"{one.name}:{part}": tensor for one in found.values() for part, tensor in one.laid.prepared.arguments().items()}  # type: ignore[union-attr]
    tensors = [held.find(laid[name] if name in laid else get_tensor(region.module, name).detach().contiguous()) for name in names]
    return bound(binary, [(held.place(one), one) for one in tensors], tuple(step.caches.values()), step.dtype, target)


def bound(binary: bytes, parameters: list[tuple[tuple[str, ...], Tensor]], caches: tuple[tuple[int, int], ...], dtype: torch.dtype,
          target: Target) -> StepLibrary:
    """A library with its parameters. Raises KernelError."""
    from .codegen.whole_graph_here import Here

    return StepLibrary(Here(binary, NAME, [tensor for _, tensor in parameters], target), caches, dtype, binary, tuple(parameters))


def _function(step: StepGraph, graph: fx.Graph, found: Mapping[fx.Node, Product], computed: frozenset[fx.Node], products: Products) -> Function:
    from .codegen.whole_graph import Function, Input

    dtype = str(step.dtype).removeprefix("torch.")
    inputs = [Input(IDS, ("batch", 1), "int64"), Input(PLACES, ("batch", 1), "int64"), Input(PAST, (1,), "int64"), Input(STARTS, ("batch",), "int64"),
              *(Input(name, ("batch", groups, "capacity", width), dtype, updated=True) for name, (groups, width) in step.caches.items())]
    return Function(NAME, graph, lambda name: get_tensor(step.region.module, name), inputs, ["logits"], found, computed, tuple(products.reference),
                    one_token=True)


def _told(function: Function) -> str:
    """All that decides the code: nodes with their shapes, kernels, shapes of parameters."""
    lines = [repr(one) for one in function.inputs]
    for node in function.graph.nodes:
        lines.append(describe(node))
        product: Any = function.products.get(node)
        if product is not None:
            schedules = product.laid.variants.schedules
            shapes = [(name, list(one.shape), str(one.dtype)) for name, one in product.laid.prepared.arguments().items()]
            lines.append(f"  {product.name} of {product.x} + {product.other}, {product.given}: {sorted(map(repr, schedules.values()))} {shapes}")
    told = re.sub(r"<function (\w+) at 0x[0-9a-f]+>", r"\1", "\n".join(lines))
    return re.sub(r"\bs\d+\b", "batch", told)   # the only symbol, which has another name in every process, as functions have another address


class Held:
    """Tensors that a model holds, found by what is in them: what kernels laid out, then what the graphs and the module tree have."""

    def __init__(self, program: Program) -> None:
        self._found: dict[Any, list[Tensor]] = {}
        self._places: dict[tuple[int, torch.Size], tuple[str, ...]] = {}
        for place, tensor in held_tensors(program):
            if tensor.is_contiguous():
                self._places.setdefault((tensor.data_ptr(), tensor.shape), place)
                self._found.setdefault(_sample(tensor), []).append(tensor)

    def find(self, tensor: Tensor) -> Tensor:
        """An equal tensor that is held; the tensor itself where there is none."""
        for one in self._found.get(_sample(tensor), ()):
            if one.data_ptr() == tensor.data_ptr() or torch.equal(_bits(one), _bits(tensor)):
                return one
        return tensor

    def place(self, tensor: Tensor) -> tuple[str, ...]:
        """Where a tensor is held: ("kernel", region, node, name), ("tensor", name), either with "words" behind it, or ("own",)."""
        return self._places.get((tensor.data_ptr(), tensor.shape), (OWN,))


def held_tensors(program: Program) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Every tensor of a program and its kernels with its place, in the same order wherever the program is loaded; those of bfloat16 also in words
    of two, as kernels of libraries read them."""
    for place, tensor in _tensors(program):
        yield place, tensor
        pairs = tensor.is_contiguous() and tensor.dim() > 1 and tensor.shape[-1] % 2 == 0 and tensor.storage_offset() % 2 == 0
        if pairs and tensor.dtype is torch.bfloat16:
            yield (*place, WORDS), tensor.view(torch.int32)


def _tensors(program: Program) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    for region, node in program.nodes():
        kernel = node.meta.get("kernel")
        for name, tensor in ({} if kernel is None else kernel.state()).items():
            yield (KERNEL, region.path, node.name, name), tensor
    for region in program.regions.values():
        for name, tensor in [*region.module.named_parameters(remove_duplicate=False), *region.module.named_buffers(remove_duplicate=False)]:
            yield (TENSOR, region.qualified(name)), tensor.detach()
    if program.skeleton is not None:
        for name, tensor in [*program.skeleton.named_parameters(remove_duplicate=False), *program.skeleton.named_buffers(remove_duplicate=False)]:
            yield (TENSOR, name), tensor.detach()


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32) if tensor.dtype is torch.float32 else tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor


def _sample(tensor: Tensor) -> Any:
    flat = _bits(tensor).reshape(-1)
    return tensor.dtype, tuple(tensor.shape), tuple(flat[:: max(1, flat.numel() // SAMPLED)].tolist())
