"""Bound kernels in graphs that torch.compile traces: one registered op that calls the kernel with a number, so the graph does not break there.

A number holds in this process only, and only as long as its kernel lives: what torch.export writes keeps the portable ops instead.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, fx

from .errors import ModelError
from .executor import kernel_calls
from .ops._linear import LIBRARY
from .program import Region


@runtime_checkable
class Opaque(Protocol):
    """A kernel that can say what it returns without running. Other kernels (torch's own, packed) are traced as the plain ops that they compute."""

    @property
    def signature(self) -> str:
        """All that the shape, strides and dtype of the result depend on, beside the inputs: torch caches compiled graphs by it."""

    def empty(self, *inputs: Tensor) -> Tensor:
        """A tensor of the shape, strides and dtype of the result; the inputs may be fake and of symbolic sizes. Raises InputError."""

    def __call__(self, *inputs: Tensor) -> Tensor: ...


_kernels: dict[int, ref[Opaque]] = {}
_numbers: WeakKeyDictionary[Opaque, int] = WeakKeyDictionary()
_next = itertools.count()
COUNT_BITS = 28


def make_opaque(region: Region) -> None:
    """Every opaque kernel of the region's graph becomes a call of the op; the tensors that only kernels read leave the graph."""
    found, skipped = kernel_calls(region.graph)
    made: dict[fx.Node, fx.Node] = {}
    for node, (kernel, inputs) in found.items():
        if not isinstance(kernel, Opaque):
            continue
        given = [made.get(value, value) for value in inputs]
        with region.graph.inserting_before(node):
            call = (op, (given[0], _number(kernel))) if len(given) == 1 else (inputs_op, (given, _number(kernel)))
            made[node] = called = region.graph.call_function(*call)
        called.meta = {key: node.meta[key] for key in ("val", "path", "module") if key in node.meta}
        node.replace_all_uses_with(called)
        region.graph.erase_node(node)
    for node in reversed(region.graph.nodes):
        if not node.users and (node in skipped or node.op == "get_attr"):
            region.graph.erase_node(node)


def _number(kernel: Opaque) -> int:
    """A number for the kernel: the beginning of its signature's digest, so that a graph that torch cached is not taken for another, and a count.

    One number is read a microsecond or two faster than a number and a text.
    """
    if kernel not in _numbers:
        digest = int.from_bytes(hashlib.sha256(kernel.signature.encode()).digest()[:4])
        _numbers[kernel] = number = digest << COUNT_BITS | next(_next)
        _kernels[number] = ref(kernel, lambda gone: _kernels.pop(number, None))
    return _numbers[kernel]


def _kernel(number: int) -> Opaque:
    found = _kernels.get(number)
    kernel = None if found is None else found()
    if kernel is None:
        raise ModelError("a graph of torch.compile calls a kernel that is gone", where=f"kernel {number}",
                         hint="keep the compiled model for as long as what torch.compile made of it")
    return kernel


def _define(name: str, inputs: str, result: str, call: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    LIBRARY.define(f"{name}({inputs}, int number) -> {result}", tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, call, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsify::{name}", fake, lib=LIBRARY)
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.sparsify, packet), overload or "default")


op = _define("kernel", "Tensor x", "Tensor", lambda x, number: _kernel(number)(x.resolve_neg()), lambda x, number: _kernel(number).empty(x))
inputs_op = _define("kernel.inputs", "Tensor[] inputs", "Tensor", lambda inputs, number: _kernel(number)(*[one.resolve_neg() for one in inputs]),
                    lambda inputs, number: _kernel(number).empty(*inputs))
