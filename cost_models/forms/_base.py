"""A form: one kernel's time, in parts, as formulas.

    seconds = overhead + compute + memory

Every part is a sum of counts of what the kernel does (vectors, visits, tile products, bytes), each times what one of them takes on the machine. They
are added, not compared as in a roofline: at the sizes of layers, measured times follow the sum more closely than the maximum (RESULTS.md).

The counts follow from the kernel's own loops. What one of them costs, in multiples of a machine's own times (`fma`, `tile`, `gather`, ...), is a
constant of the kernel on a kind of processor (shipped.py, fit.py), found on layers that no test and no benchmark uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from sympy import Expr, Symbol

from sparsify_compiler.cost_models.symbols import TABLE, arrive, call, cold, wake

Values = Mapping[str, float]
LANES = 16


class Hardware(Protocol):
    """What decides which kernels there are: a Machine."""

    @property
    def arch(self) -> str: ...

    @property
    def features(self) -> tuple[str, ...]: ...

    @property
    def second_cache(self) -> int: ...


@dataclass(frozen=True)
class Formula:
    """The time of a kernel. Symbols are those of symbols.TABLE, and what is fitted.

    weight   bytes of the weight as it lies in memory for this kernel, all of which arrive once a call
    compute  seconds that `threads` cores take to compute, activations packed and written included
    work     a count, and below which one thread does it all; None: all threads take part
    """

    weight: Expr
    compute: Expr
    work: tuple[Expr, float] | None = None

    @property
    def overhead(self) -> Expr:
        """Seconds of calling at all: Python, waking the threads, and bringing back what other layers have displaced."""
        return CALLS * call + wake + DISPLACED * cold

    @property
    def memory(self) -> Expr:
        """Seconds until the weight is there."""
        return LATE * arrive * self.weight

    @property
    def seconds(self) -> Expr:
        """All of it."""
        return self.overhead + self.compute + self.memory


@dataclass(frozen=True)
class Form:
    """One kernel for one work.

    name     as measure() and lowering call it
    formula  its time
    fitted   what its costs are kept by (shipped.py)
    given    numbers of the formula that are not sizes of the work: how the kernel cuts it
    borrowed are its costs those of another op's kernel, which is what they are fitted on?
    """

    name: str
    formula: Formula
    fitted: str
    given: Values = field(default_factory=dict)
    borrowed: bool = False


def costs(*names: str) -> tuple[Symbol, ...]:
    """The symbols of what is fitted. Raises ValueError for a name that means something else."""
    taken = [name for name in names if name in TABLE]
    if taken:
        raise ValueError(f"names of sizes or of a machine's times: {taken}")
    return tuple(Symbol(name, nonnegative=True) for name in names)


CALLS, DISPLACED, LATE = costs("calls", "displaced", "late")
