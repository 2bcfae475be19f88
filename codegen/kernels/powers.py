"""Powers of two on any processor, in vectors of any length: what softmax is made of (powers.ll)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsify_compiler.codegen import emit as e

_TEXT = Path(__file__).with_name("powers.ll").read_text()


def powers(lanes: int) -> Any:
    """`with powers(lanes):` exp2 of vectors of so many float32 can be called."""
    return e.llvm(_TEXT.replace("LANES", str(lanes)))


def exp2(value: Any, lanes: int) -> Any:
    """2 ** value, 0 below -126, NaN for NaN; relative error 9e-8."""
    return e.let(e.external(f"float32x{lanes}", f"exp2_{lanes}", value))


def larger(value: Any, least: Any, lanes: int) -> Any:
    """The maximum, lane by lane; `value` where that is no number."""
    return e.let(e.external(f"float32x{lanes}", f"larger_{lanes}", value, least))


def largest(value: Any, lanes: int) -> Any:
    """The maximum of all lanes that are numbers."""
    return e.let(e.external("float32", f"largest_{lanes}", value))


def total(value: Any, lanes: int) -> Any:
    """The sum of all lanes."""
    return e.let(e.external("float32", f"sum_{lanes}", value))
