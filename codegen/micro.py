"""What this machine does in a second, one thing at a time: small kernels that do nothing else. From these numbers the costs of kernels are predicted.

read      cores add up numbers: the rate at which they arrive from whichever level of memory they lie in
multiply  fused multiply-adds of vectors in registers
dot       products of pairs of bfloat16 of such vectors (AVX512_BF16)
tiles     products of AMX tiles of bfloat16 in registers
gather    16 numbers from anywhere in 4 KB
nothing   what calling costs, waking the other threads, and code and data that have left the caches meanwhile
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sparsify_compiler.codegen import build, permission
from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen import emit_tiles as t
from sparsify_compiler.pages import resident
from sparsify_compiler.target import Target

What = Literal["read", "multiply", "dot", "tiles", "gather", "nothing"]
LANES, UNROLL, CHAINS, PRODUCTS, GATHERS = 16, 8, 12, 4, 4
GATHER = Path(__file__).parent / "kernels" / "gemv.ll"
DOT = Path(__file__).parent / "kernels" / "dot_bf16.ll"
TABLE = 1024                # numbers that are gathered from
AWAY = tuple(kb << 10 for kb in (16, 32, 256, 1024, 1536, 3072, 8192, 16384, 32768, 65536, 131072, 262144))     # bytes that are read again and again
SECONDS = 2e-3              # of one timing
ROUNDS = 9
TILE_FEATURES = ("amx-tile", "amx-bf16")


@dataclass(frozen=True)
class Probe:
    """One thing, over and over, by `workers` threads side by side."""

    what: What
    workers: int
    name = "probe"

    def compute(self) -> Any:
        """The PrimFunc f(times [C] uint8, data [workers, n] float32, y [workers, 16] float32): C says how often."""
        return e.function("main", lambda: _body(self))


def version() -> str:
    """Of what is measured: this text."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def measured(target: Target) -> dict[str, Any]:
    """Flops, gathers and seconds as cost_models/machine.py names them, and levels of memory. Takes some ten seconds of an otherwise idle machine."""
    cores = torch.get_num_threads()
    data = torch.zeros(cores, 2 * TABLE, dtype=torch.float32)
    probes = {(what, workers): _probe(what, workers, target) for what in ("read", "multiply", "nothing") for workers in {1, cores}}
    numbers = {"vector": cores * CHAINS * LANES * 2 / _each(probes["multiply", cores], 100_000, data, of=min),
               "gathers": GATHERS / _each(_probe("gather", 1, target), 20_000, data[:1], of=min),
               "call": _each(probes["nothing", 1], 1, data[:1], rounds=1000)}
    numbers["vector"] /= cores
    numbers["wake"] = max(0.0, _each(probes["nothing", cores], 1, data, rounds=1000) - numbers["call"])
    if target.has("avx512bf16"):
        numbers["dot"] = CHAINS * LANES * 4 / _each(_probe("dot", 1, target), 100_000, data[:1], of=min)
    if all(target.has(feature) for feature in TILE_FEATURES) and permission.tiles():
        numbers["matrix"] = PRODUCTS * 2 * 16 * 16 * 32 / _each(_probe("tiles", 1, target), 20_000, data[:1], of=min)
    rates = {workers: {size: _rate(probes["read", workers], size, workers) for size in AWAY} for workers in {1, cores}}
    memory = [{"bytes": size, "one": rates[1][size], "all": rates[cores][size], "cold": max(0.0, _cold(probes["nothing", 1], size) - numbers["call"])}
              for size in AWAY]
    return {"cores": cores, "numbers": numbers, "memory": memory}


def _probe(what: str, workers: int, target: Target) -> Callable[..., None]:
    function: Callable[..., None] = build.load(Probe(what, workers), target).function  # type: ignore[arg-type]
    return function


def _each(probe: Callable[..., None], times: int, data: Tensor, rounds: int = ROUNDS,
          of: Callable[[list[float]], float] = statistics.median) -> float:
    """Seconds of one of `times` repetitions, of all rounds the median; for what nothing but another program can slow down the `min`."""
    count, y = torch.empty(times, dtype=torch.uint8), torch.zeros(data.shape[0], LANES, dtype=torch.float32)
    probe(count, data, y)
    taken = []
    for _ in range(rounds):
        begin = time.perf_counter()
        probe(count, data, y)
        taken.append(time.perf_counter() - begin)
    return of(taken) / times


