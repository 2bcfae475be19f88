"""One relocatable object in, one shared library out, without a linker.

Kernels are compiled on machines that have no C compiler, and a library loads in well under a millisecond where LLVM's JIT takes
tens. TVM's objects are simple: code, constants, a few pointers for the runtime to fill, and calls of a handful of outside functions. What
this linker does not know it refuses with `UnsupportedError`; the caller then keeps LLVM bitcode and lets the JIT load it.

Layout of the library: headers, dynamic symbols, relocations and constants (read-only); code (executable); pointers, global offset
table and dynamic section (writable). Sources: System V ABI, chapters 4 and 5; its AMD64 supplement, section 4.4.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

PAGE = 0x1000
SHF_WRITE, SHF_ALLOC, SHF_EXEC = 1, 2, 4
SHT_SYMTAB, SHT_RELA, SHT_NOBITS = 2, 4, 8
EM_X86_64 = 62
R_64, R_PC32, R_GLOB_DAT, R_RELATIVE, R_PLT32, R_GOTPCREL, R_PC64 = 1, 2, 6, 8, 4, 9, 24
R_GOTPCRELX, R_REX_GOTPCRELX = 41, 42
SEGMENTS = 5
JUMP = 6  # bytes of `jmp *slot(%rip)`


class UnsupportedError(Exception):
    """This object needs a real linker."""


@dataclass
class Section:
    """A section of the object: its header's fields and its bytes; `address` once it is placed."""

    name: str
    kind: int
    flags: int
    data: bytearray
    align: int
    link: int
    info: int
    address: int = 0


@dataclass
class Symbol:
    """A symbol of the object; `section` is an index, `value` an offset into that section."""

    name: str
    info: int
    section: int
    value: int
    size: int

    @property
    def exported(self) -> bool:
        return self.info >> 4 != 0 and 0 < self.section < 0xFF00 and bool(self.name)


@dataclass
class Image:
    """What is being laid out: the object's sections and symbols, and the tables that make it a library."""

    sections: list[Section]
    symbols: list[Symbol]
    slots: dict[int, int] = field(default_factory=dict)     # symbol -> offset in the global offset table
    jumps: dict[int, int] = field(default_factory=dict)     # undefined function -> offset in the jump table
    dynamic: list[tuple[int, int, int, int]] = field(default_factory=list)  # (place, type, symbol name index, addend)

    def address(self, symbol: Symbol) -> int:
        return self.sections[symbol.section].address + symbol.value


def shared_library(obj: bytes) -> bytes:
    """The bytes of a shared library that holds everything of the ELF object `obj` and exports its global symbols."""
    image = _parse(obj)
    kept = [s for s in image.sections if s.flags & SHF_ALLOC and s.name != ".eh_frame"]
    _reserve(image)
    return _layout(image, kept)


def _parse(obj: bytes) -> Image:
    if obj[:6] != b"\x7fELF\x02\x01" or struct.unpack_from("<HH", obj, 16) != (1, EM_X86_64):
        raise UnsupportedError("not an x86-64 ELF object")
    table, count, names_at = struct.unpack_from("<Q", obj, 40)[0], *struct.unpack_from("<HH", obj, 60)
    raw = [struct.unpack_from("<IIQQQQIIQQ", obj, table + 64 * i) for i in range(count)]
    names = obj[raw[names_at][4]:][: raw[names_at][5]]
    sections = [Section(_text(names, name), kind, flags, bytearray(size if kind == SHT_NOBITS else obj[at : at + size]), max(1, align), link, info)
                for name, kind, flags, _, at, size, link, info, align, _ in raw]
    table_of_symbols = next(s for s in sections if s.kind == SHT_SYMTAB)
    strings = bytes(sections[table_of_symbols.link].data)
    symbols = [Symbol(_text(strings, name), info, section, value, size)
               for name, info, _, section, value, size in struct.iter_unpack("<IBBHQQ", table_of_symbols.data)]
    return Image(sections, symbols)


def _relocations(image: Image) -> list[tuple[Section, int, int, int, int]]:
    """(section, place, type, symbol, addend) of everything that will be in memory."""
    found = []
    for table in (s for s in image.sections if s.kind == SHT_RELA):
        into = image.sections[table.info]
        if into.flags & SHF_ALLOC and into.name != ".eh_frame":
            found += [(into, place, info & 0xFFFFFFFF, info >> 32, addend) for place, info, addend in struct.iter_unpack("<QQq", table.data)]
    return found


def _reserve(image: Image) -> None:
    """A slot for every symbol reached through the global offset table, a jump for every outside function that is called."""
    for _, _, kind, number, _ in _relocations(image):
        outside = image.symbols[number].section == 0
        if kind in (R_GOTPCREL, R_GOTPCRELX, R_REX_GOTPCRELX) or (outside and kind in (R_PLT32, R_PC32)):
            image.slots.setdefault(number, 8 * len(image.slots))
        if outside and kind in (R_PLT32, R_PC32):
            image.jumps.setdefault(number, JUMP * len(image.jumps))


