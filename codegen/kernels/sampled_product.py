"""The gradient of a sparse weight's values: of dyᵀ x, [N, K], only the places that are kept (SDDMM; SparseProp, arXiv:2302.04852, algorithm 2).

Both come in packed columns (pack_columns.py), so that each place is a dot product of two contiguous runs of a panel's rows. Sixteen places at a
time, 16 / r columns times r outputs of a group (for r a multiple of 16, one column and 16 of its outputs), have their sums in registers, which a tree
of shuffles brings down to one vector of results, stored as the parameter lies. Panel after panel is added to what is there.

Bound by: loads for r = 1, one a multiply-add from L2; the FMA rate from r = 4 on; and the tree, a quarter of the time at 128 rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from sparsify_compiler.codegen import emit as e

PLACES = 16     # whose sums are in registers at a time
SIZES = (1, 2, 4, 8, 16)
CHUNK = 64      # outputs of a task, for which a panel's x stays in L2


@dataclass(frozen=True)
class SampledProduct:
    """How: outputs of a group; rows of a panel, a multiple of 16; dtype of the columns."""

    r: int
    panel: int
    index: str
    name = "sampled_product"

    def compute(self) -> Any:
        """The PrimFunc f(dy [panels, outputs, panel], x [panels, inputs, panel], columns [S], pointers [groups + 1], gradient [S * r]).

        outputs is at least groups * r. The gradient is overwritten.
        """
        return e.function("main", lambda: _body(self))

    @property
    def rows(self) -> int:
        """Outputs of a group that are taken at a time."""
        return max(size for size in SIZES if self.r % size == 0)


def _body(how: SampledProduct) -> None:
    panels, P = e.int32(), e.int32()
    a = SimpleNamespace(dy=e.argument((panels, e.int32(), how.panel), "float32"), x=e.argument((panels, e.int32(), how.panel), "float32"))
    a.index, a.pointers = e.argument((e.int32(),), how.index), e.argument((P,), "int32")
    a.gradient = e.argument((e.int32(),), "float32")
    groups, chunk = e.opaque(P - 1), max(1, CHUNK // how.r)
    with e.loop(e.floordiv(groups + (chunk - 1), chunk), parallel=True) as task, e.loop(panels) as panel:
        begin = e.opaque(task * chunk)
        with e.loop(e.minimum(groups - begin, chunk)) as number:
            for part in range(0, how.r, how.rows):
                _add(how, a, panel, e.opaque(begin + number), part)


def _add(how: SampledProduct, a: Any, panel: Any, group: Any, part: int) -> None:
    """A panel's part of the sums of some outputs of one group."""
    rows, together = how.rows, PLACES // how.rows
    first, last = e.opaque(e.load(a.pointers, group)), e.opaque(e.load(a.pointers, group + 1))
    output = e.opaque(group * how.r + part)
    with e.loop(e.floordiv(last - first + (together - 1), together)) as turn:
        begin = e.opaque(first + turn * together)
        columns = [e.let(e.cast("int32", e.load(a.index, e.minimum(begin + c, last - 1)))) for c in range(together)]
        spill = e.stack(PLACES, "float32")
        e.store(spill, _folded([e.let(one.get()) for one in _dots(how, a, panel, output, columns)]), 0, lanes=PLACES)
        with e.loop(e.minimum(last - begin, together)) as c:
            at = e.opaque((begin + c) * how.r + part)
            one, old = e.load(spill, c * rows, lanes=rows), e.load(a.gradient, at, lanes=rows)
            e.choose(panel < 1, lambda at=at, one=one: e.store(a.gradient, one, at, lanes=rows),
                     lambda at=at, one=one, old=old: e.store(a.gradient, old + one, at, lanes=rows))


def _dots(how: SampledProduct, a: Any, panel: Any, output: Any, columns: list[Any]) -> list[e.Register]:
    """One register of partial sums for each place, column after column."""
    width, rows = e.lanes(), how.rows
    sums = [e.Register(width, e.broadcast(e.zero(), width)) for _ in range(PLACES)]
    if rows == 1:
        fixed = [e.let(e.load(a.dy, panel, output, v * width, lanes=width)) for v in range(how.panel // width)]
        for c, column in enumerate(columns):
            for v, one in enumerate(fixed):
                sums[c].multiply_add(one, e.load(a.x, panel, column, v * width, lanes=width))
        return sums
    with e.loop(how.panel // width) as v:
        lines = [e.let(e.load(a.dy, panel, output + i, v * width, lanes=width)) for i in range(rows)]
        for c, column in enumerate(columns):
            one = e.let(e.load(a.x, panel, column, v * width, lanes=width))
            for i in range(rows):
                sums[c * rows + i].multiply_add(lines[i], one)
    return sums


def _folded(sums: list[Any]) -> Any:
    """Lane i: the sum over the lanes of vector i. Stage s adds what differs in bit s of the lane's number, for two vectors at once."""
    lanes, current, bit = len(sums), list(sums), 1
    while len(current) > 1:
        low = [lane if not lane & bit else (lane ^ bit) + lanes for lane in range(lanes)]
        high = [lane | bit if not lane & bit else lane + lanes for lane in range(lanes)]
        current = [e.let(e.shuffle(a, b, low) + e.shuffle(a, b, high)) for a, b in zip(current[0::2], current[1::2], strict=True)]
        bit *= 2
    return current[0]
