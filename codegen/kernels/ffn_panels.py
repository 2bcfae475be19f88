"""An FFN that reads some of its neurons, for many rows of x: all of gate and up, what is chosen of their product, all of down.

Every row chooses for itself, so that together they need nearly all weights: the products are dense (dense_panel.py).

Bound by: the FMA rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.host import emit_within
from sparsify_compiler.codegen.kernels.dense_panel import DensePanel
from sparsify_compiler.codegen.kernels.finish import NOTHING, Finish
from sparsify_compiler.codegen.kernels.gather_rows import weight_argument
from sparsify_compiler.codegen.kernels.products import LANES
from sparsify_compiler.codegen.vectors import AVX512, Vectors
from sparsify_compiler.ops import select_ffn


@dataclass(frozen=True)
class FfnPanels:
    """How: with a gate or without; work split for this many threads (1: on the caller's alone).

    chosen_by   "scores" of the neurons; or the "gate", or the gate "scaled" by a vector
    """

    dtype: str       # of x, the weights and y: "float32" or "bfloat16"
    activation: str
    chosen_by: str
    gated: bool
    workers: int
    cut_for: Vectors = AVX512
    name = "ffn_panels"

    def compute(self) -> Any:
        """The PrimFunc of ffn_parts.Arguments for many rows: x [M, K], scores [M, H], limit [1 or M]; biases up to a multiple of a panel's width."""
        return e.function("main", lambda: _body(self), self.cut_for)


def _body(how: FfnPanels) -> None:
    M, N, K, H = (e.int32() for _ in range(4))
    x = e.argument((M, K), how.dtype)
    by = e.argument({"scores": (M, H), "scaled": (H,), "gate": (e.int32(),)}[how.chosen_by], "float32")
    limit, words = e.argument((e.int32(),), "float32"), "float32" if how.dtype == "float32" else "int32"
    gate, up = (e.argument((H if there else e.int32(), e.int32()), words) for there in (True, how.gated))
    gate_bias, up_bias = (e.argument((e.int32(),), "float32") for _ in range(2))
    down, bias, y = weight_argument(H, how.dtype), e.argument((e.int32(),), "float32"), e.argument((M, N), how.dtype)

    def dense(layout: str, finish: Finish, given: str, out: str, buffers: list[Any]) -> None:
        emit_within(DensePanel(layout, how.workers, finish, given, how.dtype, out, how.cut_for), buffers)

    gates, ups = e.matrix(M, H), e.matrix(M, H) if how.gated else None
    dense("outputs", Finish(activation=how.activation), how.dtype, "float32", [x, gate, gate_bias, gates])
    if how.gated:
        dense("outputs", Finish(activation=select_ffn.UP.get(how.activation, "")), how.dtype, "float32", [x, up, up_bias, ups])
    with e.loop(M, parallel=how.workers > 1) as m, e.loop(e.floordiv(H, LANES)) as group:
        at = e.let(group * LANES)
        value = e.let(e.load(gates, m, at, lanes=LANES))
        score = e.load(by, m, at, lanes=LANES) if how.chosen_by == "scores" else e.absolute(value, LANES)
        score = score * e.load(by, at, lanes=LANES) if how.chosen_by == "scaled" else score
        whole = value if ups is None else value * e.load(ups, m, at, lanes=LANES)
        least = e.broadcast(e.load(limit, e.minimum(m, limit.shape[0] - 1)), LANES)
        e.store(gates, tirx.Select(score < least, e.broadcast(e.zero(), LANES), whole), m, at, lanes=LANES)
    dense("inputs", NOTHING, "float32", how.dtype, [gates, down, bias, y])
