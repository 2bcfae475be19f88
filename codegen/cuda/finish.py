"""What is computed of a sum before it is written: bias, another tensor, an activation, as kernels/finish.py has them for CPUs."""

from __future__ import annotations

from typing import Any

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.cuda import emit as c
from sparsify_compiler.codegen.kernels.finish import NOTHING, Finish

SAME = {"drelu": "relu", "hardtanh": "clamped", "relu6": "clamped"}    # names of device functions, where others than the activations'
NUMBERS = {"relu6": (0.0, 6.0)}


def finished(finish: Finish, value: Any, other: Any = None) -> Any:
    """What is written, of a sum and of what is added to it."""
    value = e.let(value if other is None else value + other)
    return activated(finish.activation, value, finish.numbers)


def activated(name: str, value: Any, numbers: tuple[float, ...] = ()) -> Any:
    """An activation by its name; "" for none."""
    if not name:
        return value
    return c.of("float32", SAME.get(name, name), value, *(e.constant(n, "float32") for n in NUMBERS.get(name, numbers)))


__all__ = ["NOTHING", "Finish", "activated", "finished"]
