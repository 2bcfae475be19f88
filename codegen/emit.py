"""A small vocabulary over TVM's IR builder: what kernel files are written in.

Python's own `for` unrolls; `with loop(n) as i` is a loop of the kernel. `let` names a value, `registers` are accumulators that LLVM
keeps in vector registers: separate buffers below TVM's 1024-byte limit for stack arrays, in its default scope ("local" would be heap).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as builder

from sparsify_compiler.codegen import emit_bits as bits
from sparsify_compiler.codegen import host
from sparsify_compiler.codegen.vectors import AVX512, Vectors

Expr = Any
Buffer = Any
cast, minimum, maximum = tirx.Cast, tirx.min, tirx.max
absolute, broadcast, cast_to, constant, halves = bits.absolute, bits.broadcast, bits.cast_to, bits.constant, bits.halves
join, lane, let, pair, part = bits.join, bits.lane, bits.let, bits.pair, bits.part
reinterpret, shuffle, transpose, upcast_high, upcast_low = bits.reinterpret, bits.shuffle, bits.transpose, bits.upcast_high, bits.upcast_low
upcast_pairs, upper_half, vector_type, zero = bits.upcast_pairs, bits.upper_half, bits.vector_type, bits.zero
interleave, pair_upper, rounded, rounded_pairs = bits.interleave, bits.pair_upper, bits.rounded, bits.rounded_pairs
int32 = builder.int32
floordiv, floormod = tirx.floordiv, tirx.floormod


_vectors: ContextVar[Vectors] = ContextVar("vectors", default=AVX512)


def function(name: str, body: Callable[[], None], cut_for: Vectors = AVX512) -> Any:
    """The PrimFunc that `body` emits, its tiles cut for these vectors; nothing where it is emitted into another one (host.py)."""
    before = _vectors.set(cut_for)
    try:
        if host.hosting():
            return body()
        with IRBuilder() as ib, builder.prim_func():
            builder.func_name(name)
            builder.func_attr({"global_symbol": name, "tirx.noalias": True})
            body()
        return ib.get()
    finally:
        _vectors.reset(before)


def vectors() -> Vectors:
    """What the function that is being emitted is cut for."""
    return _vectors.get()


def lanes() -> int:
    """float32 of a vector register."""
    return _vectors.get().lanes


def floats(count: int) -> str:
    """The dtype of so many float32."""
    return vector_type("float32", count)


def argument(shape: Sequence[Expr], dtype: str) -> Buffer:
    """The next parameter: a tensor of this shape, whose free variables it defines, aligned to its elements and no more (it may be a view)."""
    align = 2 if "16" in dtype else 4
    if host.hosting():
        return host.parameter(tuple(shape), dtype, align)
    return builder.match_buffer(builder.arg("", builder.handle()), tuple(shape), dtype, align=align)


def strided(shape: Sequence[Expr], strides: Sequence[Expr]) -> Buffer:
    """The next parameter: a float32 tensor of this shape and these strides, whose free variables it defines."""
    if host.hosting():
        return host.parameter(tuple(shape), "float32", 4, strides)
    return builder.match_buffer(builder.arg("", builder.handle()), tuple(shape), "float32", strides=list(strides), align=4)


def llvm(text: str) -> Any:
    """`with llvm(text):` the functions of this LLVM IR can be called by name, and are inlined where marked so."""
    return builder.attr(tirx.const(0, "int32"), "pragma_import_llvm", text)


def external(dtype: str, name: str, *arguments: Expr) -> Expr:
    """A call of an imported function without side effects on our buffers."""
    return tirx.call_pure_extern(dtype, name, *arguments)


def intrinsic(dtype: str, lanes: int, name: str, *arguments: Expr) -> Expr:
    """An instruction of the machine without side effects, by LLVM's name for it."""
    return tirx.call_llvm_pure_intrin(vector_type(dtype, lanes), name, *arguments)


def scratch(size: Expr, dtype: str) -> Buffer:
    """A flat workspace from TVM's thread-local pool."""
    return builder.alloc_buffer((size,), dtype, align=64)


def matrix(rows: Expr, columns: Expr) -> Buffer:
    """A workspace of float32 [rows, columns]."""
    return builder.decl_buffer((rows, columns), "float32", data=scratch(rows * columns, "float32").data, align=64)


def loop(extent: Expr, start: Expr = 0, parallel: bool = False) -> Any:
    """`with loop(n) as i`: a serial loop, or one that runs on torch's threads."""
    return (builder.parallel if parallel else builder.serial)(start, extent)


@contextmanager
def when(condition: Expr) -> Iterator[None]:
    """`with when(condition):` the block runs only then."""
    with builder.If(condition), builder.Then():
        yield


def choose(condition: Expr, then: Callable[[], None], otherwise: Callable[[], None]) -> None:
    """if condition: then() else: otherwise()"""
    with builder.If(condition):
        with builder.Then():
            then()
        with builder.Else():
            otherwise()


def either(condition: Expr, then: Expr, otherwise: Expr) -> Expr:
    """One of two scalars, or lane by lane of two vectors, both computed."""
    then, otherwise = (tirx.const(v, "int32") if isinstance(v, int) else v for v in (then, otherwise))
    return tirx.Select(condition, then, otherwise)


def load(buffer: Buffer, *index: Expr, lanes: int = 1) -> Expr:
    """buffer[index], or `lanes` neighbours from there as one vector."""
    *outer, last = [tirx.const(i, "int32") if isinstance(i, int) else i for i in index]
    return tirx.BufferLoad(buffer, [*outer, tirx.Ramp(last, tirx.const(1, str(last.ty)), lanes) if lanes > 1 else last])


