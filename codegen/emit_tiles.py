"""AMX tile registers in the vocabulary of emit: eight tiles, each up to 16 rows of 64 bytes, and their product of bfloat16 pairs.

A thread configures its tiles before it uses them and releases them after; between the two nothing else may use them. Tile numbers are fixed
when the kernel is made. (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as builder

from sparsify_compiler.codegen import emit as e

ROW = 64            # bytes of a tile's row
ROWS = 16           # rows of a tile
PALETTE_BYTES = 64


def configure(rows: Sequence[int]) -> None:
    """Give tile i `rows[i]` rows of 64 bytes."""
    words = [0] * (PALETTE_BYTES // 4)
    words[0] = 1  # palette 1, start row 0
    for i, count in enumerate(rows):
        words[4 + i // 2] |= ROW << (16 * (i % 2))     # bytes of a row: uint16 each, from byte 16
        words[12 + i // 4] |= count << (8 * (i % 4))   # rows: uint8 each, from byte 48
    palette = e.stack(len(words), "int32")
    for i, word in enumerate(words):
        e.store(palette, tirx.const(word, "int32"), i)
    _do("ldtilecfg", address(palette, 0))


def release() -> None:
    """Back to the state in which the system has no tiles to save."""
    _do("tilerelease")


def zero(tile: int) -> None:
    """A tile of zeros."""
    _do("tilezero", _number(tile))


def load(tile: int, buffer: Any, *index: Any, stride: Any = ROW) -> None:
    """Rows of 64 bytes from buffer[index] on, `stride` bytes apart."""
    _do("tileloadd64", _number(tile), address(buffer, *index), _stride(stride))


def store(tile: int, buffer: Any, *index: Any, stride: Any = ROW) -> None:
    """The rows of a tile to buffer[index] on, `stride` bytes apart."""
    _do("tilestored64", _number(tile), address(buffer, *index), _stride(stride))


def multiply_add(total: int, a: int, b: int) -> None:
    """total [m, n] float32 += sum over p of a [m, p] . b [p, n], each of a and b a pair of bfloat16."""
    _do("tdpbf16ps", _number(total), _number(a), _number(b))


def bfloat16_pairs(low: Any, high: Any) -> Any:
    """int32 words of two float32 each, rounded to nearest even bfloat16; denormals become 0, any NaN a quiet one."""
    bits = e.let(e.reinterpret("uint16", bfloat16_row(low, high), 32))
    return e.reinterpret("int32", e.shuffle(bits, bits, [half for i in range(16) for half in (i, 16 + i)]), 16)


def bfloat16_row(first: Any, second: Any) -> Any:
    """32 neighbours, rounded likewise, in 16 words of int32."""
    # LLVM gives 32 bfloat16; TVM, which has no such vectors here, may call them anything of 64 bytes as long as they are reinterpreted next.
    return tirx.call_llvm_pure_intrin("int32x16", "llvm.x86.avx512bf16.cvtne2ps2bf16.512", second, first)


def address(buffer: Any, *index: Any) -> Any:
    """&buffer[index]"""
    return tirx.address_of(e.load(buffer, *index))


def prefetch(buffer: Any, *index: Any, near: bool = True) -> None:
    """Ask for the cache line of buffer[index], in L1 or only in L2."""
    numbers = (tirx.const(n, "int32") for n in (0, 3 if near else 2, 1))
    builder.evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", address(buffer, *index), *numbers))


def _do(name: str, *arguments: Any) -> None:
    builder.evaluate(tirx.call_llvm_intrin("int32", f"llvm.x86.{name}", *arguments))


def _number(tile: int) -> Any:
    return tirx.const(tile, "int8")


def _stride(stride: Any) -> Any:
    return tirx.const(stride, "int64") if isinstance(stride, int) else e.cast("int64", stride)
