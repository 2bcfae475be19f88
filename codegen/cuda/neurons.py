"""The FFNs of a language model for one token: neurons that are selected, or those of chosen experts, a warp for each.

A warp computes the gate of its neuron, and goes on to up only where the neuron is selected: weights of the others are never read (select_ffn,
predicted_ffn, experts_ffn with one row). Then CudaGatherRows reads the rows of down that are not zero, or CudaDownRows all of the chosen experts'.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.cuda import emit as c
from sparsify_compiler.codegen.cuda import tiles as t
from sparsify_compiler.codegen.cuda.finish import activated
from sparsify_compiler.codegen.cuda.grouped import RAISED

WARPS, EIGHT = 8, 8
THREADS = WARPS * c.WARP


@dataclass(frozen=True)
class CudaNeurons:
    """f(x [1, K], chosen [k], gate [E, H, K], up [E, H, K], gate_bias [A, H], up_bias [A, H], limit [1], scale [H], scores [H], hidden [k, H]).

    x, gate and up of `dtype`, K a multiple of 8; chosen int32, -1 for none, whose neurons are 0; the rest float32.
    hidden = activation(gate x + gate_bias) * (up x + up_bias), without up alone, and 0 where `select` is "gate" and |activation| * scale is below the
    limit, or "scores" and the score is. A NaN is selected.
    """

    dtype: str
    activation: str
    gated: bool = True
    biased: tuple[bool, bool] = (False, False)
    select: str = ""
    scaled: bool = False

    @property
    def name(self) -> str:
        return "cuda_neurons"

    def compute(self) -> Any:
        return e.function("main", self._body)

    def _body(self) -> None:
        K, H, E, k, E2 = (e.int32() for _ in range(5))
        x, chosen = c.parameter("x", (1, K), self.dtype), c.parameter("chosen", (k,), "int32")
        gate, up = c.parameter("gate", (E, H, K), self.dtype), c.parameter("up", (E2, e.int32(), e.int32()), self.dtype)
        biases = [c.parameter(name, (e.int32(), e.int32()), "float32") for name in ("gate_bias", "up_bias")]
        limit, scale = c.parameter("limit", (1,), "float32"), c.parameter("scale", (e.int32(),), "float32")
        scores, hidden = c.parameter("scores", (e.int32(),), "float32"), c.parameter("hidden", (k, H), "float32")
        flat = [c.flat(weight, E, H, K) for weight in (gate, up)]
        with c.launch((c.ceil(H, WARPS), k), THREADS) as (bx, by, thread):
            lane, n = e.let(thread % c.WARP), e.let(bx * WARPS + tirx.truncdiv(thread, c.WARP))
            with e.when(n < H):
                expert, value, go = e.let(e.load(chosen, by)), t.zeros(1), c.registers(1, "int32")
                e.store(go, e.cast("int32", e.both(expert >= 0, expert < E)), 0)
                if self.select == "scores":
                    chosen_by_score = tirx.Not(e.let(e.load(scores, n)) < e.load(limit, 0))
                    e.store(go, e.load(go, 0) & e.cast("int32", chosen_by_score), 0)
                with e.when(e.load(go, 0) > 0):
                    def product(which: int) -> Any:
                        base = e.cast("int64", expert) * e.cast("int64", H) * e.cast("int64", K) + e.cast("int64", n) * e.cast("int64", K)
                        found = dot(self.dtype, self.dtype, lambda at: c.address(flat[which], base + e.cast("int64", at)),
                                    lambda at: c.address(x, 0, at), K, lane)
                        return e.let(found + e.load(biases[which], expert, n)) if self.biased[which] else found

                    first = e.let(activated(self.activation, product(0)))
                    if self.select == "gate":
                        factor = e.let(e.load(scale, n)) if self.scaled else e.constant(1.0, "float32")
                        e.store(go, e.cast("int32", c.of("bool", "selected", first, e.zero(), factor, e.load(limit, 0))), 0)
                    with e.when(e.load(go, 0) > 0):
                        e.store(value, first * activated(RAISED.get(self.activation, ""), product(1)) if self.gated else first, 0)
                with e.when(tirx.EQ(lane, 0)):
                    e.store(hidden, e.load(value, 0), by, n)


def dot(dtype: str, other: str, weights: Any, numbers: Any, count: Any, lane: Any) -> Any:
    """The inner product of a row of weights and of numbers, in all lanes of the warp: weights(at) and numbers(at) are addresses."""
    total = t.zeros(1)
    kinds = ", ".join(c.SHORT[kind].capitalize() for kind in (dtype, other))
    with e.loop(c.ceil(e.maximum(count - lane * EIGHT, 0), c.WARP * EIGHT)) as i:
        at = e.let((lane + i * c.WARP) * EIGHT)
        e.store(total, c.of("float32", f"dot_eight<{kinds}>", weights(at), numbers(at), e.load(total, 0)), 0)
    return c.of("float32", "warp_sum", e.load(total, 0))


@dataclass(frozen=True)
class CudaDownRows:
    """f(hidden [k, H], chosen [k], factors [k], down [E, N, H], bias [A, N], y [1, N]).

    y = the sum over the chosen experts of factor * (down hidden + bias). down and y of `dtype`, H a multiple of 8; chosen int32, -1 for none; the
    rest float32. A warp for each output.
    """

    dtype: str
    biased: bool = False

    @property
    def name(self) -> str:
        return "cuda_down_rows"

    def compute(self) -> Any:
        return e.function("main", self._body)

    def _body(self) -> None:
        H, N, E, k = (e.int32() for _ in range(4))
        hidden, chosen = c.parameter("hidden", (k, H), "float32"), c.parameter("chosen", (k,), "int32")
        factors, down = c.parameter("factors", (k,), "float32"), c.parameter("down", (E, N, H), self.dtype)
        bias, y = c.parameter("bias", (e.int32(), e.int32()), "float32"), c.parameter("y", (1, N), self.dtype)
        flat = c.flat(down, E, H, N)
        with c.launch((c.ceil(N, WARPS),), THREADS) as (bx, thread):
            lane, n = e.let(thread % c.WARP), e.let(bx * WARPS + tirx.truncdiv(thread, c.WARP))
            with e.when(n < N):
                total = t.zeros(1)
                with e.loop(k) as j:
                    expert = e.let(e.load(chosen, j))
                    with e.when(e.both(expert >= 0, expert < E)):
                        base = (e.cast("int64", expert) * e.cast("int64", N) + e.cast("int64", n)) * e.cast("int64", H)
                        found = dot(self.dtype, "float32", lambda at: c.address(flat, base + e.cast("int64", at)),
                                    lambda at: c.address(hidden, j, at), H, lane)
                        given = found + e.load(bias, expert, n) if self.biased else found
                        e.store(total, e.load(total, 0) + e.load(factors, j) * given, 0)
                with e.when(tirx.EQ(lane, 0)):
                    c.write(y, e.load(total, 0), 0, n)
