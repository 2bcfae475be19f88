"""Relocatable objects in, one shared library out, without a linker: for x86-64 and 64-bit Arm (elf_machines.py), on any machine.

Kernels are compiled on machines that have no C compiler, and a library loads in well under a millisecond where LLVM's JIT takes
tens. TVM's objects are simple: code, constants, a few pointers for the runtime to fill, and calls of a handful of outside functions. What
this linker does not know it refuses with `UnsupportedError`; the caller then keeps LLVM bitcode and lets the JIT load it.

Layout of the library: headers, dynamic symbols, relocations and constants (read-only); code (executable); pointers, global offset
table and dynamic section (writable). Source: System V ABI, chapters 4 and 5.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from sparsify_compiler.codegen.elf_machines import MACHINES, Machine, UnsupportedError

__all__ = ["UnsupportedError", "shared_library"]

SHF_WRITE, SHF_ALLOC, SHF_EXEC = 1, 2, 4
SHT_SYMTAB, SHT_RELA, SHT_NOBITS = 2, 4, 8
SEGMENTS = 5
ALIGN = 16      # of segments in a file whose segments follow each other


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
    first: int = 0      # of its object's symbols in the image's


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
    """What is being laid out: the objects' sections and symbols, and the tables that make it a library."""

    machine: Machine
    sections: list[Section]
    symbols: list[Symbol]
    slots: dict[int, int] = field(default_factory=dict)     # symbol -> offset in the global offset table
    jumps: dict[int, int] = field(default_factory=dict)     # undefined function -> offset in the jump table
    dynamic: list[tuple[int, int, int, int]] = field(default_factory=list)  # (place, type, symbol name index, addend)

    def address(self, symbol: Symbol) -> int:
        return self.sections[symbol.section].address + symbol.value


def shared_library(*objects: bytes) -> bytes:
    """The bytes of a shared library that holds everything of these ELF objects and exports their global symbols. Raises UnsupportedError."""
    images = [_parse(obj) for obj in objects]
    if len({image.machine.number for image in images}) != 1:
        raise UnsupportedError(f"{len(images)} objects of several machines")
    image = _joined(images)
    kept = [s for s in image.sections if s.flags & SHF_ALLOC and s.name != ".eh_frame"]
    _reserve(image)
    return _layout(image, kept)


def _parse(obj: bytes) -> Image:
    machine = MACHINES.get(struct.unpack_from("<H", obj, 18)[0]) if len(obj) >= 64 else None
    if obj[:6] != b"\x7fELF\x02\x01" or struct.unpack_from("<H", obj, 16)[0] != 1 or machine is None:
        raise UnsupportedError("not an ELF object of x86-64 or aarch64")
    table, count, names_at = struct.unpack_from("<Q", obj, 40)[0], *struct.unpack_from("<HH", obj, 60)
    raw = [struct.unpack_from("<IIQQQQIIQQ", obj, table + 64 * i) for i in range(count)]
    names = obj[raw[names_at][4]:][: raw[names_at][5]]
    sections = [Section(_text(names, name), kind, flags, bytearray(size if kind == SHT_NOBITS else obj[at : at + size]), max(1, align), link, info)
                for name, kind, flags, _, at, size, link, info, align, _ in raw]
    table_of_symbols = next(s for s in sections if s.kind == SHT_SYMTAB)
    strings = bytes(sections[table_of_symbols.link].data)
    symbols = [Symbol(_text(strings, name), info, section, value, size)
               for name, info, _, section, value, size in struct.iter_unpack("<IBBHQQ", table_of_symbols.data)]
    return Image(machine, sections, symbols)


