"""What each block of queries reads of the blocks that have scores: the second half of score_blocks.py.

Bound by: the comparisons of every block of keys with every other, once for each block of queries.
"""

from __future__ import annotations

import math
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.kernels.blocks_dense import PLACES, WHOLE, allowed


def cell(value: Any, dtype: str = "int32") -> Any:
    """A number that changes."""
    made = e.stack(1, dtype)
    e.store(made, value, 0)
    return made


def choose(how: Any, a: Any, c: Any) -> None:
    """A row of the table: the blocks of highest score, those that a pattern reads wholly among them; of the rest what the pattern reads."""
    infinite, seen, kinds = e.constant(math.inf, "float32"), cell(e.constant(0, "int32")), e.scratch(a.columns, "int32")
    c.ahead = e.opaque(how.blocks.before - e.load(a.texts, c.batch))     # from a place among the keys to one among the patterns
    with e.loop(a.columns) as column:
        kind = _pattern(how, a, c, e.opaque(column))
        e.store(kinds, kind, column)
        with e.when(e.load(c.scores, column) > -infinite):
            e.store(seen, e.load(seen, 0) + 1, 0)
            with e.when(tirx.EQ(kind, WHOLE)):
                e.store(c.scores, infinite, column)
    least = e.opaque(e.load(a.least, c.head))
    share = e.let(e.cast("float32", e.load(seen, 0)) * e.load(a.shares, c.head) - e.constant(1e-6, "float32"))
    wanted = e.opaque(e.maximum(e.cast("int32", tirx.ceil(share)), least))
    with e.loop(a.columns) as column:
        score, before = e.let(e.load(c.scores, column)), cell(e.constant(0, "int32"))
        with e.loop(a.columns) as other:
            than = e.let(e.load(c.scores, other))
            ahead = tirx.Or(than > score, e.both(tirx.EQ(than, score), other < column))
            e.store(before, e.load(before, 0) + e.cast("int32", ahead), 0)
        taken = tirx.Or(e.load(before, 0) < wanted, tirx.EQ(score, infinite))
        chosen = e.both(e.both(score > -infinite, taken), least >= 0)
        e.store(a.out, tirx.Select(chosen, e.constant(WHOLE, "int32"), e.load(kinds, column)), c.batch, c.head, c.row, column)


def _pattern(how: Any, a: Any, c: Any, column: Any) -> Any:
    """What the patterns read of a block of keys, by the queries at hand: as blocks_dense.py has it, and whole where they read all there is."""
    blocks, head = how.blocks, c.head if how.blocks.by_head else 0
    first = e.opaque(column * blocks.keys)
    end = e.opaque(e.minimum(first + blocks.keys, a.keys))
    spans = [[e.opaque(e.maximum(place + c.ahead, 0)) for place in span] for span in ((c.start, c.stop - 1), (first, end - 1))]
    least, most = cell(e.constant(1 << 30, "int32")), cell(e.constant(PLACES, "int32"))
    lines, columns = ([e.opaque(e.minimum(tirx.truncdiv(place, size), a.patterns.shape[dim] - 1)) for place in span]
                      for span, size, dim in zip(spans, (blocks.queries, blocks.keys), (2, 3), strict=True))
    for line in lines:
        for other in columns:
            kind = e.opaque(e.load(a.patterns, 0, head, line, other))
            e.store(least, e.minimum(e.load(least, 0), kind), 0)
            e.store(most, e.maximum(e.load(most, 0), kind), 0)
    found = cell(e.load(most, 0))
    with e.when(tirx.Or(e.load(most, 0) >= 0, tirx.NE(e.load(least, 0), e.load(most, 0)))):
        all_of, aligned = cell(e.constant(1, "int32")), cell(e.constant(0, "int32"))
        with e.loop(c.stop - c.start) as i, e.loop(end - first) as k:
            inside = allowed(blocks, a, head, e.opaque(e.maximum(c.start + i + c.ahead, 0)), e.opaque(e.maximum(first + k + c.ahead, 0)))
            e.store(all_of, e.minimum(e.load(all_of, 0), e.cast("int32", inside)), 0)
        shifts = [e.let(tirx.EQ(tirx.truncmod(e.load(a.texts, c.batch), size), 0)) for size in (blocks.queries, blocks.keys)]
        e.store(aligned, e.cast("int32", e.both(*shifts)), 0)
        some = tirx.Select(e.load(aligned, 0) > 0, e.load(most, 0), e.constant(PLACES, "int32"))
        e.store(found, tirx.Select(e.load(all_of, 0) > 0, e.constant(WHOLE, "int32"), some), 0)
    return e.opaque(e.load(found, 0))