def wide(index: Expr) -> Expr:
    """An index of 64 bits: of large tensors, and where many addresses are computed in a loop (LLVM packs those of 32 bits into vectors and back)."""
    return let(tirx.Cast("int64", index))


def scalar(index: Expr) -> Expr:
    """An index of 64 bits in a register of its own, inside of `with llvm(vectors().text("scalar"))`: LLVM would compute several in a vector and take
    them out of it again."""
    return let(external("int64", "scalar_index", index))


def store(buffer: Buffer, value: Expr, *index: Expr, lanes: int = 1) -> None:
    """buffer[index] = value, a vector when lanes > 1."""
    *outer, last = [tirx.const(i, "int32") if isinstance(i, int) else i for i in index]
    builder.buffer_store(buffer, value, [*outer, tirx.Ramp(last, tirx.const(1, str(last.ty)), lanes) if lanes > 1 else last])


def both(a: Expr, b: Expr) -> Expr:
    """a and b"""
    return tirx.And(a, b)


def stack(size: int, dtype: str) -> Buffer:
    """A small array on the stack of the running task (at most 1023 bytes: TVM's limit)."""
    return builder.alloc_buffer((size,), dtype, align=64)


def opaque(value: Expr, dtype: str = "int32") -> Expr:
    """A number as a name that TVM does not see through: its simplifier takes seconds for nests of quotients and remainders. LLVM removes the cell."""
    cell = stack(1, dtype)
    store(cell, value, 0)
    return let(load(cell, 0))


class Register:
    """A mutable vector of float32, or of another dtype of 4 bytes, that lives in a register."""

    def __init__(self, lanes: int, start: Expr, dtype: str = "float32") -> None:
        self.lanes, self.buffer = lanes, builder.alloc_buffer((lanes,), dtype, align=4 * lanes)
        self.set(start)

    def get(self) -> Expr:
        return load(self.buffer, 0, lanes=self.lanes)

    def set(self, value: Expr) -> None:
        store(self.buffer, value, 0, lanes=self.lanes)

    def multiply_add(self, a: Expr, b: Expr) -> None:
        """self += a * b, one rounding (LLVM contracts it to the machine's FMA)."""
        self.set(tirx.call_llvm_pure_intrin(self.dtype, "llvm.fma", a, b, self.get()))

    @property
    def dtype(self) -> str:
        return vector_type("float32", self.lanes)


def turn(rows: Sequence[Expr]) -> list[Expr]:
    """Vectors of as many lanes as a register has, a multiple of that in number -> for each lane one vector of all of them."""
    width = lanes()
    blocks = [transpose(rows[i : i + width]) for i in range(0, len(rows), width)]
    return blocks[0] if len(blocks) == 1 else [let(join([block[i] for block in blocks], width)) for i in range(width)]


def read_float(buffer: Buffer, *index: Expr, lanes: int = 1) -> Expr:
    """buffer[index] as float32, from a float32 or bfloat16 buffer (by bits: TVM's own legalisation of bfloat16 casts misses bound names)."""
    value = load(buffer, *index, lanes=lanes)
    if str(buffer.dtype) == "float32":
        return value
    return upcast_low(cast_to("uint32", tirx.reinterpret(vector_type("uint16", lanes), value), lanes), lanes)


def broadcasts(buffer: Buffer, first: Expr, count: int) -> Callable[[int], Expr]:
    """Of `count` neighbours from buffer[first] on the i-th, as float32 in all lanes; where multiply-adds take lanes, those are loaded as vectors."""
    width = lanes()
    if not vectors().by_element:
        return lambda i: let(broadcast(read_float(buffer, first + i), width))
    sizes = [min(width, count - at) for at in range(0, count, width)]
    held = [let(read_float(buffer, first + number * width, lanes=size)) for number, size in enumerate(sizes)]
    return lambda i: let(broadcast(held[i // width] if sizes[i // width] == 1 else lane(held[i // width], i % width), width))


def write_float(buffer: Buffer, value: Expr, *index: Expr, lanes: int = 1) -> None:
    """buffer[index] = float32 value, rounded to nearest even for a bfloat16 buffer; any NaN becomes the quiet NaN."""
    if str(buffer.dtype) == "float32":
        return store(buffer, value, *index, lanes=lanes)
    word = cast_to("uint16", rounded(value, lanes), lanes)
    return store(buffer, tirx.reinterpret(vector_type("bfloat16", lanes), word), *index, lanes=lanes)


def load_tail(buffer: Buffer, lanes: int, row: Expr, column: Expr, columns: Expr) -> Expr:
    """float32 buffer[row, column + i] for those i < lanes that the buffer's `columns` have room for, 0 behind them."""
    spill = stack(lanes, "float32")

    def some() -> None:
        store(spill, broadcast(zero(), lanes), 0, lanes=lanes)
        with loop(columns - column) as i:
            store(spill, read_float(buffer, row, column + i), i)

    choose(column + lanes <= columns, lambda: store(spill, read_float(buffer, row, column, lanes=lanes), 0, lanes=lanes), some)
    return let(load(spill, 0, lanes=lanes))


def store_tail(buffer: Buffer, value: Expr, lanes: int, row: Expr, column: Expr, columns: Expr) -> None:
    """buffer[row, column + i] = value[i] for those i < lanes that the buffer's `columns` have room for."""
    value = let(value)

    def some() -> None:
        spill = stack(lanes, "float32")
        store(spill, value, 0, lanes=lanes)
        with loop(columns - column) as i:
            write_float(buffer, load(spill, i), row, column + i)

    choose(column + lanes <= columns, lambda: write_float(buffer, value, row, column, lanes=lanes), some)
