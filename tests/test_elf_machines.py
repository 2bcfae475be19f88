"""What is written into code for 64-bit Arm when it is linked: the words that an assembler gives (llvm-mc), and what is too far away."""

from __future__ import annotations

import pytest

from sparsify_compiler.codegen.elf_machines import AARCH64, ADR_PAGE, CALL26, UnsupportedError


def test_a_jump_goes_to_the_very_slot() -> None:
    """adrp x16, 0x2000; ldr x17, [x16, 0x348]; br x17"""
    assert AARCH64.make_jump(0x12348, 0x10000).hex(" ", 4) == "100000d0 11a641f9 20021fd6"


@pytest.mark.parametrize(("target", "word"), [(0x10008, "02000094"), (0xFFF8, "feffff97"), (0x10000 + (1 << 27) - 4, "ffffff95")])
def test_calls_ahead_and_back(target: int, word: str) -> None:
    """bl"""
    code = bytearray.fromhex("00000094")
    AARCH64.patch(code, 0, CALL26, target, 0x10000)
    assert code.hex() == word


@pytest.mark.parametrize(("kind", "far"), [(CALL26, 1 << 27), (ADR_PAGE, 1 << 32)])
def test_what_is_too_far_is_refused(kind: int, far: int) -> None:
    with pytest.raises(UnsupportedError):
        AARCH64.patch(bytearray(4), 0, kind, 0x10000 + far, 0x10000)
