"""The vocabulary of codegen/emit.py for GPUs: threads, shared memory, registers, calls of device functions (device.cuh, ptx.cuh).

A kernel is one launch: `with blocks(nx, ny), ...` once, its body what a thread does. Python's own `for` unrolls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir

from sparsify_compiler.codegen import emit as e

Expr = Any
builder: Any = ir
WARP = 32
# TIR's dtypes, as device functions call them.
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


def parameter(name: str, shape: Sequence[Expr], dtype: str) -> Any:
    """The next parameter: a contiguous tensor, aligned as kernels load it, by 16 bytes where its elements are numbers of a matrix."""
    return builder.match_buffer(builder.arg(name, builder.handle()), tuple(shape), dtype, align=16)


def flat(buffer: Any, *sizes: Expr) -> Any:
    """The same memory as one row of as many elements, to be indexed by 64 bits."""
    count = e.cast("int64", sizes[0])
    for size in sizes[1:]:
        count = count * e.cast("int64", size)
    return builder.decl_buffer((count,), str(buffer.dtype), data=buffer.data, align=16)


def number(name: str) -> Expr:
    """The next parameter: an int32."""
    return builder.arg(name, e.int32())


def real(name: str) -> Expr:
    """The next parameter: a float32."""
    return builder.arg(name, builder.float32())


@contextmanager
def launch(blocks: Sequence[Expr], threads: int) -> Iterator[tuple[Expr, ...]]:
    """`with launch((nx, ny), 128) as (x, y, thread):` what a thread of a block does. It is launched while the kernel before it still runs, where
    the GPU can do that, and waits for it here."""
    with ExitStack() as stack:
        axes = [stack.enter_context(builder.launch_thread(f"blockIdx.{axis}", extent)) for axis, extent in zip("xyz", blocks, strict=False)]
        thread = stack.enter_context(builder.launch_thread("threadIdx.x", threads))
        do("let_next_begin")
        do("after_previous")
        yield (*axes, thread)


class Shared:
    """The block's shared memory, cut into parts by hand."""

    def __init__(self, size: int, align: int = 128) -> None:
        self.buffer = builder.alloc_buffer((size,), "uint8", scope="shared.dyn", align=align)
        self.words, self.floats = (builder.decl_buffer((size // 4,), dtype, data=self.buffer.data, scope="shared.dyn")
                                   for dtype in ("int32", "float32"))

    def at(self, offset: Expr) -> Expr:
        """The address of this byte."""
        return address(self.buffer, offset)


def registers(count: int, dtype: str = "float32") -> Any:
    """An array that nvcc keeps in registers, so long as its indices are constants."""
    return builder.alloc_buffer((count,), dtype, scope="local")


def address(buffer: Any, *index: Expr) -> Expr:
    """Of an element."""
    return tirx.address_of(tirx.BufferLoad(buffer, [tirx.const(i, "int32") if isinstance(i, int) else i for i in index]))


def do(name: str, *arguments: Expr) -> None:
    """Call a device function for what it does."""
    builder.evaluate(tirx.call_extern("int32", name, *arguments))


def of(dtype: str, name: str, *arguments: Expr) -> Expr:
    """What a device function gives, computed once."""
    return e.let(tirx.call_extern(dtype, name, *arguments))


def barrier() -> None:
    """All threads of the block have come this far."""
    builder.evaluate(tirx.call_intrin("int32", "tirx.tvm_storage_sync", "shared"))


def read(buffer: Any, *index: Expr) -> Expr:
    """An element as float32."""
    return of("float32", f"read_{SHORT[str(buffer.dtype)]}", address(buffer, *index))


def write(buffer: Any, value: Expr, *index: Expr) -> None:
    """An element, rounded to nearest even."""
    do(f"write_{SHORT[str(buffer.dtype)]}", address(buffer, *index), value)


def ceil(a: Expr, b: Expr) -> Expr:
    """a / b rounded up, of numbers that are not negative."""
    return tirx.truncdiv(a + (b - 1), b)


def const(value: int) -> Expr:
    """An int32."""
    return tirx.const(value, "int32")
