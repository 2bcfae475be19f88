"""Tiles of 16-bit numbers in shared memory, and the fragments of tensor cores.

A tile is rows of chunks of 16 bytes. The chunks of a row are exchanged by an exclusive or with the row's number, so that the eight rows that a warp
reads at once lie in different banks; a row shorter than 128 bytes shares its line of banks with the next ones.

Fragments (PTX ISA, "Matrix Fragments for mma.m16n8k16"): a product is sums [16, 8] += a [16, 16] b [16, 8]. A lane holds of a four words, of b two
(of both for two neighbouring b), of sums four floats: rows lane / 4 and 8 further, columns 2 (lane % 4) and the next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.cuda import emit as c

CHUNK = 8   # numbers of 16 bits in 16 bytes


@dataclass(frozen=True)
class Tile:
    """rows × columns in shared memory, from byte `offset` on."""

    shared: c.Shared
    offset: Any
    rows: int
    columns: int

    def moved(self, by: Any) -> Tile:
        """The tile as many bytes further."""
        return Tile(self.shared, self.offset + by, self.rows, self.columns)

    def at(self, row: Any, chunk: Any) -> Any:
        """The address of a chunk."""
        chunks = self.columns // CHUNK
        period = min(chunks & -chunks, 8)
        place = chunk ^ (tirx.truncdiv(row, 8 // period) & (period - 1)) if period > 1 else chunk
        return self.shared.at(self.offset + (row * chunks + place) * 16)

    def matrices(self, to: Any, row: Any, chunk: Any, lane: Any, down: bool, turned: bool) -> None:
        """Four 8x8 matrices, two of them side by side from (row, chunk) on and two below: in the order of columns first where `down`."""
        number = tirx.truncdiv(lane, 8)
        low, high = number % 2, tirx.truncdiv(number, 2)
        below, beside = (low, high) if down else (high, low)
        c.do("matrices_turned" if turned else "matrices", to, self.at(row + below * 8 + lane % 8, chunk + beside))


def copy_rows(tile: Tile, thread: Any, threads: int, source: Any) -> None:
    """Begin to copy a tile: source(row, chunk) -> the address of 16 bytes and whether they are there, zeros where they are not."""
    chunks = tile.columns // CHUNK
    whole = threads % chunks == 0      # a thread's chunk is the same in all of its rows
    own_row, own_chunk = e.let(tirx.truncdiv(thread, chunks)), e.let(thread % chunks)
    for first in range(0, tile.rows * chunks, threads):
        number = thread + first
        row = own_row + first // chunks if whole else e.let(tirx.truncdiv(number, chunks))
        chunk = own_chunk if whole else e.let(number % chunks)

        def one(row: Any = row, chunk: Any = chunk) -> None:
            pointer, there = source(row, chunk)
            c.do("copy16", tile.at(row, chunk), pointer, there)

        if first + threads <= tile.rows * chunks:
            one()
        else:
            with e.when(number < tile.rows * chunks):
                one()


def ahead(count: Any, stages: int, size: Any, copy: Callable[[Any, Any], None], work: Callable[[Any], None]) -> None:
    """`count` steps whose copies run stages - 1 ahead: copy(step, offset) begins those of a step, work(offset) is its turn, offsets in bytes."""
    copy_first(count, stages, size, copy)
    with e.loop(count) as step:
        c.do("copies_wait", c.const(stages - 2))
        c.barrier()
        copy_later(step, count, stages, size, copy)
        work(e.let(step % stages * size))


def copy_first(count: Any, stages: int, size: Any, copy: Callable[[Any, Any], None]) -> None:
    """Before the first step: begin those that run ahead of it."""
    for stage in range(stages - 1):
        with e.when(count > stage):
            copy(c.const(stage), stage * size)
        c.do("copies_end_group")


def copy_later(step: Any, count: Any, stages: int, size: Any, copy: Callable[[Any, Any], None]) -> None:
    """In a step: begin those of the one that is as far ahead, if there is one."""
    later = e.let(step + stages - 1)
    with e.when(later < count):
        copy(later, e.let(later % stages * size))
    c.do("copies_end_group")


def zeros(count: int) -> Any:
    """Registers for sums."""
    sums = c.registers(count)
    for i in range(count):
        e.store(sums, e.zero(), i)
    return sums


def part(buffer: Any, first: int) -> Any:
    """The registers from there on, as an argument."""
    return c.address(buffer, first)


def product(dtype: str, sums: Any, a: Any, b: Any) -> None:
    """sums [16, 8] += a b: addresses of registers."""
    c.do(f"multiply_{c.SHORT[dtype]}", sums, a, b)


def true() -> Any:
    """A condition that holds."""
    return tirx.const(True, "bool")
