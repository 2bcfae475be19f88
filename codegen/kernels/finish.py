"""What is computed of y before it is written, by any kernel; and vectors of which only a part is in the tensor, for convolutions.

A NaN stays a NaN through every activation here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.errors import KernelError

LANES = 16      # of the vectors that convolutions are counted in
# exp2 on [-1/2, 1/2]: minimax polynomial, relative error 2e-9 (Horner, highest power first).
EXP2 = (1.535336188319500e-4, 1.339887440266574e-3, 9.618437357674640e-3, 5.550332471162809e-2, 2.402264791363012e-1, 6.931472028550421e-1, 1.0)
EXP2_ROUGH = (9.676037e-3, 5.592204e-2, 0.2402211, 0.6931210, 1.0)  # 4e-6
# Φ(x) - 1/2 = x times a quotient of powers of x², from the highest to the zeroth, for |x| <= FAR, where it has reached 1/2: Φ to 2e-8 as far as 5.4,
# and beyond to 1e-7. Fitted by weighted least squares, whose weights followed the error.
PHI = ((2.33867569e-8, 6.36000374e-6, 1.64320684e-4, 4.65084528e-3, 3.33721389e-2, 0.398942245),
       (1.21659039e-6, 7.23998060e-5, 1.85897601e-3, 2.83786349e-2, 0.250317636, 1.0))
FAR = 5.6
LOG2_E = math.log2(math.e)
# Φ(x) - 1/2 = x times these powers of x², from the eighth to the zeroth, for |x| <= WIDE, where it has reached 1/2: x Φ(x) to 7e-5 everywhere.
PHI_ROUGH = (7.328675e-11, -6.792406e-9, 2.7632743e-7, -6.57812e-6, 1.0383366e-4, -1.1755712e-3, 1.0057420e-2, -6.6772737e-2, 0.39916933)
WIDE = 4.25


@dataclass(frozen=True)
class Finish:
    """Whether `other` is added, then an activation ("" for none) with its numbers.

    rough   results become bfloat16, on AVX-512: reciprocals to 2^-14, which are one instruction, powers of two to 4e-6 and gelu to 7e-5 are enough
    """

    add: bool = False
    activation: str = ""
    numbers: tuple[float, ...] = ()
    rough: bool = False

    @property
    def long(self) -> bool:
        """Is it better written once, in a loop of its own, than behind every sum: do its numbers take many registers?"""
        return self.activation in LONG

    def __call__(self, value: Any, other: Any = None) -> Any:
        """The vector that is written, of a vector of sums and one of what is added."""
        value = e.let(value if other is None else value + other)
        return e.let(ACTIVATIONS[self.activation](self, value, *self.numbers)) if self.activation else value


NOTHING = Finish()


def finish_of(attributes: Mapping[str, Any], rough: bool = False) -> Finish | None:
    """Of an epilogue's attributes (engine's epilogue.py); None where it has an activation that is not written here."""
    name, arguments = attributes.get("activation", ""), attributes.get("arguments", {})
    name = f"{name}_{arguments['approximate']}" if arguments.get("approximate", "none") != "none" else name
    numbers = tuple(float(arguments[key]) for key in ("min_val", "max_val", "negative_slope") if key in arguments)
    if (name and name not in ACTIVATIONS) or (name == "hardtanh" and numbers[0] > numbers[1]):
        return None
    return Finish(bool(attributes.get("add")), name, numbers, rough)


def needed_finish(op: str, attributes: Mapping[str, Any], rough: bool = False) -> Finish:
    """The same. Raises KernelError instead: a stored kernel may ask for anything."""
    finish = finish_of(attributes, rough)
    if finish is None:
        raise KernelError("no kernel has this activation", where=op, hint="compile the model again here")
    return finish


def load_part(buffer: Any, at: Any, count: Any) -> Any:
    """`count` neighbours of a register from `at` on (none where it is below 1), zeros behind. Inside of `with e.llvm(e.vectors().text("part"))`."""
    return tirx.call_extern(e.floats(e.lanes()), "load_part", tirx.address_of(tirx.BufferLoad(buffer, [at])), count)


def load_between(buffer: Any, at: Any, first: Any, end: Any) -> Any:
    """The lanes from `first` to before `end` of the neighbours from `at` on, zeros around them; `at` itself may lie outside of the buffer."""
    return tirx.call_extern(e.floats(e.lanes()), "load_between", tirx.address_of(tirx.BufferLoad(buffer, [at])), first, end)


def store_part(buffer: Any, value: Any, at: Any, count: Any) -> None:
    """Write the first `count` lanes."""
    e.builder.evaluate(tirx.call_extern("int32", "store_part", tirx.address_of(tirx.BufferLoad(buffer, [at])), value, count))


@dataclass(frozen=True)
class Images:
    """A parameter: its elements as a vector, and how far it is from one image, and from one plane, to the next."""

    elements: Any
    image: Any
    plane: Any


def images(*sizes: Sequence[Any] | None) -> list[Images | None]:
    """The next and last parameters: float32 images of these sizes (None for none), the lines of a plane one after the other.

    Planes may have room between them.
    """
    made = []
    for size in sizes:
        strides = [e.int32() for _ in range(4)]
        made.append(None if size is None else (size, strides, e.strided(tuple(size), strides)))
    return [None if one is None else Images(e.builder.decl_buffer((one[0][0] * one[1][0],), "float32", data=one[2].data, align=4), *one[1][:2])
            for one in made]


def constant(value: float, like: Any) -> Any:
    """A float32 in as many lanes as `like` has."""
    return e.broadcast(tirx.const(value, "float32"), _lanes(like))


def _lanes(x: Any) -> int:
    return int(str(x.ty).partition("x")[2] or 1)


def _clamp(x: Any, low: float, high: float) -> Any:
    x = e.let(tirx.Select(x < constant(low, x), constant(low, x), x))
    return tirx.Select(x > constant(high, x), constant(high, x), x)


def _relu(x: Any) -> Any:
    return tirx.Select(x < constant(0.0, x), constant(0.0, x), x)


def _square(x: Any) -> Any:
    x = e.let(x)
    return x * x


def _leaky(x: Any, slope: float) -> Any:
    return tirx.Select(x < constant(0.0, x), x * constant(slope, x), x)


def _gate(x: Any) -> Any:
    """hardsigmoid."""
    return _clamp(x + constant(3.0, x), 0.0, 6.0) * constant(1 / 6, x)


def _inverse(how: Finish, x: Any) -> Any:
    x = e.let(x)
    if not how.rough:
        return constant(1.0, x) / x
    every = tirx.const(-1, "int16")
    return e.let(tirx.call_llvm_pure_intrin("float32x16", "llvm.x86.avx512.rcp14.ps.512", x, constant(0.0, x), every))


def _exp2(how: Finish, power: Any) -> Any:
    """2**power, 0 below -126 and infinite above 127: put together from the exponent and a polynomial."""
    power, lanes = e.let(_clamp(e.let(power), -127.0, 128.0)), _lanes(power)
    whole = e.let(tirx.call_llvm_pure_intrin(str(power.ty), "llvm.rint", power))
    first, *others = EXP2_ROUGH if how.rough else EXP2
    rest, value = e.let(power - whole), constant(first, power)
    for coefficient in others:
        value = e.let(value * rest + constant(coefficient, power))
    exponent = (e.cast_to("int32", whole, lanes) + e.broadcast(tirx.const(127, "int32"), lanes)) << e.broadcast(tirx.const(23, "int32"), lanes)
    return e.let(value * e.reinterpret("float32", exponent, lanes))


def _sigmoid(how: Finish, x: Any) -> Any:
    return _inverse(how, constant(1.0, x) + _exp2(how, x * constant(-LOG2_E, x)))


def _powers(x: Any, coefficients: Sequence[float]) -> Any:
    """The sum of powers of x, the highest first (Horner)."""
    value = constant(coefficients[0], x)
    for coefficient in coefficients[1:]:
        value = e.let(value * x + constant(coefficient, x))
    return value


def _gelu(how: Finish, x: Any) -> Any:
    """x Φ(x), without powers of two: a quotient takes half of their time, and is as near as 1 + erf, which float32 rounds to 6e-8, can be."""
    limit = WIDE if how.rough else FAR
    near = e.let(_clamp(x, -limit, limit))
    square = e.let(near * near)
    slope = _powers(square, PHI_ROUGH) if how.rough else e.let(_powers(square, PHI[0]) / _powers(square, PHI[1]))
    return x * _clamp(e.let(slope * near + constant(0.5, x)), 0.0, 1.0)


def _gelu_tanh(how: Finish, x: Any) -> Any:
    """x/2 (1 + tanh u) = x sigmoid(2u)."""
    return x * _sigmoid(how, e.let(x * (constant(1.0, x) + x * x * constant(0.044715, x)) * constant(2 * (2 / math.pi) ** 0.5, x)))


ACTIVATIONS: Mapping[str, Any] = {
    "relu": lambda _, x: _relu(x), "relu2": lambda _, x: _square(_relu(x)), "drelu": lambda _, x: _relu(x), "relu6": lambda _, x: _clamp(x, 0.0, 6.0),
    "hardtanh": lambda _, x, low, high: _clamp(x, low, high), "leaky_relu": lambda _, x, slope: _leaky(x, slope),
    "hardsigmoid": lambda _, x: _gate(x), "hardswish": lambda _, x: x * _gate(x),
    "sigmoid": _sigmoid, "silu": lambda how, x: x * _sigmoid(how, x), "gelu": _gelu, "gelu_tanh": _gelu_tanh,
}  # fmt: skip
LONG = frozenset(("sigmoid", "silu", "gelu", "gelu_tanh"))  # which compute powers
