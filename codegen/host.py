"""Kernels emitted into another function: their parameters are buffers that are there already, seen in the shapes that the kernel declares.

So one function of a graph may hold several kernels of a weight, and choose by the number of rows (whole_graph_functions.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as builder

_given: ContextVar[tuple[Iterator[Any], list[Any]] | None] = ContextVar("given", default=None)    # buffers to come, sizes that are defined


def emit_within(schedule: Any, buffers: Sequence[Any]) -> None:
    """Emit the kernel here; its parameters are these buffers, contiguous, in this order."""
    token = _given.set((iter(buffers), []))
    try:
        schedule.compute()
    finally:
        _given.reset(token)


def hosting() -> bool:
    """Is a kernel being emitted into another function?"""
    return _given.get() is not None


def parameter(shape: tuple[Any, ...], dtype: str, align: int, strides: Sequence[Any] = ()) -> Any:
    """The next buffer, seen in this shape, whose free variables are defined here as int32, as are its strides."""
    given = _given.get()
    assert given is not None
    buffers, defined = given
    buffer = next(buffers)
    for size, found in zip(shape, _seen(list(buffer.shape), len(shape)), strict=True):
        if not isinstance(size, int) and not any(size.same_as(one) for one in defined):
            builder.Bind(_int32(found), var=size)
            defined.append(size)
    step = tirx.const(1, "int32")
    for stride, size in reversed(list(zip(strides, shape, strict=True)) if strides else []):
        builder.Bind(step, var=stride)
        step = stride * size
    return builder.decl_buffer(shape, dtype, data=buffer.data, align=align)


def _int32(size: Any) -> Any:
    return tirx.const(int(size), "int32") if isinstance(size, tirx.IntImm) else tirx.Cast("int32", size)


def _seen(shape: list[Any], dimensions: int) -> list[Any]:
    """The sizes of a tensor whose outer dimensions are taken together, so that there are so many."""
    outer = len(shape) - dimensions + 1
    return [math.prod(shape[:outer], start=tirx.const(1, "int64")), *shape[outer:]] if outer != 1 else shape
