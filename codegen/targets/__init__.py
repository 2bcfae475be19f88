"""From the engine's Target (a machine as data) to the compiler's own target object."""

from __future__ import annotations

from functools import cache
from typing import Any

from sparsify_compiler.codegen.targets import cuda, llvm
from sparsify_compiler.target import Target

MODULES = {"x86_64": llvm, "aarch64": llvm, "cuda": cuda}


def options(target: Target) -> dict[str, Any]:
    """What the compiler is told of a target, as plain data: machine code depends on it."""
    made: dict[str, Any] = MODULES[target.arch].options(target)
    return made


@cache
def tvm_target(target: Target) -> Any:
    """The tvm.target.Target that compiles for `target`."""
    import tvm

    return tvm.target.Target({**options(target), "num-cores": target.cores} if target.arch != "cuda" else options(target))