def _layout(image: Image, kept: list[Section]) -> bytes:
    """Give everything its address, then write it there."""
    exported = [s for s in image.symbols if s.exported]
    outside = [image.symbols[n] for n in dict.fromkeys(number for _, _, _, number, _ in _relocations(image)) if image.symbols[n].section == 0]
    symbols = [*outside, *exported]
    strings, offsets = _strings([s.name for s in symbols])
    pointers = sum(kind == R_64 for _, _, kind, _, _ in _relocations(image)) + len(image.slots)
    symtab_at = 64 + 56 * SEGMENTS
    strings_at = symtab_at + 24 * (len(symbols) + 1)
    hash_at = _up(strings_at + len(strings), 8)
    rela_at = _up(hash_at + 4 * (len(symbols) + 4), 8)
    read_end = _place([s for s in kept if not s.flags & (SHF_WRITE | SHF_EXEC)], rela_at + 24 * pointers)
    code_at = _up(read_end, PAGE)
    jumps_at = _up(_place([s for s in kept if s.flags & SHF_EXEC], code_at), 16)
    code_end = jumps_at + JUMP * len(image.jumps)
    data_at = _up(code_end, PAGE)
    slots_at = _up(_place([s for s in kept if s.flags & SHF_WRITE], data_at), 8)
    dynamic_at = slots_at + 8 * len(image.slots)
    end = dynamic_at + 16 * 9
    patches = _relocate(image, slots_at, jumps_at, {id(s): i + 1 for i, s in enumerate(symbols)})
    tags = [(4, hash_at), (5, strings_at), (6, symtab_at), (10, len(strings)), (11, 24), (7, rela_at), (8, 24 * len(patches)), (9, 24), (0, 0)]
    parts = [(0, _headers(read_end, code_at, code_end, data_at, dynamic_at, end)), (symtab_at, _symbol_table(image, symbols, offsets)),
             (strings_at, strings), (hash_at, _hash_table(len(symbols))),
             (rela_at, b"".join(struct.pack("<QQq", place, symbol << 32 | kind, addend) for place, kind, symbol, addend in patches)),
             (jumps_at, _jump_table(image, slots_at, jumps_at)), (dynamic_at, b"".join(struct.pack("<QQ", *tag) for tag in tags)),
             *((s.address, bytes(s.data)) for s in kept)]
    out = bytearray(end)
    for at, data in parts:
        out[at : at + len(data)] = data
    return bytes(out)


def _symbol_table(image: Image, symbols: list[Symbol], names: list[int]) -> bytes:
    return b"\0" * 24 + b"".join(
        struct.pack("<IBBHQQ", name, s.info, 0, int(s.section != 0), image.address(s) if s.section else 0, s.size)
        for s, name in zip(symbols, names, strict=True))


def _hash_table(symbols: int) -> bytes:
    """One bucket that chains all symbols: there are few."""
    chain = [*range(2, symbols + 1), 0] if symbols else []
    return struct.pack(f"<{symbols + 4}I", 1, symbols + 1, min(symbols, 1), 0, *chain)


def _jump_table(image: Image, slots_at: int, jumps_at: int) -> bytes:
    """`jmp *slot(%rip)` for each outside function."""
    return b"".join(b"\xff\x25" + struct.pack("<i", slots_at + image.slots[number] - (jumps_at + offset) - JUMP)
                    for number, offset in image.jumps.items())


def _relocate(image: Image, slots_at: int, jumps_at: int, index: dict[int, int]) -> list[tuple[int, int, int, int]]:
    """Patch the sections' bytes; what only the loader can know comes back as (place, type, symbol, addend)."""
    dynamic = []
    for section, place, kind, number, addend in _relocations(image):
        symbol, here = image.symbols[number], section.address + place
        if kind in (R_GOTPCREL, R_GOTPCRELX, R_REX_GOTPCRELX):
            target = slots_at + image.slots[number]
        elif symbol.section == 0:
            target = jumps_at + image.jumps.get(number, 0)
        else:
            target = image.address(symbol)
        if kind == R_64:
            dynamic.append((here, R_64, index[id(symbol)], addend) if symbol.section == 0 else (here, R_RELATIVE, 0, target + addend))
        elif kind == R_PC64:
            struct.pack_into("<q", section.data, place, target + addend - here)
        elif kind in (R_PC32, R_PLT32, R_GOTPCREL, R_GOTPCRELX, R_REX_GOTPCRELX):
            struct.pack_into("<i", section.data, place, target + addend - here)
        else:
            raise UnsupportedError(f"relocation type {kind}")
    for number, offset in image.slots.items():
        symbol = image.symbols[number]
        dynamic.append((slots_at + offset, R_GLOB_DAT, index[id(symbol)], 0) if symbol.section == 0
                       else (slots_at + offset, R_RELATIVE, 0, image.address(symbol)))
    return dynamic


def _headers(read_end: int, code_at: int, code_end: int, data_at: int, dynamic_at: int, end: int) -> bytes:
    """The file header and the program headers: constants, code, data, the dynamic section, and a plain stack."""
    head = b"\x7fELF\x02\x01\x01" + b"\0" * 9 + struct.pack("<HHIQQQIHHHHHH", 3, EM_X86_64, 1, 0, 64, 0, 0, 64, 56, SEGMENTS, 64, 0, 0)

    def segment(kind: int, flags: int, start: int, stop: int, align: int) -> bytes:
        return struct.pack("<IIQQQQQQ", kind, flags, start, start, start, stop - start, stop - start, align)

    load, dynamic, stack = 1, 2, 0x6474E551  # the last says that the stack need not be executable
    return head + b"".join((segment(load, 4, 0, read_end, PAGE), segment(load, 5, code_at, code_end, PAGE), segment(load, 6, data_at, end, PAGE),
                            segment(dynamic, 6, dynamic_at, end, 8), segment(stack, 6, 0, 0, 16)))


def _place(sections: list[Section], at: int) -> int:
    for section in sections:
        section.address = _up(at, section.align)
        at = section.address + len(section.data)
    return at


def _strings(names: list[str]) -> tuple[bytes, list[int]]:
    table, offsets = b"\0", []
    for name in names:
        offsets.append(len(table))
        table += name.encode() + b"\0"
    return table, offsets


def _text(table: bytes, at: int) -> str:
    return table[at : table.index(b"\0", at)].decode()


def _up(value: int, align: int) -> int:
    return -(-value // align) * align
