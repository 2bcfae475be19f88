"""A graph of a model as a library that runs beside torch: its weights are those that the model holds already, its code is in the cache."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from .errors import ModelError
from .export_library_products import Products
from .export_library_selections import spell
from .held import OWN, Held
from .program import Program, Region, describe, get_tensor
from .target import Target

if TYPE_CHECKING:
    from .codegen.whole_graph import Function, Product
    from .codegen.whole_graph_here import Here

Placed = tuple[tuple[str, ...], Tensor]
KEPT = 4        # sizes of calls for which the memory of their values is kept


@dataclass
class LibraryHere:
    """A library in this process.

    run         (inputs...) -> a tuple of its outputs
    binary      the library
    parameters  its parameters: where each is held, and the tensor
    """

    run: Here
    binary: bytes
    parameters: tuple[Placed, ...]
    _sizes: set[Hashable] = field(init=False, default_factory=set)

    def make_room(self, sizes: Hashable) -> None:
        """Before a call of such sizes: TVM keeps memory for the next value of as many bytes, and of ever new sizes would keep ever more."""
        if sizes in self._sizes:
            return
        if len(self._sizes) >= KEPT:
            import tvm_ffi

            tvm_ffi.get_global_func("vm.builtin.memory_manager.clear")()     # of what nobody holds
            self._sizes.clear()
        self._sizes.add(sizes)

    @property
    def own(self) -> list[Tensor]:
        """Tensors that are held for the library alone."""
        return list({id(tensor): tensor for place, tensor in self.parameters if place[0] == OWN}.values())

    @property
    def own_bytes(self) -> int:
        return _bytes(self.own)


def build_here(program: Program, region: Region, target: Target, rows: tuple[int, ...],
               function: Callable[[fx.Graph, Mapping[fx.Node, Product], frozenset[fx.Node], Products], Function],
               room: int | None = None) -> tuple[bytes, list[Placed]]:
    """Compile a graph of a program, or take it from the cache: the library and its parameters. The region is changed.

    rows      numbers of rows of x that layers are laid out for, where they vary
    function  of a copy of the region's graph and what its layers are computed with
    room      bytes of weights that may be held for the library alone
    Raises KernelError, and ModelError where there is no room.
    """
    from .codegen.whole_graph_here import library

    held = Held(program)
    with torch.no_grad():
        spell(region)
        products = Products(region, target, rows, held.find)
        copy = region.clone()
        made = function(copy.graph, *products.within(copy), products)
        laid = {f"{one.name}:{part}": held.find(tensor) for one in made.products.values() for part, tensor in _arguments(one).items()}
        _check_room(_bytes(tensor for tensor in laid.values() if held.place(tensor)[0] == OWN), room)
        binary, names = library(made, _told(made), target)
    tensors = [laid[name] if name in laid else held.find(get_tensor(region.module, name).detach().contiguous()) for name in names]
    placed = [(held.place(one), one) for one in tensors]
    _check_room(_bytes(one for place, one in placed if place[0] == OWN), room)
    return binary, placed


def load_here(binary: bytes, name: str, parameters: Sequence[Placed], target: Target) -> LibraryHere:
    """A library with its parameters, ready to run. Raises KernelError."""
    from .codegen.whole_graph_here import Here

    return LibraryHere(Here(binary, name, [tensor for _, tensor in parameters], target), binary, tuple(parameters))


def _check_room(own: int, room: int | None) -> None:
    """Raises ModelError where so many bytes of weights are more than may be held for a library alone; None: as many as it takes."""
    if room is not None and own > room:
        raise ModelError(f"it would hold {own / 2**20:.1f} MB of weights for itself, more than {room / 2**20:.1f} MB")


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(one.numel() * one.element_size() for one in tensors)


def _told(function: Function) -> str:
    """All that decides the code: nodes with their shapes, kernels, shapes of parameters."""
    lines = [repr(one) for one in function.inputs]
    for node in function.graph.nodes:
        lines.append(describe(node))
        product: Any = function.products.get(node)
        if product is not None:
            shapes = [(name, list(one.shape), str(one.dtype)) for name, one in _arguments(product).items()]
            lines.append(f"  {product.name} of {product.x} + {product.other}, {product.given}: {_schedules(product)} {shapes}")
    told = re.sub(r"<function (\w+) at 0x[0-9a-f]+>", r"\1", "\n".join(lines))
    numbers: dict[str, str] = {}    # symbols have other names in every process, as functions have another address
    return re.sub(r"\bs\d+\b", lambda found: numbers.setdefault(found[0], f"size{len(numbers)}"), told)


def _arguments(product: Any) -> Mapping[str, Tensor]:
    """Tensors that a layer's kernels are given, by name: of a linear layer for any rows, of a convolution for its image."""
    laid = product.laid
    return laid.state if hasattr(laid, "state") else laid.prepared.arguments()  # type: ignore[no-any-return]


def _schedules(product: Any) -> list[str]:
    """The kernels, and which of them runs for how many rows."""
    from .codegen.whole_graph_functions import intervals

    laid = product.laid
    if hasattr(laid, "schedule"):
        return [repr(laid.schedule)]
    return [*sorted(f"{name} {one!r}" for name, one in laid.variants.schedules.items()), str(intervals(laid.variants, 1, None))]
