"""What elf.py needs to know of a processor: its relocations, and how code reaches an outside function.

Sources: System V ABI, AMD64 supplement, section 4.4; ELF for the Arm 64-bit Architecture (aaelf64), section 5.7.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass


class UnsupportedError(Exception):
    """This object needs a real linker."""


@dataclass(frozen=True)
class Machine:
    """A processor.

    number    in an ELF header
    page      the largest page of memory that a system for it has: segments with different rights never share one
    packed    segments follow each other in the file, and lie a page apart in memory; else both are rounded up to pages
    absolute, relative, slot   relocations that are left to the loader: an address, one within the library, and one in the global offset table
    slotted   relocations that reach a symbol through the global offset table
    calls     relocations of calls, which an outside function needs a jump for
    jump      bytes of a jump; make_jump(slot, here) -> those
    patch     (code, place, kind, target, here): write `target`, an address, into the bytes at `place`, which come to lie at `here`
    """

    number: int
    page: int
    packed: bool
    absolute: int
    relative: int
    slot: int
    slotted: frozenset[int]
    calls: frozenset[int]
    jump: int
    make_jump: Callable[[int, int], bytes]
    patch: Callable[[bytearray, int, int, int, int], None]


R_PC32, R_PLT32, R_GOTPCREL, R_PC64, R_GOTPCRELX, R_REX_GOTPCRELX = 2, 4, 9, 24, 41, 42


def _patch_x86(code: bytearray, place: int, kind: int, target: int, here: int) -> None:
    if kind == R_PC64:
        struct.pack_into("<q", code, place, target - here)
    elif kind in (R_PC32, R_PLT32, R_GOTPCREL, R_GOTPCRELX, R_REX_GOTPCRELX):
        struct.pack_into("<i", code, place, target - here)
    else:
        raise UnsupportedError(f"relocation type {kind}")


def _jump_x86(slot: int, here: int) -> bytes:
    """jmp *slot(%rip)"""
    return b"\xff\x25" + struct.pack("<i", slot - here - 6)


X86_64 = Machine(62, 0x1000, False, 1, 8, 6, frozenset({R_GOTPCREL, R_GOTPCRELX, R_REX_GOTPCRELX}), frozenset({R_PLT32, R_PC32}), 6,
                 _jump_x86, _patch_x86)

PREL64, PREL32, ADR_PAGE, ADD_LOW, JUMP26, CALL26, GOT_PAGE, GOT_LOW = 260, 261, 275, 277, 282, 283, 311, 312
LOW_SHIFTS = {278: 0, 284: 1, 285: 2, 286: 3, 299: 4, GOT_LOW: 3}   # loads and stores of 1, 2, 4, 8 and 16 bytes count in those


def _patch_aarch64(code: bytearray, place: int, kind: int, target: int, here: int) -> None:
    if kind in (PREL32, PREL64):
        struct.pack_into("<i" if kind == PREL32 else "<q", code, place, target - here)
        return
    word, low = struct.unpack_from("<I", code, place)[0], target & 0xFFF
    if kind in (ADR_PAGE, GOT_PAGE):
        word |= _page_bits(target, here)
    elif kind == ADD_LOW:
        word |= low << 10
    elif kind in LOW_SHIFTS and low % (1 << LOW_SHIFTS[kind]) == 0:
        word |= low >> LOW_SHIFTS[kind] << 10
    elif kind in (CALL26, JUMP26) and abs(target - here) < 1 << 27:
        word |= (target - here) >> 2 & 0x3FFFFFF
    else:
        raise UnsupportedError(f"relocation type {kind}")
    struct.pack_into("<I", code, place, word)


def _page_bits(target: int, here: int) -> int:
    """The immediate of `adrp`: how many pages of 4 KiB the target's is away."""
    pages = (target >> 12) - (here >> 12)
    if abs(pages) >= 1 << 20:
        raise UnsupportedError("more than 4 GiB away")
    return (pages & 3) << 29 | (pages >> 2 & 0x7FFFF) << 5


def _jump_aarch64(slot: int, here: int) -> bytes:
    """adrp x16, slot; ldr x17, [x16, slot's lower bits]; br x17"""
    return struct.pack("<III", 0x90000010 | _page_bits(slot, here), 0xF9400211 | (slot & 0xFFF) >> 3 << 10, 0xD61F0220)


AARCH64 = Machine(183, 0x10000, True, 257, 1027, 1025, frozenset({GOT_PAGE, GOT_LOW}), frozenset({CALL26, JUMP26}), 12, _jump_aarch64, _patch_aarch64)
MACHINES = {machine.number: machine for machine in (X86_64, AARCH64)}
