"""A machine as data: what it does in a second, each number with its unit and its source.

Data-sheet machines are JSON files in machines/, each of which names its target, which has its instruction sets and cores; this machine is measured
(codegen/micro.py) and has the same form.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from sparsify_compiler.errors import TargetError, unknown
from sparsify_compiler.target import resolve

FOLDER = Path(__file__).with_name("machines")
UNITS: Mapping[str, str] = {
    "vector": "flop/s of a core, float32",
    "dot": "flop/s of a core, bfloat16, by products of pairs in vectors",
    "matrix": "flop/s of a core, bfloat16",
    "gathers": "16 numbers/s of a core, from its first cache",
    "call": "s, Python calling a kernel",
    "wake": "s, until other threads have begun and the last has ended",
}
FMA_FLOPS, DOT_FLOPS, TILE_FLOPS = 2 * 16, 4 * 16, 2 * 16 * 16 * 32
OPTIONAL = frozenset({"dot", "matrix"})


@dataclass(frozen=True)
class Number:
    """A value, what it is of, and where it comes from."""

    value: float
    unit: str
    source: str


@dataclass(frozen=True)
class Level:
    """When so many other bytes were read since: bytes a second at which data comes again, to one core, to all; seconds that a call takes longer."""

    bytes: float
    one: float
    all: float
    cold: float
    source: str


@dataclass(frozen=True)
class Machine:
    """A machine.

    name      as `--target` takes it
    title     what it is
    arch      "x86_64", "aarch64" or "cuda"
    features  LLVM feature names that decide which kernels there are
    cores     that take part; a GPU counts as one core
    numbers   by the names in UNITS; those in OPTIONAL are missing where there are no such units
    memory    levels by rising size; rates between two are interpolated: seconds for a byte, over the logarithm of the size
    second_cache  bytes of a core's, which weights are cut for
    costs     of kernels, where they were fitted on this very machine (fit.py); of others they are its nearest kin's (shipped.py)
    """

    name: str
    title: str
    arch: str
    features: tuple[str, ...]
    cores: int
    numbers: Mapping[str, Number]
    memory: tuple[Level, ...]
    costs: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    second_cache: int = 2 << 20

    def __post_init__(self) -> None:
        levels = "levels of memory: at least two, which rise in size, and cores"
        wrong = sorted(name for name, number in self.numbers.items() if UNITS.get(name) != number.unit or not number.value >= 0)
        missing = sorted(set(UNITS) - OPTIONAL - set(self.numbers))
        sizes = [level.bytes for level in self.memory]
        if wrong or missing or len(sizes) < 2 or sizes != sorted(set(sizes)) or self.cores < 1:
            bad = f"numbers {wrong}" if wrong else f"missing {missing}" if missing else levels
            raise TargetError(f"the machine's data is wrong: {bad}", where=self.name)

    def times(self, threads: int) -> dict[str, float]:
        """Seconds by the names of symbols.TIMES, for a call on that many threads; all but those that depend on where data lies."""
        vector = self.numbers["vector"].value
        dot, matrix = (self.numbers[name].value if name in self.numbers else vector for name in ("dot", "matrix"))
        return {"threads": threads, "call": self.numbers["call"].value, "wake": self.numbers["wake"].value if threads > 1 else 0.0,
                "fma": FMA_FLOPS / vector, "dot": DOT_FLOPS / dot, "tile": TILE_FLOPS / matrix, "gather": 1 / self.numbers["gathers"].value,
                "near": 1 / self.rate(NEAR, 1)}

    def rate(self, distance: float, threads: int) -> float:
        """Bytes a second at which data arrives that was read that many bytes ago, all threads together."""
        one, everyone = 1 / self._between(distance, lambda level: 1 / level.one), 1 / self._between(distance, lambda level: 1 / level.all)
        return everyone if threads >= self.cores else min(one * threads, everyone)

    def cold(self, distance: float) -> float:
        """Seconds that a call takes longer when that many bytes were read since the last, for its code and data were displaced."""
        return self._between(distance, lambda level: level.cold) if distance > 0 else 0.0

    def _between(self, distance: float, what: Callable[[Level], float]) -> float:
        sizes = [level.bytes for level in self.memory]
        at = bisect_left(sizes, distance)
        if at == 0 or at == len(sizes):
            return what(self.memory[min(at, len(sizes) - 1)])
        low, high = self.memory[at - 1], self.memory[at]
        part = math.log(distance / low.bytes) / math.log(high.bytes / low.bytes)
        return (1 - part) * what(low) + part * what(high)

    def to_json(self) -> dict[str, Any]:
        """Plain data, the inverse of from_json."""
        return {"name": self.name, "title": self.title, "arch": self.arch, "features": list(self.features), "cores": self.cores,
                "numbers": {name: vars(number) for name, number in self.numbers.items()}, "memory": [vars(level) for level in self.memory],
                "second_cache": self.second_cache}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Machine:
        """Raises TargetError where the data does not describe a machine."""
        try:
            return Machine(data["name"], data["title"], data["arch"], tuple(data["features"]), int(data["cores"]),
                           {name: Number(**number) for name, number in data["numbers"].items()}, tuple(Level(**level) for level in data["memory"]),
                           second_cache=int(data.get("second_cache", Machine.second_cache)))
        except (KeyError, TypeError, ValueError) as error:
            raise TargetError(f"this does not describe a machine: {error!r}", where=str(data.get("name", ""))) from error


NEAR = 1 << 19      # bytes: in the second cache of a core


def names() -> tuple[str, ...]:
    """The machines that are known from their data sheets."""
    return tuple(sorted(file.stem for file in FOLDER.glob("*.json")))


@cache
def known(name: str) -> Machine:
    """One of them. Raises UnknownNameError."""
    if name not in names():
        raise unknown("machine", name, names())
    data = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    target = resolve(data.pop("target"))
    return Machine.from_json({**data, "arch": target.arch, "features": target.features, "cores": target.cores})


@cache
def sheets_of(target: str) -> tuple[str, ...]:
    """The machines of a target, by their names: what is compiled for it runs on them."""
    return tuple(name for name in names() if json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))["target"] == target)
