"""What is computed of a sum before it is written: bias, another tensor, an activation, as kernels/finish.py has them for CPUs."""

from __future__ import annotations

from typing import Any

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.cuda import emit as c
from sparsify_compiler.codegen.kernels.finish import NOTHING, Finish

SAME = {"drelu": "relu", "hardtanh": "clamped", "relu6": "clamped"}    # names of device functions, where others than the activations'
NUMBERS = {"relu6": (0.0, 6.0)}


class Result:
    """The next parameters: bias [N] float32, (other [M, N],) y [M, N] of `dtype`."""

    def __init__(self, dtype: str, finish: Finish, rows: Any, outputs: Any) -> None:
        self._dtype, self._finish = dtype, finish
        self._bias = c.parameter("bias", (outputs,), "float32")
        self._other = c.parameter("other", (rows, outputs), dtype) if finish.add else None
        self._y = c.parameter("y", (rows, outputs), dtype)

    def bias(self, output: Any) -> Any:
        """Of an output."""
        return e.load(self._bias, output)

    def of(self, total: Any, row: Any, output: Any) -> Any:
        """What is written there, of a sum and its bias."""
        value = e.let(total if self._other is None else total + c.read(self._other, row, output))
        return activated(self._finish.activation, value, self._finish.numbers)

    def write(self, total: Any, row: Any, output: Any) -> None:
        """Finish a sum without its bias."""
        self.write_biased(total + self.bias(output), row, output)

    def write_biased(self, total: Any, row: Any, output: Any) -> None:
        """Finish a sum, bias included."""
        c.write(self._y, self.of(total, row, output), row, output)

    def write_pair(self, totals: list[Any], row: Any, output: Any) -> None:
        """Finish two sums that lie side by side, bias included, in 16 bits: one word."""
        pair = [self.of(total, row, output + j) for j, total in enumerate(totals)]
        c.do("write_word", c.address(self._y, row, output), c.of("uint32", f"pair_{c.SHORT[self._dtype]}", *pair))


def activated(name: str, value: Any, numbers: tuple[float, ...] = ()) -> Any:
    """An activation by its name; "" for none."""
    if not name:
        return value
    return c.of("float32", SAME.get(name, name), value, *(e.constant(n, "float32") for n in NUMBERS.get(name, numbers)))


__all__ = ["NOTHING", "Finish", "Result", "activated"]
