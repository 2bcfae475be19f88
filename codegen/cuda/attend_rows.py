"""Sixteen query rows of attention in the registers of a warp: scores of a run of keys, their largest so far, shares, sums of values.

Scores are in base 2. Flash attention (arXiv:2307.08691), section 3.1: sums are scaled again when a larger score comes, and divided at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.cuda import emit as c
from sparsify_compiler.codegen.cuda import groups as g
from sparsify_compiler.codegen.cuda import tiles as t

ROWS = 16
NONE = -math.inf


def lowest() -> Any:
    """Minus infinity."""
    return e.constant(NONE, "float32")


class Strided:
    """The next parameter: four dimensions of which the last is contiguous, rows aligned to 16 bytes. Called with a place, once all parameters are
    there: its address."""

    def __init__(self, name: str, shape: tuple[Any, ...], dtype: str) -> None:
        self.steps, self.shape = [e.int32() for _ in shape[:-1]], shape
        self.buffer = c.builder.match_buffer(c.builder.arg(name, c.builder.handle()), shape, dtype, strides=[*self.steps, c.const(1)], align=16)

    def __call__(self, *index: Any) -> Any:
        return c.address(self.flat, self.index(*index[:-1]) + e.cast("int64", index[-1]))

    def index(self, *index: Any) -> Any:
        """Of a row in `flat`."""
        steps = [e.cast("int64", i) * e.cast("int64", step) for i, step in zip(index, self.steps, strict=True)]
        return e.let(sum(steps, start=e.cast("int64", c.const(0))))

    @cached_property
    def flat(self) -> Any:
        return c.flat(self.buffer, self.shape[0], self.steps[0])


class Rows:
    """The state of a warp; `keys` of a run, a multiple of 16."""

    def __init__(self, dtype: str, width: int, value_width: int, keys: int, lane: Any) -> None:
        self.dtype, self.width, self.value_width, self.keys, self.lane = dtype, width, value_width, keys, lane
        self.query = c.registers(width // 16 * 4, "uint32")
        self.sums = t.zeros(value_width // 8 * 4)
        self.top, self.total = c.registers(2), t.zeros(2)
        for half in range(2):
            e.store(self.top, lowest(), half)

    def take(self, tile: t.Tile, row: Any) -> None:
        """The queries, out of shared memory."""
        for k in range(self.width // 16):
            tile.matrices(t.part(self.query, 4 * k), row, 2 * k, self.lane, down=True, turned=False)

    def run(self, keys: t.Tile, values: t.Tile, factor: Any, allowed: Callable[[Any, int], Any], plain: Any) -> None:
        """A run of keys and their values; allowed(key, half) where not all are `plain`ly counted: may row lane / 4 + 8 half see it?"""
        scores = self._scores(keys, factor)
        with e.when(tirx.Not(plain)):
            for n in range(self.keys // 8):
                for i in range(4):
                    key = e.let(8 * n + self.lane % 4 * 2 + i % 2)
                    with e.when(tirx.Not(allowed(key, i // 2))):
                        e.store(scores, lowest(), 4 * n + i)
        self._shares(scores)
        self._weigh(values, [self._pairs(scores, k) for k in range(self.keys // 16)])

    def _pairs(self, scores: Any, k: int) -> Any:
        """Shares of sixteen keys, as the left operand of a product."""
        shares = c.registers(4, "uint32")
        for i in range(4):
            at = 4 * (2 * k + i // 2) + i % 2 * 2
            e.store(shares, c.of("uint32", f"pair_{c.SHORT[self.dtype]}", e.load(scores, at), e.load(scores, at + 1)), i)
        return shares

    def _weigh(self, values: t.Tile, shares: list[Any]) -> None:
        """Add values by their shares."""
        for k, left in enumerate(shares):
            for n in range(self.value_width // 16):
                b = c.registers(4, "uint32")
                values.matrices(b.data, 16 * k, 2 * n, self.lane, down=True, turned=True)
                for j in range(2):
                    t.product(self.dtype, t.part(self.sums, 4 * (2 * n + j)), left.data, t.part(b, 2 * j))

    def _scores(self, keys: t.Tile, factor: Any) -> Any:
        scores = t.zeros(self.keys // 8 * 4)
        self._products(scores, keys)
        for i in range(self.keys // 8 * 4):
            e.store(scores, e.load(scores, i) * factor, i)
        return scores

    def _products(self, scores: Any, keys: t.Tile) -> None:
        for k in range(self.width // 16):
            for n in range(self.keys // 16):
                b = c.registers(4, "uint32")
                keys.matrices(b.data, 16 * n, 2 * k, self.lane, down=False, turned=False)
                for j in range(2):
                    t.product(self.dtype, t.part(scores, 4 * (2 * n + j)), t.part(self.query, 4 * k), t.part(b, 2 * j))

    def _shares(self, scores: Any) -> None:
        """Scores become shares of the sum so far; what was summed is scaled to them."""
        for half in range(2):
            own = [4 * n + 2 * half + j for n in range(self.keys // 8) for j in range(2)]
            best = e.let(e.load(scores, own[0]))
            for at in own[1:]:
                best = c.of("float32", "larger", best, e.load(scores, at))
            before = e.let(e.load(self.top, half))
            top = c.of("float32", "larger", before, c.of("float32", "quad_max", best))
            e.store(self.top, top, half)
            base = or_zero(top)
            again = c.of("float32", "exp2_of", before - base)
            e.store(self.total, e.load(self.total, half) * again, half)
            for at in own:
                e.store(scores, c.of("float32", "exp2_of", e.load(scores, at) - base), at)
                e.store(self.total, e.load(self.total, half) + e.load(scores, at), half)
            for n in range(self.value_width // 8):
                for j in range(2):
                    at = 4 * n + 2 * half + j
                    e.store(self.sums, e.load(self.sums, at) * again, at)

    def add_lanes(self) -> None:
        """The totals, of all keys now."""
        for half in range(2):
            e.store(self.total, c.of("float32", "quad_sum", e.load(self.total, half)), half)


class GroupRows(Rows):
    """The same where four warps multiply at once (groups.py), each for its own sixteen of 64 rows; tiles are Parts."""

    def take(self, tile: t.Tile, row: Any) -> None:
        self.queries = tile

    def _products(self, scores: Any, keys: t.Tile) -> None:
        with g.products():
            for k in range(0, self.width, g.DEEP):
                g.product(self.dtype, self.keys, scores, g.straight(self.queries, 0, k), g.straight(keys, 0, k))
        c.do(g.WAITED)

    def _weigh(self, values: t.Tile, shares: list[Any]) -> None:
        with g.products():
            for k, left in enumerate(shares):
                g.product_own(self.dtype, self.value_width, self.sums, left, g.turned(values, 0, k * g.DEEP))
        c.do(g.WAITED)


def or_zero(top: Any) -> Any:
    """The largest score, 0 where there is none: infinities are not subtracted."""
    return e.let(tirx.Select(tirx.EQ(top, lowest()), e.zero(), top))


def inverse(top: Any, total: Any) -> Any:
    """What sums are multiplied with at last: 0 for a row without keys."""
    return e.let(tirx.Select(tirx.EQ(top, lowest()), e.zero(), e.constant(1.0, "float32") / total))


def log_of_sum(top: Any, total: Any) -> Any:
    """In base e; minus infinity for a row without keys."""
    found = (top + c.of("float32", "log2_of", total)) * e.constant(math.log(2), "float32")
    return e.let(tirx.Select(tirx.EQ(top, lowest()), lowest(), found))
