"""Which instructions this processor has, as the operating system tells: for 64-bit Arm on Linux, where LLVM's detection misses some.

Source: Linux, Documentation/arch/arm64/elf_hwcaps.rst. Needs the standard library only.
"""

from __future__ import annotations

import ctypes
import sys

AT_HWCAP, AT_HWCAP2 = 16, 26
BITS = {"neon": (AT_HWCAP, 1), "fullfp16": (AT_HWCAP, 10), "dotprod": (AT_HWCAP, 20), "sve": (AT_HWCAP, 22), "sve2": (AT_HWCAP2, 1),
        "i8mm": (AT_HWCAP2, 13), "bf16": (AT_HWCAP2, 14)}   # by LLVM's names


def aarch64_features() -> dict[str, bool] | None:
    """Features of a 64-bit Arm processor by LLVM's names; None where the system is not Linux."""
    if sys.platform != "linux":
        return None
    ask = ctypes.CDLL(None).getauxval
    ask.argtypes, ask.restype = [ctypes.c_ulong], ctypes.c_ulong
    return {name: bool(ask(word) >> bit & 1) for name, (word, bit) in BITS.items()}
