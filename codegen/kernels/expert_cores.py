"""How a unit of 16 rows is packed and multiplied with an expert's weights as they lie: by vectors, or by AMX tiles."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen import emit_tiles as t
from sparsify_compiler.codegen.kernels.expert_order import Order
from sparsify_compiler.codegen.kernels.experts_layout import ExpertsArguments, ExpertsLayout
from sparsify_compiler.codegen.kernels.finish import Finish
from sparsify_compiler.codegen.kernels.products import LANES, copy_inputs, keep_inputs, products, step_of
from sparsify_compiler.ops import select_ffn

TILES = {16: (8, 3), 8: (4, 3), 4: (8, 2)}  # by lanes: outputs, and units, whose sums are in registers at a time
CONVERTED = {**TILES, 4: (4, 3)}            # the same of weights that are converted first: the more units, the more products for each


class Core(ABC):
    """group and strip: neurons and outputs at a time; across: units at a time; depth: inputs packed at a time; dtype: of what is packed.

    few  rows up to which an expert's are multiplied one after the other, as they lie; 0 for a core that does not
    """

    few = 0
    dtype: str
    group: int
    strip: int
    across: int
    depth: int

    def __init__(self, a: ExpertsArguments, how: ExpertsLayout) -> None:
        self.a, self.how = a, how
        self.finished: Any = None   # [unit][output or neuron][row] float32; where there is an up, its sums behind those of the gate
        self.turned: Any = None

    def open(self) -> None:
        """What a worker has to itself."""
        self.finished = e.scratch(2 * self.across * self.strip * e.lanes(), "float32")
        self.turned = e.scratch(LANES * e.lanes(), "float32")

    def close(self) -> None:
        """A worker is done."""
        return

    @abstractmethod
    def size(self, width: Any) -> Any:
        """Elements of a unit of so many inputs."""

    @abstractmethod
    def pack(self, packed: Any, start: Any, rows: list[Any], first: Any) -> None:
        """x[rows, first : first + depth] into the unit that starts there."""

    @abstractmethod
    def neurons(self, packed: Any, hidden: Any, expert: Any, first: Any, unit: Any, many: int) -> None:
        """What down reads: `group` neurons of an expert from `first` on, for `many` units."""

    @abstractmethod
    def write_neurons(self, hidden: Any, first: Any, unit: Any, many: int) -> None:
        """What down reads of them, from the finished sums of gate and up."""

    @abstractmethod
    def outputs(self, hidden: Any, expert: Any, first: Any, unit: Any, many: int) -> None:
        """`strip` outputs from `first` on into `finished`, for `many` units."""

    def copy_rows(self, order: Order, packed: Any, unit: Any) -> None:
        """The rows of a unit of few, one after the other."""
        raise NotImplementedError

    def row_neurons(self, order: Order, packed: Any, hidden: Any, expert: Any, first: Any, unit: Any) -> None:
        """As neurons, of such a unit."""
        raise NotImplementedError

    def row_outputs(self, order: Order, hidden: Any, expert: Any, first: Any, unit: Any, put: Callable[[Any, Any], None]) -> None:
        """put(row of the unit, 16 outputs from `first` on), of such a unit."""
        raise NotImplementedError

    def activated(self, place: Any, apart: int, lanes: int) -> Any:
        """activation(gate) * up of one line of `finished`; up lies `apart` elements behind the gate."""
        rough = self.how.dtype == "bfloat16" and e.vectors().masked
        value = e.let(Finish(activation=self.how.activation, rough=rough)(e.load(self.finished, place, lanes=lanes)))
        if not self.how.gated:
            return value
        raised = Finish(activation=select_ffn.UP.get(self.how.activation, ""))
        return e.let(value * raised(e.load(self.finished, place + apart, lanes=lanes)))

    def biased(self, name: str, expert: Any, first: Any, count: int, many: int, at: int) -> None:
        """Add a projection's bias to its sums, which lie from element `at` of `finished` on."""
        if f"{name}_bias" in self.a.biases:
            width = e.lanes()
            with e.loop(many) as v, e.loop(count) as n:
                place = e.let(at + (v * count + n) * width)
                bias = e.load(self.a.biases[f"{name}_bias"], e.wide(expert) * self.a.H + first + n)
                e.store(self.finished, e.load(self.finished, place, lanes=width) + e.broadcast(bias, width), place, lanes=width)

    @property
    def projections(self) -> list[str]:
        return ["gate", "up"] if self.how.gated else ["gate"]


