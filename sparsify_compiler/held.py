"""Tensors that a model holds already, found by what is in them: a library that runs beside it has no copies of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .program import Program

SAMPLED = 61    # numbers by which tensors are told apart before all of them are compared
KERNEL, TENSOR, OWN, WORDS = "kernel", "tensor", "own", "words"


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