def _joined(images: list[Image]) -> Image:
    """Several objects as one: sections and symbols of one behind those of the other, and what one lacks found in another."""
    whole = images[0]
    for image in images[1:]:
        sections, symbols = len(whole.sections), len(whole.symbols)
        for section in image.sections:
            section.info += sections if section.kind == SHT_RELA else 0
            section.first += symbols
        for symbol in image.symbols:
            symbol.section += sections if 0 < symbol.section < 0xFF00 else 0
        whole.sections += image.sections
        whole.symbols += image.symbols
    defined = {symbol.name: symbol for symbol in whole.symbols if symbol.exported}
    if len(defined) != sum(symbol.exported for symbol in whole.symbols):
        raise UnsupportedError("a symbol is defined by two objects")
    for number, symbol in enumerate(whole.symbols):
        if symbol.section == 0 and symbol.name in defined:
            whole.symbols[number] = defined[symbol.name]
    return whole


def _relocations(image: Image) -> list[tuple[Section, int, int, int, int]]:
    """(section, place, type, symbol, addend) of everything that will be in memory."""
    found = []
    for table in (s for s in image.sections if s.kind == SHT_RELA):
        into = image.sections[table.info]
        if into.flags & SHF_ALLOC and into.name != ".eh_frame":
            found += [(into, place, info & 0xFFFFFFFF, table.first + (info >> 32), addend)
                      for place, info, addend in struct.iter_unpack("<QQq", table.data)]
    return found


def _reserve(image: Image) -> None:
    """A slot for every symbol reached through the global offset table, a jump for every outside function that is called."""
    for _, _, kind, number, _ in _relocations(image):
        called = image.symbols[number].section == 0 and kind in image.machine.calls
        if kind in image.machine.slotted or called:
            image.slots.setdefault(number, 8 * len(image.slots))
        if called:
            image.jumps.setdefault(number, image.machine.jump * len(image.jumps))


def _layout(image: Image, kept: list[Section]) -> bytes:
    """Give everything its address, then write it there."""
    machine = image.machine
    exported = list({id(s): s for s in image.symbols if s.exported}.values())
    outside = [image.symbols[n] for n in dict.fromkeys(number for _, _, _, number, _ in _relocations(image)) if image.symbols[n].section == 0]
    symbols = [*outside, *exported]
    strings, offsets = _strings([s.name for s in symbols])
    pointers = sum(kind == machine.absolute for _, _, kind, _, _ in _relocations(image)) + len(image.slots)
    symtab_at = 64 + 56 * SEGMENTS
    strings_at = symtab_at + 24 * (len(symbols) + 1)
    hash_at = _up(strings_at + len(strings), 8)
    rela_at = _up(hash_at + 4 * (len(symbols) + 4), 8)
    read_end = _place([s for s in kept if not s.flags & (SHF_WRITE | SHF_EXEC)], rela_at + 24 * pointers)
    code_at = _next_segment(machine, read_end, kept)
    jumps_at = _up(_place([s for s in kept if s.flags & SHF_EXEC], code_at), 16)
    code_end = jumps_at + machine.jump * len(image.jumps)
    data_at = _next_segment(machine, code_end, kept)
    slots_at = _up(_place([s for s in kept if s.flags & SHF_WRITE], data_at), 8)
    dynamic_at = slots_at + 8 * len(image.slots)
    end = dynamic_at + 16 * 9
    patches = _relocate(image, slots_at, jumps_at, {id(s): i + 1 for i, s in enumerate(symbols)})
    tags = [(4, hash_at), (5, strings_at), (6, symtab_at), (10, len(strings)), (11, 24), (7, rela_at), (8, 24 * len(patches)), (9, 24), (0, 0)]
    parts = [(0, _headers(machine, read_end, code_at, code_end, data_at, dynamic_at, end)), (symtab_at, _symbol_table(image, symbols, offsets)),
             (strings_at, strings), (hash_at, _hash_table(len(symbols))),
             (rela_at, b"".join(struct.pack("<QQq", place, symbol << 32 | kind, addend) for place, kind, symbol, addend in patches)),
             (jumps_at, _jump_table(image, slots_at, jumps_at)), (dynamic_at, b"".join(struct.pack("<QQ", *tag) for tag in tags)),
             *((s.address, bytes(s.data)) for s in kept)]
    starts = (0, code_at, data_at)
    out = bytearray(_in_file(machine, end, starts))
    for address, data in parts:
        at = _in_file(machine, address, starts)
        out[at : at + len(data)] = data
    return bytes(out)