class Fma(Core):
    """The weights of some outputs are broadcast one input after the other, and multiplied with some units, in float32: [input][row].

    bfloat16 is converted as it is loaded. Of an expert with few rows the lanes would be mostly empty: there they run along the inputs (products.py).
    """

    dtype, group, strip, few = "float32", LANES, LANES, 4

    def __init__(self, a: ExpertsArguments, how: ExpertsLayout) -> None:
        super().__init__(a, how)
        self.depth = e.lanes()
        self.of_word = step_of(how.dtype) // LANES     # lines of a unit that a word of weights is multiplied with
        self.outputs_at_once, self.across = (TILES if self.of_word == 1 else CONVERTED)[e.lanes()]

    def size(self, width: Any) -> Any:
        return width * e.lanes()

    def pack(self, packed: Any, start: Any, rows: list[Any], first: Any) -> None:
        for k, column in enumerate(e.transpose([e.let(e.read_float(self.a.x, row, first, lanes=e.lanes())) for row in rows])):
            e.store(packed, column, start + (first + k) * e.lanes(), lanes=e.lanes())

    def neurons(self, packed: Any, hidden: Any, expert: Any, first: Any, unit: Any, many: int) -> None:
        width = e.lanes()
        apart = many * self.group * width
        for which, name in enumerate(self.projections):
            self._halves(name, expert, first, self.a.H, packed, self.a.K, unit, many, which * apart)
            self.biased(name, expert, first, self.group, many, which * apart)
        self.write_neurons(hidden, first, unit, many)

    def write_neurons(self, hidden: Any, first: Any, unit: Any, many: int) -> None:
        width = e.lanes()
        apart = many * self.group * width
        with e.loop(many) as v, e.loop(self.group) as n:
            value = self.activated(e.let((v * self.group + n) * width), apart, width)
            e.store(hidden, value, (unit + v) * self.size(self.a.H) + (first + n) * width, lanes=width)

    def outputs(self, hidden: Any, expert: Any, first: Any, unit: Any, many: int) -> None:
        self._halves("down", expert, first, self.a.N, hidden, self.a.H, unit, many, 0)

    def copy_rows(self, order: Order, packed: Any, unit: Any) -> None:
        with e.loop(order.filled(unit)) as i:
            at, row = e.opaque(unit * self.size(self.a.K) + i * self.length(self.a.K)), e.let(e.floordiv(order.place(unit, i), self.a.k))
            self.copy_row(packed, at, row)

    def row_neurons(self, order: Order, packed: Any, hidden: Any, expert: Any, first: Any, unit: Any) -> None:
        a = self.a
        with e.loop(order.filled(unit)) as i:
            for which, name in enumerate(self.projections):
                rows, at = a.rows(name, expert, first, LANES, a.H - 1), e.opaque(unit * self.size(a.K) + i * self.length(a.K))
                total = self.row_products(a.projections[name][0], rows, packed, at, a.K)
                if f"{name}_bias" in a.biases:
                    total = total + e.load(a.biases[f"{name}_bias"], e.wide(expert) * a.H + first, lanes=LANES)
                e.store(self.finished, total, which * LANES, lanes=LANES)
            value = self.activated(e.constant(0, "int32"), LANES, LANES)
            self.keep_row(hidden, value, unit * self.size(a.H) + i * self.length(a.H) + self.length(first))

    def row_outputs(self, order: Order, hidden: Any, expert: Any, first: Any, unit: Any, put: Callable[[Any, Any], None]) -> None:
        a = self.a
        with e.loop(order.filled(unit)) as i:
            rows, at = a.rows("down", expert, first, LANES, a.N - 1), e.opaque(unit * self.size(a.H) + i * self.length(a.H))
            total = e.Register(LANES, self.row_products(a.projections["down"][0], rows, hidden, at, a.H))
            put(i, total.get())

    def copy_row(self, packed: Any, at: Any, row: Any) -> None:
        """A row of x from `at` on, as row_products() takes it."""
        copy_inputs(packed, self.a.x, row, at, self.a.K, self.how.dtype)

    def length(self, width: Any) -> Any:
        """Elements of so many inputs of one row of a unit of few."""
        return width

    def row_products(self, weight: Any, rows: list[Any], inputs: Any, at: Any, size: Any) -> Any:
        """16 rows of a weight with such a row, which lies from `at` on."""
        return products(weight, rows, inputs, at, size, self.how.dtype)

    def keep_row(self, hidden: Any, value: Any, at: Any) -> None:
        """16 neurons of such a row."""
        keep_inputs(hidden, value, e.let(at), self.how.dtype)

    def _halves(self, name: str, expert: Any, first: Any, end: Any, inputs: Any, width: Any, unit: Any, many: int, at: int) -> None:
        """16 rows of a weight, of the `end` of an expert, some at a time."""
        def some(part: Any) -> None:
            rows = self.a.rows(name, expert, first + part, self.outputs_at_once, end - 1)
            self._multiply(self.a.projections[name][0], rows, inputs, width, unit, many, at + part * e.lanes())

        if e.vectors().masked:
            for half in range(0, LANES, self.outputs_at_once):
                some(half)
        else:   # written out they would take long to compile
            with e.loop(LANES // self.outputs_at_once) as number:
                some(e.let(number * self.outputs_at_once))

    def _multiply(self, weight: Any, rows: list[Any], inputs: Any, width: Any, unit: Any, many: int, at: int) -> None:
        """finished[v][n] = sums over the inputs of these rows of W, for `many` units."""
        lanes, words = e.lanes(), e.let(self.words(width))
        sums = [[e.Register(lanes, e.broadcast(e.zero(), lanes)) for _ in range(many)] for _ in rows]
        starts = [e.wide((unit + v) * self.size(width)) for v in range(many)]
        rows, steps = [e.wide(row) for row in rows], lanes if e.vectors().by_element else 1
        with e.loop(words if steps == 1 else e.floordiv(words, steps)) as k:
            column = e.wide(k if steps == 1 else k * steps)
            held = [e.let(e.load(weight, row, column, lanes=steps)) for row in rows]
            factors = [[self.factors(word, part) for word in held] for part in range(self.of_word)]
            for step in range(steps):
                for part in range(self.of_word):
                    line = ((column + step) * self.of_word + part) * lanes
                    values = [e.let(e.load(inputs, start + line, lanes=lanes)) for start in starts]
                    for factor, totals in zip(factors[part], sums, strict=True):
                        add = factor(step)
                        for value, total in zip(values, totals, strict=True):
                            add(total, value)
        for n, totals in enumerate(sums):
            for v, total in enumerate(totals):
                e.store(self.finished, total.get(), at + (v * LANES + n) * lanes, lanes=lanes)

    def words(self, width: Any) -> Any:
        """Words of so many weights of a row."""
        return width if self.of_word == 1 else e.floordiv(width, self.of_word)

    def factors(self, word: Any, part: int) -> Callable[[int], Callable[[e.Register, Any], None]]:
        """(step) -> (sums, line of a unit): add what the step-th of loaded words gives, or its part, in float32."""
        steps = e.lanes() if e.vectors().by_element else 1
        numbers = word if self.of_word == 1 else e.let(e.upcast_pairs(word, steps)[part])

        def step(number: int) -> Callable[[e.Register, Any], None]:
            factor = e.let(e.broadcast(e.lane(numbers, number) if steps > 1 else numbers, e.lanes()))
            return lambda total, value: total.multiply_add(factor, value)

        return step


class Pairs(Core):
    """bfloat16 as [pair of inputs][row] words of two: how rows are packed, and neurons written for the second product."""

    dtype = "int32"

    def size(self, width: Any) -> Any:
        return e.floordiv(width, 2) * e.lanes()

    def pack(self, packed: Any, start: Any, rows: list[Any], first: Any) -> None:
        width = e.lanes()
        lines = [e.let(e.reinterpret("int32", e.load(self.a.x, row, first, lanes=self.depth), width)) for row in rows]
        for pair, words in enumerate(e.transpose(lines)):
            e.store(packed, words, start + (e.floordiv(first, 2) + pair) * width, lanes=width)

    def write_neurons(self, hidden: Any, first: Any, unit: Any, many: int) -> None:
        width = e.lanes()
        apart = many * self.group * width
        with e.loop(many) as v, e.loop(self.group // 2) as pair:
            low, high = (self.activated(e.let((v * self.group + 2 * pair + i) * width), apart, width) for i in range(2))
            to = (unit + v) * self.size(self.a.H) + (e.floordiv(first, 2) + pair) * width
            words = t.bfloat16_pairs(low, high) if e.vectors().masked else e.rounded_pairs(low, high, width)
            e.store(hidden, words, to, lanes=width)


class Tile(Pairs):
    """bfloat16 on AMX: a tile of W, 16 outputs × 32 inputs, times tiles of up to two units."""

    group, strip, across, depth = 16, 32, 2, 32

    def open(self) -> None:
        super().open()
        t.configure([t.ROWS] * 8)

    def close(self) -> None:
        t.release()

    def neurons(self, packed: Any, hidden: Any, expert: Any, first: Any, unit: Any, many: int) -> None:
        names, apart = self.projections, many * self.group * LANES
        weights = [(self.a.projections[name][0], self.a.rows(name, expert, first, 1, self.a.H - 1)[0]) for name in names]
        self._multiply(weights, packed, self.a.K, unit, many, [[which * apart + v * self.group * LANES for v in range(many)]
                                                                  for which in range(len(names))])
        for which, name in enumerate(names):
            self.biased(name, expert, first, self.group, many, which * apart)
        self.write_neurons(hidden, first, unit, many)

    def outputs(self, hidden: Any, expert: Any, first: Any, unit: Any, many: int) -> None:
        down, halves = self.a.projections["down"][0], self.strip // t.ROWS
        weights = [(down, self.a.rows("down", expert, first + half * t.ROWS, 1, self.a.N - 1)[0]) for half in range(halves)]
        self._multiply(weights, hidden, self.a.H, unit, many, [[(v * self.strip + half * t.ROWS) * LANES for v in range(many)]
                                                                for half in range(halves)])

    def _multiply(self, weights: list[tuple[Any, Any]], inputs: Any, width: Any, unit: Any, many: int, to: list[list[int]]) -> None:
        """Tiles 0 to 3 are sums, 4 and 5 weights, 6 and 7 inputs. Sums of weight w and unit v go to `finished` from to[w][v] on."""
        starts, words = [e.wide((unit + v) * self.size(width)) for v in range(many)], e.let(e.floordiv(width, 2))
        rows = [e.wide(row) for _, row in weights]
        for i in range(len(weights) * many):
            t.zero(i)
        with e.loop(e.floordiv(width, self.depth)) as j:
            for v, start in enumerate(starts):
                t.load(6 + v, inputs, start + e.wide(j) * (t.ROWS * LANES))
            for w, ((weight, _), row) in enumerate(zip(weights, rows, strict=True)):
                t.load(4 + w, weight, row, e.wide(j * LANES), stride=words * 4)
                for v in range(many):
                    t.multiply_add(w * many + v, 4 + w, 6 + v)
        for w in range(len(weights)):
            for v in range(many):
                t.store(w * many + v, self.finished, to[w][v])
