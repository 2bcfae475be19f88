"""New keys or values of a language model into its cache, in place: a copy of a few rows.

Bound by: a cache miss or two for every row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.kernels.row_loops import LANES, each, over_row


@dataclass(frozen=True)
class CacheWrite:
    """How: numbers of a row; how new rows lie, "bhsd" or "bshd"; threads; dtypes of the cache and of new rows, float32 or bfloat16."""

    width: int
    groups: int
    lies: str
    workers: int
    cached: str = "float32"
    given: str = "float32"
    name = "cache_write"

    def compute(self) -> Any:
        """The PrimFunc f(cache [B, G, capacity, D], new [B, G, n, D], past [1]). Rows that have no room are left out."""
        return e.function("main", lambda: _body(self))


def _body(how: CacheWrite) -> None:
    B, G, S, D, n = (e.int32() for _ in range(5))
    cache = e.argument((B, G, S, D), how.cached)
    new = e.argument((B, n, G, D) if how.lies == "bshd" else (B, G, n, D), how.given)
    past = e.let(e.cast("int32", e.load(e.argument((e.int32(),), "int64"), 0)))

    def row(number: Any) -> None:
        token, head = e.let(e.floormod(number, n)), e.let(e.floordiv(number, n))
        batch, group = e.let(e.floordiv(head, how.groups)), e.let(e.floormod(head, how.groups))
        source = (batch, token, group) if how.lies == "bshd" else (batch, group, token)

        def vectors(places: list[Any]) -> None:
            for place in places:
                e.write_float(cache, e.read_float(new, *source, place, lanes=LANES), batch, group, past + token, place, lanes=LANES)

        with e.when(past + token < S):
            over_row(how.width, vectors, lambda place: e.write_float(cache, e.read_float(new, *source, place), batch, group, past + token, place))

    each(e.let(B * how.groups * n), how.width, how.workers, row)
