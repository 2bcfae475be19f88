"""Shared by the tests of kernels: which machine may run what, and timings that do not depend on one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sparsify_compiler.codegen import permission
from sparsify_compiler.codegen.kernels import amx
from sparsify_compiler.measure import Timing
from sparsify_compiler.target import host

needs_tiles = pytest.mark.skipif(not all(host().has(name) for name in amx.FEATURES) or not permission.tiles(), reason="this machine has no AMX tiles")
needs_avx512 = pytest.mark.skipif(not host().has("avx512f"), reason="this machine's vectors have no 512 bits")


def longest_first(groups: dict[str, dict[str, Callable[[], object]]], **_: int) -> dict[str, dict[str, Timing]]:
    """Timings by which a sparse form that computes more of what follows is always faster. Every form runs once."""
    def time(name: str) -> float:
        return (10.0 if name.startswith("dense") else 1.0) - 0.1 * name.count(" + ")

    for forms in groups.values():
        for run in forms.values():
            run()
    return {key: {name: Timing(time(name), time(name), time(name)) for name in forms} for key, forms in groups.items()}
