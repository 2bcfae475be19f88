"""Masks of attend_dense.py: a tensor of truths or of numbers that are added, for keys alone or for every query; and causality."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e

LEAST = -1e30       # what a finite number in a mask is at least: a row whose keys all have the least float must not become infinite


@dataclass(frozen=True)
class Mask:
    """dtype "bool", "float32" or "" for none; along which of batch, heads and queries it varies."""

    dtype: str = ""
    varies: tuple[bool, bool, bool] = (False, False, False)


def add_mask(how: Any, a: Any, t: Any) -> None:
    """Add the mask to the scores of a block of keys."""
    if not how.mask.dtype:
        return None
    batch = t.batch if how.mask.varies[0] else 0
    if not (how.mask.varies[1] or how.mask.varies[2]):
        return _same_for_all(how, a, t, batch)
    def line(head: Any, query: Any) -> tuple[Any, Any]:
        return head if how.mask.varies[1] else 0, query if how.mask.varies[2] else 0

    return add_rows(how, t, line, lambda row, at, lanes: _added(e.let(e.load(a.mask, batch, *row, t.key + at, lanes=lanes)), how.mask.dtype, lanes))


def add_rows(how: Any, t: Any, line: Callable[[Any, Any], Any], read: Callable[[Any, Any, int], Any]) -> None:
    """Add to the scores of a block of keys what read(line(head, query), keys from the block's first on, lanes) says of each row."""
    with e.loop(how.vectors) as v:
        lines = [line(*t.line(v * how.lanes + i)) for i in range(how.lanes)]
        whole = e.opaque(tirx.truncdiv(t.count, how.lanes))
        with e.loop(whole) as chunk:
            first = e.opaque(chunk * how.lanes)
            rows = [e.let(read(one, first, how.lanes)) for one in lines]
            for i, added in enumerate(e.transpose(rows)):
                _add(t, (first + i) * how.rows + v * how.lanes, added, how.lanes)
        with e.loop(t.count - whole * how.lanes) as rest:
            key = e.opaque(whole * how.lanes + rest)
            for i, one in enumerate(lines):
                _add(t, key * how.rows + v * how.lanes + i, read(one, key, 1), 1)


def _same_for_all(how: Any, a: Any, t: Any, batch: Any) -> None:
    with e.loop(t.count) as key:
        added = e.let(_added(e.let(e.load(a.mask, batch, 0, 0, t.key + key)), how.mask.dtype, 1))
        with e.when(tirx.NE(added, e.zero())):
            for v in range(how.vectors):
                _add(t, key * how.rows + v * how.lanes, e.broadcast(added, how.lanes), how.lanes)


def _add(t: Any, at: Any, added: Any, lanes: int) -> None:
    e.store(t.scores, e.load(t.scores, at, lanes=lanes) + added, at, lanes=lanes)


def _added(value: Any, dtype: str, lanes: int) -> Any:
    """What is added to scores in base 2."""
    least, none = (e.broadcast(e.constant(number, "float32"), lanes) for number in (LEAST, -math.inf))
    if dtype == "bool":
        return truths(value, lanes)
    scaled = value * e.broadcast(e.constant(math.log2(math.e), "float32"), lanes)
    return tirx.Select(tirx.EQ(value, none), none, tirx.Select(value < least, least, scaled))


def truths(value: Any, lanes: int) -> Any:
    """What lets through where it is true, and hides where it is not."""
    return tirx.Select(value, *(e.broadcast(e.constant(number, "float32"), lanes) for number in (0.0, -math.inf)))


def hide_later_keys(how: Any, a: Any, t: Any) -> None:
    """A query reads the keys up to its own place."""
    with e.loop(t.count) as key:
        place = e.opaque(t.key + key - a.past)
        for v in range(how.vectors):
            at = e.opaque(key * how.rows + v * how.lanes)
            later = e.load(t.places, v * how.lanes, lanes=how.lanes) < e.broadcast(place, how.lanes)
            score = e.load(t.scores, at, lanes=how.lanes)
            e.store(t.scores, tirx.Select(later, e.broadcast(e.constant(-math.inf, "float32"), how.lanes), score), at, lanes=how.lanes)
