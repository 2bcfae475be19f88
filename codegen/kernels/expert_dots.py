"""The core of experts in bfloat16 without tiles: two inputs of 16 rows a word, multiplied with a weight's two by one instruction (AVX512_BF16)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen import emit_tiles as t
from sparsify_compiler.codegen.kernels.expert_cores import Fma
from sparsify_compiler.codegen.kernels.experts_layout import ExpertsArguments, ExpertsLayout
from sparsify_compiler.codegen.kernels.products import LANES

DOT = Path(__file__).with_name("dot_bf16.ll")


class Dot(Fma):
    """[pair of inputs][row] words of two bfloat16, as for tiles. Each product is exact, sums are float32, denormals count as zero."""

    dtype, few = "int32", 0
    text = DOT.read_text()

    def __init__(self, a: ExpertsArguments, how: ExpertsLayout) -> None:
        super().__init__(a, how)
        self.depth = 2 * LANES

    def size(self, width: Any) -> Any:
        return e.floordiv(width, 2) * LANES

    def pack(self, packed: Any, start: Any, rows: list[Any], first: Any) -> None:
        lines = [e.let(e.reinterpret("int32", e.load(self.a.x, row, first, lanes=self.depth), LANES)) for row in rows]
        for pair, words in enumerate(e.transpose(lines)):
            e.store(packed, words, start + (e.floordiv(first, 2) + pair) * LANES, lanes=LANES)

    def neurons(self, packed: Any, hidden: Any, expert: Any, first: Any, unit: Any, many: int) -> None:
        apart = many * self.group * LANES
        for which, name in enumerate(self.projections):
            self._halves(name, expert, first, self.a.H, packed, self.a.K, unit, many, which * apart)
            self.biased(name, expert, first, self.group, many, which * apart)
        with e.loop(many) as v, e.loop(self.group // 2) as pair:
            low, high = (self.activated(e.let((v * self.group + 2 * pair + i) * LANES), apart, LANES) for i in range(2))
            to = (unit + v) * self.size(self.a.H) + (e.floordiv(first, 2) + pair) * LANES
            e.store(hidden, t.bfloat16_pairs(low, high), to, lanes=LANES)

    def _multiply(self, weight: Any, rows: list[Any], inputs: Any, width: Any, unit: Any, many: int, at: int) -> None:
        sums = [[e.Register(LANES, e.broadcast(e.zero(), LANES)) for _ in range(many)] for _ in rows]
        starts, rows = [e.wide((unit + v) * self.size(width)) for v in range(many)], [e.wide(row) for row in rows]
        with e.loop(e.floordiv(width, 2)) as pair:
            column = e.wide(pair)
            values = [e.let(e.load(inputs, start + column * LANES, lanes=LANES)) for start in starts]
            for row, totals in zip(rows, sums, strict=True):
                word = e.let(e.broadcast(e.load(weight, row, column), LANES))
                for value, total in zip(values, totals, strict=True):
                    total.set(e.external(total.dtype, "dot_bf16", total.get(), value, word))
        for n, totals in enumerate(sums):
            for v, total in enumerate(totals):
                e.store(self.finished, total.get(), at + (v * LANES + n) * LANES, lanes=LANES)
