"""What kernels of FFNs that read some of their neurons for one row of x share: parameters, and the steps from the chosen neurons to y."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.kernels.finish import Finish
from sparsify_compiler.codegen.kernels.gather_rows import Chosen, Sums, each_span, weight_argument
from sparsify_compiler.codegen.kernels.products import TOGETHER as NEURONS
from sparsify_compiler.codegen.kernels.products import copy_inputs, products


class How(Protocol):
    """What a schedule says, of all of them."""

    @property
    def dtype(self) -> str: ...
    @property
    def columns(self) -> int: ...
    @property
    def parallel(self) -> bool: ...


class Arguments:
    """f(x [1, K], by, limit [1], gate [H, K], up [H, K], gate_bias [H], up_bias [H], weight [H, W], bias [W], y [1, N]), and what is written between.

    by      what the neurons are chosen by: a vector [H], or rows [1, H]; of any size where there is nothing
    gated   without a gate up and up_bias are of any size, and gate is the one projection that there is
    """

    def __init__(self, how: How, chosen_by: str, gated: bool = True) -> None:
        self.M, self.N, self.K, self.H, self.W = (e.int32() for _ in range(5))
        words = "float32" if how.dtype == "float32" else "int32"
        self.x = e.argument((self.M, self.K), how.dtype)
        self.by = e.argument({"rows": (self.M, self.H), "vector": (self.H,), "": (e.int32(),)}[chosen_by], "float32")
        self.limit = e.argument((e.int32(),), "float32")
        self.gate, self.up = (e.argument((self.H if given else e.int32(), e.int32()), words) for given in (True, gated))
        self.gate_bias, self.up_bias = (e.argument((e.int32(),), "float32") for _ in range(2))
        weight, bias = weight_argument(self.H, how.dtype), e.argument((self.W,), "float32")
        self.y = e.argument((self.M, self.N), how.dtype)
        self.inputs = e.scratch(self.K, "float32")    # x; for bfloat16 the even inputs, then the odd ones, of every load of weights
        one = tirx.const(1, "int32")
        self.chosen, self.sums = Chosen(one, self.H), Sums(how.dtype, weight, bias, one, self.W)
        copy_inputs(self.inputs, self.x, 0, 0, self.K, how.dtype)

    def rows(self, first: Any, count: Any) -> list[Any]:
        """The places of 16 chosen neurons; behind the last one it is taken again, and what comes of it never read."""
        return [e.let(e.load(self.chosen.places, e.minimum(first + n, count - 1))) for n in range(NEURONS)]

    def projected(self, how: How, weight: Any, bias: Any, rows: Sequence[Any], activation: str) -> Any:
        """What an activation gives of these neurons' products with x."""
        joined = e.join([e.load(bias, row) for row in rows], 1)
        total = e.let(products(weight, rows, self.inputs, 0, self.K, how.dtype) + joined)
        return e.let(Finish(activation=activation)(total))

    def sum_up(self, how: How, count: Any) -> None:
        """y, from the chosen neurons' values and their rows of down."""
        with each_span(self.W, how.columns, how.parallel) as (start, width):
            self.sums.add(self.chosen, count, start, width)
            self.sums.write(self.y, self.N, start, width)


@contextmanager
def each_group(count: Any, together: int, parallel: bool) -> Iterator[Any]:
    """`with each_group(...) as first:` the first neuron of each group of 16 that `count` of them make, `together` groups a task."""
    groups = e.let(e.floordiv(count + (NEURONS - 1), NEURONS))
    with e.loop(e.floordiv(groups + (together - 1), together), parallel=parallel) as task, e.loop(e.minimum(groups - task * together, together)) as i:
        yield e.let((task * together + i) * NEURONS)