def _next_segment(machine: Machine, end: int, kept: list[Section]) -> int:
    """Where the segment behind one that ends there begins in memory."""
    return _up(end, max(ALIGN, *(s.align for s in kept))) + machine.page if machine.packed else _up(end, machine.page)


def _in_file(machine: Machine, address: int, starts: tuple[int, ...]) -> int:
    """The place in the file of an address in memory."""
    return address - machine.page * (sum(start <= address for start in starts) - 1) if machine.packed else address


def _symbol_table(image: Image, symbols: list[Symbol], names: list[int]) -> bytes:
    return b"\0" * 24 + b"".join(
        struct.pack("<IBBHQQ", name, s.info, 0, int(s.section != 0), image.address(s) if s.section else 0, s.size)
        for s, name in zip(symbols, names, strict=True))


def _hash_table(symbols: int) -> bytes:
    """One bucket that chains all symbols: there are few."""
    chain = [*range(2, symbols + 1), 0] if symbols else []
    return struct.pack(f"<{symbols + 4}I", 1, symbols + 1, min(symbols, 1), 0, *chain)


def _jump_table(image: Image, slots_at: int, jumps_at: int) -> bytes:
    """A jump to each outside function."""
    return b"".join(image.machine.make_jump(slots_at + image.slots[number], jumps_at + offset) for number, offset in image.jumps.items())


def _relocate(image: Image, slots_at: int, jumps_at: int, index: dict[int, int]) -> list[tuple[int, int, int, int]]:
    """Patch the sections' bytes; what only the loader can know comes back as (place, type, symbol, addend)."""
    dynamic, machine = [], image.machine
    for section, place, kind, number, addend in _relocations(image):
        symbol, here = image.symbols[number], section.address + place
        if kind in machine.slotted:
            target = slots_at + image.slots[number]
        elif symbol.section == 0:
            target = jumps_at + image.jumps.get(number, 0)
        else:
            target = image.address(symbol)
        if kind == machine.absolute:
            dynamic.append((here, kind, index[id(symbol)], addend) if symbol.section == 0 else (here, machine.relative, 0, target + addend))
        else:
            machine.patch(section.data, place, kind, target + addend, here)
    for number, offset in image.slots.items():
        symbol = image.symbols[number]
        dynamic.append((slots_at + offset, machine.slot, index[id(symbol)], 0) if symbol.section == 0
                       else (slots_at + offset, machine.relative, 0, image.address(symbol)))
    return dynamic


def _headers(machine: Machine, read_end: int, code_at: int, code_end: int, data_at: int, dynamic_at: int, end: int) -> bytes:
    """The file header and the program headers: constants, code, data, the dynamic section, and a plain stack."""
    head = b"\x7fELF\x02\x01\x01" + b"\0" * 9 + struct.pack("<HHIQQQIHHHHHH", 3, machine.number, 1, 0, 64, 0, 0, 64, 56, SEGMENTS, 64, 0, 0)

    def segment(kind: int, flags: int, start: int, stop: int, align: int) -> bytes:
        at = _in_file(machine, start, (0, code_at, data_at))
        return struct.pack("<IIQQQQQQ", kind, flags, at, start, start, stop - start, stop - start, align)

    load, dynamic, stack, page = 1, 2, 0x6474E551, machine.page  # the last kind says that the stack need not be executable
    return head + b"".join((segment(load, 4, 0, read_end, page), segment(load, 5, code_at, code_end, page), segment(load, 6, data_at, end, page),
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
