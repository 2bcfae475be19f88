"""The core of experts in bfloat16 without tiles: two inputs of 16 rows a word, multiplied with a weight's two by one instruction (AVX512_BF16)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.kernels.expert_cores import Fma, Pairs
from sparsify_compiler.codegen.kernels.experts_layout import ExpertsArguments, ExpertsLayout
from sparsify_compiler.codegen.kernels.products import LANES

DOT = Path(__file__).with_name("dot_bf16.ll")


class Dot(Pairs, Fma):
    """Words of two, as for tiles; their products as those of vectors. Each product is exact, sums are float32, denormals count as zero."""

    few = 0
    text = DOT.read_text()

    def __init__(self, a: ExpertsArguments, how: ExpertsLayout) -> None:
        super().__init__(a, how)
        self.depth = 2 * LANES

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
