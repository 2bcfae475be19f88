"""x [M, K] as panels of rows, column by column: packed[panel][column][row of the panel], zeros behind the last row.

Every column of a panel is contiguous then, which is what products over kept places read (packed_product.py, sampled_product.py). Columns may be
filled up with zeros to `columns` too.

Bound by: the bandwidth of x and of the copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsify_compiler.codegen import emit as e


@dataclass(frozen=True)
class PackColumns:
    """How: rows of a panel, a multiple of 16."""

    panel: int
    name = "pack_columns"

    def compute(self) -> Any:
        """The PrimFunc f(x [M, K], packed [panels, columns, panel]), columns >= K, panels * panel >= M."""
        return e.function("main", lambda: _body(self))


def _body(how: PackColumns) -> None:
    M, K, panels, columns = (e.int32() for _ in range(4))
    x, packed = e.argument((M, K), "float32"), e.argument((panels, columns, how.panel), "float32")
    width = e.lanes()
    blocks = e.opaque(e.floordiv(columns + (width - 1), width))
    with e.loop(panels * blocks, parallel=True) as task:
        panel, first = e.opaque(e.floordiv(task, blocks)), e.opaque(e.floormod(task, blocks) * width)
        with e.loop(how.panel // width) as v:
            row = e.opaque(panel * how.panel + v * width)

            def whole(panel: Any = panel, row: Any = row, first: Any = first, v: Any = v) -> None:
                lines = [e.let(e.load(x, row + i, first, lanes=width)) for i in range(width)]
                for k, column in enumerate(e.transpose(lines)):
                    e.store(packed, column, panel, first + k, v * width, lanes=width)

            def part(panel: Any = panel, row: Any = row, first: Any = first, v: Any = v) -> None:
                with e.loop(e.minimum(columns - first, width)) as k, e.loop(width) as i:
                    e.store(packed, e.zero(), panel, first + k, v * width + i)
                with e.loop(e.minimum(e.maximum(M - row, 0), width)) as i, e.loop(e.minimum(e.maximum(K - first, 0), width)) as k:
                    e.store(packed, e.load(x, row + i, first + k), panel, first + k, v * width + i)

            e.choose(e.both(row + width <= M, first + width <= K), whole, part)
