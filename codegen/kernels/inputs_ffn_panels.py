"""An FFN of which every linear selects its inputs, for many rows of x: linear by linear, each as selected_panels.py does it.

Bound by: the FMA rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.host import emit_within
from sparsify_compiler.codegen.kernels.finish import NOTHING, Finish
from sparsify_compiler.codegen.kernels.gather_rows import weight_argument
from sparsify_compiler.codegen.kernels.inputs_ffn_rows import Selection
from sparsify_compiler.codegen.kernels.selected_panels import SelectedPanels
from sparsify_compiler.codegen.vectors import AVX512, Vectors
from sparsify_compiler.ops import select_ffn


@dataclass(frozen=True)
class InputsFfnPanels:
    """How: as InputsFfnRows, work split for this many threads (1: on the caller's alone)."""

    dtype: str
    activation: str
    gate: Selection
    up: Selection | None
    down: Selection
    workers: int
    cut_for: Vectors = AVX512
    name = "inputs_ffn_panels"

    def compute(self) -> Any:
        """The PrimFunc of InputsFfnRows."""
        return e.function("main", lambda: _body(self), self.cut_for)


def _body(how: InputsFfnPanels) -> None:
    M, N, K, H = (e.int32() for _ in range(4))
    x = e.argument((M, K), how.dtype)
    raising = [_linear(kind, how.dtype, K) for kind in (how.gate, how.up) if kind is not None]
    down, y = _linear(how.down, how.dtype, H), e.argument((M, N), how.dtype)

    def multiply(kind: Selection, given: str, out: str, activation: str, buffers: list[Any]) -> None:
        finish = Finish(activation=activation) if activation else NOTHING
        emit_within(SelectedPanels(how.dtype, kind.scaled, kind.centered, how.workers, out, given, finish, how.cut_for), buffers)

    products = [e.matrix(M, H) for _ in raising]
    multiply(how.gate, how.dtype, "float32", how.activation, [x, *raising[0], products[0]])
    if how.up is not None:
        multiply(how.up, how.dtype, "float32", select_ffn.UP.get(how.activation, ""), [x, *raising[1], products[1]])
        with e.loop(M, parallel=how.workers > 1) as m, e.loop(H) as at:
            e.store(products[0], e.load(products[0], m, at) * e.load(products[1], m, at), m, at)
    multiply(how.down, "float32", how.dtype, "", [products[0], *down, y])


def _linear(kind: Selection, dtype: str, inputs: Any) -> list[Any]:
    """The parameters of one linear: limit [1], scale, center, weight, bias."""
    limit = e.argument((e.int32(),), "float32")
    by = [e.argument((inputs if given else e.int32(),), "float32") for given in (kind.scaled, kind.centered)]
    return [limit, *by, weight_argument(inputs, dtype), e.argument((e.int32(),), "float32")]