def _rate(probe: Callable[..., None], size: int, workers: int) -> float:
    """Bytes a second of reading `size` bytes again and again, a part of them each."""
    whole = LANES * UNROLL
    data = resident(torch.zeros(workers, max(1, size // (4 * workers * whole)) * whole, dtype=torch.float32))
    times = max(1, int(SECONDS * 3e10 / size))
    return data.numel() * 4 / _each(probe, times, data)


def _cold(probe: Callable[..., None], size: int) -> float:
    """Seconds of a call when so many bytes were read since the last one."""
    others, data = torch.zeros(size // 4, dtype=torch.float32), torch.zeros(1, LANES, dtype=torch.float32)
    count, y, taken = torch.empty(1, dtype=torch.uint8), torch.zeros(1, LANES, dtype=torch.float32), []
    for _ in range(2 * ROUNDS):
        others.sum()
        begin = time.perf_counter()
        probe(count, data, y)
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def _body(how: Probe) -> None:
    times, n = e.int32(), e.int32()
    e.argument((times,), "uint8")
    data = e.argument((how.workers, n), "float32")
    y = e.argument((how.workers, LANES), "float32")
    with e.loop(how.workers, parallel=how.workers > 1) as me:
        _BODIES[how.what](me, times, n, data, y)


def _sums(count: int) -> list[e.Register]:
    return [e.Register(LANES, e.broadcast(e.zero(), LANES)) for _ in range(count)]


def _keep(me: Any, sums: list[e.Register], y: Any) -> None:
    """Write what was computed, so that it is."""
    total = sums[0].get()
    for one in sums[1:]:
        total = e.let(total + one.get())
    e.store(y, total, me, 0, lanes=LANES)


def _read(me: Any, times: Any, n: Any, data: Any, y: Any) -> None:
    sums = _sums(UNROLL)
    with e.loop(times), e.loop(e.floordiv(n, LANES * UNROLL)) as i:
        for u, one in enumerate(sums):
            one.set(one.get() + e.load(data, me, (i * UNROLL + u) * LANES, lanes=LANES))
    _keep(me, sums, y)


def _multiply(me: Any, times: Any, n: Any, data: Any, y: Any) -> None:
    sums = _sums(CHAINS)
    a, b = (e.let(e.load(data, me, i * LANES, lanes=LANES)) for i in range(2))
    with e.loop(times):
        for one in sums:
            one.set(e.intrinsic("float32", LANES, "llvm.fma", one.get(), a, b))
    _keep(me, sums, y)


def _dot(me: Any, times: Any, n: Any, data: Any, y: Any) -> None:
    sums = _sums(CHAINS)
    a, b = (e.let(e.reinterpret("int32", e.load(data, me, i * LANES, lanes=LANES), LANES)) for i in range(2))
    with e.llvm(DOT.read_text()), e.loop(times):
        for one in sums:
            one.set(e.external(one.dtype, "dot_bf16", one.get(), a, b))
    _keep(me, sums, y)


def _tiles(me: Any, times: Any, n: Any, data: Any, y: Any) -> None:
    t.configure([t.ROWS] * 8)
    for i in range(PRODUCTS):
        t.zero(i)
        t.load(4 + i, data, me, i * 256)
    with e.loop(times):
        for i in range(PRODUCTS):
            t.multiply_add(i, 4 + i // 2, 6 + i % 2)
    for i in range(PRODUCTS):
        t.store(i, data, me, TABLE + i * 256)
    t.release()


def _gather(me: Any, times: Any, n: Any, data: Any, y: Any) -> None:
    def every(value: int) -> Any:
        return e.broadcast(e.constant(value, "int32"), LANES)

    sums = _sums(GATHERS)
    place = e.Register(LANES, e.reinterpret("int32", e.load(data, me, 0, lanes=LANES), LANES), "int32")
    with e.llvm(GATHER.read_text()), e.loop(times):
        for one in sums:
            place.set((place.get() + every(173)) & every(TABLE - 1))
            one.set(one.get() + e.external("float32x16", "gather", t.address(data, me, 0), place.get()))
    _keep(me, sums, y)


def _nothing(me: Any, times: Any, n: Any, data: Any, y: Any) -> None:
    e.store(y, e.zero(), me, 0)


_BODIES: Mapping[What, Callable[..., None]] = {"read": _read, "multiply": _multiply, "dot": _dot, "tiles": _tiles,
                                              "gather": _gather, "nothing": _nothing}
