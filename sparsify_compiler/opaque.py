"""Bound kernels in graphs that torch.compile traces: one registered op that calls the kernel with a number, so the graph does not break there.

A number holds in this process only, and only as long as its kernel lives: what torch.export writes keeps the portable ops instead.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol, runtime_checkable
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


def make_opaque(region: Region) -> None:
    """Every opaque kernel of the region's graph becomes a call of the op; the tensors that only kernels read leave the graph."""
    found, skipped = kernel_calls(region.graph)
    made: dict[fx.Node, fx.Node] = {}
    for node, (kernel, inputs) in found.items():
        if not isinstance(kernel, Opaque):
            continue
        with region.graph.inserting_before(node):
            made[node] = called = region.graph.call_function(op, ([made.get(value, value) for value in inputs], _number(kernel), kernel.signature))
        called.meta = {key: node.meta[key] for key in ("val", "path", "module") if key in node.meta}
        node.replace_all_uses_with(called)
        region.graph.erase_node(node)
    for node in reversed(region.graph.nodes):
        if not node.users and (node in skipped or node.op == "get_attr"):
            region.graph.erase_node(node)


def _number(kernel: Opaque) -> int:
    if kernel not in _numbers:
        _numbers[kernel] = number = next(_next)
        _kernels[number] = ref(kernel, lambda gone: _kernels.pop(number, None))
    return _numbers[kernel]


def _kernel(number: int, signature: str) -> Opaque:
    found = _kernels.get(number)
    kernel = None if found is None else found()
    if kernel is None or kernel.signature != signature:
        raise ModelError("a graph of torch.compile calls a kernel that is gone", where=signature,
                         hint="keep the compiled model for as long as what torch.compile made of it")
    return kernel


def _call(inputs: Sequence[Tensor], number: int, signature: str) -> Tensor:
    return _kernel(number, signature)(*inputs)


def _fake(inputs: Sequence[Tensor], number: int, signature: str) -> Tensor:
    return _kernel(number, signature).empty(*inputs)


LIBRARY.define("kernel(Tensor[] inputs, int number, str signature) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("kernel", _call, "CompositeExplicitAutograd")
torch.library.register_fake("sparsify::kernel", _fake, lib=LIBRARY)
op = torch.ops.sparsify.kernel.default
