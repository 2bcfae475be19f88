"""Functions of a graph around our kernels: one function a layer, which chooses the kernel for the number of rows at hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import fx

from sparsify_compiler.codegen.laid import Variants

PROBED = (*range(1, 1025), *(1 << power for power in range(11, 25)))     # numbers of rows at which variants are asked for
Shape = tuple[int | None, ...]      # None where the size is known at run time only


@dataclass(frozen=True)
class Parameter:
    """A tensor that a function is called with."""

    shape: Shape
    dtype: str


def arguments_of(node: fx.Node) -> list[Any]:
    """All arguments of an operator, in the order of its schema, whether they are given by position, by name or not at all."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    return [node.args[i] if i < len(node.args) else node.kwargs.get(one.name, one.default_value) for i, one in enumerate(schema)]


def declared(value: Any) -> Parameter:
    """A Relax value as a parameter of a kernel."""
    from tvm import tirx

    shape = tuple(int(size) if isinstance(size, tirx.IntImm | int) else None for size in value.ty.shape)
    return Parameter(shape, str(value.ty.dtype.dtype if hasattr(value.ty.dtype, "dtype") else value.ty.dtype))


def function(parameters: Sequence[Parameter], body: Callable[[list[Any]], None]) -> Any:
    """The PrimFunc of contiguous tensors whose `body` is emitted on their buffers."""
    from tvm import tirx
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script.builder import ir as builder

    with IRBuilder() as ib, builder.prim_func():
        builder.func_name("main")
        builder.func_attr({"tirx.noalias": True, "op_pattern": 8, "sparsify": True})    # 8: opaque, fused with nothing
        buffers = []
        for one in parameters:
            shape = tuple(tirx.Var("n", "int64") if size is None else tirx.const(size, "int64") for size in one.shape)
            buffers.append(builder.match_buffer(builder.arg("", builder.handle()), shape, one.dtype, align=2 if "16" in one.dtype else 4))
        body(buffers)
    return ib.get().without_attr("global_symbol")


def chosen(variants: Variants, buffers: Sequence[Any], smallest: int = 1, largest: int | None = None) -> None:
    """Emit all variants that some number of rows between two chooses, and the choice among them. The first buffer is x [..., K]."""
    from tvm import tirx

    from sparsify_compiler.codegen import emit as e
    from sparsify_compiler.codegen.host import emit_within

    def run(name: str) -> None:
        emit_within(variants.schedules[name], buffers)

    pieces = intervals(variants, smallest, largest)
    names = list(dict.fromkeys(name for name, _, _ in pieces))
    rows = e.let(e.cast("int32", math.prod(buffers[0].shape[:-1], start=tirx.const(1, "int64"))))

    def condition(name: str) -> Any:
        ranges = [e.both(rows >= first, rows <= last) if last is not None else rows >= first for found, first, last in pieces if found == name]
        whole = ranges[0]
        for one in ranges[1:]:
            whole = tirx.Or(whole, one)
        return whole

    def emit(rest: list[str]) -> None:
        if len(rest) == 1:
            return run(rest[0])
        return e.choose(condition(rest[0]), lambda: run(rest[0]), lambda: emit(rest[1:]))

    emit(names)


def intervals(variants: Variants, smallest: int, largest: int | None) -> list[tuple[str, int, int | None]]:
    """Which variant is chosen from how many rows to how many (None: any number)."""
    wanted = sorted({smallest, *(() if largest is None else (largest,)), *(m for m in PROBED if smallest <= m <= (largest or m))})
    found = [(variants.choose(rows), rows) for rows in wanted]
    runs = [(name, [rows for _, rows in group]) for name, group in groupby(found, key=lambda one: one[0])]
    starts = [rows[0] for _, rows in runs]
    ends = [*(start - 1 for start in starts[1:]), None]
    return [(name, start, end) for (name, _), start, end in zip(runs, starts, ends, strict=True)]
