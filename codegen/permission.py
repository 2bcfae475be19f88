"""What a process has to ask the operating system for before it may use it."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

ARCH_PRCTL, REQUEST, TILE_DATA = 158, 0x1023, 18  # Linux on x86-64: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)


@cache
def tiles() -> bool:
    """Ask for AMX tiles, for all threads of this process. False where the system has none to give."""
    if sys.platform != "linux":
        return False
    return bool(ctypes.CDLL(None).syscall(ARCH_PRCTL, REQUEST, TILE_DATA) == 0)
